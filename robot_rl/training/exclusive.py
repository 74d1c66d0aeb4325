"""One process at a time at a run folder, or at a part of it: what two write is nobody's run."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(lock: Path, refusal: str, stop: Callable[[], bool] = lambda: False, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the file ``lock`` while the context lasts; the system lets go of it when the process ends, however it ends.

    Args:
        stop: asked while waiting; True gives up.
        wait_s: how long whoever holds it is given to leave.

    Raises:
        RuntimeError: somebody else holds it, with ``refusal``.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait_s
    with lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until or stop():
                    raise RuntimeError(refusal) from None
                time.sleep(0.2)
        yield
