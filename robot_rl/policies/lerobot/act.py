"""LeRobot's ACT (Zhao et al. 2023): one observation, one chunk, no noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robot_rl.policies.lerobot.adapter import DeterministicPolicy


class LeRobotACT(DeterministicPolicy):
    """Heads read the normalised state, the encoder's outputs for latent and state tokens, and the mean over its image tokens.

    Raises:
        ValueError: saved with temporal ensembling, which a stateless policy cannot do, unless it is switched off.
    """

    TYPE, SAMPLER = "act", "act regression"

    def _prepare(self) -> None:
        if self.config.temporal_ensemble_coeff is not None:
            if self.options.temporal_ensemble != "off":
                raise ValueError(
                    f"temporal_ensemble_coeff={self.config.temporal_ensemble_coeff}: this ACT averages over its past chunks at every "
                    "step; accepted is temporal_ensemble=off, which runs whole chunks (the runtime blends them where they meet)"
                )
            self.config.temporal_ensemble_coeff = None
            self.config.n_action_steps = self.config.chunk_size

    def _rows(self) -> tuple[int, int]:
        return self.config.chunk_size, self.config.n_action_steps

    def _features_and_chunk(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # ACT reads one frame
        now = {k: v[:, -1] for k, v in batch.items() if k.startswith("observation.") and isinstance(v, Tensor)}
        tokens: list[Tensor] = []
        handle = self.policy.model.encoder.register_forward_hook(lambda _m, _i, out: tokens.append(out))
        try:
            chunk = self.policy.predict_action_chunk(now)
        finally:
            handle.remove()
        vectors = [now[k] for k in self.config.input_features if k not in self.config.image_features]
        (encoded,) = tokens  # (tokens, B, D): latent, state, environment state, then the pixels of the feature maps
        single = 1 + len(vectors)
        parts = [*vectors, encoded[:single].transpose(0, 1).flatten(1)]
        if len(encoded) > single:
            parts.append(encoded[single:].mean(0))
        return torch.cat(parts, dim=-1), chunk
