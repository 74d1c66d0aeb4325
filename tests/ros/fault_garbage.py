"""Garbage for every topic somebody subscribes to: bytes that are no message, lengths that lie, values that no robot has."""

from __future__ import annotations

import importlib
import random
import struct
import time
from typing import Any

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from fault_watch import Watch
from geometry_msgs.msg import PoseStamped
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import Header

SKIP = ("/clock", "/rosout", "/parameter_events", "estop", "transition_event")
"""``/clock`` has a fault of its own, ``estop`` true is a latched stop by design, the others are the middleware's."""
PER_TOPIC = 12


def message_class(name: str) -> Any:
    """The class of ``package/msg/Name``, or None where its package is not installed."""
    package, _, kind = name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), kind)
    except (ImportError, AttributeError):
        return None


def targets(watch: Watch) -> list[tuple[str, str]]:
    """(topic, type) of what somebody else than the watch subscribes to; controllers have one publisher, and that is the guard."""
    own = {c.topic for c in watch.robot.commands}
    found = []
    for name, types in watch.node.get_topic_names_and_types():
        if any(word in name for word in SKIP) or name.removeprefix(watch.prefix + "/") in own:
            continue
        if any(i.node_name != "fault_watch" for i in watch.node.get_subscriptions_info_by_topic(name)):
            found.append((name, types[0]))
    return found


def raw(rng: random.Random) -> bytes:
    """Bytes with a right CDR header, mostly, and lies behind it."""
    header = b"\x00\x01\x00\x00" if rng.random() < 0.9 else rng.randbytes(4)
    kind = rng.randrange(4)
    if kind == 0:
        return header + rng.randbytes(rng.randrange(0, 200))
    if kind == 1:  # lengths of 4 GB
        return (
            header
            + struct.pack("<IIIII", *[rng.choice([0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFF0]) for _ in range(5)])
            + rng.randbytes(40)
        )
    if kind == 2:
        return header
    return (
        header
        + struct.pack("<iI", 1, 2)
        + struct.pack("<I", 4)
        + b"abc\x00"
        + struct.pack("<I", 0xFFFFFFFF)
        + rng.randbytes(64)
    )


def odd(kind: Any, rng: random.Random) -> Any:
    """A message that can be deserialized and says what cannot be."""
    bad = rng.choice([float("nan"), float("inf"), -1e300, 1e12, 0.0])
    stamp = Time(sec=rng.choice([0, 1, 2_000_000_000, -5]), nanosec=rng.choice([0, 999_999_999]))
    if kind is JointState:
        names = rng.choice([["gripper_width"], ["nobody"] * 50, [f"j{k}_{rng.random()}" for k in range(2000)], []])
        message = JointState(name=names, position=[bad] * rng.choice([0, 1, len(names)]), velocity=[bad], effort=[])
        message.header.stamp = stamp
        return message
    if kind is PoseStamped:
        message = PoseStamped()
        message.header.stamp, message.header.frame_id = stamp, rng.choice(["base", "", "nowhere", "x" * 5000])
        message.pose.position.x = message.pose.orientation.w = bad
        return message
    if kind is DiagnosticArray:
        name = rng.choice(
            ["episode", "guard", "reward/env", "weights/promoted", "operator/joy", "guard/x", "x" * 3000, "session", "task/x"]
        )
        # Too many statuses, values or characters, and never all of it: what arrives is whole in memory before anybody can look.
        n_statuses, n_values = rng.choice([(1, 0), (1, 200), (3, 3), (300, 3)])
        values = [KeyValue(key=rng.choice(["schema", "step", "value", "k" * 300]), value=rng.choice(["1", "2", "-1", "1e999", "x" * 9000]))
                  for _ in range(n_values)]  # fmt: skip
        statuses = [DiagnosticStatus(name=f"{name}", message="m", values=values, level=b"\x02")] * n_statuses
        return DiagnosticArray(status=statuses)
    if kind is Header:
        return Header(stamp=stamp, frame_id=rng.choice(["", "policies", "z" * 10_000]))
    return kind()


def flood(watch: Watch, rng: random.Random) -> int:
    """Some of each kind on each topic; how many were sent."""
    sent = 0
    for topic, name in targets(watch):
        kind = message_class(name)
        if kind is None:
            continue
        profile = QoSProfile(depth=PER_TOPIC)
        publisher = watch.node.create_publisher(kind, topic, profile)
        watch.until(publisher.get_subscription_count, 1.0)
        for k in range(PER_TOPIC):
            publisher.publish(raw(rng) if k % 2 else odd(kind, rng))
            sent += 1
            time.sleep(0.005)
        time.sleep(0.05)
        watch.node.destroy_publisher(publisher)
    return sent
