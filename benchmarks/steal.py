"""What the host of a virtual machine takes from a measurement."""

from __future__ import annotations

import os
import threading
import time


class Stolen:
    """How long the host of a virtual machine kept its processors from it (steal time of ``/proc/stat``), sampled all the time."""

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
        """The most within any second since then, all processors together."""
        taken = [s for s in self._samples if s[0] >= since - 1.0]
        return max((b[1] - next(a[1] for a in taken if a[0] >= b[0] - 1.0) for b in taken), default=0.0)
