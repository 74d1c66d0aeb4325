"""How long work says how far it is, without knowing who shows it (a terminal, a log file, a machine, nobody)."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """What training, collection and evaluation report to. ``robot_rl.cli.progress.ProgressDisplay`` shows it."""

    def start(self, stage: str, total: int | None = None) -> None:
        """A new stage of ``total`` units begins (None: unknown); the one before it is finished."""

    def advance(self, n: int = 1) -> None:
        """``n`` more units of the stage are done."""

    def status(
        self,
        *,
        success: float | None = None,
        interval: tuple[float, float] | None = None,
        steps_per_s: float | None = None,
        eta: float | None = None,
        **values: Any,
    ) -> None:
        """What to show beside the bar: success rate and its interval (fractions), speed, seconds left, anything else."""

    def log(self, text: str) -> None:
        """One line that stays."""


class Silent:
    """Reports to nobody."""

    def start(self, stage: str, total: int | None = None) -> None: ...

    def advance(self, n: int = 1) -> None: ...

    def status(self, **values: Any) -> None: ...

    def log(self, text: str) -> None: ...
