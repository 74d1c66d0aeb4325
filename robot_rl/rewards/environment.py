"""What a simulator (or an instrumented cell) knows about its own task (section 2.1 of the rewards specification)."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from robot_rl.rewards.source import Coverage, EpisodeTrace, FrameBatch, ScoreBatch, SourceInfo
from robot_rl.types import RewardKind


@dataclass(frozen=True)
class TaskSample:
    """Ground truth of one simulated step, with the stamp of the observation it goes with."""

    stamp_ns: int
    reward: float = float("nan")
    success: bool = False
    terminated: bool = False


@dataclass
class EnvironmentSource:
    """Turns ground truth into one verdict an episode, or into its rewards.

    Attributes:
        mode: ``sparse01``: 1 where success is reached, 0 elsewhere; ``sparse_minus1``: -1 a step and 0 at success; ``dense``:
            the environment's own reward.
        end_on_success: ask for the end of the episode when the task is done.
        keep: ground-truth samples kept for episodes that are still running.
    """

    name: str = "env"
    mode: Literal["sparse01", "sparse_minus1", "dense"] = "sparse01"
    end_on_success: bool = True
    keep: int = 20_000
    needs: frozenset[str] = field(default=frozenset({"task_state"}), init=False)

    def __post_init__(self) -> None:
        if self.mode not in ("sparse01", "sparse_minus1", "dense"):
            raise ValueError(f"mode={self.mode!r}: accepted are sparse01, sparse_minus1, dense")
        self.kind = RewardKind.SUCCESS if self.mode == "sparse01" else RewardKind.DENSE
        self.coverage: Coverage = "on_event" if self.mode == "sparse01" else "every_step"
        self._samples: deque[TaskSample] = deque(maxlen=self.keep)
        self._guard = threading.Lock()

    def describe(self) -> SourceInfo:
        return SourceInfo("environment", low=-1.0 if self.mode == "sparse_minus1" else 0.0)

    def feed(self, sample: TaskSample) -> None:
        """Ground truth as it comes; any thread."""
        with self._guard:
            self._samples.append(sample)

    def score(self, batch: FrameBatch) -> ScoreBatch:
        """Whether the task is done at the newest of these observations; only a success says anything."""
        with self._guard:
            known = {s.stamp_ns: s for s in self._samples}
        for step, stamp in zip(batch.steps.tolist(), batch.stamps_ns.tolist(), strict=True):
            sample = known.get(stamp)
            if sample is not None and sample.success and step > 0:
                one = np.array([step], np.int64)
                return ScoreBatch(one, np.ones(1, np.float32), np.ones(1, bool), ("",), True, step, self.end_on_success)
        return ScoreBatch.none()

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch:
        """Rewards of every transition, and the verdict. Truth between two observations belongs to the transition between them.

        An episode without any ground truth gives invalid answers: nothing is known about it.
        """
        with self._guard:
            samples = sorted(self._samples, key=lambda s: s.stamp_ns)
        stamps = np.asarray(trace.stamps_ns, np.int64)
        steps = np.arange(1, trace.length + 1)
        inside = [s for s in samples if stamps[0] < s.stamp_ns <= stamps[-1]]
        if not inside or not (np.diff(stamps) > 0).all():
            return ScoreBatch.failed(steps, "no_context")
        reached = -1
        rewards = np.zeros(trace.length, np.float64)
        for sample in inside:
            k = int(np.searchsorted(stamps, sample.stamp_ns, side="left"))  # the first observation not before it
            if sample.success and reached < 0:
                reached = k
            rewards[k - 1] += 0.0 if np.isnan(sample.reward) else sample.reward
        if self.mode == "dense":
            if all(np.isnan(s.reward) for s in inside):
                return ScoreBatch.failed(steps, "no_context")
            value = rewards.astype(np.float32)
        elif self.mode == "sparse01":  # zeros need no events: the verdict makes everything else zero
            steps = np.array([reached] if reached > 0 else [], np.int64)
            value = np.ones(len(steps), np.float32)
        else:
            value = np.full(trace.length, -1.0, np.float32)
            if reached > 0:
                value[reached - 1] = 0.0
        return ScoreBatch(steps, value, np.ones(len(steps), bool), ("",) * len(steps), reached > 0, reached)
