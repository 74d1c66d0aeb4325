"""What a dead writer left behind becomes a truncated episode, once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.errors import StoreError
from robot_rl.replay.files import WriterLock
from robot_rl.replay.schema import FORMAT
from robot_rl.replay.wal import WalContent, read_header, read_wal
from robot_rl.replay.writer import assemble
from robot_rl.types import Episode

_log = logging.getLogger(__name__)


@dataclass
class RecoverReport:
    """Episode ids by what became of their logs.

    ``recovered``: cut short, now truncated episodes. ``completed``: their commit had begun and was finished, nothing is
    missing. ``already_committed`` and ``empty``: only the log was removed. ``live``: their writers are running. ``failed``:
    id to message; the log stays where it is. ``unreadable``: set aside in ``discarded/``.
    """

    recovered: dict[str, int] = field(default_factory=dict)
    completed: dict[str, int] = field(default_factory=dict)
    already_committed: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    live: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    torn_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def episode_from_log(content: WalContent) -> Episode:
    """The logged steps as an episode: complete when the log was closed, else truncated with its last observation repeated."""
    final = None if content.final is None else list(content.final.values())
    meta = content.meta
    if final is None:
        meta.recovered = True
        meta.extra = {**meta.extra, "final_observation": "repeated"}

    def column(name: str, extra: int = 0) -> np.ndarray:
        rows = content.column(name)
        return np.concatenate([rows, rows[-1:]]) if extra else rows

    return assemble(meta, content.spec, column, content.decisions, final)


def recover_logs(
    root: Path, write: Callable[[Episode], None], *, own: str = "", running: Collection[str] = ()
) -> RecoverReport:
    """Go through ``wal/``; ``write`` commits one episode. Called under the recovery lock.

    ``own`` is the caller's writer id and ``running`` the episodes it is still writing.
    """
    report = RecoverReport()
    for path in sorted((root / "wal").glob("*.wal")):
        name = path.stem
        try:
            header = read_header(path)
            writer = "" if header is None else header[0]["writer"]
            if name in running or (writer and writer != own and WriterLock.is_alive(root / "writers", writer)):
                report.live.append(name)
                continue
            if (root / "episodes" / name / "zarr.json").exists():
                path.unlink()
                report.already_committed.append(name)
                continue
            content = read_wal(path)
            if content is None:
                os.rename(path, root / "discarded" / path.name)
                report.unreadable.append(name)
                continue
            report.torn_bytes += content.torn_bytes
            if not len(content.steps):
                path.unlink()
                report.empty.append(name)
                continue
            episode = episode_from_log(content)
            write(episode)
            path.unlink()
            (report.completed if content.final is not None else report.recovered)[name] = len(episode)
        except FileNotFoundError:
            continue  # its writer finished between listing and looking
        except (StoreError, OSError, ValueError, KeyError) as error:
            report.failed[name] = f"{type(error).__name__}: {error}"
    if report.recovered or report.completed:
        _log.info("%s: recovered %s, completed %s", root, report.recovered, report.completed)
    if report.failed or report.unreadable:
        _log.warning("%s: logs that could not be recovered: %s %s", root, report.failed, report.unreadable)
    return report
