"""Threads that run compiled code side by side, handed their work without Python, a lock or a sleep in between.

A network's pass takes a millisecond and the next one follows at once; waking a thread that sleeps can cost as much. So a helper
that has finished looks for more work for a moment (``PATIENCE``), in compiled code that holds no lock of Python's, and only
then goes to sleep. One word of memory, its state, is all that the two sides share.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from queue import SimpleQueue
from typing import Any

import numpy as np
from llvmlite import ir

from robot_rl.nn.simd import I64, LANE, Emitter, Int, Kernel, Native, Program

WAITING, WORK, ASLEEP = 0, 1, 2  # the state of a helper
STATE, ENTRY, ARGUMENTS, BEFORE, TABLE = (
    0,
    8,
    9,
    16,
    24,
)  # where these stand in its mail, in words: the state has a cache line of its own
WORDS = 64
PATIENCE = 5_000_000  # cycles of the time stamp counter that a helper looks for work before it sleeps: about two milliseconds
POLITE = 50_000  # cycles after which whoever waits for a helper lets others use the core


def _word(e: Emitter, address: Int, index: int) -> Any:
    return e.pointer(address + 8 * index, I64)


def _clock(e: Emitter) -> Int:
    return Int(e, e.intrinsic("llvm.readcyclecounter", I64))


@Kernel
def serve(e: Emitter, mail: Int, patience: Int) -> None:
    """Do what is posted until nothing was for ``patience`` cycles; then the state is ASLEEP."""
    b = e.b
    since = b.alloca(I64)
    b.store(_clock(e).value, since)
    look, work, idle, tired, leave = (b.append_basic_block(x) for x in ("look", "work", "idle", "tired", "leave"))
    b.branch(look)
    b.position_at_end(look)
    state = Int(e, b.load_atomic(_word(e, mail, STATE), "acquire", 8))
    b.cbranch(state.is_(WORK).value, work, idle)
    b.position_at_end(work)
    kind = ir.FunctionType(ir.VoidType(), [I64])
    b.call(b.inttoptr(e.table(mail, ENTRY).value, kind.as_pointer()), [e.table(mail, ARGUMENTS).value])
    b.store_atomic(I64(WAITING), _word(e, mail, STATE), "release", 8)
    b.store(_clock(e).value, since)
    b.branch(look)
    b.position_at_end(idle)
    e.intrinsic("llvm.x86.sse2.pause", ir.VoidType())
    b.cbranch((_clock(e) - Int(e, b.load(since)) > patience).value, tired, look)
    b.position_at_end(tired)
    swapped = b.cmpxchg(_word(e, mail, STATE), I64(WAITING), I64(ASLEEP), "acq_rel", "acquire")
    b.cbranch(b.extract_value(swapped, 1), leave, look)
    b.position_at_end(leave)


@Kernel
def post(e: Emitter, mail: Int, entry: Int, arguments: Int, before: Int) -> None:
    """Hand over a call; the word at ``before`` becomes the state until now, ASLEEP if somebody must wake the helper."""
    b = e.b
    b.store(entry.value, _word(e, mail, ENTRY))
    b.store(arguments.value, _word(e, mail, ARGUMENTS))
    b.store(b.atomic_rmw("xchg", _word(e, mail, STATE), I64(WORK), "acq_rel"), e.pointer(before, I64))


@Kernel
def await_(e: Emitter, mail: Int, give_way: Int, polite: Int) -> None:
    """Return when the posted call has ended; after ``polite`` cycles call ``give_way`` between two looks."""
    b = e.b
    since = _clock(e)
    look, idle, yield_, leave = (b.append_basic_block(x) for x in ("look", "idle", "yield", "leave"))
    b.branch(look)
    b.position_at_end(look)
    state = Int(e, b.load_atomic(_word(e, mail, STATE), "acquire", 8))
    b.cbranch(state.is_(WORK).value, idle, leave)
    b.position_at_end(idle)
    e.intrinsic("llvm.x86.sse2.pause", ir.VoidType())
    b.cbranch((_clock(e) - since > polite).value, yield_, look)
    b.position_at_end(yield_)
    b.call(b.inttoptr(give_way.value, ir.FunctionType(LANE, []).as_pointer()), [])
    b.branch(look)
    b.position_at_end(leave)


@Kernel
def pull(e: Emitter, entry: Int, tables: Int, words: Int, count: Int, counter: Int, scratch: Int, edge: Int) -> None:
    """Take the next of ``count`` calls until none is left. With ``scratch``, the last two arguments are this thread's room."""
    b = e.b
    take, work, leave = (b.append_basic_block(x) for x in ("take", "work", "leave"))
    b.branch(take)
    b.position_at_end(take)
    i = Int(e, b.atomic_rmw("add", e.pointer(counter, I64), I64(1), "acq_rel"))
    b.cbranch((i < count).value, work, leave)
    b.position_at_end(work)
    table = tables + i * words * 8
    with e.when(scratch > 0):
        b.store(scratch.value, e.pointer(table + words * 8 - 16, I64))
        b.store(edge.value, e.pointer(table + words * 8 - 8, I64))
    b.call(b.inttoptr(entry.value, ir.FunctionType(ir.VoidType(), [I64]).as_pointer()), [table.value])
    b.branch(take)
    b.position_at_end(leave)


@lru_cache(maxsize=1)
def _program() -> Program:
    return Program([serve, post, await_, pull], "float32")


@lru_cache(maxsize=1)
def _give_way() -> int:
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


def _lines(words: int) -> np.ndarray:
    """Words that begin with a cache line."""
    memory = np.zeros(words + 8, np.int64)
    return memory[-(memory.ctypes.data // 8) % 8 :][:words]


class _Helper:
    def __init__(self) -> None:
        words = _lines(WORDS)
        words[STATE] = ASLEEP
        self._mail = words.ctypes.data
        self._state = words.data[BEFORE : BEFORE + 1]
        self._bytes = words.data.cast("B")
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._native = _program()
        threading.Thread(target=self._work, name="robot_rl-kernels", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._bell.get()
            self._native.serve(self._mail, PATIENCE)

    def start(self, function: Native, arguments: tuple[int, ...]) -> None:
        function.layout.pack_into(self._bytes, 8 * TABLE, *arguments)
        self._native.post(self._mail, function.entry, self._mail + 8 * TABLE, self._mail + 8 * BEFORE)
        if self._state[0] == ASLEEP:
            self._bell.put(None)

    def finish(self) -> None:
        self._native.await_(self._mail, _give_way(), POLITE)


class _Team:
    """The helpers of this process and the calls that they take one after the other."""

    def __init__(self) -> None:
        self.taken = threading.Lock()
        self.helpers: list[_Helper] = []
        self._room(0)

    def _room(self, words: int) -> None:
        self._words = _lines(8 + words)  # the number of the next call, then their tables
        self._bytes, self._counter = self._words.data.cast("B"), self._words.ctypes.data

    def run(self, function: Native, calls: Sequence[tuple[Any, ...]], rooms: Sequence[tuple[int, int]]) -> None:
        while len(self.helpers) < len(rooms) - 1:
            self.helpers.append(_Helper())
        words = function.layout.size // 8
        if len(self._words) < 8 + words * len(calls):
            self._room(words * len(calls))
        self._words[0] = 0
        for i, arguments in enumerate(calls):
            function.layout.pack_into(self._bytes, 64 + 8 * words * i, *arguments)
        work = (function.entry, self._counter + 64, words, len(calls), self._counter)
        started: list[_Helper] = []
        try:
            for helper, room in zip(self.helpers, rooms[1:], strict=False):
                helper.start(_program().pull, (*work, *room))
                started.append(helper)
            _program().pull(*work, *rooms[0])
        finally:
            for helper in started:
                helper.finish()


_team = _Team()


def _after_fork() -> None:
    global _team
    _team = _Team()  # threads do not survive a fork


os.register_at_fork(after_in_child=_after_fork)


def side_by_side(function: Native, calls: Sequence[tuple[Any, ...]], rooms: Sequence[tuple[int, int]]) -> None:
    """``function(*arguments)`` for each of ``calls``, by as many threads as there are ``rooms``; returns when all are done.

    Whoever is free takes the next call: a core that others slow down then does less of the work, and delays nobody.

    Args:
        rooms: a thread's work space: its two addresses take the place of each call's last two arguments, unless they are 0.

    While another thread of the process has the helpers, this one does all the calls itself.
    """
    team = _team
    if len(rooms) == 1 or len(calls) == 1 or not team.taken.acquire(blocking=False):
        for arguments in calls:
            function(*(arguments if not rooms[0][0] else (*arguments[:-2], *rooms[0])))
        return
    try:
        team.run(function, calls, rooms)
    finally:
        team.taken.release()
