"""Value guidance: the critic that steers the base's sampler is all there is to train."""

from __future__ import annotations

import torch
from torch import Tensor

from robot_rl.learners.batch import Batch
from robot_rl.learners.objectives import Metrics
from robot_rl.learners.selection import BestOfN
from robot_rl.nn.grad import without_grad


class Guided(BestOfN):
    """Targets follow the guided sampler itself (or the base, with ``backup: base``): the rule that acts."""

    @without_grad
    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        c = batch.next_conditioning
        self.seen: Metrics = {}
        if follow_base:
            chunk = self.base.sample(c, self.prior(len(c)))
        else:
            chunk, own, _, _ = self.head.guide(c, self.base, self.prior(len(c), self.head.prior_draws))
            self.seen = {"guide/displacement": (chunk - own).abs().amax((1, 2)).mean()}
        return torch.cat([c, chunk[:, : self.rows].flatten(1)], dim=-1), torch.zeros(len(c), device=c.device)
