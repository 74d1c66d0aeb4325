"""Compact flow-matching policy (Lipman et al. 2023; straight paths as in rectified flow), Euler ODE from noise to chunk."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from robot_rl.policies.compact import CompactPolicy


class FlowPolicy(CompactPolicy):
    """x_t = (1 - t) noise + t chunk; the network predicts the velocity chunk - noise."""

    SAMPLER = "euler"

    def _denoise(self, conditioning: Tensor, x: Tensor) -> Tensor:
        condition = self.denoiser.condition(conditioning)
        steps = self.config.num_steps
        times = self.denoiser.time(torch.arange(steps, device=x.device, dtype=x.dtype) / steps)
        for i in range(steps):
            x = x + self.denoiser(x, condition, times[i : i + 1]) / steps
        return x.clamp(-1.0, 1.0)

    def chain_inputs(self, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        steps = self.config.num_steps
        times = torch.arange(steps, device=conditioning.device, dtype=conditioning.dtype) / steps
        return self.denoiser.condition(conditioning), self.denoiser.time(times)

    def chain_step(self, i: int, x: Tensor, condition: Tensor, times: Tensor) -> Tensor:
        return x + self.denoiser(x, condition, times[i : i + 1]) / self.config.num_steps

    def clean_estimate(self, i: int, x: Tensor, condition: Tensor, times: Tensor) -> Tensor:
        steps = self.config.num_steps
        return x if i == steps else x + (1 - i / steps) * self.denoiser(x, condition, times[i : i + 1])

    def chain_advance(self, i: int, x: Tensor, clean: Tensor) -> Tensor:
        return x + (clean - x) / (self.config.num_steps - i)

    def noised(self, i: int, chunk: Tensor, noise: Tensor) -> Tensor:
        t = i / self.config.num_steps
        return (1 - t) * noise + t * chunk

    def score(self, chunk: Tensor, conditioning: Tensor, level: float) -> Tensor:
        time = self.denoiser.time(torch.full((1,), 1 - level, dtype=chunk.dtype, device=chunk.device))
        velocity = self.denoiser(chunk, self.denoiser.condition(conditioning), time)
        return -(chunk - (1 - level) * velocity) / level  # the noise it sees is x - t velocity

    def denoising_loss(self, conditioning: Tensor, chunk: Tensor, generator: torch.Generator) -> Tensor:
        x1 = chunk.flatten(1)
        x0 = torch.randn(x1.shape, generator=generator, device=x1.device)
        t = torch.rand((len(x1), 1), generator=generator, device=x1.device)
        velocity = self.denoiser((1 - t) * x0 + t * x1, self.denoiser.condition(conditioning), self.denoiser.time(t[:, 0]))
        return F.mse_loss(velocity, x1 - x0, reduction="none").unflatten(1, chunk.shape[1:])
