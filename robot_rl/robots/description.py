"""A robot in one YAML file: which topics are observations, which are commands, limits, rates, frames (section 4 of the ROS
specification). Units are SI; sizes are [height, width]; joints are matched by name, never by index.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Literal

import numpy as np

from robot_rl.config import ConfigError, config_hash, load, option
from robot_rl.types import OBSERVATION_IMAGES, ActionSpec, FeatureSpec

SCHEMA = 1

STATE_FIELDS: dict[str, dict[str, int]] = {
    "sensor_msgs/msg/JointState": {"position": 0, "velocity": 0, "effort": 0},  # 0: one value a name
    "geometry_msgs/msg/PoseStamped": {"position": 3, "orientation": 4, "pose": 7, "rot6d": 6},
    "geometry_msgs/msg/WrenchStamped": {"force": 3, "torque": 3, "wrench": 6},
    "geometry_msgs/msg/TwistStamped": {"linear": 3, "angular": 3, "twist": 6},
    "std_msgs/msg/Float64MultiArray": {"data": 0},
    "std_msgs/msg/Float64": {"data": 1},
    "std_msgs/msg/Bool": {"data": 1},
    "sensor_msgs/msg/Joy": {"axes": 0, "buttons": 0},
}
"""Accepted state messages, their fields, and how many numbers each field has."""

UNSTAMPED = ("std_msgs/msg/Float64MultiArray", "std_msgs/msg/Float64", "std_msgs/msg/Bool")
ENCODINGS = ("rgb8", "bgr8", "mono8", "16UC1")
JOINT_KINDS = ("joint_group_position", "joint_group_velocity", "joint_group_effort", "joint_trajectory", "joint_state")
GRIPPER_KINDS = ("gripper_position", "gripper_action", "gripper_service")
RUNAWAY_KINDS = ("joint_group_velocity", "joint_group_effort", "twist")
"""Without new commands these keep moving; the controller must have a timeout of its own."""

Kind = Literal[
    "joint_group_position", "joint_group_velocity", "joint_group_effort", "joint_trajectory", "joint_state", "twist", "pose",
    "gripper_position", "gripper_action", "gripper_service",
]  # fmt: skip
Layout = Literal["xyz", "xyz_yaw", "xyz_rotvec", "xyz_quat", "xyz_rot6d"]
LAYOUT_WIDTH = {"xyz": 3, "xyz_yaw": 4, "xyz_rotvec": 6, "xyz_quat": 7, "xyz_rot6d": 9}


@dataclass(frozen=True)
class Qos:
    reliability: Literal["reliable", "best_effort"] = "best_effort"
    durability: Literal["volatile", "transient_local"] = "volatile"
    depth: int = option(5, ge=1, le=1000)


@dataclass(frozen=True)
class Frames:
    base: str = "base_link"
    tool: str = "tool0"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """``control_hz``: policy rows per second; ``command_hz``: commands per second."""

    control_hz: float = option(ge=1.0, le=100.0)
    command_hz: float = option(ge=20.0, le=500.0)


@dataclass(frozen=True, kw_only=True)
class StateSource:
    """Numbers of one topic that become part of a vector feature.

    Attributes:
        source: name of this part; prefix of its element names unless these are joints.
        names: joints (JointState), or names of the elements of an array without names.
        hz, max_age_s: what the driver promises; older than ``max_age_s`` since reception means hold.
        frame: a stamped geometry message must carry this ``frame_id``; empty: not checked.
    """

    source: str
    topic: str
    type: str
    field: str = "position"
    names: tuple[str, ...] = ()
    hz: float = option(ge=0.1, le=5000.0)
    max_age_s: float = option(gt=0.0, le=60.0)
    frame: str = ""
    qos: Qos = Qos()

    @property
    def width(self) -> int:
        return STATE_FIELDS.get(self.type, {}).get(self.field, 0) or len(self.names)

    @property
    def stamped(self) -> bool:
        return self.type not in UNSTAMPED

    @property
    def element_names(self) -> tuple[str, ...]:
        if len(self.names) == self.width:
            return self.names if self.field == "position" else tuple(f"{n}_{self.field}" for n in self.names)
        return tuple(f"{self.source}_{i}" for i in range(self.width))


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A camera: raw or compressed pictures of ``size``, of which the policy is shown ``crop`` [top, left, height, width] (or all) as
    ``resize`` (or as cropped), RGB."""

    topic: str
    type: Literal["sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"]
    size: tuple[int, int]
    hz: float = option(ge=0.1, le=500.0)
    max_age_s: float = option(gt=0.0, le=60.0)
    encoding: Literal["rgb8", "bgr8", "mono8", "16UC1"] = "rgb8"
    crop: tuple[int, int, int, int] | None = None
    resize: tuple[int, int] | None = None
    camera_info: str = ""
    frame: str = ""
    qos: Qos = Qos()

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.shown_size, 3

    @property
    def shown_size(self) -> tuple[int, int]:
        return self.resize or (self.size if self.crop is None else (self.crop[2], self.crop[3]))


@dataclass(frozen=True)
class Sync:
    """How messages become one observation: the newest complete image set within ``tolerance_s``, then for each state the newest
    not later than the set's oldest image (``newest`` takes the newest of all)."""

    anchor: Literal["images", "state"] = "images"
    tolerance_s: float = option(0.0167, ge=0.0, le=1.0)
    state: Literal["newest_not_after", "newest"] = "newest_not_after"
    on_missing: Literal["hold"] = "hold"
    frozen_check: bool = True


@dataclass(frozen=True)
class Leash:
    """How far a commanded pose may run ahead of the measured one, so that pressing cannot wind up; 0: any distance."""

    linear: float = option(0.0, ge=0.0)
    angular: float = option(0.0, ge=0.0)


@dataclass(frozen=True, kw_only=True)
class ActionMap:
    """Which dimensions of the policy's action drive a channel, and how.

    Attributes:
        slice: [first, end) of the action vector.
        mode: ``delta`` is added to the last executed value; on a twist channel it is a displacement per control step.
        layout: what the numbers of a pose or twist channel are.
        gripper: joints of this channel that are grippers (never averaged between chunks).
        open, closed: of a gripper channel, in the action's unit.
        interpolate: between two rows; ``hold`` repeats the row.
        leash: of a delta pose.
    """

    slice: tuple[int, int]
    mode: Literal["absolute", "delta"] = "absolute"
    layout: Layout = "xyz_quat"
    gripper: tuple[str, ...] = ()
    open: float | None = None
    closed: float | None = None
    interpolate: Literal["linear", "hold", "slerp"] = "linear"
    leash: Leash = Leash()

    @property
    def width(self) -> int:
        return self.slice[1] - self.slice[0]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One controller topic. ``action/<channel>`` is what travels between policy and guard."""

    channel: str
    kind: Kind
    topic: str
    action: ActionMap
    names: tuple[str, ...] = ()
    frame: str = ""
    controller_timeout_s: float = option(0.0, ge=0.0, le=60.0)
    accept_no_controller_timeout: bool = False
    close_topic: str = ""  # gripper_service: `topic` opens, this one closes
    action_type: Literal["GripperCommand", "ParallelGripperCommand"] = "GripperCommand"
    max_effort: float = option(0.0, ge=0.0)
    trajectory_gripper: bool = False  # gripper_position: JointTrajectory instead of Float64MultiArray

    @property
    def is_gripper(self) -> bool:
        return self.kind in GRIPPER_KINDS

    @property
    def is_cartesian(self) -> bool:
        return self.kind in ("pose", "twist")


@dataclass(frozen=True, kw_only=True)
class JointLimits:
    position: tuple[float, float]
    velocity: float = option(ge=0.0)
    acceleration: float = option(ge=0.0)
    jerk: float = option(ge=0.0)
    effort: float | None = option(None, gt=0.0)  # of a joint_group_effort channel
    margin: float | None = option(None, ge=0.0)


@dataclass(frozen=True)
class Box:
    min: tuple[float, float, float]
    max: tuple[float, float, float]
    frame: str = ""


@dataclass(frozen=True)
class ToolLimits:
    """Of the tool in the base frame; ``keep_out`` boxes are never entered, ``margin`` is kept inside the workspace and outside
    these boxes, ``yaw`` bounds the turn about the vertical of a tool that points down."""

    linear_speed: float = option(0.25, ge=0.0)
    angular_speed: float = option(1.0, ge=0.0)
    margin: float = option(0.01, ge=0.0, le=0.2)
    yaw: tuple[float, float] | None = None
    workspace: Box | None = None
    keep_out: tuple[Box, ...] = ()


@dataclass(frozen=True)
class WrenchLimits:
    force: float = option(30.0, gt=0.0)
    torque: float = option(3.0, gt=0.0)
    filter_hz: float = option(20.0, gt=0.0)


@dataclass(frozen=True)
class TrackingLimits:
    position: float = option(0.10, gt=0.0)
    for_s: float = option(0.2, gt=0.0)


@dataclass(frozen=True)
class StartJump:
    """How far the first command of a motion may be from the measured state."""

    joint: float = option(0.05, gt=0.0)
    linear: float = option(0.02, gt=0.0)
    angular: float = option(0.10, gt=0.0)


@dataclass(frozen=True)
class Limits:
    joints: dict[str, JointLimits] = field(default_factory=dict)
    margin: float = option(0.02, ge=0.0)
    tool: ToolLimits | None = None
    wrench: WrenchLimits | None = None
    tracking: TrackingLimits | None = TrackingLimits()
    start_jump: StartJump = StartJump()
    gripper_toggles_per_s: int | None = option(2, ge=1)

    def margin_of(self, joint: str) -> float:
        own = self.joints[joint].margin
        return self.margin if own is None else own


@dataclass(frozen=True)
class Kinematics:
    """A MuJoCo model (below ``sim_assets/`` or a path) whose joints carry the robot's names."""

    model: str
    tool_body: str


@dataclass(frozen=True)
class Feedback:
    """Where guard and policy read the measured state from; empty: the robot has no such topic."""

    joint_states: str = "joint_states"
    tool_pose: str = ""
    wrench: str = ""


@dataclass(frozen=True)
class Safety:
    estop_service: str = ""
    on_policy_silence: Literal["hold"] = "hold"
    on_stop: Literal["hold_position"] = "hold_position"


@dataclass(frozen=True, kw_only=True)
class RobotDescription:
    """The whole file. Construction checks everything that parts cannot check alone and raises ConfigError with all findings."""

    schema: int
    name: str
    rates: Rates
    observations: dict[str, tuple[StateSource, ...] | ImageSource]
    commands: tuple[Command, ...]
    frames: Frames = Frames()
    joints: tuple[str, ...] = ()
    sync: Sync = Sync()
    limits: Limits = Limits()
    feedback: Feedback = Feedback()
    kinematics: Kinematics | None = None
    safety: Safety = Safety()
    home: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from robot_rl.robots.validation import findings

        found = findings(self)
        if found:
            raise ConfigError(found, f"robot {self.name!r}")

    # ---- what others need to know

    @cached_property
    def hash(self) -> str:
        """Changes when anything in the description does; equal files in other spelling hash equal."""
        return config_hash(self)

    @property
    def action_dim(self) -> int:
        return max((c.action.slice[1] for c in self.commands), default=0)

    @property
    def joint_topics(self) -> tuple[str, ...]:
        """Every topic that says where commanded joints are: the feedback's, then observations that hold some of them (``MeasuredJoints``)."""
        commanded = {j for c in self.commands for j in c.names}
        topics = [self.feedback.joint_states] if self.feedback.joint_states else []
        for sources in self.states.values():
            for s in sources:
                if s.type == "sensor_msgs/msg/JointState" and s.field == "position" and commanded & set(s.names):
                    topics.append(s.topic)
        return tuple(dict.fromkeys(topics))

    @property
    def images(self) -> dict[str, ImageSource]:
        return {k: s for k, s in self.observations.items() if isinstance(s, ImageSource)}

    @property
    def states(self) -> dict[str, tuple[StateSource, ...]]:
        return {k: s for k, s in self.observations.items() if not isinstance(s, ImageSource)}

    @property
    def features(self) -> dict[str, FeatureSpec]:
        """What the observations look like to a policy."""
        out: dict[str, FeatureSpec] = {}
        for name, source in self.observations.items():
            if isinstance(source, ImageSource):
                out[name] = FeatureSpec(source.shape, "uint8")
            else:
                names = tuple(n for s in source for n in s.element_names)
                out[name] = FeatureSpec((len(names),), "float32", names)
        return out

    @property
    def action_modes(self) -> tuple[str, ...]:
        """``absolute`` or ``delta`` of every action dimension."""
        modes = ["absolute"] * self.action_dim
        for c in self.commands:
            for i in range(*c.action.slice):
                modes[i] = c.action.mode
        return tuple(modes)

    def action_spec(self) -> ActionSpec:
        """The action as the limits describe it: for teleoperated recording, where no policy says how its action looks."""
        low, high = np.full(self.action_dim, -1.0), np.full(self.action_dim, 1.0)
        names, kinds = [f"a{i}" for i in range(self.action_dim)], ["continuous"] * self.action_dim
        for c in self.commands:
            first = c.action.slice[0]
            if c.is_cartesian:
                for i in range(c.action.width):
                    names[first + i] = f"{c.channel}_{i}"
                continue
            for i, joint in enumerate(c.names):
                limit, margin = self.limits.joints[joint], self.limits.margin_of(joint)
                low[first + i], high[first + i] = limit.position[0] + margin, limit.position[1] - margin
                names[first + i] = joint
                if c.is_gripper or joint in c.action.gripper:
                    kinds[first + i] = "gripper_continuous"
        return ActionSpec(tuple(low), tuple(high), tuple(names), tuple(kinds), self.action_modes)

    def policy_findings(self, features: dict[str, FeatureSpec], action: ActionSpec) -> list[str]:
        """Why a policy with these features and this action cannot drive this robot; empty when it can."""
        out = []
        mine = self.features
        for name, spec in features.items():
            if name not in mine:
                near = (
                    [n for n in mine if n.startswith(OBSERVATION_IMAGES)] if name.startswith(OBSERVATION_IMAGES) else list(mine)
                )
                out.append(
                    f"the policy reads {name}, which robot {self.name!r} does not observe; it has {', '.join(near) or 'none'}"
                )
            elif mine[name].shape != spec.shape:
                out.append(f"{name}: the policy reads shape {spec.shape}, robot {self.name!r} gives {mine[name].shape}")
            elif spec.names and mine[name].names and spec.names != mine[name].names:
                differ = next((a, b) for a, b in zip(spec.names, mine[name].names, strict=True) if a != b)
                out.append(
                    f"{name}: the policy reads {differ[0]!r} where robot {self.name!r} gives {differ[1]!r}; order matters"
                )
        if action.dim != self.action_dim:
            out.append(
                f"the policy's action has {action.dim} dimensions {action.names}, robot {self.name!r} takes {self.action_dim}"
            )
        elif action.mode != self.action_modes:
            out.append(
                f"the policy's action modes are {action.mode}, the commands of robot {self.name!r} say {self.action_modes}"
            )
        return out

    def with_rates(self, control_hz: float = 0.0, command_hz: float = 0.0) -> RobotDescription:
        """The same robot at other rates (0 keeps one); checked like a file."""
        rates = Rates(control_hz=control_hz or self.rates.control_hz, command_hz=command_hz or self.rates.command_hz)
        return self if rates == self.rates else replace(self, rates=rates)


def load_robot(name: str | PathLike[str]) -> RobotDescription:
    """A description by path or by its name in ``configs/robots/``.

    Raises:
        ConfigError: every mistake in it, with key, value and what would be accepted.
        FileNotFoundError: no such file; the message lists the shipped ones.
    """
    from robot_rl import paths

    text = str(name)
    if "/" not in text and not text.endswith((".yaml", ".yml")):
        folder = paths.find("configs", "robots")
        if not (folder / f"{text}.yaml").is_file():
            there = sorted(p.stem for p in folder.glob("*.yaml"))
            raise FileNotFoundError(f"robot {text!r} is not in configs/robots/; there are {', '.join(there)}")
        text = str(folder / f"{text}.yaml")
    return load(RobotDescription, text)
