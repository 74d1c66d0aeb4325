"""What sources share that turn frames into one number each: the same code scores a running episode and a recorded one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robot_rl.rewards.features import EpisodeMemory, FrameFeatures
from robot_rl.rewards.source import Coverage, EpisodeTrace, FrameBatch, ScoreBatch, SourceInfo
from robot_rl.types import RewardKind


@dataclass
class CausalSource:
    """Base of per-frame sources. A subclass sets ``features``, ``kind`` and ``model_id`` and gives :meth:`values`.

    A value never depends on a later frame; a value that is not finite becomes an invalid answer.
    """

    def __post_init__(self) -> None:
        self.coverage: Coverage = "every_step"
        self.kind = RewardKind.POTENTIAL
        self.features: FrameFeatures
        self.model_id = ""
        self.low, self.high = 0.0, 1.0
        self._memory = EpisodeMemory()

    @property
    def needs(self) -> frozenset[str]:
        return self.features.needs

    def describe(self) -> SourceInfo:
        return SourceInfo(self.model_id, low=self.low, high=self.high)

    def values(self, rows: np.ndarray, task: str, first: int) -> np.ndarray:
        """(T - first,) values of frames ``first`` to T - 1; ``rows`` (T, dim) are the episode's features up to there."""
        raise NotImplementedError

    def score(self, batch: FrameBatch) -> ScoreBatch:
        rows = self.features(batch.observations)
        out = np.full(len(rows), np.nan, np.float32)
        for i, (row, step) in enumerate(zip(rows, batch.steps.tolist(), strict=True)):
            self._memory.add(batch.episode_id, int(step), row)
            out[i] = self.values(self._memory.rows, batch.task, self._memory.count - 1)[0]
        return self._scores(np.asarray(batch.steps, np.int64), out)

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch:
        rows = self.features(trace.observations)
        return self._scores(np.arange(len(rows)), self.values(rows, trace.task, 0))

    def _scores(self, steps: np.ndarray, values: np.ndarray) -> ScoreBatch:
        if self.kind is not RewardKind.POTENTIAL:  # nothing reached the first observation
            steps, values = steps[steps > 0], values[steps > 0]
        return scores_of(steps, values)


def scores_of(steps: np.ndarray, values: np.ndarray, reason: str = "error") -> ScoreBatch:
    """Values that are not finite become invalid answers with ``reason``."""
    values = np.asarray(values, np.float32)
    valid = np.isfinite(values)
    return ScoreBatch(
        np.asarray(steps, np.int64), np.where(valid, values, np.nan).astype(np.float32), valid,
        tuple("" if ok else reason for ok in valid),
    )  # fmt: skip
