"""A small film of every episode, from the pictures the page shows: what a person scrubs through to label it.

Policies that read no cameras record none, and lossless pictures of those that do are too large for a phone; so clips are kept apart
from the store, few pictures a second, and the oldest go when there are too many.
"""

from __future__ import annotations

import os
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from robot_rl.console.frames import Frame, unpack

_SIZE = struct.Struct("<I")
_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,120}")
SUFFIX = ".clip"


def check_id(episode_id: str) -> str:
    """Raises ValueError for what is no episode id (and could be a path)."""
    if not _SAFE.fullmatch(episode_id) or episode_id.startswith("."):
        raise ValueError(f"episode={episode_id[:60]!r}: no such episode")
    return episode_id


class ClipRecorder:
    """Writes the frames of the running episode; one thread at a time.

    Args:
        hz: pictures a second and camera.
        keep: clips that stay; older ones are deleted when an episode begins.
        most_bytes: of one clip; what comes after it is not kept.
    """

    def __init__(self, folder: Path, *, hz: float = 5.0, keep: int = 500, most_bytes: int = 64 << 20) -> None:
        self.folder, self._keep, self._most = folder, keep, most_bytes
        self._period_ns = int(0.9e9 / hz)
        self._file: BinaryIO | None = None
        self._episode = ""
        self._written: dict[str, tuple[int, int]] = {}  # camera: number and stamp of its last picture in the clip
        self._bytes = 0
        self.problem = ""

    def look(self, episode_id: str, running: bool, frames: Mapping[str, Frame]) -> None:
        """Several times a second. A disk that refuses costs the clip and nothing else."""
        try:
            if not running or episode_id != self._episode:
                self._end()
            if running and self._file is None and episode_id != self._episode and _SAFE.fullmatch(episode_id):
                self._begin(episode_id)
            if self._file is not None:
                for camera, frame in frames.items():
                    number, stamp = self._written.get(camera, (0, 0))
                    if frame.number != number and frame.encoded_ns - stamp >= self._period_ns and self._bytes < self._most:
                        data = frame.packed()
                        self._file.write(_SIZE.pack(len(data)) + data)
                        self._bytes += len(data)
                        self._written[camera] = (frame.number, frame.encoded_ns)
                self._file.flush()
            self.problem = ""
        except OSError as error:
            self.problem = f"clips cannot be written: {error}"
            self._file = None

    def _begin(self, episode_id: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        clips = sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda f: f.stat().st_mtime)
        for old in clips[: max(0, len(clips) - self._keep + 1)]:
            old.unlink(missing_ok=True)
        self._file = open(self.folder / f"{episode_id}{SUFFIX}", "wb")  # noqa: SIM115
        self._episode, self._written, self._bytes = episode_id, {}, 0

    def _end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    close = _end


class Clips:
    """Reads them; a few stay open."""

    def __init__(self, folder: Path, keep: int = 8) -> None:
        self.folder, self._keep = folder, keep
        self._read: OrderedDict[str, tuple[int, dict[str, list[Frame]]]] = OrderedDict()
        self._names: dict[str, tuple[str, ...]] = {}

    def cameras(self, episode_id: str) -> dict[str, list[Frame]]:
        """The pictures of each camera in their order; empty where there is no clip. A cut end is left out."""
        path = self.folder / f"{check_id(episode_id)}{SUFFIX}"
        try:
            size = os.stat(path).st_size
        except FileNotFoundError:
            return {}
        known = self._read.get(episode_id)
        if known is None or known[0] != size:
            self._read[episode_id] = known = (size, self._load(path))
            while len(self._read) > self._keep:
                self._read.popitem(last=False)
        self._read.move_to_end(episode_id)
        return known[1]

    def names(self, episode_id: str) -> tuple[str, ...]:
        """The cameras of a clip, from its first records; nothing else of it is read."""
        if episode_id in self._names:
            return self._names[episode_id]
        found: set[str] = set()
        try:
            with open(self.folder / f"{check_id(episode_id)}{SUFFIX}", "rb") as file:
                for _ in range(16):
                    head = file.read(_SIZE.size)
                    if len(head) < _SIZE.size:
                        break
                    (size,) = _SIZE.unpack(head)
                    data = file.read(min(size, 256))
                    found.add(unpack(data).camera)
                    file.seek(size - len(data), os.SEEK_CUR)
        except (FileNotFoundError, ValueError):
            pass
        if found:
            self._names[episode_id] = tuple(sorted(found))
        return tuple(sorted(found))

    @staticmethod
    def _load(path: Path) -> dict[str, list[Frame]]:
        out: dict[str, list[Frame]] = {}
        data = path.read_bytes()
        at = 0
        while at + _SIZE.size <= len(data):
            (size,) = _SIZE.unpack_from(data, at)
            at += _SIZE.size
            if at + size > len(data):
                break
            try:
                frame = unpack(data[at : at + size])
            except ValueError:
                break
            out.setdefault(frame.camera, []).append(frame)
            at += size
        return out
