"""Names of topics, services and nodes: the one table that nodes, tests, documentation and launch files share. No rclpy here.

Names are relative to the namespace; ``~/`` names belong to their node and are written here with the node's name in front, as
other nodes see them. ``<ch>`` stands for a command channel of the robot description.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from robot_rl.ros.parameters import (
    COMMON_PARAMETERS,
    GUARD_PARAMETERS,
    POLICY_PARAMETERS,
    SIM_PARAMETERS,
    Parameter,
)

# ---- topics

ACTION = "action"  # action/<ch>
EXECUTED = "executed"  # executed/<ch>
ACTION_CHUNK = "policy_node/action_chunk"
HEARTBEAT = "policy_node/heartbeat"
INTERVENTION = "policy_node/intervention"
INTERVENTION_STATE = "policy_node/intervention_state"
GUARD_STATE = "guard_node/state"
GUARD_EVENTS = "guard_node/events"
ESTOP = "estop"
OPERATOR_STATE = "operator/state"
OPERATOR_ACTION = "operator/action"  # operator/action/<ch>
EPISODE_STATUS = "episode_status"
REWARD_EVENTS = "reward/events"
REWARD_VALUE = "reward/value"
WEIGHTS = "weights"
METRICS = "learner_node/metrics"
SESSION_STATUS = "session_status"
TASK_STATE = "sim_node/task_state"
JOINT_STATES = "joint_states"
TOOL_POSE = "tool_pose"
WRENCH = "wrench"
CLOCK = "/clock"
DIAGNOSTICS = "/diagnostics"

# ---- services

START_EPISODE = "policy_node/start_episode"
CANCEL_EPISODE = "policy_node/cancel_episode"
END_EPISODE = "policy_node/end_episode"
UNDO_LABEL = "policy_node/undo_label"
SET_INTERVENTION = "policy_node/set_intervention"
HOLD = "policy_node/hold"
USE_BASE = "policy_node/use_base"
ARM = "guard_node/arm"
GUARD_ESTOP = "guard_node/estop"
RESET_ESTOP = "guard_node/reset_estop"
SIM_RESET = "sim_node/reset"
SIM_STEP = "sim_node/step"
SIM_PAUSE = "sim_node/set_pause"

# ---- message and service types, as the graph writes them

BOOL = "std_msgs/msg/Bool"
FLOAT64 = "std_msgs/msg/Float64"
HEADER = "std_msgs/msg/Header"
RECORDS = "diagnostic_msgs/msg/DiagnosticArray"
TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
TRIGGER = "std_srvs/srv/Trigger"
SET_BOOL = "std_srvs/srv/SetBool"
PER_ROBOT = "by robot description"
"""The type or quality of service that the robot description chooses."""


@dataclass(frozen=True)
class Topic:
    """One row: the name as others see it, its type, the profile of :mod:`robot_rl.ros.qos`, and what the stamp means."""

    name: str
    type: str
    qos: str
    stamp: str = ""


@dataclass(frozen=True)
class Service:
    name: str
    type: str
    meaning: str


@dataclass(frozen=True)
class NodeTable:
    """Everything a node declares."""

    name: str
    summary: str
    lifecycle: bool
    publishes: tuple[Topic, ...] = ()
    subscribes: tuple[Topic, ...] = ()
    services: tuple[Service, ...] = ()
    parameters: tuple[Parameter, ...] = field(default=())

    @property
    def all_parameters(self) -> tuple[Parameter, ...]:
        mine = {p.name for p in self.parameters}
        return tuple(p for p in COMMON_PARAMETERS if p.name not in mine) + self.parameters


TOPICS: dict[str, Topic] = {
    t.name: t
    for t in (
        Topic("action/<ch>", PER_ROBOT, "command", "when the command is due; equal on all channels of one tick"),
        Topic(
            "executed/<ch>", PER_ROBOT, "command", "copied from the command it answers; guard's clock when it acted by itself"
        ),
        Topic(ACTION_CHUNK, TRAJECTORY, "command", "the observation the chunk was computed from"),
        Topic(HEARTBEAT, HEADER, "latest", "send time; frame_id is the state"),
        Topic(INTERVENTION, BOOL, "state"),
        Topic(INTERVENTION_STATE, RECORDS, "state", "time of change"),
        Topic(GUARD_STATE, RECORDS, "state", "time of change"),
        Topic(GUARD_EVENTS, RECORDS, "event", "time of publication"),
        Topic(ESTOP, BOOL, "state"),
        Topic(OPERATOR_STATE, RECORDS, "command", "device stamp"),
        Topic("operator/action/<ch>", PER_ROBOT, "command", "device stamp"),
        Topic(EPISODE_STATUS, RECORDS, "state", "time of change"),
        Topic(REWARD_EVENTS, RECORDS, "event", "the observation that is rewarded"),
        Topic(REWARD_VALUE, FLOAT64, "event"),
        Topic(WEIGHTS, RECORDS, "state", "publication"),
        Topic(METRICS, RECORDS, "diag", "send time"),
        Topic(SESSION_STATUS, RECORDS, "state", "send time"),
        Topic(TASK_STATE, RECORDS, "event", "simulated acquisition"),
        Topic(DIAGNOSTICS, RECORDS, "diag", "send time"),
        Topic(CLOCK, "rosgraph_msgs/msg/Clock", "latest"),
        Topic(JOINT_STATES, "sensor_msgs/msg/JointState", "sensor", "simulated acquisition"),
        Topic(TOOL_POSE, "geometry_msgs/msg/PoseStamped", "sensor", "simulated acquisition"),
        Topic("<observation>", PER_ROBOT, "sensor", "acquisition"),
        Topic("<controller>", PER_ROBOT, "command", "trajectory: start time; others: copied"),
        Topic("<camera>/image_raw", "sensor_msgs/msg/Image", "sensor", "simulated acquisition"),
        Topic("<camera>/image_raw/compressed", "sensor_msgs/msg/CompressedImage", "sensor", "simulated acquisition"),
        Topic("<camera>/camera_info", "sensor_msgs/msg/CameraInfo", "sensor", "simulated acquisition"),
    )
}


def _topics(*names: str) -> tuple[Topic, ...]:
    return tuple(TOPICS[n] for n in names)


POLICY_NODE = NodeTable(
    "policy_node",
    "Hosts base policy, head, chunk scheduler, arbiter, safety filter, recording and weight swap.",
    lifecycle=True,
    publishes=_topics("action/<ch>", ACTION_CHUNK, HEARTBEAT, INTERVENTION, INTERVENTION_STATE, EPISODE_STATUS, DIAGNOSTICS),
    subscribes=_topics(
        "<observation>", OPERATOR_STATE, "operator/action/<ch>", "executed/<ch>", GUARD_STATE, GUARD_EVENTS, WEIGHTS,
        REWARD_EVENTS,
    ),
    services=(
        Service(START_EPISODE, TRIGGER, "begin an episode"),
        Service(CANCEL_EPISODE, TRIGGER, "abort the episode and mark it discarded"),
        Service(END_EPISODE, SET_BOOL, "end the episode; true = success, false = failure"),
        Service(UNDO_LABEL, TRIGGER, "revoke the last outcome label"),
        Service(SET_INTERVENTION, SET_BOOL, "request or release human control"),
        Service(HOLD, SET_BOOL, "hold in place; false = go on with a fresh chunk"),
        Service(USE_BASE, SET_BOOL, "act with the base policy until set false"),
    ),
    parameters=POLICY_PARAMETERS,
)  # fmt: skip

GUARD_NODE = NodeTable(
    "guard_node",
    "The last word before the controllers: limits, watchdogs, arming, e-stop; the only publisher on controller topics.",
    lifecycle=False,
    publishes=_topics("<controller>", "executed/<ch>", GUARD_STATE, GUARD_EVENTS, DIAGNOSTICS),
    subscribes=_topics("action/<ch>", HEARTBEAT, OPERATOR_STATE, "operator/action/<ch>", "<observation>", ESTOP),
    services=(
        Service(ARM, SET_BOOL, "true = run the start checks and let motion through; false = hold, then disarm"),
        Service(GUARD_ESTOP, TRIGGER, "latch the e-stop"),
        Service(RESET_ESTOP, TRIGGER, "clear the e-stop"),
    ),
    parameters=GUARD_PARAMETERS,
)

SIM_NODE = NodeTable(
    "sim_node",
    "A simulated task that behaves like a robot with its drivers.",
    lifecycle=False,
    publishes=_topics(
        "<observation>", JOINT_STATES, TOOL_POSE, "<camera>/image_raw", "<camera>/image_raw/compressed", "<camera>/camera_info",
        CLOCK, TASK_STATE, DIAGNOSTICS,
    ),
    subscribes=_topics("<controller>"),
    services=(
        Service(SIM_RESET, TRIGGER, "reset with parameter `seed`, which then counts up by one"),
        Service(SIM_STEP, TRIGGER, "one control step while paused"),
        Service(SIM_PAUSE, SET_BOOL, "pause physics and /clock"),
    ),
    parameters=SIM_PARAMETERS,
)  # fmt: skip

NODES: dict[str, NodeTable] = {n.name: n for n in (POLICY_NODE, GUARD_NODE, SIM_NODE)}
"""Tables by executable; other nodes add theirs in their own module."""
