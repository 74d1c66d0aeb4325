"""How long the host of a virtual machine keeps its processors from it: beside a figure of timing, it says whose time was measured."""

from __future__ import annotations

import os
import threading
import time


class Stolen:
    """Steal time of ``/proc/stat``, sampled all the time by a thread of its own."""

    PERIOD_S = 0.1

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        threading.Thread(target=self._sample, name="steal", daemon=True).start()

    def _sample(self) -> None:
        while True:
            with open("/proc/stat") as file:
                ticks = int(file.readline().split()[8])
            self._samples.append((time.monotonic(), 1e3 * ticks / os.sysconf("SC_CLK_TCK")))
            time.sleep(self.PERIOD_S)

    def worst_ms(self, since: float) -> float:
        """The most within any second since then (``time.monotonic``), all processors together."""
        taken = [s for s in self._samples if s[0] >= since - 1.0]
        return max((b[1] - next(a[1] for a in taken if a[0] >= b[0] - 1.0) for b in taken), default=0.0)

    def report(self, since: float) -> dict[str, float]:
        """Milliseconds since then, all processors together: stolen a second on average, and in the worst second."""
        taken = [s for s in self._samples if s[0] >= since]
        if len(taken) < 2:
            return {"mean_ms_per_s": 0.0, "worst_ms_per_s": 0.0}
        (began, first), (ended, last) = taken[0], taken[-1]
        return {"mean_ms_per_s": round((last - first) / (ended - began), 1), "worst_ms_per_s": round(self.worst_ms(since), 1)}
