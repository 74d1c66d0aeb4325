"""Scheduling of this process: a nice level that counts, and real-time priority where the machine grants it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REMEDY = "--cap-add=SYS_NICE --ulimit rtprio=49"
"""What a container needs for real-time priority (outside of one: ``rtprio`` in limits.conf)."""
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
