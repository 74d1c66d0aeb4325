"""A reward along the way: a part of the success for every sub-task that ends (VLA-RL's process reward; specification 2.10).

A classifier learns, from successes alone, what the moments before a keyframe look like; each such moment pays once, and a whole
success pays about 1 in all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from robot_rl.rewards.classifier import KIND, ClassifierSource
from robot_rl.rewards.learned import load_model
from robot_rl.rewards.source import Coverage, EpisodeTrace, FrameBatch, ScoreBatch, SourceInfo
from robot_rl.types import RewardKind


@dataclass
class ProcessSource:
    """Attributes:
    model: classifier folder that ``robot-rl reward train --kind process`` wrote.
    threshold: probability above which a frame counts. ``k``, ``n``: so many of the last n frames must.
    merge_s: a sub-task that ends within this time after another is the same one.
    """

    model: str
    name: str = "process"
    threshold: float = 0.5
    k: int = 2
    n: int = 3
    merge_s: float = 0.5
    encoder_weights: str = ""
    coverage: Coverage = field(default="on_event", init=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0 or not 1 <= self.k <= self.n or self.merge_s < 0:
            raise ValueError(
                f"threshold={self.threshold}, k={self.k}, n={self.n}, merge_s={self.merge_s}: accepted are a threshold between 0 and 1, "
                "1 <= k <= n, merge_s >= 0"
            )
        self.kind = RewardKind.DENSE
        settings = load_model(self.model, KIND)[1]
        if "keyframes" not in settings:
            raise ValueError(f"model={self.model!r} is a success classifier: accepted is one trained with --kind process")
        self.keyframes = float(settings["keyframes"])
        self._reader = ClassifierSource(self.model, output="probability", encoder_weights=self.encoder_weights)
        self.needs = self._reader.needs
        self._reset()
        self._episode, self._last = "", -1

    def _reset(self) -> None:
        self._recent: list[bool] = []
        self._inside, self._paid_s = False, -np.inf

    def describe(self) -> SourceInfo:
        return SourceInfo(self._reader.describe().model_id, high=1.0 / self.keyframes)

    def score(self, batch: FrameBatch) -> ScoreBatch:
        steps = np.asarray(batch.steps, np.int64)
        if batch.episode_id != self._episode or (len(steps) and steps[0] <= self._last):
            self._reset()
        self._episode, self._last = batch.episode_id, int(steps[-1]) if len(steps) else self._last
        return self._pay(self._reader.probabilities(batch.observations), steps, np.asarray(batch.stamps_ns))

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch:
        kept = (self._recent, self._inside, self._paid_s)
        self._reset()
        scores = self._pay(self._reader.probabilities(trace.observations), np.arange(trace.length + 1), trace.stamps_ns)
        self._recent, self._inside, self._paid_s = kept
        return scores

    def _pay(self, probability: np.ndarray, steps: np.ndarray, stamps: np.ndarray) -> ScoreBatch:
        paid = []
        for p, step, stamp in zip(probability.tolist(), steps.tolist(), stamps.tolist(), strict=True):
            self._recent = [*self._recent, p > self.threshold][-self.n :]
            inside = sum(self._recent) >= self.k
            if inside and not self._inside and step > 0 and stamp * 1e-9 - self._paid_s >= self.merge_s:
                paid.append(step)
                self._paid_s = stamp * 1e-9
            self._inside = inside
        value = np.full(len(paid), 1.0 / self.keyframes, np.float32)
        return ScoreBatch(np.array(paid, np.int64), value, np.ones(len(paid), bool), ("",) * len(paid))
