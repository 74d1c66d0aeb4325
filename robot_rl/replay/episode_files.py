"""Between an :class:`Episode` in RAM and its folder in a store."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.errors import CorruptEpisodeError, SchemaError
from robot_rl.replay.schema import SCHEMA_VERSION, STORED_NAME, StoreSpec, meta_from_json, meta_to_json
from robot_rl.replay.zarr_episode import (
    array_hash,
    jpeg_decode,
    jpeg_encode,
    read_array,
    read_group,
    write_arrays,
    write_group,
)
from robot_rl.types import Decision, Episode

ATTRIBUTES = "robot_rl"
_NAN = float("nan")
_FILL: dict[str, Any] = {
    "action": _NAN, "action_base": _NAN, "action_policy": _NAN, "action_human": _NAN, "reward": _NAN,
    "terminated": False, "truncated": False, "decision_id": -1, "chunk_row": -1, "intervention_id": -1,
}  # fmt: skip
_DECISION_SCALARS = {
    "step": "int32",
    "log_prob": "float64",
    "candidate_index": "int32",
    "weights_version": "int32",
    "explored": "bool",
}


def decision_arrays(decisions: list[Decision], spec: StoreSpec) -> dict[str, np.ndarray]:
    """Decisions as arrays with a leading axis D (``decision.<field>``); empty when there are none."""
    if not decisions:
        return {}
    out = {f"decision.{n}": np.array([getattr(d, n) for d in decisions], t) for n, t in _DECISION_SCALARS.items()}
    out["decision.chunk_base"] = np.stack([np.asarray(d.chunk_base, np.float32) for d in decisions])
    out["decision.chunk"] = np.stack([np.asarray(d.chunk, np.float32) for d in decisions])
    if spec.noise_shape is not None:
        absent = np.full(spec.noise_shape, np.nan, np.float32)
        out["decision.noise"] = np.stack([absent if d.noise is None else np.asarray(d.noise, np.float32) for d in decisions])
    return out


def decisions_from_arrays(arrays: Mapping[str, np.ndarray]) -> list[Decision]:
    if "decision.step" not in arrays:
        return []
    noise = arrays.get("decision.noise")
    absent = np.ones(len(arrays["decision.step"]), bool) if noise is None else np.isnan(noise).all((1, 2))
    out = []
    for i, none in enumerate(absent):
        scalars = {n: arrays[f"decision.{n}"][i].item() for n in _DECISION_SCALARS}
        chunks = {n: arrays[f"decision.{n}"][i] for n in ("chunk_base", "chunk")}
        out.append(Decision(noise=None if noise is None or none else noise[i], **scalars, **chunks))
    return out


def write_episode(folder: Path, episode: Episode, spec: StoreSpec, *, sync: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write every array of ``episode`` below the existing ``folder``; :func:`seal_episode` makes a group of it.

    Returns:
        the attributes (without the commit's sequence) and the metadata to consolidate.
    """
    arrays: dict[str, tuple[np.ndarray, Any]] = {}
    hashes: dict[str, str] = {}
    jpeg: list[str] = []
    for name, feature in spec.observation_features.items():
        rows = np.ascontiguousarray(episode.observations[name], feature.dtype)
        image = len(feature.shape) == 3 and feature.dtype == "uint8" and feature.shape[-1] in (1, 3)
        if image and spec.image_codec == "jpeg":
            data, offsets = jpeg_encode(rows, spec.jpeg_quality)
            parts = {f"{name}.jpeg": data, f"{name}.jpeg_offsets": offsets}
            jpeg.append(name)
        else:
            parts = {name: rows}
        for part, value in parts.items():
            arrays[part] = (value, 0.0 if value.dtype.kind == "f" else False if value.dtype == bool else 0)
            hashes[part] = array_hash(value)
    for name, dtype in Episode.STEP_ARRAYS.items():
        rows = np.ascontiguousarray(getattr(episode, name), dtype)
        arrays[STORED_NAME.get(name, name)] = (rows, _FILL.get(name, 0))
        hashes[STORED_NAME.get(name, name)] = array_hash(rows)
    for name, rows in decision_arrays(episode.decisions, spec).items():
        arrays[name] = (rows, _NAN if rows.dtype.kind == "f" else False if rows.dtype == bool else 0)
        hashes[name] = array_hash(rows)
    consolidated = write_arrays(folder, arrays, sync=sync)
    attributes = {
        "schema_version": SCHEMA_VERSION,
        "meta": meta_to_json(episode.meta),
        "length": len(episode),
        "decisions": len(episode.decisions),
        "terminated": bool(episode.terminated[-1]),
        "truncated": bool(episode.truncated[-1]),
        "reward_sum": _finite(float(np.nansum(episode.reward))),
        "reward_known": int(np.isfinite(episode.reward).sum()),
        "jpeg": jpeg,
        "hashes": hashes,
    }
    return attributes, consolidated


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def seal_episode(folder: Path, attributes: Mapping[str, Any], consolidated: Mapping[str, Any], *, sync: bool) -> None:
    write_group(folder, {ATTRIBUTES: dict(attributes)}, consolidated, sync=sync)


def read_attributes(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(attributes, consolidated metadata) of a committed episode.

    Raises:
        FileNotFoundError: no such episode.
        SchemaError: written by another version.
        CorruptEpisodeError: the metadata is unreadable.
    """
    group = read_group(folder)
    try:
        attributes = group["attributes"][ATTRIBUTES]
        version = attributes["schema_version"]
        consolidated = group["consolidated_metadata"]["metadata"]
    except (KeyError, TypeError) as error:
        raise CorruptEpisodeError(f"{folder}: zarr.json lacks {error}") from error
    if version != SCHEMA_VERSION:
        raise SchemaError(f"{folder} was written with schema {version}; this version reads {SCHEMA_VERSION}")
    return attributes, consolidated


def load_arrays(folder: Path, consolidated: Mapping[str, Any], names: Collection[str]) -> dict[str, np.ndarray]:
    for name in names:
        if name not in consolidated:
            raise CorruptEpisodeError(f"{folder}: array {name!r} is missing")
    return {name: read_array(folder, name, consolidated[name]) for name in names}


def read_episode(folder: Path, spec: StoreSpec, keys: Collection[str] | None = None) -> Episode:
    """Load an episode; ``keys`` are the observation features to decode (``None``: all).

    Raises:
        FileNotFoundError, SchemaError, CorruptEpisodeError: see :func:`read_attributes`.
        KeyError: a key that is not an observation feature.
    """
    attributes, consolidated = read_attributes(folder)
    wanted = list(spec.observation_features) if keys is None else list(keys)
    for key in wanted:
        if key not in spec.observation_features:
            raise KeyError(f"{key!r} is no observation feature; accepted are {', '.join(spec.observation_features)}")
    steps = {field: STORED_NAME.get(field, field) for field in Episode.STEP_ARRAYS}
    decisions = [name for name in consolidated if name.startswith("decision.")]
    arrays = load_arrays(folder, consolidated, [*steps.values(), *decisions])
    observations = {}
    for key in wanted:
        if key in attributes["jpeg"]:
            parts = load_arrays(folder, consolidated, [f"{key}.jpeg", f"{key}.jpeg_offsets"])
            observations[key] = jpeg_decode(
                parts[f"{key}.jpeg"], parts[f"{key}.jpeg_offsets"], spec.observation_features[key].shape
            )
        else:
            observations[key] = load_arrays(folder, consolidated, [key])[key]
    length = attributes["length"]
    for name, rows in {**{n: arrays[n] for n in steps.values()}, **observations}.items():
        expected = length + (name in observations)
        if len(rows) != expected:
            raise CorruptEpisodeError(f"{folder}: {name} has {len(rows)} rows, expected {expected}")
    return Episode(
        meta=meta_from_json(attributes["meta"]),
        observations=observations,
        decisions=decisions_from_arrays(arrays),
        **{field: arrays[name] for field, name in steps.items()},
    )
