"""Durable files: write, sync and rename in the order that survives a crash; advisory locks that die with their holder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """``os.write`` until everything is written; it may write less than asked on a disk that is nearly full."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(fd, view) :]


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_paths(paths: Sequence[str | os.PathLike[str]], threads: int = 8) -> None:
    """fsync many files and directories. Side by side they share the disk's journal commits, which halves the wait."""
    todo = list(paths)
    errors: list[OSError] = []

    def work() -> None:
        while True:
            try:
                fd = os.open(todo.pop(), os.O_RDONLY)
            except IndexError:
                return
            except OSError as error:
                errors.append(error)
                return
            try:
                os.fsync(fd)
            except OSError as error:
                errors.append(error)
            finally:
                os.close(fd)

    helpers = []
    for _ in range(min(threads, len(todo)) - 1):
        helper = threading.Thread(target=work, daemon=True)
        try:
            helper.start()
        except RuntimeError:  # the interpreter is shutting down: do it all here
            break
        helpers.append(helper)
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


def write_file(path: str | os.PathLike[str], data: bytes, *, sync: bool) -> None:
    """Write a new file; with ``sync`` its bytes are on the disk when this returns."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    try:
        write_all(fd, data)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def replace_json(path: Path, value: Any, *, sync: bool) -> None:
    """Readers see the old file or the new one, never half of either."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_file(temporary, json.dumps(value, indent=1).encode(), sync=sync)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        fsync_dir(path.parent)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[int]:
    """Hold an exclusive lock on ``path`` (created when absent); gives its file descriptor."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)  # closing releases the lock


class WriterLock:
    """Says that one writer of a store is alive: a locked file that names its process and host.

    The lock is the kernel's (``flock``), so it goes when the process does, however it ends.
    """

    def __init__(self, folder: Path):
        self.writer_id = uuid.uuid4().hex
        self.path = folder / f"{self.writer_id}.lock"
        while True:
            self._fd = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            # Garbage collection may have removed the name between open and lock; then the lock would guard nothing.
            try:
                if os.fstat(self._fd).st_ino == os.stat(self.path).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(self._fd)
        write_all(self._fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())

    def release(self) -> None:
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    @staticmethod
    def is_alive(folder: Path, writer_id: str) -> bool:
        """Whether some process holds the writer's lock."""
        try:
            fd = os.open(folder / f"{writer_id}.lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


def tree_bytes(path: Path) -> int:
    """Bytes of all files under ``path`` (0 when it is gone)."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total
