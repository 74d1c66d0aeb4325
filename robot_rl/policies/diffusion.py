"""Compact diffusion policy (Chi et al. 2023) sampled by DDIM with eta 0 (Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from robot_rl.policies.compact import CompactPolicy
from robot_rl.policies.config import CompactPolicyConfig
from robot_rl.policies.normalizer import Normalizer
from robot_rl.types import ActionSpec, FeatureSpec


class DiffusionPolicy(CompactPolicy):
    """Predicts v = sqrt(alpha) noise - sqrt(1 - alpha) chunk (Salimans and Ho 2022); the clean chunk is clamped at every step.

    Few-step sampling starts at almost pure noise, where dividing a noise prediction by sqrt(alpha) would be ill-conditioned;
    v is well-conditioned everywhere.

    The schedule (cosine, trailing spacing so that sampling starts at pure noise) comes from diffusers once; the sampling
    loop then runs on its precomputed coefficients, because the scheduler object costs more than the network does.
    """

    SAMPLER = "ddim"
    _PREFIX = "schedule_"

    def __init__(
        self, config: CompactPolicyConfig, features: Mapping[str, FeatureSpec], action: ActionSpec, normalizer: Normalizer
    ) -> None:
        super().__init__(config, features, action, normalizer)
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        scheduler = DDIMScheduler(
            num_train_timesteps=config.train_steps,
            beta_schedule="squaredcos_cap_v2",
            timestep_spacing="trailing",
            set_alpha_to_one=True,
        )
        scheduler.set_timesteps(config.num_steps)
        steps = scheduler.timesteps.long()
        previous = steps - config.train_steps // config.num_steps
        alpha = scheduler.alphas_cumprod.double()
        now = alpha[steps]
        after = torch.where(previous >= 0, alpha[previous.clamp(min=0)], torch.ones_like(now))
        self.register_buffer("_alpha", alpha.float(), persistent=False)
        self.register_buffer("_times", (steps.float() + 1) / config.train_steps, persistent=False)
        # clean = root*x - sigma*v; the noise is recomputed from the clamped chunk; x_next = c*clean + d*noise
        self._coefficients = [
            (float(n.sqrt()), float((1 - n).sqrt()), float(m.sqrt()), float((1 - m).sqrt()))
            for n, m in zip(now, after, strict=True)
        ]

    def _denoise(self, conditioning: Tensor, x: Tensor) -> Tensor:
        condition = self.denoiser.condition(conditioning)
        times = self.denoiser.time(self._times)
        for i, (root, sigma, c, d) in enumerate(self._coefficients):
            v = self.denoiser(x, condition, times[i : i + 1])
            clean = (root * x - sigma * v).clamp_(-1.0, 1.0)
            x = clean if d == 0.0 else c * clean + (d / sigma) * (x - root * clean)
        # Where num_steps does not divide train_steps, rounding can end the schedule a hair before the clean chunk.
        return x.clamp(-1.0, 1.0)

    def chain_inputs(self, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        return self.denoiser.condition(conditioning), self.denoiser.time(self._times)

    def chain_step(self, i: int, x: Tensor, condition: Tensor, times: Tensor) -> Tensor:
        return self.chain_advance(i, x, self.clean_estimate(i, x, condition, times))

    def chain_advance(self, i: int, x: Tensor, clean: Tensor) -> Tensor:
        root, sigma, c, d = self._coefficients[i]
        clean = clean.clamp(-1.0, 1.0)
        return clean if d == 0.0 else c * clean + (d / sigma) * (x - root * clean)

    def clean_estimate(self, i: int, x: Tensor, condition: Tensor, times: Tensor) -> Tensor:
        if i == len(self._coefficients):
            return x
        root, sigma, _, _ = self._coefficients[i]
        return root * x - sigma * self.denoiser(x, condition, times[i : i + 1])

    def noised(self, i: int, chunk: Tensor, noise: Tensor) -> Tensor:
        if i == len(self._coefficients):
            return chunk
        root, sigma, _, _ = self._coefficients[i]
        return root * chunk + sigma * noise

    def score(self, chunk: Tensor, conditioning: Tensor, level: float) -> Tensor:
        k = max(round(level * self.config.train_steps), 1) - 1
        root, sigma = self._alpha[k].sqrt(), (1 - self._alpha[k]).sqrt()
        time = self.denoiser.time(torch.full((1,), (k + 1) / self.config.train_steps, dtype=chunk.dtype, device=chunk.device))
        v = self.denoiser(chunk, self.denoiser.condition(conditioning), time)
        return -(root * v + sigma * chunk) / sigma  # the noise it sees is root v + sigma x

    def denoising_loss(self, conditioning: Tensor, chunk: Tensor, generator: torch.Generator) -> Tensor:
        x0 = chunk.flatten(1)
        k = torch.randint(0, self.config.train_steps, (len(x0),), generator=generator, device=x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        root, sigma = self._alpha[k][:, None].sqrt(), (1 - self._alpha[k][:, None]).sqrt()
        time = self.denoiser.time((k.float() + 1) / self.config.train_steps)
        predicted = self.denoiser(root * x0 + sigma * noise, self.denoiser.condition(conditioning), time)
        return F.mse_loss(predicted, root * noise - sigma * x0, reduction="none").unflatten(1, chunk.shape[1:])
