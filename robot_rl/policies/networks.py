"""Networks of the compact base policies: a denoiser MLP over whole chunks, and a small image encoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def time_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features (B, dim) of times in [0, 1], wavelengths from 1/1000 to 1 (Vaswani et al. 2017)."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(1000.0) / max(half - 1, 1)))
    angle = 1000.0 * t[:, None] * frequency[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Denoiser(nn.Module):
    """Residual MLP (x_t, t, conditioning) -> prediction, all rows of a chunk at once.

    The conditioning and time parts of the first layer do not depend on x: :meth:`condition` and :meth:`time` compute
    them once, so that a sampling step costs only what changes from step to step.
    """

    def __init__(self, chunk_dim: int, conditioning_dim: int, width: int = 512, depth: int = 3, time_dim: int = 64) -> None:
        super().__init__()
        self.time_dim = time_dim
        self.input = nn.Linear(chunk_dim, width)
        self.conditioning = nn.Sequential(nn.Linear(conditioning_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.time_embedding = nn.Sequential(nn.Linear(time_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.output_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, chunk_dim)

    def condition(self, conditioning: Tensor) -> Tensor:
        return self.conditioning(conditioning)

    def time(self, t: Tensor) -> Tensor:
        return self.time_embedding(time_features(t, self.time_dim))

    def forward(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        """``x`` (B, H*A); ``condition`` and ``time`` (B or 1, width) from the methods above."""
        shift = condition + time
        h = self.input(x) + shift
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + layer(F.silu(norm(h) + shift))
        return self.output(F.silu(self.output_norm(h)))


class ImageEncoder(nn.Module):
    """Small convolutional encoder (B, H, W, 3) uint8 -> (B, dim), with spatial soft-argmax (Levine et al. 2016).

    Keypoints keep *where* things are, which is what a manipulation policy needs, at a fraction of a ResNet's cost.
    """

    def __init__(self, dim: int = 64, channels: tuple[int, ...] = (32, 32, 32, 32), keypoints: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for i, c in enumerate(channels):
            layers += [nn.Conv2d(previous, c, 3, stride=2 if i < 3 else 1, padding=1), nn.GroupNorm(8, c), nn.ReLU()]
            previous = c
        layers.append(nn.Conv2d(previous, keypoints, 1))
        self.convolutions = nn.Sequential(*layers)
        self.output = nn.Sequential(nn.Linear(2 * keypoints, dim), nn.LayerNorm(dim), nn.Tanh())

    def forward(self, image: Tensor) -> Tensor:
        x = self.convolutions(image.permute(0, 3, 1, 2).float() * (2.0 / 255.0) - 1.0)
        b, k, h, w = x.shape
        attention = x.reshape(b, k, h * w).softmax(-1).reshape(b, k, h, w)
        ys = torch.linspace(-1.0, 1.0, h, device=x.device, dtype=x.dtype)
        xs = torch.linspace(-1.0, 1.0, w, device=x.device, dtype=x.dtype)
        return self.output(torch.cat([(attention.sum(3) * ys).sum(-1), (attention.sum(2) * xs).sum(-1)], dim=-1))
