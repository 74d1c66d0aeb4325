"""One demonstration as the reward of a whole episode (RoboCLIP, arXiv 2310.07899; rewards specification 2.8)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from robot_rl.rewards.features import FeatureConfig, FrameFeatures, spread
from robot_rl.rewards.source import Coverage, EpisodeTrace, FrameBatch, ScoreBatch, SourceInfo
from robot_rl.types import RewardKind
from robot_rl.vision.encoders import EncoderConfig, file_hash

Metric = Literal["centred_cosine", "cosine", "dot"]


def video_embedding(rows: np.ndarray, bins: int = 4) -> np.ndarray:
    """(bins * D,) frame features (T, D) averaged over equal stretches of time and put side by side: order matters."""
    if len(rows) < 1:
        raise ValueError("an empty video: accepted is at least one frame")
    edges = np.linspace(0, len(rows), bins + 1)
    parts = []
    for k in range(bins):
        first = min(int(edges[k]), len(rows) - 1)
        parts.append(rows[first : max(first + 1, int(edges[k + 1]))].mean(0))
    return np.concatenate(parts).astype(np.float64)


def similarity(video: np.ndarray, demonstration: np.ndarray, mean: np.ndarray, metric: Metric = "centred_cosine") -> float:
    """How alike two embeddings are; ``centred_cosine`` first takes away what all rollouts share (``mean``).

    Raw cosines of pictures of one scene all lie near 1, forwards and backwards; the mean is what hides the difference.
    """
    if metric == "dot":
        return float(video @ demonstration)
    a, b = (video, demonstration) if metric == "cosine" else (video - mean, demonstration - mean)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))


@dataclass
class VideoSimilaritySource:
    """A dense reward at the episode's end.

    Attributes:
        reference: ``.npz`` file that :func:`save_reference` wrote: the demonstration's embedding and the mean of calibration
            rollouts.
    """

    reference: str
    cameras: list[str]
    name: str = "video_similarity"
    metric: Metric = "centred_cosine"
    encoder: dict[str, object] = field(default_factory=dict)
    grid: int = 2
    frames: int = 32
    coverage: Coverage = field(default="episode", init=False)

    def __post_init__(self) -> None:
        if self.metric not in ("centred_cosine", "cosine", "dot"):
            raise ValueError(f"metric={self.metric!r}: accepted are centred_cosine, cosine, dot")
        self.kind = RewardKind.DENSE
        config = FeatureConfig(tuple(self.cameras), EncoderConfig(**self.encoder), self.grid)  # type: ignore[arg-type]
        self.features = FrameFeatures(config)
        path = Path(self.reference).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"reference={self.reference!r}: no such file; save_reference writes one")
        with np.load(path, allow_pickle=False) as stored:
            self._demonstration, self._mean = stored["demonstration"], stored["mean"]
            trained = json.loads(str(stored["settings"]))["encoder_id"]
        if trained != self.features.model_id:
            raise ValueError(
                f"reference={self.reference!r} was made by {trained!r}: accepted is that encoder, here is {self.features.model_id!r}"
            )
        self._model_id = f"video_similarity@{file_hash(path)}/{self.metric}"

    @property
    def needs(self) -> frozenset[str]:
        return self.features.needs

    def describe(self) -> SourceInfo:
        return SourceInfo(self._model_id, low=-1.0)

    def score(self, batch: FrameBatch) -> ScoreBatch:
        return ScoreBatch.none()  # only the whole episode can be compared

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch:
        chosen = spread(trace.length + 1, self.frames)
        rows = self.features({c: np.asarray(trace.observations[c])[chosen] for c in self.cameras})
        value = similarity(video_embedding(rows), self._demonstration, self._mean, self.metric)
        return ScoreBatch(np.array([trace.length]), np.array([value], np.float32), np.ones(1, bool), ("",))


def save_reference(path: str, features: FrameFeatures, demonstration: np.ndarray, rollouts: list[np.ndarray]) -> None:
    """Embed a demonstration and the calibration rollouts (feature rows (T, D) each) for :class:`VideoSimilaritySource`."""
    mean = np.mean([video_embedding(r) for r in rollouts], 0) if rollouts else np.zeros_like(video_embedding(demonstration))
    settings = json.dumps({"encoder_id": features.model_id})
    np.savez(path, demonstration=video_embedding(demonstration), mean=mean, settings=np.array(settings))
