"""Scheduling: a nice level that counts, real-time priority and processors that stay awake where the machine grants them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REMEDY = "--cap-add=SYS_NICE --ulimit rtprio=49"
"""What a container needs for real-time priority (outside of one: ``rtprio`` in limits.conf)."""
LATENCY = Path("/dev/cpu_dma_latency")
_AUTOGROUP = Path("/proc/self/autogroup")
_TASKS = Path("/proc/self/task")


def set_nice(level: int) -> bool:
    """Set the nice level of every thread of this process; False where it was refused.

    Linux gives every session a scheduling group of its own (``sched_autogroup``), and a nice level then counts among the
    processes of one session only. A process that leads a session sets the level of its group, too; one that was started from
    somebody's terminal leaves that person's session alone.
    """
    try:
        for task in _tasks():
            os.setpriority(os.PRIO_PROCESS, task, level)
    except PermissionError:
        return False
    if os.getsid(0) == os.getpid():
        with suppress(OSError):  # no such groups on this kernel, or a level below zero without the right to it
            _AUTOGROUP.write_text(str(level))
    return True


def set_fifo(priority: int, but: tuple[int, ...] = ()) -> bool:
    """SCHED_FIFO for every thread of this process ``but`` some (threads that they start inherit it); False where it was refused."""
    try:
        for task in set(_tasks()) - set(but):
            try:
                os.sched_setscheduler(task, os.SCHED_FIFO, os.sched_param(priority))
            except ProcessLookupError:
                continue  # it ended meanwhile
    except (PermissionError, AttributeError):
        return False
    return True


def _tasks() -> list[int]:
    """Threads of this process; the calling one alone where the system does not list them."""
    return [int(t.name) for t in _TASKS.iterdir()] if _TASKS.is_dir() else [0]


@contextmanager
def at_normal_priority() -> Iterator[None]:
    """What is started in here does not inherit this thread's real-time priority."""
    if not hasattr(os, "sched_getscheduler") or (policy := os.sched_getscheduler(0)) == os.SCHED_OTHER:
        yield
        return
    parameters = os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


class KeepAwake:
    """Processors that do not sleep, for as long as somebody holds this (Linux' PM QoS, ``/dev/cpu_dma_latency``).

    A processor that sleeps deeply takes from a tenth of a millisecond to, in a virtual machine, ten of them to wake up, and no
    priority helps against that. Awake it waits for work busily, which costs power. The kernel forgets the wish when this process ends.
    """

    def __init__(self) -> None:
        self._file: int | None = None

    @property
    def on(self) -> bool:
        return self._file is not None

    def set(self, on: bool) -> bool:
        """Whether processors are kept awake now; False after asking for it where there is no such file, or no right to it."""
        if on and self._file is None:
            try:
                file = os.open(LATENCY, os.O_WRONLY)
            except OSError:
                return False
            try:
                os.write(file, (0).to_bytes(4, sys.byteorder))
            except OSError:
                os.close(file)
                return False
            self._file = file
        elif not on and self._file is not None:
            os.close(self._file)
            self._file = None
        return self.on
