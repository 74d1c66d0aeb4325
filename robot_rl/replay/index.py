"""Which episodes are committed, in which order: a directory scan, kept up to date."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from robot_rl.replay.episode_files import read_attributes
from robot_rl.replay.errors import CorruptEpisodeError


class EpisodeIndex:
    """Headers of the committed episodes, ordered by (commit sequence, id). Safe to use from several threads.

    The scan is the truth: there is no index file that could disagree with the folders.
    """

    SETTLED_S = 0.2  # a folder's time stamp is only as fine as the kernel's tick

    def __init__(self, folder: Path):
        self.folder = folder
        self.damaged: dict[str, str] = {}
        self._headers: dict[str, dict[str, Any]] = {}
        self._order: list[tuple[str, dict[str, Any]]] = []
        self._scanned: tuple[int, float] = (-1, 0.0)
        self._guard = threading.Lock()

    @property
    def last_sequence(self) -> int:
        return self._order[-1][1]["sequence"] if self._order else 0

    def items(self) -> list[tuple[str, dict[str, Any]]]:
        """(id, header) of every committed episode in commit order."""
        with self._guard:
            modified = os.stat(self.folder).st_mtime_ns
            settled = self._scanned[1] - modified / 1e9 > self.SETTLED_S
            if modified != self._scanned[0] or not settled:
                self._scan(modified)
            return list(self._order)

    def _scan(self, modified: int) -> None:
        now = time.time()
        names = set(os.listdir(self.folder))
        gone = self._headers.keys() - names
        new = names - self._headers.keys() - self.damaged.keys()
        for name in gone:
            del self._headers[name]
        for name in new:
            try:
                self._headers[name] = read_attributes(self.folder / name)[0]
            except CorruptEpisodeError as error:
                self.damaged[name] = str(error)
            except FileNotFoundError:
                if not (self.folder / name).is_dir():
                    continue
                self.damaged[name] = "zarr.json is missing"
        if gone or new:
            self._order = sorted(self._headers.items(), key=lambda item: (item[1]["sequence"], item[0]))
        self._scanned = (modified, now)

    def get(self, episode_id: str) -> dict[str, Any]:
        """One header. Raises KeyError for no such episode."""
        header = self._headers.get(episode_id)
        if header is None:
            self.items()
            header = self._headers.get(episode_id)
        if header is None:
            why = self.damaged.get(episode_id, "")
            raise KeyError(f"no episode {episode_id!r} in {self.folder.parent}{': ' + why if why else ''}")
        return header

    def forget(self, episode_id: str) -> None:
        with self._guard:
            self._headers.pop(episode_id, None)
            self._order = [item for item in self._order if item[0] != episode_id]
