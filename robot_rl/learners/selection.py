"""Best of N over a frozen base: the critic is all there is to train (Q-chunking, Li et al. 2025; Q#, Zhou et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robot_rl.heads.best_of_n import BestOfNHead
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.gaussian import candidate_rows, ranking_pair
from robot_rl.learners.objectives import Metrics
from robot_rl.nn.grad import without_grad
from robot_rl.policies.base import BasePolicy


class BestOfN:
    """Targets follow the head's own selection (or the base, with ``backup: base``); nothing else is learnt."""

    def __init__(
        self, base: BasePolicy, head: BestOfNHead, config: OffPolicyConfig, generator: torch.Generator, init: torch.Generator,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.base, self.head, self.config, self.generator = base, head, config, generator
        self.rows = head.rows
        self.critic_input_dim = base.spec.conditioning_dim + self.rows * base.spec.action.dim
        assert base.spec.noise_shape is not None
        self.noise_shape = base.spec.noise_shape
        self.seen: Metrics = {}

    def prior(self, batch: int, draws: int = 1) -> Tensor:
        shape = (batch, *((draws,) if draws > 1 else ()), *self.noise_shape)
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def critic_input(self, batch: Batch) -> Tensor:
        return torch.cat([batch.conditioning, batch.action.flatten(1)], dim=-1)

    @without_grad
    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        c = batch.next_conditioning
        rows = candidate_rows(self, c, batch.next_base_rows, 1 if follow_base else self.head.prior_draws)
        if follow_base:
            self.seen, chosen = {}, rows[:, 0]
        else:
            width = self.head.exploration_dim
            lots = torch.randn((len(c), width), generator=self.generator, device=self.generator.device) if width else None
            selection = self.head.select(c, rows, lots, ranking_pair(self))
            chosen = selection.rows
            self.seen = {"select/q_spread": selection.q.std(1).mean()}
        return torch.cat([c, chosen.flatten(1)], dim=-1), torch.zeros(len(c), device=c.device)

    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        return self.seen

    def full_state(self) -> dict[str, Any]:
        return {}

    def load_full_state(self, state: dict[str, Any]) -> None:
        pass
