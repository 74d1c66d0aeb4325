"""A few threads that run compiled code side by side: no pool of its own to spin, no barrier, no copy."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any


class _Worker:
    def __init__(self) -> None:
        self.inbox: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], SimpleQueue[BaseException | None]]] = SimpleQueue()
        threading.Thread(target=self._work, name="robot_rl-kernels", daemon=True).start()

    def _work(self) -> None:
        while True:
            function, arguments, done = self.inbox.get()
            try:
                function(*arguments)
            except BaseException as error:  # handed to whoever asked
                done.put(error)
            else:
                done.put(None)


_workers: list[_Worker] = []
_owner = 0
_lock = threading.Lock()


def side_by_side(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
    """``function(*arguments)`` for each of ``calls`` at once, the first one in this thread; returns when all have.

    ``function`` should release the GIL. What one of them raises is raised here, after all have ended.
    """
    global _owner
    if len(calls) == 1:
        function(*calls[0])
        return
    with _lock:
        if _owner != os.getpid():  # threads do not survive a fork
            _workers.clear()
            _owner = os.getpid()
        while len(_workers) < len(calls) - 1:
            _workers.append(_Worker())
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    for worker, arguments in zip(_workers, calls[1:], strict=False):
        worker.inbox.put((function, arguments, done))
    try:
        function(*calls[0])
    finally:
        errors = [done.get() for _ in calls[1:]]
    for error in errors:
        if error is not None:
            raise error
