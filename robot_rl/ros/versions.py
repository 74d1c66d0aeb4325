"""Which version acts: the rule of taking what the learner announced, the same wherever inference runs. Neither rclpy nor torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
        pinned: the only version that may act from the next :meth:`take` on (0: the base); None: what the learner announces.
    """

    acting: Any
    offered: Any

    def __init__(self) -> None:
        self.swaps = 0
        self.offered = None
        self.use_base = False
        self.pinned: int | None = None
        self._before_pin = 0
        self._notices: dict[str, WeightsNotice] = {}

    @property
    def versions(self) -> Collection[int]:
        """Versions of the head that are ready to act."""
        raise NotImplementedError

    def has(self, version: int) -> bool:
        """Whether a version can act: it has been verified and is ready, or it is the base."""
        return version == 0 or version in self.versions

    @property
    def deciding(self) -> int:
        """The version whose actions are taken: what acts, or 0 while the base stands in for it."""
        return 0 if self.use_base else int(self.acting.version)

    def policy(self, version: int) -> Any:
        """What acts with a version; 0 is the base alone."""
        raise NotImplementedError

    def notice(self, notices: Sequence[WeightsNotice]) -> None:
        """What the learner announced: the promoted version, and perhaps a candidate with its share of episodes."""
        self._notices = {n.which: n for n in notices}

    def want(self, version: int) -> None:
        """See to it that a version becomes ready, if it can be found, and stays so until another one is wanted. Returns at once."""
        raise NotImplementedError

    def check_pin(self, version: int) -> None:
        """Raises ValueError where a version cannot be pinned now; it is looked for all the same, so that it may be possible soon."""
        if version:
            self.want(version)
        if not self.has(version):
            raise ValueError(
                f"version {version} is not ready here (not found, refused, or still on its way): accepted are "
                f"{', '.join(map(str, sorted({0, *self.versions})))}, or -1 for what the learner announces"
            )

    def pin(self, version: int | None) -> None:
        """Let only this version act from the next :meth:`take` on; None: what the learner announces acts again.

        Raises:
            ValueError: the version is not ready. Nothing changes then.
        """
        if version == self.pinned:
            return
        if version is not None:
            self.check_pin(version)
        if self.pinned is None:
            self._before_pin = self.acting.version
        elif version is None and not self._notices and self.offered is None and self.has(self._before_pin):
            self.offered = self.policy(self._before_pin)  # nobody announces anything: back to what acted before
        self.pinned = version

    def take(self, *, candidate_draw: float | None = None) -> bool:
        """Swap to what is offered (True when it happened). One reference; the caller knows that no chunk is being computed.

        Args:
            candidate_draw: in [0, 1) at the start of an episode: a candidate acts where it falls below its share.

        Raises:
            ValueError: a version is pinned that is not ready any more; another one must not act in its place.
        """
        if self.pinned is not None:
            self.check_pin(self.pinned)
            return self._swap(self.pinned)
        candidate = self._notices.get("candidate")
        if candidate_draw is not None and candidate is not None and candidate_draw < (candidate.share or 0.0):
            return self._swap(candidate.version) if self.has(candidate.version) else False
        promoted = self._notices.get("promoted")
        if promoted is not None and self.has(promoted.version) and self._swap(promoted.version):
            self.offered = None
            return True
        offered, self.offered = self.offered, None
        return offered is not None and self._swap(offered.version)

    def _swap(self, version: int) -> bool:
        if version == self.acting.version:
            return False
        self.acting, self.swaps = self.policy(version), self.swaps + 1
        return True
