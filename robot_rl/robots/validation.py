"""Everything that is wrong with a robot description, at once (section 4.4), and what is merely unwise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from robot_rl.config import Finding

if TYPE_CHECKING:
    from robot_rl.robots.description import Command, RobotDescription

_TOPIC = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_JOINT = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]{0,127}")


def findings(robot: RobotDescription) -> list[Finding]:
    """Every mistake; empty for a good description."""
    parts = (_head, _observations, _topics, _commands, _slices, _limits, _home)
    return [f for part in parts for f in part(robot)]


def warnings(robot: RobotDescription) -> list[str]:
    """What works but a robot engineer would not do."""
    out = []
    ratio = robot.rates.command_hz / robot.rates.control_hz
    if abs(ratio - round(ratio)) > 1e-6:
        out.append(f"rates: command_hz / control_hz = {ratio:g}; a whole number keeps rows and commands in step")
    for c in robot.commands:
        if c.kind.startswith("joint_group") and robot.rates.command_hz < 100:
            out.append(
                f"commands.{c.channel}: {robot.rates.command_hz:g} Hz into a forward controller moves in steps; 100 Hz and more is advised"
            )
        if c.kind in ("joint_group_position", "pose", "joint_state") and not c.controller_timeout_s:
            out.append(
                f"commands.{c.channel}: its controller has no command timeout; if the guard dies the arm keeps its last target"
            )
        if c.kind == "joint_trajectory" and not c.controller_timeout_s:
            out.append(
                f"commands.{c.channel}: cmd_timeout of the trajectory controller is off by default; set it and controller_timeout_s"
            )
    for name, sources in robot.states.items():
        for s in sources:
            if s.hz > 200 and s.type.endswith("JointState"):
                out.append(
                    f"observations.{name}: {s.topic} at {s.hz:g} Hz costs a quarter of a core in rclpy; publish a slower copy"
                )
    return out


def _head(robot: RobotDescription) -> Iterator[Finding]:
    from robot_rl.robots.description import SCHEMA

    if robot.schema != SCHEMA:
        yield Finding("schema", robot.schema, f"accepted is {SCHEMA}")
    if not _NAME.fullmatch(robot.name):
        yield Finding("name", robot.name, "accepted are lower-case letters, digits and underscores")
    if robot.rates.command_hz < robot.rates.control_hz:
        yield Finding(
            "rates.command_hz", robot.rates.command_hz, f"accepted is control_hz ({robot.rates.control_hz:g}) or more"
        )


def _observations(robot: RobotDescription) -> Iterator[Finding]:
    from robot_rl.robots.description import STATE_FIELDS

    if not robot.observations:
        yield Finding("observations", {}, "at least one feature is needed")
    for name, sources in robot.states.items():
        where = f"observations.{name}"
        if not sources:
            yield Finding(where, [], "at least one source is needed")
        seen: set[str] = set()
        for i, s in enumerate(sources):
            key = f"{where}.{i}"
            fields = STATE_FIELDS.get(s.type)
            if fields is None:
                yield Finding(f"{key}.type", s.type, f"accepted are {', '.join(STATE_FIELDS)}")
            elif s.field not in fields:
                yield Finding(f"{key}.field", s.field, f"accepted for {s.type} are {', '.join(fields)}")
            elif not s.width:
                yield Finding(f"{key}.names", list(s.names), "one name for each value is needed")
            yield from _age(key, s.max_age_s, s.hz)
            for element in s.element_names:
                if element in seen:
                    yield Finding(f"{key}.names", element, "a name may come once in a feature")
                seen.add(element)
        if robot.sync.anchor == "state" and not any(s.stamped for s in sources):
            yield Finding("sync.anchor", "state", f"{name} has no stamped source; an unstamped one may not be the anchor")
    for name, image in robot.images.items():
        where = f"observations.{name}"
        if not name.startswith("observation.images."):
            yield Finding(where, name, "pictures are named observation.images.<camera>")
        for key in ("size", "resize"):
            value = getattr(image, key)
            if value is not None and not all(8 <= n <= 8192 for n in value):
                yield Finding(f"{where}.{key}", list(value), "accepted are [height, width] from 8 to 8192 pixels")
        if image.crop is not None:
            top, left, height, width = image.crop
            inside = top + height <= image.size[0] and left + width <= image.size[1]
            if min(top, left) < 0 or min(height, width) < 8 or not inside:
                yield Finding(
                    f"{where}.crop", list(image.crop),
                    f"accepted are [top, left, height, width] inside {image.size[0]}x{image.size[1]}, at least 8 pixels a side",
                )  # fmt: skip
        yield from _age(where, image.max_age_s, image.hz)
        if robot.sync.tolerance_s >= 1.0 / image.hz:
            yield Finding(
                "sync.tolerance_s", robot.sync.tolerance_s, f"accepted is less than one period of {name} ({1 / image.hz:g} s)"
            )


def _age(key: str, max_age_s: float, hz: float) -> Iterator[Finding]:
    if max_age_s < 1.5 / hz:
        yield Finding(
            f"{key}.max_age_s", max_age_s, f"accepted is at least 1.5 / hz = {1.5 / hz:g}; less would hold all the time"
        )


def _topics(robot: RobotDescription) -> Iterator[Finding]:
    types: dict[str, tuple[str, str]] = {}
    commanded: dict[str, str] = {}

    def check(key: str, topic: str, kind: str) -> Iterator[Finding]:
        if topic.startswith("/"):
            yield Finding(key, topic, "a relative name: a leading slash cannot be put in a namespace")
        elif not _TOPIC.fullmatch(topic):
            yield Finding(key, topic, "a relative topic name of letters, digits, underscores and slashes")
        elif topic in types and types[topic][1] != kind:
            yield Finding(key, topic, f"one type per topic: {types[topic][0]} reads it as {types[topic][1]}")
        else:
            types.setdefault(topic, (key, kind))

    for name, sources in robot.states.items():
        for i, s in enumerate(sources):
            yield from check(f"observations.{name}.{i}.topic", s.topic, s.type)
    for name, image in robot.images.items():
        yield from check(f"observations.{name}.topic", image.topic, image.type)
        if image.camera_info:
            yield from check(f"observations.{name}.camera_info", image.camera_info, "sensor_msgs/msg/CameraInfo")
    for key, kind in (
        ("joint_states", "sensor_msgs/msg/JointState"),
        ("tool_pose", "geometry_msgs/msg/PoseStamped"),
        ("wrench", "geometry_msgs/msg/WrenchStamped"),
    ):
        if topic := getattr(robot.feedback, key):
            yield from check(f"feedback.{key}", topic, kind)
    for i, c in enumerate(robot.commands):
        yield from check(f"commands.{i}.topic", c.topic, c.kind)
        if c.topic in commanded:
            yield Finding(f"commands.{i}.topic", c.topic, f"two commands never share a topic; {commanded[c.topic]} has it")
        commanded[c.topic] = c.channel


def _commands(robot: RobotDescription) -> Iterator[Finding]:
    from robot_rl.robots.description import JOINT_KINDS, LAYOUT_WIDTH, RUNAWAY_KINDS

    seen: set[str] = set()
    moved: dict[str, str] = {}
    if not robot.commands:
        yield Finding("commands", [], "at least one channel is needed")
    for i, c in enumerate(robot.commands):
        key = f"commands.{i}"
        if not _NAME.fullmatch(c.channel) or c.channel in seen:
            yield Finding(f"{key}.channel", c.channel, "a name of lower-case letters, digits and underscores, once each")
        seen.add(c.channel)
        first, end = c.action.slice
        if not 0 <= first < end:
            yield Finding(f"{key}.action.slice", [first, end], "accepted is [first, end) with 0 <= first < end")
            continue
        if c.is_cartesian:
            width = LAYOUT_WIDTH[c.action.layout]
            if c.action.width != width:
                yield Finding(f"{key}.action.slice", [first, end], f"layout {c.action.layout} has {width} numbers")
            if c.action.layout in ("xyz_quat", "xyz_rot6d") and (c.action.mode == "delta" or c.kind == "twist"):
                yield Finding(f"{key}.action.layout", c.action.layout, "deltas and twists are xyz, xyz_yaw or xyz_rotvec")
            if not (c.frame or robot.frames.base):
                yield Finding(f"{key}.frame", "", "the frame of a Cartesian command is part of its meaning")
        else:
            if len(c.names) != c.action.width:
                yield Finding(
                    f"{key}.names", list(c.names), f"one joint for each of the {c.action.width} dimensions of its slice"
                )
            for joint in c.names:
                if not _JOINT.fullmatch(joint):
                    yield Finding(f"{key}.names", joint, "a joint name")
                if joint in moved:
                    yield Finding(f"{key}.names", joint, f"a joint is moved by one channel; {moved[joint]} moves it")
                moved[joint] = c.channel
            for joint in c.action.gripper:
                if joint not in c.names:
                    yield Finding(f"{key}.action.gripper", joint, f"accepted are {', '.join(c.names)}")
        if c.kind not in JOINT_KINDS and not c.is_cartesian and c.action.width != 1:
            yield Finding(f"{key}.action.slice", [first, end], "a gripper channel has one dimension")
        if c.kind in RUNAWAY_KINDS and not c.controller_timeout_s and not c.accept_no_controller_timeout:
            yield Finding(
                f"{key}.controller_timeout_s", c.controller_timeout_s,
                "a dead guard would leave the arm moving: give the controller's own timeout, or accept_no_controller_timeout: true",
            )  # fmt: skip
        if c.is_gripper and c.kind != "gripper_position" and (c.action.open is None or c.action.closed is None):
            yield Finding(f"{key}.action", {"open": c.action.open, "closed": c.action.closed}, "open and closed are needed")
        if c.kind == "gripper_service" and not c.close_topic:
            yield Finding(f"{key}.close_topic", "", "the service that closes is needed; `topic` is the one that opens")
        if c.action.interpolate == "slerp" and c.kind != "pose":
            yield Finding(f"{key}.action.interpolate", "slerp", "accepted for this kind are linear, hold")


def _slices(robot: RobotDescription) -> Iterator[Finding]:
    owner: dict[int, str] = {}
    for i, c in enumerate(robot.commands):
        for dim in range(*c.action.slice):
            if dim in owner:
                yield Finding(
                    f"commands.{i}.action.slice", list(c.action.slice), f"dimension {dim} already drives {owner[dim]}"
                )
            owner[dim] = c.channel
    missing = sorted(set(range(robot.action_dim)) - set(owner))
    if missing:
        yield Finding("commands", missing, "slices cover 0..A-1 once each; these dimensions drive nothing")


def _numbers(robot: RobotDescription, c: Command) -> Iterator[tuple[str, str, Any]]:
    for joint in c.names:
        for key in ("open", "closed"):
            value = getattr(c.action, key)
            if value is not None:
                yield f"action.{key}", joint, value


def _limits(robot: RobotDescription) -> Iterator[Finding]:
    limits = robot.limits
    cartesian = any(c.is_cartesian for c in robot.commands)
    for i, c in enumerate(robot.commands):
        if c.is_cartesian:
            continue
        for joint in c.names:
            if joint not in limits.joints:
                yield Finding(
                    f"limits.joints.{joint}",
                    None,
                    f"commands.{i} moves it: position, velocity, acceleration and jerk are needed",
                )
            elif c.kind == "joint_group_effort" and limits.joints[joint].effort is None:
                yield Finding(f"limits.joints.{joint}.effort", None, f"commands.{i} sends efforts: the largest one is needed")
        for key, joint, value in _numbers(robot, c):
            if joint in limits.joints and c.kind not in ("joint_group_velocity", "joint_group_effort"):
                low, high = _room(robot, joint)
                if not low <= value <= high:
                    yield Finding(
                        f"commands.{i}.{key}", value, f"inside the limits of {joint} minus margin: [{low:g}, {high:g}]"
                    )
    for joint, limit in limits.joints.items():
        low, high = limit.position
        if not low < high:
            yield Finding(f"limits.joints.{joint}.position", [low, high], "accepted is [low, high] with low < high")
        elif limits.margin_of(joint) >= (high - low) / 2:
            yield Finding(
                f"limits.joints.{joint}.margin",
                limits.margin_of(joint),
                f"accepted is less than half the range ({(high - low) / 2:g})",
            )
    if limits.tool is not None and not cartesian and robot.kinematics is None:
        yield Finding("limits.tool", None, "a pose or twist channel, or kinematics, is needed to know where the tool is")
    if limits.tool is None and any(c.kind in ("pose", "twist") for c in robot.commands):
        yield Finding("limits.tool", None, "a pose or twist channel needs the tool's limits")
    if any(c.kind == "pose" for c in robot.commands) and not robot.feedback.tool_pose:
        yield Finding(
            "feedback.tool_pose", "", "a pose channel needs the measured pose, else its first command cannot be checked"
        )
    if limits.wrench is not None and not robot.feedback.wrench:
        yield Finding("feedback.wrench", "", "limits.wrench needs the topic of the measured wrench")
    if any(not c.is_cartesian for c in robot.commands) and not robot.feedback.joint_states:
        yield Finding(
            "feedback.joint_states", "", "joint channels need the measured joints, else the first command cannot be checked"
        )
    if limits.tool is not None:
        boxes = [("workspace", limits.tool.workspace)] if limits.tool.workspace else []
        boxes += [(f"keep_out.{i}", b) for i, b in enumerate(limits.tool.keep_out)]
        for key, box in boxes:
            if box is not None and not all(a < b for a, b in zip(box.min, box.max, strict=True)):
                yield Finding(f"limits.tool.{key}", [list(box.min), list(box.max)], "accepted is min < max on every axis")
            if box is not None and box.frame not in ("", robot.frames.base):
                yield Finding(f"limits.tool.{key}.frame", box.frame, f"accepted is the base frame {robot.frames.base!r}")


def _room(robot: RobotDescription, joint: str) -> tuple[float, float]:
    low, high = robot.limits.joints[joint].position
    margin = robot.limits.margin_of(joint)
    return low + margin, high - margin


def _home(robot: RobotDescription) -> Iterator[Finding]:
    channels = {c.channel: c for c in robot.commands}
    for channel, values in robot.home.items():
        if channel not in channels:
            yield Finding(f"home.{channel}", list(values), f"accepted are the channels {', '.join(channels)}")
            continue
        c = channels[channel]
        wanted = 7 if c.is_cartesian else len(c.names)
        if len(values) != wanted:
            yield Finding(f"home.{channel}", list(values), f"{wanted} values are needed")
        elif not c.is_cartesian:
            for joint, value in zip(c.names, values, strict=True):
                if joint in robot.limits.joints:
                    low, high = _room(robot, joint)
                    if not low <= value <= high:
                        yield Finding(f"home.{channel}", value, f"{joint} inside its limits minus margin: [{low:g}, {high:g}]")
