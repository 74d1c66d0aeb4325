"""What a person feels while they watch: a number from the strip, many times a second, as rewards of the episode it was about (GUIDE).

Readings are kept with the time at which they came, and become reward events of source ``feedback`` once the episode is in the store: only
there is it known which observation was on the screen when. Where nobody touches the strip nothing is known, which is not 0.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from robot_rl.rewards.human import pressed_step
from robot_rl.types import RewardEvent, RewardKind

SOURCE = "feedback"
DELAY_STEPS = 2
"""People answer to what they saw so many steps before; ``robot_rl.rewards.delay.estimate_delay`` finds a person's own."""
MOST_EPISODES, MOST_READINGS = 20, 20_000
PATIENCE_S = 60.0
EARLY_NS, LATE_NS = 1_000_000_000, 5_000_000_000


@dataclass(frozen=True)
class Reading:
    """One instant of the strip: wall clock and steady clock (ns), and a value in [-1, 1]."""

    wall_ns: int
    steady_ns: int
    value: float


@dataclass
class _Felt:
    operator: str
    readings: list[Reading]
    over_since: float = 0.0


def place(readings: list[Reading], stamps_ns: np.ndarray, delay_steps: int = DELAY_STEPS) -> dict[int, float]:
    """Values by observation. A robot's episodes are stamped with wall time, those of a simulation in this process with the steady clock.

    Raises:
        ValueError: the episode's stamps are of neither clock.
    """
    first, last = int(stamps_ns[0]) - EARLY_NS, int(stamps_ns[-1]) + LATE_NS
    for clock in ("wall_ns", "steady_ns"):
        times = [getattr(r, clock) for r in readings]
        if first <= times[0] and times[-1] <= last:
            break
    else:
        raise ValueError("feedback cannot be placed: the episode's stamps are not of this machine's clock")
    found: dict[int, float] = {}
    for at, reading in zip(times, readings, strict=True):
        step = pressed_step(at, stamps_ns) - delay_steps
        if step >= 1:
            found[step] = reading.value
    return found


class Feelings:
    """Readings of running episodes, any thread.

    Args:
        write: (episode, its readings, operator) to the store; False while the episode is not there yet. Raises ValueError.
    """

    def __init__(self, write: Callable[[str, list[Reading], str], bool]) -> None:
        self._write, self._guard = write, threading.Lock()
        self._episodes: OrderedDict[str, _Felt] = OrderedDict()
        self.lost = 0
        self.problem = ""

    def add(self, episode_id: str, value: float, operator: str) -> None:
        with self._guard:
            felt = self._episodes.setdefault(episode_id, _Felt(operator, []))
            if len(felt.readings) < MOST_READINGS:
                felt.readings.append(Reading(time.time_ns(), time.monotonic_ns(), value))
            while len(self._episodes) > MOST_EPISODES:
                self._episodes.popitem(last=False)
                self.lost += 1

    def waiting(self, running: str) -> bool:
        """Whether there is anything to write, of episodes other than the running one."""
        with self._guard:
            return any(e != running for e in self._episodes)

    def settle(self, running: str) -> int:
        """Write what can be written; gives how many episodes it was. May wait for a disk."""
        with self._guard:
            due = [(e, f) for e, f in self._episodes.items() if e != running]
        done = 0
        for episode_id, felt in due:
            now = time.monotonic()
            felt.over_since = felt.over_since or now
            try:
                written = self._write(episode_id, felt.readings, felt.operator)
            except (ValueError, OSError, RuntimeError) as error:
                written, self.problem = True, str(error)
                self.lost += 1
            else:
                done += written
            if written or now - felt.over_since > PATIENCE_S:  # an episode that was thrown away never comes
                with self._guard:
                    self._episodes.pop(episode_id, None)
        return done


def events(episode_id: str, values: dict[int, float], stamps_ns: np.ndarray, operator: str) -> list[RewardEvent]:
    return [
        RewardEvent(
            episode_id, step, SOURCE, value, RewardKind.DENSE, stamp_ns=int(stamps_ns[step]), model_id=f"human:{operator}"
        )
        for step, value in sorted(values.items())
    ]
