"""Threads that run compiled code side by side, handed their work without Python, a lock or a sleep in between.

A network's pass takes a millisecond and the next one follows at once; waking a thread that sleeps can cost as much. So a helper
that has finished looks for more work for a moment (``PATIENCE``), in compiled code that holds no lock of Python's, and only
then goes to sleep. One word of memory, its state, is all that the two sides share.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from robot_rl.nn.simd import I64, LANE, Emitter, Int, Kernel, Native, Program

Room = tuple[int, int]  # addresses of a thread's work space and of its edge tile
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


def _until(e: Emitter, give_way: Int, polite: Int, met: Callable[[], Any]) -> None:
    """Look again and again whether a condition is met; after ``polite`` cycles call ``give_way`` between two looks."""
    b = e.b
    since = _clock(e)
    look, idle, yield_, leave = (b.append_basic_block(x) for x in ("look", "idle", "yield", "leave"))
    b.branch(look)
    b.position_at_end(look)
    b.cbranch(met(), leave, idle)
    b.position_at_end(idle)
    e.intrinsic("llvm.x86.sse2.pause", ir.VoidType())
    b.cbranch((_clock(e) - since > polite).value, yield_, look)
    b.position_at_end(yield_)
    b.call(b.inttoptr(give_way.value, ir.FunctionType(LANE, []).as_pointer()), [])
    b.branch(look)
    b.position_at_end(leave)


def _seen(e: Emitter, word: Int) -> Int:
    """What another thread wrote there, and with it all that it wrote before."""
    return Int(e, e.b.load_atomic(e.pointer(word, I64), "acquire", 8))


def _reached(e: Emitter, word: Int, value: Int) -> Any:
    return (value <= _seen(e, word)).value


@Kernel
def await_(e: Emitter, mail: Int, give_way: Int, polite: Int) -> None:
    """Return when the posted call has ended."""
    _until(e, give_way, polite, lambda: (~_seen(e, mail + 8 * STATE).is_(WORK)).value)


@Kernel
def pull(e: Emitter, entry: Int, tables: Int, words: Int, count: Int, counter: Int, scratch: Int, edge: Int) -> None:
    """Take the next of ``count`` calls until none is left; their last two arguments become this thread's room."""
    b = e.b
    take, work, leave = (b.append_basic_block(x) for x in ("take", "work", "leave"))
    b.branch(take)
    b.position_at_end(take)
    i = Int(e, b.atomic_rmw("add", e.pointer(counter, I64), I64(1), "acq_rel"))
    b.cbranch((i < count).value, work, leave)
    b.position_at_end(work)
    table = tables + i * words * 8
    b.store(scratch.value, e.pointer(table + words * 8 - 16, I64))
    b.store(edge.value, e.pointer(table + words * 8 - 8, I64))
    b.call(b.inttoptr(entry.value, ir.FunctionType(ir.VoidType(), [I64]).as_pointer()), [table.value])
    b.branch(take)
    b.position_at_end(leave)


# A task of ``flow``, in words: its code, its arguments and where the last two of them are; two words that must have grown to a
# value before it begins; two words that grow by one when it has ended.
CODE, GIVEN, ROOM, WAITS, ADDS, TASK_WORDS = 0, 1, 2, 3, 7, 9
# Where a stream has what, in words: the number of the next task, how many there are so far, whether that is all (a cache line
# each); a word that stays zero, one that nobody reads; every thread's room; counters; tasks; their arguments.
NEXT, PUBLISHED, CLOSED, ZERO, NOBODY, ROOMS, COUNTERS, TASKS, TABLES, STREAM_WORDS = (
    0, 8, 16, 24, 25, 32, 544, 8736, 45600, 1 << 18,
)  # fmt: skip


@Kernel
def flow(e: Emitter, stream: Int, give_way: Int, polite: Int, room: Int) -> None:
    """Take the stream's next task until it is closed and none is left; ``room`` is where this thread's room is written.

    Tasks wait only for tasks before them, so the first one that has not ended can always go on.
    """
    b = e.b
    take, work, leave = (b.append_basic_block(x) for x in ("take", "work", "leave"))
    b.branch(take)
    b.position_at_end(take)
    i = Int(e, b.atomic_rmw("add", e.pointer(stream, I64), I64(1), "acq_rel"))

    def known() -> Any:
        closed = _seen(e, stream + 8 * CLOSED)  # looked at first: once it is, no task will come
        return b.or_((i < _seen(e, stream + 8 * PUBLISHED)).value, (closed > 0).value)

    _until(e, give_way, polite, known)
    b.cbranch((i < _seen(e, stream + 8 * PUBLISHED)).value, work, leave)
    b.position_at_end(work)
    task = stream + 8 * TASKS + i * (8 * TASK_WORDS)
    for word in (WAITS, WAITS + 2):
        seen, enough = e.table(task, word), e.table(task, word + 1)
        _until(e, give_way, polite, partial(_reached, e, seen, enough))
    for word in range(2):
        b.store(e.table(room, word).value, e.pointer(e.table(task, ROOM) + 8 * word, I64))
    kind = ir.FunctionType(ir.VoidType(), [I64])
    b.call(b.inttoptr(e.table(task, CODE).value, kind.as_pointer()), [e.table(task, GIVEN).value])
    for word in (ADDS, ADDS + 1):
        b.atomic_rmw("add", e.pointer(e.table(task, word), I64), I64(1), "acq_rel")
    b.branch(take)
    b.position_at_end(leave)


@lru_cache(maxsize=1)
def _program() -> Program:
    return Program([serve, post, await_, pull, flow], "float32")


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


class Task(NamedTuple):
    """A call of :func:`in_order`.

    Attributes:
        function, arguments: the last two arguments become the work space of the thread that runs it.
        waits: at most two (counter, value): the call begins when the counter has reached the value.
        adds: at most two counters that the call's end increases by one.
    """

    function: Native
    arguments: tuple[Any, ...]
    waits: tuple[tuple[int, int], ...] = ()
    adds: tuple[int, ...] = ()


class _Team:
    """The helpers of this process and the calls that they take one after the other."""

    def __init__(self) -> None:
        self.taken = threading.Lock()
        self.helpers: list[_Helper] = []
        self._stream: np.ndarray | None = None
        self._room(0)

    def _room(self, words: int) -> None:
        self._words = _lines(8 + words)  # the number of the next call, then what the calls need
        self._bytes, self._counter = self._words.data.cast("B"), self._words.ctypes.data

    def _clear(self, words: int) -> None:
        if len(self._words) < 8 + words:
            self._room(words)
        self._words[0] = 0

    def run(self, function: Native, calls: Sequence[tuple[Any, ...]], rooms: Sequence[Room]) -> None:
        words = function.layout.size // 8
        self._clear(words * len(calls))
        for i, arguments in enumerate(calls):
            function.layout.pack_into(self._bytes, 64 + 8 * words * i, *arguments)
        work = (function.entry, self._counter + 64, words, len(calls), self._counter)
        self._together(_program().pull, work, rooms)

    def _together(self, function: Native, work: tuple[int, ...], rooms: Sequence[Room]) -> None:
        started: list[_Helper] = []
        try:
            for i, room in enumerate(rooms[1:]):
                started.append(self.helper(i))
                started[-1].start(function, (*work, *room))
            function(*work, *rooms[0])
        finally:
            for helper in started:
                helper.finish()

    def helper(self, i: int) -> _Helper:
        while len(self.helpers) <= i:
            self.helpers.append(_Helper())
        return self.helpers[i]

    @property
    def stream(self) -> np.ndarray:
        if self._stream is None:
            self._stream = _lines(STREAM_WORDS)
        return self._stream


class _Stream:
    """Tasks that the team does in their order, from the moment that they are published."""

    def __init__(self, team: _Team) -> None:
        self.team, self.words = team, team.stream
        self.base, self.bytes = self.words.ctypes.data, self.words.data.cast("B")
        self.held: list[Any] = []
        self.started: list[_Helper] = []
        self._begin()

    def _begin(self) -> None:
        self.words[[NEXT, PUBLISHED, CLOSED, ZERO]] = 0
        self.tasks, self.counters, self.tables = 0, 0, TABLES
        self.before: tuple[tuple[int, int], ...] = ()  # what says that all tasks until now have ended

    def _work(self, thread: int) -> tuple[int, ...]:
        return self.base, _give_way(), POLITE, self.base + 8 * (ROOMS + 2 * thread)

    def publish(self, tasks: Sequence[Task], counters: int, end: tuple[int, int], rooms: Sequence[Room]) -> None:
        """Tasks without a wait of their own begin when all that were published before have ended."""
        if not self._fits(tasks, counters):
            self.finish()
            self._begin()
            if not self._fits(tasks, counters):
                raise ValueError(f"{len(tasks)} tasks with {counters} counters in one go: there is no room for so many")
        for i, room in enumerate(rooms):
            if room[0]:  # a thread's room only grows: the latest is large enough for every task
                self.words[ROOMS + 2 * i : ROOMS + 2 * i + 2] = room
        words, first = self.base, self.counters
        self.words[COUNTERS + first : COUNTERS + first + counters] = 0

        def counter(number: int) -> int:
            return words + 8 * (COUNTERS + number)

        for i, (function, arguments, waits, adds) in enumerate(tasks, self.tasks):
            given, size = words + 8 * self.tables, len(arguments)
            row = [function.entry, given, given + 8 * (size - 2)]
            for number, value in [(first + n, v) for n, v in waits] or self.before:
                row += (counter(number), value)
            row += (words + 8 * ZERO, 0) * ((ADDS - len(row)) // 2)
            row += [counter(first + number) for number in adds]
            row += (words + 8 * NOBODY,) * (TASK_WORDS - len(row))
            _TASK.pack_into(self.bytes, 8 * (TASKS + TASK_WORDS * i), *row)
            function.layout.pack_into(self.bytes, 8 * self.tables, *arguments)
            self.tables += size
        self.tasks += len(tasks)
        self.counters, self.before = first + counters, ((first + end[0], end[1]),)
        self.words[PUBLISHED] = self.tasks
        for i in range(len(self.started), len(rooms) - 1):
            self.started.append(self.team.helper(i))
            self.started[-1].start(_program().flow, self._work(i + 1))

    def _fits(self, tasks: Sequence[Task], counters: int) -> bool:
        return (
            self.counters + counters <= TASKS - COUNTERS
            and self.tasks + len(tasks) <= (TABLES - TASKS) // TASK_WORDS
            and self.tables + sum(len(task.arguments) for task in tasks) <= STREAM_WORDS
        )

    def finish(self) -> None:
        """Return when all are done, this thread doing its share."""
        self.words[CLOSED] = 1
        try:
            _program().flow(*self._work(0))
        finally:
            for helper in self.started:
                helper.finish()
            self.started.clear()


_team = _Team()


_TASK = struct.Struct(f"={TASK_WORDS}q")


def _after_fork() -> None:
    global _team
    _team = _Team()  # threads do not survive a fork


os.register_at_fork(after_in_child=_after_fork)


def side_by_side(function: Native, calls: Sequence[tuple[Any, ...]], rooms: Sequence[Room]) -> None:
    """``function(*arguments)`` for each of ``calls``, by as many threads as there are ``rooms``; returns when all are done.

    Whoever is free takes the next call: a core that others slow down then does less of the work, and delays nobody.

    Args:
        rooms: a thread's work space: its two addresses take the place of each call's last two arguments.

    While another thread of the process has the helpers, this one does all the calls itself. In a block of :func:`together` they
    are done by its end.
    """
    stream = _streams.open
    if stream is not None:
        tasks = [Task(function, arguments, (), (0,)) for arguments in calls]
        stream.publish(tasks, 1, (0, len(tasks)), rooms)
        return
    team = _team
    if len(rooms) == 1 or len(calls) == 1 or not team.taken.acquire(blocking=False):
        for arguments in calls:
            function(*arguments[:-2], *rooms[0])
        return
    try:
        team.run(function, calls, rooms)
    finally:
        team.taken.release()


def in_order(tasks: Sequence[Task], counters: int, end: tuple[int, int], rooms: Sequence[Room]) -> None:
    """All tasks, taken in their order by as many threads as there are ``rooms``, each begun when what it waits for has happened.

    Args:
        tasks: they may wait for counters that tasks before them increase, no others.
        counters: how many there are; all begin at 0.
        end: the counter and its value that say that all tasks have ended.
    """
    stream = _streams.open
    if stream is not None:
        stream.publish(tasks, counters, end, rooms)
        return
    team = _team
    if len(rooms) > 1 and team.taken.acquire(blocking=False):
        try:
            stream = _Stream(team)
            stream.publish(tasks, counters, end, rooms)
            stream.finish()
        finally:
            team.taken.release()
        return
    for function, arguments, _, _ in tasks:  # one after the other, nothing has to wait
        function(*arguments[:-2], *rooms[0])


class _Streams(threading.local):
    open: _Stream | None = None


_streams = _Streams()


@contextmanager
def together() -> Iterator[None]:
    """Calls of this thread inside the block return at once and are done by its end, in the order in which they were made.

    Until then nothing that they write may be read, and what they work on must be there: :func:`hold` it. While another
    thread of the process has the helpers, calls are done as if there were no block.
    """
    if _streams.open is not None:
        raise RuntimeError("together() inside together(): the inner block's results would not be there at its end")
    team = _team
    if not team.taken.acquire(blocking=False):
        yield
        return
    stream = _streams.open = _Stream(team)
    try:
        yield
    finally:
        _streams.open = None
        try:
            stream.finish()
        finally:
            team.taken.release()


def hold(*objects: Any) -> None:
    """Keep what calls work on until they are done."""
    if _streams.open is not None:
        _streams.open.held += objects
