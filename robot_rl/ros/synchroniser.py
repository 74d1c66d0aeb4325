"""Topics to one observation: newest complete set of pictures within a tolerance, states to match, ages and skews measured.

Callbacks store and return; nothing is decoded until it is used. Freshness is judged by the time since reception on the given
clock; header stamps order messages and join them.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped, TwistStamped, WrenchStamped
from sensor_msgs.msg import CompressedImage, Image, JointState, Joy
from std_msgs.msg import Bool, Float64, Float64MultiArray

from robot_rl.robots import rotations as rot
from robot_rl.robots.channels import Channel, channels_of
from robot_rl.robots.description import ImageSource, Qos, RobotDescription, StateSource
from robot_rl.robots.measured import MeasuredJoints
from robot_rl.robots.pictures import shown
from robot_rl.ros import conversion, qos
from robot_rl.types import Observation
from robot_rl.wire import WireError

TYPES: dict[str, type] = {
    "sensor_msgs/msg/JointState": JointState, "sensor_msgs/msg/Image": Image, "sensor_msgs/msg/CompressedImage": CompressedImage,
    "sensor_msgs/msg/Joy": Joy, "geometry_msgs/msg/PoseStamped": PoseStamped, "geometry_msgs/msg/WrenchStamped": WrenchStamped,
    "geometry_msgs/msg/TwistStamped": TwistStamped, "std_msgs/msg/Float64MultiArray": Float64MultiArray,
    "std_msgs/msg/Float64": Float64, "std_msgs/msg/Bool": Bool,
}  # fmt: skip
CLOCK_LIMIT_NS = 500_000_000
FROZEN_NS = 1_000_000_000
_VECTORS: dict[type, Callable[[Any], np.ndarray]] = {
    PoseStamped: conversion.pose_vector,
    WrenchStamped: conversion.wrench_vector,
    TwistStamped: conversion.twist_vector,
}


@dataclass(slots=True)
class Received:
    """One message: when it was acquired (ROS time) and when it arrived (the synchroniser's clock)."""

    message: Any
    stamp_ns: int
    arrived_ns: int


@dataclass(slots=True)
class Picture:
    """A camera's message that another process has decoded and made small already."""

    pixels: np.ndarray
    frozen: bool


class Stream:
    """The last messages of one topic, and how regularly they come."""

    def __init__(self, topic: str, keep: int, stamped: bool) -> None:
        self.topic, self.stamped = topic, stamped
        self.received: deque[Received] = deque(maxlen=keep)
        self.count = 0
        self.clock_off_ns = 0
        self.repeats = 0
        self._last_stamp = 0
        self._intervals: deque[int] = deque(maxlen=200)

    def add(self, message: Any, ros_ns: int, now_ns: int, stamp_ns: int | None = None) -> None:
        """Take a message, unless it bears the stamp of the one before: a driver that repeats itself has seen nothing new."""
        stamp = ros_ns
        if self.stamped:
            stamp = conversion.from_stamp(message.header.stamp) if stamp_ns is None else stamp_ns
            if stamp and stamp == self._last_stamp:  # 0: a driver that does not stamp
                self.repeats += 1
                return
            self._last_stamp = stamp
            off = stamp - ros_ns
            self.clock_off_ns = off if abs(off) > CLOCK_LIMIT_NS else 0
            if self.clock_off_ns:
                stamp = ros_ns  # a driver on another clock: reception only
        if self.received:
            self._intervals.append(now_ns - self.received[-1].arrived_ns)
        self.received.append(Received(message, stamp, now_ns))
        self.count += 1

    @property
    def newest(self) -> Received | None:
        return self.received[-1] if self.received else None

    def age_ns(self, now_ns: int) -> int | None:
        return None if not self.received else now_ns - self.received[-1].arrived_ns

    def figures(self, now_ns: int) -> dict[str, float]:
        """Rate, mean interval and its deviation (ms), age (ms), and how many messages repeated the stamp of the one before."""
        age = self.age_ns(now_ns)
        out = {"age_ms": float("nan") if age is None else age / 1e6, "repeats": float(self.repeats)}
        if self._intervals:
            intervals = np.array(self._intervals) / 1e6
            mean = float(intervals.mean())
            out |= {"hz": 1e3 / mean if mean > 0 else 0.0, "interval_ms": mean, "std_ms": float(intervals.std())}
        return out


@dataclass
class Snapshot:
    """What the robot sees now. ``problems`` non-empty: hold; ``observation`` is None until every source has arrived once."""

    observation: Observation | None
    stamp_ns: int
    problems: list[str] = field(default_factory=list)
    skew_ns: int = 0


class StateReader:
    """The numbers of one source out of its messages."""

    def __init__(self, source: StateSource) -> None:
        self.source = source
        self._joints = conversion.JointReader(source.names, source.field) if source.type.endswith("JointState") else None

    def __call__(self, message: Any) -> np.ndarray:
        """(width,) float64. Raises WireError for another frame, other joints or another size."""
        s = self.source
        if s.frame and message.header.frame_id != s.frame:
            raise WireError(f"{s.topic}: frame {message.header.frame_id!r}; the robot description says {s.frame!r}")
        if self._joints is not None:
            values = self._joints(message)
        elif type(message) in _VECTORS:
            values = _VECTORS[type(message)](message)
            values = self._part(values)
        elif isinstance(message, Joy):
            values = np.asarray(getattr(message, s.field), np.float64)
        else:
            values = np.atleast_1d(np.asarray(message.data, np.float64))
        if values.shape != (s.width,):
            raise WireError(f"{s.topic}: {values.size} values; the robot description says {s.width}")
        if not np.isfinite(values).all():
            raise WireError(f"{s.topic}: values are not finite")
        return values

    def _part(self, values: np.ndarray) -> np.ndarray:
        part = self.source.field
        if part in ("position", "force", "linear"):
            return values[:3]
        if part in ("orientation", "torque", "angular"):
            return values[3:]
        return rot.to_rot6d(rot.normalized(values[3:])) if part == "rot6d" else values


class Synchroniser:
    """Subscribes to everything a robot description observes and makes observations of it.

    Args:
        node: with ``listen`` (:mod:`robot_rl.ros.base`).
        clock: nanoseconds against which ages are judged: steady, or the ROS clock under ``use_sim_time``.
        pictures_elsewhere: another process listens to the cameras and hands pictures to :meth:`on_picture`.
    """

    def __init__(
        self, node: Any, robot: RobotDescription, clock: Callable[[], int], *, pictures_elsewhere: bool = False
    ) -> None:
        self.robot, self.clock = robot, clock
        self.node = node
        self.streams: dict[str, Stream] = {}
        self.subscriptions: list[Any] = []
        self._readers = {name: [StateReader(s) for s in sources] for name, sources in robot.states.items()}
        self._pictures: dict[str, tuple[int, np.ndarray]] = {}
        self._digests: dict[str, tuple[int, int, int]] = {}  # camera: digest, first arrival with it, last stamp
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self.on_anchor: Callable[[], None] | None = None
        self.anchor = ""
        self.repeated = 0
        self.skews: deque[int] = deque(maxlen=200)
        self._last_images: tuple[int, ...] = ()
        for sources in robot.states.values():
            for s in sources:
                self._listen(s.topic, s.type, s.qos, 64, s.stamped)
        for image in robot.images.values():
            if pictures_elsewhere:
                self.streams.setdefault(image.topic, Stream(image.topic, 5, True))
            else:
                self._listen(image.topic, image.type, image.qos, 5, True)
        self.anchor = self._anchor_topic()

    def _listen(self, topic: str, type_name: str, quality: Qos, keep: int, stamped: bool) -> None:
        if topic in self.streams:
            return
        stream = self.streams[topic] = Stream(topic, keep, stamped)
        profile = qos.profile(quality.reliability, quality.durability, quality.depth)

        def store(message: Any) -> None:
            with self._lock:
                stream.add(message, self.node.now_ns(), self.clock())
            self._tell(topic)

        self.subscriptions.append(self.node.listen(TYPES[type_name], topic, store, profile))

    def _tell(self, topic: str) -> None:
        if topic == self.anchor:
            self._arrived.set()
            if self.on_anchor is not None:
                self.on_anchor()

    def on_picture(self, topic: str, pixels: np.ndarray, stamp_ns: int, arrived_ns: int, frozen: bool) -> None:
        """A picture from the process that listens to the cameras; ``arrived_ns`` is when its message arrived there."""
        with self._lock:
            self.streams[topic].add(Picture(pixels, frozen), self.node.now_ns(), arrived_ns, stamp_ns)
        self._tell(topic)

    def close(self) -> None:
        for subscription in self.subscriptions:
            self.node.destroy_subscription(subscription)
        self.subscriptions.clear()

    def _anchor_topic(self) -> str:
        """The topic that sets the pace: the first camera, or the first stamped state."""
        if self.robot.sync.anchor == "images" and self.robot.images:
            return next(iter(self.robot.images.values())).topic
        stamped = [s.topic for sources in self.robot.states.values() for s in sources if s.stamped]
        return stamped[0] if stamped else next(iter(self.streams), "")

    def wait_for_anchor(self, older_than_ns: int, timeout_s: float) -> None:
        """Wait up to ``timeout_s`` for a fresh anchor when the newest one is older than that; for a tick right behind a driver."""
        age = self.streams[self.anchor].age_ns(self.clock()) if self.anchor in self.streams else None
        if age is not None and age > older_than_ns and timeout_s > 0:
            self._arrived.clear()
            self._arrived.wait(timeout_s)

    def forget(self) -> None:
        """After a jump of the clock: everything received belongs to another time."""
        with self._lock:
            for stream in self.streams.values():
                stream.received.clear()
            self._pictures.clear()
            self._digests.clear()

    # ---- one observation

    def snapshot(self) -> Snapshot:
        """The present observation; what is missing, stale, frozen or unreadable is named in ``problems``."""
        now = self.clock()
        with self._lock:
            problems = self._ages(now)
            images, skew, problem = self._image_set()
            if problem:
                problems.append(problem)
            limit = min((r.stamp_ns for r in images.values()), default=None)
            states = self._states(limit)
        missing = [t for t, s in self.streams.items() if not s.received]
        if missing:
            return Snapshot(None, 0, [f"nothing received yet on {', '.join(missing)}"])
        observation: Observation = {}
        try:
            for name in self.robot.observations:
                if name in images:
                    observation[name] = self._picture(name, self.robot.images[name], images[name], now, problems)
                else:
                    readers = self._readers[name]
                    parts = [reader(found.message) for reader, found in zip(readers, states[name], strict=True)]
                    observation[name] = np.concatenate(parts).astype(np.float32)
        except (WireError, ValueError) as error:
            return Snapshot(None, 0, [*problems, str(error)])
        except KeyError as error:
            return Snapshot(None, 0, [*problems, f"no complete set of pictures yet: {error}"])
        stamps = (
            [r.stamp_ns for r in images.values()]
            if images
            else [found.stamp_ns for parts in states.values() for found in parts]
        )
        self.skews.append(skew)
        used = tuple(sorted(r.stamp_ns for r in images.values()))
        self.repeated += bool(used) and used == self._last_images
        self._last_images = used
        return Snapshot(observation, min(stamps), problems, skew)

    def _ages(self, now_ns: int) -> list[str]:
        out = []
        limits: dict[str, float] = {}
        for sources in self.robot.states.values():
            for s in sources:
                limits[s.topic] = min(limits.get(s.topic, s.max_age_s), s.max_age_s)
        for image in self.robot.images.values():
            limits[image.topic] = image.max_age_s
        for topic, limit in limits.items():
            age = self.streams[topic].age_ns(now_ns)
            if age is not None and age > limit * 1e9:
                out.append(f"{topic} is {age / 1e6:.0f} ms old (accepted {limit * 1e3:.0f} ms)")
        return out

    def _image_set(self) -> tuple[dict[str, Received], int, str]:
        """(newest set within the tolerance, its skew, problem)."""
        cameras = list(self.robot.images.items())
        if not cameras or any(not self.streams[c.topic].received for _, c in cameras):
            return {}, 0, ""
        tolerance = self.robot.sync.tolerance_s * 1e9
        first, *others = cameras
        best: dict[str, Received] | None = None
        smallest = -1
        for anchor in reversed(self.streams[first[1].topic].received):
            chosen = {first[0]: anchor}
            for name, camera in others:
                chosen[name] = min(self.streams[camera.topic].received, key=lambda r: abs(r.stamp_ns - anchor.stamp_ns))
            stamps = [r.stamp_ns for r in chosen.values()]
            skew = max(stamps) - min(stamps)
            if skew <= tolerance:
                return chosen, skew, ""
            if best is None or skew < smallest:
                best, smallest = chosen, skew
        assert best is not None
        return best, smallest, f"no set of pictures within {tolerance / 1e6:.1f} ms (best {smallest / 1e6:.1f} ms)"

    def _states(self, limit_ns: int | None) -> dict[str, list[Received]]:
        out: dict[str, list[Received]] = {}
        bounded = limit_ns is not None and self.robot.sync.state == "newest_not_after"
        for name, sources in self.robot.states.items():
            found = []
            for s in sources:
                received = self.streams[s.topic].received
                if not received:
                    continue
                if bounded:
                    assert limit_ns is not None
                    found.append(next((r for r in reversed(received) if r.stamp_ns <= limit_ns), received[0]))
                else:
                    found.append(received[-1])
            out[name] = found
        return out

    def _picture(self, name: str, source: ImageSource, found: Received, now_ns: int, problems: list[str]) -> np.ndarray:
        if isinstance(found.message, Picture):
            if found.message.frozen:
                problems.append(f"{source.topic} is frozen: its stamps advance, its pixels do not")
            return found.message.pixels
        cached = self._pictures.get(name)
        if cached is not None and cached[0] == found.stamp_ns:
            return cached[1]
        if isinstance(found.message, Image):
            if (found.message.height, found.message.width) != source.size:
                raise WireError(
                    f"{source.topic}: {found.message.height}x{found.message.width}, the robot description says {source.size}"
                )
            picture = conversion.read_image(found.message)
        else:
            picture = conversion.read_compressed(found.message, source.size)
        if self.robot.sync.frozen_check:
            digest = zlib.crc32(picture[::64].tobytes())
            known = self._digests.get(name)
            if known is None or known[0] != digest:
                self._digests[name] = (digest, found.arrived_ns, found.stamp_ns)
            elif found.arrived_ns - known[1] > FROZEN_NS:
                problems.append(f"{source.topic} is frozen: its stamps advance, its pixels do not")
        small = shown(picture, source.crop, source.shown_size)
        self._pictures[name] = (found.stamp_ns, small)
        return small


class Feedback:
    """The measured state: joints, tool pose and wrench, for references, start checks and leashes."""

    def __init__(self, node: Any, robot: RobotDescription, clock: Callable[[], int]) -> None:
        self._node, self._clock = node, clock
        self.joints = MeasuredJoints({name for channel in channels_of(robot) for name in channel.command.names})
        self.pose: tuple[np.ndarray, int] | None = None
        self.subscriptions = []
        for rank, topic in enumerate(robot.joint_topics):
            self.subscriptions.append(node.listen(JointState, topic, partial(self._on_joints, rank), qos.SENSOR))
        if robot.feedback.tool_pose:
            self.subscriptions.append(node.listen(PoseStamped, robot.feedback.tool_pose, self._on_pose, qos.SENSOR))

    def _on_joints(self, rank: int, message: JointState) -> None:
        self.joints.update(dict(zip(message.name, message.position, strict=True)), self._clock(), rank)

    def _on_pose(self, message: PoseStamped) -> None:
        vector = conversion.pose_vector(message)
        if not np.isfinite(vector).all():
            raise WireError(f"tool pose {vector.tolist()}; accepted are finite numbers")
        self.pose = (vector, self._clock())

    def measured(self, channel: Channel, max_age_s: float = 0.25) -> np.ndarray | None:
        """Where a channel is, as a channel vector; None where that is unknown or older than ``max_age_s``."""
        oldest = self._clock() - int(max_age_s * 1e9)
        if channel.command.is_cartesian:
            return None if self.pose is None or self.pose[1] < oldest else self.pose[0]
        return self.joints.vector(channel.command.names, oldest)

    def close(self) -> None:
        for subscription in self.subscriptions:
            self._node.destroy_subscription(subscription)
        self.subscriptions.clear()
