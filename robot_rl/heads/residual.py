"""Residual head: a bounded correction added to the base's chunk (ResFiT, Ankile et al. 2025; Policy Decorator, Yuan et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.basis import BasisMode, ChunkBasis
from robot_rl.nn.mlp import StackedMLP
from robot_rl.policies.base import BasePolicy


@dataclass(frozen=True)
class ResidualConfig:
    """Shape of a residual head.

    Attributes:
        scale: largest correction of a normalised action entry.
        gripper_scale: the same for gripper dimensions; 0 leaves them to the base.
        mode, rank: the correction's shape over the chunk, see :class:`ChunkBasis`.
        exploration_std: Gaussian exploration, in units of ``scale``.
        hidden, layer_norm: of the actor.
    """

    scale: float = 0.2
    gripper_scale: float = 0.0
    mode: BasisMode = "full"
    rank: int = 1
    exploration_std: float = 0.3
    hidden: tuple[int, ...] = (256, 256)
    layer_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("scale", "gripper_scale", "exploration_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are numbers >= 0")


class ResidualHead(Head):
    """a = clamp(a_base + scale * tanh(f(s, a_base))), one correction for the executed rows of the chunk.

    The last layer of f starts at zero, so a fresh head in ``eval`` mode returns the base's chunk bit for bit.
    """

    KIND = "residual"

    def __init__(self, base: BasePolicy, config: ResidualConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        spec = base.spec
        self.config, self.rows = config, spec.n_action_steps
        gripper = torch.from_numpy(spec.action.gripper_mask)
        self.register_buffer("scale", torch.where(gripper, config.gripper_scale, config.scale), persistent=False)
        self.basis = ChunkBasis(self.rows, spec.action.dim, config.mode, config.rank)
        self.actor = StackedMLP(
            1, spec.conditioning_dim + self.rows * spec.action.dim, self.basis.width, config.hidden,
            layer_norm=config.layer_norm, last_scale=0.0, generator=generator,
        )  # fmt: skip
        self.exploration_dim = self.basis.width

    scale: Tensor

    def unit_action(self, conditioning: Tensor, rows: Tensor) -> Tensor:
        """tanh(f(s, a_base)), (B, d) in (-1, 1), for base rows (B, n, A)."""
        return torch.tanh(self.actor(torch.cat([conditioning, rows.flatten(1)], dim=-1))[0])

    def combine(self, rows: Tensor, u: Tensor) -> Tensor:
        """Base rows (B, n, A) and unit correction (B, d) to clamped rows. Acting and targets both come through here."""
        return (rows + self.scale * self.basis.expand(u, None)).clamp(-1.0, 1.0)

    def combine_gradient_to_u(self, rows: Tensor, u: Tensor, gradient: Tensor) -> Tensor:
        """dL/d(combined rows) (B, n, A) to dL/du (B, d); zero where the clamp cuts something off."""
        # Exactly at a limit nothing is cut off: a base that saturates, as clamped samplers do, must stay correctable.
        free = (rows + self.scale * self.basis.expand(u, None)).abs() <= 1.0
        return self.basis.pull_back(gradient * free * self.scale)

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        chunk_base = base.sample(conditioning, noise)
        rows = chunk_base[:, : self.rows]
        u = self.unit_action(conditioning, rows)
        if mode == "explore":
            if exploration is None:
                raise ValueError("explore mode needs exploration draws (B, exploration_dim)")
            u = (u + self.config.exploration_std * exploration).clamp(-1.0, 1.0)
        corrected = torch.cat([self.combine(rows, u), chunk_base[:, self.rows :]], dim=1)
        return Proposal(chunk=corrected, chunk_base=chunk_base, noise=noise, log_prob=torch.full((len(rows),), float("nan")))
