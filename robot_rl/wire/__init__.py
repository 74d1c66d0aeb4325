"""What crosses the graph between our own nodes, as dataclasses; nothing here imports ROS (section 3 of the ROS specification).

One dataclass is one ``diagnostic_msgs/DiagnosticStatus``; :mod:`robot_rl.ros.conversion` turns :class:`Status` into messages.
"""

from robot_rl.wire.codec import SCHEMA, Status, WireError, decode, encode
from robot_rl.wire.records import (
    EpisodeStatus,
    GuardEvent,
    GuardState,
    InterventionState,
    OperatorState,
    PolicyHealth,
    RewardClose,
    SessionStatus,
    StepReward,
    TaskState,
    WeightsNotice,
)

__all__ = [
    "SCHEMA",
    "EpisodeStatus",
    "GuardEvent",
    "GuardState",
    "InterventionState",
    "OperatorState",
    "PolicyHealth",
    "RewardClose",
    "SessionStatus",
    "Status",
    "StepReward",
    "TaskState",
    "WeightsNotice",
    "WireError",
    "decode",
    "encode",
]
