"""Messages between a robot and its policy server: a JSON head and raw arrays, length first. Nothing that could be code.

::

    8 bytes   length of what follows, little endian
    4 bytes   length of the head
    head      JSON: {"arrays": [[name, dtype, shape], ...], ...}
    arrays    C order, one after the other

Lengths, names, dtypes and shapes are checked before a byte of an array is looked at: what comes from a network is no friend.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np

from robot_rl.policies.remote.errors import MessageError

PROTOCOL = 1
MAX_BYTES = 256 << 20
MAX_HEAD = 1 << 20
MAX_ARRAYS = 64
DTYPES = ("|u1", "|b1", "<f4", "<f8", "<i4", "<i8")

Arrays = dict[str, np.ndarray]


def pack(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """One message, ready to send.

    Raises:
        MessageError: an array of a type that does not travel.
    """
    there = {n: np.ascontiguousarray(a) for n, a in (arrays or {}).items()}
    for name, array in there.items():
        if array.dtype.str not in DTYPES:
            raise MessageError(f"{name} is {array.dtype}: accepted are {', '.join(str(np.dtype(d)) for d in DTYPES)}")
    words = json.dumps({**head, "arrays": [[n, a.dtype.str, list(a.shape)] for n, a in there.items()]}).encode()
    length = 4 + len(words) + sum(a.nbytes for a in there.values())
    return b"".join(
        [length.to_bytes(8, "little"), len(words).to_bytes(4, "little"), words, *(a.tobytes() for a in there.values())]
    )


def unpack(body: bytes) -> tuple[dict[str, Any], Arrays]:
    """Head and arrays (read-only views) of a message without its length.

    Raises:
        MessageError: it is not one.
    """
    head_length = int.from_bytes(body[:4], "little")
    if head_length > min(MAX_HEAD, len(body) - 4):
        raise MessageError("the head is longer than the message")
    try:
        head = json.loads(body[4 : 4 + head_length])
        listed = [(str(n), str(d), tuple(int(x) for x in shape)) for n, d, shape in head["arrays"]]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise MessageError(f"the head cannot be read: {type(error).__name__}") from None
    if not isinstance(head, dict) or len(listed) > MAX_ARRAYS:
        raise MessageError("the head is not one")
    arrays, at = Arrays(), 4 + head_length
    for name, dtype, shape in listed:
        if dtype not in DTYPES or len(shape) > 8 or any(not 0 <= n <= MAX_BYTES for n in shape):
            raise MessageError(f"array {name[:64]!r} has dtype {dtype[:16]!r} and {len(shape)} dimensions")
        count = 1
        for n in shape:
            count *= n
        kind = np.dtype(dtype)
        if at + count * kind.itemsize > len(body):
            raise MessageError(f"array {name[:64]!r} is longer than the message")
        arrays[name] = np.frombuffer(body, kind, count, at).reshape(shape)
        at += count * kind.itemsize
    if at != len(body):
        raise MessageError(f"{len(body) - at} bytes too many")
    return head, arrays


def receive(connection: socket.socket, limit: int = MAX_BYTES) -> tuple[dict[str, Any], Arrays]:
    """The next message. Raises EOFError at the end of the stream, OSError as the socket does, MessageError for anything else."""
    length = int.from_bytes(_exactly(connection, 8), "little")
    if not 4 <= length <= limit:
        raise MessageError(f"a message of {length} bytes; accepted are at most {limit}")
    return unpack(_exactly(connection, length))


def _exactly(connection: socket.socket, count: int) -> bytes:
    whole = bytearray(count)
    view, have = memoryview(whole), 0
    while have < count:
        got = connection.recv_into(view[have:])
        if got == 0:
            raise EOFError("the other end closed the connection")
        have += got
    return bytes(whole)
