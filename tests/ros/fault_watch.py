"""What an observer of a session sees: every command at the controllers with the time it was sent, states, episodes, diagnostics.

Times are wall-clock nanoseconds of the middleware's source timestamps, so that a late observer measures right all the same.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSDurabilityPolicy, QoSProfile, QoSReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import Float64MultiArray, Header

from robot_rl.robots import rotations as rot
from robot_rl.robots.description import RobotDescription, load_robot
from robot_rl.ros import conversion
from robot_rl.ros.commands import controller_type
from robot_rl.wire import EpisodeStatus, GuardState, WeightsNotice

MOVED_M, MOVED_RAD = 2e-4, 2e-3
"""Less than this from one command to the next is standing still."""
OLD_NS = 250_000_000
"""A command that reaches a controller with an older stamp is a replayed one."""
REST_S = 0.2
MS = 1e-6


def _profile(reliable: bool = True, latched: bool = False, depth: int = 2000) -> QoSProfile:
    return QoSProfile(
        depth=depth, reliability=QoSReliabilityPolicy.RELIABLE if reliable else QoSReliabilityPolicy.BEST_EFFORT,
        durability=QoSDurabilityPolicy.TRANSIENT_LOCAL if latched else QoSDurabilityPolicy.VOLATILE,
    )  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """One message: when it was sent, when it was received here (both wall clock, ns), and what it said."""

    sent_ns: int
    received_ns: int
    value: Any
    stamp_ns: int = 0


@dataclass
class Limits:
    """Commands that no guard should have let through, by what was wrong with them."""

    checked: int = 0
    wrong: list[str] = field(default_factory=list)


class Watch:
    """Listens to one robot's graph from a thread of its own.

    Args:
        sender_clock: the senders' clock is ours; otherwise times are those of reception here.
        wall_stamps: header stamps are wall time of this clock, so that old ones are seen as such.
        rate: simulated seconds a second.
    """

    def __init__(
        self, robot: str, namespace: str = "", *, sender_clock: bool = True, wall_stamps: bool = True, rate: float = 1.0
    ) -> None:
        self.sender_clock, self.wall_stamps, self.rate = sender_clock, wall_stamps, rate
        self.robot: RobotDescription = load_robot(robot)
        self.prefix = f"/{namespace}".rstrip("/")
        self.context = rclpy.Context()
        rclpy.init(context=self.context, signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node("fault_watch", context=self.context)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self.commands: dict[str, list[Seen]] = {}
        self.actions: list[Seen] = []
        self.heartbeats: list[Seen] = []
        self.guards: list[Seen] = []
        self.episodes: list[Seen] = []
        self.weights: list[Seen] = []
        self.measured: list[Seen] = []
        self.diagnostics: dict[str, Seen] = {}
        self.committed: dict[str, str] = {}
        self._clients: dict[str, Any] = {}
        self._subscribe()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, name="watch", daemon=True)
        self._thread.start()

    def _subscribe(self) -> None:
        for command in self.robot.commands:
            kind = controller_type(command)
            assert kind is not None
            box = self.commands.setdefault(command.channel, [])
            self.listen(kind, command.topic, box.append, _vector, _profile())
        first = self.robot.commands[0]
        self.listen(PoseStamped if first.kind == "pose" else controller_type(first), f"action/{first.channel}", self.actions.append,
                    _vector, _profile())  # fmt: skip
        self.listen(Header, "policy_node/heartbeat", self.heartbeats.append, lambda m: m.frame_id, _profile(reliable=False))
        self._records("guard_node/state", GuardState, self.guards.append)
        self._records("episode_status", EpisodeStatus, self._on_episode)
        self._records("weights", WeightsNotice, self.weights.append)
        if self.robot.feedback.tool_pose:
            self.listen(PoseStamped, self.robot.feedback.tool_pose, self.measured.append, _vector, _profile(reliable=False))
        self.listen(DiagnosticArray, "/diagnostics", self._on_diagnostics, lambda m: m, _profile())

    def listen(
        self, kind: Any, topic: str, keep: Callable[[Seen], Any], read: Callable[[Any], Any], profile: QoSProfile
    ) -> None:
        def take(message: Any, info: Any) -> None:
            header = message if isinstance(message, Header) else getattr(message, "header", None)
            stamp = 0 if header is None else conversion.from_stamp(header.stamp)
            now = time.time_ns()
            keep(Seen(int(info["source_timestamp"]) if self.sender_clock else now, now, read(message), stamp))

        where = topic if topic.startswith("/") else f"{self.prefix}/{topic}"
        self.node.create_subscription(kind, where, take, profile)

    def _records(self, topic: str, cls: type, keep: Callable[[Seen], Any]) -> None:
        def split(seen: Seen) -> None:
            for record in seen.value:
                keep(Seen(seen.sent_ns, seen.received_ns, record, seen.stamp_ns))

        def read(message: Any) -> list[Any]:
            try:
                return conversion.read_records(message, cls)
            except ValueError:
                return []  # garbage that a fault has published

        self.listen(DiagnosticArray, topic, split, read, _profile(latched=True, depth=100))

    def _on_episode(self, seen: Seen) -> None:
        self.episodes.append(seen)
        if seen.value.state == "committed":
            self.committed[seen.value.episode_id] = seen.value.store_uri or ""

    def _on_diagnostics(self, seen: Seen) -> None:
        for status in seen.value.status:
            self.diagnostics[status.name] = Seen(seen.sent_ns, seen.received_ns, status)

    def _spin(self) -> None:
        while not self._stop.is_set():
            try:
                self._executor.spin_once(timeout_sec=0.05)
            except rclpy._rclpy_pybind11.RCLError:
                continue  # garbage on a topic that is watched, too

    # ---- questions

    def until(self, condition: Callable[[], Any], patience_s: float, pause_s: float = 0.02) -> Any:
        """What the condition gave, or None when patience ran out."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(pause_s)
        return condition() or None

    def call(self, kind: Any, service: str, request: Any, patience_s: float = 60.0) -> Any:
        """The answer; asked again every three seconds, because DDS believes in killed servers for a while. Raises TimeoutError."""
        name = service if service.startswith("/") else f"{self.prefix}/{service}"
        client = self._clients.get(name) or self._clients.setdefault(name, self.node.create_client(kind, name))
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            if not self.until(client.service_is_ready, min(3.0, patience_s)):
                continue
            future = client.call_async(request)
            if self.until(future.done, 3.0, 0.005):
                return future.result()
            client.remove_pending_request(future)
        raise TimeoutError(f"{name} does not answer within {patience_s:.0f} s")

    @property
    def arm(self) -> list[Seen]:
        """Commands of the first channel at its controller."""
        return self.commands[self.robot.commands[0].channel]

    def level(self) -> str:
        return self.guards[-1].value.level if self.guards else ""

    def episode(self) -> EpisodeStatus | None:
        return self.episodes[-1].value if self.episodes else None

    def moves(self, since_ns: int, until_ns: int | None = None) -> list[Seen]:
        """Commands, of any channel, that differ from the one before, sent in the window."""
        out = []
        for box in self.commands.values():
            # The list grows meanwhile; a little before the window for the first difference.
            start = next((i for i in range(len(box) - 1, -1, -1) if box[i].sent_ns <= since_ns), 0)
            for before, now in zip(box[start:], box[start + 1 :], strict=False):
                if (
                    now.sent_ns > since_ns
                    and (until_ns is None or now.sent_ns <= until_ns)
                    and _differ(before.value, now.value)
                ):
                    out.append(now)
        return sorted(out, key=lambda s: s.sent_ns)

    def first_guard(self, since_ns: int, *levels: str) -> Seen | None:
        return next((s for s in list(self.guards) if s.sent_ns > since_ns and s.value.level in levels), None)

    def moving(self) -> bool:
        """An episode runs, the guard lets commands through, and they move."""
        now = time.time_ns()
        episode = self.episode()
        return (
            episode is not None and episode.state == "running" and self.level() in ("ok", "clamp")
            and len(self.moves(now - int(500_000_000 / self.rate))) >= 3
        )  # fmt: skip

    def longest_gap_s(self, since_ns: int, until_ns: int) -> float:
        """Between two commands at the first controller."""
        times = [s.sent_ns for s in list(self.arm) if since_ns - 200_000_000 <= s.sent_ns <= until_ns]
        return max((b - a for a, b in itertools.pairwise(times)), default=until_ns - since_ns) / 1e9

    def replayed(self, since_ns: int) -> int:
        """Commands at the first controller that answer a command of long ago."""
        return sum(
            self.wall_stamps and s.sent_ns > since_ns and s.stamp_ns > 0 and s.sent_ns - s.stamp_ns > OLD_NS
            for s in list(self.arm)
        )

    def says(self, node: str, text: str, since_ns: int) -> bool:
        """A diagnostics ERROR or WARN of this node, sent since then, that contains the text."""
        return any(
            s.sent_ns > since_ns and s.value.level in (b"\x01", b"\x02") and text in s.value.message
            for name, s in list(self.diagnostics.items())
            if name.startswith(f"{self.prefix}/{node}: ")
        )

    def figure(self, name: str, key: str) -> str:
        """A value in diagnostics, as text; empty where there is none."""
        seen = self.diagnostics.get(f"{self.prefix}/{name}")
        return "" if seen is None else next((kv.value for kv in seen.value.values if kv.key == key), "")

    def check_limits(self) -> Limits:
        """Every command at the controllers against the robot description's limits."""
        found = Limits()
        for command in self.robot.commands:
            box = list(self.commands[command.channel])
            found.checked += len(box)
            for i, seen in enumerate(box):
                before = box[i - 1] if i else None
                problem = (
                    self._pose_problem(before, seen) if command.kind == "pose" else self._joint_problem(command, before, seen)
                )
                if problem:
                    found.wrong.append(f"{command.channel} at {seen.sent_ns}: {problem}")
        return found

    def _pose_problem(self, before: Seen | None, now: Seen) -> str:
        tool, jump, v = self.robot.limits.tool, self.robot.limits.start_jump, now.value
        assert tool is not None
        if not np.isfinite(v).all() or abs(float(np.linalg.norm(v[3:])) - 1.0) > 1e-2:
            return f"no pose: {v.tolist()}"
        far = tool.linear_speed / self.robot.rates.command_hz
        wide = tool.angular_speed / self.robot.rates.command_hz
        box = tool.workspace
        if box is not None:
            outside = float(np.max(np.maximum(np.array(box.min) - v[:3], v[:3] - np.array(box.max))))
            if outside > 1e-3 and (before is None or _distance(before.value, v) > 1e-6):
                return f"{outside * 1e3:.1f} mm outside the workspace"
        if before is None or now.sent_ns - before.sent_ns > REST_S * 1e9 / self.rate:  # a start: from where the robot stands
            near = [m for m in self.measured[-100_000:] if abs(m.sent_ns - now.sent_ns) < 200_000_000]
            if near and min(_distance(m.value, v) for m in near) > jump.linear + far + 1e-6:
                return f"starts {min(_distance(m.value, v) for m in near) * 1e3:.0f} mm from where the tool is"
            return ""
        step, turn = _distance(before.value, v), _angle(before.value, v)
        if step > far * 1.001 + 1e-6 or turn > wide * 1.001 + 1e-6:
            return f"a step of {step * 1e3:.1f} mm and {turn:.3f} rad; accepted are {far * 1e3:.1f} mm and {wide:.3f} rad"
        return ""

    def _joint_problem(self, command: Any, before: Seen | None, now: Seen) -> str:
        for i, joint in enumerate(command.names):
            limit = self.robot.limits.joints[joint]
            value = float(now.value[i])
            if not limit.position[0] - 1e-6 <= value <= limit.position[1] + 1e-6:
                return f"{joint}={value}"
            far = limit.velocity / self.robot.rates.command_hz * 1.001 + 1e-6
            recent = before is not None and now.sent_ns - before.sent_ns < REST_S * 1e9
            if before is not None and recent and abs(value - before.value[i]) > far:
                return f"{joint} steps by {value - before.value[i]:.4f}"
        return ""

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2.0)
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def _vector(message: Any) -> np.ndarray:
    if isinstance(message, PoseStamped):
        return conversion.pose_vector(message)
    if isinstance(message, Float64MultiArray):
        return np.asarray(message.data, np.float64)
    return np.asarray(message.position, np.float64)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a[:3] - b[:3]))


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(rot.to_rotvec(rot.multiply(rot.same_sign(b[3:], a[3:]), rot.inverse(a[3:])))))


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return True
    if a.shape == (7,):
        return _distance(a, b) > MOVED_M or _angle(a, b) > MOVED_RAD
    return bool(np.max(np.abs(a - b)) > MOVED_M)
