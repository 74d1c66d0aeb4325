"""robomimic HDF5: ``data/demo_*/{obs,next_obs,actions,rewards,dones}``, ``mask/<filter key>``, ``env_args`` attribute.

Low-dimensional observations are concatenated into ``observation.state`` in the order of ``obs_keys``; the default is
robomimic's own for its robosuite tasks. Our exporter records which key became what in the attribute ``robot_rl`` of ``data``;
such a file comes back as it went out.
"""

from __future__ import annotations

import json
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
    check_string_list,
    check_type,
    episode_id,
    provenance,
    shorten,
    unknown_outcome,
)
from robot_rl.types import OBSERVATION_IMAGES, OBSERVATION_STATE, Episode, EpisodeMeta, FeatureSpec, Stratum

DEFAULT_OBS_KEYS = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


@dataclass(frozen=True)
class Options(CommonOptions):
    """Options of robomimic files.

    Attributes:
        obs_keys: low-dimensional observations that make ``observation.state``, in this order; ``None`` is robomimic's default
            (``object, robot0_eef_pos, robot0_eef_quat, robot0_gripper_qpos``).
        image_keys: image observations, (H, W, 3) uint8, imported as ``observation.images.<name without _image>``.
        filter_key: import only the demonstrations of ``mask/<filter_key>``, e.g. ``train`` or ``20_percent``.
        cut_at_success: end an episode, ``terminated``, at its first reward of at least 1; ``False`` keeps what follows.
    """

    obs_keys: Sequence[str] | None = None
    image_keys: Sequence[str] = ()
    filter_key: str | None = None
    cut_at_success: bool = True

    def __post_init__(self) -> None:
        CommonOptions.__post_init__(self)
        check_type("cut_at_success", self.cut_at_success, bool, "true or false")
        if self.obs_keys is not None:
            object.__setattr__(self, "obs_keys", check_string_list("obs_keys", self.obs_keys))
        if self.image_keys:
            object.__setattr__(self, "image_keys", check_string_list("image_keys", self.image_keys))
        if self.filter_key is not None:
            check_type("filter_key", self.filter_key, str, "a name under mask/")


def import_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("robomimic files need h5py: pip install h5py") from error
    return h5py


def demo_number(name: str) -> int:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


class RobomimicImporter:
    """Reads one demonstration at a time; the file is open only while :meth:`episodes` runs."""

    def __init__(self, path: Path, options: Options):
        self.path, self.options, h5py = path, options, import_h5py()
        try:
            with h5py.File(path, "r") as file:
                self._read_header(file)
        except OSError as error:
            raise FormatError(f"{path} is not a readable HDF5 file: {error}") from None

    def _read_header(self, file: Any) -> None:
        data = file.get("data")
        names = sorted((n for n in (data or ()) if n.startswith("demo_") and demo_number(n) >= 0), key=demo_number)
        if not names:
            raise FormatError(f"{self.path} has no data/demo_*; it has {shorten(list(data if data is not None else file))}")
        names = self._filtered(file, names)
        by_number = {demo_number(n): n for n in names}
        self.demos = [by_number[i] for i in self.options.select(list(by_number), self.path)]
        self.env_args = _json(data.attrs.get("env_args"), f"{self.path}: data attribute env_args")
        self.ours = _json(data.attrs.get("robot_rl"), f"{self.path}: data attribute robot_rl")
        first = data[self.demos[0]]
        if "actions" not in first or "obs" not in first:
            raise FormatError(
                f"{self.path} {first.name}: expected actions and obs, found {list(first)} (was it extracted to obs?)"
            )
        available = {k: tuple(v.shape[1:]) for k, v in first["obs"].items()}
        self.vectors = self._vector_map(available)
        self.images = self._image_map(available)
        self.features = {
            **{
                name: FeatureSpec((sum(int(np.prod(available[k])) for k in keys),), "float32", self._names(keys, available))
                for name, keys in self.vectors.items()
            },
            **{name: FeatureSpec(available[key], "uint8", ("height", "width", "channel")) for name, key in self.images.items()},
        }
        low = np.min([data[d]["actions"][()].min(0) for d in self.demos], axis=0)
        high = np.max([data[d]["actions"][()].max(0) for d in self.demos], axis=0)
        unit = (-1.0, 1.0) if low.min() >= -1.0 and high.max() <= 1.0 else None
        saved = self.ours.get("action_names", ())
        self.action, self.action_origin = action_spec(low, high, self.options, saved, unit)
        self.left_out = sorted(set(available) - {k for ks in self.vectors.values() for k in ks} - set(self.images.values()))

    def _filtered(self, file: Any, names: list[str]) -> list[str]:
        key = self.options.filter_key
        if key is None:
            return names
        masks = list(file.get("mask") or ())
        if key not in masks:
            raise ValueError(f"filter_key={key!r}: {self.path} has {', '.join(masks) or 'no mask at all'}")
        wanted = {m.decode() if isinstance(m, bytes) else str(m) for m in file["mask"][key][()].ravel()}
        absent = sorted(wanted - set(names))
        if absent:
            raise FormatError(f"{self.path}: mask/{key} names {shorten(absent)}, which data/ does not have")
        if not wanted:
            raise FormatError(f"{self.path}: mask/{key} is empty")
        return [n for n in names if n in wanted]

    def _vector_map(self, available: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
        if self.options.obs_keys is None and "vectors" in self.ours:
            return {name: tuple(keys) for name, keys in self.ours["vectors"].items()}
        keys = tuple(self.options.obs_keys or DEFAULT_OBS_KEYS)
        absent = [k for k in keys if k not in available]
        if absent:
            raise ValueError(f"obs_keys={list(keys)}: {self.path} has no {absent}; it has {', '.join(available)}")
        return {OBSERVATION_STATE: keys}

    def _image_map(self, available: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        if not self.options.image_keys and "images" in self.ours:
            return dict(self.ours["images"])
        for key in self.options.image_keys:
            if len(available.get(key, ())) != 3 or available[key][2] != 3:
                found = [k for k, s in available.items() if len(s) == 3 and s[2] == 3]
                raise ValueError(
                    f"image_keys={list(self.options.image_keys)}: {key!r} is no (H, W, 3) image; images are {found}"
                )
        return {OBSERVATION_IMAGES + key.removesuffix("_image"): key for key in self.options.image_keys}

    def _names(self, keys: Sequence[str], available: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        return tuple(f"{key}_{i}" for key in keys for i in range(int(np.prod(available[key]))))

    def describe(self) -> ImportSource:
        kwargs = self.env_args.get("env_kwargs") or {}
        extra = {
            "env_id": self._env_id(),
            "control_hz": float(kwargs.get("control_freq") or self.ours.get("control_hz") or 0.0),
            "env_args": self.env_args,
            "obs_keys": {k: list(v) for k, v in self.vectors.items()},
            "observations_left_out": self.left_out,
            "action_limits": self.action_origin,
        }
        return ImportSource(self.features, self.action, len(self.demos), self._task(), "robomimic", extra)

    def _env_id(self) -> str:
        if self.ours.get("env_id"):
            return str(self.ours["env_id"])
        name = str(self.env_args.get("env_name") or "")
        # robomimic's type 1 is robosuite
        return f"robosuite/{name}" if name and self.env_args.get("type", 1) == 1 else name

    def _task(self) -> str:
        return self.options.task or ""

    def episodes(self) -> Iterator[Episode]:
        with import_h5py().File(self.path, "r") as file:
            for name in self.demos:
                yield self._episode(file["data"][name], name)

    def _rows(self, demo: Any, key: str, length: int) -> np.ndarray:
        """(L + 1, ...): the recorded next observation of the last step where there is one, else the last row again."""
        if key not in demo["obs"]:
            raise FormatError(f"{self.path} {demo.name}: obs has no {key!r}; it has {list(demo['obs'])}")
        rows = demo["obs"][key][()]
        if len(rows) != length:
            raise FormatError(f"{self.path} {demo.name}: obs/{key} has {len(rows)} rows, actions has {length}")
        following = demo.get("next_obs", {})
        last = following[key][-1:] if key in following and len(following[key]) == length else rows[-1:]
        return np.concatenate([rows, last])

    def _episode(self, demo: Any, name: str) -> Episode:
        options, action = self.options, demo["actions"][()].astype(np.float32)
        recorded = length = len(action)
        if length == 0:
            raise FormatError(f"{self.path} {demo.name}: actions is empty")
        arrays: dict[str, np.ndarray] = {}
        reward = demo["rewards"][()].astype(np.float32).ravel() if "rewards" in demo else None
        if reward is not None and len(reward) != length:
            raise FormatError(f"{self.path} {demo.name}: rewards has {len(reward)} rows, actions has {length}")
        success: bool | None
        terminated, truncated = np.zeros(length, bool), np.zeros(length, bool)
        if "terminated" in demo and "truncated" in demo:  # our own export
            terminated, truncated = demo["terminated"][()].astype(bool), demo["truncated"][()].astype(bool)
            success = None
        elif reward is None:
            reward, terminated, truncated, success = unknown_outcome(length, options)
        else:
            hits = np.flatnonzero(reward >= 1.0)
            success = bool(len(hits))
            if options.cut_at_success and success:
                length = int(hits[0]) + 1
                terminated[length - 1] = True
            else:
                truncated[-1] = True
        for key in ("source", "intervention_id", "weights_version", "safety", "stamp_ns"):
            if key in demo:
                arrays[key] = demo[key][()]
        arrays.setdefault("source", np.full(recorded, options.source_code))
        if "stamp_ns" not in arrays and self.describe().extra["control_hz"]:
            arrays["stamp_ns"] = np.round(np.arange(recorded) * 1e9 / self.describe().extra["control_hz"]).astype(np.int64)
        if reward is not None:
            arrays["reward"] = reward
        arrays |= {"terminated": terminated, "truncated": truncated}
        observations = {
            feature: np.concatenate([self._rows(demo, k, recorded).reshape(recorded + 1, -1) for k in keys], axis=1).astype(
                np.float32
            )[: length + 1]
            for feature, keys in self.vectors.items()
        }
        for key, values in (*observations.items(), ("actions", action)):
            if not np.isfinite(values).all():
                raise FormatError(
                    f"{self.path} {demo.name}: {key} is not finite at row {np.argwhere(~np.isfinite(values))[0][0]}"
                )
        for feature, key in self.images.items():
            observations[feature] = self._rows(demo, key, recorded)[: length + 1]
        meta = self._meta(demo, name, success)
        return Episode.from_arrays(meta, observations, action[:length], **{k: v[:length] for k, v in arrays.items()})

    def _meta(self, demo: Any, name: str, success: bool | None) -> EpisodeMeta:
        options, source = self.options, self.describe()
        extra: dict[str, Any] = {}
        saved = _json(demo.attrs.get("robot_rl_meta"), f"{self.path} {demo.name}: attribute robot_rl_meta")
        if saved:
            extra |= saved.pop("extra", {})
        extra["imported"] = provenance("robomimic", self.path.stem, demo_number(name), extra.get("imported"))
        if saved:
            saved["stratum"] = Stratum(saved["stratum"])
            return EpisodeMeta(**saved, extra=extra)
        if "states" in demo:
            extra["initial_state"] = np.asarray(demo["states"][0], np.float64).tolist()
        return EpisodeMeta(
            episode_id=episode_id(options.id_prefix or self.path.stem, demo_number(name)),
            task=self._task(),
            env_id=source.extra["env_id"],
            stratum=Stratum(options.stratum),
            success=success,
            control_hz=source.extra["control_hz"],
            extra=extra,
        )


def _json(text: Any, where: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where} is {type(value).__name__}, expected an object")
    return value


def sniff(path: Path) -> bool:
    if not path.is_file() or path.suffix not in (".hdf5", ".h5"):
        return False
    h5py = import_h5py()
    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        return "data" in file and any(n.startswith("demo_") for n in file["data"])


def open_source(path: Path, options: Options) -> RobomimicImporter:
    return RobomimicImporter(path, options)
