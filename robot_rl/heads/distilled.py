"""One policy for several tasks or robots: a head that also reads a code (COMPASS, Liu et al. 2025).

The student is any head with an actor, built over a view of the base whose conditioning carries the code, one of ``slots``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.config import DistilledConfig
from robot_rl.policies.base import BasePolicy


class CodedBase:
    """A base policy whose conditioning is followed by a one-hot code that the base itself does not read."""

    def __init__(self, base: BasePolicy, slots: int) -> None:
        self.base, self.plain_dim = base, base.spec.conditioning_dim
        self.spec = replace(base.spec, conditioning_dim=self.plain_dim + slots)

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        raise TypeError("a coded base reads conditioning that has its code already")

    def sample(self, conditioning: Tensor, noise: Tensor, **options: Any) -> Tensor:
        return self.base.sample(conditioning[:, : self.plain_dim], noise, **options)

    def normalize_action(self, action: Tensor) -> Tensor:
        return self.base.normalize_action(action)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        return self.base.unnormalize_action(action)


class DistilledHead(Head):
    """Acts as its student does for the configured code.

    Args:
        student: a head over :class:`CodedBase`; it is what is published.
    """

    KIND = "distilled"
    code: Tensor

    def __init__(self, config: DistilledConfig, student: Head) -> None:
        super().__init__()
        self.config, self.student = config, student
        self.prior_draws, self.exploration_dim = student.prior_draws, student.exploration_dim
        self.continues = student.continues
        self.register_buffer("code", torch.tensor(config.code), persistent=False)

    def coded(self, conditioning: Tensor, code: Tensor) -> Tensor:
        """(B, C) and codes (B,) or () to (B, C + slots)."""
        one_hot = torch.nn.functional.one_hot(code.expand(len(conditioning)), self.config.slots)
        return torch.cat([conditioning, one_hot.to(conditioning.dtype)], dim=-1)

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        view = CodedBase(base, self.config.slots)
        return self.student.propose(self.coded(conditioning, self.code), view, noise, exploration, mode)
