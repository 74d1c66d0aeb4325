"""A fine-tuned policy that was told which actions were better than usual, and is asked for such (RECAP, Amin et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
from torch import Tensor, nn

from robot_rl.heads.config import AdvantageConfig
from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.heads.guidance import need_compact
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.compact import CompactPolicy


class Advantage(IntEnum):
    """What a policy is told about an action."""

    UNSAID = 0
    NEGATIVE = 1
    POSITIVE = 2


class GuidedDenoiser(nn.Module):
    """A denoiser whose conditioning has one of three learnt vectors added to it; all start at zero, so nothing changes at first.

    Predictions are affine in each other at a fixed x_t (noise, velocity and clean chunk alike), so guidance on what the network
    predicts is guidance on the noise.

    Attributes:
        indicator: (3, width) by :class:`Advantage`.
        labels: (B,) int64 what to say about each row while training; None: sample with guidance.
    """

    def __init__(self, net: nn.Module, width: int, guidance: float) -> None:
        super().__init__()
        self.net, self.guidance = net, guidance
        self.indicator = nn.Parameter(torch.zeros(len(Advantage), width, dtype=next(net.parameters()).dtype))
        self.labels: Tensor | None = None

    def condition(self, conditioning: Tensor) -> Tensor:
        return self.net.condition(conditioning)

    def time(self, t: Tensor) -> Tensor:
        return self.net.time(t)

    def forward(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        if self.labels is not None:
            return self.net(x, condition + self.indicator[self.labels], time)
        positive = self.net(x, condition + self.indicator[Advantage.POSITIVE], time)
        if self.guidance == 1.0:
            return positive
        unsaid = self.net(x, condition + self.indicator[Advantage.UNSAID], time)
        return unsaid + self.guidance * (positive - unsaid)

    @contextmanager
    def told(self, labels: Tensor) -> Iterator[None]:
        """Inside, rows are denoised with these labels (B,)."""
        self.labels = labels
        try:
            yield
        finally:
            self.labels = None


class AdvantageHead(FineTunedHead):
    """Samples as if told that the advantage is positive. A fresh one is the base bit for bit, in both modes."""

    KIND = "advantage_conditioned"
    denoiser: GuidedDenoiser

    def __init__(self, base: BasePolicy, config: AdvantageConfig) -> None:
        need_compact(base, "advantage conditioning")
        super().__init__(base)
        self.config = config
        guided = GuidedDenoiser(self.denoiser, self.policy.config.width, config.guidance).requires_grad_(False)
        self.denoiser = guided.to(next(base.denoiser.parameters()).device)  # type: ignore[attr-defined]
        self.policy.__dict__["_modules"]["denoiser"] = self.denoiser

    def merged(self) -> CompactPolicy:
        """Raises ValueError: a plain policy has nowhere to be told advantages."""
        raise ValueError("an advantage-conditioned head is guided while it samples, so it cannot be merged into a plain policy")

    def twin(self, base: BasePolicy) -> AdvantageHead:
        return AdvantageHead(base, self.config)
