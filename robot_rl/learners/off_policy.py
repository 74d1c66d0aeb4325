"""The off-policy core: one critic over chunks (or noise), one temporal-difference rule, and a head that climbs it.

What differs between methods (which input the critic reads, what acts at the next state, how the head improves) is an
:class:`HeadObjective`; DSRL-NA, DSRL-SAC and residual learning are three of them. The recipe is configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from robot_rl.heads.base import Head
from robot_rl.learners.batch import Batch
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.reduce import Reduction, check_reduction, reduce, reduce_with_grad
from robot_rl.nn.flat import FlatAdam, FlatParameters, polyak_
from robot_rl.policies.base import BasePolicy

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class OffPolicyConfig:
    """The choices that make a recipe.

    Attributes:
        algorithm: ``dsrl_na`` (critic on chunks, distilled to noise), ``dsrl_sac`` (critic on noise, decision starts
            only), ``residual``.
        n_critics, hidden, layer_norm: of every critic ensemble.
        gamma: discount per environment step. tau: target smoothing.
        critic_lr, actor_lr, temperature_lr: Adam.
        target_reduce, actor_reduce: how N critics become one value.
        entropy_backup: subtract alpha log pi in the target (DSRL does; the default does not).
        initial_alpha, alpha_floor, fixed_alpha, target_entropy: of the temperature; entropy is that of unit space.
        actor_every: critic updates an actor update.
        critic_grad_clip: largest gradient norm of a critic step; 0 turns it off.
        distill_every: critic updates a noise-critic update (``dsrl_na``).
        distill_actor_share: share of distillation noise drawn from the actor instead of the prior.
        actor_gradient: ``distilled`` climbs the noise critic; ``sampler`` differentiates the chunk critic through the
            base's sampler (needs a base that can), which needs no distillation.
        kl_base: weight of KL(head || N(0, I)) before squashing in the actor loss; never beside a temperature.
        value_max, value_min: bounds of what a return can be, to clamp targets with; None leaves them open.
    """

    algorithm: Literal["dsrl_na", "dsrl_sac", "residual"] = "dsrl_na"
    n_critics: int = 5
    hidden: tuple[int, ...] = (256, 256, 256)
    layer_norm: bool = True
    gamma: float = 0.99
    tau: float = 0.005
    critic_lr: float = 3e-4
    actor_lr: float = 3e-4
    temperature_lr: float = 3e-4
    target_reduce: Reduction = "min_pair"
    actor_reduce: Reduction = "mean"
    entropy_backup: bool = False
    initial_alpha: float = 1.0
    alpha_floor: float = 0.0
    fixed_alpha: bool = False
    target_entropy: float = 0.0
    actor_every: int = 1
    critic_grad_clip: float = 0.0
    distill_every: int = 2
    distill_actor_share: float = 0.0
    actor_gradient: Literal["distilled", "sampler"] = "distilled"
    kl_base: float = 0.0
    value_min: float | None = None
    value_max: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_critics", "actor_every", "distill_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are integers >= 1")
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"gamma={self.gamma}: accepted are 0 < gamma <= 1")
        if not 0.0 <= self.distill_actor_share <= 1.0:
            raise ValueError(f"distill_actor_share={self.distill_actor_share}: accepted are 0 to 1")
        if self.kl_base > 0 and not (self.fixed_alpha and self.initial_alpha == 0.0):
            raise ValueError("kl_base > 0 with a temperature: one density cannot carry both; set fixed_alpha and initial_alpha=0")
        for name in ("target_reduce", "actor_reduce"):
            check_reduction(getattr(self, name), self.n_critics, name)


class HeadObjective(Protocol):
    """What one kind of head adds to the core. Every method works on normalised tensors with a leading batch axis."""

    critic_input_dim: int

    def critic_input(self, batch: Batch) -> Tensor:
        """(B, D) what the critic reads for the windows' executed actions."""
        ...

    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        """(B, D) input at the next state and (B,) log probability. ``follow_base``: the base acts, not the head."""
        ...

    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        """One round of whatever trains the head (with ``actor_step``) and its helpers (always)."""
        ...

    def full_state(self) -> dict[str, Any]: ...

    def load_full_state(self, state: dict[str, Any]) -> None: ...


class OffPolicyLearner:
    """Critic regression with exact chunk targets, and a head objective on top.

    y = R + discount * reduce(Q_target(s', a')); only valid windows count, and the loss is divided by their number.

    Before the first actor update the target follows the base policy (policy evaluation, as PORL does), so a critic
    warm-up ranks what the base can do before anything climbs it.
    """

    def __init__(self, base: BasePolicy, head: Head, config: OffPolicyConfig, device: torch.device | str = "cpu") -> None:
        from robot_rl.learners.objectives import make_objective

        self.base, self.config, self.device = base, config, torch.device(device)
        self.head = head.to(self.device)
        generator = torch.Generator().manual_seed(config.seed)
        self.generator = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.objective: HeadObjective = make_objective(base, self.head, config, self.generator, generator, self.device)
        self.critic = make_critic(config, self.objective.critic_input_dim, generator, self.device)
        self.target = self.critic.make_target()
        self.optimizer = FlatAdam(self.critic.flat, config.critic_lr)
        self.updates = 0
        self.actor_updates = 0

    def td_target(self, batch: Batch, next_input: Tensor, next_log_prob: Tensor, alpha: Tensor | float) -> Tensor:
        """(B,) regression target; its slow twin is in the tests."""
        c = self.config
        value = self.target.reduced_value(next_input, c.target_reduce, self.generator)
        if c.entropy_backup:
            value = value - alpha * next_log_prob
        if c.value_min is not None or c.value_max is not None:
            value = value.clamp(c.value_min, c.value_max)
        return batch.reward + batch.discount * value

    def update(self, batch: Batch, *, train_actor: bool = True) -> Metrics:
        """One gradient update of the critic, and of the head when ``train_actor``.

        Returns scalars as tensors on the device (reading them is what synchronises).

        Raises:
            FloatingPointError: never here; call :meth:`check_finite` where a host sync is affordable.
        """
        follow_base = self.actor_updates == 0 and not train_actor
        next_input, next_log_prob = self.objective.next_input(batch, follow_base)
        y = self.td_target(batch, next_input, next_log_prob, getattr(self.objective, "alpha", 0.0))
        result = self.critic.loss_and_grad(self.objective.critic_input(batch), y, batch.weight)
        metrics: Metrics = {"critic/loss": result.loss, "critic/q": result.q.mean(), "critic/q_std": result.q.std(0).mean(), "critic/target": y.mean()}
        if self.config.critic_grad_clip > 0:
            metrics["critic/grad_norm"] = self.critic.flat.clip_grad_norm_(self.config.critic_grad_clip)
        self.optimizer.step()
        polyak_(self.target.flat, self.critic.flat, self.config.tau)
        self.updates += 1
        actor_step = train_actor and self.updates % self.config.actor_every == 0
        metrics |= self.objective.improve(batch, self.critic, actor_step)
        self.actor_updates += actor_step
        return metrics

    def check_finite(self) -> None:
        """Raises FloatingPointError naming the first vector of parameters that holds a NaN or an infinity."""
        for name, flat in (("critic", self.critic.flat), ("head", self.head.actor.flat)):
            if not bool(torch.isfinite(flat.data).all()):
                raise FloatingPointError(f"{name} parameters are not finite after {self.updates} updates; lower {name}_lr or set critic_grad_clip")

    @torch.no_grad()
    def value(self, batch: Batch) -> Tensor:
        """(B,) mean critic value of the windows' executed actions, for calibration."""
        return self.critic.value(self.objective.critic_input(batch)).mean(0)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs: weights, targets, optimisers, temperature, generators, counters."""
        return {
            "head": {k: v.clone() for k, v in self.head.state_dict().items()},
            "critic": network_state(self.critic, self.optimizer),
            "target": {k: v.clone() for k, v in self.target.state_dict().items()},
            "objective": self.objective.full_state(),
            "generator": self.generator.get_state().clone(),
            "counters": torch.tensor([self.updates, self.actor_updates]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in place: views, optimisers and whoever holds the head stay valid."""
        self.head.load_state_dict(state["head"])
        load_network_state(self.critic, self.optimizer, state["critic"])
        self.target.load_state_dict(state["target"])
        self.objective.load_full_state(state["objective"])
        self.generator.set_state(state["generator"].cpu())
        self.updates, self.actor_updates = (int(x) for x in state["counters"])


def make_critic(config: OffPolicyConfig, in_dim: int, generator: torch.Generator, device: torch.device) -> CriticEnsemble:
    return CriticEnsemble(config.n_critics, in_dim, config.hidden, layer_norm=config.layer_norm, generator=generator, device=device)


class _Network(Protocol):
    flat: FlatParameters

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> Any: ...


def network_state(network: Any, optimizer: FlatAdam) -> dict[str, Any]:
    return {"network": {k: v.clone() for k, v in network.state_dict().items()}, "optimizer": optimizer.state_dict()}


def load_network_state(network: Any, optimizer: FlatAdam, state: dict[str, Any]) -> None:
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])


def climb(critic: CriticEnsemble, x: Tensor, how: Reduction, columns: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gradient ascent direction on a critic: (value (B,), dL/dx[:, columns]) of L = -mean over the batch of reduce(Q(x))."""
    value: list[Tensor] = []

    def slope(q: Tensor) -> Tensor:
        v, dv = reduce_with_grad(q, how, generator)
        value.append(v)
        return dv * (-1.0 / q.shape[1])

    _, dx = critic.input_grad(x, slope, columns=columns)
    return value[0], dx


Sampler = Callable[[Tensor, Tensor], Tensor]
__all__ = ["HeadObjective", "OffPolicyConfig", "OffPolicyLearner", "climb", "load_network_state", "make_critic", "network_state", "reduce"]
