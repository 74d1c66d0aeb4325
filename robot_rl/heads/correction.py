"""What heads that correct the base's chunk share: a bounded, clamped correction of the rows that run."""

from __future__ import annotations

import torch
from torch import Tensor

from robot_rl.heads.base import Head
from robot_rl.heads.basis import ChunkBasis
from robot_rl.heads.config import CorrectionConfig
from robot_rl.policies.base import BasePolicy


class CorrectionHead(Head):
    """a = clamp(a_base + scale * P u), u (B, d) in [-1, 1]; the combination and its gradient for every kind of actor.

    Attributes:
        rows: n, the rows of a chunk that run and may be corrected.
        scale: (A,) per action dimension.
    """

    continues = True
    scale: Tensor

    def __init__(self, base: BasePolicy, config: CorrectionConfig) -> None:
        super().__init__()
        spec = base.spec
        self.rows = spec.n_action_steps
        gripper = torch.from_numpy(spec.action.gripper_mask)
        self.register_buffer("scale", torch.where(gripper, config.gripper_scale, config.scale), persistent=False)
        self.basis = ChunkBasis(self.rows, spec.action.dim, config.mode, config.rank)

    def combine(self, rows: Tensor, u: Tensor) -> Tensor:
        """Base rows (B, n, A) and unit correction (B, d) to clamped rows. Acting and targets both come through here."""
        return (rows + self.scale * self.basis.expand(u, None)).clamp(-1.0, 1.0)

    def combine_gradient_to_u(self, rows: Tensor, u: Tensor, gradient: Tensor) -> Tensor:
        """dL/d(combined rows) (B, n, A) to dL/du (B, d); zero where the clamp cuts something off."""
        # Exactly at a limit nothing is cut off: a base that saturates, as clamped samplers do, must stay correctable.
        free = (rows + self.scale * self.basis.expand(u, None)).abs() <= 1.0
        return self.basis.pull_back(gradient * free * self.scale)

    @staticmethod
    def features(conditioning: Tensor, rows: Tensor) -> Tensor:
        """(B, C + n*A) what the actor reads: the state, and the rows it is to correct."""
        return torch.cat([conditioning, rows.flatten(1)], dim=-1)
