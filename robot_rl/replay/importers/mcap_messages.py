"""ROS 2 messages without ROS: serialised and read by the pure-Python package ``rosbags``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def mcap_module() -> Any:
    """The ``mcap`` package. Raises ImportError naming what to install."""
    try:
        import mcap
        import mcap.reader
        import mcap.writer
    except ImportError as error:
        raise ImportError(
            "MCAP files need the packages mcap and rosbags: pip install 'robot_rl[mcap]' (or: pip install mcap rosbags)"
        ) from error
    return mcap


class TypeStore:
    """Message classes of ROS 2 Jazzy. Raises ImportError naming what to install."""

    def __init__(self) -> None:
        try:
            from rosbags.typesys import Stores, get_typestore
        except ImportError as error:
            raise ImportError(
                "ROS messages in files need the package rosbags: pip install 'robot_rl[mcap]' (or: pip install rosbags)"
            ) from error
        self.store = get_typestore(Stores.ROS2_JAZZY)
        self.t = self.store.types

    def knows(self, type_name: str) -> bool:
        return type_name in self.t

    def learn(self, type_name: str, definition: str) -> None:
        """Make a type known from the text that a bag carries with it."""
        from rosbags.typesys import get_types_from_msg

        parts = definition.split("=" * 80)
        found = dict(get_types_from_msg(parts[0], type_name))
        for part in parts[1:]:
            head, _, body = part.strip().partition("\n")
            name = head.removeprefix("MSG:").strip()
            if name.count("/") == 1:
                name = name.replace("/", "/msg/")
            found |= get_types_from_msg(body, name)
        self.store.register({k: v for k, v in found.items() if k not in self.t})

    def definition(self, type_name: str) -> str:
        return self.store.generate_msgdef(type_name, ros_version=2)[0]

    def serialize(self, message: Any, type_name: str) -> bytes:
        return bytes(self.store.serialize_cdr(message, type_name))

    def deserialize(self, data: bytes, type_name: str) -> Any:
        return self.store.deserialize_cdr(data, type_name)

    # ---- building

    def header(self, stamp: int, frame: str = "") -> Any:
        time = self.t["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9)
        return self.t["std_msgs/msg/Header"](stamp=time, frame_id=frame)

    def joint_state(self, stamp: int, names: Sequence[str], values: np.ndarray) -> Any:
        empty = np.zeros(0)
        return self.t["sensor_msgs/msg/JointState"](
            header=self.header(stamp),
            name=list(names),
            position=np.ascontiguousarray(values, np.float64),
            velocity=empty,
            effort=empty,
        )

    def float64(self, value: float) -> Any:
        return self.t["std_msgs/msg/Float64"](data=value)

    def record(self, stamp: int, name: str, message: str, values: Mapping[str, str]) -> Any:
        pair = self.t["diagnostic_msgs/msg/KeyValue"]
        status = self.t["diagnostic_msgs/msg/DiagnosticStatus"](
            level=0, name=name, message=message, hardware_id="", values=[pair(key=k, value=v) for k, v in values.items()]
        )
        return self.t["diagnostic_msgs/msg/DiagnosticArray"](header=self.header(stamp), status=[status])

    def image(self, stamp: int, frame: str, row: np.ndarray) -> Any:
        height, width, channels = row.shape
        return self.t["sensor_msgs/msg/Image"](
            header=self.header(stamp, frame), height=height, width=width, encoding="rgb8" if channels == 3 else "mono8",
            is_bigendian=0, step=width * channels, data=np.ascontiguousarray(row).reshape(-1),
        )  # fmt: skip

    def jpeg(self, stamp: int, frame: str, row: np.ndarray, quality: int) -> Any:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(row if row.shape[-1] == 3 else row[..., 0]).save(buffer, "JPEG", quality=quality)
        data = np.frombuffer(buffer.getvalue(), np.uint8)
        return self.t["sensor_msgs/msg/CompressedImage"](header=self.header(stamp, frame), format="jpeg", data=data)


def stamp_of(message: Any, log_time: int) -> int:
    """The header's stamp, or the time of reception for messages that have none."""
    header = getattr(message, "header", None)
    if header is None:
        return log_time
    stamp = header.stamp.sec * 10**9 + header.stamp.nanosec
    return stamp or log_time


def picture(message: Any) -> np.ndarray:
    """(H, W, 3) or (H, W, 1) uint8 of an Image or CompressedImage. Raises ValueError for an encoding that is not known."""
    if hasattr(message, "format"):
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(bytes(message.data))).convert("RGB"))
    channels = {"rgb8": 3, "bgr8": 3, "mono8": 1}.get(message.encoding)
    if channels is None:
        raise ValueError(f"image encoding {message.encoding!r}: accepted are rgb8, bgr8, mono8")
    rows = np.frombuffer(bytes(message.data), np.uint8).reshape(message.height, message.step)
    image = rows[:, : message.width * channels].reshape(message.height, message.width, channels)
    return image[..., ::-1] if message.encoding == "bgr8" else image


def record_values(message: Any, name: str) -> tuple[str, dict[str, str]] | None:
    """(message text, key to value) of the status called ``name`` in a DiagnosticArray."""
    for status in message.status:
        if status.name == name:
            return status.message, {kv.key: kv.value for kv in status.values}
    return None
