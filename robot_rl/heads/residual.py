"""Residual heads: a bounded correction added to the base's chunk (ResFiT, Ankile et al. 2025; Policy Decorator, Yuan et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from robot_rl.heads.base import Mode, Proposal
from robot_rl.heads.config import CorrectionConfig, ResidualConfig
from robot_rl.heads.correction import CorrectionHead
from robot_rl.heads.guided_noise import GuidedNoise
from robot_rl.nn.actor import GaussianTanhActor, squashed_log_prob
from robot_rl.nn.mlp import StackedMLP
from robot_rl.policies.base import BasePolicy


class ResidualHead(CorrectionHead):
    """a = clamp(a_base + scale * tanh(f(s, a_base))), one correction for the executed rows of the chunk.

    The last layer of f starts at zero, so a fresh head in ``eval`` mode returns the base's chunk bit for bit.
    """

    KIND = "residual"

    def __init__(self, base: BasePolicy, config: ResidualConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__(base, config)
        spec, self.config = base.spec, config
        self.actor = StackedMLP(
            1, spec.conditioning_dim + self.rows * spec.action.dim, self.basis.width, config.hidden,
            layer_norm=config.layer_norm, last_scale=0.0, generator=generator,
        )  # fmt: skip
        width = self.basis.width
        self.noise_model = None
        if config.guided.on:
            features = spec.conditioning_dim + self.rows * spec.action.dim
            self.noise_model = GuidedNoise(features, width, config.guided, generator)
        self.register_buffer("guided_share", torch.ones(()) if config.guided.on else None)
        self.exploration_dim = width if self.noise_model is None else width + 1

    guided_share: Tensor | None

    def unit_action(self, conditioning: Tensor, rows: Tensor) -> Tensor:
        """tanh(f(s, a_base)), (B, d) in (-1, 1), for base rows (B, n, A)."""
        return torch.tanh(self.actor(self.features(conditioning, rows))[0])

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
            u = (u + self._noise(conditioning, rows, exploration)).clamp(-1.0, 1.0)
        corrected = torch.cat([self.combine(rows, u), chunk_base[:, self.rows :]], dim=1)
        return Proposal(chunk=corrected, chunk_base=chunk_base, noise=noise, log_prob=torch.full((len(rows),), float("nan")))

    def _noise(self, conditioning: Tensor, rows: Tensor, exploration: Tensor) -> Tensor:
        """(B, d) in units of the scale: Gaussian, or for a share of the decisions what demonstrations are like."""
        if self.noise_model is None:
            return self.config.exploration_std * exploration
        normals, coin = exploration[:, :-1], torch.special.ndtr(exploration[:, -1:])
        guided = self.noise_model.draw(self.features(conditioning, rows), normals)
        return torch.where(coin < self.guided_share, guided, self.config.exploration_std * normals)


class GaussianResidualHead(CorrectionHead):
    """The same correction from a squashed Gaussian, u ~ tanh N(mean(s, a_base), std(s, a_base)), trained with an entropy bonus.

    Mean 0 and standard deviation 1 (before squashing) at the start: a fresh head in ``eval`` mode returns the base's chunk bit
    for bit. Policy Decorator's gate (the correction is used with a probability that rises) is the session's mixture acting.
    """

    KIND = "gaussian_residual"

    def __init__(self, base: BasePolicy, config: CorrectionConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__(base, config)
        spec, self.config = base.spec, config
        self.actor = GaussianTanhActor(
            spec.conditioning_dim + self.rows * spec.action.dim, self.basis.width, config.hidden,
            layer_norm=config.layer_norm, last_scale=0.0, generator=generator,
        )  # fmt: skip
        self.exploration_dim = self.basis.width

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        chunk_base = base.sample(conditioning, noise)
        rows = chunk_base[:, : self.rows]
        mean, log_std = self.actor(self.features(conditioning, rows))
        if mode == "eval":
            exploration = torch.zeros_like(mean)
        elif exploration is None:
            raise ValueError("explore mode needs exploration draws (B, exploration_dim)")
        x = mean + log_std.exp() * exploration
        corrected = torch.cat([self.combine(rows, torch.tanh(x)), chunk_base[:, self.rows :]], dim=1)
        return Proposal(
            chunk=corrected, chunk_base=chunk_base, noise=noise, log_prob=squashed_log_prob(exploration, log_std, x)
        )
