"""The play-out's deadlines, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from robot_rl.ros import playout

PERIOD_S = 0.02


class Clock:
    """Time passes only in ``sleep``."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def ticks(monkeypatch: pytest.MonkeyPatch, count: int, during: Callable[[int, Clock, playout.Playout], None]) -> np.ndarray:
    """Times of ``count`` ticks; ``during`` is called in each of them."""
    clock, times = Clock(), []
    monkeypatch.setattr(playout, "time", clock)

    def tick() -> None:
        times.append(clock.now)
        during(len(times), clock, player)
        if len(times) == count:
            player.close()

    player = playout.Playout(PERIOD_S, tick)
    player._run()
    assert player.error is None
    return np.array(times)


def test_ticks_are_a_period_apart(monkeypatch):
    assert np.diff(ticks(monkeypatch, 10, lambda *_: None)) == pytest.approx(PERIOD_S)


@pytest.mark.parametrize("ahead", [0.0, 0.007, 0.0199, 0.093, -0.05])
def test_realigned_ticks_fall_on_the_given_time_and_none_is_left_out_for_longer_than_two_periods(monkeypatch, ahead):
    """Heartbeats come with ticks: a pause of a whole control step would look like a policy that is gone."""
    asked: list[float] = []

    def during(n: int, clock: Clock, player: playout.Playout) -> None:
        if n == 5:
            asked.append(clock.now + ahead)
            player.realign(asked[0])

    times = ticks(monkeypatch, 12, during)
    phase = (times[6:] - asked[0]) / PERIOD_S
    assert phase == pytest.approx(np.round(phase), abs=1e-6)
    gaps = np.diff(times)
    assert gaps.min() > PERIOD_S - 1e-9
    assert gaps.max() < 2 * PERIOD_S


@pytest.mark.parametrize("ahead", [0.003, 0.011, 0.019])
def test_what_begins_when_deadlines_have_moved_goes_on_a_period_later(monkeypatch, ahead):
    """An episode begins while the play-out sleeps: its first command must not leave at the old deadline, or the second is late."""
    clock = Clock()
    monkeypatch.setattr(playout, "time", clock)
    begun: list[float] = []
    commands: list[float] = []

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if len(commands) == 0 and clock.now > 100.1 and not begun:  # a service's thread, meanwhile
            begun.append(clock.now)
            player.realign(clock.now + ahead)

    def tick() -> None:
        if begun and not player.realigning:
            commands.append(clock.now)
        if len(commands) == 5:
            player.close()

    monkeypatch.setattr(clock, "sleep", sleep)
    player = playout.Playout(PERIOD_S, tick)
    player._run()
    assert player.error is None
    assert np.diff(commands) == pytest.approx(PERIOD_S)


def test_deadlines_that_passed_during_a_long_tick_are_skipped(monkeypatch):
    """The one that is late by less than a period is served at once, those before it never."""

    def during(n: int, clock: Clock, player: playout.Playout) -> None:
        if n == 3:
            clock.now += 3.5 * PERIOD_S

    periods = np.diff(ticks(monkeypatch, 8, during)) / PERIOD_S
    assert periods == pytest.approx([1, 1, 3.5, 0.5, 1, 1, 1])
