"""Write robomimic HDF5: ``data/demo_<i>/{obs,next_obs,actions,rewards,dones}`` and what our importer needs to undo it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.exporters.base import Names
from robot_rl.replay.importers.base import check_type
from robot_rl.replay.importers.robomimic import import_h5py
from robot_rl.types import OBSERVATION_IMAGES, Episode

STEP_KEYS = ("terminated", "truncated", "source", "intervention_id", "weights_version", "safety", "stamp_ns")


@dataclass(frozen=True)
class Options:
    """Options of robomimic files.

    Attributes:
        env_args: robomimic's ``env_args`` (``env_name``, ``type``, ``env_kwargs``); ``None`` makes it of the env id.
        unknown_reward: written where a reward is unknown, because robomimic's loader knows no NaN.
    """

    env_args: dict[str, Any] | None = None
    unknown_reward: float = field(default=0.0)

    def __post_init__(self) -> None:
        if self.env_args is not None:
            check_type("env_args", self.env_args, dict, "a table with env_name, type and env_kwargs")
        if not isinstance(self.unknown_reward, (int, float)) or not np.isfinite(self.unknown_reward):
            raise ValueError(f"unknown_reward={self.unknown_reward!r}: accepted is a finite number")


def obs_key(feature: str) -> str:
    """``observation.state`` to ``state``, ``observation.images.front`` to ``front_image``."""
    if feature.startswith(OBSERVATION_IMAGES):
        return feature.removeprefix(OBSERVATION_IMAGES) + "_image"
    return feature.removeprefix("observation.")


def _env_args(episode: Episode) -> dict[str, Any]:
    family, _, name = episode.meta.env_id.partition("/")
    kind = {"robosuite": 1, "gymnasium": 2}.get(family, 1)  # robomimic's numbers for robosuite and gym
    return {"env_name": name or episode.meta.env_id, "type": kind, "env_kwargs": {"control_freq": episode.meta.control_hz}}


def write(episodes: Iterable[Episode], path: Path, format: str, options: Options, names: Names) -> list[str]:
    notes: list[str] = []
    total = unknown = 0
    shapes: dict[str, tuple[int, ...]] = {}
    with import_h5py().File(path, "w") as file:
        data = file.create_group("data")
        for index, episode in enumerate(episodes):
            here = {k: v.shape[1:] for k, v in episode.observations.items()} | {"action": episode.action.shape[1:]}
            if index == 0:
                shapes = here
                _describe(data, episode, options, names)
            elif here != shapes:
                raise ValueError(f"episode {episode.meta.episode_id}: shapes are {here}, the first episode's {shapes}")
            unknown += int(np.isnan(episode.reward).sum())
            _write_demo(data.create_group(f"demo_{index}"), episode, options)
            total += len(episode)
        data.attrs["total"] = total
    if unknown:
        notes.append(f"{unknown} unknown rewards were written as {options.unknown_reward}")
    return notes


def _describe(data: Any, episode: Episode, options: Options, names: Names) -> None:
    data.attrs["env_args"] = json.dumps(options.env_args or _env_args(episode))
    images = {k for k in episode.observations if k.startswith(OBSERVATION_IMAGES)}
    ours: dict[str, Any] = {
        "vectors": {k: [obs_key(k)] for k in episode.observations if k not in images},
        "images": {k: obs_key(k) for k in sorted(images)},
        "env_id": episode.meta.env_id,
        "control_hz": episode.meta.control_hz,
    }
    if names.action is not None:
        ours["action_names"] = list(names.action.names)
    data.attrs["robot_rl"] = json.dumps(ours)


def _write_demo(demo: Any, episode: Episode, options: Options) -> None:
    demo.attrs["num_samples"] = len(episode)
    meta = asdict(episode.meta) | {"stratum": episode.meta.stratum.value}
    demo.attrs["robot_rl_meta"] = json.dumps(meta)
    demo["actions"] = episode.action
    demo["rewards"] = np.where(np.isnan(episode.reward), options.unknown_reward, episode.reward).astype(np.float32)
    demo["dones"] = (episode.terminated | episode.truncated).astype(np.uint8)
    for key in STEP_KEYS:
        demo[key] = getattr(episode, key)
    for feature, rows in episode.observations.items():
        chunks = (1, *rows.shape[1:]) if rows.dtype == np.uint8 else None
        compression = "gzip" if chunks else None
        for group, part in (("obs", rows[:-1]), ("next_obs", rows[1:])):
            demo.create_dataset(f"{group}/{obs_key(feature)}", data=part, chunks=chunks, compression=compression)
