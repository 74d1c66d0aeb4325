"""The guard: what stands between every command and the controllers, as a state machine without ROS.

All times are nanoseconds of one steady clock. Commands come in by :meth:`Guard.on_command`, watchdogs and holds run in
:meth:`Guard.tick`; both return what is to be sent, and nothing else ever is. None of this is a safety-rated function.

Levels: ``ok``, ``clamp`` (trimmed, motion goes on), ``hold`` (brake along the limits, then stay), ``stop`` (a hold that
disarmed), ``estop`` (latched). While a hold is on and nobody has an episode running (heartbeat ``idle``), position channels at
rest are not sent anything: a person or a homing routine may move the robot, and the next motion starts from where it then is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from robot_rl.robots.channels import ZERO_WHEN_HELD, channels_of
from robot_rl.robots.description import RobotDescription
from robot_rl.robots.measured import MeasuredJoints
from robot_rl.runtime.channel_guard import ChannelGuard, TwistGuard, Verdict, guard_for
from robot_rl.runtime.safety import default_watchdog_s
from robot_rl.types import SafetyFlag

S = 1_000_000_000
LIVE = ("idle", "policy", "human", "blend", "hold")
"""Heartbeats of a policy node that is active."""
RESTING = ("idle", "hold")
"""Holds under these heartbeats are wished, and do not become a stop."""
ORDER_NS = S // 2
"""How long the stamp of a command is remembered: one from a wrong clock, or a sender that starts again on another one, costs a
hold of this length and not the session."""


@dataclass(frozen=True)
class GuardConfig:
    """Times in seconds; ``command_timeout_s`` 0 means three command periods within 30 to 75 ms."""

    command_timeout_s: float = 0.0
    operator_timeout_s: float = 0.10
    state_timeout_s: float = 0.10
    heartbeat_timeout_s: float = 0.25
    hold_to_stop_s: float = 2.0
    speed_scale: float = 1.0
    require_operator: bool = False
    direct_operator: bool = True
    rearm: str = "manual"
    good_ticks: int = 3


@dataclass(frozen=True)
class Sent:
    """One channel vector to send. ``stamp_ns`` is copied from the command it answers; None when the guard acts by itself."""

    channel: str
    vector: np.ndarray
    stamp_ns: int | None = None


@dataclass(frozen=True)
class RuleEvent:
    """A rule spoke."""

    rule: str
    channel: str
    joint: str | None = None
    wanted: float | None = None
    sent: float | None = None
    limit: float | None = None
    text: str = ""


@dataclass
class _Tick:
    stamp_ns: int
    vectors: dict[str, np.ndarray] = field(default_factory=dict)


class Guard:
    """One robot's guard. ``level``, ``armed``, ``source``, ``rule``, ``reason`` and ``counters`` say what it does and why."""

    def __init__(self, robot: RobotDescription, config: GuardConfig, now_ns: int, *, estop: bool = False) -> None:
        self.robot, self.config = robot, config
        self.channels = {c.name: c for c in channels_of(robot)}
        self.filters: dict[str, ChannelGuard] = {}
        self._build_filters()
        self.level, self.armed, self.source, self.rule = "hold", False, "hold", "disarmed"
        self.reason = "disarmed: call arm"
        self.since_ns = now_ns
        self.counters: Counter[str] = Counter()
        self.events: deque[RuleEvent] = deque(maxlen=256)
        self.heartbeat, self._heartbeat_ns = "", -(10**18)
        self.joints = MeasuredJoints({j for c in self.channels.values() for j in c.command.names})
        self._pose: tuple[np.ndarray, int] | None = None
        self._force = (np.zeros(6), -(10**18), 0)
        self._operator = (False, False, -(10**18))  # engaged, dead-man, when
        self._stamps: dict[tuple[str, str], tuple[int, int]] = {}  # of the last command, and when it came
        self._disorder: deque[int] = deque(maxlen=5)
        self._open: dict[str, _Tick] = {}
        self._command_ns = self._sent_ns = self._hold_ns = now_ns
        self._good, self._needed, self._malformed = 0, 0, 0
        self._parked, self._anchored = True, False
        self._tracking_since: int | None = None
        self.estopped = False
        self.estop_ns = now_ns
        if estop:
            self.on_estop(now_ns, "the e-stop was latched before a restart")

    def _build_filters(self) -> None:
        last = {n: f.last for n, f in self.filters.items()}
        self.filters = {n: guard_for(c, self.robot, self.config.speed_scale) for n, c in self.channels.items()}
        for name, value in last.items():
            if value is not None:
                self.filters[name].reset(value, 0)

    # ---- figures

    @property
    def command_timeout_ns(self) -> int:
        return int((self.config.command_timeout_s or default_watchdog_s(self.robot.rates.command_hz)) * S)

    def policy_alive(self, now_ns: int) -> bool:
        return now_ns - self._heartbeat_ns <= self.config.heartbeat_timeout_s * S and self.heartbeat in LIVE

    def operator_present(self, now_ns: int) -> bool:
        engaged, deadman, when = self._operator
        return engaged and deadman and now_ns - when <= self.config.operator_timeout_s * S

    def measured(self, channel: str, now_ns: int) -> np.ndarray | None:
        """Where a channel's joints or tool are, or None where that is unknown or too old."""
        c, limit = self.channels[channel], self.config.state_timeout_s * S
        if c.command.is_cartesian:
            if self._pose is None or now_ns - self._pose[1] > limit:
                return None
            return self._pose[0]
        return self.joints.vector(c.command.names, int(now_ns - limit))

    def _unknown_state(self, now_ns: int) -> str:
        """Which measured state is missing or too old; empty when all is fresh."""
        for name, c in self.channels.items():
            needed = c.kind != "twist" or bool(self.robot.feedback.tool_pose)
            if needed and self.measured(name, now_ns) is None:
                topic = self.robot.feedback.tool_pose if c.command.is_cartesian else self.robot.feedback.joint_states
                return f"measured state of channel {name} ({topic}) is missing or older than {self.config.state_timeout_s:g} s"
        return ""

    # ---- measured state, people, heartbeats

    def on_joint_states(self, positions: Mapping[str, float], now_ns: int, rank: int = 0) -> None:
        """``rank``: the topic's place among the robot's ``joint_topics``."""
        self.joints.update(positions, now_ns, rank)

    def on_tool_pose(self, pose: np.ndarray, now_ns: int) -> None:
        if np.isfinite(pose).all():
            self._pose = (pose, now_ns)
            for f in self.filters.values():
                if isinstance(f, TwistGuard):
                    f.position = pose[:3]

    def on_wrench(self, wrench: np.ndarray, now_ns: int) -> list[Sent]:
        limits = self.robot.limits.wrench
        if limits is None or not np.isfinite(wrench).all():
            return []
        before, when, over = self._force
        dt = min(max((now_ns - when) / S, 0.0), 1.0)
        keep = float(np.exp(-2 * np.pi * limits.filter_hz * dt))
        smooth = keep * before + (1 - keep) * wrench
        force, torque = float(np.linalg.norm(smooth[:3])), float(np.linalg.norm(smooth[3:]))
        over = over + 1 if force > limits.force or torque > limits.torque else 0
        self._force = (smooth, now_ns, over)
        if over >= 2 and self.armed:
            return self._stop(
                "wrench", f"{force:.1f} N, {torque:.2f} N m measured; limits {limits.force:g} N, {limits.torque:g} N m", now_ns
            )
        return []

    def on_operator(self, engaged: bool, deadman: bool, now_ns: int) -> None:
        self._operator = (engaged, deadman, now_ns)

    def on_heartbeat(self, state: str, now_ns: int) -> list[Sent]:
        self.heartbeat, self._heartbeat_ns = state, now_ns
        if state in ("idle", "inactive") and self.armed and self.source == "policy":
            return self._hold(
                state, "no episode is running" if state == "idle" else "the policy is inactive", now_ns, fault=False
            )
        return []

    # ---- arming, stops

    def arm(self, now_ns: int, problems: Sequence[str] = ()) -> tuple[bool, str]:
        """Run the start checks; ``problems`` are those that need a graph (publishers, hashes). (armed?, sentence)."""
        found = list(problems)
        if self.estopped:
            found.append("the e-stop is latched: release it and call reset_estop")
        unknown = self._unknown_state(now_ns)
        if unknown:
            found.append(unknown)
        else:
            found += self._outside(now_ns)
        if found:
            return False, "not armed: " + "; ".join(found)
        if not self.armed:
            self.armed = True
            self._anchor(now_ns)
            self._set("hold", "armed", "armed, waiting for commands", now_ns)
            self._hold_ns, self._needed, self._good = now_ns, 1, 0
        return True, "armed"

    def disarm(self, now_ns: int) -> list[Sent]:
        out = self._held(now_ns) if self.armed else []
        self.armed = False
        if not self.estopped:
            self._set("hold", "disarmed", "disarmed: call arm", now_ns)
        return out

    def on_estop(self, now_ns: int, why: str = "e-stop") -> list[Sent]:
        """Latch. The target stops where it is, without a ramp of ours."""
        self.estopped, self.estop_ns = True, now_ns
        was_armed, self.armed = self.armed, False
        self._set("estop", "estop", why, now_ns)
        if not was_armed:
            return []
        for name, f in self.filters.items():
            if f.last is not None:
                f.reset(f.last if self.channels[name].kind != "twist" else None, now_ns)
        return self._held(now_ns)

    def reset_estop(self, now_ns: int, problems: Sequence[str] = ()) -> tuple[bool, str]:
        found = list(problems)
        if now_ns - self.estop_ns < S:
            found.append("the stop is less than 1 s ago")
        if now_ns - self._command_ns < self.command_timeout_ns:
            found.append("commands are arriving")
        if self._operator[0] and now_ns - self._operator[2] < S:
            found.append("an operator device is engaged: release it")
        if found:
            return False, "e-stop stays latched: " + "; ".join(found)
        self.estopped = False
        self._set("hold", "disarmed", "e-stop cleared; disarmed: call arm", now_ns)
        return True, "e-stop cleared; the robot is disarmed"

    def stop(self, rule: str, why: str, now_ns: int) -> list[Sent]:
        """A fault found outside (a second publisher): hold, then disarm."""
        return self._stop(rule, why, now_ns) if self.armed else []

    def pause(self, rule: str, why: str, now_ns: int) -> list[Sent]:
        """Hold until the next good command; what is known stays known (simulated time stands still)."""
        return self._hold(rule, why, now_ns, fault=False) if self._moving else []

    def lost_track(self, rule: str, why: str, now_ns: int) -> list[Sent]:
        """What was received belongs to another time (the clock jumped, or this process did not run for a while): hold, and go
        on from fresh state and fresh commands only."""
        out = self._hold(rule, why, now_ns) if self._moving else []
        self.joints.forget()
        self._stamps.clear()
        self._open.clear()
        self._disorder.clear()
        self._pose, self._tracking_since = None, None
        self._heartbeat_ns = -(10**18)
        self._force = (np.zeros(6), -(10**18), 0)
        self._operator = (False, False, -(10**18))
        self._command_ns = self._hold_ns = now_ns
        self._sent_ns, self.estop_ns = min(self._sent_ns, now_ns), min(self.estop_ns, now_ns)
        return out

    def set_hold_to_stop(self, seconds: float) -> None:
        if seconds != self.config.hold_to_stop_s:
            self.config = replace(self.config, hold_to_stop_s=seconds)

    def set_speed_scale(self, scale: float) -> None:
        """At rest only: filters are built anew."""
        if scale != self.config.speed_scale:
            self.config = replace(self.config, speed_scale=scale)
            self._build_filters()

    # ---- commands

    def on_command(self, source: str, channel: str, vector: np.ndarray | None, stamp_ns: int, now_ns: int) -> list[Sent]:
        """A channel of a tick arrived from ``policy`` or ``operator``; ``vector`` None: it had the wrong names or shape."""
        if channel not in self.channels:
            return []
        key = (source, channel)
        before, came = self._stamps.get(key, (-1, now_ns))
        if stamp_ns <= before and now_ns - came < ORDER_NS:
            self._count(RuleEvent("stamp_order", channel, text="stamps must increase"))
            self._disorder.append(now_ns)
            if len(self._disorder) == 5 and now_ns - self._disorder[0] <= S and self._moving:
                return self._hold("stamp_order", "5 stamps out of order within 1 s", now_ns)
            return []
        if vector is None or vector.shape != (self.channels[channel].width,):
            self._malformed += 1
            self._count(RuleEvent("shape", channel, text="names, shape, type or frame differ from the robot description"))
            if self._malformed >= 3 and self._moving:
                return self._hold("shape", f"channel {channel}: 3 malformed commands in a row", now_ns)
            return []
        self._malformed = 0
        self._stamps[key] = (stamp_ns, now_ns)
        if source == "policy":
            self._command_ns = now_ns
        if source == "operator":
            return self._complete(source, _Tick(stamp_ns, {channel: vector}), now_ns)
        tick = self._open.get(source)
        if tick is None or tick.stamp_ns != stamp_ns:
            if tick is not None:
                self._count(RuleEvent("incomplete", channel, text="a tick arrived without all of its channels"))
            tick = self._open[source] = _Tick(stamp_ns)
        tick.vectors[channel] = vector
        if len(tick.vectors) < len(self.channels):
            return []
        del self._open[source]
        return self._complete(source, tick, now_ns)

    @property
    def _moving(self) -> bool:
        return self.armed and self.level in ("ok", "clamp")

    def _complete(self, source: str, tick: _Tick, now_ns: int) -> list[Sent]:
        if not self.armed:
            self._count(
                RuleEvent(self.rule if self.rule in ("estop", "disarmed", "stop") else "disarmed", next(iter(tick.vectors)))
            )
            return []
        if not self._admitted(source, now_ns):
            return []
        for name, vector in tick.vectors.items():
            if not np.isfinite(vector).all():
                index = int(np.argmin(np.isfinite(vector)))
                self._count(RuleEvent("finite", name, self._label(name, index), float(vector[index])))
                return self._hold("finite", f"channel {name}: {self._label(name, index)} is not finite", now_ns)
        if unknown := self._unknown_state(now_ns):
            return self._hold("state", unknown, now_ns)
        if not self._moving:
            self._good += 1
            if self._parked:
                self._anchor(now_ns)
            refused = self._start_jump(tick, now_ns)
            if refused is not None:
                self._good = 0
                self._count(refused)
                self._set("hold", "start_jump", refused.text, now_ns)
                return []
            if self._good < self._needed:
                return []
        return self._forward(source, tick, now_ns)

    def _admitted(self, source: str, now_ns: int) -> bool:
        """Whether this source may move the robot now. Two sources never mix; they change over only at a hold."""
        if source == "operator":
            if not self.config.direct_operator or self.policy_alive(now_ns) or not self.operator_present(now_ns):
                return False
            return self.source == "operator_direct" or not self._moving
        if self.source == "operator_direct" and self._moving:
            self._count(RuleEvent("mixed", "", text="the operator has the robot"))
            return False
        if self.config.require_operator and not self.operator_present(now_ns):
            if self.rule != "operator_required":
                self._set("hold", "operator_required", "the dead-man switch is open", now_ns)
            return False
        return True

    def _forward(self, source: str, tick: _Tick, now_ns: int) -> list[Sent]:
        flags, out = SafetyFlag.NONE, []
        before = {n: f.last for n, f in self.filters.items()}
        for name, vector in tick.vectors.items():
            verdict = self.filters[name].wish(vector, now_ns)
            flags |= verdict.flags
            if verdict.flags:
                self._changed(name, vector, verdict)
            if verdict.held:
                rule = _rule(verdict.flags)
                for other, value in before.items():  # never part of a tick
                    if other != name and value is not None and self.filters[other].last is not value:
                        self.filters[other].reset(value, now_ns)
                return self._hold(rule, f"channel {name}: {rule} at {self._label(name, verdict.index)}", now_ns)
            out.append(Sent(name, verdict.vector, tick.stamp_ns))
        self.source = "policy" if source == "policy" else "operator_direct"
        level = "clamp" if flags else "ok"
        if level != self.level:
            self._set(level, _rule(flags) if flags else "", "moving", now_ns)
        self._parked, self._sent_ns = False, now_ns
        if source == "operator":
            self._command_ns = now_ns
        return out

    def _changed(self, name: str, wanted: np.ndarray, verdict: Verdict) -> None:
        i = verdict.index
        sent = float(verdict.vector[i]) if i >= 0 else None
        self._count(RuleEvent(_rule(verdict.flags), name, self._label(name, i), float(wanted[i]) if i >= 0 else None, sent))

    def _start_jump(self, tick: _Tick, now_ns: int) -> RuleEvent | None:
        jump = self.robot.limits.start_jump
        for name, vector in tick.vectors.items():
            c = self.channels[name]
            if c.kind in ZERO_WHEN_HELD:
                continue
            measured = self.measured(name, now_ns)
            assert measured is not None
            if c.kind == "pose":
                distance, angle = c.distance(vector, measured)
                if distance > jump.linear or angle > jump.angular:
                    text = (
                        f"start refused: channel {name} would jump {distance * 1000:.0f} mm and {angle:.2f} rad from the measured pose "
                        f"(accepted {jump.linear * 1000:.0f} mm, {jump.angular:.2f} rad): go home, or re-plan"
                    )
                    return RuleEvent("start_jump", name, "pose", distance, 0.0, jump.linear, text)
                continue
            i = int(np.argmax(np.abs(vector - measured)))
            if abs(vector[i] - measured[i]) > jump.joint:
                text = (
                    f"start refused: {c.command.names[i]} is at {measured[i]:.3f}, the first command is {vector[i]:.3f} "
                    f"(accepted within {jump.joint:g}): go home, or re-plan"
                )
                return RuleEvent("start_jump", name, c.command.names[i], float(vector[i]), float(measured[i]), jump.joint, text)
        return None

    # ---- time passes

    def tick(self, now_ns: int, problems: Callable[[], Sequence[str]] = lambda: ()) -> list[Sent]:
        """Watchdogs, and what a hold sends; call it at ``tick_hz``. ``problems``: as for :meth:`arm`, asked where it arms itself."""
        if not self.armed:
            if self.config.rearm == "auto" and not self.estopped and self.policy_alive(now_ns):
                self.arm(now_ns, problems())
            return []
        out: list[Sent] = []
        if self._moving:
            out = self._watch(now_ns)
        if self.armed and not self._moving and not out:
            out = self._holding(now_ns)
        return out

    def _watch(self, now_ns: int) -> list[Sent]:
        if unknown := self._unknown_state(now_ns):
            return self._hold("state", unknown, now_ns)
        if self.source == "operator_direct":
            if not self.operator_present(now_ns) or now_ns - self._command_ns > self.config.operator_timeout_s * S:
                return self._hold("operator", "the operator's messages stopped or the dead-man switch opened", now_ns)
        elif now_ns - self._command_ns > self.command_timeout_ns:
            return self._hold("watchdog", f"no command for {(now_ns - self._command_ns) / 1e6:.0f} ms", now_ns)
        elif self.config.require_operator and not self.operator_present(now_ns):
            return self._hold("operator_required", "the dead-man switch is open", now_ns)
        return self._track(now_ns)

    def _track(self, now_ns: int) -> list[Sent]:
        limits = self.robot.limits.tracking
        if limits is None:
            return []
        for name, c in self.channels.items():
            last, measured = self.filters[name].last, self.measured(name, now_ns)
            if c.command.is_cartesian or c.command.is_gripper or c.kind in ZERO_WHEN_HELD or last is None or measured is None:
                continue
            arm = [i for i, j in enumerate(c.command.names) if j not in c.command.action.gripper]
            error = np.abs(last - measured)[arm]
            if error.size and error.max() > limits.position:
                self._tracking_since = self._tracking_since or now_ns
                if now_ns - self._tracking_since > limits.for_s * S:
                    i = arm[int(np.argmax(error))]
                    return self._stop("tracking", f"{c.command.names[i]} lags {error.max():.3f} behind its command", now_ns)
                return []
        self._tracking_since = None
        return []

    def _holding(self, now_ns: int) -> list[Sent]:
        resting = self.policy_alive(now_ns) and self.heartbeat in RESTING
        if resting:
            self._hold_ns = now_ns
        elif now_ns - self._hold_ns > self.config.hold_to_stop_s * S:
            return self._stop("hold", f"a hold ({self.reason}) lasted {self.config.hold_to_stop_s:g} s", now_ns)
        if now_ns - self._sent_ns < S / self.robot.rates.command_hz * 0.95:
            return []
        return self._held(now_ns, park=resting and self.heartbeat == "idle")

    def _held(self, now_ns: int, park: bool = False) -> list[Sent]:
        out = []
        self._sent_ns = now_ns
        for name, f in self.filters.items():
            zero = self.channels[name].kind in ZERO_WHEN_HELD
            if f.last is None or (self._parked and not zero):
                continue
            before = f.last
            vector = f.hold(now_ns)
            if not zero and park and np.array_equal(before, vector):
                continue
            out.append(Sent(name, vector))
        if park and not any(self.channels[s.channel].kind not in ZERO_WHEN_HELD for s in out):
            self._parked = True
        return out

    # ---- inside

    def _anchor(self, now_ns: int) -> None:
        """Filters start at rest at the measured state."""
        for name, f in self.filters.items():
            f.reset(self.measured(name, now_ns), now_ns)
        self._parked = True

    def _hold(self, rule: str, why: str, now_ns: int, *, fault: bool = True) -> list[Sent]:
        if self.level == "hold" and self.armed:
            if fault:
                self._good, self._needed = 0, self.config.good_ticks
            if rule != self.rule:
                self._set("hold", rule, why, now_ns)
            return []
        if fault:
            self._count(RuleEvent(rule, "", text=why))
        self._set("hold", rule, why, now_ns)
        self._hold_ns, self._good = now_ns, 0
        self._needed = self.config.good_ticks if fault else 1
        return self._held(now_ns)

    def _stop(self, rule: str, why: str, now_ns: int) -> list[Sent]:
        self._count(RuleEvent(rule, "", text=why))
        out = self._held(now_ns)
        self.armed = False
        self._set("stop", rule, f"stopped and disarmed: {why}", now_ns)
        return out

    def _set(self, level: str, rule: str, reason: str, now_ns: int) -> None:
        self.level, self.rule, self.reason, self.since_ns = level, rule, reason, now_ns
        if level in ("hold", "stop", "estop"):
            self.source = "hold"
            self._tracking_since = None

    def _count(self, event: RuleEvent) -> None:
        self.counters[event.rule] += 1
        self.events.append(event)

    def _label(self, channel: str, index: int) -> str:
        c = self.channels[channel]
        names = c.command.names or ("x", "y", "z", "qx", "qy", "qz", "qw")[: c.width]
        return names[index] if 0 <= index < len(names) else ""

    def _outside(self, now_ns: int) -> list[str]:
        out = []
        for c in self.channels.values():
            if c.command.is_cartesian or c.kind in ZERO_WHEN_HELD:
                continue
            for joint in c.command.names:
                low, high = self.robot.limits.joints[joint].position
                value = self.joints.position(joint)
                if not low - 1e-3 <= value <= high + 1e-3:
                    out.append(f"{joint} is at {value:.3f}, outside its limits [{low:g}, {high:g}]")
        return out


_RULES = (
    (SafetyFlag.NON_FINITE, "finite"), (SafetyFlag.STEP_JUMP, "step_jump"), (SafetyFlag.WORKSPACE, "workspace"),
    (SafetyFlag.GRIPPER_RATE, "gripper_rate"), (SafetyFlag.POSITION, "position"), (SafetyFlag.VELOCITY, "velocity"),
    (SafetyFlag.ACCELERATION, "acceleration"), (SafetyFlag.JERK, "jerk"), (SafetyFlag.WATCHDOG, "watchdog"),
)  # fmt: skip


def _rule(flags: SafetyFlag) -> str:
    return next((name for flag, name in _RULES if flags & flag), "limit")
