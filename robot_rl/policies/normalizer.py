"""Normalisation statistics: inside a policy's checkpoint, hashed, and nowhere else.

Vector features become (x - mean) / std clipped to +-``clip``, with rotations as networks should see them; actions map [low, high] of the statistics onto [-1, 1];
images become float in [-1, 1]. The hash of the numbers travels with every decision a policy makes, so data normalised
with other statistics cannot slip in unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.policies.rotations import narrowed, quaternions, widened
from robot_rl.types import ActionSpec, Episode, FeatureSpec

Rotations = Literal["quaternion", "matrix"]
MIN_STD = 1e-3  # a feature that barely moves in the demonstrations must not be blown up into noise
OBSERVATION_CLIP = 5.0


class Normalizer(nn.Module):
    """Statistics of observations and actions as buffers (so that they are saved with the weights).

    Args:
        features: what is normalised; images need no statistics.
        observation_mean, observation_std: one (width,) array a vector feature.
        action_low, action_high: (A,) physical values that become -1 and 1.
        rotations: what becomes of a vector's quaternions: they stay, or become two columns of the rotation matrix.
    """

    action_low: Tensor
    action_high: Tensor

    def __init__(
        self,
        features: Mapping[str, FeatureSpec],
        observation_mean: Mapping[str, np.ndarray],
        observation_std: Mapping[str, np.ndarray],
        action_low: np.ndarray,
        action_high: np.ndarray,
        rotations: Rotations = "quaternion",
    ) -> None:
        super().__init__()
        self.features = dict(features)
        self._rotations = {name: _quaternions(self.features[name], rotations) for name in self.vector_features}
        for name in self.vector_features:
            self.register_buffer(self._key(name, "mean"), torch.as_tensor(observation_mean[name], dtype=torch.float32).clone())
            self.register_buffer(self._key(name, "std"), torch.as_tensor(observation_std[name], dtype=torch.float32).clone())
        self.register_buffer("action_low", torch.as_tensor(action_low, dtype=torch.float32).clone())
        self.register_buffer("action_high", torch.as_tensor(action_high, dtype=torch.float32).clone())

    @staticmethod
    def _key(name: str, what: str) -> str:
        return f"{name.replace('.', '__')}__{what}"

    @property
    def vector_features(self) -> list[str]:
        return [name for name, spec in self.features.items() if spec.dtype != "uint8"]

    @property
    def image_features(self) -> list[str]:
        return [name for name, spec in self.features.items() if spec.dtype == "uint8"]

    def width(self, name: str) -> int:
        """Of a normalised vector feature."""
        return self.features[name].shape[0] + 2 * len(self._rotations[name])

    @classmethod
    def blank(cls, features: Mapping[str, FeatureSpec], action: ActionSpec, rotations: Rotations) -> Normalizer:
        """To load statistics into."""
        vectors = {n: f for n, f in features.items() if f.dtype != "uint8"}
        zeros = {n: np.zeros(f.shape[0] + 2 * len(_quaternions(f, rotations))) for n, f in vectors.items()}
        return cls(features, zeros, zeros, np.zeros(action.dim), np.ones(action.dim), rotations)

    @classmethod
    def fit(
        cls,
        episodes: Iterable[Episode],
        features: Mapping[str, FeatureSpec],
        action: ActionSpec,
        *,
        action_quantile: float = 0.0,
        rotations: Rotations = "quaternion",
    ) -> Normalizer:
        """Statistics of recorded episodes.

        Args:
            action: recorded actions are clipped to its limits first, because that is what the robot would execute.
            action_quantile: 0 maps the exact minimum and maximum to -1 and 1; 0.01 maps the 1 % and 99 % quantiles,
                so that one wild recorded command does not squeeze all the others.
        """
        chosen = list(episodes)
        if not chosen:
            raise ValueError("Normalizer.fit: no episodes given; statistics need at least one")
        mean, std = {}, {}
        for name, spec in features.items():
            if spec.dtype != "uint8":
                rows = np.concatenate([e.observations[name] for e in chosen]).astype(np.float64)
                rows = widened(torch.from_numpy(rows), _quaternions(spec, rotations)).numpy()
                mean[name], std[name] = rows.mean(0), np.maximum(rows.std(0), MIN_STD)
        actions = np.clip(np.concatenate([e.action for e in chosen]).astype(np.float64), action.low, action.high)
        low, high = np.quantile(actions, [action_quantile, 1.0 - action_quantile], axis=0)
        narrow = (high - low) < 1e-6  # a dimension that never moves: keep its value in the middle of a unit range
        low, high = np.where(narrow, low - 0.5, low), np.where(narrow, high + 0.5, high)
        return cls(features, mean, std, low, high, rotations)

    def stats_hash(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def observation(self, name: str, value: Tensor) -> Tensor:
        """Physical vector feature (..., dim) to normalised (..., width), clipped to +-5 standard deviations."""
        value = widened(value, self._rotations[name])
        mean, std = getattr(self, self._key(name, "mean")), getattr(self, self._key(name, "std"))
        return ((value - mean) / std).clamp_(-OBSERVATION_CLIP, OBSERVATION_CLIP)

    def unobservation(self, name: str, value: Tensor) -> Tensor:
        """Normalised vector feature (..., width) to physical."""
        value = value * getattr(self, self._key(name, "std")) + getattr(self, self._key(name, "mean"))
        return narrowed(value, self._rotations[name])

    def action(self, action: Tensor) -> Tensor:
        """Physical (..., A) to [-1, 1] (not clamped: data outside the statistics stay outside)."""
        return (action - self.action_low) * (2.0 / (self.action_high - self.action_low)) - 1.0

    def unaction(self, action: Tensor) -> Tensor:
        """[-1, 1] (..., A) to physical."""
        return self.action_low + (action + 1.0) * (0.5 * (self.action_high - self.action_low))


def _quaternions(feature: FeatureSpec, rotations: Rotations) -> list[int]:
    """Those of a vector feature that are replaced."""
    return quaternions(feature.names or ()) if rotations == "matrix" else []
