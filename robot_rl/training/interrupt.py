"""Ctrl-C as a request: the first one stops the run at the next safe point, the second one stops it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The run stopped because it was asked to; its state is saved and the same command resumes it."""


class InterruptFlag:
    """Context manager that turns SIGINT and SIGTERM into a flag while it is entered (in the main thread)."""

    def __init__(self) -> None:
        self._set = False
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._set

    def raise_if_set(self) -> None:
        if self():
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._set:
            raise KeyboardInterrupt
        self._set = True

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
