"""Soft actor-critic with an ensemble of critics (SAC, Haarnoja et al. 2018; REDQ, Chen et al. 2021; RLPD, Ball et al. 2023).

The plain learner: no base policy, no head, actions straight from the actor. It is the baseline of the benchmarks and the
smallest reading of how the parts of this room fit together::

    y       = R + disc · reduce(Q̄(s', u'))  [- disc · α log π(u'|s')]          u' ~ π(s')
    L_Q     = 0.5 Σ_i wmean((Q_i(s, a) - y)²)
    L_π     = mean(α log π(u|s) - reduce(Q(s, u)))                             u ~ π(s), every ``actor_every`` updates
    L_α     = -log α (log π + H̄)
    θ̄      <- (1 - τ) θ̄ + τ θ
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robot_rl.learners.config import Reduction, check_reduction
from robot_rl.learners.ensemble import PICKED, CriticEnsemble, TDSteps
from robot_rl.nn import compiled
from robot_rl.nn.actor import ActorSample, GaussianTanhActor, Temperature
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.grad import without_grad
from robot_rl.nn.mlp import Activation, MatmulPrecision, Tape, matmul_precision
from robot_rl.seeding import key


@dataclass(frozen=True)
class Transitions:
    """A batch of B transitions on the learner's device.

    Attributes:
        observation, next_observation: (B, S). action: (B, A) in [-1, 1]. reward: (B,).
        discount: (B,) what multiplies the bootstrapped value: γ^steps (1 - terminated). Truncation bootstraps.
        weight: (B,) or None; 0 drops a row, the loss is normalised by the sum.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_observation: Tensor
    weight: Tensor | None = None


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


@dataclass(frozen=True)
class SACConfig:
    """Everything that changes what the learner computes. Discounting is part of the data (``Transitions.discount``).

    ``utd`` critic updates make one :meth:`SACLearner.update`; the actor and the temperature move every ``actor_every``
    critic updates (RLPD: both 20, once per environment step). ``target_entropy`` None is -action_dim / 2.
    """

    observation_dim: int
    action_dim: int
    n_critics: int = 10
    hidden: tuple[int, ...] = (256, 256, 256)
    activation: Activation = "relu"
    critic_layer_norm: bool = True
    actor_layer_norm: bool = False
    utd: int = 1
    actor_every: int = 1
    tau: float = 0.005
    critic_lr: float = 3e-4
    actor_lr: float = 3e-4
    alpha_lr: float = 3e-4
    target_reduce: Reduction = "min_pair"
    actor_reduce: Reduction = "mean"
    lcb_k: float = 1.0
    entropy_backup: bool = True
    initial_alpha: float = 1.0
    alpha_floor: float = 0.0
    fixed_alpha: bool = False
    target_entropy: float | None = None
    actor_last_scale: float = 1e-2
    max_grad_norm: float | None = None
    matmul_precision: MatmulPrecision = "highest"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("observation_dim", "action_dim", "n_critics", "utd", "actor_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"SACConfig.{name}={getattr(self, name)}: accepted are integers >= 1")
        if not 0 < self.tau <= 1:
            raise ValueError(f"SACConfig.tau={self.tau}: accepted is (0, 1]")
        for name in ("target_reduce", "actor_reduce"):
            check_reduction(getattr(self, name), self.n_critics, f"SACConfig.{name}")


class SACLearner:
    """Actor, critics, target critics, temperature, their optimisers and generators; ``update`` runs without host sync."""

    def __init__(self, config: SACConfig, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        c = config
        kind: dict[str, Any] = {"device": device, "dtype": config.dtype}
        init = torch.Generator().manual_seed(key("sac", "init", seed))
        self.actor = GaussianTanhActor(
            c.observation_dim, c.action_dim, c.hidden, c.activation, c.actor_layer_norm,
            last_scale=c.actor_last_scale, generator=init, **kind,
        )  # fmt: skip
        self.critic = CriticEnsemble(
            c.n_critics, c.observation_dim + c.action_dim, c.hidden, c.activation, c.critic_layer_norm, generator=init, **kind
        )
        self.target = self.critic.make_target()
        self.temperature = Temperature(
            -c.action_dim / 2 if c.target_entropy is None else c.target_entropy,
            initial=c.initial_alpha, lr=c.alpha_lr, floor=c.alpha_floor, fixed=c.fixed_alpha, **kind,
        )  # fmt: skip
        self.actor_optimizer = FlatAdam(self.actor.flat, c.actor_lr, max_grad_norm=c.max_grad_norm)
        self.critic_optimizer = FlatAdam(self.critic.flat, c.critic_lr, max_grad_norm=c.max_grad_norm)
        # One generator per role: drawing more in one of them never shifts another.
        self.generators = {
            role: torch.Generator(device).manual_seed(key("sac", role, seed)) for role in ("acting", "actor", "reduce")
        }
        self.critic_updates = 0
        self.actor_updates = 0
        self._tapes: dict[int, Tape] = {}

    @without_grad
    def act(self, observation: Tensor, explore: bool = True) -> Tensor:
        """(B, S) to actions (B, A) in [-1, 1]: a draw from the policy, or tanh(mean)."""
        if explore:
            return self.actor.draw(observation, self.generators["acting"]).u
        return self.actor.mean(observation)

    def update(self, batches: Iterable[Transitions], *, report: bool = True) -> dict[str, Tensor]:
        """One critic update per batch (``utd`` of them), actor updates in between.

        Returns 0-dim tensors about the last ones, nothing without ``report``.

        Raises:
            ValueError: the number of batches is not ``config.utd``, or they differ in size or in whether they have weights.
        """
        metrics: dict[str, Tensor] = {}
        with torch.no_grad(), matmul_precision(self.config.matmul_precision):
            todo = list(batches)
            if len(todo) != self.config.utd:
                raise ValueError(f"update() got {len(todo)} batches; config.utd={self.config.utd}")
            if len({(len(b.reward), b.weight is None) for b in todo}) > 1:
                raise ValueError(
                    "update() got batches that differ in size or in whether they have weights; accepted are equal ones"
                )
            while todo:  # the actor stands still for so many critic updates
                group = todo[: self.config.actor_every - self.critic_updates % self.config.actor_every]
                todo = todo[len(group) :]
                metrics |= self._update(group, report=report and not todo)
        return metrics

    def _update(self, group: list[Transitions], report: bool) -> dict[str, Tensor]:
        c = self.config
        # One pass of the actor draws for all of the group's targets and, in its first rows, for its own loss.
        own = len(group[-1].reward) if (self.critic_updates + len(group)) % c.actor_every == 0 else 0
        seen = [*([group[-1].observation] if own else []), *(b.next_observation for b in group)]
        x_drawn = seen[0].new_empty(sum(map(len, seen)), c.observation_dim + c.action_dim)
        torch.cat(seen, out=x_drawn[:, : c.observation_dim])
        alpha = self.temperature.alpha

        metrics: dict[str, Tensor] = {}
        with compiled.together(not report and self._compiled(x_drawn)):
            draw = self._draw(x_drawn)  # is under way while the rest is being put together
            x = torch.cat((_stack([b.observation for b in group]), _stack([b.action for b in group])), -1)
            weights = [b.weight for b in group if b.weight is not None]
            steps = TDSteps(
                x, x_drawn[own:].view_as(x), _stack([b.reward for b in group]), _stack([b.discount for b in group]),
                draw.log_prob[own:].view(len(group), -1) if c.entropy_backup else None, -alpha,
                _stack(weights) if weights else None,
            )  # fmt: skip
            fit = self.critic.td_updates(
                self.target, self.critic_optimizer, c.tau, steps, c.target_reduce, self.generators["reduce"], k=c.lcb_k
            )  # fmt: skip
            if report:
                spread = fit.q.std(0, correction=0).mean()
                metrics = {"critic_loss": fit.loss, "q": fit.q.mean(), "q_std": spread, "target": fit.y.mean()}
            self.critic_updates += len(group)
            if own:
                metrics |= self._update_actor(draw, x_drawn[:own], alpha, report)
        return metrics

    def _compiled(self, x: Tensor) -> bool:
        """Whether nothing but compiled passes stands between a draw and the temperature's step."""
        c = self.config
        return (
            all(compiled.fits(net, x) for net in (self.actor, self.critic, self.target))
            and all(adam.compiled for adam in (self.actor_optimizer, self.critic_optimizer, self.temperature.optimizer))
            and c.target_reduce in PICKED[:2]
            and c.actor_reduce in PICKED
        )

    def _update_actor(self, draw: ActorSample, x: Tensor, alpha: Tensor, report: bool) -> dict[str, Tensor]:
        """alpha log π(u|s) - reduce(Q(s, u)), averaged over the first rows of the draw; then the temperature from them."""
        c, batch = self.config, len(x)
        log_prob = draw.log_prob[:batch]
        value, dvalue = self.critic.reduced_input_grad(
            x, c.actor_reduce, self.generators["reduce"], k=c.lcb_k, columns=slice(c.observation_dim, None), by_head=True
        )
        self.actor.backward_draw(draw, dvalue, (alpha / batch).expand(batch), rows=batch, scale=-1 / batch)
        self.actor_optimizer.step()
        alpha_loss = self.temperature.step(log_prob)
        self.actor_updates += 1
        if not report:
            return {}
        entropy = -log_prob.mean()
        return {"actor_loss": -alpha * entropy - value.mean(), "entropy": entropy, "alpha": alpha, "alpha_loss": alpha_loss}

    def _draw(self, x: Tensor) -> ActorSample:
        """Actions for the observations in the first columns of ``x``, written to its last."""
        rows, split = len(x), self.config.observation_dim
        if rows not in self._tapes:
            self._tapes[rows] = self.actor.tape(rows)
        return self.actor.draw(x[:, :split], self.generators["actor"], self._tapes[rows], x[:, split:])

    # ---- exact resume

    def _parts(self) -> dict[str, object]:
        return {
            "actor": self.actor, "critic": self.critic, "target": self.target,
            "actor_optimizer": self.actor_optimizer, "critic_optimizer": self.critic_optimizer,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """A flat mapping of tensors (fit for safetensors): networks, moments, temperature, generators, counters."""
        state = {f"{part}.{k}": v.detach().clone() for part, p in self._parts().items() for k, v in p.state_dict().items()}  # type: ignore[attr-defined]
        state |= {f"temperature.{k}": v for k, v in self.temperature.full_state().items()}
        state |= {f"generator.{role}": g.get_state() for role, g in self.generators.items()}
        return state | {f"counter.{k}": torch.tensor(getattr(self, k)) for k in ("critic_updates", "actor_updates")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy everything in place. Raises ValueError when keys or shapes do not fit this configuration."""
        expected = self.state_dict()
        wrong = sorted(set(expected) ^ set(state)) or [k for k in expected if expected[k].shape != state[k].shape]
        if wrong:
            raise ValueError(f"learner state does not fit this configuration; {len(wrong)} keys differ, e.g. {wrong[:3]}")

        def part(name: str) -> dict[str, Tensor]:
            return {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}

        for name, p in self._parts().items():
            p.load_state_dict(part(name))  # type: ignore[attr-defined]
        self.temperature.load_full_state(part("temperature"))
        for role, g in self.generators.items():
            g.set_state(state[f"generator.{role}"].cpu())
        self.critic_updates, self.actor_updates = (int(state[f"counter.{k}"]) for k in ("critic_updates", "actor_updates"))
