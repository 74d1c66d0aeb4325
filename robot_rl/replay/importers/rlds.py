"""RLDS episodes as TensorFlow Datasets keeps them (Open X-Embodiment, DROID, LIBERO for OpenVLA): ``features.json``,
``dataset_info.json`` and ``<name>-<split>.tfrecord-*`` in one folder. Read without TensorFlow.

By default ``observation.state`` is the entry ``observation/state``, or else ``observation/proprio``; every picture becomes
``observation.images.<its name>``; an action that is a dictionary needs ``action_keys``, because their order means something.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.importers.base import (
    CommonOptions,
    FormatError,
    ImportSource,
    action_spec,
    check_choice,
    check_string_list,
    check_type,
    episode_id,
    provenance,
    shorten,
)
from robot_rl.replay.importers.lerobot_files import decode_image
from robot_rl.replay.importers.tfrecord import Values, parse_example, records
from robot_rl.types import OBSERVATION_IMAGES, OBSERVATION_STATE, Episode, EpisodeMeta, FeatureSpec, Stratum

STATE_KEYS = ("state", "proprio")
INSTRUCTIONS = ("language_instruction", "observation/natural_language_instruction", "observation/language_instruction")
_SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<number>\d+)-of-\d+")


@dataclass(frozen=True)
class Options(CommonOptions):
    """Options of RLDS datasets.

    Attributes:
        split: ``train``, ``val``, ``test``, or whatever the dataset calls it.
        state_keys: entries of ``observation`` that make ``observation.state``, in this order.
        image_keys: pictures to import, by their names in ``observation``; ``None`` is all, ``[]`` none.
        action_keys: entries of an action that is a dictionary, in this order.
        control_hz: rate at which it was recorded, which the format does not tell.
        last_step: ``action``: the last step's action was executed, as in most of Open X-Embodiment; ``observation``: it only holds what was
            observed after the last action, as RLDS defines it.
    """

    split: str = "train"
    state_keys: Sequence[str] | None = None
    image_keys: Sequence[str] | None = None
    action_keys: Sequence[str] = ()
    control_hz: float = 0.0
    last_step: str = "action"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("split", self.split, str, "the name of a split")
        check_choice("last_step", self.last_step, ("action", "observation"))
        if not isinstance(self.control_hz, (int, float)) or not 0.0 <= self.control_hz < 1e4:
            raise ValueError(f"control_hz={self.control_hz!r}: accepted are numbers from 0 (not known) to 10000")
        for name in ("state_keys", "image_keys", "action_keys"):
            if getattr(self, name):
                object.__setattr__(self, name, check_string_list(name, getattr(self, name)))


@dataclass(frozen=True)
class Entry:
    """One entry of a step: its shape, and ``picture`` or a number's type."""

    shape: tuple[int, ...]
    kind: str


class RldsImporter:
    """Reads one episode at a time."""

    def __init__(self, path: Path, options: Options) -> None:
        self.folder, self.options = _version_folder(path), options
        self.name = self.folder.parent.name if re.fullmatch(r"\d+\.\d+\.\d+", self.folder.name) else self.folder.name
        self.entries = self._read_features()
        self.files = self._shards()
        self.actions = self._action_entries()
        self.states = self._state_entries()
        self.pictures = self._picture_entries()
        self.features = {
            OBSERVATION_IMAGES + k: FeatureSpec(self.entries[f"observation/{k}"].shape, "uint8") for k in self.pictures
        }
        if self.states:
            self.features[OBSERVATION_STATE] = FeatureSpec((sum(self._width(f"observation/{k}") for k in self.states),))
        if not self.features:
            raise ValueError(
                f"{self.folder}: nothing is observed with state_keys={list(self.states)}, image_keys={list(self.pictures)}"
            )
        self.instruction = next((k for k in INSTRUCTIONS if k in self.entries), None)
        self.action, self.action_origin, self.count = self._look_through()

    # ---- what there is

    def _read_features(self) -> dict[str, Entry]:
        file = self.folder / "features.json"
        try:
            steps = json.loads(file.read_text(encoding="utf-8"))["featuresDict"]["features"]["steps"]["sequence"]["feature"]
            return dict(_entries(steps, ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{file} describes no RLDS episodes: {type(error).__name__}: {error}") from None

    def _shards(self) -> list[Path]:
        found = [(m, p) for p in self.folder.iterdir() if (m := _SHARD.fullmatch(p.name)) is not None]
        splits = sorted({m["split"] for m, _ in found})
        if self.options.split not in splits:
            raise ValueError(f"split={self.options.split!r}: {self.folder} has {', '.join(splits) or 'no .tfrecord files'}")
        return [p for m, p in sorted(found, key=lambda x: int(x[0]["number"])) if m["split"] == self.options.split]

    def _action_entries(self) -> tuple[str, ...]:
        if "action" in self.entries:
            if self.options.action_keys:
                raise ValueError(f"action_keys={list(self.options.action_keys)}: the action is one vector; accepted is none")
            return ("action",)
        there = [k.removeprefix("action/") for k in self.entries if k.startswith("action/")]
        absent = [k for k in self.options.action_keys if k not in there]
        if absent or not self.options.action_keys:
            raise ValueError(
                f"action_keys={list(self.options.action_keys)}: the action is a dictionary; accepted are some of {', '.join(there) or 'none'}, "
                "in the order that the robot takes them"
            )
        return tuple(f"action/{k}" for k in self.options.action_keys)

    def _state_entries(self) -> tuple[str, ...]:
        vectors = [k for k, e in self._observed().items() if e.kind != "picture" and e.kind != "text"]
        if self.options.state_keys is None:
            return next(((k,) for k in STATE_KEYS if k in vectors), ())
        absent = [k for k in self.options.state_keys if k not in vectors]
        if absent:
            raise ValueError(f"state_keys={list(self.options.state_keys)}: accepted are some of {', '.join(vectors) or 'none'}")
        return tuple(self.options.state_keys)

    def _picture_entries(self) -> tuple[str, ...]:
        there = [k for k, e in self._observed().items() if e.kind == "picture" and e.shape[-1:] == (3,)]
        wanted = there if self.options.image_keys is None else list(self.options.image_keys)
        if absent := [k for k in wanted if k not in there]:
            raise ValueError(f"image_keys={wanted}: {absent} are not there; accepted are some of {', '.join(there) or 'none'}")
        return tuple(wanted)

    def _observed(self) -> dict[str, Entry]:
        return {k.removeprefix("observation/"): e for k, e in self.entries.items() if k.startswith("observation/")}

    def _width(self, name: str) -> int:
        return math.prod(self.entries[name].shape)

    def _look_through(self) -> tuple[Any, str, int]:
        """The range of all actions and the number of episodes; pictures are not decoded for it."""
        low: np.ndarray | None = None
        high: np.ndarray | None = None
        number, wanted, seen = 0, set(self.options.episodes or ()), 0
        for number, (example, where) in enumerate(self._examples(), 1):
            if wanted and number - 1 not in wanted:
                continue
            actions, seen = self._joined(example, self.actions, where), seen + 1
            low = actions.min(0) if low is None else np.minimum(low, actions.min(0))
            high = actions.max(0) if high is None else np.maximum(high, actions.max(0))
        self.options.select(range(number), self.folder)
        if low is None or high is None:
            raise FormatError(f"{self.folder}: split {self.options.split!r} has no episode")
        return *action_spec(low, high, self.options), seen

    def describe(self) -> ImportSource:
        extra = {
            "control_hz": float(self.options.control_hz), "split": self.options.split, "action_limits": self.action_origin,
            "state_keys": list(self.states), "action_keys": list(self.actions), "instruction_from": self.instruction,
            "observations_left_out": sorted(set(self._observed()) - set(self.states) - set(self.pictures)),
        }  # fmt: skip
        return ImportSource(self.features, self.action, self.count, self.options.task or "", "rlds", extra)

    # ---- episodes

    def _examples(self) -> Iterator[tuple[dict[str, Values], str]]:
        for file in self.files:
            for i, data in enumerate(records(file)):
                yield parse_example(data, f"{file.name} episode {i}"), f"{file} episode {i}"

    def episodes(self) -> Iterator[Episode]:
        wanted = None if self.options.episodes is None else set(self.options.episodes)
        for number, (example, where) in enumerate(self._examples()):
            if wanted is None or number in wanted:
                yield self._episode(example, number, where)

    def _rows(self, example: Mapping[str, Values], name: str, where: str) -> np.ndarray:
        """(T, width) numbers of one entry."""
        values = example.get(f"steps/{name}")
        if values is None or isinstance(values, list):
            raise FormatError(f"{where} has no numbers in steps/{name}; it has {shorten(sorted(example))}")
        width = self._width(name)
        if not len(values) or len(values) % width:
            raise FormatError(f"{where}: steps/{name} has {len(values)} numbers, expected a multiple of {width}")
        return values.reshape(-1, width)

    def _joined(self, example: Mapping[str, Values], names: Sequence[str], where: str) -> np.ndarray:
        rows = [self._rows(example, n, where) for n in names]
        if len({len(r) for r in rows}) != 1:
            raise FormatError(f"{where}: {', '.join(f'{n} has {len(r)} rows' for n, r in zip(names, rows, strict=True))}")
        joined = np.concatenate(rows, axis=1).astype(np.float32)
        if not np.isfinite(joined).all():
            raise FormatError(f"{where}: {', '.join(names)} is not finite at row {np.argwhere(~np.isfinite(joined))[0][0]}")
        return joined

    def _episode(self, example: Mapping[str, Values], number: int, where: str) -> Episode:
        options = self.options
        action = self._joined(example, self.actions, where)
        steps = len(action)
        observations: dict[str, np.ndarray] = {}
        if self.states:
            observations[OBSERVATION_STATE] = self._joined(example, [f"observation/{k}" for k in self.states], where)
        for key in self.pictures:
            cells = example.get(f"steps/observation/{key}")
            if not isinstance(cells, list):
                raise FormatError(f"{where} has no pictures in steps/observation/{key}")
            observations[OBSERVATION_IMAGES + key] = np.stack([decode_image({"bytes": c}, self.folder, where) for c in cells])
        for name, rows in observations.items():
            if len(rows) != steps:
                raise FormatError(f"{where}: {name} has {len(rows)} rows, the action {steps}")
        if options.last_step == "observation":
            if steps < 2:
                raise FormatError(f"{where} has one step, which with last_step='observation' holds no action")
            action, length = action[:-1], steps - 1
        else:
            length = steps
            observations = {n: np.concatenate([v, v[-1:]]) for n, v in observations.items()}
        reward, success = np.full(length, np.nan, np.float32), None
        if "steps/reward" in example:
            reward = self._rows(example, "reward", where)[:, 0][:length].astype(np.float32)
            success = bool((reward >= 1.0).any()) if reward.any() else None  # many recordings hold nothing but zeros
        final = bool(self._rows(example, "is_terminal", where)[-1, 0]) if "steps/is_terminal" in example else False
        terminated, truncated = np.zeros(length, bool), np.zeros(length, bool)
        (terminated if final else truncated)[-1] = True
        meta = EpisodeMeta(
            episode_id=episode_id(options.id_prefix or self.name, number), task=options.task or self._task(example),
            stratum=Stratum(options.stratum), success=success, control_hz=float(options.control_hz),
            extra={"imported": provenance("rlds", self.name, number)},
        )  # fmt: skip
        arrays: dict[str, np.ndarray] = {"source": np.full(length, options.source_code)}
        if options.control_hz:
            arrays["stamp_ns"] = np.round(np.arange(length) * 1e9 / options.control_hz).astype(np.int64)
        return Episode.from_arrays(
            meta, observations, action, reward=reward, terminated=terminated, truncated=truncated, **arrays
        )

    def _task(self, example: Mapping[str, Values]) -> str:
        cells = example.get(f"steps/{self.instruction}") if self.instruction else None
        return cells[0].decode("utf-8", "replace") if isinstance(cells, list) and cells else ""


def _entries(feature: Mapping[str, Any], name: str) -> Iterator[tuple[str, Entry]]:
    """Every leaf of a feature description by its path."""
    if "featuresDict" in feature:
        for key, inner in feature["featuresDict"]["features"].items():
            yield from _entries(inner, f"{name}/{key}" if name else key)
    elif "image" in feature:
        shape = tuple(int(d) for d in feature["image"]["shape"].get("dimensions", ()))
        yield name, Entry(shape, "picture")
    elif "text" in feature:
        yield name, Entry((), "text")
    elif "tensor" in feature:
        told = feature["tensor"]
        if told.get("encoding", "none") not in ("none", ""):
            return  # compressed tensors (depth maps) are left out, and named among what is
        shape = tuple(int(d) for d in told.get("shape", {}).get("dimensions", ()))
        if all(d >= 0 for d in shape):
            yield name, Entry(shape, "text" if told.get("dtype") in ("string", "object") else str(told.get("dtype")))


def _version_folder(path: Path) -> Path:
    """The folder with ``features.json``: the one given, or its only (newest) version."""
    if path.is_dir() and not (path / "features.json").is_file():
        versions = [p for p in path.iterdir() if (p / "features.json").is_file()]
        if versions:
            return max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    return path


def sniff(path: Path) -> bool:
    folder = _version_folder(path)
    return (folder / "features.json").is_file() and any(_SHARD.fullmatch(p.name) for p in folder.iterdir())


def open_source(path: Path, options: Options) -> RldsImporter:
    return RldsImporter(path, options)
