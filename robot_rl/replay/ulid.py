"""ULIDs: 26 characters that sort by creation time (https://github.com/ulid/spec), increasing within one process."""

from __future__ import annotations

import os
import threading
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_lock = threading.Lock()
_last = 0
_pid = 0


def new_ulid() -> str:
    """48 bits of milliseconds, 80 random bits; two calls in one millisecond differ by one, so order is kept."""
    global _last, _pid
    with _lock:
        value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
        if os.getpid() == _pid and value >> 80 <= _last >> 80:  # a forked child must not continue its parent's counter
            value = _last + 1
        _last, _pid = value, os.getpid()
    return "".join(_ALPHABET[(value >> shift) & 31] for shift in range(125, -1, -5))
