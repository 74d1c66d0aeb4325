"""When the policy is asked for the next chunk, how that goes on from the running one, and how long a control step waits. No rclpy here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from robot_rl.ros.inference import HostGone, InferenceWorker
from robot_rl.runtime.control_loop import ControlLoop

if TYPE_CHECKING:
    from robot_rl.ros.hosting import PolicyHost
    from robot_rl.ros.process_host import ProcessHost
    from robot_rl.types import Decision

RTC_AGAIN_S = 60.0
"""After so long, real-time chunking is tried again where it took too long."""


class Values(Protocol):
    """Parameters as they are now."""

    def __getitem__(self, name: str) -> Any: ...


def refusal(host: PolicyHost | ProcessHost | None, changes: Mapping[str, Any]) -> str:
    """Why parameters of policy_node cannot take these values with this policy; nothing where they can."""
    horizon = 256 if host is None else host.spec.horizon
    if changes.get("n_action_steps", 0) > horizon:
        return f"n_action_steps={changes['n_action_steps']}: the policy's chunks have {horizon} rows"
    reason = "policy is none" if host is None else host.cannot_continue
    if changes.get("blend") == "rtc" and reason:
        return f"blend='rtc': {reason}; accepted are auto, linear, none"
    if changes.get("pin_version", -1) >= 0 and host is not None:
        try:
            host.check_pin(changes["pin_version"])
        except ValueError as error:
            return f"pin_version={changes['pin_version']}: {error}"
    return ""


class Deciding:
    """The policy's side of a control step: one question in flight, asked early enough for 95 % of the answers.

    Args:
        values: ``n_action_steps``, ``blend``, ``blend_steps``, ``replan_margin``, ``swap_at``, read at every step.
        control_s: a control step. grace_s: what it may wait for a chunk when it has none.
        waits: simulated time waits for nobody's processor, so decisions take no control steps there.
        warn: (key, text), said every few seconds at most.

    Attributes:
        undecided: why there is no decision, while a policy server or the inference process is away.
    """

    def __init__(
        self, host: PolicyHost | ProcessHost, loop: ControlLoop, values: Values, *, control_s: float, grace_s: float,
        waits: bool = False, warn: Callable[[str, str], None],
    ) -> None:  # fmt: skip
        self.host, self.loop, self.values, self._warn = host, loop, values, warn
        self._control_s, self._grace_s, self._waits = control_s, grace_s, waits
        self.worker = InferenceWorker(host.decide)
        self.undecided = ""
        self._slow_since: float | None = None  # steady seconds: continuing a chunk has taken too long since then

    def close(self) -> None:
        self.worker.close()

    @property
    def joining(self) -> str:
        """How chunks are joined: ``rtc``, ``linear`` or ``none``."""
        wanted = str(self.values["blend"])
        return wanted if wanted != "auto" else "linear" if self.host.cannot_continue else "rtc"

    def tune(self) -> None:
        """What may change at run time, from the next chunk on."""
        scheduler = self.loop.scheduler
        scheduler.n_action_steps = self.values["n_action_steps"] or self.host.spec.n_action_steps
        scheduler.blend_steps = 0 if self.joining == "none" else self.values["blend_steps"]

    def step(self, *, asks: bool, swaps: bool, time_left: Callable[[], float]) -> tuple[list[Decision], bool]:
        """Take what has been decided, ask for the next chunk when it is time, and wait for it where there is nothing to run.

        Args:
            asks: observations are fresh, and nobody holds the robot.
            swaps: a new version may begin to act now.
            time_left: seconds that this control step may wait at most.

        Returns: the decisions that came, and whether another version acts from now on.
        """
        self.tune()
        scheduler, swapped = self.loop.scheduler, False
        latency_rows, continues = self._latency_rows()
        scheduler.replan_margin = latency_rows + self.values["replan_margin"]
        came = [self._take()]
        if asks and self.loop.wants_chunk and not self.worker.busy and self.host.ready:
            swapped = swaps and self.values["swap_at"] == "chunk" and self.host.take()
            self.worker.submit(self.loop.request(latency_rows if continues else None))
        if scheduler.rows_left(self.loop.step) == 0 and self.worker.busy:
            # The first command of an episode may wait for its chunk, when that is about to come. Later ones leave on time, with a
            # hold when there is none.
            near = self._waits or self.worker.expected_s() <= self._grace_s
            came.append(self._take(self._grace_s if self.loop.step == 0 and near else min(self._grace_s, time_left())))
        return [d for d in came if d is not None], swapped

    def _latency_rows(self) -> tuple[int, bool]:
        """Control steps that 95 % of the decisions take at most, and whether the next one is to continue the running chunk.

        That takes longer. Where no chunk has rows for so long, chunks are joined linearly for a while.
        """
        if self.joining != "rtc":
            return self._rows(), False
        needed, most = self._rows(continuing=True), self.loop.scheduler.n_action_steps
        if needed < most:
            self._slow_since = None
            return needed, needed <= self.loop.scheduler.rows_left(self.loop.step)
        self._warn(
            "rtc",
            f"decisions that continue a chunk take {needed} control steps (95 %), and chunks have {most} rows: they are joined linearly",
        )
        self._slow_since = self._slow_since or time.monotonic()
        if time.monotonic() - self._slow_since > RTC_AGAIN_S:
            self.worker.continuing.clear()
        return self._rows(), False

    def _rows(self, continuing: bool = False) -> int:
        p95 = 0.0 if self._waits else self.worker.quantile(0.95, continuing=continuing)
        return int(np.ceil(max(0.0, p95 - self._grace_s) / self._control_s))

    def _take(self, wait_s: float = 0.0) -> Decision | None:
        """A finished decision. Nothing where the inference process died over it: what is scheduled runs out, then the robot holds."""
        try:
            decision = self.worker.poll(wait_s)
        except HostGone as error:
            self.undecided = str(error)
            self._warn("host gone", f"no decision: {error}")
            return None
        if decision is not None:
            self.undecided = ""
            self.loop.accept(decision)
        return decision
