"""Messages to plain values and back; nodes never touch a message's fields themselves.

Records (``robot_rl.wire``) travel as ``diagnostic_msgs/DiagnosticArray``: the only standard message with a real header *and*
open key/values, legible in ``ros2 topic echo``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from robot_rl.wire.codec import MAX_STATUSES, MAX_VALUES, Status, WireError, decode, encode

T = TypeVar("T")


def to_stamp(ns: int) -> Time:
    """Integer nanoseconds to a message stamp. Negative times (there are none in ROS) become zero."""
    return Time(sec=max(ns, 0) // 1_000_000_000, nanosec=max(ns, 0) % 1_000_000_000)


def from_stamp(stamp: Time) -> int:
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def status_message(status: Status) -> DiagnosticStatus:
    return DiagnosticStatus(
        level=bytes([status.level]), name=status.name, message=status.message, hardware_id=status.hardware_id,
        values=[KeyValue(key=k, value=v) for k, v in status.values],
    )  # fmt: skip


def statuses_message(statuses: Iterable[Status], stamp_ns: int) -> DiagnosticArray:
    array = DiagnosticArray(status=[status_message(s) for s in statuses])
    array.header.stamp = to_stamp(stamp_ns)
    return array


def records_message(records: Sequence[Any], stamp_ns: int, *, hardware_id: str = "", level: int = 0) -> DiagnosticArray:
    """Records of :mod:`robot_rl.wire` as one message.

    Raises:
        WireError: none or more than 256 of them, or one that does not fit the limits.
    """
    if not 1 <= len(records) <= MAX_STATUSES:
        raise WireError(f"{len(records)} records in a message: accepted are 1 to {MAX_STATUSES}")
    return statuses_message([encode(r, hardware_id=hardware_id, level=level) for r in records], stamp_ns)


def read_status(message: DiagnosticStatus) -> Status:
    if len(message.values) > MAX_VALUES:
        raise WireError(f"status {message.name[:80]!r}: {len(message.values)} values; accepted are at most {MAX_VALUES}")
    return Status(message.name, message.message, tuple((kv.key, kv.value) for kv in message.values), message.hardware_id)


def read_records(message: DiagnosticArray, cls: type[T]) -> list[T]:
    """Every ``cls`` in the message; statuses of other names are passed over.

    Raises:
        WireError: too many statuses, or a status with the right name that cannot be decoded. Nothing else comes out.
    """
    if len(message.status) > MAX_STATUSES:
        raise WireError(f"{len(message.status)} statuses in a message: accepted are at most {MAX_STATUSES}")
    head, star, tail = cls.NAME.partition("*")  # type: ignore[attr-defined]
    out = []
    for status in message.status:
        name = status.name
        if name.startswith(head) and name.endswith(tail) if star else name == head:
            out.append(decode(read_status(status), cls))
    return out
