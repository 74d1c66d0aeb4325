"""Demonstration-guided exploration noise (DGN): a state-dependent Gaussian over what demonstrations would add to an action."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robot_rl.heads.config import GuidedNoiseConfig
from robot_rl.nn.mlp import StackedMLP

SMALLEST = 1e-3


class GuidedNoise(nn.Module):
    """xi ~ N(mean(s), L(s) L(s)^T), L lower triangular (or diagonal) with a positive diagonal; it starts near N(0, 0.3^2 I)."""

    def __init__(self, features: int, dim: int, config: GuidedNoiseConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        below = dim * (dim - 1) // 2 if config.covariance == "full" else 0
        self.network = StackedMLP(1, features, 2 * dim + below, config.hidden, last_scale=1e-2, generator=generator)
        self.start = math.log(math.expm1(0.3))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) to mean (B, d) and L (B, d, d)."""
        mean, diagonal, below = self.network(features)[0].split([self.dim, self.dim, self.network.out_dim - 2 * self.dim], -1)
        if self.config.mean == "zero":
            mean = torch.zeros_like(mean)
        root = torch.diag_embed(F.softplus(diagonal + self.start) + SMALLEST)
        if below.shape[1]:
            row, column = torch.tril_indices(self.dim, self.dim, -1, device=root.device)
            root = root.index_put((torch.arange(len(root), device=root.device)[:, None], row, column), below)
        return mean, root

    def draw(self, features: Tensor, normals: Tensor) -> Tensor:
        """(B, D) and standard normals (B, d) to xi (B, d)."""
        mean, root = self(features)
        return mean + (root @ normals.unsqueeze(-1))[..., 0]

    def negative_log_likelihood(self, features: Tensor, gap: Tensor) -> Tensor:
        """(B,) of gaps (B, d)."""
        mean, root = self(features)
        z = torch.linalg.solve_triangular(root, (gap - mean).unsqueeze(-1), upper=False)[..., 0]
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return 0.5 * z.square().sum(-1) + log_det + 0.5 * self.dim * math.log(2 * math.pi)
