"""What ``robot-rl store ls | show | verify | recover | gc`` do; every answer is a dataclass or dict of JSON values."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.episode_files import load_arrays, read_attributes, read_episode
from robot_rl.replay.errors import StoreError
from robot_rl.replay.files import WriterLock, tree_bytes
from robot_rl.replay.recovery import RecoverReport
from robot_rl.replay.reward_log import RewardLog, event_to_json
from robot_rl.replay.schema import StoreSpec, check_episode
from robot_rl.replay.store import FOLDERS, EpisodeStore, read_info
from robot_rl.replay.wal import read_header
from robot_rl.replay.zarr_episode import array_hash, remove_tree
from robot_rl.types import RewardEvent


@dataclass(frozen=True)
class EpisodeLine:
    """One line of ``store ls``."""

    episode_id: str
    sequence: int
    committed_ns: int
    length: int
    stratum: str
    task: str
    success: bool | None
    terminated: bool
    recovered: bool
    weights_version: int
    reward_sum: float | None
    reward_known: int
    reward_events: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """Something wrong (or odd) with one episode or file."""

    where: str
    what: str


@dataclass
class VerifyReport:
    """``ok`` when every committed episode is whole. ``warnings`` need no action to go on using the store."""

    path: str
    episodes: int = 0
    steps: int = 0
    arrays: int = 0
    reward_events: int = 0
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


@dataclass
class GcReport:
    """What garbage collection removed, or would remove: path relative to the store to bytes."""

    path: str
    dry_run: bool
    removed: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.removed.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}


def _opened(store: EpisodeStore | str | os.PathLike[str]) -> EpisodeStore:
    return store if isinstance(store, EpisodeStore) else EpisodeStore.open(store)


def list_episodes(store: EpisodeStore | str | os.PathLike[str]) -> list[EpisodeLine]:
    """Every committed episode in commit order."""
    store = _opened(store)
    lines = []
    for episode_id in store.episode_ids():
        a, meta = store.attributes(episode_id), store.meta(episode_id)
        lines.append(
            EpisodeLine(
                episode_id=episode_id,
                sequence=a["sequence"],
                committed_ns=a["committed_ns"],
                length=a["length"],
                stratum=meta.stratum.value,
                task=meta.task,
                success=meta.success,
                terminated=a["terminated"],
                recovered=meta.recovered,
                weights_version=meta.weights_version,
                reward_sum=a["reward_sum"],
                reward_known=a["reward_known"],
                reward_events=len(store.rewards(episode_id)),
            )
        )
    return lines


def show(store: EpisodeStore | str | os.PathLike[str], episode_id: str) -> dict[str, Any]:
    """Everything about one episode except its arrays' values. Raises KeyError for an unknown id."""
    store = _opened(store)
    attributes = store.attributes(episode_id)
    folder = store.path / "episodes" / episode_id
    _, consolidated = read_attributes(folder)
    low_dim = store.read(episode_id, keys=())
    sources, counts = np.unique(low_dim.source, return_counts=True)
    return {
        "path": str(folder),
        "bytes": tree_bytes(folder),
        "arrays": {
            name: {"shape": m["shape"], "dtype": m["data_type"], "codecs": [c["name"] for c in m["codecs"]]}
            for name, m in consolidated.items()
        },
        **{k: v for k, v in attributes.items() if k != "hashes"},
        "success": store.meta(episode_id).success,
        "sources": {int(s): int(n) for s, n in zip(sources, counts, strict=True)},
        "safety_steps": int((low_dim.safety != 0).sum()),
        "rewards": [event_to_json(e) for e in store.rewards(episode_id)],
    }


def verify(path: str | os.PathLike[str]) -> VerifyReport:
    """Read every array of every committed episode and hold it to its metadata: hash, length, shape, finite actions."""
    root = Path(path)
    report = VerifyReport(str(root))
    spec = StoreSpec.from_json(read_info(root))
    sequences: dict[int, str] = {}
    lengths: dict[str, int] = {}
    for folder in sorted(p for p in (root / "episodes").iterdir()):
        report.episodes += 1
        for message in _episode_errors(folder, spec, report, sequences, lengths):
            report.errors.append(Problem(folder.name, message))
    events, _, bad = RewardLog(root / "rewards", sync=False).read({})
    report.reward_events = len(events)
    if bad:
        report.warnings.append(Problem("rewards", f"{bad} unreadable lines (a crash tears at most the line being written)"))
    report.warnings += _event_warnings(events, lengths)
    for log in sorted((root / "wal").glob("*.wal")):
        try:
            header = read_header(log)
        except (StoreError, OSError) as error:
            report.warnings.append(Problem(log.name, str(error)))
            continue
        if header is None or not WriterLock.is_alive(root / "writers", header[0]["writer"]):
            report.warnings.append(Problem(log.name, "left by a dead writer: open the store for appending, or run recover"))
    if any((root / "tmp").iterdir()):
        report.warnings.append(Problem("tmp", "holds work in progress or leftovers (see gc)"))
    return report


def _episode_errors(
    folder: Path, spec: StoreSpec, report: VerifyReport, sequences: dict[int, str], lengths: dict[str, int]
) -> Iterator[str]:
    try:
        attributes, consolidated = read_attributes(folder)
    except (StoreError, OSError) as error:
        yield f"metadata: {error}"
        return
    damaged = False
    hashes = attributes["hashes"]
    for name in sorted(hashes.keys() | consolidated.keys()):
        report.arrays += 1
        try:
            array = load_arrays(folder, consolidated, [name])[name]
        except (StoreError, OSError, ValueError) as error:
            damaged = True
            yield f"{name}: {error}"
            continue
        if name not in hashes or array_hash(array) != hashes[name]:
            damaged = True
            yield f"{name}: its values are not those that were written (hash differs)"
    if damaged:
        return
    try:
        episode = read_episode(folder, spec)
        check_episode(episode, spec)
    except (StoreError, OSError, ValueError) as error:
        yield str(error)
        return
    report.steps += len(episode)
    lengths[folder.name] = len(episode)
    if len(episode) != attributes["length"]:
        yield f"length {len(episode)}, the metadata say {attributes['length']}"
    if episode.meta.episode_id != folder.name:
        yield f"the metadata name it {episode.meta.episode_id!r}"
    if not (episode.terminated[-1] or episode.truncated[-1]):
        yield "its last step neither terminated nor truncated"
    if attributes["sequence"] in sequences:
        yield f"commit sequence {attributes['sequence']} is also that of {sequences[attributes['sequence']]}"
    sequences[attributes["sequence"]] = folder.name
    for name, rows in episode.observations.items():
        if rows.dtype.kind == "f" and not np.isfinite(rows).all():
            report.warnings.append(Problem(folder.name, f"{name} has values that are not finite"))


def _event_warnings(events: list[RewardEvent], lengths: dict[str, int]) -> Iterator[Problem]:
    orphans = sum(e.episode_id not in lengths for e in events)
    if orphans:
        yield Problem("rewards", f"{orphans} events are about episodes that are not committed here")
    outside = sorted({e.episode_id for e in events if e.step > lengths.get(e.episode_id, e.step)})
    for episode_id in outside:
        yield Problem(episode_id, f"has reward events beyond its last observation ({lengths[episode_id]})")


def recover(path: str | os.PathLike[str]) -> RecoverReport:
    """Turn dead writers' logs into truncated episodes (opening a store for appending does the same)."""
    with EpisodeStore.open(path, mode="a", recover=False) as store:
        return store.recover()


def collect_garbage(path: str | os.PathLike[str], dry_run: bool = True, *, discarded: bool = True) -> GcReport:
    """Remove what nothing refers to: dead writers' leftovers and locks and, with ``discarded``, what was set aside.

    Running writers' files and unrecovered logs are never touched.
    """
    root = Path(path)
    read_info(root)
    report = GcReport(str(root), dry_run)
    doomed: list[Path] = []
    for item in sorted((root / "tmp").iterdir()):
        if not WriterLock.is_alive(root / "writers", item.name.partition("-")[0]):
            doomed.append(item)
    logs = set()
    for log in (root / "wal").glob("*.wal"):
        header = read_header(log)
        if header is not None:
            logs.add(header[0]["writer"])
    for lock in sorted((root / "writers").glob("*.lock")):
        young = time.time() - lock.stat().st_mtime < 60  # may be about to be locked
        if not young and lock.stem not in logs and not WriterLock.is_alive(root / "writers", lock.stem):
            doomed.append(lock)
    if discarded:
        doomed += sorted((root / "discarded").iterdir())
    for folder in (root, *(root / f for f in FOLDERS)):
        # A half-replaced JSON file of a process that died in between; an hour is longer than any replace takes.
        doomed += [p for p in folder.glob(".*.tmp") if time.time() - p.stat().st_mtime > 3600]
    for item in doomed:
        report.removed[str(item.relative_to(root))] = tree_bytes(item) if item.is_dir() else item.lstat().st_size
        if not dry_run:
            remove_tree(item) if item.is_dir() else item.unlink(missing_ok=True)
    return report
