"""Which code runs a network's passes without autograd, and the bridge to the compiled one.

Two paths compute the same numbers up to rounding: plain torch operations, which run anywhere, and the fused kernels of
:mod:`robot_rl.nn.kernels`, compiled by LLVM when a process first needs them (about a second). :func:`path` says which one a tensor
takes. The choice depends on the machine, the device and the dtype alone, never on time, load or the number of threads, so
a resumed run takes the path it took before.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from robot_rl.nn.flat import FlatParameters
    from robot_rl.nn.mlp import StackedMLP, Tape

Path = Literal["compiled", "torch"]
SWITCH = "ROBOT_RL_KERNELS"
WIDTH_MULTIPLE = 8  # hidden widths the kernels can take
WORTH_A_THREAD = 4e6  # floating-point operations; handing work to a thread costs what two million take
MOST_THREADS = 256  # for which robot_rl.nn.team has room
WORTH_A_SWEEP = 1 << 19  # elements of Adam's vectors; smaller ones are in the cache of the thread that made the gradient

_forced: Path | None = None
_threads: int | None = None


@contextmanager
def use(choice: Path) -> Iterator[None]:
    """Take one path wherever it can be taken; ``compiled`` still gives way to torch on a GPU. For tests and measurements."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why this machine has no compiled path, in words, or None when it has one.

    Raises:
        ValueError: the environment variable ROBOT_RL_KERNELS is neither auto, compiled nor torch.
    """
    choice = os.environ.get(SWITCH, "auto")
    if choice not in ("auto", "compiled", "torch"):
        raise ValueError(f"{SWITCH}={choice!r}: accepted are auto, compiled, torch")
    if choice == "torch":
        return f"{SWITCH}=torch"
    try:
        import llvmlite.binding as llvm
    except ImportError as error:
        return f"llvmlite, which comes with numba, is not installed ({error})"
    features = llvm.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma")):
        return "the kernels are written for processors with AVX2 and FMA"
    if features.get("avx512f") and choice == "auto":
        return "torch's matrix products use this processor's 512-bit vectors, the kernels 256-bit ones"
    return None


def path(device: torch.device | str, dtype: torch.dtype) -> Path:
    """Which code runs passes on such tensors: "compiled" on a CPU that has it, in float32 or float64, else "torch"."""
    if (
        (device if isinstance(device, torch.device) else torch.device(device)).type != "cpu"
        or dtype not in (torch.float32, torch.float64)
        or _forced == "torch"
    ):
        return "torch"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "torch"  # asked for faster, coarser products, which only torch has
    return "torch" if unavailable() else "compiled"


def set_threads(count: int) -> None:
    """Let networks use ``count`` threads (per process).

    Where the kernels compute them, torch itself is left one: its pool spins for milliseconds after each large operation, on the
    cores that the kernels' threads want.
    """
    global _threads
    if count < 1:
        raise ValueError(f"set_threads({count}): accepted are integers >= 1")
    _threads = count
    torch.set_num_threads(count if unavailable() else 1)


def threads() -> int:
    """What :func:`set_threads` was told, else as many as torch uses; at most ``MOST_THREADS``."""
    return min(_threads or torch.get_num_threads(), MOST_THREADS)


def _kernels() -> ModuleType:
    from robot_rl.nn import kernels

    return kernels


def _team() -> ModuleType:
    from robot_rl.nn import team  # where there is something to run: it needs llvmlite

    return team


def side_by_side(function: Any, calls: Sequence[tuple[Any, ...]], rooms: Sequence[tuple[int, int]], *held: Any) -> None:
    """:func:`robot_rl.nn.team.side_by_side`; ``held`` are the tensors that the calls work on."""
    team = _team()
    team.hold(*held)
    team.side_by_side(function, calls, rooms)


@contextmanager
def together(possible: bool) -> Iterator[None]:
    """:func:`robot_rl.nn.team.together` where ``possible``: that every operation in the block is a compiled one."""
    if possible:
        with _team().together():
            yield
    else:
        yield


# ---- memory that kernels write to


class _Scratch(threading.local):
    """Work space of every part of a call, by the thread that calls: two threads may run two networks at once."""

    def __init__(self) -> None:
        self.rooms: dict[tuple[int, Any], tuple[int, int, int, tuple[np.ndarray, ...]]] = {}
        self.outgrown: list[Any] = []  # a call that was made before may still be using them

    def of(self, part: int, dtype: Any, elements: int) -> tuple[int, int]:
        """Addresses of at least so many elements and of the kernels' edge tile (zeros behind it)."""
        room = self.rooms.get((part, dtype))
        if room is None or room[0] < elements:
            work, edge = np.zeros(elements, dtype), np.zeros(_kernels().EDGE_ELEMENTS, dtype)
            self.outgrown.append(room)
            room = self.rooms[part, dtype] = elements, work.ctypes.data, edge.ctypes.data, (work, edge)
        return room[1:3]


_scratch = _Scratch()
_INPUT = struct.Struct("=3q")
_DTYPES: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


@lru_cache(maxsize=2)
def program(dtype: torch.dtype) -> Any:
    """The compiled kernels for tensors of that kind."""
    return _kernels().program(_DTYPES[dtype].name)


class Plan:
    """Addresses of one network's parameters and one tape's buffers, as the kernels want them."""

    def __init__(self, net: StackedMLP, tape: Tape) -> None:
        kernels = _kernels()
        flat = net.flat
        self.slots, self.total = tape.shape
        self.dtype = _DTYPES[flat.data.dtype]
        self.size = size = self.dtype.itemsize
        self.dims = np.array((net.in_dim, *net.hidden, net.out_dim), np.int64)
        self.owner = owner(flat)
        shift = flat.grad.data_ptr() - flat.data.data_ptr()

        def addresses(i: int) -> list[int]:
            weight, bias, norm = net.layers[i]
            tensors = [weight, bias, *(norm or ())]
            values = [t.data_ptr() for t in tensors] + [0] * (4 - len(tensors))
            return values + [v + shift if v else 0 for v in values]

        self.params = np.array([addresses(i) for i in range(len(net.layers))], np.int64)
        rows = []
        self.slopes = [torch.empty_like(out) for out in tape.outputs[:-1]]
        for i, out in enumerate(tape.outputs):
            hidden = i < len(net.hidden)
            normed = hidden and net.layer_norm
            before = tape.outputs[i - 1]
            rows.append(
                [
                    before.data_ptr() if i else 0, before.stride(0) * size, before.stride(1) * size, out.data_ptr(),
                    tape.normalised[i].data_ptr() if normed else 0, tape.rstd[i].data_ptr() if normed else 0,
                    self.slopes[i].data_ptr() if hidden else 0,
                ]
            )  # fmt: skip
        self.tape = np.array(rows, np.int64)
        self.first = self.tape.data.cast("B")  # its first words are where the input is
        self.program = program(flat.data.dtype)
        self.everyone = np.arange(self.slots)
        self.all_heads = self.everyone.ctypes.data
        self.widest = max(net.hidden)
        self.head = (len(rows), *(a.ctypes.data for a in (self.dims, self.params, self.tape)))
        self.layers = net.layers
        self._tables: np.ndarray | None = None
        self._slices: np.ndarray | None = None
        chunks = -(-self.total // kernels.CHUNK)
        self._sums: tuple[np.ndarray, int] | None = None
        self._sums_size = self.slots * len(net.hidden) * chunks * 2 * self.widest if net.layer_norm else 1
        self.dq = torch.empty(self.slots, self.total, dtype=flat.data.dtype)
        pairs = list(zip(self.dims[:-1], self.dims[1:], strict=True))
        self.elements = max(int(max(k * (n + 16), n * (k + 16), (n + 16 + k) * self.total)) for k, n in pairs)
        self.flops = 2.0 * self.slots * self.total * sum(int(k * n) for k, n in pairs)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # these addresses are of the original's buffers; the copy makes its own plan

    def tapes(self, x: Tensor) -> list[int]:
        """Addresses of one tape table for each of ``x`` (U, B, D), valid until the next call; they share the buffers."""
        if self._tables is None or len(self._tables) < len(x):
            self._tables = np.tile(self.tape, (len(x), 1, 1))
        self._tables[: len(x), 0, :3] = 0
        self._tables[: len(x), 0, 0] = x.data_ptr() + self.size * x.stride(0) * np.arange(len(x))
        self._tables[: len(x), 0, 2] = self.size * x.stride(1)
        first, step = self._tables.ctypes.data, self._tables.strides[0]
        return [first + step * u for u in range(len(x))]

    @property
    def slices(self) -> tuple[int, int]:
        """Address of (networks, pieces, 2): first byte and elements of a network's pieces of the flat vectors; how many pieces."""
        if self._slices is None:
            start = self.owner[0]
            tensors = [t for weight, bias, norm in self.layers for t in (weight, bias, *(norm or ()))]
            rows = [
                [(t.data_ptr() - start + h * t.stride(0) * self.size, t[0].numel()) for t in tensors] for h in range(self.slots)
            ]
            self._slices = np.array(rows, np.int64)
        return self._slices.ctypes.data, self._slices.shape[1]

    @property
    def sums(self) -> int:
        if self._sums is None:
            room = np.zeros(self._sums_size, self.dtype)
            self._sums = room, room.ctypes.data
        return self._sums[1]

    def rooms(self, parts: int, other: Plan | None = None) -> list[tuple[int, int]]:
        """Work space of every thread that takes part in this plan's passes, and another's."""
        elements = max(self.elements, 0 if other is None else other.elements)
        return [_scratch.of(part, self.dtype, elements) for part in range(parts)]

    def parts(self, flops: float) -> int:
        return max(1, min(threads(), int(flops / WORTH_A_THREAD)))

    def by_network(self, parts: int) -> bool:
        """Whether to give whole networks to threads: only where that leaves none idle for long."""
        return self.slots % parts == 0 or self.slots >= 3 * parts

    def shares(self, parts: int, rows: int) -> list[tuple[int, int, int, int]]:
        """(first slot, last, first row, last) of every piece of work."""
        if parts == 1:
            return [(0, self.slots, 0, rows)]
        if self.by_network(parts):
            return [(slot, slot + 1, 0, rows) for slot in range(self.slots)]
        chunk = _kernels().CHUNK
        chunks = -(-rows // chunk)
        edges = [min(rows, chunks * p // parts * chunk) for p in range(parts + 1)]
        return [(0, self.slots, a, b) for a, b in pairwise(edges) if a < b]


def owner(flat: FlatParameters) -> tuple[int, int]:
    """Where the vectors live: a plan made for other vectors is stale."""
    return flat.data.data_ptr(), flat.grad.data_ptr()


def plan_of(net: StackedMLP, tape: Tape) -> Plan:
    if tape.plan is None or tape.plan.owner != owner(net.flat):
        tape.plan = Plan(net, tape)
    return tape.plan


def fits(net: StackedMLP, x: Tensor) -> bool:
    """Whether the compiled path can take this network and input."""
    return (
        net.activation == "relu"
        and net.compiled_widths
        and x.dtype == net.flat.data.dtype
        and path(x.device, x.dtype) == "compiled"
    )


def _enter(plan: Plan, x: Tensor) -> Tensor:
    """Write the input's address and strides into the tape; returns what must be kept alive."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    strides, size = x.stride(), plan.size
    _INPUT.pack_into(plan.first, 0, x.data_ptr(), strides[0] * size if len(strides) == 3 else 0, strides[-2] * size)
    return x


def run(net: StackedMLP, x: Tensor, tape: Tape, members: Tensor | None) -> Tensor:
    """The compiled :meth:`StackedMLP.run`; shapes are checked there."""
    plan = plan_of(net, tape)
    tape.inputs = [_enter(plan, x)]
    heads = plan.all_heads
    if members is not None:
        chosen = members.tolist()
        if len(chosen) != plan.slots or min(chosen) < 0 or max(chosen) >= net.n:
            raise ValueError(f"members={chosen}: accepted are {plan.slots} indices below {net.n}")
        members = members.contiguous()  # a copy, if it is one, must live as long as the pass
        heads = members.data_ptr()
    parts = plan.parts(plan.flops)
    calls = [(*plan.head, heads, plan.total, *share, 0, 0) for share in plan.shares(parts, plan.total)]
    side_by_side(plan.program.forward, calls, plan.rooms(parts), plan, x, members)
    return tape.outputs[-1]


def backward(
    net: StackedMLP, tape: Tape, dy: Tensor, parameters: bool, inputs: slice | bool, rows: int | None
) -> Tensor | None:
    """The compiled :meth:`StackedMLP.backward`."""
    plan = plan_of(net, tape)
    rows = plan.total if rows is None else rows
    dy = dy.to(net.flat.data.dtype).contiguous()
    if dy.shape != (net.n, rows, net.out_dim):
        raise ValueError(f"dy {tuple(dy.shape)} does not fit: expected {(net.n, rows, net.out_dim)}")
    slope = (dy.data_ptr(), dy.stride(0) * plan.size, dy.stride(1) * plan.size)
    parts = plan.parts(plan.flops * rows / plan.total)
    shares = plan.shares(parts, rows)
    rooms = plan.rooms(parts)
    calls: list[tuple[int, ...]]
    calls = [(*plan.head, plan.total, *slope, *share, plan.sums, plan.widest, 0, 0) for share in shares]
    side_by_side(plan.program.backward_rows, calls, rooms, plan, dy)
    if parameters:
        _parameters(plan, rows, slope, shares, rooms)
    if inputs is False:
        return None
    first, last, step = (slice(None) if inputs is True else inputs).indices(net.in_dim)
    if step != 1:
        raise ValueError(f"inputs={inputs}: accepted are slices of neighbouring columns")
    dx = torch.empty(plan.slots, rows, max(0, last - first), dtype=dy.dtype)
    if dx.numel():
        calls = [(*plan.head, plan.total, rows, *share, first, last - first, dx.data_ptr(), 0, 0) for share in shares]
        side_by_side(plan.program.backward_inputs, calls, rooms, dx)
    return dx


def _parameters(
    plan: Plan, rows: int, slope: tuple[int, int, int], shares: list[Any], rooms: Sequence[tuple[int, int]]
) -> None:
    parts = len(rooms)
    whole = plan.by_network(parts)
    ranges = [(*s[:2], 0, 1) for s in shares] if whole else [(0, plan.slots, p, parts) for p in range(parts)]
    calls = [(*plan.head, plan.total, rows, *slope, *r, plan.sums, plan.widest, 0, 0) for r in ranges]
    side_by_side(plan.program.backward_parameters, calls, rooms)


def regress(net: StackedMLP, x: Tensor, tape: Tape, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The compiled :meth:`StackedMLP.regress`: forward, slopes and backward without a pause between them."""
    plan = plan_of(net, tape)
    tape.inputs = [x := _enter(plan, x)]
    dtype, total = net.flat.data.dtype, plan.total
    y, weight = y.to(dtype).contiguous(), weight.to(dtype).contiguous()
    if net.out_dim != 1 or y.shape not in ((total,), (net.n, total)) or weight.shape != (total,):
        raise ValueError(f"y {tuple(y.shape)}, weight {tuple(weight.shape)} do not fit {net.n} networks with one output")
    parts = plan.parts(3 * plan.flops)
    shares = plan.shares(parts, total)
    rooms, sums = plan.rooms(parts), (plan.sums, plan.widest, 0, 0)
    error = (y.data_ptr(), total * plan.size if y.dim() == 2 else 0, weight.data_ptr(), plan.dq.data_ptr())
    front = (*plan.head, plan.all_heads, total, *error)
    if plan.by_network(parts):
        side_by_side(plan.program.regress_whole, [(*front, *s[:2], *sums) for s in shares], rooms, plan, x, y, weight)
    else:
        side_by_side(plan.program.regress, [(*front, *s, *sums) for s in shares], rooms, plan, x, y, weight)
        _parameters(plan, total, (plan.dq.data_ptr(), total * plan.size, plan.size), shares, rooms)
    return tape.outputs[-1].squeeze(-1), plan.dq


def adam(
    flat: FlatParameters, exp_avg: Tensor, exp_avg_sq: Tensor, follower: Tensor | None, numbers: tuple[float, ...]
) -> None:  # fmt: skip
    """One step of Adam, and of the vector that follows the parameters, in one sweep over memory."""
    size = flat.data.element_size()
    edges = adam_edges(flat, threads())
    vectors = [t.data_ptr() for t in (flat.data, flat.grad, exp_avg, exp_avg_sq)]
    target = 0 if follower is None else follower.data_ptr()
    calls = [
        (b - a, *(v + a * size for v in vectors), target + a * size if target else 0, *numbers, 0, 0)
        for a, b in pairwise(edges)
    ]
    side_by_side(program(flat.data.dtype).adam, calls, [(0, 0)] * len(calls))


def adam_edges(flat: FlatParameters, parts: int) -> list[int]:
    """Where at most so many pieces of the flat vectors begin and end."""
    elements = len(flat.data)
    parts = max(1, min(parts, elements // WORTH_A_SWEEP))
    return [elements * p // parts // 16 * 16 for p in range(parts)] + [elements]
