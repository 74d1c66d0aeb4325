"""Messages to plain values and back; nodes never touch a message's fields themselves.

Records (``robot_rl.wire``) travel as ``diagnostic_msgs/DiagnosticArray``: the only standard message with a real header *and*
open key/values, legible in ``ros2 topic echo``.
"""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped, TwistStamped, WrenchStamped
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_msgs.msg import Header
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

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


# ---- joints, poses, forces


def joint_state(
    names: Sequence[str],
    stamp_ns: int,
    position: Sequence[float] = (),
    velocity: Sequence[float] = (),
    effort: Sequence[float] = (),
) -> JointState:
    message = JointState(
        name=list(names), position=[float(x) for x in position], velocity=[float(x) for x in velocity],
        effort=[float(x) for x in effort],
    )  # fmt: skip
    message.header.stamp = to_stamp(stamp_ns)
    return message


class JointReader:
    """Values of named joints out of JointState messages, whatever order they come in.

    The order of the first message is remembered, so that a message like it costs one comparison.
    """

    def __init__(self, names: Sequence[str], field: str = "position") -> None:
        self.names, self.field = tuple(names), field
        self._order: list[str] | None = None
        self._index = np.zeros(0, np.intp)

    def __call__(self, message: JointState) -> np.ndarray:
        """(len(names),) float64. Raises WireError naming the joint that is missing."""
        if message.name != self._order:
            where = {n: i for i, n in enumerate(message.name)}
            for name in self.names:
                if name not in where:
                    raise WireError(
                        f"joint {name!r} is not in the message; it has {', '.join(list(message.name)[:12]) or 'none'}"
                    )
            self._order, self._index = list(message.name), np.array([where[n] for n in self.names], np.intp)
        values = np.asarray(getattr(message, self.field), np.float64)
        if len(values) != len(message.name):
            raise WireError(f"{self.field} has {len(values)} values for {len(message.name)} names")
        return values[self._index]


def pose_vector(message: PoseStamped) -> np.ndarray:
    """x, y, z, qx, qy, qz, qw."""
    p, q = message.pose.position, message.pose.orientation
    return np.array([p.x, p.y, p.z, q.x, q.y, q.z, q.w])


def pose_message(vector: np.ndarray, stamp_ns: int, frame: str) -> PoseStamped:
    message = PoseStamped()
    message.header.stamp, message.header.frame_id = to_stamp(stamp_ns), frame
    p, q = message.pose.position, message.pose.orientation
    p.x, p.y, p.z, q.x, q.y, q.z, q.w = (float(x) for x in vector)
    return message


def twist_vector(message: TwistStamped) -> np.ndarray:
    linear, angular = message.twist.linear, message.twist.angular
    return np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z])


def twist_message(vector: np.ndarray, stamp_ns: int, frame: str) -> TwistStamped:
    message = TwistStamped()
    message.header.stamp, message.header.frame_id = to_stamp(stamp_ns), frame
    linear, angular = message.twist.linear, message.twist.angular
    linear.x, linear.y, linear.z, angular.x, angular.y, angular.z = (float(x) for x in vector)
    return message


def wrench_vector(message: WrenchStamped) -> np.ndarray:
    force, torque = message.wrench.force, message.wrench.torque
    return np.array([force.x, force.y, force.z, torque.x, torque.y, torque.z])


def header_message(text: str, stamp_ns: int) -> Header:
    return Header(stamp=to_stamp(stamp_ns), frame_id=text)


# ---- pictures

_CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1, "16UC1": 2}


def image_message(picture: np.ndarray, stamp_ns: int, frame: str) -> Image:
    """(H, W, 3) uint8 RGB as ``rgb8``. ``array.frombytes`` is the quick way in: a Python list would take 27 ms for VGA."""
    height, width = picture.shape[:2]
    data = array("B")
    data.frombytes(np.ascontiguousarray(picture).data)
    message = Image(height=height, width=width, encoding="rgb8", step=width * 3, data=data)
    message.header.stamp, message.header.frame_id = to_stamp(stamp_ns), frame
    return message


def read_image(message: Image) -> np.ndarray:
    """(H, W, 3) uint8 RGB of rgb8, bgr8, mono8 or 16UC1 (millimetres, 0 to 5 m over the grey range); row padding is respected.

    Raises:
        WireError: another encoding, or sizes that do not fit the data.
    """
    width_bytes = _CHANNELS.get(message.encoding)
    if width_bytes is None:
        raise WireError(f"encoding {message.encoding!r}: accepted are {', '.join(_CHANNELS)}")
    height, width, step = message.height, message.width, message.step
    if not (0 < height <= 8192 and 0 < width <= 8192) or step < width * width_bytes or len(message.data) < step * height:
        raise WireError(f"picture of {width}x{height}, step {step}, with {len(message.data)} bytes")
    rows = np.frombuffer(message.data, np.uint8, count=step * height).reshape(height, step)[:, : width * width_bytes]
    if message.encoding in ("rgb8", "bgr8"):
        picture = rows.reshape(height, width, 3)
        return picture if message.encoding == "rgb8" else picture[..., ::-1]
    if message.encoding == "16UC1":
        depth = np.ascontiguousarray(rows).view(">u2" if message.is_bigendian else "<u2").reshape(height, width)
        rows = (np.minimum(depth, 5000).astype(np.uint32) * 255 // 5000).astype(np.uint8)
    return np.repeat(rows.reshape(height, width, 1), 3, axis=2)


def compressed_message(picture: np.ndarray, stamp_ns: int, frame: str, quality: int = 90) -> CompressedImage:
    from PIL import Image as Pictures

    buffer = io.BytesIO()
    Pictures.fromarray(picture).save(buffer, "JPEG", quality=quality)
    data = array("B")
    data.frombytes(buffer.getvalue())
    message = CompressedImage(format="rgb8; jpeg compressed bgr8", data=data)
    message.header.stamp, message.header.frame_id = to_stamp(stamp_ns), frame
    return message


def read_compressed(message: CompressedImage, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a JPEG or PNG.

    Raises:
        WireError: it cannot be decoded, or is larger than the declared ``size`` (a decompression bomb is never unpacked).
    """
    from PIL import Image as Pictures

    try:
        with Pictures.open(io.BytesIO(bytes(message.data))) as picture:
            if picture.format not in ("JPEG", "PNG") or (picture.height, picture.width) != tuple(size):
                raise WireError(
                    f"picture {picture.format} of {picture.width}x{picture.height}: accepted is {size[1]}x{size[0]}"
                )
            return np.asarray(picture.convert("RGB"))
    except WireError:
        raise
    except Exception as error:
        raise WireError(f"compressed picture of {len(message.data)} bytes cannot be decoded: {error}") from error


def camera_info(width: int, height: int, fovy_deg: float, stamp_ns: int, frame: str) -> CameraInfo:
    """A pinhole camera without distortion."""
    f = 0.5 * height / math.tan(math.radians(fovy_deg) / 2)
    cx, cy = width / 2 - 0.5, height / 2 - 0.5
    message = CameraInfo(
        height=height, width=width, distortion_model="plumb_bob", d=[0.0] * 5,
        k=[f, 0.0, cx, 0.0, f, cy, 0.0, 0.0, 1.0], r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[f, 0.0, cx, 0.0, 0.0, f, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
    )  # fmt: skip
    message.header.stamp, message.header.frame_id = to_stamp(stamp_ns), frame
    return message


def chunk_message(chunk: np.ndarray, names: Sequence[str], stamp_ns: int, period_s: float) -> JointTrajectory:
    """A policy's chunk (H, A) for tools and bags: row i is due ``i * period_s`` after the observation it was computed from."""
    message = JointTrajectory(joint_names=list(names))
    message.header.stamp = to_stamp(stamp_ns)
    for i, row in enumerate(chunk):
        point = JointTrajectoryPoint(positions=[float(x) for x in row])
        due = round(i * period_s * 1e9)
        point.time_from_start.sec, point.time_from_start.nanosec = due // 1_000_000_000, due % 1_000_000_000
        message.points.append(point)
    return message
