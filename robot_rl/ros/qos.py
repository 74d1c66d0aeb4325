"""The quality-of-service profiles of section 2.1, by name.

Sensors are subscribed best effort, which matches both kinds of publisher; commands are published reliable, because the
controllers of ros2_control and MoveIt Servo subscribe with the reliable system default.
"""

from __future__ import annotations

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy


def profile(reliability: str, durability: str, depth: int) -> QoSProfile:
    """A keep-last profile. Raises ValueError for words that are not accepted."""
    reliable = {"reliable": ReliabilityPolicy.RELIABLE, "best_effort": ReliabilityPolicy.BEST_EFFORT}
    durable = {"volatile": DurabilityPolicy.VOLATILE, "transient_local": DurabilityPolicy.TRANSIENT_LOCAL}
    if reliability not in reliable:
        raise ValueError(f"qos.reliability={reliability!r}: accepted are {', '.join(reliable)}")
    if durability not in durable:
        raise ValueError(f"qos.durability={durability!r}: accepted are {', '.join(durable)}")
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST, depth=depth, reliability=reliable[reliability], durability=durable[durability]
    )


PROFILES: dict[str, QoSProfile] = {
    "sensor": profile("best_effort", "volatile", 5),
    "latest": profile("best_effort", "volatile", 1),
    "command": profile("reliable", "volatile", 1),
    "event": profile("reliable", "volatile", 100),
    "state": profile("reliable", "transient_local", 1),
    "diag": profile("reliable", "volatile", 10),
}

SENSOR, LATEST, COMMAND = PROFILES["sensor"], PROFILES["latest"], PROFILES["command"]
EVENT, STATE, DIAG = PROFILES["event"], PROFILES["state"], PROFILES["diag"]
