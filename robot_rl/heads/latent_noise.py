"""Latent-noise head: reinforcement learning in the noise space of a frozen diffusion or flow policy (DSRL, Wagenmaker et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.basis import ChunkBasis
from robot_rl.heads.config import LatentNoiseConfig
from robot_rl.nn.actor import GaussianTanhActor, squashed_log_prob
from robot_rl.policies.base import BasePolicy


class LatentNoiseHead(Head):
    """Acts by choosing the noise; a squashed Gaussian u in (-1, 1) becomes w = bound * P u.

    A fresh head has mean about 0 and standard deviation 1 before squashing: it samples the base at a slightly lower
    temperature (see the baselines ``untrained_head`` and ``zero_noise`` that every run measures).

    Raises:
        ValueError: the base takes no noise.
    """

    KIND, continues = "latent_noise", True

    def __init__(self, base: BasePolicy, config: LatentNoiseConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        spec = base.spec
        if spec.noise_shape is None:
            raise ValueError(
                f"a latent-noise head needs a policy that takes noise, and this one ({spec.sampler}) maps each observation to one "
                "chunk; use a residual head"
            )
        rows, dims = spec.noise_shape
        self.config = config
        self.basis = ChunkBasis(
            rows, dims, config.noise_mode, config.rank, spec.n_action_steps if config.executed_rows_only and rows > 1 else None
        )
        self.actor = GaussianTanhActor(
            spec.conditioning_dim,
            self.basis.width,
            config.hidden,
            layer_norm=config.layer_norm,
            last_scale=1e-2,
            generator=generator,
        )
        self.exploration_dim = self.basis.width

    def to_noise(self, u: Tensor, prior: Tensor | None = None) -> Tensor:
        """Unit-space action (B, d) to the sampler's noise (B, H_w, A_w). Acting, targets and distillation all come through here."""
        return self.basis.expand(self.config.noise_bound * u, prior)

    def noise_gradient_to_u(self, gradient: Tensor) -> Tensor:
        """dL/dnoise (B, H_w, A_w) to dL/du (B, d)."""
        return self.config.noise_bound * self.basis.pull_back(gradient)

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        mean, log_std = self.actor(conditioning)
        if mode == "eval":
            exploration = torch.zeros_like(mean)
        elif exploration is None:
            raise ValueError("explore mode needs exploration draws (B, exploration_dim)")
        x = mean + log_std.exp() * exploration
        latent = self.to_noise(torch.tanh(x), noise)
        chunk = base.sample(conditioning, latent)
        return Proposal(chunk=chunk, chunk_base=chunk, noise=latent, log_prob=squashed_log_prob(exploration, log_std, x))
