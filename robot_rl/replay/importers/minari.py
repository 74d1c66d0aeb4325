"""Minari datasets (Younis et al. 2024) as ``minari download`` leaves them: ``data/main_data.hdf5`` beside ``data/metadata.json``.

Read with h5py alone; Minari need not be installed. Observations are laid out as ``gymnasium/<id>`` lays them out
(:mod:`robot_rl.sim.gymnasium`), so that a policy cloned from a dataset fits the environment that it was recorded in: one vector is
``observation.state``, of a dictionary the entries ``observation``, ``achieved_goal``, ``desired_goal`` and then the others by name are
joined, and a picture is ``observation.images.main``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    check_type,
    episode_id,
    provenance,
    shorten,
)
from robot_rl.replay.importers.lerobot_files import decode_image
from robot_rl.replay.importers.robomimic import import_h5py
from robot_rl.types import OBSERVATION_IMAGES, OBSERVATION_STATE, Episode, EpisodeMeta, FeatureSpec, Stratum

DATA, METADATA = "main_data.hdf5", "metadata.json"
GOAL_ORDER = ("observation", "achieved_goal", "desired_goal")
SUCCESS = ("success", "is_success")


@dataclass(frozen=True)
class Options(CommonOptions):
    """Options of Minari datasets.

    Attributes:
        reward: ``auto`` (1 on the step that first reports success where the recording says so, else its own), ``sparse``, ``native``.
        cut_at_success: end an episode, ``terminated``, where success is first reported; ``False`` keeps what follows.
    """

    reward: str = "auto"
    cut_at_success: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reward", self.reward, ("auto", "sparse", "native"))
        check_type("cut_at_success", self.cut_at_success, bool, "true or false")


def _data_folder(path: Path) -> Path:
    """Where the files are: the dataset's folder, its ``data/``, or the HDF5 file itself."""
    if path.is_file():
        return path.parent
    return path / "data" if (path / "data" / METADATA).is_file() else path


class MinariImporter:
    """Reads one episode at a time; the file is open only while :meth:`episodes` runs."""

    def __init__(self, path: Path, options: Options) -> None:
        self.options, self.folder = options, _data_folder(path)
        self.name = path.name if self.folder != path else path.parent.name if path.name == "data" else path.name
        self.told = self._metadata()
        if self.told.get("data_format", "hdf5") != "hdf5":
            raise FormatError(
                f"{self.folder / METADATA}: data_format={self.told['data_format']!r}; accepted is hdf5 (minari's own reader converts others)"
            )
        self.file = self.folder / DATA
        if not self.file.is_file():
            raise FormatError(f"{self.folder} has {METADATA} and no {DATA}; was the download completed?")
        try:
            with import_h5py().File(self.file, "r") as opened:
                self._read_header(opened)
        except OSError as error:
            raise FormatError(f"{self.file} is not a readable HDF5 file: {error}") from None

    def _metadata(self) -> dict[str, Any]:
        try:
            told = json.loads((self.folder / METADATA).read_text(encoding="utf-8"))
            spec = told.get("env_spec")
            return {**told, "env_spec": json.loads(spec) if isinstance(spec, str) else spec or {}}
        except (OSError, ValueError, AttributeError) as error:
            raise FormatError(f"{self.folder / METADATA} is not readable: {error}") from None

    def _read_header(self, opened: Any) -> None:
        numbers = sorted(int(n[8:]) for n in opened if n.startswith("episode_") and n[8:].isdigit())
        if not numbers:
            raise FormatError(f"{self.file} has no episode_*; it has {shorten(list(opened))}")
        self.numbers = self.options.select(numbers, self.file)
        first = opened[f"episode_{self.numbers[0]}"]
        observations = first.get("observations")
        self.keys: tuple[str, ...] = ()
        self.picture = False
        if hasattr(observations, "keys"):
            order = [k for k in GOAL_ORDER if k in observations]
            self.keys = (*order, *sorted(k for k in observations if k not in order))
            bad = [k for k in self.keys if not hasattr(observations[k], "dtype") or observations[k].ndim != 2]
            if bad:
                raise FormatError(f"{self.file}: observations {bad} are no vectors; accepted are dictionaries of vectors")
            names = tuple(f"{k}_{i}" for k in self.keys for i in range(observations[k].shape[1]))
        elif observations is not None and (observations.dtype == np.uint8 or observations.dtype.kind == "O"):
            self.picture, names = True, ()
        elif observations is not None and observations.ndim == 2:
            names = tuple(f"state_{i}" for i in range(observations.shape[1]))
        else:
            raise FormatError(f"{self.file}: accepted are observations that are a vector, a dictionary of vectors or a picture")
        if self.picture:
            shape = self._picture(observations[0], f"{self.file}: first picture").shape
            self.features = {OBSERVATION_IMAGES + "main": FeatureSpec(shape, "uint8", ("height", "width", "channel"))}
        else:
            self.features = {OBSERVATION_STATE: FeatureSpec((len(names),), "float32", names)}
        actions = first.get("actions")
        if not hasattr(actions, "dtype") or actions.ndim != 2:
            raise FormatError(f"{self.file}: accepted are actions that are one vector of numbers a step")
        every = [opened[f"episode_{n}"]["actions"][()] for n in self.numbers]
        low, high = np.min([a.min(0) for a in every], 0), np.max([a.max(0) for a in every], 0)
        self.action, self.action_origin = action_spec(low, high, self.options)
        if self.options.action_low is None and (box := self._action_box(actions.shape[1])) is not None:
            self.action, self.action_origin = action_spec(*box, self.options)[0], "format"
        self.success_key = next((k for k in SUCCESS if k in first.get("infos", {})), None)
        if self.options.reward == "sparse" and self.success_key is None:
            raise ValueError(f"reward='sparse': {self.file} has none of {', '.join(SUCCESS)} in its infos; accepted is native")

    def _action_box(self, dim: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The limits of the action space, where the dataset tells them and they are finite."""
        try:
            space = json.loads(self.told["action_space"])
            low, high = (np.asarray(space[k], np.float64) for k in ("low", "high"))
        except (KeyError, TypeError, ValueError):
            return None
        whole = low.shape == high.shape == (dim,) and bool(np.isfinite([low, high]).all() and (low < high).all())
        return (low, high) if whole else None

    def describe(self) -> ImportSource:
        extra = {
            "env_id": self._env_id(), "dataset_id": self.told.get("dataset_id", ""), "algorithm": self.told.get("algorithm_name", ""),
            "observation_entries": list(self.keys), "success_from": self.success_key, "action_limits": self.action_origin,
        }  # fmt: skip
        return ImportSource(self.features, self.action, len(self.numbers), self.options.task or "", "minari", extra)

    def _env_id(self) -> str:
        name = self.told["env_spec"].get("id", "")
        return f"gymnasium/{name}" if name else ""

    def episodes(self) -> Iterator[Episode]:
        with import_h5py().File(self.file, "r") as opened:
            for number in self.numbers:
                yield self._episode(opened[f"episode_{number}"], number)

    def _episode(self, group: Any, number: int) -> Episode:
        where, options = f"{self.file} episode_{number}", self.options
        absent = [k for k in ("observations", "actions", "rewards", "terminations", "truncations") if k not in group]
        if absent:
            raise FormatError(f"{where} lacks {', '.join(absent)}")
        action = group["actions"][()].astype(np.float32)
        length = len(action)
        reward = group["rewards"][()].astype(np.float32).ravel()
        terminated, truncated = (group[k][()].astype(bool).ravel() for k in ("terminations", "truncations"))
        rows = self._observations(group["observations"], where)
        for name, values, wanted in (
            ("rewards", reward, length), ("terminations", terminated, length), ("truncations", truncated, length),
            *((n, v, length + 1) for n, v in rows.items()),
        ):  # fmt: skip
            if len(values) != wanted or not length:
                raise FormatError(f"{where}: {name} has {len(values)} rows, expected {wanted} for {length} actions")
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise FormatError(f"{where}: {name} is not finite at row {np.argwhere(~np.isfinite(values))[0][0]}")
        success: bool | None = None
        if self.success_key is not None:
            hits = np.flatnonzero(np.asarray(group["infos"][self.success_key][()]).astype(bool).ravel()[-length:])
            success = bool(len(hits))
            if options.reward != "native":
                reward = np.zeros(length, np.float32)
                reward[hits[:1]] = 1.0
            if success and options.cut_at_success:
                length = int(hits[0]) + 1
                terminated[length - 1], truncated[length - 1] = True, False
        if not (terminated[length - 1] or truncated[length - 1]):
            truncated[length - 1] = True  # a buffer that was cut off by its recorder
        meta = EpisodeMeta(
            episode_id=episode_id(options.id_prefix or self.name, number), task=options.task or "", env_id=self._env_id(),
            seed=int(group.attrs["seed"]) if "seed" in group.attrs else None, stratum=Stratum(options.stratum), success=success,
            extra={"imported": provenance("minari", str(self.told.get("dataset_id") or self.name), number)},
        )  # fmt: skip
        return Episode.from_arrays(
            meta, {n: v[: length + 1] for n, v in rows.items()}, action[:length], reward=reward[:length],
            terminated=terminated[:length], truncated=truncated[:length], source=np.full(length, options.source_code),
        )  # fmt: skip

    def _picture(self, row: Any, where: str) -> np.ndarray:
        return decode_image({"bytes": np.asarray(row, np.uint8).tobytes()}, self.folder, where)

    def _observations(self, group: Any, where: str) -> dict[str, np.ndarray]:
        if self.picture:
            return {OBSERVATION_IMAGES + "main": np.stack([self._picture(row, where) for row in group[()]])}
        if not self.keys:
            return {OBSERVATION_STATE: group[()].astype(np.float32)}
        absent = [k for k in self.keys if k not in group]
        if absent:
            raise FormatError(f"{where}: observations lack {', '.join(absent)}")
        return {OBSERVATION_STATE: np.concatenate([group[k][()] for k in self.keys], axis=1).astype(np.float32)}


def sniff(path: Path) -> bool:
    if path.is_file() and path.name != DATA:
        return False
    folder = _data_folder(path)
    return (folder / METADATA).is_file() and (folder / DATA).is_file()


def open_source(path: Path, options: Options) -> MinariImporter:
    return MinariImporter(path, options)
