"""Which version acts: the rule of taking what the learner announced, the same wherever inference runs. Neither rclpy nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from robot_rl.wire import WeightsNotice


class Acting(Protocol):
    """What acts: a version (0: the base) in a mode (``base``, ``explore``, ``eval``)."""

    @property
    def version(self) -> int: ...

    @property
    def mode(self) -> str: ...


class VersionChoice:
    """What acts, what waits for its moment, and when one becomes the other. Subclasses say what is there.

    Attributes:
        acting: what decides now; replaced as one reference.
        offered: a verified newer version that waits for its moment, or None.
        swaps: how often :meth:`take` changed what acts.
        use_base: act with the base policy until set False.
    """

    acting: Any
    offered: Any

    def __init__(self) -> None:
        self.swaps = 0
        self.offered = None
        self.use_base = False
        self._notices: dict[str, WeightsNotice] = {}

    def has(self, version: int) -> bool:
        """Whether a version has been verified and is ready to act."""
        raise NotImplementedError

    def policy(self, version: int) -> Any:
        """What acts with a version; 0 is the base alone."""
        raise NotImplementedError

    def notice(self, notices: Sequence[WeightsNotice]) -> None:
        """What the learner announced: the promoted version, and perhaps a candidate with its share of episodes."""
        self._notices = {n.which: n for n in notices}

    def take(self, *, candidate_draw: float | None = None) -> bool:
        """Swap to what is offered (True when it happened). One reference; the caller knows that no chunk is being computed.

        Args:
            candidate_draw: in [0, 1) at the start of an episode: a candidate acts where it falls below its share.
        """
        candidate = self._notices.get("candidate")
        if candidate_draw is not None and candidate is not None and candidate_draw < (candidate.share or 0.0):
            return self._swap(candidate.version) if self.has(candidate.version) else False
        promoted = self._notices.get("promoted")
        there = promoted is not None and (promoted.version == 0 or self.has(promoted.version))
        if promoted is not None and there and self._swap(promoted.version):
            self.offered = None
            return True
        offered, self.offered = self.offered, None
        return offered is not None and self._swap(offered.version)

    def _swap(self, version: int) -> bool:
        if version == self.acting.version:
            return False
        self.acting, self.swaps = self.policy(version), self.swaps + 1
        return True
