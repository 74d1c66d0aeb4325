"""The table of formats that episodes can be written to, and what an export says afterwards.

An export is written beside its place under a temporary name and renamed when complete: a folder or file with the final name
is always whole.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from robot_rl.types import ActionSpec, Episode, FeatureSpec


@dataclass(frozen=True)
class ExportReport:
    """What was written. ``notes`` say what the format could not hold."""

    path: str
    format: str
    episode_ids: tuple[str, ...]
    steps: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{len(self.episode_ids)} episodes, {self.steps} steps written to {self.path} ({self.format})"
        return "\n".join([head, *self.notes])


@dataclass(frozen=True)
class Names:
    """Names of vector elements, which episodes themselves do not carry."""

    observation_features: Mapping[str, FeatureSpec]
    action: ActionSpec | None


_FORMATS = {
    "lerobot_v3": ("robot_rl.replay.exporters.lerobot", "LeRobot dataset v3.0 (folder)"),
    "lerobot_v21": ("robot_rl.replay.exporters.lerobot", "LeRobot dataset v2.1 (folder)"),
    "robomimic": ("robot_rl.replay.exporters.robomimic", "robomimic HDF5 (file)"),
    "mcap": ("robot_rl.replay.exporters.mcap", "MCAP with ROS 2 messages, for Foxglove and rosbag2 (file)"),
}


def formats() -> dict[str, str]:
    """Name to one-line summary of every format that can be written."""
    return {name: summary for name, (_, summary) in _FORMATS.items()}


def export(
    episodes: Iterable[Episode],
    path: str | Path,
    format: str = "lerobot_v3",
    *,
    observation_features: Mapping[str, FeatureSpec] | None = None,
    action: ActionSpec | None = None,
    **options: Any,
) -> ExportReport:
    """Write episodes, one in memory at a time.

    Args:
        episodes: all with the same observation features and action size.
        path: a folder (LeRobot) or file (robomimic) that does not exist yet; an empty folder is accepted.
        format: a name of :func:`formats`.
        observation_features, action: where the names of vector elements come from.
        options: see the ``Options`` of the format.

    Raises:
        ValueError: unknown format or option, a wrong value, or episodes that do not fit each other or the format.
        FileExistsError: there is something at ``path``.
    """
    if format not in _FORMATS:
        raise ValueError(f"format={format!r}: accepted are {', '.join(_FORMATS)}")
    module = importlib.import_module(_FORMATS[format][0])
    accepted = [f.name for f in dataclasses.fields(module.Options)]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        given = ", ".join(f"{k}={options[k]!r}" for k in unknown)
        raise ValueError(f"{format} exporter: unknown option {given}; accepted are {', '.join(accepted)}")
    checked = module.Options(**options)
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists; an export never overwrites: choose another path or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    _remove(partial)
    counted = _Counted(episodes)
    try:
        notes = module.write(counted, partial, format, checked, Names(observation_features or {}, action))
        if not counted.ids:
            raise ValueError(f"nothing to export to {target}: no episode was given")
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        _remove(partial)
        raise
    if counted.decisions:
        notes = [
            *notes,
            f"the {counted.decisions} policy decisions (noise, chunks) have no place in {format} and were left out",
        ]
    return ExportReport(str(target), format, tuple(counted.ids), counted.steps, tuple(notes))


class EpisodeShelf(Protocol):
    """The part of an episode store that an export needs."""

    def episode_ids(self) -> Sequence[str]: ...

    def read(self, episode_id: str) -> Episode: ...


def export_from(
    store: EpisodeShelf,
    path: str | Path,
    format: str = "lerobot_v3",
    *,
    episode_ids: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ExportReport:
    """What ``robot-rl export`` runs: write some or all episodes of a store.

    Names of vector elements are taken from ``store.observation_features`` and ``store.action`` where the store has them.

    Raises:
        ValueError: an id is not in the store; otherwise as :func:`export`.
    """
    present = list(store.episode_ids())
    wanted = present if episode_ids is None else list(episode_ids)
    absent = sorted(set(wanted) - set(present))
    if absent:
        raise ValueError(f"episode_ids: the store of {len(present)} episodes does not have {', '.join(absent[:10])}")
    for name in ("observation_features", "action"):
        options.setdefault(name, getattr(store, name, None))

    def read() -> Iterator[Episode]:
        for done, episode_id in enumerate(wanted, 1):
            yield store.read(episode_id)
            if progress is not None:
                progress(done, len(wanted))

    return export(read(), path, format, **options)


class _Counted:
    """Passes episodes on and keeps what the report needs; refuses an empty episode."""

    def __init__(self, episodes: Iterable[Episode]):
        self.episodes, self.steps, self.decisions = episodes, 0, 0
        self.ids: list[str] = []

    def __iter__(self) -> Iterator[Episode]:
        for episode in self.episodes:
            if len(episode) == 0:
                raise ValueError(f"episode {episode.meta.episode_id} has no steps")
            yield episode
            self.ids.append(episode.meta.episode_id)
            self.steps += len(episode)
            self.decisions += len(episode.decisions)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
