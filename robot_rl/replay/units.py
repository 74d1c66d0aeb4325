"""One committed episode as one file for the wire, and the way back into a store on another machine.

A unit is an uncompressed tar in a fixed order (the arrays in it are compressed already): ``store.json`` with what the store
promises about its episodes, then every file of the episode. The same episode always gives the same bytes, so a sender that was
cut off can go on in the middle without keeping a copy.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from robot_rl.replay.episode_files import load_arrays, read_attributes, read_episode, seal_episode
from robot_rl.replay.errors import CorruptEpisodeError, SchemaError, StoreError, full_disk_is_clear
from robot_rl.replay.files import fsync_dir, locked, sync_paths
from robot_rl.replay.schema import SCHEMA_VERSION, StoreSpec, check_episode, check_episode_id
from robot_rl.replay.store import EpisodeStore, read_info
from robot_rl.replay.zarr_episode import array_hash, remove_tree

SPEC = "store.json"
EPISODE = "episode"
_BLOCK = 512
_MAX_MEMBERS = 200_000
_MAX_SPEC = 1 << 20
PROMISES = ("observation_features", "action", "noise_shape", "chunk_horizon", "stats_hash")
"""What two stores must agree on before an episode of one fits into the other."""


class UnitError(ValueError):
    """A unit that must not enter a store; the message names what is wrong."""


class EpisodeUnit:
    """The bytes of one committed episode's unit, read from its files as they are needed.

    Raises:
        KeyError: no such episode.
    """

    def __init__(self, store: str | os.PathLike[str], episode_id: str) -> None:
        root = Path(store)
        self.folder = root / "episodes" / check_episode_id(episode_id)
        if not (self.folder / "zarr.json").is_file():
            raise KeyError(f"no episode {episode_id!r} in {root}")
        info = read_info(root)
        spec = {"schema_version": info["schema_version"], **StoreSpec.from_json(info).to_json()}
        head = json.dumps(spec, sort_keys=True).encode()
        self._parts: list[tuple[int, bytes | Path]] = []
        self.size = 0
        self._add(SPEC, len(head), head)
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            self._add(f"{EPISODE}/{path.relative_to(self.folder).as_posix()}", path.stat().st_size, path)
        self._append(b"\0" * (2 * _BLOCK), 2 * _BLOCK)

    def _add(self, name: str, size: int, content: bytes | Path) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o644
        header = member.tobuf(tarfile.PAX_FORMAT)
        self._append(header, len(header))
        self._append(content, size)
        self._append(b"\0" * (-size % _BLOCK), -size % _BLOCK)

    def _append(self, content: bytes | Path, size: int) -> None:
        if size:
            self._parts.append((self.size, content))
            self.size += size

    def read(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset`` on. Raises OSError when a file went away meanwhile."""
        end = min(offset + length, self.size)
        out = io.BytesIO()
        for i, (start, content) in enumerate(self._parts):
            stop = self._parts[i + 1][0] if i + 1 < len(self._parts) else self.size
            low, high = max(start, offset), min(stop, end)
            if low >= high:
                continue
            if isinstance(content, bytes):
                out.write(content[low - start : high - start])
            else:
                with open(content, "rb") as file:
                    file.seek(low - start)
                    data = file.read(high - low)
                if len(data) != high - low:
                    raise OSError(f"{content} is shorter than it was")
                out.write(data)
        return out.getvalue()

    def chunks(self, length: int = 1 << 20) -> Iterator[bytes]:
        for offset in range(0, self.size, length):
            yield self.read(offset, length)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in self.chunks():
            digest.update(part)
        return digest.hexdigest()


def received_sha256(store: Path, episode_id: str) -> str | None:
    """The hash of the unit an episode came in, also when it was set aside since; None when it is not here.

    An episode that did not come as a unit gives an empty string: whatever is sent under its id is another one.
    """
    for folder in ("episodes", "discarded"):
        try:
            attributes, _ = read_attributes(store / folder / check_episode_id(episode_id))
        except FileNotFoundError:
            continue
        return str(attributes.get("unit_sha256", ""))
    return None


def adopt_unit(store: Path, file: BinaryIO, episode_id: str, sha256: str) -> None:
    """Unpack a verified unit into the store at ``store`` (made when it is not there); all of it appears, or nothing.

    Raises:
        UnitError: it holds something else than one whole episode of this store's kind. Nothing changed.
        StoreError: the id is taken, or the disk is full.
    """
    check_episode_id(episode_id)
    spec = _store_for(store, file)
    with EpisodeStore.open(store, mode="a", recover=False) as opened:
        if received_sha256(store, episode_id) is not None:
            raise StoreError(f"episode_id={episode_id!r} is taken in {store}")
        work = store / "tmp" / f"unit-{uuid.uuid4().hex}"
        final = store / "episodes" / episode_id
        try:
            with full_disk_is_clear(final, "receiving episode"):
                work.mkdir()
                files = _unpack(file, work)
                attributes, consolidated = _verified(work, spec, episode_id)
                sync_paths([*files, *(p for p in work.rglob("*") if p.is_dir())])
                with locked(store / "commit.lock") as fd:
                    if final.exists():
                        raise StoreError(f"episode_id={episode_id!r} is already committed in {store}")
                    ids = opened.episode_ids()
                    last = opened.attributes(ids[-1])["sequence"] if ids else 0
                    sequence = max(int(os.pread(fd, 32, 0) or b"0"), last) + 1
                    attributes |= {"sequence": sequence, "committed_ns": time.time_ns(), "unit_sha256": sha256}
                    seal_episode(work, attributes, consolidated, sync=True)
                    os.pwrite(fd, b"%020d" % sequence, 0)
                    os.rename(work, final)
                fsync_dir(final.parent)
        finally:
            remove_tree(work)


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for count, member in enumerate(tar):
                if count > _MAX_MEMBERS:
                    raise UnitError(f"more than {_MAX_MEMBERS} files")
                if not member.isreg():
                    raise UnitError(f"{member.name!r} is not a regular file")
                yield tar, member
    except tarfile.TarError as error:
        raise UnitError(f"not a tar file: {error}") from error


def _store_for(store: Path, file: BinaryIO) -> StoreSpec:
    """Make or check the store that the unit's first file describes."""
    for tar, member in _members(file):
        if member.name != SPEC or member.size > _MAX_SPEC:
            raise UnitError(f"the first file is {member.name!r}: accepted is {SPEC}")
        data = tar.extractfile(member)
        assert data is not None
        try:
            raw = json.loads(data.read())
            if raw["schema_version"] != SCHEMA_VERSION:
                raise UnitError(f"written with schema {raw['schema_version']}; this version reads {SCHEMA_VERSION}")
            spec = StoreSpec.from_json(raw)
        except (KeyError, TypeError, ValueError) as error:
            raise error if isinstance(error, UnitError) else UnitError(f"{SPEC}: {error}") from error
        break
    else:
        raise UnitError("it is empty")
    if not (store / "store.json").exists():
        options = {
            k: getattr(spec, k)
            for k in ("noise_shape", "chunk_horizon", "stats_hash", "flush_interval_s", "image_codec", "jpeg_quality")
        }
        with suppress(FileExistsError):  # another connection was first
            EpisodeStore.create(store, observation_features=spec.observation_features, action=spec.action, **options).close()
    have, got = StoreSpec.from_json(read_info(store)).to_json(), spec.to_json()
    for name in PROMISES:
        if have[name] != got[name]:
            raise UnitError(f"{name}={got[name]}; the store at the learner holds episodes with {have[name]}")
    return spec


def _unpack(file: BinaryIO, work: Path) -> list[Path]:
    written = []
    for tar, member in _members(file):
        if member.name == SPEC:
            continue
        parts = member.name.split("/")
        plain = len(parts) in (2, 3) and parts[0] == EPISODE
        if not plain or any(p in ("", ".", "..") or "\0" in p or "\\" in p for p in parts):
            raise UnitError(f"{member.name!r} is not a file of an episode")
        target = work.joinpath(*parts[1:])
        target.parent.mkdir(exist_ok=True)
        data = tar.extractfile(member)
        assert data is not None
        with open(target, "xb") as out:
            while block := data.read(1 << 20):
                out.write(block)
        written.append(target)
    return written


def _verified(work: Path, spec: StoreSpec, episode_id: str) -> tuple[dict, dict]:
    """Attributes and metadata of the unpacked episode, after decoding all of it and comparing every array's hash."""
    try:
        attributes, consolidated = read_attributes(work)
        episode = read_episode(work, spec)
        if episode.meta.episode_id != episode_id:
            raise UnitError(f"it holds episode {episode.meta.episode_id!r}, it was sent as {episode_id!r}")
        check_episode(episode, spec)
        for name, wanted in attributes["hashes"].items():
            if array_hash(np.ascontiguousarray(load_arrays(work, consolidated, [name])[name])) != wanted:
                raise UnitError(f"array {name!r} does not have the hash it was written with")
    except (FileNotFoundError, CorruptEpisodeError, SchemaError, KeyError, TypeError) as error:
        raise UnitError(f"episode {episode_id!r}: {error}") from error
    except ValueError as error:
        raise error if isinstance(error, UnitError) else UnitError(str(error)) from error
    return attributes, consolidated
