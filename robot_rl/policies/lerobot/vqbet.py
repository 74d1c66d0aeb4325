"""LeRobot's VQ-BeT (Lee et al. 2024): a transformer chooses codes of action chunks and shifts what they decode to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robot_rl.policies.lerobot.adapter import DeterministicPolicy

GREEDY = 1e-30
"""Temperature at which the softmax over codes is one at the most likely code and zero elsewhere."""


class LeRobotVQBeT(DeterministicPolicy):
    """Takes the most likely code where LeRobot draws one from the global random state: the same observation, the same chunk.

    A code is a choice among a few dozen, so there is no noise for a latent-noise head to move; residual heads correct the chunk.
    """

    TYPE, SAMPLER = "vqbet", "vqbet most likely codes"

    def _prepare(self) -> None:
        self.config.bet_softmax_temperature = GREEDY

    def _rows(self) -> tuple[int, int]:
        return self.config.action_chunk_size, self.config.action_chunk_size

    def _features_and_chunk(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        seen = {k: v for k, v in batch.items() if k.startswith("observation.") and isinstance(v, Tensor)}
        seen["observation.images"] = torch.stack([seen[k] for k in self.config.image_features], dim=-4)
        read: list[Tensor] = []
        handle = self.policy.vqbet.action_head.register_forward_pre_hook(lambda _m, args: read.append(args[0]))
        devices = [self.device] if self.device.startswith("cuda") else []
        try:
            # two codes that tie to the last bit are drawn by the global generator, which is nobody's to move
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(0)
                chunk = self.policy.vqbet(seen, rollout=True)
        finally:
            handle.remove()
        (features,) = read  # (B, action queries, D); the one of the newest frame is what the chunk comes from
        now = features[:, self.config.n_obs_steps - 1]
        return torch.cat([seen["observation.state"][:, -1], now], dim=-1), chunk
