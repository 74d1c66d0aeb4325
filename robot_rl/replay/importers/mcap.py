"""MCAP recordings of ROS 2 graphs: our own exports exactly, anybody's bag through a robot description.

With ``robot`` the topics, their synchronisation and the meaning of commands come from the robot description, and observations
are joined as the live graph joins them: the anchor's stamps make the steps, every state is the newest one not later, pictures
lie within the tolerance. Episodes are what ``episode_status`` says, or else the whole recording.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.importers.base import CommonOptions, FormatError, ImportSource, action_spec, episode_id, provenance
from robot_rl.replay.importers.mcap_messages import TypeStore, mcap_module, picture, record_values
from robot_rl.replay.schema import meta_from_json
from robot_rl.types import OBSERVATION_IMAGES, Episode, FeatureSpec, Source

MAGIC = b"\x89MCAP0\r\n"
STEP_TOPIC, STATUS_TOPIC = "/robot_rl/step", "/episode_status"
ACTIONS = ("action", "action_policy", "action_human", "action_base")
_INTEGERS = ("safety", "decision_id", "chunk_row", "weights_version", "intervention_id", "stamp_ns")


@dataclass(frozen=True)
class Options(CommonOptions):
    """``robot``: name in ``configs/robots/`` or path; needed for recordings that this program did not export.

    ``namespace`` is put before the description's topics.
    """

    robot: str | None = None
    namespace: str = ""


def sniff(path: Path) -> bool:
    return _file(path) is not None


def _file(path: Path) -> Path | None:
    """The MCAP file itself, or the one in a rosbag2 folder."""
    if path.is_dir():
        inside = sorted(path.glob("*.mcap"))
        return inside[0] if len(inside) == 1 and (path / "metadata.yaml").exists() else None
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return path if file.read(len(MAGIC)) == MAGIC else None


def open_source(path: Path, options: Options) -> Any:
    file = _file(path)
    if file is None:
        raise FormatError(f"{path}: not an MCAP file, nor a folder with one and metadata.yaml")
    bag = Bag(file)
    if options.robot is None and STEP_TOPIC in bag.topics:
        return ExportedRecording(bag, options)
    if options.robot is None:
        raise ValueError(
            f"robot is missing: {file.name} is a recording of topics {', '.join(sorted(bag.topics))}; accepted is "
            "robot=<name in configs/robots/ or path>, which says what they mean"
        )
    # Robot descriptions live in a room above this one, so what needs them is found by name.
    return importlib.import_module("robot_rl.ros.bags").RobotRecording(bag, options)


class Bag:
    """One MCAP file: topics with their types, messages in time order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mcap = mcap_module()
        self.types = TypeStore()
        with open(path, "rb") as file:
            try:
                summary = self._mcap.reader.make_reader(file).get_summary()
            except self._mcap.exceptions.McapError as error:
                raise FormatError(f"{path}: {error}") from error
        if summary is None:
            raise FormatError(f"{path}: it has no summary; was its recording cut off? `mcap recover` can mend it")
        self.topics: dict[str, str] = {}
        for channel in summary.channels.values():
            if channel.message_encoding != "cdr":
                continue
            schema = summary.schemas[channel.schema_id]
            self.topics[channel.topic] = schema.name
            if not self.types.knows(schema.name) and schema.encoding == "ros2msg":
                self.types.learn(schema.name, schema.data.decode())

    def messages(self, topics: list[str]) -> Iterator[tuple[str, int, Any]]:
        """(topic, log time, message) of the wanted topics.

        Raises:
            FormatError: a message cannot be read; names the topic.
        """
        with open(self.path, "rb") as file:
            for _, channel, record in self._mcap.reader.make_reader(file).iter_messages(topics=topics):
                try:
                    yield channel.topic, record.log_time, self.types.deserialize(record.data, self.topics[channel.topic])
                except (KeyError, ValueError, AssertionError, IndexError) as error:
                    raise FormatError(f"{self.path}: {channel.topic}: a message cannot be read: {error!r}") from error


class ExportedRecording:
    """What ``robot-rl export --format mcap`` wrote, back to the same episodes (without decisions)."""

    def __init__(self, bag: Bag, options: Options) -> None:
        self.bag, self.options = bag, options
        self._described: ImportSource | None = None

    def describe(self) -> ImportSource:
        if self._described is None:
            self._described = self._describe()
        return self._described

    def _describe(self) -> ImportSource:
        features: dict[str, FeatureSpec] = {}
        names: tuple[str, ...] = ()
        count, tasks = 0, set()
        low: Any = None
        high: Any = None
        for topic, _, message in self.bag.messages(sorted(self.bag.topics)):
            key = self._feature(topic)
            if key is not None and key not in features:
                if key.startswith(OBSERVATION_IMAGES):
                    features[key] = FeatureSpec(picture(message).shape, "uint8")
                else:
                    features[key] = FeatureSpec((len(message.position),), "float32", tuple(message.name))
            elif topic == "/action":
                names = tuple(message.name)
                row = np.asarray(message.position)
                low, high = (row, row) if low is None else (np.minimum(low, row), np.maximum(high, row))
            elif topic == STATUS_TOPIC and (told := record_values(message, "episode")) and told[1].get("state") == "committed":
                count += 1
                tasks.add(told[1].get("task", ""))
        if low is None or not features:
            raise FormatError(f"{self.bag.path}: no actions or no observations in it")
        spec, origin = action_spec(low, high, self.options, names)
        wanted = self.options.select(range(count), self.bag.path)
        task = self.options.task if self.options.task is not None else (tasks.pop() if len(tasks) == 1 else "")
        return ImportSource(features, spec, len(wanted), task, "mcap", {"action_limits": origin})

    @staticmethod
    def _feature(topic: str) -> str | None:
        if topic.startswith("/observation/"):
            return "observation." + topic.removeprefix("/observation/")
        for end in ("/image_raw", "/image_raw/compressed"):
            if topic.endswith(end):
                return OBSERVATION_IMAGES + topic[1:].removesuffix(end)
        return None

    def episodes(self) -> Iterator[Episode]:
        wanted = set(self.options.select(range(10**9), self.bag.path)) if self.options.episodes is not None else None
        index = -1
        rows: dict[str, list[np.ndarray]] = {}
        steps: list[dict[str, str]] = []
        actions: dict[str, dict[int, np.ndarray]] = {}
        for topic, _, message in self.bag.messages(sorted(self.bag.topics)):
            if topic == STATUS_TOPIC:
                told = record_values(message, "episode")
                if told is not None and told[1].get("state") == "running":
                    index, rows, steps, actions = index + 1, {}, [], {a: {} for a in ACTIONS}
                elif told is not None and told[1].get("state") == "committed" and steps and (wanted is None or index in wanted):
                    pending = told
                    # The last observation has the same stamp as this message and may follow it.
                    yield from self._finish(index, pending, rows, steps, actions)
                continue
            if (key := self._feature(topic)) is not None:
                value = picture(message) if key.startswith(OBSERVATION_IMAGES) else np.asarray(message.position, np.float32)
                rows.setdefault(key, []).append(value)
            elif topic[1:] in ACTIONS:
                actions[topic[1:]][len(steps)] = np.asarray(message.position, np.float32)
            elif topic == STEP_TOPIC and (told := record_values(message, "step")) is not None:
                steps.append(told[1])

    def _finish(
        self, index: int, told: tuple[str, dict[str, str]], rows: dict[str, list[np.ndarray]], steps: list[dict[str, str]],
        actions: dict[str, dict[int, np.ndarray]],
    ) -> Iterator[Episode]:  # fmt: skip
        length = len(steps)
        dim = len(next(iter(actions["action"].values())))
        arrays: dict[str, Any] = {}
        for name in ACTIONS:
            filled = np.full((length, dim), np.nan, np.float32)
            for t, value in actions[name].items():
                filled[t] = value
            arrays[name] = filled
        arrays |= {n: np.array([int(s[n]) for s in steps]) for n in _INTEGERS}
        arrays["reward"] = np.array([float(s["reward"]) for s in steps], np.float32)
        arrays |= {n: np.array([s[n] == "true" for s in steps]) for n in ("terminated", "truncated")}
        arrays["source"] = np.array([int(Source[s["source"].upper()]) for s in steps])
        arrays["decision_id"] = np.full(length, -1)  # decisions themselves are not in the file
        meta = meta_from_json(json.loads(told[1]["meta"]))
        if self.options.id_prefix is not None:
            meta.episode_id = episode_id(self.options.id_prefix, index)
        if self.options.task is not None:
            meta.task = self.options.task
        meta.extra["imported"] = provenance("mcap", self.bag.path.name, index, meta.extra.get("imported"))
        yield Episode.from_arrays(meta, {k: np.stack(v) for k, v in rows.items()}, arrays.pop("action"), **arrays)
