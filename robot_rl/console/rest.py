"""When a person at the controls should rest: attention falls long before anybody notices."""

from __future__ import annotations

from dataclasses import dataclass

WORK_S, BREAK_S = 1800.0, 300.0


@dataclass
class RestClock:
    """Counts how long the same person has been at the controls; a pause of ``break_s`` begins the count anew, a shorter one does not.

    Attributes:
        work_s: active control until a rest is due (rule 11 of the interventions: half an hour).
    """

    work_s: float = WORK_S
    break_s: float = BREAK_S

    def __post_init__(self) -> None:
        self._who, self._worked, self._last, self._here = "", 0.0, 0.0, False

    def look(self, who: str, now: float) -> int:
        """Minutes of work once a rest is due, else 0. ``who`` is at the controls (empty: nobody); ``now`` in seconds, steady."""
        if who:
            passed = now - self._last
            if who != self._who or passed > self.break_s:
                self._who, self._worked = who, 0.0
            elif self._here:
                self._worked += passed
            self._last = now
        self._here = bool(who)
        return max(1, int(self._worked / 60.0)) if who and self._worked >= self.work_s else 0
