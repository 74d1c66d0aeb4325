"""Squashed Gaussian actors over chunks: the whole chunk (RLPD, WSRL), a correction (Policy Decorator), edits (EXPO).

All three climb the same way: L = mean(alpha log pi - reduce(Q(s, a(u)))), u ~ pi; what differs is how u becomes rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robot_rl.heads.best_of_n import base_candidates
from robot_rl.heads.chunk_policy import ChunkPolicyHead
from robot_rl.heads.correction import CorrectionHead
from robot_rl.heads.edit import EditHead
from robot_rl.heads.residual import GaussianResidualHead
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.objectives import Metrics
from robot_rl.learners.reduce import draw_pair
from robot_rl.learners.support import Support, penalised
from robot_rl.learners.updates import climb
from robot_rl.nn.actor import ActorSample, GaussianTanhActor, Temperature
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.grad import without_grad
from robot_rl.policies.base import BasePolicy

SQUASH_LIMIT = 0.999
"""Recorded actions at a limit have no finite pre-image under tanh; behaviour cloning reads them from inside this box."""


class GaussianChunk:
    """What these objectives share: critic inputs, temperature, one actor step."""

    support: Support | None = None

    def __init__(
        self, base: BasePolicy, head: Any, config: OffPolicyConfig, generator: torch.Generator, init: torch.Generator,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.base, self.head, self.config, self.generator = base, head, config, generator
        self.actor: GaussianTanhActor = head.actor
        self.optimizer = FlatAdam(self.actor.flat, config.actor_lr)
        self.temperature = Temperature(
            config.target_entropy, initial=config.initial_alpha, lr=config.temperature_lr, floor=config.alpha_floor,
            fixed=config.fixed_alpha, device=device,
        )  # fmt: skip
        self.rows, self.features = base.spec.n_action_steps, base.spec.conditioning_dim
        self.critic_input_dim = self.features + self.rows * base.spec.action.dim

    @property
    def alpha(self) -> Tensor:
        return self.temperature.alpha

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def prior(self, batch: int, draws: int = 1) -> Tensor | None:
        """Prior noise (B, H_w, A_w), or (B, K, H_w, A_w), or None for a base without noise."""
        shape = self.base.spec.noise_shape
        return None if shape is None else self.normal(batch, *((draws,) if draws > 1 else ()), *shape)

    def base_rows(self, conditioning: Tensor) -> Tensor:
        """(B, n, A) one fresh sample of the base."""
        return self.base.sample(conditioning, self.prior(len(conditioning)))[:, : self.rows]

    def joined(self, conditioning: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([conditioning, rows.flatten(1)], dim=-1)

    def rows_of(self, batch: Batch) -> Tensor:
        """(B, n, D) what was executed, as far as the critic reads it."""
        return batch.action

    def critic_input(self, batch: Batch) -> Tensor:
        return self.joined(batch.conditioning, self.rows_of(batch))

    def step_actor(
        self, batch: Batch, sample: ActorSample, rows: Tensor, gradient_to_u: Any, critic: CriticEnsemble
    ) -> Metrics:
        """One step on mean(alpha log pi - Q(s, rows)) [+ support_penalty |u|^2 / 2] [- bc_weight log pi(recorded)]."""
        c, b = self.config, len(rows)
        x = self.joined(batch.conditioning, rows)
        value, gradient = climb(critic, x, c.actor_reduce, slice(self.features, None), self.generator)
        gradient, found = penalised(self, batch.conditioning, rows, value, gradient)
        du = gradient_to_u(gradient.unflatten(1, rows.shape[1:]))
        if c.support_penalty and self.support is None:
            du = du + (c.support_penalty / b) * sample.u
        alpha = self.alpha
        self.actor.backward_draw(sample, du, (alpha / b).expand(b))
        metrics = {
            "actor/alpha": alpha, "actor/entropy": -sample.log_prob.mean(), "actor/std": sample.std.mean(),
            "actor/value": value.mean(), "actor/size": sample.u.abs().mean(), **found,
        }  # fmt: skip
        if c.bc_weight:
            metrics |= self._add_cloning(batch)
        self.optimizer.step()
        self.temperature.step(sample.log_prob)
        return metrics

    def _add_cloning(self, batch: Batch) -> Metrics:
        flat = self.actor.flat
        gradient = flat.grad.clone()
        flat.zero_grad()
        with torch.enable_grad():
            recorded = self.rows_of(batch).flatten(1).clamp(-SQUASH_LIMIT, SQUASH_LIMIT)
            log_prob = self.actor.log_prob(batch.conditioning, recorded)
            loss = -(batch.weight * log_prob).sum() / batch.weight.sum().clamp_min(1.0)
            (self.config.bc_weight * loss).backward()
        flat.grad.add_(gradient)
        return {"actor/cloning": loss.detach()}

    def full_state(self) -> dict[str, Any]:
        return {"actor_optimizer": self.optimizer.state_dict(), "temperature": self.temperature.full_state()}

    def load_full_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["actor_optimizer"])
        self.temperature.load_full_state(state["temperature"])


class ChunkSAC(GaussianChunk):
    """Soft actor-critic whose action is the chunk (RLPD, Ball et al. 2023; with chunks as in Q-chunking, Li et al. 2025)."""

    head: ChunkPolicyHead

    @without_grad
    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        c = batch.next_conditioning
        if follow_base:
            return self.joined(c, self.base_rows(c)), torch.zeros(len(c), device=c.device)
        sample = self.actor.draw(c, self.generator)
        return self.joined(c, self.head.to_rows(sample.u)), sample.log_prob

    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        if not actor_step:
            return {}
        sample = self.actor.draw(batch.conditioning, self.generator)
        return self.step_actor(batch, sample, self.head.to_rows(sample.u), lambda g: g.flatten(1), critic)

    @without_grad
    def policy_samples(self, conditioning: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(B, count, n*A) actions of the policy and their log densities (B, count)."""
        sample = self.actor.draw(conditioning.repeat_interleave(count, dim=0), self.generator)
        return sample.u.unflatten(0, (-1, count)), sample.log_prob.unflatten(0, (-1, count))


class ResidualSAC(GaussianChunk):
    """Soft actor-critic on a bounded correction of the base's chunk (Policy Decorator, Yuan et al. 2024)."""

    head: GaussianResidualHead

    def corrected(self, conditioning: Tensor) -> tuple[Tensor, ActorSample, Tensor]:
        """Base rows, the actor's draw on them, and the combined rows."""
        rows = self.base_rows(conditioning)
        sample = self.actor.draw(self.head.features(conditioning, rows), self.generator)
        return rows, sample, self.head.combine(rows, sample.u)

    @without_grad
    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        c = batch.next_conditioning
        if follow_base:
            return self.joined(c, self.base_rows(c)), torch.zeros(len(c), device=c.device)
        _, sample, rows = self.corrected(c)
        return self.joined(c, rows), sample.log_prob

    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        if not actor_step:
            return {}
        rows, sample, combined = self.corrected(batch.conditioning)
        return self.step_actor(batch, sample, combined, _through(self.head, rows, sample.u), critic)


class Edit(GaussianChunk):
    """EXPO: targets come from the on-the-fly policy, edits climb the critic where the data are.

    At the next state the K base chunks are drawn afresh, or taken from the batch (``base_samples``: the base is frozen, so
    what it would draw there does not depend on the head).
    """

    head: EditHead
    seen: Metrics = {}  # noqa: RUF012  replaced, never changed in place

    @without_grad
    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        c = batch.next_conditioning
        nothing = torch.zeros(len(c), device=c.device)
        candidates = candidate_rows(self, c, batch.next_base_rows, 1 if follow_base else self.head.prior_draws)
        if follow_base:
            self.seen = {}
            return self.joined(c, candidates[:, 0]), nothing
        draws = self.normal(len(c), self.head.exploration_dim)
        chosen, log_prob = self.head.select(c, candidates, draws, ranking_pair(self))
        edited = chosen.index - candidates.shape[1]
        own = log_prob.gather(1, edited.clamp(min=0).unsqueeze(1)).squeeze(1)
        self.seen = {"edit/wins": (edited >= 0).to(c.dtype).mean(), "edit/q_spread": chosen.q.std(1).mean()}
        return self.joined(c, chosen.rows), torch.where(edited >= 0, own, nothing)

    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        if not actor_step:
            return self.seen
        c = batch.conditioning
        rows = batch.action if self.config.actor_source == "replay" else candidate_rows(self, c, batch.base_rows, 1)[:, 0]
        sample = self.actor.draw(self.head.features(c, rows), self.generator)
        combined = self.head.combine(rows, sample.u)
        return self.seen | self.step_actor(batch, sample, combined, _through(self.head, rows, sample.u), critic)


def _through(head: CorrectionHead, rows: Tensor, u: Tensor) -> Any:
    return lambda gradient: head.combine_gradient_to_u(rows, u, gradient)


def ranking_pair(objective: Any) -> Tensor | None:
    """(2,) the critics that rank this update's candidates, where the head's rule draws them."""
    if objective.head.config.select_reduce != "min_pair":
        return None
    return draw_pair(objective.config.n_critics, objective.generator, objective.generator.device)


def candidate_rows(objective: Any, conditioning: Tensor, cached: Tensor | None, count: int) -> Tensor:
    """(B, count, n, A) chunks of the base: of the cached (B, M, n, A) ones, without replacement, or drawn now."""
    if cached is None:
        noise = objective.prior(len(conditioning), count)
        sampler = objective.head.sampler(objective.base)
        return base_candidates(sampler, conditioning, noise, count)[:, :, : objective.rows]
    lots = torch.rand(cached.shape[:2], generator=objective.generator, device=cached.device)
    chosen = lots.topk(count, dim=1).indices
    return cached.gather(1, chosen[:, :, None, None].expand(-1, -1, *cached.shape[2:]))
