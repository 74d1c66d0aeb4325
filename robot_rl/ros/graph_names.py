"""Names and parameters of the nodes beside the robot: learner, rewards, intervention, monitor. No rclpy here.

``ALL_NODES`` is the whole table: what nodes declare, what the documentation lists, what launch files may start.
"""

from __future__ import annotations

from robot_rl.ros.names import (
    DIAGNOSTICS,
    EPISODE_STATUS,
    ESTOP,
    GUARD_STATE,
    HEARTBEAT,
    INTERVENTION_STATE,
    METRICS,
    NODES,
    OPERATOR_STATE,
    RECORDS,
    REWARD_EVENTS,
    REWARD_VALUE,
    SESSION_STATUS,
    SET_BOOL,
    TASK_STATE,
    TOPICS,
    TRIGGER,
    WEIGHTS,
    NodeTable,
    Service,
    Topic,
)  # fmt: skip
from robot_rl.ros.parameters import CONFIGURE, FIXED, RUN_TIME, Parameter

DIAGNOSTICS_AGG = "diagnostics_agg"
TOPLEVEL = "diagnostics_toplevel_state"
JOY = "joy"
SPACENAV = "spacenav/twist_stamped"
LEADER = "leader/joint_states"
LEADER_COMMAND = "leader/command"
CONSOLE_JOY = "console/joy"
DEVICES = ("joy", "spacemouse", "leader", "keyboard", "console", "replay")

MORE_TOPICS: dict[str, Topic] = {
    t.name: t
    for t in (
        Topic(JOY, "sensor_msgs/msg/Joy", "latest", "device"),
        Topic(SPACENAV, "geometry_msgs/msg/TwistStamped", "latest", "device"),
        Topic(LEADER, "sensor_msgs/msg/JointState", "latest", "device"),
        Topic(LEADER_COMMAND, "sensor_msgs/msg/JointState", "command", "send time"),
        Topic(CONSOLE_JOY, "sensor_msgs/msg/Joy", "latest", "arrival at the page's server"),
        Topic(DIAGNOSTICS_AGG, RECORDS, "diag", "send time"),
        Topic(TOPLEVEL, "diagnostic_msgs/msg/DiagnosticStatus", "diag"),
    )
}
ALL_TOPICS = {**TOPICS, **MORE_TOPICS}


def _topics(*names: str) -> tuple[Topic, ...]:
    return tuple(ALL_TOPICS[n] for n in names)


LEARNER_PARAMETERS = (
    Parameter("recipe", "", "configuration of the run: a name in configs/ or a path", CONFIGURE, required=True),
    Parameter("policy", "", "folder of the frozen base policy; empty: base in run_dir", CONFIGURE),
    Parameter("robots", ("",), "namespaces of the robots to learn from; empty string: this namespace", CONFIGURE),
    Parameter("stores", (), "episode stores to follow beside those of run_dir and of the robots that ship", CONFIGURE),
    Parameter("device", "auto", "torch device: auto, cpu, cuda, cuda:<n>", CONFIGURE),
    Parameter("publish_period_s", 10.0, "longest time between two publications", RUN_TIME, (0.5, 600.0)),
    Parameter("checkpoint_period_s", 60.0, "time between two checkpoints", RUN_TIME, (5.0, 3600.0)),
    Parameter("gate", True, "new versions must prove themselves before they act; false: every version acts", CONFIGURE),
    Parameter("update_ratio", 0.0, "updates an environment step; 0: the recipe's", RUN_TIME, (0.0, 64.0)),
    Parameter("http_bind", "127.0.0.1", "address of the endpoint for weights and episodes", FIXED),
    Parameter("http_port", 8765, "its port; 0: any free one", FIXED, (0, 65535)),
    Parameter("token_file", "", "file of mode 0600 with its bearer token; needed beyond loopback", FIXED),
    Parameter("min_free_gb", 2.0, "below this much free disk no episode is received", RUN_TIME, (0.1, 1000.0)),
    Parameter("nice", 10, "nice level to set at start", FIXED, (-20, 19)),
)


def _reward_parameters(*, vlm: bool) -> tuple[Parameter, ...]:
    common = (
        Parameter(
            "source", "", "reward source: a name in configs/rewards/, a path, or an installed kind", CONFIGURE, required=True
        ),
        Parameter("score", "frame", "what is scored", CONFIGURE, choices=("frame", "episode")),
        Parameter("rate_hz", 2.0, "most frames scored a second", RUN_TIME, (0.1, 30.0)),
        Parameter("max_age_s", 60.0 if vlm else 2.0, "older answers are kept for relabelling only", RUN_TIME, (0.1, 600.0)),
        Parameter("queue", 64 if vlm else 8, "frames or episodes that may wait; the oldest is dropped", CONFIGURE, (1, 256)),
        Parameter("deadline_s", 20.0 if vlm else 5.0, "an answer that takes longer is no answer", RUN_TIME, (0.1, 120.0)),
        Parameter("robot", "", "robot description, for frames; empty: the source reads none", CONFIGURE),
        Parameter("store", "", "episode store to read and to append to; empty: what episode_status says", CONFIGURE),
        Parameter("device", "auto", "torch device of the source's model", CONFIGURE),
        Parameter("nice", 5, "nice level to set at start", FIXED, (-20, 19)),
    )
    if not vlm:
        return common
    return (
        *common,
        Parameter("endpoint", "", "URL of the model server; empty: the source's", CONFIGURE),
        Parameter("model", "", "served model; empty: the source's", CONFIGURE),
        Parameter("max_qps", 2.0, "most requests a second", RUN_TIME, (0.01, 100.0)),
        Parameter("max_in_flight", 4, "most requests at once", CONFIGURE, (1, 64)),
        Parameter("cache", "readwrite", "use of the answer cache", CONFIGURE, choices=("off", "readwrite", "replay")),
    )


INTERVENTION_PARAMETERS = (
    Parameter("robot", "", "name in configs/robots/ or path of a robot description", FIXED, required=True),
    Parameter("devices", ("joy",), "devices to listen to", FIXED, choices=DEVICES),
    Parameter("rate_hz", 50.0, "rate of operator/state", FIXED, (20.0, 200.0)),
    Parameter("operator", "operator", "name of the person, for the record", RUN_TIME, max_length=60),
    Parameter("deadman_button", 5, "button that must be held", RUN_TIME, (0, 31)),
    Parameter("success_button", 0, "button that ends the episode as a success", RUN_TIME, (0, 31)),
    Parameter("failure_button", 1, "button that ends the episode as a failure", RUN_TIME, (0, 31)),
    Parameter("estop_button", 8, "button that latches the e-stop", RUN_TIME, (0, 31)),
    Parameter("gripper_button", 2, "button that opens and closes the gripper", RUN_TIME, (0, 31)),
    Parameter("deadband", 0.1, "motion below it is none", RUN_TIME, (0.0, 0.5)),
    Parameter(
        "latch_s", -1.0, "control is kept so long after the last input; negative: the device's own", RUN_TIME, (-1.0, 1.0)
    ),
    Parameter("linear_speed", 0.10, "m/s at full deflection", RUN_TIME, (0.005, 0.25)),
    Parameter("angular_speed", 0.5, "rad/s at full deflection", RUN_TIME, (0.05, 1.0)),
    Parameter("align_max_gap", 0.15, "an absolute device takes over only within this distance, rad", RUN_TIME, (0.02, 1.0)),
    Parameter("align_s", 2.0, "time over which an actuated leader is driven to the robot", RUN_TIME, (0.5, 10.0)),
    Parameter("twist_frame", "", "frame of twists; empty: the robot description's base", FIXED),
    Parameter(
        "rt_priority", 5, "SCHED_FIFO priority to ask for: a person who takes over must not wait; 0: none", FIXED, (0, 49)
    ),
    Parameter("replay_bag", "", "MCAP file whose gamepad the device replay plays, from its start in every episode", FIXED),
    Parameter("replay_topic", "/joy", "topic of that gamepad in the file", FIXED),
    Parameter("lerobot", "", "YAML file of a LeRobot teleoperator that is read instead of the topic of leader or joy", FIXED),
)

MONITOR_PARAMETERS = (
    Parameter("managed", ("reward_node", "learner_node", "policy_node"), "lifecycle nodes, in bring-up order", FIXED),
    Parameter("autostart", True, "configure and activate them at start", FIXED),
    Parameter("configure_timeout_s", 60.0, "longest time a node may take to configure", FIXED, (5.0, 600.0)),
    Parameter("silence_s", 4.0, "a node without diagnostics for so long is silent", RUN_TIME, (1.0, 60.0)),
    Parameter("max_restarts", 3, "bring-ups of one node within 60 s", RUN_TIME, (0, 100)),
    Parameter("expected", (), "topics that must have a publisher", FIXED),
)

LEARNER_NODE = NodeTable(
    "learner_node",
    "Tails episode stores, trains in a child process, publishes weights, metrics and the gate's state; HTTP endpoint.",
    lifecycle=True,
    publishes=_topics(WEIGHTS, METRICS, DIAGNOSTICS),
    subscribes=_topics(EPISODE_STATUS, REWARD_EVENTS),
    services=(
        Service("learner_node/checkpoint", TRIGGER, "write a checkpoint now"),
        Service("learner_node/promote", TRIGGER, "let the candidate act without further proof"),
        Service("learner_node/rollback", TRIGGER, "return to the version that acted before"),
        Service("learner_node/pause", SET_BOOL, "stop and resume gradient steps; stores are still tailed"),
    ),
    parameters=LEARNER_PARAMETERS,
)


def _reward_table(name: str, summary: str, parameters: tuple[Parameter, ...]) -> NodeTable:
    return NodeTable(
        name, summary, lifecycle=True,
        publishes=_topics(REWARD_EVENTS, REWARD_VALUE, DIAGNOSTICS),
        subscribes=_topics(EPISODE_STATUS, TASK_STATE, "<observation>"),
        services=(Service(f"{name}/score_last", TRIGGER, "score the last committed episode again"),),
        parameters=parameters,
    )  # fmt: skip


REWARD_NODE = _reward_table("reward_node", "Hosts a reward source.", _reward_parameters(vlm=False))
VLM_REWARD_NODE = _reward_table(
    "vlm_reward_node", "Hosts a reward source that asks a model server.", _reward_parameters(vlm=True)
)

INTERVENTION_NODE = NodeTable(
    "intervention_node",
    "Devices to take-over requests, operator commands, human rewards and the e-stop.",
    lifecycle=False,
    publishes=_topics(OPERATOR_STATE, "operator/action/<ch>", LEADER_COMMAND, REWARD_EVENTS, REWARD_VALUE, ESTOP, DIAGNOSTICS),
    subscribes=_topics(JOY, SPACENAV, LEADER, CONSOLE_JOY, "joint_states", EPISODE_STATUS),
    services=(Service("intervention_node/engage", SET_BOOL, "toggle devices: engage (alignment first), release"),),
    parameters=INTERVENTION_PARAMETERS,
)

MONITOR_NODE = NodeTable(
    "monitor_node",
    "Brings lifecycle nodes up in order, aggregates diagnostics, says how the session is.",
    lifecycle=False,
    publishes=_topics(SESSION_STATUS, DIAGNOSTICS_AGG, TOPLEVEL, DIAGNOSTICS),
    subscribes=_topics(DIAGNOSTICS, EPISODE_STATUS, WEIGHTS, HEARTBEAT),
    services=(
        Service("monitor_node/bringup", TRIGGER, "configure and activate everything, in order"),
        Service("monitor_node/shutdown", TRIGGER, "deactivate everything, in reverse order"),
        Service("monitor_node/is_active", TRIGGER, "whether everything managed is active"),
    ),
    parameters=MONITOR_PARAMETERS,
)

CONSOLE_PARAMETERS = (
    Parameter("robot", "", "name in configs/robots/ or path of a robot description", FIXED, required=True),
    Parameter("store", "", "episode store to label and to show; empty: store in run_dir", FIXED),
    Parameter("http_bind", "127.0.0.1", "address of the page", FIXED),
    Parameter("http_port", 8780, "its port; 0: any free one", FIXED, (0, 65535)),
    Parameter("token_file", "", "file of mode 0600 with the page's token; needed beyond loopback", FIXED),
    Parameter("certificate", "", "PEM file; with key: https, which browsers ask for before they give a gamepad", FIXED),
    Parameter("key", "", "PEM file of the certificate's key", FIXED),
    Parameter("cameras", (), "further image topics to show beside the robot description's", FIXED),
    Parameter("camera_hz", 20.0, "pictures a second and camera at most", FIXED, (1.0, 60.0)),
    Parameter("jpeg_quality", 75, "of the pictures the node encodes", FIXED, (10, 100)),
    Parameter("width", 640, "of the pictures at most", FIXED, (64, 3840)),
    Parameter("reset_service", "", "Trigger service called before an episode starts (simulation)", FIXED),
    Parameter(
        "guide", False, "walk the operator through a session: checks, baseline, training, blind comparison, report", FIXED
    ),
    Parameter("baseline_episodes", 20, "of the old policy before training; 0: none", FIXED, (0, 10000)),
    Parameter("training_episodes", 0, "after so many training ends; 0: when the operator says so", FIXED, (0, 10000)),
    Parameter(
        "intervention_rate",
        0.0,
        "training also ends once a person drove less than this share of the last intervention_steps; 0: it does not",
        FIXED,
        (0.0, 1.0),
    ),
    Parameter("intervention_steps", 1000, "training steps that this share is taken over", FIXED, (1, 1_000_000)),
    Parameter("comparison_episodes", 20, "of each policy in the blind comparison; 0: none", FIXED, (0, 10000)),
    Parameter("reset_s", 5.0, "countdown between ready and the start of an episode", FIXED, (0.0, 600.0)),
    Parameter("hands_off", False, "nobody has to reset or start anything (simulation)", FIXED),
)

CONSOLE_NODE = NodeTable(
    "console_node",
    "Serves the operator's page: cameras, take-over, labels, weights, and the steps of a session.",
    lifecycle=False,
    publishes=_topics(CONSOLE_JOY, DIAGNOSTICS),
    subscribes=_topics(
        "<observation>", EPISODE_STATUS, INTERVENTION_STATE, GUARD_STATE, REWARD_EVENTS, WEIGHTS, METRICS, SESSION_STATUS
    ),
    parameters=CONSOLE_PARAMETERS,
)

ALL_NODES: dict[str, NodeTable] = {
    **NODES,
    **{t.name: t for t in (LEARNER_NODE, REWARD_NODE, VLM_REWARD_NODE, INTERVENTION_NODE, MONITOR_NODE, CONSOLE_NODE)},
}
"""Every node by executable."""
