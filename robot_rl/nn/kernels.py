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

from robot_rl.nn.products import (
    BLOCK_ROWS,
    EDGE_ELEMENTS,
    TILE,
    left_panel,
    pack_left_transposed,
    pack_right,
    pack_right_transposed,
    product,
    tile,
)
from robot_rl.nn.simd import Emitter, Int, Kernel, Program

CHUNK = 24  # rows whose bias and LayerNorm gradients are added up before they join the others; a multiple of TILE
PARAMS, TAPE = 8, 7  # entries of a layer in those tables
(X, X_HEAD, X_ROW, OUT, NORMALISED, RSTD, SLOPE), (WEIGHT, BIAS, GAIN, SHIFT) = range(7), range(4)
LAYER_NORM_EPS = 1e-5

_KERNELS = [tile, product, pack_right, pack_right_transposed, pack_left_transposed]


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


def _sum(e: Emitter, x: Int, y: Int, offset: Int) -> Any:
    return e.b.fadd(e.load(x + offset), e.load(y + offset))


def _relu(e: Emitter, n: Int, x: Int) -> None:
    """In place, keeping NaN."""

    def body(o: Int, _: list[Any]) -> list[Any]:
        value = e.load(x + o)
        e.store(e.positive(value, value), x + o)
        return []

    e.over(n, body)


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


def _relu_backward(e: Emitter, n: Int, d: Int, h: Int, dbias: Int) -> None:
    """d = d [h > 0]; adds to dbias."""

    def body(o: Int, _: list[Any]) -> list[Any]:
        dz = e.positive(e.load(h + o), e.load(d + o))
        e.store(dz, d + o)
        e.store(e.b.fadd(dz, e.load(dbias + o)), dbias + o)
        return []

    e.over(n, body)


def _norm_relu_backward(
    e: Emitter, n: Int, d: Int, h: Int, x: Int, gain: Int, rstd: Any, dgain: Int, dshift: Int, dbias: Int
) -> None:
    """dL/dh in ``d`` becomes dL/dz of :func:`_norm_relu` (``x`` is x̂); adds to dgain, dshift and dbias."""
    b = e.b

    def first(o: Int, s: list[Any]) -> list[Any]:
        da, xhat = e.positive(e.load(h + o), e.load(d + o)), e.load(x + o)
        e.store(e.fma(da, xhat, e.load(dgain + o)), dgain + o)
        e.store(b.fadd(da, e.load(dshift + o)), dshift + o)
        dx = b.fmul(da, e.load(gain + o))
        e.store(dx, d + o)
        return [b.fadd(s[0], dx), e.fma(dx, xhat, s[1])]

    count, r = b.sitofp(n.value, e.scalar), e.spread(rstd)
    mean, slope = (e.spread(b.fdiv(total, count)) for total in e.over(n, first, 2))

    def second(o: Int, _: list[Any]) -> list[Any]:
        dz = b.fmul(b.fsub(e.load(d + o), e.fma(e.load(x + o), slope, mean)), r)
        e.store(dz, d + o)
        e.store(b.fadd(dz, e.load(dbias + o)), dbias + o)
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
                e.call(product, m1 - m0, layer.n, layer.k, left, layer.row, 0, scratch, bias, out, layer.out_row, edge)
                with e.when(~last & layer.normed), e.range(m0, m1) as m:
                    o = m * layer.out_row
                    rstd = _norm_relu(e, layer.n, z + o, h + o, layer.parameter(GAIN), layer.parameter(SHIFT))
                    e.put(rstd, layer.rstd + m * e.size)
                with e.when(~last & ~layer.normed), e.range(m0, m1) as m:
                    _relu(e, layer.n, h + m * layer.out_row)


def _sums(e: Emitter, sums: Int, layers: Int, total: Int, widest: Int, slot: Int, i: Int, row: Int) -> Int:
    """Where the chunk of a row of hidden layer ``i`` has its three sums of ``widest`` elements each."""
    chunks = (total + (CHUNK - 1)) // CHUNK
    return sums + ((slot * (layers - 1) + i) * chunks + row // CHUNK) * 3 * widest * e.size


@_kernel()
def backward_rows(
    e: Emitter, layers: Int, dims: Int, params: Int, tape: Int, total: Int, dy: Int, dy_head: Int, dy_row: Int,
    s0: Int, s1: Int, r0: Int, r1: Int, sums: Int, widest: Int, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """dL/dz of every hidden layer from dL/dy; ``r0`` is a multiple of CHUNK. Slot s is network s.

    ``sums`` (slots, hidden layers, chunks, 3, widest): the chunks' dgain, dshift and dbias.
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
            with e.when(~single):
                e.call(product, m1 - m0, k, n, d + m0 * row, row, 0, scratch, 0, out + m0 * width, width, edge)
            with e.range(m0, m1) as m:
                o = m * width
                dgain = _sums(e, sums, layers, total, widest, s, i - 1, m)
                dshift, dbias = dgain + widest * e.size, dgain + widest * (2 * e.size)
                with e.when((m // CHUNK * CHUNK).is_(m)):
                    _clear(e, widest * 3, dgain)
                with e.when(single):
                    factor = e.spread(e.get(d + m * row))
                    e.write(k, out + o, partial(_scaled, e, factor, weight, None))
                with e.when(before.normed):
                    rstd = e.get(before.rstd + m * e.size)
                    gain = before.parameter(GAIN)
                    _norm_relu_backward(e, k, out + o, h + o, x + o, gain, rstd, dgain, dshift, dbias)
                with e.when(~before.normed):
                    _relu_backward(e, k, out + o, h + o, dbias)


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
        e.call(product, r1 - r0, columns, layer.n, d, row, 0, scratch, 0, target, width, edge)


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
        with e.when(~single & (m1 > m0)):
            left = scratch + (n + 16) * rows * e.size
            e.call(pack_right, d, d_row, rows, n, scratch, zeros)
            e.call(pack_left_transposed, layer.x + m0 * e.size, row, m1 - m0, rows, left, zeros)
            target = dweight + m0 * layer.out_row
            e.call(product, m1 - m0, n, rows, left, 0, left_panel(e, rows), scratch, 0, target, layer.out_row, edge)
        with e.when(last & part.is_(0)), e.range(0, n) as j:
            e.put(e.zero, dbias + j * e.size)
            with e.range(0, rows) as m:
                value = e.get(d + m * d_row + j * e.size)
                e.put(e.b.fadd(e.get(dbias + j * e.size), value), dbias + j * e.size)
        with e.when(~last & part.is_(0)):
            for f, target in enumerate((layer.parameter(GAIN, True), layer.parameter(SHIFT, True), dbias)):
                with e.when(layer.normed if f < 2 else layer.n > 0):
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


# ---- the optimiser


@_kernel("rate", "keep", "c1", "c2", "root", "eps", "tau")
def adam(
    e: Emitter, n: Int, p: Int, g: Int, m: Int, v: Int, target: Int,
    rate: Any, keep: Any, c1: Any, c2: Any, root: Any, eps: Any, tau: Any,
) -> None:  # fmt: skip
    """One step of Adam, then ``target`` (0: none) += tau (p - target); what depends on the step count is in rate and root.

    m += c1 (g - m);  v += c2 (g² - v);  p = keep p - rate m / (sqrt v / root + eps)
    """
    b = e.b
    rate, keep, c1, c2, root, eps, tau = (e.spread(x) for x in (rate, keep, c1, c2, root, eps, tau))

    def body(follow: bool) -> Callable[[Int, list[Any]], list[Any]]:
        def step(o: Int, _: list[Any]) -> list[Any]:
            gradient, first, second = (e.load(x + o) for x in (g, m, v))
            first = e.fma(c1, b.fsub(gradient, first), first)
            second = e.fma(c2, b.fsub(b.fmul(gradient, gradient), second), second)
            e.store(first, m + o)
            e.store(second, v + o)
            denominator = b.fadd(b.fdiv(e.root(second), root), eps)
            new = b.fsub(b.fmul(e.load(p + o), keep), b.fdiv(b.fmul(rate, first), denominator))
            e.store(new, p + o)
            if follow:
                old = e.load(target + o)
                e.store(e.fma(tau, b.fsub(new, old), old), target + o)
            return []

        return step

    with e.when(target > 0):
        e.over(n, body(True))
    with e.when(~(target > 0)):
        e.over(n, body(False))
