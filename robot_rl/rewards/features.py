"""From camera frames to the numbers that reward models read, with a cache for frames that are read again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robot_rl.types import OBSERVATION_IMAGES
from robot_rl.vision.encoders import EncoderConfig, ImageEncoder, build_encoder, pooled


@dataclass(frozen=True)
class FeatureConfig:
    """Which frames, through which encoder, pooled how.

    Attributes:
        cameras: feature names (``observation.images.<camera>``); their features are put side by side.
        grid: cells a side that maps are averaged over; 1 tells what is there, more also tells where.
    """

    cameras: tuple[str, ...]
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    grid: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(self.cameras))
        if not self.cameras:
            raise ValueError("features.cameras is empty: accepted are names like observation.images.front")
        for name in self.cameras:
            if not name.startswith(OBSERVATION_IMAGES):
                raise ValueError(f"features.cameras={name!r}: accepted are names like {OBSERVATION_IMAGES}front")
        if not 1 <= self.grid <= 16:
            raise ValueError(f"features.grid={self.grid}: accepted are 1 to 16")

    def to_json(self) -> dict[str, Any]:
        return {"cameras": list(self.cameras), "encoder": dataclasses.asdict(self.encoder), "grid": self.grid}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], encoder_weights: str = "") -> FeatureConfig:
        """``encoder_weights`` replaces the stored place of the weights: another machine keeps them elsewhere."""
        encoder = {**data["encoder"], **({"weights": encoder_weights} if encoder_weights else {})}
        return cls(tuple(data["cameras"]), EncoderConfig(**encoder), int(data["grid"]))


class FrameFeatures:
    """Callable: observations to (N, dim) float32."""

    def __init__(self, config: FeatureConfig, encoder: ImageEncoder | None = None) -> None:
        self.config = config
        self.encoder = build_encoder(config.encoder) if encoder is None else encoder
        self.dim = self.encoder.channels * config.grid**2 * len(config.cameras)
        self.model_id = f"{self.encoder.model_id}/g{config.grid}"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.config.cameras)

    def __call__(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """Raises KeyError naming a camera that is missing."""
        return np.concatenate([self.view(observations, camera) for camera in self.config.cameras], 1)

    def view(self, observations: Mapping[str, np.ndarray], camera: str) -> np.ndarray:
        """(N, dim of one view) of one camera."""
        if camera not in observations:
            raise KeyError(f"{camera} is missing; there are {sorted(observations)}")
        return pooled(self.encoder.maps(np.asarray(observations[camera])), self.config.grid).numpy()


class EpisodeMemory:
    """Rows of the episode that is being watched; starts anew where steps stop rising or the episode's name changes."""

    def __init__(self) -> None:
        self.episode_id = ""
        self.last = -1
        self.count = 0
        self._rows = np.zeros((0, 0), np.float32)

    @property
    def rows(self) -> np.ndarray:
        """(count, dim) so far; a view that the next :meth:`add` may outdate."""
        return self._rows[: self.count]

    def add(self, episode_id: str, step: int, row: np.ndarray) -> None:
        if step <= self.last or episode_id != self.episode_id:
            self.count = 0
        self.episode_id, self.last = episode_id, step
        if self.count >= len(self._rows) or self._rows.shape[1] != len(row):
            grown = np.zeros((max(64, 2 * self.count), len(row)), np.float32)
            grown[: self.count] = self._rows[: self.count] if self.count else 0.0
            self._rows = grown
        self._rows[self.count] = row
        self.count += 1


def spread(count: int, most: int) -> np.ndarray:
    """Indices of at most ``most`` of ``count`` rows, evenly spread, first and last included (only one: the last)."""
    if count <= most:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(int) if most > 1 else np.array([count - 1])
