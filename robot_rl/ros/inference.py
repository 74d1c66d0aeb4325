"""One inference at a time beside the control thread, which never waits longer than it chooses to. No rclpy here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from robot_rl.runtime.acting import DecisionRequest
    from robot_rl.types import Decision

HUNG_S = 1.0
HUNG_FIRST_S = 5.0
HUNG_FACTOR = 5.0


class HostGone(RuntimeError):
    """Whoever was asked for a decision is gone: no chunk will come of it, and the robot holds until there is another host."""


class InferenceWorker:
    """One request at a time, in a thread; the control side never waits longer than it chooses to."""

    def __init__(self, decide: Callable[[DecisionRequest], Decision]) -> None:
        self._decide = decide
        self._request: tuple[int, DecisionRequest] | None = None
        self._result: tuple[int, Decision] | None = None
        self._error: Exception | None = None
        self._wake, self._done, self._stop = threading.Event(), threading.Event(), False
        self.generation = 0
        self.busy = False
        self.latencies: list[float] = []
        self.continuing: list[
            float
        ] = []  # those of the latencies that belong to chunks which continue a running one: they take longer
        self.started = 0.0
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def submit(self, request: DecisionRequest) -> None:
        """Raises RuntimeError while one is being computed."""
        if self.busy:
            raise RuntimeError("submit: a request is in flight")
        self.busy, self._request, self.started = True, (self.generation, request), time.monotonic()
        self._done.clear()
        self._wake.set()

    def poll(self, wait_s: float = 0.0) -> Decision | None:
        """The decision when it is there; waits up to ``wait_s`` for one in flight. Raises what the policy raised."""
        if self.busy and wait_s > 0:
            self._done.wait(wait_s)
        if not self._done.is_set():
            return None
        self._done.clear()
        result, error, self._result, self._error = self._result, self._error, None, None
        self.busy = False
        if error is not None:
            raise error
        if result is None or result[0] != self.generation:
            return None  # it belongs to an episode that is over, or to a chunk that was dropped
        return result[1]

    def forget(self) -> None:
        """What is being computed belongs to the past."""
        self.generation += 1

    def quantile(self, q: float, *, continuing: bool = False) -> float:
        """Seconds that decisions take; 0 before the first one.

        Args:
            continuing: of those that continue a running chunk, once there was one.
        """
        among = self.continuing if continuing and self.continuing else self.latencies
        return float(np.quantile(among[-100:], q)) if among else 0.0

    def expected_s(self) -> float:
        """Seconds until the present inference is done if it takes as long as usual; 0 while nobody knows."""
        return max(0.0, self.quantile(0.5) - (time.monotonic() - self.started)) if self.busy else 0.0

    def hung(self) -> float:
        """Seconds that the present inference has taken, when that is far more than usual; else 0."""
        if not self.busy or self._done.is_set():
            return 0.0
        taken = time.monotonic() - self.started
        limit = max(HUNG_S, HUNG_FACTOR * self.quantile(0.95)) if self.latencies else HUNG_FIRST_S
        return taken if taken > limit else 0.0

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._stop:
                return
            item, self._request = self._request, None
            if item is None:
                continue
            began = time.perf_counter()
            try:
                self._result = (item[0], self._decide(item[1]))
                taken = time.perf_counter() - began  # a host that died says nothing about how long one takes
                for kept in (self.latencies, self.continuing) if item[1].running is not None else (self.latencies,):
                    kept.append(taken)
                    del kept[:-200]
            except HostGone as error:
                self.latencies.clear()
                self.continuing.clear()  # whoever answers next starts cold: its first decision may take as long as any first one
                self._error = error
            except Exception as error:
                self._error = error
            self._done.set()

    def close(self) -> None:
        self._stop = True
        self._wake.set()
        self._thread.join(2.0)
