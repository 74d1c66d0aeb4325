"""Optimal-transport imitation as a source: a dense reward for every frame, known once the episode is over."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from robot_rl.rewards.causal import scores_of
from robot_rl.rewards.features import FeatureConfig, FrameFeatures
from robot_rl.rewards.source import Coverage, EpisodeTrace, FrameBatch, ScoreBatch, SourceInfo
from robot_rl.rewards.transport import transport_rewards
from robot_rl.types import RewardKind
from robot_rl.vision.encoders import EncoderConfig, file_hash


@dataclass
class TransportSource:
    """Attributes:
    demonstrations: ``.npz`` files that :func:`save_demonstration` wrote.
    scale: of the rewards; those of one episode sum to -scale * its transport cost. ``epsilon``: of the entropic plan.
    """

    demonstrations: list[str]
    cameras: list[str]
    name: str = "transport"
    encoder: dict[str, object] = field(default_factory=dict)
    grid: int = 2
    scale: float = 10.0
    epsilon: float = 0.05
    coverage: Coverage = field(default="every_step", init=False)

    def __post_init__(self) -> None:
        if self.epsilon <= 0 or self.scale <= 0:
            raise ValueError(f"epsilon={self.epsilon}, scale={self.scale}: accepted are positive numbers")
        self.kind = RewardKind.DENSE
        config = FeatureConfig(tuple(self.cameras), EncoderConfig(**self.encoder), self.grid)  # type: ignore[arg-type]
        self.features = FrameFeatures(config)
        files = [Path(f).expanduser() for f in self.demonstrations]
        absent = [str(f) for f in files if not f.is_file()]
        if absent or not files:
            raise ValueError(f"demonstrations={self.demonstrations!r}: no such file {', '.join(absent)}")
        self._rows = []
        for f in files:
            with np.load(f, allow_pickle=False) as stored:
                trained = str(stored["encoder_id"])
                if trained != self.features.model_id:
                    raise ValueError(
                        f"{f} was made by {trained!r}: accepted is that encoder, here is {self.features.model_id!r}"
                    )
                self._rows.append(stored["rows"])
        self._model_id = f"transport@{'+'.join(file_hash(f) for f in files)[:40]}/e{self.epsilon:g}/s{self.scale:g}"

    @property
    def needs(self) -> frozenset[str]:
        return self.features.needs

    def describe(self) -> SourceInfo:
        return SourceInfo(self._model_id, low=-self.scale, high=0.0)

    def score(self, batch: FrameBatch) -> ScoreBatch:
        return ScoreBatch.none()  # a plan needs the whole episode

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch:
        rows = self.features(trace.observations)
        return scores_of(np.arange(1, len(rows)), transport_rewards(rows[1:], self._rows, self.scale, self.epsilon))


def save_demonstration(path: str, features: FrameFeatures, rows: np.ndarray) -> None:
    """Feature rows (T, D) of one demonstration, for :class:`TransportSource`."""
    np.savez(path, rows=rows, encoder_id=np.array(features.model_id))
