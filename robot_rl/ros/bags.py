"""Anybody's ROS 2 bag as episodes, through a robot description. No rclpy: messages are read by ``rosbags``.

Observations are joined as the live graph joins them, driven by the bag's stamps: at every control period the newest complete
set of pictures within the tolerance, then every state that is the newest one not later; a source that is older than its
``max_age_s`` ends the episode there, as it would have held the robot.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robot_rl.replay.importers.base import FormatError, ImportSource, episode_id, provenance, unknown_outcome
from robot_rl.replay.importers.mcap import Bag, Options
from robot_rl.replay.importers.mcap_messages import picture, record_values, stamp_of
from robot_rl.robots import rotations as rot
from robot_rl.robots.channels import Channel, channels_of
from robot_rl.robots.description import StateSource, load_robot
from robot_rl.robots.pictures import shown
from robot_rl.types import Episode, EpisodeMeta


@dataclass
class Track:
    """One topic: stamps in order, and a value for each."""

    stamps: list[int] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def add(self, stamp: int, value: np.ndarray) -> None:
        at = bisect.bisect_right(self.stamps, stamp) if self.stamps and stamp < self.stamps[-1] else len(self.stamps)
        self.stamps.insert(at, stamp)
        self.values.insert(at, value)

    def index(self, time: int) -> int:
        """The newest entry not later than ``time``; -1 when there is none."""
        return bisect.bisect_right(self.stamps, time) - 1


@dataclass(frozen=True)
class Span:
    """One episode: from when to when, its id in the bag, and how it ended."""

    start: int
    end: int
    name: str = ""
    success: bool | None = None
    task: str = ""


def state_values(source: StateSource, message: Any) -> np.ndarray:
    """The numbers a description reads out of a message. Raises FormatError for joints that are missing."""
    kind, part = source.type, source.field
    if kind.endswith("JointState"):
        where = {n: i for i, n in enumerate(message.name)}
        missing = [n for n in source.names if n not in where]
        if missing:
            raise FormatError(f"{source.topic}: joints {missing} are missing; it has {sorted(where)}")
        values = getattr(message, part)
        return np.array([values[where[n]] for n in source.names], np.float64)
    if kind.endswith("PoseStamped"):
        p, q = message.pose.position, message.pose.orientation
        position, turn = np.array([p.x, p.y, p.z]), np.array([q.x, q.y, q.z, q.w])
        if part == "rot6d":
            return rot.to_rot6d(rot.normalized(turn))
        return {"position": position, "orientation": turn}.get(part, np.concatenate([position, turn]))
    if kind.endswith(("WrenchStamped", "TwistStamped")):
        body = message.wrench if kind.endswith("WrenchStamped") else message.twist
        first, second = (body.force, body.torque) if kind.endswith("WrenchStamped") else (body.linear, body.angular)
        a, b = np.array([first.x, first.y, first.z]), np.array([second.x, second.y, second.z])
        if part in ("force", "linear"):
            return a
        return b if part in ("torque", "angular") else np.concatenate([a, b])
    if kind.endswith("Joy"):
        return np.asarray(getattr(message, part), np.float64)
    return np.atleast_1d(np.asarray(message.data, np.float64))


def channel_vector(channel: Channel, type_name: str, message: Any) -> np.ndarray | None:
    """The channel vector of a command message; None where it carries none."""
    names = channel.command.names
    if type_name.endswith("PoseStamped"):
        p, q = message.pose.position, message.pose.orientation
        return np.array([p.x, p.y, p.z, q.x, q.y, q.z, q.w])
    if type_name.endswith("TwistStamped"):
        a, b = message.twist.linear, message.twist.angular
        return np.array([a.x, a.y, a.z, b.x, b.y, b.z])
    if type_name.endswith("JointTrajectory"):
        where = {n: i for i, n in enumerate(message.joint_names)}
        if not message.points or any(n not in where for n in names):
            return None
        return np.array([message.points[0].positions[where[n]] for n in names])
    if type_name.endswith("JointState"):
        where = {n: i for i, n in enumerate(message.name)}
        values = message.velocity if channel.kind == "joint_group_velocity" else message.position
        return None if any(n not in where for n in names) else np.array([values[where[n]] for n in names])
    if type_name.endswith("Float64MultiArray"):
        values = np.asarray(message.data, np.float64)
        return values if len(values) == channel.width else None
    return None


class RobotRecording:
    """One bag seen through one robot description."""

    def __init__(self, bag: Bag, options: Options) -> None:
        assert options.robot is not None
        self.bag, self.options, self.robot = bag, options, load_robot(options.robot)
        self.channels = channels_of(self.robot)
        self._prefix = f"/{options.namespace.strip('/')}/" if options.namespace.strip("/") else "/"
        self._states = {name: [(s, Track()) for s in sources] for name, sources in self.robot.states.items()}
        self._images = {name: (source, Track()) for name, source in self.robot.images.items()}
        self._commands: dict[str, Track] = {c.name: Track() for c in self.channels}
        self._command_topic: dict[str, str] = {}
        self._check()
        self._spans = self._read()

    def _topic(self, name: str) -> str:
        return self._prefix + name.strip("/")

    def _check(self) -> None:
        """Raises FormatError for topics that the description needs and the bag lacks or has with another type."""
        wrong = []
        for source in [s for sources in self.robot.states.values() for s in sources] + list(self.robot.images.values()):
            found = self.bag.topics.get(self._topic(source.topic))
            if found != source.type:
                wrong.append(f"{self._topic(source.topic)} ({source.type}" + (f", it has {found})" if found else ", missing)"))
        for channel in self.channels:
            for candidate in (f"executed/{channel.name}", channel.command.topic):
                if self._topic(candidate) in self.bag.topics:
                    self._command_topic[channel.name] = self._topic(candidate)
                    break
            else:
                wrong.append(f"{self._topic(f'executed/{channel.name}')} or {self._topic(channel.command.topic)} (missing)")
        if wrong:
            raise FormatError(
                f"{self.bag.path}: robot {self.robot.name!r} needs {'; '.join(wrong)}; the bag has {sorted(self.bag.topics)}"
            )

    def _read(self) -> list[Span]:
        """One pass over everything but pictures, of which only stamps are kept."""
        states = {self._topic(s.topic): [] for sources in self._states.values() for s, _ in sources}  # type: dict[str, list[Any]]
        for sources in self._states.values():
            for source, track in sources:
                states[self._topic(source.topic)].append((source, track))
        images = {self._topic(source.topic): track for source, track in self._images.values()}
        commands = {topic: name for name, topic in self._command_topic.items()}
        by_name = {c.name: c for c in self.channels}
        status = self._topic("episode_status")
        told: list[tuple[int, str, dict[str, str]]] = []
        wanted = [t for t in {*states, *images, *commands, status} if t in self.bag.topics]
        for topic, log_time, message in self.bag.messages(wanted):
            if topic in images:
                images[topic].add(stamp_of(message, log_time), np.zeros(0))
            if topic in commands:
                vector = channel_vector(by_name[commands[topic]], self.bag.topics[topic], message)
                if vector is not None:
                    self._commands[commands[topic]].add(stamp_of(message, log_time), vector)
            for source, track in states.get(topic, ()):
                track.add(stamp_of(message, log_time), state_values(source, message))
            if topic == status and (record := record_values(message, "episode")) is not None:
                told.append((stamp_of(message, log_time), *record))
        return self._episodes_told(told)

    def _episodes_told(self, told: list[tuple[int, str, dict[str, str]]]) -> list[Span]:
        tracks = [t for sources in self._states.values() for _, t in sources] + [t for _, t in self._images.values()]
        if any(not t.stamps for t in tracks):
            raise FormatError(f"{self.bag.path}: a topic of robot {self.robot.name!r} has no messages")
        first, last = max(t.stamps[0] for t in tracks), min(t.stamps[-1] for t in tracks)
        spans: list[Span] = []
        start: tuple[int, str] | None = None
        for stamp, name, values in told:
            state = values.get("state")
            if state == "running" and start is None:
                start = (max(int(values.get("started_ns", stamp)), first), name)
            elif state in ("ended", "aborted", "committed") and start is not None and name == start[1]:
                success = {"success": True, "failure": False}.get(values.get("outcome", ""))
                if state != "aborted":
                    spans.append(
                        Span(start[0], min(int(values.get("ended_ns", stamp)), last), name, success, values.get("task", ""))
                    )
                start = None
        return spans or [Span(first, last)]

    # ---- what importers offer

    def describe(self) -> ImportSource:
        wanted = self.options.select(range(len(self._spans)), self.bag.path)
        extra = {
            "control_hz": self.robot.rates.control_hz, "robot": self.robot.name, "robot_hash": self.robot.hash,
            "action_limits": "robot description", "commands": dict(self._command_topic),
        }  # fmt: skip
        return ImportSource(self.robot.features, self.robot.action_spec(), len(wanted), self.options.task or "", "mcap", extra)

    def episodes(self) -> Iterator[Episode]:
        for index in self.options.select(range(len(self._spans)), self.bag.path):
            episode = self._episode(index, self._spans[index])
            if episode is not None:
                yield episode

    def _episode(self, index: int, span: Span) -> Episode | None:
        period = int(1e9 / self.robot.rates.control_hz)
        ticks, sets = self._ticks(span, period)
        if len(ticks) < 2:
            return None
        length = len(ticks) - 1
        observations: dict[str, np.ndarray] = {}
        for name, sources in self._states.items():
            rows = []
            for tick, stamps in zip(ticks, sets, strict=True):
                limit = min([tick, *stamps.values()]) if self.robot.sync.state == "newest_not_after" and stamps else tick
                rows.append(np.concatenate([track.values[track.index(limit)] for _, track in sources]))
            observations[name] = np.asarray(rows, np.float32)
        observations |= self._pictures(sets)
        actions = self._actions(ticks, period)
        reward, terminated, truncated, success = unknown_outcome(length, self.options)
        if span.success is not None and not self.options.assume_success:
            success = span.success
            reward = np.zeros(length, np.float32)
            reward[-1] = float(span.success)
            terminated[-1], truncated[-1] = span.success, not span.success
        prefix = self.options.id_prefix if self.options.id_prefix is not None else self.bag.path.stem
        meta = EpisodeMeta(
            span.name if span.name and self.options.id_prefix is None else episode_id(prefix, index),
            task=self.options.task if self.options.task is not None else span.task, env_id=self.robot.name,
            stratum=self.options.stratum, success=success, control_hz=self.robot.rates.control_hz,  # type: ignore[arg-type]
            extra={"imported": provenance("mcap", self.bag.path.name, index), "robot_hash": self.robot.hash},
        )  # fmt: skip
        return Episode.from_arrays(
            meta, observations, actions, reward=reward, terminated=terminated, truncated=truncated,
            source=np.full(length, self.options.source_code), stamp_ns=np.asarray(ticks[:-1]),
        )  # fmt: skip

    def _ticks(self, span: Span, period: int) -> tuple[list[int], list[dict[str, int]]]:
        """Control instants, and the stamp of each camera's picture at each; stops where a source went stale."""
        ticks: list[int] = []
        sets: list[dict[str, int]] = []
        tolerance = int(self.robot.sync.tolerance_s * 1e9)
        tick = span.start
        while tick <= span.end:
            chosen = self._image_set(tick, tolerance)
            fresh = chosen is not None and all(
                (at := track.index(tick)) >= 0 and tick - track.stamps[at] <= source.max_age_s * 1e9
                for sources in self._states.values() for source, track in sources
            )  # fmt: skip
            if fresh and chosen is not None:
                fresh = all(tick - chosen[n] <= source.max_age_s * 1e9 for n, (source, _) in self._images.items())
            if fresh and chosen is not None:
                ticks.append(tick)
                sets.append(chosen)
            elif ticks:
                break
            tick += period
        return ticks, sets

    def _image_set(self, tick: int, tolerance: int) -> dict[str, int] | None:
        """The newest complete set of pictures not later than ``tick`` whose stamps lie within the tolerance."""
        if not self._images:
            return {}
        limit = tick
        for _ in range(200):
            found = {}
            for name, (_, track) in self._images.items():
                at = track.index(limit)
                if at < 0:
                    return None
                found[name] = track.stamps[at]
            if max(found.values()) - min(found.values()) <= tolerance:
                return found
            limit = max(found.values()) - 1  # the newest picture has no partner yet: look before it
        return None

    def _pictures(self, sets: list[dict[str, int]]) -> dict[str, np.ndarray]:
        if not self._images:
            return {}
        out = {name: np.zeros((len(sets), *source.shape), np.uint8) for name, (source, _) in self._images.items()}
        places: dict[tuple[str, int], list[int]] = {}
        for i, stamps in enumerate(sets):
            for name, stamp in stamps.items():
                places.setdefault((name, stamp), []).append(i)
        topics = {self._topic(source.topic): name for name, (source, _) in self._images.items()}
        for topic, log_time, message in self.bag.messages(list(topics)):
            name = topics[topic]
            rows = places.get((name, stamp_of(message, log_time)))
            if rows:
                out[name][rows] = self._shown(name, picture(message))
        return out

    def _shown(self, name: str, image: np.ndarray) -> np.ndarray:
        source = self._images[name][0]
        if image.shape[:2] != source.size:
            raise ValueError(
                f"{self._topic(source.topic)}: a picture of {image.shape[0]}x{image.shape[1]}; the robot description says "
                f"{source.size[0]}x{source.size[1]}"
            )
        return shown(np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image, source.crop, source.shown_size)

    def _actions(self, ticks: list[int], period: int) -> np.ndarray:
        """(L, A): of every step the last command before the next one; a channel that was silent repeats itself or is zero."""
        actions = np.zeros((len(ticks) - 1, self.robot.action_dim), np.float32)
        for channel in self.channels:
            track = self._commands[channel.name]
            for t, tick in enumerate(ticks[:-1]):
                now, before = track.index(tick + period - 1), track.index(tick - 1)
                if now < 0:
                    continue
                reference = track.values[before] if before >= 0 else track.values[now]
                part = channel.executed_action(track.values[now], reference)
                if part is not None:
                    actions[t, channel.slice] = part
        return actions
