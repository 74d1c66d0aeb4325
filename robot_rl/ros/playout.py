"""Commands at a fixed rate: a thread with absolute deadlines, and how well it keeps them."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from robot_rl.runtime.priority import REMEDY


class IntervalStatistics:
    """The last commands' intervals against the period they should have."""

    def __init__(self, period_s: float, keep: int = 2000) -> None:
        self.period_s = period_s
        self._jitter: deque[float] = deque(maxlen=keep)
        self._last: float | None = None
        self.misses = 0
        self.count = 0

    def tick(self, now: float) -> None:
        if self._last is not None:
            late = now - self._last - self.period_s
            self._jitter.append(abs(late))
            self.misses += late > self.period_s
        self._last = now
        self.count += 1

    def pause(self) -> None:
        """The next interval is none (an episode begins)."""
        self._last = None

    def p99_ms(self) -> float:
        return float(np.quantile(list(self._jitter), 0.99)) * 1e3 if self._jitter else 0.0

    def hz(self) -> float:
        return 1.0 / self.period_s


class Playout:
    """Calls ``tick`` every ``period_s`` on the steady clock. Late by more than a period: it skips, and never calls twice at once.

    Args:
        prepare: called ``lead_s`` before each deadline. What takes a while and not always as long (to observe, to decide) is done
            here, so that ``tick`` sends its result on time.
        rt_priority: SCHED_FIFO for this thread alone, where the machine grants it.
    """

    def __init__(
        self,
        period_s: float,
        tick: Callable[[], None],
        *,
        prepare: Callable[[], None] = lambda: None,
        lead_s: float = 0.0,
        rt_priority: int = 0,
    ) -> None:
        self.period_s, self._tick, self._rt = period_s, tick, rt_priority
        self._prepare, self._lead = prepare, lead_s
        self._stop = threading.Event()
        self._deadline = time.monotonic()
        self._realign: float | None = None
        self.skipped = 0
        self.granted = "normal priority"
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="play-out", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def deadline(self) -> float:
        """When the tick that is being prepared is due (steady seconds)."""
        return self._deadline

    @property
    def realigning(self) -> bool:
        """Deadlines are about to move: the next tick but one would come late after what is done in the next one."""
        return self._realign is not None

    def realign(self, at: float) -> None:
        """Let deadlines fall on ``at`` (steady seconds) and whole periods before and after it; the next one comes up to a period later."""
        self._realign = at

    def _run(self) -> None:
        if self._rt > 0:
            try:
                os.sched_setscheduler(threading.get_native_id(), os.SCHED_FIFO, os.sched_param(self._rt))
                self.granted = f"SCHED_FIFO {self._rt}"
            except (PermissionError, AttributeError):
                self.granted = f"normal priority (SCHED_FIFO was refused: {REMEDY})"
        self._deadline = time.monotonic()
        while not self._stop.is_set():
            if (at := self._realign) is not None:
                self._realign = None
                self._deadline = at + np.ceil((self._deadline - at) / self.period_s) * self.period_s
            self._deadline += self.period_s
            wait = self._deadline - time.monotonic()
            if wait < -self.period_s:
                missed = int(-wait // self.period_s)
                self.skipped += missed
                self._deadline += missed * self.period_s
                wait = self._deadline - time.monotonic()
            if wait > self._lead:
                time.sleep(wait - self._lead)
            if self._stop.is_set():
                return
            try:
                self._prepare()
                if (wait := self._deadline - time.monotonic()) > 0:
                    time.sleep(wait)
                self._tick()
            except BaseException as error:
                self.error = error
                return

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(1.0)
