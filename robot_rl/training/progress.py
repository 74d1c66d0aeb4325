"""What a run tells the person (or program) in front of it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Implemented by the command line's display; a run works the same without anybody watching."""

    def start(self, stage: str, total: int | None = None) -> None:
        """A new stage with ``total`` units of work (None: unknown)."""

    def advance(self, n: int = 1) -> None: ...

    def status(
        self,
        *,
        success: float | None = None,
        interval: tuple[float, float] | None = None,
        steps_per_s: float | None = None,
        eta: float | None = None,
    ) -> None: ...

    def log(self, text: str) -> None: ...


class Silent:
    """Nobody watches."""

    def start(self, stage: str, total: int | None = None) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        pass

    def status(
        self,
        *,
        success: float | None = None,
        interval: tuple[float, float] | None = None,
        steps_per_s: float | None = None,
        eta: float | None = None,
    ) -> None:
        pass

    def log(self, text: str) -> None:
        pass
