"""Progress on a terminal (rich), in a log file (a line every few seconds) or for machines (JSON lines)."""

from __future__ import annotations

import json
import math
import sys
import time
from types import TracebackType
from typing import Any, Literal, TextIO

Mode = Literal["auto", "rich", "plain", "json", "silent"]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def duration(seconds: float) -> str:
    """``75`` to ``1:15``, ``4000`` to ``1:06:40``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressDisplay:
    """A :class:`robot_rl.progress.Progress` for people and machines. Use as a context manager.

    Args:
        mode: ``auto`` is ``rich`` on a terminal and ``plain`` elsewhere.
        stream: standard error (standard output for ``json``) unless given.
        every: seconds between two lines of ``plain`` and ``json``.
    """

    def __init__(self, mode: Mode = "auto", stream: TextIO | None = None, every: float = 5.0) -> None:
        self.stream = stream or (sys.stdout if mode == "json" else sys.stderr)
        if mode == "auto":
            mode = "rich" if self.stream.isatty() else "plain"
        self.mode: Mode = mode
        self.every = every
        self.stage = ""
        self.total: int | None = None
        self.done = 0
        self.values: dict[str, Any] = {}
        self._began = self._shown = time.monotonic()
        self._live: Any = None
        self._bar: Any = None
        self._task: Any = None

    # ------------------------------------------------------------------------------------------------ what work calls

    def start(self, stage: str, total: int | None = None) -> None:
        self.finish()
        self.stage, self.total, self.done, self.values = stage, total, 0, {}
        self._began = self._shown = time.monotonic()
        if self.mode == "rich":
            self._start_live()
        elif self.mode == "plain":
            self._write(f"{stage}: started" + (f" ({total:,})" if total else ""))
        elif self.mode == "json":
            self.event("start", stage=stage, total=total)

    def advance(self, n: int = 1) -> None:
        self.done += n
        self._show()

    def status(
        self,
        *,
        success: float | None = None,
        interval: tuple[float, float] | None = None,
        steps_per_s: float | None = None,
        eta: float | None = None,
        **values: Any,
    ) -> None:
        known = {"success": success, "interval": interval, "steps_per_s": steps_per_s, "eta": eta}
        self.values.update({k: v for k, v in {**known, **values}.items() if v is not None})
        self._show()

    def log(self, text: str) -> None:
        if self.mode == "rich" and self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        elif self.mode == "json":
            self.event("log", text=text)
        elif self.mode != "silent":
            self._write(text)

    # ------------------------------------------------------------------------------------------------------- lifetime

    def finish(self) -> None:
        """End the stage; its last state stays on the screen."""
        if not self.stage:
            return
        stage, seconds = self.stage, time.monotonic() - self._began
        if self._live is not None:
            self._refresh()
            self._live.stop()
            self._live = None
        elif self.mode == "plain":
            self._write(f"{stage}: {self._line()}; took {duration(seconds)}")
        elif self.mode == "json":
            self.event("finish", stage=stage, done=self.done, total=self.total, seconds=round(seconds, 3), **self.values)
        self.stage = ""

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish()

    def event(self, event: str, **values: Any) -> None:
        """One JSON line; numbers that are not finite become null."""
        self._write(json.dumps(finite({"event": event, **values}), default=str))

    # -------------------------------------------------------------------------------------------------------- showing

    def eta(self) -> float | None:
        """Seconds left: what was reported, else from the mean speed of this stage."""
        if "eta" in self.values:
            return float(self.values["eta"])
        elapsed = time.monotonic() - self._began
        if self.total and 0 < self.done < self.total and elapsed > 1:
            return elapsed / self.done * (self.total - self.done)
        return None

    def describe(self) -> str:
        """``success 87.0 % [82.1, 90.8], 1,234 steps/s, base 0.41``."""
        parts = []
        for name, value in self.values.items():
            if name == "success":
                low, high = self.values.get("interval", (None, None))
                band = f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None else ""
                parts.append(f"success {percent(value)}{band}")
            elif name == "steps_per_s":
                parts.append(f"{value:,.0f} steps/s")
            elif name == "driven":
                parts.append(f"driven by a person {percent(value)}")
            elif name not in ("interval", "eta"):
                parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        return ", ".join(parts)

    def _line(self) -> str:
        share = f" of {self.total:,} ({100 * self.done / self.total:.0f} %)" if self.total else ""
        eta = self.eta()
        left = f"{duration(eta)} left" if eta is not None else ""
        return ", ".join(p for p in (f"{self.done:,}{share}", self.describe(), left) if p)

    def _show(self) -> None:
        now = time.monotonic()
        if not self.stage or now - self._shown < (0.1 if self.mode == "rich" else self.every):
            return
        self._shown = now
        if self._live is not None:
            self._refresh()
        elif self.mode == "plain":
            self._write(f"{self.stage}: {self._line()}")
        elif self.mode == "json":
            values = {**self.values, "eta": self.eta()}
            self.event("progress", stage=self.stage, done=self.done, total=self.total, **values)

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._task = self._bar.add_task(self.stage, total=self.total, count="", left="")
        self._live = Live(console=Console(file=self.stream), refresh_per_second=8, transient=False)
        self._refresh()
        self._live.start()

    def _refresh(self) -> None:
        from rich.console import Group
        from rich.text import Text

        eta = self.eta()
        count = f"{self.done:,}" + (f"/{self.total:,}" if self.total else "")
        left = f"{duration(eta)} left" if eta is not None else ""
        self._bar.update(self._task, completed=self.done, count=count, left=left)
        text = self.describe()
        self._live.update(Group(self._bar, Text("  " + text, style="cyan")) if text else self._bar)

    def _write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if hasattr(value, "item") and not hasattr(value, "__len__"):
        value = value.item()  # a numpy or torch scalar
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
