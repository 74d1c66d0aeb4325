"""LeRobot's DiffusionPolicy (Chi et al. 2023), switched to DDIM with eta 0 so that noise decides everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robot_rl.policies.lerobot import versions
from robot_rl.policies.lerobot.adapter import LeRobotPolicy

DDIM_STEPS = 8
"""Where the checkpoint was saved with DDPM: its hundred steps draw fresh noise, so they can be neither kept nor repeated."""


class LeRobotDiffusion(LeRobotPolicy):
    """Conditioning is LeRobot's global conditioning; a chunk is its rows from the newest observation on.

    The first ``n_action_steps`` of them are what ``select_action`` hands out, bit for bit.
    """

    TYPE, SAMPLER = "diffusion", "ddim"

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

    def _sample(self, conditioning: Tensor, noise: Tensor | None, grad: bool) -> Tensor:
        chunk = self._denoise(len(conditioning), conditioning, noise)
        return self.actions.own_to_unit(chunk[:, self.config.n_obs_steps - 1 :])
