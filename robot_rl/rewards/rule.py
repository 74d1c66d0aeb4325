"""Success by rule: the task is done when numbers that the robot reports say so, for some frames in a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robot_rl.rewards.decision import Guard
from robot_rl.rewards.source import Coverage, EpisodeTrace, FrameBatch, ScoreBatch, SourceInfo
from robot_rl.types import RewardKind


@dataclass
class RuleSource:
    """Attributes:
    rules: conditions such as ``{field: "observation.state[2]", op: "<", value: 0.04}``; all must hold.
    frames: in a row, before it counts.
    end_on_success: ask for the end of the episode then.
    """

    rules: list[dict[str, Any]]
    name: str = "rule"
    frames: int = 3
    end_on_success: bool = True
    coverage: Coverage = field(default="on_event", init=False)
    kind: RewardKind = field(default=RewardKind.SUCCESS, init=False)

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("rules is empty: accepted is at least one condition")
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: accepted are integers >= 1")
        self._guards = tuple(Guard(**r) for r in self.rules)
        self._episode, self._last, self._row = "", -1, 0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(g.feature for g in self._guards)

    def describe(self) -> SourceInfo:
        return SourceInfo("rule:" + "&".join(f"{g.field}{g.op}{g.value:g}" for g in self._guards))

    def score(self, batch: FrameBatch) -> ScoreBatch:
        steps = np.asarray(batch.steps, np.int64)
        if batch.episode_id != self._episode or (len(steps) and steps[0] <= self._last):
            self._row = 0
        self._episode, self._last = batch.episode_id, int(steps[-1]) if len(steps) else self._last
        scores, self._row = self._scan(batch.observations, steps, self._row)
        return scores

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch:
        scores, _ = self._scan(trace.observations, np.arange(trace.length + 1), 0)
        return scores if len(scores.steps) else dataclasses.replace(scores, success=False)

    def _scan(self, observations: Mapping[str, np.ndarray], steps: np.ndarray, row: int) -> tuple[ScoreBatch, int]:
        unreadable = []
        for i, step in enumerate(steps.tolist()):
            frame = {n: observations[n][i] for n in self.needs if n in observations}
            held = [g.holds(frame) for g in self._guards]
            if any(h is None for h in held):
                unreadable.append(step)
                row = 0
                continue
            row = row + 1 if all(held) else 0
            if row >= self.frames and step > 0:
                one = np.array([step], np.int64)
                return ScoreBatch(one, np.ones(1, np.float32), np.ones(1, bool), ("",), True, step, self.end_on_success), 0
        if unreadable:
            return ScoreBatch.failed(np.array(unreadable, np.int64), "guard_unavailable"), row
        return ScoreBatch.none(), row
