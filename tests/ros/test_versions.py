"""Which version acts: what the learner announced, unless one is pinned. Neither ROS nor a policy is needed for the rule."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from robot_rl.ros.versions import VersionChoice
from robot_rl.wire import WeightsNotice

EMPTY = "0" * 64


@dataclass(frozen=True)
class Version:
    version: int
    mode: str = "explore"


class Choice(VersionChoice):
    """Versions that are there, and what was looked for."""

    def __init__(self, *ready: int) -> None:
        super().__init__()
        self.ready, self.looked_for = set(ready), []
        self.acting = Version(0)

    @property
    def versions(self) -> set[int]:
        return self.ready

    def policy(self, version: int) -> Version:
        return Version(version)

    def want(self, version: int) -> None:
        self.looked_for.append(version)


def announced(which: str, version: int, share: float | None = None) -> WeightsNotice:
    return WeightsNotice(which, version, 0, "", EMPTY, EMPTY, 0, "", "", "", 0, 0, which, share)


def test_only_the_pinned_version_acts_whatever_is_announced():
    choice = Choice(3, 4, 5)
    choice.notice([announced("promoted", 3)])
    assert choice.take()
    choice.pin(3)
    choice.notice([announced("promoted", 4), announced("candidate", 5, 1.0)])
    for draw in (None, 0.0):
        assert not choice.take(candidate_draw=draw), "neither a newer version nor a candidate"
    assert choice.acting.version == 3
    choice.pin(0)
    assert choice.take(candidate_draw=0.0)
    assert choice.acting.version == 0
    choice.pin(None)
    assert choice.take()
    assert choice.acting.version == 4, "what was announced meanwhile"


def test_a_version_that_is_not_there_is_refused_and_looked_for():
    choice = Choice(3)
    with pytest.raises(ValueError, match=r"version 7 is not ready here .* accepted are 0, 3, or -1"):
        choice.pin(7)
    assert choice.pinned is None
    assert choice.looked_for == [7]
    choice.ready.add(7)
    choice.pin(7)
    assert choice.take()
    choice.ready.remove(7)
    with pytest.raises(ValueError, match="version 7 is not ready"):
        choice.take()
    assert choice.acting.version == 7, "nothing else acts in its place"


def test_without_announcements_a_pin_gives_way_to_what_acted_before():
    choice = Choice(1, 2)
    choice.offered = Version(2)
    assert choice.take()
    choice.pin(0)
    assert choice.take()
    choice.pin(None)
    assert choice.take()
    assert choice.acting.version == 2
    choice.use_base = True
    assert (choice.acting.version, choice.deciding) == (2, 0), "episodes are said to be the base's while it stands in"
