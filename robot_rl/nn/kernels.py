"""Forward and backward of N stacked MLPs as compiled code for the CPU: what :mod:`robot_rl.nn.compiled` calls.

A network's activations stay in cache while its layers follow each other; bias, LayerNorm and ReLU are applied to rows
that were just computed; no pass over memory exists only to scale, mask or sum. Matrix products are those
of :mod:`robot_rl.nn.products`.

Every argument is an integer: an address in bytes, a size, or one of these tables of 64-bit integers.

* ``dims`` (L + 1): widths of the input and of every layer's output.
* ``params`` (L, 8): addresses of weight, bias, gain and shift, network after network, and of their gradients.
* ``tape`` (L, 7): address of the layer's input, and the bytes from network to network and from row to row of it; addresses of the
  output, of x̂ and of 1 / std (0 without LayerNorm) and of dL/dz.
* ``heads`` (K): which network a slot of the tape belongs to.

Work is split over threads by slots, rows or panels, never inside a sum, so the number of threads does not change a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from llvmlite import ir

from robot_rl.nn import adam, losses
from robot_rl.nn.adam import NUMBERS, adam_slices
from robot_rl.nn.products import (
    BLOCK_ROWS,
    EDGE_ELEMENTS,
    TILE,
    TILES,
    pack_right,
    pack_right_and_sum,
    pack_right_transposed,
    product,
    transpose,
)
from robot_rl.nn.simd import Emitter, Int, Kernel, Program

CHUNK = 24  # rows whose LayerNorm gradients are added up before they join the others; a multiple of TILE
PARAMS, TAPE = 8, 7  # entries of a layer in those tables
(X, X_HEAD, X_ROW, OUT, NORMALISED, RSTD, SLOPE), (WEIGHT, BIAS, GAIN, SHIFT) = range(7), range(4)
LAYER_NORM_EPS = 1e-5

_KERNELS = [
    *adam.KERNELS,
    *losses.KERNELS,
    *TILES,
    product,
    pack_right,
    pack_right_and_sum,
    pack_right_transposed,
    transpose,
]


def _kernel(*numbers: str) -> Callable[[Callable[..., None]], Kernel]:
    def register(emit: Callable[..., None]) -> Kernel:
        _KERNELS.append(Kernel(emit, numbers))
        return _KERNELS[-1]

    return register


@lru_cache(maxsize=2)
def program(element: str) -> Program:
    """Compiled for "float32" or "float64"; the first call of each takes a moment."""
    return Program(_KERNELS, element)


# ---- rows


def _clear(e: Emitter, n: Int, x: Int) -> None:
    e.write(n, x, lambda o: e.zeros)


def _scaled(e: Emitter, factor: Any, x: Int, plus: Int | None, offset: Int) -> Any:
    """factor x (+ plus) at an offset."""
    value = e.load(x + offset)
    return e.b.fmul(factor, value) if plus is None else e.fma(factor, value, e.load(plus + offset))


def _gated(e: Emitter, h: Int, x: Int, offset: Int) -> Any:
    """x where h > 0, else 0."""
    return e.positive(e.load(h + offset), e.load(x + offset))


def _sum(e: Emitter, x: Int, y: Int, offset: Int) -> Any:
    return e.b.fadd(e.load(x + offset), e.load(y + offset))


def _dot(e: Emitter, n: Int, x: Int, y: Int) -> Any:
    return e.over(n, lambda o, s: [e.fma(e.load(x + o), e.load(y + o), s[0])], 1)[0]


def _norm_relu(e: Emitter, n: Int, z: Int, h: Int, gain: Int, shift: Int) -> Any:
    """z becomes x̂ = (z - mean z) / std z, h = relu(gain x̂ + shift); returns 1 / std z."""
    b = e.b
    count = b.sitofp(n.value, e.scalar)
    mean = e.spread(b.fdiv(e.over(n, lambda o, s: [b.fadd(s[0], e.load(z + o))], 1)[0], count))

    def square(o: Int, s: list[Any]) -> list[Any]:
        d = b.fsub(e.load(z + o), mean)
        return [e.fma(d, d, s[0])]

    variance = b.fadd(b.fdiv(e.over(n, square, 1)[0], count), ir.Constant(e.scalar, LAYER_NORM_EPS))
    rstd = b.fdiv(ir.Constant(e.scalar, 1.0), e.first(e.root(e.spread(variance))))
    r = e.spread(rstd)

    def finish(o: Int, _: list[Any]) -> list[Any]:
        x = b.fmul(b.fsub(e.load(z + o), mean), r)
        e.store(x, z + o)
        a = e.fma(x, e.load(gain + o), e.load(shift + o))
        e.store(e.positive(a, a), h + o)
        return []

    e.over(n, finish)
    return rstd


def _norm_relu_backward(e: Emitter, n: Int, d: Int, x: Int, gain: Int, shift: Int, rstd: Any, dgain: Int, dshift: Int) -> None:
    """dL/dh in ``d`` becomes dL/dz of :func:`_norm_relu` (``x`` is x̂); adds to dgain and dshift.

    Whether h > 0 is computed again, to the bit: h itself is no longer in cache.
    """
    b = e.b

    def first(o: Int, s: list[Any]) -> list[Any]:
        xhat, g = e.load(x + o), e.load(gain + o)
        da = e.positive(e.fma(xhat, g, e.load(shift + o)), e.load(d + o))
        e.store(e.fma(da, xhat, e.load(dgain + o)), dgain + o)
        e.store(b.fadd(da, e.load(dshift + o)), dshift + o)
        dx = b.fmul(da, g)
        e.store(dx, d + o)
        return [b.fadd(s[0], dx), e.fma(dx, xhat, s[1])]

    count, r = b.sitofp(n.value, e.scalar), e.spread(rstd)
    mean, slope = (e.spread(b.fdiv(total, count)) for total in e.over(n, first, 2))

    def second(o: Int, _: list[Any]) -> list[Any]:
        e.store(b.fmul(b.fsub(e.load(d + o), e.fma(e.load(x + o), slope, mean)), r), d + o)
        return []

    e.over(n, second)


# ---- networks


class _Layer:
    """Addresses of layer ``i`` for one slot."""

    def __init__(self, e: Emitter, dims: Int, params: Int, tape: Int, total: Int, i: Int, slot: Int, head: Int) -> None:
        self.e, self.i = e, i
        self.k, self.n = e.table(dims, i), e.table(dims, i + 1)
        self._params, self._tape, self._slot, self._head = params + i * (8 * PARAMS), tape + i * (8 * TAPE), slot, head
        self._block = slot * total * self.n * e.size
        self._total = total
        self.row = e.table(self._tape, X_ROW)
        self.x = e.table(self._tape, X) + slot * e.table(self._tape, X_HEAD)
        self.normed = e.table(self._tape, NORMALISED) > 0
        self.out_row = self.n * e.size

    def buffer(self, which: int) -> Int:
        return self.e.table(self._tape, which) + self._block

    @property
    def rstd(self) -> Int:
        return self.e.table(self._tape, RSTD) + self._slot * self._total * self.e.size

    def parameter(self, which: int, gradient: bool = False) -> Int:
        elements = self.k * self.n if which == WEIGHT else self.n
        return self.e.table(self._params, which + 4 * gradient) + self._head * elements * self.e.size


@_kernel()
def forward(
    e: Emitter, layers: Int, dims: Int, params: Int, tape: Int, heads: Int, total: Int, s0: Int, s1: Int, r0: Int, r1: Int,
    scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """Slots ``s0`` to ``s1``, rows ``r0`` to ``r1`` of ``total``."""
    zeros = edge + (EDGE_ELEMENTS - 16) * e.size
    with e.range(s0, s1) as s, e.range(0, layers) as i:
        layer = _Layer(e, dims, params, tape, total, i, s, e.table(heads, s))
        last = i.is_(layers - 1)
        single = last & layer.n.is_(1)
        h, weight, bias = layer.buffer(OUT), layer.parameter(WEIGHT), layer.parameter(BIAS)
        with e.when(single), e.range(r0, r1) as m:
            e.put(e.b.fadd(_dot(e, layer.k, layer.x + m * layer.row, weight), e.get(bias)), h + m * e.size)
        with e.when(~single):
            e.call(pack_right, weight, layer.out_row, layer.k, layer.n, scratch, zeros)
            z = layer.normed.choose(layer.buffer(NORMALISED), h)
            with e.range(r0, r1, BLOCK_ROWS) as m0:
                m1 = r1.min(m0 + BLOCK_ROWS)
                left, out = layer.x + m0 * layer.row, z + m0 * layer.out_row
                gate = (~last & ~layer.normed).choose(1, 0)
                e.call(
                    product, m1 - m0, layer.n, layer.k, left, layer.row, scratch, bias, out, layer.out_row, gate, 0, edge
                )  # fmt: skip
                with e.when(~last & layer.normed), e.range(m0, m1) as m:
                    o = m * layer.out_row
                    rstd = _norm_relu(e, layer.n, z + o, h + o, layer.parameter(GAIN), layer.parameter(SHIFT))
                    e.put(rstd, layer.rstd + m * e.size)


def _sums(e: Emitter, sums: Int, layers: Int, total: Int, widest: Int, slot: Int, i: Int, row: Int) -> Int:
    """Where the chunk of a row of hidden layer ``i`` has its two sums of ``widest`` elements each."""
    chunks = (total + (CHUNK - 1)) // CHUNK
    return sums + ((slot * (layers - 1) + i) * chunks + row // CHUNK) * 2 * widest * e.size


@_kernel()
def backward_rows(
    e: Emitter, layers: Int, dims: Int, params: Int, tape: Int, total: Int, dy: Int, dy_head: Int, dy_row: Int,
    s0: Int, s1: Int, r0: Int, r1: Int, sums: Int, widest: Int, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """dL/dz of every hidden layer from dL/dy; ``r0`` is a multiple of CHUNK. Slot s is network s.

    ``sums`` (slots, hidden layers, chunks, 2, widest): the chunks' dgain and dshift, with LayerNorm.
    """
    zeros = edge + (EDGE_ELEMENTS - 16) * e.size
    with e.range(s0, s1) as s, e.range(1, layers) as back:
        i = layers - back
        layer = _Layer(e, dims, params, tape, total, i, s, s)
        before = _Layer(e, dims, params, tape, total, i - 1, s, s)
        last, k, n = i.is_(layers - 1), layer.k, layer.n
        d, row = last.choose(dy + s * dy_head, layer.buffer(SLOPE)), last.choose(dy_row, layer.out_row)
        weight, single = layer.parameter(WEIGHT), n.is_(1)
        out, h, x, width = before.buffer(SLOPE), before.buffer(OUT), before.buffer(NORMALISED), before.out_row
        with e.when(~single):
            e.call(pack_right_transposed, weight, layer.out_row, n, k, scratch, zeros)
        with e.range(r0, r1, BLOCK_ROWS) as m0:
            m1 = r1.min(m0 + BLOCK_ROWS)
            gate = before.normed.choose(0, h + m0 * width)
            with e.when(~single):
                e.call(
                    product, m1 - m0, k, n, d + m0 * row, row, scratch, 0, out + m0 * width, width, gate, width, edge
                )  # fmt: skip
            with e.when(single), e.range(m0, m1) as m:
                e.write(k, out + m * width, partial(_scaled, e, e.spread(e.get(d + m * row)), weight, None))
                with e.when(~before.normed):
                    e.write(k, out + m * width, partial(_gated, e, h + m * width, out + m * width))
            with e.when(before.normed), e.range(m0, m1) as m:
                o = m * width
                dgain = _sums(e, sums, layers, total, widest, s, i - 1, m)
                with e.when((m // CHUNK * CHUNK).is_(m)):
                    _clear(e, widest * 2, dgain)
                rstd, gain, shift = e.get(before.rstd + m * e.size), before.parameter(GAIN), before.parameter(SHIFT)
                _norm_relu_backward(e, k, out + o, x + o, gain, shift, rstd, dgain, dgain + widest * e.size)


@_kernel()
def backward_inputs(
    e: Emitter, layers: Int, dims: Int, params: Int, tape: Int, total: Int, rows: Int, s0: Int, s1: Int, r0: Int, r1: Int,
    first: Int, columns: Int, out: Int, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """dL/dx (slots, rows, columns) of ``columns`` input columns from ``first`` on, after :func:`backward_rows`."""
    zeros = edge + (EDGE_ELEMENTS - 16) * e.size
    with e.range(s0, s1) as s:
        layer = _Layer(e, dims, params, tape, total, e.integer(0), s, s)
        row, width = layer.out_row, columns * e.size
        weight, d = layer.parameter(WEIGHT) + first * row, layer.buffer(SLOPE) + r0 * row
        e.call(pack_right_transposed, weight, row, layer.n, columns, scratch, zeros)
        target = out + (s * rows + r0) * width
        e.call(product, r1 - r0, columns, layer.n, d, row, scratch, 0, target, width, 0, 0, edge)


@_kernel()
def backward_parameters(
    e: Emitter, layers: Int, dims: Int, params: Int, tape: Int, total: Int, rows: Int, dy: Int, dy_head: Int, dy_row: Int,
    s0: Int, s1: Int, part: Int, parts: Int, sums: Int, widest: Int, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """Gradients of all parameters; this is part ``part`` of ``parts`` of every layer's rows of the weight."""
    zeros = edge + (EDGE_ELEMENTS - 16) * e.size
    with e.range(s0, s1) as s, e.range(0, layers) as back:
        i = layers - 1 - back
        layer = _Layer(e, dims, params, tape, total, i, s, s)
        last, k, n, row = i.is_(layers - 1), layer.k, layer.n, layer.row
        d, d_row = last.choose(dy + s * dy_head, layer.buffer(SLOPE)), last.choose(dy_row, layer.out_row)
        dweight, dbias = layer.parameter(WEIGHT, True), layer.parameter(BIAS, True)
        single = last & n.is_(1)
        panels = (k + (TILE - 1)) // TILE
        m0, m1 = panels * part // parts * TILE, k.min(panels * (part + 1) // parts * TILE)
        with e.when(single & part.is_(0)):
            _clear(e, k, dweight)
            with e.range(0, rows) as m:
                f, x = e.spread(e.get(d + m * d_row)), layer.x + m * row
                e.write(k, dweight, partial(_scaled, e, f, x, dweight))
        with e.when(~single & part.is_(0)):
            e.call(pack_right_and_sum, d, d_row, rows, n, scratch, dbias, zeros)
        with e.when(~single & (part > 0) & (m1 > m0)):
            e.call(pack_right, d, d_row, rows, n, scratch, zeros)
        with e.when(~single):
            left = scratch + (n + 16) * rows * e.size
            e.call(transpose, layer.x + m0 * e.size, row, m1 - m0, rows, left)
            target = dweight + m0 * layer.out_row
            e.call(product, m1 - m0, n, rows, left, rows * e.size, scratch, 0, target, layer.out_row, 0, 0, edge)
        with e.when(single & part.is_(0)):
            e.put(e.zero, dbias)
            with e.range(0, rows) as m:
                e.put(e.b.fadd(e.get(dbias), e.get(d + m * d_row)), dbias)
        with e.when(layer.normed & part.is_(0)):
            for f, target in enumerate((layer.parameter(GAIN, True), layer.parameter(SHIFT, True))):
                _clear(e, n, target)
                with e.range(0, rows, CHUNK) as m:
                    x = _sums(e, sums, layers, total, widest, s, i, m) + widest * (f * e.size)
                    e.write(n, target, partial(_sum, e, x, target))


@_kernel()
def regress(
    e: Emitter, layers: Int, dims: Int, params: Int, tape: Int, heads: Int, total: Int, y: Int, y_head: Int, weight: Int,
    dq: Int, s0: Int, s1: Int, r0: Int, r1: Int, sums: Int, widest: Int, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """:func:`forward`, dq = (out - y) weight, :func:`backward_rows`. ``y_head``: bytes between networks' targets, 0: shared."""
    e.call(forward, layers, dims, params, tape, heads, total, s0, s1, r0, r1, scratch, edge)
    with e.range(s0, s1) as s:
        out = e.table(tape, (layers - 1) * TAPE + OUT) + s * total * e.size
        with e.range(r0, r1) as m:
            error = e.b.fsub(e.get(out + m * e.size), e.get(y + s * y_head + m * e.size))
            e.put(e.b.fmul(error, e.get(weight + m * e.size)), dq + (s * total + m) * e.size)
    row = total * e.size
    e.call(
        backward_rows, layers, dims, params, tape, total, dq, row, e.size, s0, s1, r0, r1, sums, widest, scratch, edge
    )  # fmt: skip


@_kernel()
def regress_whole(
    e: Emitter, layers: Int, dims: Int, params: Int, tape: Int, heads: Int, total: Int, y: Int, y_head: Int, weight: Int,
    dq: Int, s0: Int, s1: Int, sums: Int, widest: Int, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """One network after the other, from its input to its gradients, while its activations are in cache."""
    with e.range(s0, s1) as s:
        e.call(
            regress, layers, dims, params, tape, heads, total, y, y_head, weight, dq, s, s + 1, 0, total, sums, widest,
            scratch, edge,
        )  # fmt: skip
        e.call(
            backward_parameters, layers, dims, params, tape, total, total, dq, total * e.size, e.size, s, s + 1, 0, 1, sums,
            widest, scratch, edge,
        )  # fmt: skip


@_kernel(*NUMBERS)
def fit_whole(
    e: Emitter, layers: Int, dims: Int, params: Int, tape: Int, heads: Int, total: Int, y: Int, y_head: Int, weight: Int,
    dq: Int, s0: Int, s1: Int, sums: Int, widest: Int, slices: Int, count: Int, p: Int, g: Int, m: Int, v: Int, target: Int,
    rate: Any, keep: Any, c1: Any, c2: Any, eps: Any, tau: Any, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """:func:`regress_whole` and, while a network's gradients are in cache, :func:`adam_slices` of its ``count`` slices."""
    with e.range(s0, s1) as s:
        e.call(
            regress_whole, layers, dims, params, tape, heads, total, y, y_head, weight, dq, s, s + 1, sums, widest,
            scratch, edge,
        )  # fmt: skip
        e.call(
            adam_slices, slices + s * count * 16, count, p, g, m, v, target, rate, keep, c1, c2, eps, tau, scratch, edge
        )  # fmt: skip
