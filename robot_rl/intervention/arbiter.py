"""``OperatorArbiter``: who drives, tick by tick (rewards and interventions specification, section 4).

Devices offer samples and post events from their own threads; the control loop consumes them once a tick. The arbiter never
waits, never sends a person's command twice, and never lets a chunk run that was computed before a hand-back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from robot_rl.intervention.arbitration import Arbitration, Situation
from robot_rl.intervention.blending import Rotation, blend, min_jerk
from robot_rl.intervention.devices import DeviceSample
from robot_rl.intervention.states import Event, State, next_state
from robot_rl.types import ActionSpec, Observation, Source

Position = Callable[[Observation], np.ndarray | None]


class Request(str, Enum):
    """What a person or a program may ask for beside moving a device."""

    HELP = "help"
    CANCEL = "cancel"  # of a request; also the only way out of a lost take-over but a new press
    RELEASE = "release"  # at once, without a latch
    ESTOP = "estop"
    RESET = "reset"


@dataclass(frozen=True)
class ArbiterConfig:
    """Rules and defaults of section 4.2.

    Attributes:
        handback_s: length of the blend back to the policy.
        gap: largest distance (rad, m) of an absolute device from the robot at which it may take over.
        request_timeout_s: an unanswered request is dropped after this.
        hold_on_request: hold the robot while help is requested.
        auto_resume: after the device was lost, a fresh release hands back; otherwise a new press or a cancel is needed.
        estop_min_s: a stop lasts at least this long.
        blend_velocity: (A,) units per second; how fast absolute dimensions may move while blending.
        rotations: dimensions that are orientations.
    """

    handback_s: float = 0.4
    gap: float = 0.15
    request_timeout_s: float = 10.0
    hold_on_request: bool = False
    auto_resume: bool = False
    estop_min_s: float = 1.0
    blend_velocity: tuple[float, ...] | None = None
    rotations: tuple[Rotation, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("handback_s", 0.0, 2.0),
            ("gap", 0.0, 1.0),
            ("request_timeout_s", 0.1, 600.0),
            ("estop_min_s", 0.0, 60.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"ArbiterConfig.{name}={value}: accepted are numbers from {low} to {high}")


@dataclass
class Intervention:
    """One take-over, for the episode's record. Steps are control steps; -1 while it lasts. Times in nanoseconds."""

    id: int
    device: str
    operator: str
    mode: str
    request_ns: int
    device_stamp_ns: int
    start_ns: int
    first_step: int
    last_step: int = -1
    holds: int = 0  # ticks without usable input
    end: str = ""  # released, cancelled, estop, episode


@dataclass
class Counts:
    """Of the running episode."""

    ignored: int = 0
    refused: int = 0
    lost: int = 0
    invalid: int = 0
    estops: int = 0
    ignored_events: dict[str, int] = field(default_factory=dict)


class OperatorArbiter:
    """Decides between the policy and one person.

    Args:
        position: (A,) where the robot is, in the action's units, from an observation; needed by absolute devices (alignment,
            hand-back). Without it the last executed command stands for it.

    Attributes:
        state: a :class:`State`.
        end_requested: why the episode must end (``estop``), or empty.
        gap: last measured distance of an absolute device, NaN when there was none.
    """

    def __init__(self, action: ActionSpec, config: ArbiterConfig | None = None, *, position: Position | None = None) -> None:
        self.action, self.config = action, config or ArbiterConfig()
        self._position = position
        self._newest = action.gripper_mask
        self._absolute = ~action.delta_mask
        self._aligned_dims = self._absolute & ~action.gripper_mask
        limit = self.config.blend_velocity
        if limit is not None and len(limit) != action.dim:
            raise ValueError(f"blend_velocity has {len(limit)} entries; accepted is one for each of {action.dim} dimensions")
        self._velocity = None if limit is None else np.asarray(limit, np.float64)
        self._guard = threading.Lock()
        self._sample: DeviceSample | None = None
        self._requests: list[tuple[Request, int]] = []
        self._next_id = 0
        self.state = State.AUTONOMOUS
        self.changed_ns = 0
        self.begin()

    # ---- from devices, any thread

    def offer(self, sample: DeviceSample) -> None:
        """The newest reading of the device in charge.

        Raises:
            ValueError: its action does not fit the robot.
        """
        if sample.action is not None and np.shape(sample.action) != (self.action.dim,):
            raise ValueError(
                f"{sample.device}: action has shape {np.shape(sample.action)}, accepted is ({self.action.dim},) "
                f"for {', '.join(self.action.names)}"
            )
        with self._guard:
            self._sample = sample

    def post(self, request: Request, now_ns: int = 0) -> None:
        """Ask for something; it is heard in the next tick."""
        with self._guard:
            self._requests.append((Request(request), now_ns))

    # ---- the loop

    def begin(self) -> None:
        """An episode starts: autonomous, unless the emergency stop is latched. A button that is still held engages again."""
        self.counts = Counts()
        self.interventions: list[Intervention] = []
        self.end_requested = "estop" if self.state is State.ESTOP else ""
        if self.state is not State.ESTOP:
            self.state = State.AUTONOMOUS
        self.gap = float("nan")
        self._current: Intervention | None = None
        self._armed = True  # the next press counts
        self._lost = False
        self._held = False  # a request during which the robot is held
        self._request_ns = 0
        self._request_expires = True
        self._active_ns = 0  # the last usable input
        self._driven: np.ndarray | None = None  # the last command of the person
        self._blend_from: np.ndarray | None = None
        self._blend_since = 0
        self._blending_to_policy = False
        self._last: np.ndarray | None = None
        self._last_ns = 0
        self._offset: np.ndarray | None = None

    def arbitrate(self, now_ns: int, wish: np.ndarray, observation: Observation, situation: Situation) -> Arbitration:
        """One tick; see :class:`Arbitration`. Costs microseconds."""
        with self._guard:
            requests, self._requests = self._requests, []
            sample = self._sample
        before = self.state
        live = sample if sample is not None and sample.fresh(now_ns) else None
        for request, at in requests:
            self._hear(request, at or now_ns, now_ns, live, sample, situation)
        self._look(now_ns, live, observation, situation)
        drop = self.state is not before and self.state in (State.HUMAN, State.HANDBACK, State.ESTOP)
        if self.state is State.HANDBACK and (drop or self._blend_from is None):
            self._start_blend(now_ns, observation, situation)
        choice = self._choose(now_ns, wish, live, situation, fresh=situation.fresh and not drop, dropped=drop)
        self._last, self._last_ns = choice.command, now_ns
        return choice

    def report(self) -> dict[str, Any]:
        """What ``EpisodeMeta.extra`` keeps: every take-over, and what was ignored, refused and lost."""
        self._finish_current("episode", -1)
        if not self.interventions and not any(v for v in asdict(self.counts).values()):
            return {}
        return {"interventions": [asdict(i) for i in self.interventions], "arbiter": asdict(self.counts)}

    # ---- what happens

    def _raise(self, event: Event, now_ns: int) -> bool:
        """Take a transition, or count that there is none."""
        target = next_state(self.state, event)
        if target is None:
            self.counts.ignored += 1
            key = f"{self.state.value}:{event.value}"
            self.counts.ignored_events[key] = self.counts.ignored_events.get(key, 0) + 1
            return False
        if target is not self.state:
            self.state, self.changed_ns = target, now_ns
            if target is not State.HANDBACK:
                self._blend_from = None
        return True

    def _hear(
        self, request: Request, at: int, now: int, live: DeviceSample | None, known: DeviceSample | None, situation: Situation
    ) -> None:
        if request is Request.ESTOP:
            self._finish_current("estop", situation.step)
            self._raise(Event.ESTOP, now)
            self.changed_ns = now
            self.counts.estops += 1
            self.end_requested, self._armed, self._lost = "estop", False, False
        elif request is Request.RESET:
            neutral = known is None or (live is not None and live.neutral and not live.engaged)
            waited = now - self.changed_ns > int(self.config.estop_min_s * 1e9)
            if self.state is State.ESTOP and not (neutral and waited):
                self.counts.refused += 1
            elif self._raise(Event.RESET, now):
                self.end_requested = ""
                self._ask(now, held=True, expires=False)
        elif request is Request.HELP:
            if self._raise(Event.HELP, now):
                self._ask(at, held=self.config.hold_on_request)
        elif request is Request.RELEASE or (request is Request.CANCEL and self.state is State.HUMAN):
            if self._raise(Event.RELEASED, now):
                self._finish_current("released" if request is Request.RELEASE else "cancelled", situation.step)
                self._armed = self._lost = False  # a button that is still down must be let go first
        elif self._raise(Event.CANCEL_HELD if self._held else Event.CANCEL, now):
            self._armed = False

    def _ask(self, at: int, *, held: bool, expires: bool = True) -> None:
        self._request_ns, self._held, self._request_expires = at, held, expires

    def _look(self, now: int, live: DeviceSample | None, observation: Observation, situation: Situation) -> None:
        """What the device's sample means in the present state."""
        if live is not None and not live.engaged:
            self._armed = True
        press = live is not None and live.wants and self._armed
        if self.state is State.ESTOP:
            return
        if self.state in (State.AUTONOMOUS, State.HANDBACK) and press:
            assert live is not None
            if live.profile.mode == "rate":
                self._raise(Event.ENGAGE, now)
                self._take_over(now, now, live, situation)
            elif self.state is State.AUTONOMOUS:
                self._raise(Event.ENGAGE_ABSOLUTE, now)
                self._ask(now, held=True)
            elif self._aligned(live, observation, situation):
                self._raise(Event.ENGAGE, now)
                self._take_over(now, now, live, situation)
            else:
                self.counts.refused += 1
                self._armed = False
        if self.state is State.REQUESTED:
            self._look_requested(now, live, press, observation, situation)
        elif self.state is State.HUMAN:
            self._look_human(now, live, situation)

    def _look_requested(
        self, now: int, live: DeviceSample | None, press: bool, observation: Observation, situation: Situation
    ) -> None:
        if live is not None and press:
            if live.profile.mode == "rate":
                self._raise(Event.ENGAGE, now)
                self._take_over(self._request_ns, now, live, situation)
                return
            if not self._held:  # a help request that is being answered
                self._held, self._request_expires, self._request_ns = True, True, now
            if self._aligned(live, observation, situation):
                self._raise(Event.ALIGNED, now)
                self._take_over(self._request_ns, now, live, situation)
                return
        if self._request_expires and now - self._request_ns > int(self.config.request_timeout_s * 1e9):
            self.counts.refused += 1
            self._armed = False
            self._raise(Event.CANCEL_HELD if self._held else Event.CANCEL, now)

    def _look_human(self, now: int, live: DeviceSample | None, situation: Situation) -> None:
        if live is None:
            if not self._lost:
                self._lost, self._armed = True, False
                self.counts.lost += 1
            return
        if self._lost:
            if live.wants and self._armed:
                self._finish_current("lost", situation.step)
                self._take_over(now, now, live, situation)
            elif not live.engaged and self.config.auto_resume:
                self._lost = False
                self._raise(Event.RELEASED, now)
                self._finish_current("lost", situation.step)
            return
        if live.wants:
            self._armed = False
            self._active_ns = now
        elif now - self._active_ns >= int(live.profile.latch_s * 1e9) or (live.profile.deadman and not live.deadman):
            self._raise(Event.RELEASED, now)
            self._finish_current("released", situation.step)

    def _aligned(self, live: DeviceSample, observation: Observation, situation: Situation) -> bool:
        if live.profile.clutch:
            return live.action is not None
        if live.action is None:
            return False
        distance = np.abs(np.asarray(live.action, np.float64) - self._where(observation, situation))[self._aligned_dims]
        self.gap = float(distance.max()) if distance.size else 0.0
        return self.gap <= self.config.gap  # NaN is not

    def _where(self, observation: Observation, situation: Situation) -> np.ndarray:
        measured = None if self._position is None else self._position(observation)
        return situation.standstill if measured is None else np.where(self._absolute, measured, situation.standstill)

    def _take_over(self, requested: int, now: int, live: DeviceSample, situation: Situation) -> None:
        self._armed, self._lost, self._held, self._active_ns = False, False, False, now
        self._driven = self._offset = None
        if live.profile.clutch and live.action is not None:
            gap = situation.standstill - np.asarray(live.action)
            self._offset = np.where(self._aligned_dims, gap, 0.0)
        self._current = Intervention(
            self._next_id, live.device, live.operator, live.profile.mode, requested, live.stamp_ns, now, situation.step
        )
        self.interventions.append(self._current)
        self._next_id += 1

    def _finish_current(self, why: str, step: int) -> None:
        if self._current is not None:
            self._current.end, self._current.last_step = why, step
            self._current = None

    # ---- what is executed

    def _start_blend(self, now: int, observation: Observation, situation: Situation) -> None:
        """u_0 is the last command of a rate device, the measured position of an absolute one."""
        last = self.interventions[-1] if self.interventions else None
        start = situation.standstill
        if self._driven is not None and last is not None:
            rate = last.mode == "rate"
            start = np.where(self._newest, self._driven, self._driven if rate else self._where(observation, situation))
        self._blend_from, self._blend_since, self._blending_to_policy = np.asarray(start, np.float32), now, False
        self._driven = None

    def _choose(
        self, now: int, wish: np.ndarray, live: DeviceSample | None, situation: Situation, *, fresh: bool, dropped: bool
    ) -> Arbitration:
        hold = situation.standstill
        identity = self._current.id if self._current is not None else -1
        if self.state is State.HUMAN:
            return self._drive(live, hold, identity, dropped)
        if self.state is State.HANDBACK:
            return self._hand_back(now, wish, hold, fresh, dropped)
        if self.state is State.ESTOP or (self.state is State.REQUESTED and self._held):
            return Arbitration(hold, Source.HOLD, drop_chunk=dropped)
        return Arbitration(wish, Source.POLICY, drop_chunk=dropped)

    def _drive(self, live: DeviceSample | None, hold: np.ndarray, identity: int, dropped: bool) -> Arbitration:
        assert self._current is not None
        if live is None or self._lost:
            self._current.holds += 1
            self._driven = None
            return Arbitration(hold, Source.HOLD, intervention_id=identity, drop_chunk=dropped)
        if not live.wants:
            return Arbitration(hold, Source.LATCHED, intervention_id=identity, drop_chunk=dropped)
        if live.action is None or not np.isfinite(live.action).all():
            self.counts.invalid += 1
            self._current.holds += 1
            return Arbitration(hold, Source.HOLD, intervention_id=identity, drop_chunk=dropped)
        wanted = np.asarray(live.action, np.float32)
        command = wanted if self._offset is None else (wanted + self._offset).astype(np.float32)
        self._driven = command
        return Arbitration(
            command, Source.HUMAN, human=command, intervention_id=identity, drop_chunk=dropped,
            operator_stamp_ns=live.received_ns,
        )  # fmt: skip

    def _hand_back(self, now: int, wish: np.ndarray, hold: np.ndarray, fresh: bool, dropped: bool) -> Arbitration:
        """Blend towards rest until a fresh chunk is there, then from wherever that led to the policy."""
        assert self._blend_from is not None
        if fresh and not self._blending_to_policy:
            start = self._blend_from if self._last is None or dropped else self._last
            self._blend_from, self._blend_since, self._blending_to_policy = start, now, True
        elif not fresh and self._blending_to_policy:  # the chunk ran out: rest, and begin again with the next one
            self._blend_from, self._blend_since, self._blending_to_policy = hold, now - int(self.config.handback_s * 1e9), False
        length = self.config.handback_s * 1e9
        x = 1.0 if length <= 0.0 else (now - self._blend_since) / length
        if x >= 1.0:
            if not fresh:
                return Arbitration(hold, Source.HOLD, drop_chunk=dropped)
            if self._near(wish, now):
                self._raise(Event.BLENDED, now)
                return Arbitration(wish, Source.POLICY, drop_chunk=dropped)
        mixed = blend(self._blend_from, wish if fresh else hold, min_jerk(x), self._newest, self.config.rotations)
        return Arbitration(self._limited(mixed, now), Source.BLEND, drop_chunk=dropped)

    def _reach(self, now: int) -> np.ndarray | None:
        if self._velocity is None or self._last is None or now <= self._last_ns:
            return None
        return np.where(self._absolute & ~self._newest, self._velocity * (now - self._last_ns) / 1e9, np.inf)

    def _near(self, wish: np.ndarray, now: int) -> bool:
        """Whether the policy's command can be reached in this tick; until then the blend goes on at its limit."""
        reach = self._reach(now)
        return reach is None or bool((np.abs(wish - self._last) <= reach * (1 + 1e-6) + 1e-9).all())

    def _limited(self, command: np.ndarray, now: int) -> np.ndarray:
        reach = self._reach(now)
        if reach is None or self._last is None:
            return command
        return np.clip(command, self._last - reach, self._last + reach).astype(np.float32)
