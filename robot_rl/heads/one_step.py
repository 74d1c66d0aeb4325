"""A one-step student of the base's sampler that also climbs a critic (FQL, Park et al. 2025; QC-FQL, Li et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.config import ChunkPolicyConfig
from robot_rl.nn.mlp import StackedMLP
from robot_rl.policies.base import BasePolicy


class OneStepHead(Head):
    """rows = clamp(f(s, w)), w the base's own prior noise: what the sampler makes of w in several steps, in one.

    It explores by w alone, in both modes. A fresh one is random until it has been distilled, which the critic's warm-up does.

    Raises:
        ValueError: the base takes no noise.
    """

    KIND = "one_step"

    def __init__(self, base: BasePolicy, config: ChunkPolicyConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        spec, self.config = base.spec, config
        if spec.noise_shape is None:
            raise ValueError(
                f"a one_step head learns the map from noise to chunks, and this base ({spec.sampler}) takes none; use a residual head"
            )
        self.rows, self.dims = spec.n_action_steps, spec.action.dim
        width = spec.conditioning_dim + spec.noise_shape[0] * spec.noise_shape[1]
        self.actor = StackedMLP(
            1, width, self.rows * self.dims, config.hidden, layer_norm=config.layer_norm, generator=generator
        )
        self.exploration_dim = 0

    @staticmethod
    def features(conditioning: Tensor, noise: Tensor) -> Tensor:
        """(B, C + H_w*A_w) what f reads."""
        return torch.cat([conditioning, noise.flatten(1)], dim=-1)

    def to_rows(self, raw: Tensor) -> Tensor:
        """What f says (B, n*A) to rows that run (B, n, A)."""
        return raw.clamp(-1.0, 1.0).unflatten(1, (self.rows, self.dims))

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        assert noise is not None
        chunk_base = base.sample(conditioning, noise)
        rows = self.to_rows(self.actor(self.features(conditioning, noise))[0])
        chunk = torch.cat([rows, chunk_base[:, self.rows :]], dim=1)
        nan = torch.full((len(chunk),), float("nan"), device=chunk.device)
        return Proposal(chunk=chunk, chunk_base=chunk_base, noise=noise, log_prob=nan)
