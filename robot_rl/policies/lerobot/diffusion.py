"""LeRobot's DiffusionPolicy (Chi et al. 2023), switched to DDIM with eta 0 so that noise decides everything."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robot_rl.policies.inpainting import Denoising
from robot_rl.policies.lerobot import versions
from robot_rl.policies.lerobot.adapter import LeRobotPolicy

DDIM_STEPS = 8
"""Where the checkpoint was saved with DDPM: its hundred steps draw fresh noise, so they can be neither kept nor repeated."""


class LeRobotDiffusion(LeRobotPolicy):
    """Conditioning is LeRobot's global conditioning; a chunk is its rows from the newest observation on.

    The first ``n_action_steps`` of them are what ``select_action`` hands out, bit for bit.
    """

    TYPE, SAMPLER = "diffusion", "ddim"
    differentiable = True

    def _prepare(self) -> None:
        config, asked = self.config, self.options.num_inference_steps
        steps = asked or (config.num_inference_steps if config.noise_scheduler_type == "DDIM" else None) or DDIM_STEPS
        if steps > config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={steps}: accepted are 1 to {config.num_train_timesteps}, what it was trained with"
            )
        config.noise_scheduler_type, config.num_inference_steps = "DDIM", steps

    def _built(self) -> None:
        self._condition, self._denoise = versions.diffusion_parts(self.policy)

    def _shape(self) -> tuple[int, int, tuple[int, int] | None, int, int]:
        c = self.config
        # What the encoders make of an observation is told by the network that reads it: it adds the time embedding.
        per_frame = c.robot_state_feature.shape[0] + (c.env_state_feature.shape[0] if c.env_state_feature else 0)
        if c.image_features:
            encoder = self.policy.diffusion.rgb_encoder
            per_frame += len(c.image_features) * (encoder[0] if c.use_separate_rgb_encoder_per_camera else encoder).feature_dim
        noise = (c.horizon, self._action.dim)
        return c.horizon - c.n_obs_steps + 1, c.n_action_steps, noise, per_frame * c.n_obs_steps, c.num_inference_steps

    def _encode(self, batch: dict[str, Any]) -> Tensor:
        if self.config.image_features:
            batch["observation.images"] = torch.stack([batch[k] for k in self.config.image_features], dim=-4)
        return self._condition(batch)

    def denoising(self, conditioning: Tensor) -> Denoising:
        """The same DDIM taken apart, for in-painting.

        Raises:
            ValueError: the network predicts something else than the noise or the sample.
        """
        network, steps, predicts, bound = versions.diffusion_steps(self.policy)
        if predicts not in ("epsilon", "sample"):
            raise ValueError(f"prediction_type {predicts!r}: accepted are epsilon, sample")
        levels = [(before**0.5, (1.0 - before) ** 0.5) for _, before, _ in steps]
        first = self.config.n_obs_steps - 1

        def clean(i: int, x: Tensor) -> Tensor:
            time = torch.full((len(x),), steps[i][0], dtype=torch.long, device=x.device)
            out = network(x, time, global_cond=conditioning)
            return out if predicts == "sample" else (x - levels[i][1] * out) / levels[i][0]

        def advance(i: int, x: Tensor, estimate: Tensor) -> Tensor:
            noise, after = (x - levels[i][0] * estimate) / levels[i][1], steps[i][2]
            bounded = estimate if bound is None else estimate.clamp(-bound, bound)
            return after**0.5 * bounded + (1.0 - after) ** 0.5 * noise

        return Denoising(
            levels, clean, advance, first_row=first, deviation=self.actions.deviation, own=self.actions.unit_to_own,
            finish=lambda x: self.actions.own_to_unit(x[:, first:]),
        )  # fmt: skip

    def _sample(self, conditioning: Tensor, noise: Tensor | None, grad: bool) -> Tensor:
        chunk = self._denoise(len(conditioning), conditioning, noise)
        return self.actions.own_to_unit(chunk[:, self.config.n_obs_steps - 1 :])

    # ---- trained further

    @property
    def denoiser(self) -> nn.Module:
        """LeRobot's U-Net."""
        return self.policy.diffusion.unet

    def with_denoiser(self, denoiser: nn.Module) -> LeRobotDiffusion:
        """This policy with another U-Net, everything else shared."""
        other, policy = copy(self), copy(self.policy)
        model = copy(self.policy.diffusion)
        for module, name, part in ((model, "unet", denoiser), (policy, "diffusion", model)):
            module.__dict__["_modules"] = {**module._modules, name: part}
        other.policy = policy
        other._built()
        return other

    def denoising_loss(self, conditioning: Tensor, chunk: Tensor, generator: torch.Generator) -> Tensor:
        """Per-element loss (B, H, A) of LeRobot's own objective on normalised chunks (B, H, A).

        A policy of several frames denoises rows before the newest observation, too, which a chunk does not have: they repeat its
        first row, and do not count.
        """
        own = self.actions.unit_to_own(chunk)
        before = self.config.n_obs_steps - 1
        clean = torch.cat([own[:, :1].expand(-1, before, -1), own], dim=1)
        scheduler = self.policy.diffusion.noise_scheduler
        noise = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
        steps = scheduler.config.num_train_timesteps
        t = torch.randint(0, steps, (len(clean),), generator=generator, device=clean.device)
        predicted = self.denoiser(scheduler.add_noise(clean, noise, t), t, global_cond=conditioning)
        target = noise if self.config.prediction_type == "epsilon" else clean
        return F.mse_loss(predicted, target, reduction="none")[:, before:]
