"""Messages between a node and its own child process: a JSON head and raw arrays on a socket pair. Never a pickle. No rclpy here."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

_LENGTH = 8


def pack(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """One message. Array bytes and the floats of the head arrive as they were, to the last bit."""
    there = {n: np.ascontiguousarray(a) for n, a in (arrays or {}).items()}
    listed = [[n, a.dtype.str, list(a.shape)] for n, a in there.items()]
    words = json.dumps({"head": dict(head), "arrays": listed}).encode()
    return b"".join([len(words).to_bytes(_LENGTH, "little"), words, *(a.tobytes() for a in there.values())])


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(head, arrays); the arrays are read-only views of ``data``. Raises ValueError for bytes that :func:`pack` did not make."""
    at = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    described = json.loads(data[_LENGTH:at])
    arrays = {}
    for name, dtype, shape in described["arrays"]:
        kind, count = np.dtype(dtype), int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, kind, count, at).reshape(shape)
        at += count * kind.itemsize
    return described["head"], arrays


class Line:
    """One end of a socket pair: whole messages, sent by any thread, received by one."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    @classmethod
    def pair(cls) -> tuple[Line, Line]:
        a, b = Pipe(duplex=True)
        return cls(a), cls(b)

    @classmethod
    def of(cls, descriptor: int) -> Line:
        return cls(Connection(descriptor))

    @property
    def descriptor(self) -> int:
        return self._connection.fileno()

    def send(self, head: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Raises OSError when nobody is at the other end any more."""
        data = pack(head, arrays)
        with self._lock:
            self._connection.send_bytes(data)

    def receive(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Waits for the next message. Raises EOFError or OSError when the other end is gone."""
        return unpack(self._connection.recv_bytes())

    def close(self) -> None:
        self._connection.close()
