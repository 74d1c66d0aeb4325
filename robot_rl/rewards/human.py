"""What a person says: success, failure, and a number when they feel like it (section 2.2 of the rewards specification)."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from robot_rl.rewards.source import Coverage, EpisodeTrace, FrameBatch, ScoreBatch, SourceInfo
from robot_rl.types import RewardKind


def pressed_step(press_ns: int, stamps_ns: np.ndarray, display_latency_ms: float = 80.0) -> int:
    """The newest observation whose picture the person can have seen when they pressed; -1 when there was none yet."""
    seen = np.asarray(stamps_ns, np.int64) + int(display_latency_ms * 1e6)
    return int(np.searchsorted(seen, press_ns, side="right")) - 1


@dataclass(frozen=True)
class Press:
    """One press of a button (``value`` 1 success, 0 failure) or one reading of a slider in [-1, 1]."""

    stamp_ns: int
    value: float
    verdict: bool = True


@dataclass
class HumanSource:
    """Presses and readings of one person, mapped to the observations they were about.

    Attributes:
        delay_steps: readings of a slider are about the observation so many steps before.
    """

    name: str = "human"
    operator: str = "operator"
    display_latency_ms: float = 80.0
    delay_steps: int = 2
    coverage: Coverage = field(default="on_event", init=False)
    needs: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.delay_steps <= 12:
            raise ValueError(f"delay_steps={self.delay_steps}: accepted are 0 to 12")
        if not 0.0 <= self.display_latency_ms <= 1000.0:
            raise ValueError(f"display_latency_ms={self.display_latency_ms}: accepted are 0 to 1000")
        self.kind = RewardKind.SUCCESS
        self._presses: deque[Press] = deque(maxlen=1000)
        self._guard = threading.Lock()

    def describe(self) -> SourceInfo:
        return SourceInfo(f"human:{self.operator}", low=-1.0, deterministic=False)

    def press(self, press: Press) -> None:
        """Any thread. Raises ValueError for a value outside [-1, 1]."""
        if not -1.0 <= press.value <= 1.0:
            raise ValueError(f"value={press.value}: accepted are -1 to 1")
        with self._guard:
            self._presses.append(press)

    def score(self, batch: FrameBatch) -> ScoreBatch:
        return ScoreBatch.none()  # a person speaks when they press, not when a frame comes

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch:
        with self._guard:
            presses = [p for p in self._presses if trace.stamps_ns[0] <= p.stamp_ns]
        found: dict[int, float] = {}
        success: bool | None = None
        at = -1
        for p in presses:
            step = pressed_step(p.stamp_ns, trace.stamps_ns, self.display_latency_ms)
            if p.verdict:
                success, at = p.value > 0.5, max(step, 1)
            elif step - self.delay_steps >= 1:
                found[step - self.delay_steps] = p.value
        steps = np.array(sorted(found), np.int64)
        values = np.array([found[s] for s in steps.tolist()], np.float32)
        return ScoreBatch(steps, values, np.ones(len(steps), bool), ("",) * len(steps), success, at)
