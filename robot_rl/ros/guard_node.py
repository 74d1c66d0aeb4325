"""``guard_node``: a small process of its own between everybody and the controllers.

It is the only publisher on controller topics. It starts disarmed and is armed by service. It imports numpy, never torch. None of
this is a safety-rated function: the hardware e-stop, the robot's reflexes and the cell's safeguards stay in force.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, WrenchStamped
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Header
from std_srvs.srv import SetBool, Trigger

from robot_rl.robots.description import load_robot
from robot_rl.robots.validation import warnings
from robot_rl.ros import conversion, names, qos
from robot_rl.ros.base import ERROR, OK, WARN, PlainNode, run
from robot_rl.ros.commands import Hop, sink_for
from robot_rl.runtime.guard import Guard, GuardConfig, RuleEvent, Sent
from robot_rl.runtime.priority import LATENCY, KeepAwake
from robot_rl.wire import EpisodeStatus, GuardEvent, GuardState, OperatorState, WireError

GRAPH_CHECK_S = 0.5
STALL_S, DEAF_S = 0.15, 0.10
"""After this process did not run for so long, what arrives within ``DEAF_S`` is what was queued meanwhile: old, and not to be acted on."""
CLOCKS_APART_NS = 100_000_000
CLOCK_SILENT_S = 1.0


class GuardNode(PlainNode):
    """Wires :class:`robot_rl.runtime.guard.Guard` to the graph."""

    def __init__(self) -> None:
        super().__init__(names.GUARD_NODE)
        self.parameters.check()
        p = self.parameters
        self.robot = load_robot(p["robot"])
        for text in warnings(self.robot):
            self.get_logger().warning(text)
        keys = ("command_timeout_s", "operator_timeout_s", "state_timeout_s", "hold_to_stop_s", "speed_scale", "require_operator",
                "direct_operator", "rearm")  # fmt: skip
        self._file = self._state_file()
        kept = self._kept()
        self.guard = Guard(self.robot, GuardConfig(**{k: p[k] for k in keys}), self.clock_ns(), estop=bool(kept.get("estop")))
        self._policy_hash = ""
        service = self.robot.safety.estop_service
        self._processors, self._awake_wanted = KeepAwake(), False
        self._driver_stop = self.create_client(Trigger, service) if service else None
        self._estop_topic = False
        self._announced: tuple[Any, ...] = ()
        self._hops = {c.channel: Hop(c, self.robot) for c in self.robot.commands}
        self._sinks = {c.channel: sink_for(self, c, self.robot) for c in self.robot.commands}
        self._executed = {c: self.create_publisher(h.type, f"{names.EXECUTED}/{c}", qos.COMMAND) for c, h in self._hops.items()}
        self._state = self.create_publisher(DiagnosticArray, "~/state", qos.STATE)
        self._events = self.create_publisher(DiagnosticArray, "~/events", qos.EVENT)
        self._pending: dict[tuple[str, str], tuple[RuleEvent, int, int, int]] = {}
        self._latencies: deque[float] = deque(maxlen=500)
        self._tick_late: deque[float] = deque(maxlen=500)
        self._last_tick = self._alive = time.monotonic()
        self._deaf_until = 0.0
        self._measured_stamps: dict[str, int] = {}
        self._asked, self._found = 0.0, list[str]()
        self._clock_gap: int | None = None
        self._clock_seen = (0, time.monotonic())
        self._subscribe()
        self.create_service(SetBool, "~/arm", self._on_arm)
        self.create_service(Trigger, "~/estop", self._on_estop_service)
        self.create_service(Trigger, "~/reset_estop", self._on_reset_estop)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0 / p["tick_hz"], self._tick, clock=steady)
        self.create_timer(0.1, self._publish_events, clock=steady)
        self.create_timer(GRAPH_CHECK_S, self._check_graph, clock=steady)
        threshold = JumpThreshold(min_forward=Duration(seconds=1), min_backward=Duration(nanoseconds=-1), on_clock_change=False)
        self._jump = self.get_clock().create_jump_callback(threshold, post_callback=self._on_clock_jump)
        self.add_check("guard", self._check)
        self._announce()
        gc.collect()
        gc.freeze()

    # ---- clocks and files

    def clock_ns(self) -> int:
        """Ages run on the steady clock, or on simulated time where that is what the graph lives by."""
        return self.now_ns() if self.sim_time else time.monotonic_ns()

    @property
    def sim_time(self) -> bool:
        return bool(self.get_parameter("use_sim_time").value)

    def _on_clock_jump(self, jump: Any) -> None:
        self._lose_track("clock_jump", "the clock jumped")

    def _lose_track(self, rule: str, why: str) -> None:
        self._send(self.guard.lost_track(rule, why, self.clock_ns()))

    def _watch_clock(self) -> None:
        """Wall time: ROS and steady clock part between two ticks. Simulated time: no ``/clock`` for a second."""
        if not self.sim_time:
            gap = self.now_ns() - time.monotonic_ns()
            if self._clock_gap is not None and abs(gap - self._clock_gap) > CLOCKS_APART_NS:
                self._on_clock_jump(None)
            self._clock_gap = gap
            return
        now, steady = self.now_ns(), time.monotonic()
        if now != self._clock_seen[0]:
            self._clock_seen = now, steady
        elif steady - self._clock_seen[1] > CLOCK_SILENT_S and self.guard.level in ("ok", "clamp"):
            self._send(self.guard.pause("clock", f"no /clock for {CLOCK_SILENT_S:g} s", self.clock_ns()))

    def _awake(self) -> bool:
        """Whether what arrives now may be acted on; not right after this process did not run (stopped, or starved).

        In simulated time the jump of ``/clock`` and the ages say so, and a simulator that waits for us must not be left waiting.
        """
        now = time.monotonic()
        if self.sim_time:
            return True
        gap, self._alive = now - self._alive, now
        if gap > STALL_S:
            self._deaf_until = now + DEAF_S
            self._lose_track("stalled", f"the guard did not run for {gap * 1e3:.0f} ms")
        return now >= self._deaf_until

    def _state_file(self) -> Path:
        if given := self.parameters["state_file"]:
            return Path(given)
        folder = Path(os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache") / "robot_rl"
        return folder / f"guard{self.get_fully_qualified_name().replace('/', '-')}-{os.environ.get('ROS_DOMAIN_ID', '0')}.json"

    def _kept(self) -> dict[str, Any]:
        try:
            kept = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}

    def _keep(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft = self._file.with_suffix(".tmp")
            draft.write_text(json.dumps({"armed": self.guard.armed, "estop": self.guard.estopped}))
            os.replace(draft, self._file)
        except OSError as error:
            self.log_sometimes("keep", f"armed state and e-stop cannot be kept in {self._file}: {error}", 60.0)

    # ---- what it hears

    def _subscribe(self) -> None:
        for channel, hop in self._hops.items():
            self._listen_hop("policy", f"{names.ACTION}/{channel}", channel, hop, qos.COMMAND)
            self._listen_hop("operator", f"{names.OPERATOR_ACTION}/{channel}", channel, hop, qos.LATEST)
        self.listen(Header, names.HEARTBEAT, self._on_heartbeat, qos.LATEST)
        self.listen(DiagnosticArray, names.OPERATOR_STATE, self._on_operator, qos.LATEST)
        self.listen(DiagnosticArray, names.EPISODE_STATUS, self._on_episode, qos.STATE)
        self.listen(Bool, names.ESTOP, self._on_estop_topic, qos.STATE)
        feedback = self.robot.feedback
        for rank, topic in enumerate(self.robot.joint_topics):
            self.listen(JointState, topic, partial(self._on_joints, topic, rank), qos.SENSOR)
        if feedback.tool_pose:
            self.listen(PoseStamped, feedback.tool_pose, self._on_pose, qos.SENSOR)
        if feedback.wrench and self.robot.limits.wrench is not None:
            self.listen(WrenchStamped, feedback.wrench, self._on_wrench, qos.SENSOR)

    def _listen_hop(self, source: str, topic: str, channel: str, hop: Hop, profile: Any) -> None:
        def take(message: Any) -> None:
            if not self._awake():
                return
            now = self.clock_ns()
            try:
                vector, stamp = hop.read(message)
            except WireError as error:
                self._send(self.guard.on_command(source, channel, None, conversion.from_stamp(message.header.stamp), now))
                self.log_sometimes(f"hop {topic}", f"{topic}: {error}")
                return
            self._send(self.guard.on_command(source, channel, vector, stamp, now))
            self._latencies.append((self.clock_ns() - now) / 1e6)

        self.listen(hop.type, topic, take, profile)

    def _news(self, topic: str, message: Any) -> bool:
        """False for a driver that says the same again: a stamp that stands still is no fresh measurement. 0: it does not stamp."""
        stamp = conversion.from_stamp(message.header.stamp)
        before, self._measured_stamps[topic] = self._measured_stamps.get(topic), stamp
        return stamp == 0 or stamp != before

    def _on_heartbeat(self, message: Header) -> None:
        if self._awake():
            self._send(self.guard.on_heartbeat(message.frame_id, self.clock_ns()))

    def _on_joints(self, topic: str, rank: int, message: JointState) -> None:
        if self._awake() and self._news(topic, message):
            self.guard.on_joint_states(dict(zip(message.name, message.position, strict=True)), self.clock_ns(), rank)

    def _on_pose(self, message: PoseStamped) -> None:
        frame = message.header.frame_id
        if frame and frame != self.robot.frames.base:
            raise WireError(f"frame {frame!r}; the robot description says {self.robot.frames.base!r}")
        if self._awake() and self._news("tool_pose", message):
            self.guard.on_tool_pose(conversion.pose_vector(message), self.clock_ns())

    def _on_wrench(self, message: WrenchStamped) -> None:
        self._send(self.guard.on_wrench(conversion.wrench_vector(message), self.clock_ns()))

    def _on_operator(self, message: DiagnosticArray) -> None:
        states = conversion.read_records(message, OperatorState)
        if states and self._awake():  # one record a device: any of them may be the one that is held
            held = any(s.engaged and s.deadman for s in states)
            self.guard.on_operator(any(s.engaged for s in states), held, self.clock_ns())

    def _on_episode(self, message: DiagnosticArray) -> None:
        for status in conversion.read_records(message, EpisodeStatus):
            if status.robot_hash:
                self._policy_hash = status.robot_hash

    def _on_estop_topic(self, message: Bool) -> None:
        self._estop_topic = bool(message.data)
        if message.data:  # false never clears
            self._send(self.guard.on_estop(self.clock_ns(), "e-stop topic"))

    # ---- services

    def _problems(self) -> list[str]:
        """Start checks that need the graph."""
        out = []
        if self._policy_hash and self._policy_hash != self.robot.hash:
            out.append(f"policy_node runs another robot description (hash {self._policy_hash}, here {self.robot.hash})")
        for command in self.robot.commands:
            if command.kind in ("gripper_action", "gripper_service"):
                continue
            publishers, subscribers = self.count_publishers(command.topic), self.count_subscribers(command.topic)
            if publishers != 1:
                out.append(f"{command.topic} has {publishers} publishers, only the guard may publish it")
            if subscribers < 1:
                out.append(f"nobody listens to {command.topic}: is the controller active?")
        if self._estop_topic:
            out.append("the topic estop is true")
        return out

    def _recent_problems(self) -> list[str]:
        """As of a tenth of a second ago at most: the graph is not asked at every tick."""
        now = time.monotonic()
        if now - self._asked > 0.1:
            self._asked, self._found = now, self._problems()
        return self._found

    def _on_arm(self, request: Any, response: Any) -> Any:
        now = self.clock_ns()
        if request.data:
            response.success, response.message = self.guard.arm(now, self._problems())
        else:
            self._send(self.guard.disarm(now))
            response.success, response.message = True, "disarmed"
        self._announce()
        return response

    def _on_estop_service(self, request: Any, response: Any) -> Any:
        self._send(self.guard.on_estop(self.clock_ns(), "e-stop service"))
        response.success, response.message = True, "e-stop latched"
        return response

    def _on_reset_estop(self, request: Any, response: Any) -> Any:
        problems = ["the topic estop is true"] if self._estop_topic else []
        response.success, response.message = self.guard.reset_estop(self.clock_ns(), problems)
        self._announce()
        return response

    # ---- what it says

    def _tick(self) -> None:
        now = time.monotonic()
        self._tick_late.append(abs(now - self._last_tick - 1.0 / self.parameters["tick_hz"]) * 1e3)
        self._last_tick = now
        self._awake()
        self._watch_clock()
        scale = self.parameters["speed_scale"]
        if scale != self.guard.config.speed_scale and not self.guard.armed:
            self.guard.set_speed_scale(scale)
        self.guard.set_hold_to_stop(self.parameters["hold_to_stop_s"])
        self._keep_awake()
        try:
            self._send(self.guard.tick(self.clock_ns(), self._recent_problems))
        except Exception as error:
            self.unforeseen("tick", error)

    def _keep_awake(self) -> None:
        """A late wake-up is a late command; a robot that is not armed has time."""
        wanted = self.guard.armed and self.parameters["keep_awake"] and self.real_time
        if wanted == self._awake_wanted:
            return
        self._awake_wanted = wanted
        if not self._processors.set(wanted) and wanted:
            self.get_logger().warning(f"processors may sleep and commands be late: {LATENCY} cannot be opened for writing")

    @property
    def real_time(self) -> bool:
        return getattr(self, "granted_priority", "").startswith("SCHED")

    def unforeseen(self, where: str, error: Exception) -> None:
        """Our own fault: stop, and leave it to the supervisor to start a fresh guard."""
        self._send(self.guard.stop("exception", f"{where}: {error!r}", self.clock_ns()))
        self._announce()
        raise error

    def _send(self, out: list[Sent]) -> None:
        for sent in out:
            stamp = self.now_ns() if sent.stamp_ns is None else sent.stamp_ns
            self._sinks[sent.channel].send(sent.vector, stamp)
        for sent in out:
            stamp = self.now_ns() if sent.stamp_ns is None else sent.stamp_ns
            self._executed[sent.channel].publish(self._hops[sent.channel].message(sent.vector, stamp))
        self._announce()

    def _announce(self) -> None:
        """Publish ``~/state`` when it changed."""
        g = self.guard
        seen = (g.level, g.armed, g.source, g.rule, g.estopped)
        if seen == self._announced:
            return
        if g.estopped and not (self._announced and self._announced[4]) and self._driver_stop is not None:
            if self._driver_stop.service_is_ready():
                self._driver_stop.call_async(Trigger.Request())  # never awaited
            else:
                self.get_logger().error(f"e-stop: {self.robot.safety.estop_service} of the driver is not there")
        moved = bool(self._announced) and (g.armed, g.estopped) != (self._announced[1], self._announced[4])
        if not self._announced or moved:
            self._keep()
            self.get_logger().info(g.reason)
        self._announced = seen
        record = GuardState(
            reason=g.reason, level=g.level, armed=g.armed, since_ns=self.now_ns(), robot_hash=self.robot.hash, source=g.source,
            rule=g.rule or None, counters=dict(g.counters),
        )  # fmt: skip
        level = {"ok": OK, "clamp": OK, "hold": WARN}.get(g.level, ERROR)
        self._state.publish(conversion.records_message([record], self.now_ns(), hardware_id=self.robot_id, level=level))

    def _publish_events(self) -> None:
        """What the rules did since the last time, one record a rule and channel, at 10 Hz at most."""
        now = self.now_ns()
        found = self.guard.events
        while found:
            event = found.popleft()
            _, count, first, _ = self._pending.get((event.rule, event.channel), (event, 0, now, now))
            self._pending[event.rule, event.channel] = (event, count + 1, first, now)
        if not self._pending:
            return
        records = [
            GuardEvent(
                rule=e.rule, channel=e.channel, count=count, first_ns=first, last_ns=last, joint=e.joint, wanted=e.wanted,
                sent=e.sent, limit=e.limit, text=e.text or None,
            )
            for e, count, first, last in self._pending.values()
        ]  # fmt: skip
        self._pending.clear()
        self._events.publish(conversion.records_message(records, now, hardware_id=self.robot_id))

    def _check_graph(self) -> None:
        """A second publisher on a controller topic while armed is a stop: two hands on one wheel."""
        if not self.guard.armed:
            return
        for command in self.robot.commands:
            if command.kind not in ("gripper_action", "gripper_service") and self.count_publishers(command.topic) > 1:
                why = f"{command.topic} has a second publisher"
                self._send(self.guard.stop("second_publisher", why, self.clock_ns()))
                return

    def _check(self) -> tuple[int, str, dict[str, Any]]:
        g = self.guard
        values: dict[str, Any] = {"level": g.level, "armed": g.armed, "source": g.source, "robot_hash": self.robot.hash}
        values["priority"] = getattr(self, "granted_priority", "") + (", processors awake" if self._processors.on else "")
        if self._latencies:
            values["hop_p99_ms"] = float(np.percentile(self._latencies, 99))
        if self._tick_late:
            values["tick_jitter_p99_ms"] = float(np.percentile(self._tick_late, 99))
        values |= {f"rule.{k}": v for k, v in g.counters.items()}
        return {"ok": OK, "clamp": OK, "hold": WARN}.get(g.level, ERROR), g.reason, values

    def close(self) -> None:
        self._send(self.guard.disarm(self.clock_ns()))
        self._keep()


def main(argv: Sequence[str] | None = None) -> int:
    return run(GuardNode, argv)


if __name__ == "__main__":
    sys.exit(main())
