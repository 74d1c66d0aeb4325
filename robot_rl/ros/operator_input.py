"""What people's devices say, as the arbiter hears it: whose word counts, and the action they want. No rclpy here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from robot_rl.intervention.arbiter import OperatorArbiter
from robot_rl.intervention.devices import PROFILES, DeviceSample
from robot_rl.runtime.robot_loop import RobotLoop
from robot_rl.wire import OperatorState

S = 1_000_000_000


class OperatorInput:
    """Offers one device's state at a time to an arbiter, with the action that its person gave last.

    Args:
        timeout_s: how old an action may be, asked at every state.
        clock_ns: steady (or simulated) clock.
    """

    def __init__(
        self, loop: RobotLoop, arbiter: OperatorArbiter, timeout_s: Callable[[], float], clock_ns: Callable[[], int]
    ) -> None:
        self._loop, self._arbiter, self._timeout_s, self._clock_ns = loop, arbiter, timeout_s, clock_ns
        self._values: dict[str, tuple[np.ndarray, int]] = {}
        self._device = ""  # the one that took over last

    def on_action(self, channel: str, vector: np.ndarray) -> None:
        """What a person wants of one channel, in its command's units."""
        self._values[channel] = (vector, self._clock_ns())

    def on_states(self, states: Sequence[OperatorState], stamp_ns: int, *, running: bool) -> None:
        """What all devices say at one instant: the one that takes over counts, else the one that drove last, else the first.

        A device that nothing has been heard of since its node started says nothing: taken for "let go", it would turn a button that has
        been held since before the start into a new press.
        """
        states = [s for s in states if s.age_ms is None or s.age_ms >= 0.0]
        if not states:
            return
        taking = next((s for s in states if s.takeover), None)
        known = next((s for s in states if s.device == self._device), states[0])
        chosen = taking or known
        self._device = chosen.device
        self._offer(chosen, stamp_ns, running)

    def _offer(self, state: OperatorState, stamp_ns: int, running: bool) -> None:
        now = self._clock_ns()
        action: np.ndarray | None = None
        if state.engaged and running:
            limit, action = self._timeout_s() * S, self._loop.loop._standstill().astype(np.float64)
            fresh = 0
            for c in self._loop.channels:
                given = self._values.get(c.name)
                if given is None or now - given[1] > limit:
                    continue
                values = c.executed_action(given[0], self._loop._reference(c))
                if values is not None and values.shape == action[c.slice].shape:
                    action[c.slice] = values
                    fresh += 1
            action = action if fresh else None
        profile = PROFILES.get(state.device, PROFILES["joy"])
        # A device that says "not engaged" because nothing comes from it any more is lost, which is no release: the robot holds.
        silent_ns = 0 if state.engaged or state.age_ms is None else max(0, int(state.age_ms * 1e6))
        self._arbiter.offer(
            DeviceSample(
                received_ns=now - silent_ns, stamp_ns=stamp_ns, device=state.device, profile=profile, engaged=state.engaged and state.takeover,
                deadman=state.deadman, action=action, neutral=not state.engaged, operator=state.operator_id,
            )
        )  # fmt: skip
