"""The off-policy core: one critic over chunks (or noise), one temporal-difference rule, and a head that climbs it.

What differs between methods (which input the critic reads, what acts at the next state, how the head improves) is an
:class:`HeadObjective`; DSRL-NA, DSRL-SAC and residual learning are three of them. The recipe is configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from robot_rl.heads.base import Head
from robot_rl.learners.batch import Batch
from robot_rl.learners.cloning import BaseCloner, CloneRows, clone_rows
from robot_rl.learners.config import OffPolicyConfig, Reduction
from robot_rl.learners.critic_rules import ValueRule, add_conservative_gradient, copy_wider
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.factory import make_objective, resolved
from robot_rl.learners.flow_q import OneStep
from robot_rl.learners.objectives import HeadObjective, Metrics
from robot_rl.learners.one_step import StudentBase
from robot_rl.learners.optimism import OptimisticLabels, rarity
from robot_rl.learners.prefix_critic import PrefixCritic, Prefixes
from robot_rl.learners.support import Support
from robot_rl.learners.updates import load_network_state, make_critic, network_state
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.grad import without_grad
from robot_rl.nn.mlp import StackedMLP
from robot_rl.policies.base import BasePolicy
from robot_rl.replay.batches import WindowBatch
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.types import Stratum

PARTS = ("student", "cloner", "support", "optimism")
"""What only some recipes have, saved with the rest."""


class TakesSamples(Protocol):
    """Chunks of the base that were drawn before, see ``training/base_samples.py``."""

    keeps_noise: bool

    def take(self, number: np.ndarray, step: np.ndarray) -> np.ndarray: ...

    def take_noise(self, number: np.ndarray, step: np.ndarray) -> np.ndarray: ...


class OffPolicyLearner:
    """Critic regression with exact chunk targets, and a head objective on top.

    y = R + discount * reduce(Q_target(s', a')); only valid windows count, and the loss is divided by their number.

    Before the first actor update the target follows the base policy (policy evaluation, as PORL does), so a critic
    warm-up ranks what the base can do before anything climbs it.
    """

    def __init__(self, base: BasePolicy, head: Head, config: OffPolicyConfig, device: torch.device | str = "cpu") -> None:
        self.base, self.device = base, torch.device(device)
        self.config = config = resolved(config, head)
        self.head = head.to(self.device)
        generator = torch.Generator().manual_seed(config.seed)
        self.generator = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.student: StudentBase | None = None
        if config.student is not None:  # of a stream of its own: the rest of the learner starts as it would without
            init = torch.Generator().manual_seed(config.seed + 2)
            self.student = StudentBase(base, config.student, init, config.seed + 3, self.device)
        asked: Any = self.student or base
        self.objective: HeadObjective = make_objective(asked, self.head, config, self.generator, generator, self.device)
        self.critic = self._make_critic(generator)
        # A head that chooses by value acts with the target network: one selection rule in episodes and in targets.
        chooser = getattr(self.head, "critic", None)
        self.target: CriticEnsemble = self.critic.make_target() if chooser is None else chooser
        self.target.flat.copy_(self.critic.flat)
        self.value_rule: ValueRule | None = None
        if "iql" in (config.critic_loss, config.offline_critic):
            self.value_rule = ValueRule(config, base.spec.conditioning_dim, generator, self.device)
        self.optimizer = FlatAdam(self.critic.flat, config.critic_lr)
        self.cloner = _cloner(base, self.head, config, self.device)
        if self.cloner is not None and isinstance(self.objective, OneStep):
            self.objective.teacher = self.cloner.online.policy
        width, chunk = self.objective.critic_input_dim, base.spec.n_action_steps * base.spec.action.dim
        self.support: Support | None = None
        if config.support.model == "vae":
            self.support = Support(width - chunk, chunk, config.support, config.support_penalty, generator, self.device)
            self.objective.support = self.support  # type: ignore[attr-defined]
        self.optimism = OptimisticLabels(width, config.optimism, generator, self.device) if config.optimism.strata else None
        self.updates = 0
        self.actor_updates = 0
        self.online_updates = 0

    def _make_critic(self, generator: torch.Generator) -> CriticEnsemble:
        """Either kind; both have the interface of the first."""
        c, spec = self.config, self.base.spec
        if c.critic == "chunk":
            return make_critic(c, self.objective.critic_input_dim, generator, self.device)
        shape = spec.conditioning_dim, spec.n_action_steps, spec.action.dim
        return PrefixCritic(c.n_critics, *shape, c.prefix, generator=generator, device=self.device)

    def sample(
        self,
        buffer: ReplayBuffer,
        rng: np.random.Generator,
        size: int,
        ratios: Mapping[Stratum | str, float] | None,
        base_samples: TakesSamples | None = None,
    ) -> Batch:
        """Draw what :meth:`update` and :meth:`pretrain` want: ``size`` windows, with the base's chunks at both ends if there are any."""
        if self.config.critic == "prefix":
            windows, parts = buffer.sample_prefixes(size, rng, ratios)
            rows = Prefixes(*(torch.from_numpy(part).to(self.device) for part in parts))
            return replace(self.batch(windows), prefixes=rows, clone=self._clones(buffer, rng, size, ratios))
        windows = buffer.sample(size, rng, ratios)
        if base_samples is not None:
            ends = windows.step + windows.mask.sum(1)
            windows.extra["base_rows"] = base_samples.take(windows.episode_index, windows.step)
            windows.extra["next_base_rows"] = base_samples.take(windows.episode_index, ends)
            if base_samples.keeps_noise:
                windows.extra["base_noise"] = base_samples.take_noise(windows.episode_index, windows.step)
        return replace(self.batch(windows), clone=self._clones(buffer, rng, size, ratios))

    def _clones(
        self, buffer: ReplayBuffer, rng: np.random.Generator, size: int, ratios: Mapping[Stratum | str, float] | None
    ) -> CloneRows | None:
        """Rows to imitate, where the next update is one that imitates."""
        if self.cloner is None or (self.updates + 1) % self.config.actor_every:
            return None
        drawn, extra = buffer.sample_chunk_rows(size, rng, self.base.spec.horizon, ratios=ratios)
        return clone_rows(drawn, extra, self.config.base_update, self.device)

    def batch(self, windows: WindowBatch) -> Batch:
        """Windows as tensors. With ``n_step`` above 1 the critic reads the rows of the first decision alone."""
        batch = Batch.from_windows(windows, self.device)
        return batch if self.config.n_step == 1 else replace(batch, action=batch.action[:, : self.base.spec.n_action_steps])

    def td_target(
        self, batch: Batch, next_input: Tensor, next_log_prob: Tensor, alpha: Tensor | float, how: Reduction | None = None
    ) -> Tensor:
        """(B,) regression target; its slow twin is in the tests."""
        c = self.config
        value = self.target.reduced_value(next_input, how or c.target_reduce, self.generator)
        if c.entropy_backup:
            value = value - alpha * next_log_prob
        if c.value_min is not None or c.value_max is not None:
            value = value.clamp(c.value_min, c.value_max)
        return batch.reward + batch.discount * value

    def update(self, batch: Batch, *, train_actor: bool = True, offline: bool = False) -> Metrics:
        """One gradient update of the critic, and of the head when ``train_actor``; ``offline`` takes ``offline_critic``'s loss.

        Returns scalars as tensors on the device (reading them is what synchronises).

        Raises:
            FloatingPointError: never here; call :meth:`check_finite` where a host sync is affordable.
        """
        loss = self.config.offline_critic if offline else self.config.critic_loss
        taught = self._teach(batch)
        x = self.objective.critic_input(batch)
        batch, added = self._relabelled(batch, x)
        extra: Metrics = {}
        if loss == "iql":
            assert self.value_rule is not None
            y, extra = self.value_rule.target(batch, x, self.target, self.generator)
        else:
            follow_base = self.config.backup == "base" or (self.actor_updates == 0 and not train_actor)
            ends = self._ends(batch)
            next_input, next_log_prob = self.objective.next_input(ends, follow_base)
            how = self.config.offline_reduce if offline else None
            y = self.td_target(ends, next_input, next_log_prob, getattr(self.objective, "alpha", 0.0), how)
            if batch.prefixes is not None:
                y = y.view_as(batch.prefixes.reward)
            if self.config.kl_backup and not follow_base:
                y = y - batch.discount * self.objective.divergence(batch.next_conditioning)  # type: ignore[attr-defined]
        result = self.critic.loss_and_grad(x, y, batch.weight if batch.prefixes is None else batch.prefixes.weight)
        own = {"critic/loss": result.loss, "critic/q": result.q.mean(), "critic/target": y.mean()}
        metrics: Metrics = {**added, **extra, **own, "critic/q_std": result.q.std(0).mean()}
        if loss in ("cql", "calql"):
            rule = self.objective, batch, self.config, loss == "calql", self.generator
            prefix = isinstance(self.critic, PrefixCritic)
            metrics |= self.critic.add_conservative(*rule) if prefix else add_conservative_gradient(self.critic, *rule)
        if self.config.critic_grad_clip > 0:
            metrics["critic/grad_norm"] = self.critic.flat.clip_grad_norm_(self.config.critic_grad_clip)
        self.optimizer.step(self.target.flat, self.config.tau)
        self.updates += 1
        self.online_updates += not offline
        self._anneal()
        actor_step = train_actor and self.updates % self.config.actor_every == 0
        if self.support is not None:
            if self.support.fitting:  # the density comes first
                metrics |= self.support.fit(batch.conditioning, batch.action, batch.weight, self.generator)
                actor_step = False
            else:
                self.support.online += not offline
        if actor_step and self.cloner is not None:
            if batch.clone is None:
                raise ValueError("base_update trains on rows to imitate and this batch has none: draw it with sample()")
            metrics |= self.cloner.step(batch.clone, self.generator)
        metrics |= self.objective.improve(batch, self.critic, actor_step)
        self.actor_updates += actor_step
        return metrics | taught

    def _teach(self, batch: Batch) -> Metrics:
        """The student's own steps, on the states of this batch."""
        metrics: Metrics = {}
        if self.student is not None:
            for _ in range(self.student.config.updates):
                metrics = self.student.learn(batch.conditioning)
        return metrics

    def _ends(self, batch: Batch) -> Batch:
        """The batch whose next states targets are made at: its own, or those after every beginning of its windows."""
        if self.config.critic == "chunk":
            return batch
        if batch.prefixes is None:
            raise ValueError("critic='prefix' learns from beginnings of windows and this batch has none: draw it with sample()")
        parts = (part.flatten(0, 1) for part in batch.prefixes)
        reward, discount, following, weight = parts
        return replace(batch, reward=reward, discount=discount, next_conditioning=following, weight=weight)

    def know_demonstrations(self, count: int) -> None:
        """How many demonstrations the base was cloned from (``kl_demos``)."""
        if self.config.kl_demos:
            self.objective.kl_share = min(1.0, count / self.config.kl_demos)  # type: ignore[attr-defined]

    def _anneal(self) -> None:
        """What falls with practice: the optimism of a head's choice, and the share of its guided exploration."""
        c, head = self.config, self.head
        if c.select_k_updates and getattr(head, "lean", None) is not None:
            head.lean.fill_(head.config.select_k * max(0.0, 1.0 - self.online_updates / c.select_k_updates))
        if c.guided_updates and getattr(head, "guided_share", None) is not None:
            head.guided_share.fill_(max(0.0, 1.0 - self.online_updates / c.guided_updates))

    def _relabelled(self, batch: Batch, x: Tensor) -> tuple[Batch, Metrics]:
        """The batch with rewards that are worked out anew at every update; nothing of it is ever stored."""
        found: Metrics = {}
        if self.optimism is not None:
            batch, found = self.optimism.labelled(batch, x)
        novelty = self.config.novelty
        if novelty.weight:
            left = max(0.0, 1.0 - self.updates / novelty.updates) if novelty.updates else 1.0
            q = self.target.value(x).amin(0)
            bonus = rarity(batch.conditioning, q, novelty.neighbours, novelty.value_scale) * (novelty.weight * left)
            batch = replace(batch, reward=batch.reward + bonus)
            found = found | {"novelty/bonus": bonus.mean()}
        return batch, found

    def pretrain(self, batch: Batch) -> Metrics:
        """One regression step of the critic on Monte-Carlo returns, before temporal differences take over (PORL's start).

        Bootstrapping alone forgets a wrong initial value only at the rate (1 - gamma^n) tau an update; a regression sets the
        scale at once. Call :meth:`finish_pretraining` after the last step.
        """
        if batch.episode_return is None:
            raise ValueError("pretrain needs episode returns: build the buffer with the extra feature 'episode_return'")
        weight = batch.weight if batch.return_known is None else batch.weight * batch.return_known
        result = self.critic.loss_and_grad(self.objective.critic_input(batch), batch.episode_return, weight)
        self.optimizer.step()
        metrics = {"critic/pretrain_loss": result.loss, "critic/q": result.q.mean()}
        return metrics | self.objective.improve(batch, self.critic, False) | self._teach(batch)

    def finish_pretraining(self) -> None:
        """The target becomes the regressed critic."""
        self.target.flat.copy_(self.critic.flat)

    def warm_start(self, weights: Mapping[str, Tensor]) -> None:
        """Start from another run's critic (RESPRECT, Ceola et al. 2024): inputs it did not have get zero weight, so its values stay.

        Args:
            weights: a critic's ``state_dict``, of the same heads and hidden layers.

        Raises:
            ValueError: shapes do not fit.
        """
        copy_wider(self.critic, weights)
        self.finish_pretraining()

    def check_finite(self) -> None:
        """Raises FloatingPointError naming the first vector of parameters that holds a NaN or an infinity."""
        flats = [("critic", self.critic.flat)]
        flats += [("head", module.flat) for module in self.head.modules() if isinstance(module, StackedMLP)]
        for name, flat in flats:
            if not bool(torch.isfinite(flat.data).all()):
                raise FloatingPointError(
                    f"{name} parameters are not finite after {self.updates} updates; lower {'actor' if name == 'head' else name}_lr or set critic_grad_clip"
                )

    @without_grad
    def value(self, batch: Batch) -> Tensor:
        """(B,) mean critic value of the windows' executed actions, for calibration."""
        return self.critic.value(self.objective.critic_input(batch)).mean(0)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs: weights, targets, optimisers, temperature, generators, counters."""
        state = {
            "head": {k: v.clone() for k, v in self.head.state_dict().items()},
            "critic": network_state(self.critic, self.optimizer),
            "target": {k: v.clone() for k, v in self.target.state_dict().items()},
            "objective": self.objective.full_state(),
            "generator": self.generator.get_state().clone(),
            "counters": torch.tensor([self.updates, self.actor_updates, self.online_updates]),
        }
        for name in PARTS:
            if (part := getattr(self, name)) is not None:
                state[name] = part.full_state()
        return state if self.value_rule is None else state | {"value": self.value_rule.full_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in place: views, optimisers and whoever holds the head stay valid."""
        self.head.load_state_dict(state["head"])
        load_network_state(self.critic, self.optimizer, state["critic"])
        self.target.load_state_dict(state["target"])
        self.objective.load_full_state(state["objective"])
        for name in PARTS:
            if (part := getattr(self, name)) is not None:
                part.load_full_state(state[name])
        if self.value_rule is not None:
            self.value_rule.load_full_state(state["value"])
        self.generator.set_state(state["generator"].cpu())
        self.updates, self.actor_updates, *later = (int(x) for x in state["counters"])
        self.online_updates = later[0] if later else self.updates  # checkpoints from before it was counted


def _cloner(base: BasePolicy, head: Head, config: OffPolicyConfig, device: torch.device) -> BaseCloner | None:
    """What trains a copy of the base on. Raises ValueError when head and learner disagree on whether there is one."""
    if config.algorithm == "one_step":  # whose teacher the copy is
        return None if config.base_update.rows == "none" else BaseCloner(base, None, config.base_update, device)
    own = getattr(head, "own", None)
    if (own is not None) != (config.base_update.rows != "none"):
        raise ValueError(
            f"head.{head.KIND}.own_base={str(own is not None).lower()} with learner.base_update.rows={config.base_update.rows!r}: "
            "accepted are true with all or success, false with none"
        )
    return None if own is None else BaseCloner(base, own, config.base_update, device)
