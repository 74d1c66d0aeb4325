"""Episodes as an MCAP file with ROS 2 messages (CDR), which Foxglove, PlotJuggler and ``ros2 bag`` open.

Topics: ``observation/<name>`` (JointState), ``<camera>/image_raw`` (Image) or ``<camera>/image_raw/compressed``, ``action``,
``action_policy``, ``action_human`` (JointState), ``reward/value`` (Float64), and two of open key/values (DiagnosticArray):
``episode_status`` at the start and end of each episode, ``robot_rl/step`` with everything else that is known about a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.exporters.base import Names
from robot_rl.replay.importers.base import check_choice
from robot_rl.replay.importers.mcap_messages import TypeStore, mcap_module
from robot_rl.replay.schema import meta_to_json
from robot_rl.types import OBSERVATION_IMAGES, Episode, Source

STEP_TOPIC = "robot_rl/step"
STEP_SCALARS = (
    "reward", "terminated", "truncated", "safety", "decision_id", "chunk_row", "weights_version", "intervention_id", "stamp_ns",
)  # fmt: skip
GAP_NS = 1_000_000_000


@dataclass(frozen=True)
class Options:
    """``images``: ``raw``, ``jpeg`` or ``off``; ``jpeg_quality``; ``compression`` of the file: ``zstd``, ``lz4`` or ``none``."""

    images: str = "raw"
    jpeg_quality: int = 90
    compression: str = "zstd"

    def __post_init__(self) -> None:
        check_choice("images", self.images, ("raw", "jpeg", "off"))
        check_choice("compression", self.compression, ("zstd", "lz4", "none"))
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality={self.jpeg_quality}: accepted are 1 to 100")


def write(episodes: Iterable[Episode], path: Path, format: str, options: Options, names: Names) -> list[str]:
    """Write the file; gives notes on what it does not hold."""
    mcap = mcap_module()
    with open(path, "wb") as file:
        kinds = mcap.writer.CompressionType
        compression = {"zstd": kinds.ZSTD, "lz4": kinds.LZ4, "none": kinds.NONE}[options.compression]
        writer = mcap.writer.Writer(file, compression=compression)
        writer.start(profile="ros2", library="robot_rl")
        out = _Out(writer, options, names)
        for episode in episodes:
            out.episode(episode)
        writer.finish()
    return ["images were left out"] if options.images == "off" and out.images else []


class _Out:
    def __init__(self, writer: Any, options: Options, names: Names) -> None:
        self.writer, self.options, self.names = writer, options, names
        self.types = TypeStore()
        self.images = False
        self._schemas: dict[str, int] = {}
        self._channels: dict[str, int] = {}
        self._clock = 0
        self._sequence = 0

    def put(self, topic: str, type_name: str, stamp: int, message: Any) -> None:
        if type_name not in self._schemas:
            text = self.types.definition(type_name).encode()
            self._schemas[type_name] = self.writer.register_schema(name=type_name, encoding="ros2msg", data=text)
        if topic not in self._channels:
            qos = "- history: 1\n  depth: 10\n  reliability: 1\n  durability: 2\n"
            self._channels[topic] = self.writer.register_channel(
                topic=f"/{topic}",
                message_encoding="cdr",
                schema_id=self._schemas[type_name],
                metadata={"offered_qos_profiles": qos},
            )
        self._sequence += 1
        data = self.types.serialize(message, type_name)
        self.writer.add_message(self._channels[topic], log_time=stamp, publish_time=stamp, data=data, sequence=self._sequence)

    def episode(self, episode: Episode) -> None:
        stamps = self._stamps(episode)
        self._clock = stamps[-1] + GAP_NS
        length, meta = len(episode), meta_to_json(episode.meta)
        self._status(episode, stamps[0], "running", 0, meta)
        for t in range(length + 1):
            for name, rows in episode.observations.items():
                self._observation(name, rows[t], stamps[t])
            if t == length:
                break
            for topic in ("action", "action_policy", "action_human", "action_base"):
                row = getattr(episode, topic)[t]
                if topic == "action" or np.isfinite(row).any():
                    action = self.names.action
                    self._vector(topic, action.names if action else tuple(f"a{i}" for i in range(len(row))), row, stamps[t])
            values = {"step": t, "source": Source(int(episode.source[t])).name.lower()}
            values |= {n: getattr(episode, n)[t].item() for n in STEP_SCALARS}
            self._record(STEP_TOPIC, "step", episode.meta.episode_id, values, stamps[t])
            if np.isfinite(episode.reward[t]):
                self.put("reward/value", "std_msgs/msg/Float64", stamps[t + 1], self.types.float64(float(episode.reward[t])))
        self._status(episode, stamps[-1], "committed", length, meta)

    def _stamps(self, episode: Episode) -> list[int]:
        """(L + 1,) times: the recorded ones where they increase, else the control rate after the episode before."""
        recorded = np.asarray(episode.stamp_ns, np.int64)
        length = len(episode)
        period = int(1e9 / (episode.meta.control_hz or 10.0))
        if length and recorded[0] > self._clock and (length == 1 or (np.diff(recorded) > 0).all()):
            last = int(np.median(np.diff(recorded))) if length > 1 else period
            return [*recorded.tolist(), int(recorded[-1]) + last]
        start = max(self._clock, GAP_NS)
        return [start + i * period for i in range(length + 1)]

    def _status(self, episode: Episode, stamp: int, state: str, step: int, meta: Mapping[str, Any]) -> None:
        outcome = {True: "success", False: "failure", None: "none"}[episode.meta.success]
        values: dict[str, Any] = {"state": state, "step": step, "task": episode.meta.task}
        if state == "committed":
            values |= {"outcome": outcome, "terminated": bool(episode.terminated[-1]), "truncated": bool(episode.truncated[-1])}
            values["meta"] = json.dumps(meta)
        self._record("episode_status", "episode", episode.meta.episode_id, values, stamp)

    def _record(self, topic: str, name: str, message: str, values: Mapping[str, Any], stamp: int) -> None:
        text = {
            k: str(v).lower() if isinstance(v, bool) else repr(v) if isinstance(v, float) else str(v) for k, v in values.items()
        }
        self.put(
            topic,
            "diagnostic_msgs/msg/DiagnosticArray",
            stamp,
            self.types.record(stamp, name, message, {"schema": "1", **text}),
        )

    def _vector(self, topic: str, names: tuple[str, ...], row: np.ndarray, stamp: int) -> None:
        self.put(topic, "sensor_msgs/msg/JointState", stamp, self.types.joint_state(stamp, names, row))

    def _observation(self, name: str, row: np.ndarray, stamp: int) -> None:
        if row.ndim == 3:
            self.images = True
            camera = name.removeprefix(OBSERVATION_IMAGES)
            if self.options.images == "raw":
                self.put(f"{camera}/image_raw", "sensor_msgs/msg/Image", stamp, self.types.image(stamp, camera, row))
            elif self.options.images == "jpeg":
                message = self.types.jpeg(stamp, camera, row, self.options.jpeg_quality)
                self.put(f"{camera}/image_raw/compressed", "sensor_msgs/msg/CompressedImage", stamp, message)
            return
        flat = np.atleast_1d(row).reshape(-1)
        feature = self.names.observation_features.get(name)
        names = (
            feature.names
            if feature is not None and len(feature.names) == len(flat)
            else tuple(f"{i}" for i in range(len(flat)))
        )
        self._vector("observation/" + name.removeprefix("observation."), names, flat, stamp)
