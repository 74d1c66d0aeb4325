"""The last thing before the robot: a command leaves this filter finite, inside its limits, or as a hold.

ROS-free; the guard node and the headless control loop run the same code. None of this is a safety-rated function: the
hardware stop and the robot's own reflexes stay in force.

Order of the rules: finite, watchdog, staleness, step jump (these replace the command by a hold), then position, workspace,
gripper toggles, chunk rate, and velocity, acceleration and jerk (these trim it). A command that breaks no rule is returned
bit for bit. A hold brakes along the acceleration and jerk limits, then repeats the last executed value of absolute
dimensions and zero for delta dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import inf, isfinite, isnan
from typing import NamedTuple

import numpy as np

from robot_rl.runtime.motion_limits import SLACK, MotionLimits
from robot_rl.types import ActionSpec, SafetyFlag

_NONE = SafetyFlag.NONE


class SafetyLevel(IntEnum):
    """What a result means for the motion."""

    OK = 0
    CLAMP = 1  # trimmed; motion goes on
    HOLD = 2  # replaced: brake, then stay
    STOP = 3  # a hold that lasted too long: end the episode and disarm


class SafetyResult(NamedTuple):
    """``command`` (A,) has the input's float type; ``flags`` names every rule that spoke."""

    command: np.ndarray
    flags: SafetyFlag
    level: SafetyLevel


@dataclass(frozen=True)
class SafetyConfig:
    """Rules and limits. ``None`` switches a rule off; a limit of 0.0 means zero; ``inf`` in a vector means "no limit here".

    Attributes:
        position: clamp to the ActionSpec's limits.
        position_margin: kept from these limits in absolute dimensions that are no grippers (one number or A).
        velocity, acceleration, jerk: A limits each, in units/s, /s^2, /s^3. A delta dimension's velocity is its command times
            ``control_hz``. All arm dimensions are scaled together, so that the direction of motion is kept.
        speed_scale: multiplies these three and ``chunk_rate``.
        step_jump_factor: a command further than this many velocity limits times one period from the last executed value is a
            fault, not a wish: it is rejected. Needs ``velocity``, and is off without it.
        chunk_rate: A limits, units/s, on how fast the command may change from the first step of a new chunk until it has
            caught up with the chunk.
        workspace: command to command inside the workspace, or None where there is none (then the filter holds).
        max_observation_age_s, max_operator_age_s: older stamps, and stamps that far in the future, mean hold.
        watchdog_s: longest time between two calls; after a longer one the filter holds for ``watchdog_good_ticks`` calls.
        gripper_toggles_per_s: how often a gripper may change side within one second.
        stop_after_hold_s: a hold that lasts longer is reported as STOP.
        neutral: A values to hold before anything was executed or measured.
    """

    position: bool = True
    position_margin: float | Sequence[float] = 0.0
    velocity: Sequence[float] | None = None
    acceleration: Sequence[float] | None = None
    jerk: Sequence[float] | None = None
    speed_scale: float = 1.0
    step_jump_factor: float | None = 3.0
    chunk_rate: Sequence[float] | None = None
    workspace: Callable[[np.ndarray], np.ndarray | None] | None = None
    max_observation_age_s: float | None = None
    max_operator_age_s: float | None = 0.10
    watchdog_s: float | None = None
    watchdog_good_ticks: int = 3
    gripper_toggles_per_s: int | None = None
    stop_after_hold_s: float | None = None
    neutral: Sequence[float] | None = None


def default_watchdog_s(command_hz: float) -> float:
    """Three command periods, within 30 to 75 ms, and never less than one and a half periods."""
    return max(min(max(3.0 / command_hz, 0.030), 0.075), 1.5 / command_hz)


def _vector(key: str, value: Sequence[float] | float | None, spec: ActionSpec, scale: float = 1.0) -> list[float] | None:
    """Check one limit per dimension. Raises ValueError naming the key, the value and what is accepted."""
    if value is None:
        return None
    values = [float(value)] * spec.dim if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != spec.dim:
        raise ValueError(
            f"safety.{key} has {len(values)} values; accepted is one for each of the {spec.dim} dimensions {spec.names}"
        )
    for name, v in zip(spec.names, values, strict=True):
        if isnan(v) or v < 0.0:
            raise ValueError(f"safety.{key}[{name}]={v}: accepted are numbers >= 0 (0.0 means zero, .inf means no limit)")
    return [v * scale if v != inf else inf for v in values]


class SafetyFilter:
    """Stateful filter of one robot's command stream; call :meth:`reset` at every episode start and :meth:`filter` once a tick.

    Args:
        control_hz: rate of the calls; one period is ``1 / control_hz`` whatever the clock says, so that a late tick never
            licenses a larger step.

    Raises:
        ValueError: a limit is missing, negative, not a number, or leaves nothing between low and high.
    """

    def __init__(self, config: SafetyConfig, action_spec: ActionSpec, control_hz: float) -> None:
        if not (isfinite(control_hz) and control_hz > 0):
            raise ValueError(f"control_hz={control_hz}: accepted are numbers > 0")
        if not (isfinite(config.speed_scale) and config.speed_scale >= 0):
            raise ValueError(f"safety.speed_scale={config.speed_scale}: accepted are numbers >= 0")
        self.config, self.spec, self.control_hz = config, action_spec, float(control_hz)
        spec, scale = action_spec, config.speed_scale
        self._dim, self._shape = spec.dim, (spec.dim,)
        self._hz, self._dt = float(control_hz), 1.0 / float(control_hz)
        self._delta = [m == "delta" for m in spec.mode]
        self._gripper = [k.startswith("gripper") for k in spec.kind]
        self._low, self._high = self._position_limits()
        self._v = _vector("velocity", config.velocity, spec, scale)
        acceleration = _vector("acceleration", config.acceleration, spec, scale)
        jerk = _vector("jerk", config.jerk, spec, scale)
        self._chunk = _vector("chunk_rate", config.chunk_rate, spec, scale)
        self._neutral = None if config.neutral is None else [float(x) for x in config.neutral]
        if self._neutral is not None and (len(self._neutral) != spec.dim or not all(map(isfinite, self._neutral))):
            raise ValueError(f"safety.neutral={list(config.neutral or ())}: accepted are {spec.dim} finite numbers")
        self._kinematic = any(limit is not None for limit in (self._v, acceleration, jerk))
        self._jump = self._jump_limits()
        self._motion = MotionLimits(
            self._v, acceleration, jerk, low=self._low, high=self._high, delta=self._delta, gripper=self._gripper,
            hz=self._hz,
        )  # fmt: skip
        self._observation_ns = self._ns("max_observation_age_s")
        self._operator_ns = self._ns("max_operator_age_s")
        self._watchdog_ns = self._ns("watchdog_s")
        self._stop_ns = self._ns("stop_after_hold_s")
        if config.watchdog_good_ticks < 0:
            raise ValueError(f"safety.watchdog_good_ticks={config.watchdog_good_ticks}: accepted are integers >= 0")
        if config.gripper_toggles_per_s is not None and config.gripper_toggles_per_s < 0:
            raise ValueError(f"safety.gripper_toggles_per_s={config.gripper_toggles_per_s}: accepted are integers >= 0")
        self._grippers = [i for i, g in enumerate(self._gripper) if g] if config.gripper_toggles_per_s is not None else []
        self._middle = [(lo + hi) / 2 for lo, hi in zip(spec.low, spec.high, strict=True)]
        # Nothing but limits and ages to check: then a command inside them needs no arithmetic at all.
        self._plain = not (self._kinematic or self._chunk or self._grippers or config.workspace is not None)
        self._ready = False

    # -- set-up ----------------------------------------------------------------------------------------------------------

    def _position_limits(self) -> tuple[list[float], list[float]]:
        spec = self.spec
        if not self.config.position:
            return [-inf] * spec.dim, [inf] * spec.dim
        margin = _vector("position_margin", self.config.position_margin, spec) or [0.0] * spec.dim
        low, high = [], []
        for i, name in enumerate(spec.names):
            lo, hi = spec.low[i], spec.high[i]
            if isnan(lo) or isnan(hi):
                raise ValueError(f"ActionSpec limits of {name!r} are [{lo}, {hi}]: safety.position needs both")
            if self._delta[i] and not lo <= 0.0 <= hi:
                raise ValueError(
                    f"ActionSpec limits of delta dimension {name!r} are [{lo}, {hi}]: accepted is a range around 0"
                )
            m = 0.0 if self._delta[i] or self._gripper[i] else margin[i]
            if not lo + m < hi - m:
                raise ValueError(f"safety.position_margin[{name}]={m}: accepted is less than half of [{lo}, {hi}]")
            # Rounded to float32, the type commands are stored in: a policy that clips to its limits is inside them.
            low.append(float(np.float32(lo + m)))
            high.append(float(np.float32(hi - m)))
        return low, high

    def _jump_limits(self) -> list[float] | None:
        factor = self.config.step_jump_factor
        if factor is None or self._v is None:
            return None
        if not factor >= 0:
            raise ValueError(f"safety.step_jump_factor={factor}: accepted are numbers >= 0, or null")
        return [inf if v == inf else factor * v * self._dt * (1 + SLACK) for v in self._v]

    def _ns(self, key: str) -> int | None:
        value = getattr(self.config, key)
        if value is None:
            return None
        if isnan(value) or value < 0:
            raise ValueError(f"safety.{key}={value}: accepted are seconds >= 0, or null for no such rule")
        return int(min(value, 1e9) * 1e9)

    # -- running ---------------------------------------------------------------------------------------------------------

    def reset(self, now_ns: int, measured: np.ndarray | None = None) -> None:
        """Forget the past and start at rest.

        Args:
            measured: (A,) where the robot is, in the action's units (entries of delta dimensions are ignored). Needed when a
                rule limits the change of an absolute dimension.

        Raises:
            ValueError: it is needed and missing, has another shape, or is not finite.
        """
        last: list[float | None] = [0.0 if delta else None for delta in self._delta]
        if measured is not None:
            values = np.asarray(measured, np.float64)
            if values.shape != self._shape or not np.isfinite(values).all():
                raise ValueError(f"measured={measured}: accepted are {self._dim} finite values {self.spec.names}")
            last = [0.0 if delta else v for delta, v in zip(self._delta, values.tolist(), strict=True)]
        elif self._kinematic or self._chunk:
            for i, name in enumerate(self.spec.names):
                limited = self._motion.limited(i) or (self._chunk is not None and not self._gripper[i])
                if limited and last[i] is None:
                    raise ValueError(f"measured is missing: the limits on the change of {name!r} need to know where it is")
        if measured is None and self._neutral is not None:
            last = [n if x is None else x for n, x in zip(self._neutral, last, strict=True)]
        self._known = all(x is not None for x in last)
        self._last: list[float] = [0.0 if x is None else x for x in last]
        self._now, self._hold_since, self._good_ticks_left = int(now_ns), -1, 0
        self._catching_up = False
        self._motion.reset(self._last)
        self._sides: dict[int, bool] = {}
        self._toggles: dict[int, list[int]] = {i: [] for i in self._grippers}
        self._ready = True

    @property
    def last_executed(self) -> np.ndarray:
        """(A,) float64: the last command that left the filter."""
        return np.array(self._last)

    def filter(
        self,
        command: np.ndarray,
        *,
        now_ns: int,
        observation_stamp_ns: int | None = None,
        operator_stamp_ns: int | None = None,
        chunk_started: bool = False,
        hold: SafetyFlag = _NONE,
    ) -> SafetyResult:
        """One control tick.

        Args:
            command: (A,) wished command in physical units.
            now_ns: steady (or simulated) clock.
            observation_stamp_ns: of the observation it rests on; None where observations have no stamp, which is an error
                when ``max_observation_age_s`` is set.
            operator_stamp_ns: of the operator's last message, given only while a person is in control.
            chunk_started: this is the first row of a new chunk.
            hold: rules that were judged elsewhere (a driver's watchdog, the age of a topic) and ask for a hold.

        Raises:
            ValueError: ``command`` has another shape, or a needed stamp is missing: wiring errors, not motion.
            RuntimeError: before :meth:`reset`, or when it must hold before anything was executed or measured.
        """
        if not self._ready:
            raise RuntimeError("call reset before filter")
        if command.shape != self._shape:
            raise ValueError(f"command has shape {command.shape}; accepted is {self._shape}")
        values: list[float] = command.tolist()
        held = int(hold)
        if self._watchdog_ns is not None or now_ns < self._now:
            held |= self._watch(now_ns)
        self._now = now_ns
        if self._observation_ns is not None:
            if observation_stamp_ns is None:
                raise ValueError("observation_stamp_ns is missing: safety.max_observation_age_s needs it")
            if not -self._observation_ns <= now_ns - observation_stamp_ns <= self._observation_ns:
                held |= 128
        if operator_stamp_ns is not None and self._operator_ns is not None:
            age = now_ns - operator_stamp_ns
            if not -self._operator_ns <= age <= self._operator_ns:
                held |= 256
        if not held and self._plain:
            for x, lo, hi in zip(values, self._low, self._high, strict=True):
                if not lo <= x <= hi or x - x != 0.0:  # the difference is NaN for NaN and for infinities
                    break
            else:
                self._last, self._known, self._hold_since = values, True, -1
                return SafetyResult(command.copy(), _NONE, SafetyLevel.OK)
        return self._full(command, values, now_ns, held, chunk_started)

    def _watch(self, now_ns: int) -> int:
        late = self._watchdog_ns is not None and now_ns - self._now > self._watchdog_ns
        if late or now_ns < self._now:  # called too late, or the clock ran backwards
            self._good_ticks_left = self.config.watchdog_good_ticks
            return int(SafetyFlag.WATCHDOG)
        if self._good_ticks_left:
            self._good_ticks_left -= 1
            return int(SafetyFlag.WATCHDOG)
        return 0

    def _full(self, command: np.ndarray, values: list[float], now_ns: int, hold: int, chunk_started: bool) -> SafetyResult:
        flags = hold
        if not all(map(isfinite, values)):
            flags |= SafetyFlag.NON_FINITE
            hold = 1
        if not hold and self._jump is not None and self._known and self._jumps(values):
            flags |= SafetyFlag.STEP_JUMP
            hold = 1
        target = values
        if not hold:
            target, trimmed, inside = self._trim(command, values)
            flags |= trimmed
            hold = 0 if inside else 1
        if hold:
            if not self._known:
                raise RuntimeError(
                    f"the first command must be held ({SafetyFlag(flags)!r}) and there is nothing to hold: give reset() the "
                    "measured state, or set safety.neutral"
                )
            target = [0.0 if delta else last for delta, last in zip(self._delta, self._last, strict=True)]
            self._catching_up = self._chunk is not None  # the way back to the chunk is a jump like the one between chunks
        else:
            if chunk_started and self._chunk is not None:
                self._catching_up = True
            if self._grippers:
                target, toggled = self._hold_fast_grippers(target, now_ns)
                flags |= toggled
            if self._catching_up:
                target, slowed = self._limit_chunk_rate(target)
                flags |= slowed
        if self._kinematic:
            target, limited = self._motion.limit(target, self._last, bool(hold))
            flags |= limited
        level = self._level(bool(hold), flags, now_ns)
        unchanged = target is values or target == values
        self._last, self._known = target, True
        if unchanged:
            return SafetyResult(command.copy(), SafetyFlag(flags) if flags else _NONE, level)
        dtype = command.dtype if command.dtype.kind == "f" else np.float64
        return SafetyResult(np.array(target, dtype), SafetyFlag(flags), level)

    def _level(self, hold: bool, flags: int, now_ns: int) -> SafetyLevel:
        if not hold:
            self._hold_since = -1
            return SafetyLevel.CLAMP if flags else SafetyLevel.OK
        if self._hold_since < 0:
            self._hold_since = now_ns
        if self._stop_ns is not None and now_ns - self._hold_since > self._stop_ns:
            return SafetyLevel.STOP
        return SafetyLevel.HOLD

    def _jumps(self, values: list[float]) -> bool:
        assert self._jump is not None
        for x, last, limit, delta in zip(values, self._last, self._jump, self._delta, strict=True):
            if abs(x if delta else x - last) > limit:
                return True
        return False

    def _trim(self, command: np.ndarray, values: list[float]) -> tuple[list[float], int, bool]:
        """Position and workspace. The last value is False when there is no command inside the workspace."""
        flags = 0
        clamped = [lo if x < lo else hi if x > hi else x for x, lo, hi in zip(values, self._low, self._high, strict=True)]
        if clamped != values:
            values, flags = clamped, int(SafetyFlag.POSITION)
        if self.config.workspace is not None:
            inside = self.config.workspace(np.array(values))
            if inside is None:
                return values, flags | SafetyFlag.WORKSPACE, False
            moved = np.asarray(inside, np.float64)
            if moved.shape != self._shape or not np.isfinite(moved).all():
                return values, flags | SafetyFlag.WORKSPACE, False
            if moved.tolist() != values:
                values = [min(max(x, lo), hi) for x, lo, hi in zip(moved.tolist(), self._low, self._high, strict=True)]
                flags |= SafetyFlag.WORKSPACE
        return values, flags, True

    def _hold_fast_grippers(self, values: list[float], now_ns: int) -> tuple[list[float], int]:
        assert self.config.gripper_toggles_per_s is not None
        flags = 0
        for i in self._grippers:
            side = values[i] > self._middle[i]
            before = self._sides.get(i)
            if before is None or side == before:
                self._sides[i] = side
                continue
            recent = self._toggles[i] = [t for t in self._toggles[i] if now_ns - t < 1_000_000_000]
            if len(recent) >= self.config.gripper_toggles_per_s:
                values = [*values[:i], self._last[i], *values[i + 1 :]]
                flags = int(SafetyFlag.GRIPPER_RATE)
            else:
                recent.append(now_ns)
                self._sides[i] = side
        return values, flags

    def _limit_chunk_rate(self, values: list[float]) -> tuple[list[float], int]:
        assert self._chunk is not None
        scale = 1.0
        for i in range(self._dim):
            if not self._gripper[i]:
                change, allowed = abs(values[i] - self._last[i]), self._chunk[i] * self._dt
                if change > allowed * (1 + SLACK):
                    scale = min(scale, allowed / change)
        if scale == 1.0:
            self._catching_up = False
            return values, 0
        slowed = [
            x if gripper else last + scale * (x - last)
            for x, last, gripper in zip(values, self._last, self._gripper, strict=True)
        ]
        return slowed, int(SafetyFlag.CHUNK_RATE)
