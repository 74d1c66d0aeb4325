"""What a store promises about its episodes, and the checks that keep the promise."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from robot_rl.replay.errors import HeldOutSeedError, SchemaError
from robot_rl.seeding import is_held_out
from robot_rl.types import ActionSpec, Episode, EpisodeMeta, FeatureSpec, Stratum

FORMAT = "robot_rl.episode_store"
SCHEMA_VERSION = 1
IMAGE_CODECS = ("lossless", "jpeg")
STORED_NAME = {"reward": "next.reward", "terminated": "next.terminated", "truncated": "next.truncated"}
"""Step arrays whose name on disk differs from the field of :class:`Episode` (LeRobot's and Gymnasium's words)."""
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")
_FEATURE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")


@dataclass(frozen=True)
class StoreSpec:
    """The part of ``store.json`` that fixes what an episode looks like.

    ``noise_shape`` is (H_w, A_w) of decisions or ``None`` when decisions carry no noise; ``chunk_horizon`` is H of decisions
    or ``None`` when every episode may bring its own.
    """

    observation_features: Mapping[str, FeatureSpec]
    action: ActionSpec
    noise_shape: tuple[int, int] | None = None
    chunk_horizon: int | None = None
    stats_hash: str = ""
    flush_interval_s: float = 0.5
    image_codec: str = "lossless"
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        if not self.observation_features:
            raise ValueError("observation_features is empty: a store needs at least one observation feature")
        reserved = set(Episode.STEP_ARRAYS) | set(STORED_NAME.values())
        for name in self.observation_features:
            if not _FEATURE.fullmatch(name) or name in reserved or name.startswith("decision."):
                raise ValueError(
                    f"observation feature {name!r}: accepted are names of letters, digits, '_', '.', '-' that are not one of "
                    f"{', '.join(sorted(reserved))} and do not start with 'decision.'"
                )
        object.__setattr__(self, "observation_features", MappingProxyType(dict(self.observation_features)))
        if self.noise_shape is not None:
            object.__setattr__(self, "noise_shape", tuple(int(n) for n in self.noise_shape))
        if self.image_codec not in IMAGE_CODECS:
            raise ValueError(f"image_codec={self.image_codec!r}: accepted are {', '.join(IMAGE_CODECS)}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality={self.jpeg_quality}: accepted are 1 to 100")
        if not 0.0 <= self.flush_interval_s < 3600:
            raise ValueError(f"flush_interval_s={self.flush_interval_s}: accepted are 0 (sync every step) to 3600")

    def to_json(self) -> dict[str, Any]:
        return {
            "observation_features": {k: v.to_json() for k, v in self.observation_features.items()},
            "action": self.action.to_json(),
            "noise_shape": None if self.noise_shape is None else list(self.noise_shape),
            "chunk_horizon": self.chunk_horizon,
            "stats_hash": self.stats_hash,
            "flush_interval_s": self.flush_interval_s,
            "image_codec": self.image_codec,
            "jpeg_quality": self.jpeg_quality,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StoreSpec:
        return cls(
            observation_features={k: FeatureSpec.from_json(v) for k, v in data["observation_features"].items()},
            action=ActionSpec.from_json(data["action"]),
            noise_shape=None if data["noise_shape"] is None else tuple(data["noise_shape"]),
            chunk_horizon=data["chunk_horizon"],
            **{k: data[k] for k in ("stats_hash", "flush_interval_s", "image_codec", "jpeg_quality")},
        )


def check_episode_id(episode_id: str) -> str:
    """Raises ValueError for an id that is not a plain file name."""
    if not _ID.fullmatch(episode_id):
        raise ValueError(
            f"episode_id={episode_id!r}: accepted are 1 to 128 letters, digits, '_', '-', '.', not starting with '.'"
        )
    return episode_id


def check_meta(meta: EpisodeMeta, spec: StoreSpec) -> None:
    """Refuse held-out seeds, foreign statistics and values that JSON cannot hold."""
    if is_held_out(meta.seed):
        raise HeldOutSeedError(
            f"episode {meta.episode_id or '(new)'}: seed={meta.seed} belongs to an evaluation or final range "
            "and never enters replay; accepted are training seeds 0 to 999999, gate seeds, or None"
        )
    if meta.stats_hash and spec.stats_hash and meta.stats_hash != spec.stats_hash:
        raise SchemaError(
            f"episode {meta.episode_id or '(new)'}: stats_hash={meta.stats_hash!r}; "
            f"this store holds episodes normalised with {spec.stats_hash!r}"
        )
    meta_to_json(meta)


def meta_to_json(meta: EpisodeMeta) -> dict[str, Any]:
    """JSON of the metadata. Raises TypeError naming the key of ``extra`` that JSON cannot hold."""
    data = {f.name: getattr(meta, f.name) for f in fields(meta)}
    data["stratum"] = Stratum(meta.stratum).value
    data["seed"] = None if meta.seed is None else int(meta.seed)
    data["success"] = None if meta.success is None else bool(meta.success)
    data["weights_version"] = int(meta.weights_version)
    data["control_hz"] = float(meta.control_hz)
    extra = {}
    for key, value in meta.extra.items():
        try:
            extra[str(key)] = json.loads(json.dumps(value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value))
        except TypeError as error:
            raise TypeError(f"EpisodeMeta.extra[{key!r}] is a {type(value).__name__}: accepted are JSON values") from error
    data["extra"] = extra
    return data


def meta_from_json(data: Mapping[str, Any]) -> EpisodeMeta:
    known = {f.name for f in fields(EpisodeMeta)}
    values = {k: v for k, v in data.items() if k in known}
    values["stratum"] = Stratum(values["stratum"])
    return EpisodeMeta(**values)


def check_episode(episode: Episode, spec: StoreSpec) -> None:
    """Raises ValueError naming the array that does not fit the store's promise."""
    who = f"episode {episode.meta.episode_id or '(new)'}"
    length = len(episode)
    if length < 1:
        raise ValueError(f"{who} has no steps")
    missing, unknown = (
        set(spec.observation_features) - set(episode.observations),
        set(episode.observations) - set(spec.observation_features),
    )
    if missing or unknown:
        raise ValueError(
            f"{who}: observations lack {sorted(missing)} and have unknown {sorted(unknown)}; "
            f"the store holds {sorted(spec.observation_features)}"
        )
    for name, feature in spec.observation_features.items():
        rows = np.asarray(episode.observations[name])
        if rows.shape != (length + 1, *feature.shape):
            raise ValueError(f"{who}: {name} has shape {rows.shape}, expected {(length + 1, *feature.shape)} (steps + 1 rows)")
        if not np.can_cast(rows.dtype, feature.dtype, "same_kind"):
            raise ValueError(f"{who}: {name} has dtype {rows.dtype}, expected {feature.dtype}")
    for name, dtype in Episode.STEP_ARRAYS.items():
        rows = np.asarray(getattr(episode, name))
        shape = (length, spec.action.dim) if name.startswith("action") else (length,)
        if rows.shape != shape:
            raise ValueError(f"{who}: {name} has shape {rows.shape}, expected {shape}")
        if rows.dtype != np.dtype(dtype):
            raise ValueError(f"{who}: {name} has dtype {rows.dtype}, expected {dtype}")
    if not np.isfinite(episode.action).all():
        raise ValueError(f"{who}: action is not finite at step {int(np.flatnonzero(~np.isfinite(episode.action).all(1))[0])}")
    for name in ("terminated", "truncated"):
        early = np.flatnonzero(getattr(episode, name)[:-1])
        if len(early):
            raise ValueError(
                f"{who}: {name} is set at step {early[0]} of {length}; only the last step may end an episode: cut it there"
            )
    for i, decision in enumerate(episode.decisions):
        check_decision(decision, spec, length, f"{who}: decision {i}")
    if len({np.shape(d.chunk) for d in episode.decisions}) > 1:
        raise ValueError(
            f"{who}: its decisions have chunks of different lengths {sorted({np.shape(d.chunk) for d in episode.decisions})}"
        )
    if len(episode.decision_id) and int(episode.decision_id.max()) >= len(episode.decisions) and episode.decisions:
        raise ValueError(f"{who}: decision_id {int(episode.decision_id.max())} but only {len(episode.decisions)} decisions")


def check_decision(decision: Any, spec: StoreSpec, length: int, who: str) -> None:
    """Raises ValueError for a decision whose step, noise or chunks do not fit the store."""
    if not 0 <= decision.step < max(length, 1):
        raise ValueError(f"{who}: step={decision.step}, accepted are 0 to {max(length, 1) - 1}")
    noise = None if decision.noise is None else np.shape(decision.noise)
    if noise is not None and noise != spec.noise_shape:
        raise ValueError(f"{who}: noise has shape {noise}; the store was created with noise_shape={spec.noise_shape}")
    for name in ("chunk_base", "chunk"):
        shape = np.shape(getattr(decision, name))
        horizon = spec.chunk_horizon or (shape[0] if shape else 0)
        if len(shape) != 2 or shape[0] < 1 or shape != (horizon, spec.action.dim):
            raise ValueError(f"{who}: {name} has shape {shape}, expected {(spec.chunk_horizon or 'H', spec.action.dim)}")
    if np.shape(decision.chunk_base) != np.shape(decision.chunk):
        raise ValueError(
            f"{who}: chunk_base {np.shape(decision.chunk_base)} and chunk {np.shape(decision.chunk)} differ in shape"
        )


@functools.cache
def git_revision() -> str:
    """Commit of the source tree this package runs from, or "" for an installed package."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def jsonable(value: Any) -> Any:
    """A dataclass of plain values as JSON values."""
    return json.loads(json.dumps(asdict(value)))
