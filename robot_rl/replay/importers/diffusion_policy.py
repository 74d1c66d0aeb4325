"""diffusion_policy's ReplayBuffer: a zarr group with ``data/<key>`` of N rows each and ``meta/episode_ends``.

The original code writes the zarr v2 layout, as a folder or a zip file; both zarr versions are read. Which array becomes which
feature is a table (``keys``); without one, ``obs`` or ``state`` becomes ``observation.state``, ``img`` and every other
(N, H, W, 3) array a camera, and ``action`` the action.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.importers.base import (
    CommonOptions,
    FormatError,
    ImportSource,
    action_spec,
    check_type,
    episode_id,
    unknown_outcome,
)
from robot_rl.types import OBSERVATION_IMAGES, OBSERVATION_STATE, Episode, EpisodeMeta, FeatureSpec, Stratum

RANGE_ROWS = 4096  # rows read at a time while looking for the lowest and highest action


@dataclass(frozen=True)
class Options(CommonOptions):
    """Options of diffusion_policy buffers.

    Attributes:
        keys: array name under ``data/`` to feature name (``observation...`` or ``action``). Several vectors with the same
            feature are concatenated in the order given. ``None`` guesses as the module's docstring says.
        control_hz: the format does not store it (PushT is 10 Hz); 0 leaves it unknown and time stamps at zero.
    """

    keys: Mapping[str, str] | None = None
    control_hz: float = 0.0

    def __post_init__(self) -> None:
        CommonOptions.__post_init__(self)
        if not isinstance(self.control_hz, (int, float)) or isinstance(self.control_hz, bool) or not 0 <= self.control_hz < 1e6:
            raise ValueError(f"control_hz={self.control_hz!r}: accepted is a number >= 0")
        if self.keys is not None:
            check_type("keys", self.keys, Mapping, "a table of array name to feature name")
            for key, feature in self.keys.items():
                if not isinstance(feature, str) or (feature != "action" and not feature.startswith("observation.")):
                    raise ValueError(
                        f"keys[{key!r}]={feature!r}: accepted are action, {OBSERVATION_STATE}, {OBSERVATION_IMAGES}<camera>"
                    )
            if list(self.keys.values()).count("action") != 1:
                raise ValueError(f"keys={dict(self.keys)}: exactly one array becomes the action")


class DiffusionPolicyImporter:
    """Reads one episode's rows at a time."""

    def __init__(self, path: Path, options: Options):
        self.path, self.options = path, options
        self.group = _open_group(path)
        self.ends = self._ends()
        self.arrays = self._arrays()
        self.vectors, self.cameras, self.action_key = self._assign()
        used = {k for ks in self.vectors.values() for k in ks} | set(self.cameras.values()) | {self.action_key}
        self.left_out = sorted(set(self.arrays) - used)
        self.float_scale = {key: self._image_scale(key) for key in self.cameras.values()}
        self.wanted = options.select(range(len(self.ends)), path)

    def _ends(self) -> np.ndarray:
        try:
            ends = np.asarray(self.group["meta/episode_ends"][:], np.int64)
        except KeyError:
            raise FormatError(f"{self.path} has no meta/episode_ends") from None
        if ends.ndim != 1 or len(ends) == 0 or (np.diff(ends, prepend=0) <= 0).any():
            raise FormatError(f"{self.path}: meta/episode_ends must be a rising list from above 0, found {ends[:5]}")
        return ends

    def _arrays(self) -> dict[str, Any]:
        import zarr

        data = self.group.get("data")
        if not isinstance(data, zarr.Group):
            raise FormatError(f"{self.path} has no group data/")
        try:
            arrays = {name: array for name, array in sorted(data.arrays())}
        except ValueError as error:
            raise FormatError(f"{self.path}: an array of data/ cannot be opened: {error}{_codec_hint(error)}") from None
        for name, array in arrays.items():
            if array.shape[0] < self.ends[-1]:
                raise FormatError(f"{self.path}: data/{name} has {array.shape[0]} rows, episode_ends says {self.ends[-1]}")
        return arrays

    def _assign(self) -> tuple[dict[str, list[str]], dict[str, str], str]:
        """(vector feature to arrays, camera feature to array, array of the action)."""
        keys = self.options.keys
        if keys is None:
            if "action" not in self.arrays:
                raise FormatError(f"{self.path}: data/ has no action, only {', '.join(self.arrays)}; set keys")
            state = next((k for k in ("obs", "state") if k in self.arrays and self.arrays[k].ndim == 2), None)
            guess = {k: OBSERVATION_IMAGES + k for k, a in self.arrays.items() if a.ndim == 4 and a.shape[3] == 3}
            keys = {**({state: OBSERVATION_STATE} if state else {}), **guess, "action": "action"}
            if len(keys) == 1:
                raise FormatError(f"{self.path}: none of {', '.join(self.arrays)} is obs, state or (N, H, W, 3); set keys")
        absent = [k for k in keys if k not in self.arrays]
        if absent:
            raise ValueError(f"keys={dict(keys)}: {self.path} has no array {absent}; it has {', '.join(self.arrays)}")
        vectors: dict[str, list[str]] = {}
        cameras: dict[str, str] = {}
        action = next(k for k, feature in keys.items() if feature == "action")
        for key, feature in keys.items():
            shape = self.arrays[key].shape
            if feature.startswith(OBSERVATION_IMAGES):
                if len(shape) != 4 or shape[3] != 3 or feature in cameras:
                    raise ValueError(
                        f"keys[{key!r}]={feature!r}: its shape is {shape}; accepted is one (N, H, W, 3) array a camera"
                    )
                cameras[feature] = key
            elif feature != "action":
                vectors.setdefault(feature, []).append(key)
        if self.arrays[action].ndim != 2:
            raise FormatError(f"{self.path}: data/{action} has shape {self.arrays[action].shape}, expected (N, A)")
        return vectors, cameras, action

    def _image_scale(self, key: str) -> float:
        """Float images are 0..255 in PushT's file and 0..1 in others: decided on the first episode's frames."""
        array = self.arrays[key]
        if array.dtype == np.uint8:
            return 1.0
        if array.dtype.kind != "f":
            raise FormatError(f"{self.path}: data/{key} is {array.dtype}; accepted image types are uint8 and float")
        sample = self._read(key, 0, min(int(self.ends[0]), 16))
        if not np.isfinite(sample).all() or sample.min() < 0 or sample.max() > 255:
            raise FormatError(
                f"{self.path}: data/{key} holds values from {sample.min()} to {sample.max()}; accepted are 0..1 or 0..255"
            )
        return 255.0 if sample.max() <= 1.0 else 1.0

    def _read(self, key: str, start: int, end: int) -> np.ndarray:
        try:
            return np.asarray(self.arrays[key][start:end])
        except (ValueError, RuntimeError, OSError) as error:
            raise FormatError(
                f"{self.path}: data/{key} rows {start}..{end} cannot be read: {error}{_codec_hint(error)}"
            ) from None

    def _action_range(self) -> tuple[np.ndarray, np.ndarray]:
        lows, highs = [], []
        for start in range(0, int(self.ends[-1]), RANGE_ROWS):
            rows = self._read(self.action_key, start, min(start + RANGE_ROWS, int(self.ends[-1])))
            lows.append(rows.min(0))
            highs.append(rows.max(0))
        return np.min(lows, axis=0), np.max(highs, axis=0)

    def describe(self) -> ImportSource:
        spec, origin = action_spec(*self._action_range(), self.options)
        features = {
            **{name: FeatureSpec((sum(self._width(k) for k in keys),)) for name, keys in self.vectors.items()},
            **{
                name: FeatureSpec(self.arrays[key].shape[1:], "uint8", ("height", "width", "channel"))
                for name, key in self.cameras.items()
            },
        }
        extra = {
            "control_hz": float(self.options.control_hz),
            "keys": {**{k: f for f, ks in self.vectors.items() for k in ks}, **{k: f for f, k in self.cameras.items()}},
            "arrays_left_out": self.left_out,
            "action_limits": origin,
        }
        return ImportSource(features, spec, len(self.wanted), self.options.task or "", "diffusion_policy", extra)

    def _width(self, key: str) -> int:
        return int(np.prod(self.arrays[key].shape[1:]))

    def episodes(self) -> Iterator[Episode]:
        for index in self.wanted:
            yield self._episode(index)

    def _episode(self, index: int) -> Episode:
        options = self.options
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        length = end - start
        action = self._read(self.action_key, start, end).astype(np.float32)
        observations: dict[str, np.ndarray] = {}
        for feature, keys in self.vectors.items():
            rows = np.concatenate([self._read(k, start, end).reshape(length, -1) for k in keys], axis=1).astype(np.float32)
            observations[feature] = np.concatenate([rows, rows[-1:]])
        for key, values in (*observations.items(), ("action", action)):
            if not np.isfinite(values).all():
                raise FormatError(
                    f"{self.path} episode {index}: {key} is not finite at row {np.argwhere(~np.isfinite(values))[0][0]}"
                )
        for feature, key in self.cameras.items():
            frames = self._read(key, start, end)
            if frames.dtype != np.uint8:
                frames = np.clip(np.rint(frames * self.float_scale[key]), 0, 255).astype(np.uint8)
            observations[feature] = np.concatenate([frames, frames[-1:]])
        reward, terminated, truncated, success = unknown_outcome(length, options)
        stamps = np.round(np.arange(length) * 1e9 / options.control_hz) if options.control_hz else np.zeros(length)
        name = self.path.name.removesuffix(".zip").removesuffix(".zarr")
        meta = EpisodeMeta(
            episode_id=episode_id(options.id_prefix or name, index),
            task=options.task or "",
            stratum=Stratum(options.stratum),
            success=success,
            control_hz=float(options.control_hz),
            extra={"imported": {"format": "diffusion_policy", "dataset": name, "episode_index": index}},
        )
        return Episode.from_arrays(
            meta,
            observations,
            action,
            source=np.full(length, options.source_code),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            stamp_ns=stamps.astype(np.int64),
        )


def _codec_hint(error: Exception) -> str:
    if "codec" not in str(error).lower():
        return ""
    return " (image buffers of diffusion_policy are compressed by imagecodecs: pip install imagecodecs)"


def _open_group(path: Path) -> Any:
    import zarr

    try:  # its image buffers use codecs of this package, which must be announced to zarr
        from imagecodecs.numcodecs import register_codecs

        register_codecs()
    except ImportError:
        pass
    try:
        store: Any = zarr.storage.ZipStore(path, mode="r") if path.is_file() else str(path)
        return zarr.open_group(store, mode="r")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path} is not a readable zarr group (folder or .zip): {error}") from None


def _is_buffer(names: set[str]) -> bool:
    return any(f"meta/episode_ends/{n}" in names for n in (".zarray", "zarr.json"))


def sniff(path: Path) -> bool:
    if path.is_dir():
        return (
            any((path / "meta" / "episode_ends" / n).is_file() for n in (".zarray", "zarr.json")) and (path / "data").is_dir()
        )
    if path.suffix != ".zip" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _is_buffer(set(archive.namelist()))


def open_source(path: Path, options: Options) -> DiffusionPolicyImporter:
    return DiffusionPolicyImporter(path, options)
