"""Where a robot's commanded joints were last measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isfinite

import numpy as np


class MeasuredJoints:
    """Positions by name, each with the time it came.

    A joint belongs to the first of the robot's ``joint_topics`` that has ever said it. Another topic that repeats it (an estimate of
    the scene, say) counts only where no earlier one knows the joint: it must not hide that the joint's own driver has died.

    Args:
        known: joints to keep; anybody may say anything on a topic, and memory stays bounded.
    """

    def __init__(self, known: Collection[str]) -> None:
        self._known = frozenset(known)
        self._last: dict[str, tuple[float, int]] = {}
        self._owner: dict[str, int] = {}

    def update(self, positions: Mapping[str, float], now_ns: int, rank: int = 0) -> None:
        """``rank``: the topic's place among the robot's ``joint_topics``. Values that are not finite are no measurement."""
        for name, value in positions.items():
            if name in self._known and isfinite(value) and rank <= self._owner.get(name, rank):
                self._owner[name] = rank
                # A new dictionary entry at a time: readers in other threads see the old pair or the new one.
                self._last[name] = (value, now_ns)

    def vector(self, names: Collection[str], oldest_ns: int) -> np.ndarray | None:
        """Positions (len(names),), or None where one is unknown or was measured before ``oldest_ns``."""
        found = [self._last.get(name) for name in names]
        if any(f is None or f[1] < oldest_ns for f in found):
            return None
        return np.array([f[0] for f in found if f is not None])

    def position(self, name: str) -> float:
        """The last one, however old. Raises KeyError for a joint that was never measured."""
        return self._last[name][0]

    def forget(self) -> None:
        """What was measured no longer holds; who owns which joint does."""
        self._last.clear()
