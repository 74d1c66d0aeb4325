"""Forward and backward of N stacked MLPs as compiled code for the CPU: what :mod:`robot_rl.nn.compiled` calls.

A network's activations stay in cache while its layers follow each other; bias, LayerNorm and ReLU are applied to rows
that were just computed; no pass over memory exists only to scale, mask or sum. The matrix product is the usual one (Goto
and van de Geijn 2008): the right matrix packed into panels two vectors wide, the left one read in tiles of six rows.

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
from functools import lru_cache
from typing import Any

from llvmlite import ir

from robot_rl.nn.simd import VECTOR_BYTES, Emitter, Int, Kernel, Program

CHUNK = 24  # rows whose bias and LayerNorm gradients are added up before they join the others; a multiple of TILE
BLOCK_ROWS = 96  # rows of the left matrix that stay in cache while the panels of the right one pass
BLOCK_TERMS = 256  # terms of a dot product between two visits to memory
TILE = 6  # 6 x 2 vectors of sums, 2 of the right matrix and 1 of the left one fill the 16 registers of AVX2
EDGE_ELEMENTS = TILE * BLOCK_TERMS + (TILE + 1) * 16  # a tile's left matrix, its result, and one row that stays zero
DIMS, PARAMS, TAPE = 1, 8, 7
(X, X_HEAD, X_ROW, OUT, NORMALISED, RSTD, SLOPE), (WEIGHT, BIAS, GAIN, SHIFT) = range(7), range(4)
LAYER_NORM_EPS = 1e-5

_KERNELS: list[Kernel] = []


def _kernel(*numbers: str) -> Callable[[Callable[..., None]], Kernel]:
    def register(emit: Callable[..., None]) -> Kernel:
        _KERNELS.append(Kernel(emit, numbers))
        return _KERNELS[-1]

    return register


@lru_cache(maxsize=2)
def program(element: str) -> Program:
    """Compiled for "float32" or "float64"; the first call of each takes a moment."""
    return Program(_KERNELS, element)


# ---- packing


def _copy_rows(e: Emitter, source: Int, source_row: Int, target: Int, target_row: int, rows: Int, vectors: int) -> None:
    """Target rows may overlap: the next one then overwrites the end of the one before."""
    with e.range(0, rows) as r:
        for v in range(vectors):
            e.store(e.load(source + r * source_row + v * VECTOR_BYTES), target + r * target_row + v * VECTOR_BYTES)


def _transpose(e: Emitter, source: Int, source_row: Int, target: Int, target_row: int, vectors: Int) -> None:
    """One vector's width of rows, ``vectors`` vectors long, into columns ``target_row`` bytes apart."""
    w = e.width
    with e.range(0, vectors) as block:
        values = [e.load(source + source_row * r + block * VECTOR_BYTES) for r in range(w)]
        span = 1
        while span < w:  # after the step of a span, lanes agree with the transpose in that bit of their index
            low = e.lanes([i if not i & span else w + i - span for i in range(w)])
            high = e.lanes([i + span if not i & span else w + i for i in range(w)])
            for r in range(w):
                if not r & span:
                    x, y = values[r], values[r | span]
                    values[r], values[r | span] = e.b.shuffle_vector(x, y, low), e.b.shuffle_vector(x, y, high)
            span *= 2
        for r, value in enumerate(values):
            e.store(value, target + block * (w * target_row) + r * target_row)


@_kernel()
def pack_right(e: Emitter, source: Int, row: Int, terms: Int, columns: Int, target: Int, zeros: Int) -> None:
    """(terms, columns) row-major into panels (columns / NR, terms, NR), the last one filled up with zeros."""
    wide = 2 * e.width
    with e.range(0, columns, wide) as j:
        panel = target + j * terms * e.size
        whole = j + wide <= columns
        with e.when(whole):
            _copy_rows(e, source + j * e.size, row, panel, wide * e.size, terms, 2)
        with e.when(~whole), e.range(0, terms) as k, e.range(0, wide) as i:
            value = e.get_if(j + i < columns, source + k * row + (j + i) * e.size, zeros)
            e.put(value, panel + (k * wide + i) * e.size)


@_kernel()
def pack_right_transposed(e: Emitter, source: Int, row: Int, terms: Int, columns: Int, target: Int, zeros: Int) -> None:
    """The same for the transpose of a row-major (columns, terms)."""
    wide = 2 * e.width
    with e.range(0, columns, wide) as j:
        panel = target + j * terms * e.size
        vectors = (j + wide <= columns).choose(terms // e.width, 0)
        for half in range(2):
            corner = source + (j + half * e.width) * row
            _transpose(e, corner, row, panel + half * VECTOR_BYTES, wide * e.size, vectors)
        with e.range(0, wide) as i, e.range(vectors * e.width, terms) as k:
            value = e.get_if(j + i < columns, source + (j + i) * row + k * e.size, zeros)
            e.put(value, panel + (k * wide + i) * e.size)


def left_panel(e: Emitter, terms: Int) -> Int:
    """Bytes from one packed panel of the left matrix to the next; eight elements of slack, because rows are copied whole."""
    return (terms * TILE + 8) * e.size


@_kernel()
def pack_left_transposed(e: Emitter, source: Int, row: Int, rows: Int, terms: Int, target: Int, zeros: Int) -> None:
    """The transpose of a row-major (terms, rows) into panels (rows / 6, terms, 6)."""
    vectors = -(-TILE // e.width)
    with e.range(0, terms, 16) as k:  # so many rows stay in the first cache while the panels take their part
        count = (terms - k).min(16)
        with e.range(0, rows, TILE) as m:
            panel = target + m // TILE * left_panel(e, terms) + k * (TILE * e.size)
            whole = m + vectors * e.width <= rows
            with e.when(whole):
                _copy_rows(e, source + k * row + m * e.size, row, panel, TILE * e.size, count, vectors)
            with e.when(~whole), e.range(0, count) as c, e.range(0, TILE) as i:
                value = e.get_if(m + i < rows, source + (k + c) * row + (m + i) * e.size, zeros)
                e.put(value, panel + (c * TILE + i) * e.size)


# ---- the matrix product


@_kernel()
def tile(
    e: Emitter, terms: Int, left: Int, row: Int, column: Int, right: Int, start: Int, start_row: Int, out: Int, out_row: Int
) -> None:
    """out (6, 2 vectors) = start + left @ right, all sums in registers. ``start_row`` 0: one row of ``start`` for all."""
    sums: list[Any] = []
    for r in range(TILE):
        sums += [e.load(start + start_row * r), e.load(start + start_row * r + VECTOR_BYTES)]

    def body(offset: Int, values: list[Any]) -> list[Any]:
        position, sums = Int(e, values[0]), values[1:]
        pair = [e.load(right + offset), e.load(right + offset + VECTOR_BYTES)]
        new = [(position + column).value]
        for r in range(TILE):
            x = e.spread(e.get(left + row * r + position))
            new += [e.fma(x, pair[0], sums[2 * r]), e.fma(x, pair[1], sums[2 * r + 1])]
        return new

    step = 2 * VECTOR_BYTES
    sums = e.loop(e.int(0), terms * step, step, [e.int(0).value, *sums], body)[1:]
    for r in range(TILE):
        e.store(sums[2 * r], out + out_row * r)
        e.store(sums[2 * r + 1], out + out_row * r + VECTOR_BYTES)


@_kernel()
def product(
    e: Emitter, rows: Int, columns: Int, terms: Int, left: Int, row: Int, panel: Int, right: Int, start: Int,
    out: Int, out_row: Int, edge: Int,
) -> None:  # fmt: skip
    """out (rows, columns) = left @ right + start.

    Args:
        left: row-major with ``row`` bytes a row, or packed: then ``panel`` is the bytes from one panel to the next, else 0.
        right: packed. start: address of one row (columns) for all, or 0.
        edge: scratch of EDGE_ELEMENTS, zero when it was made.
    """
    size, wide = e.size, 2 * e.width
    corner = edge + TILE * BLOCK_TERMS * size
    zeros = corner + TILE * wide * size
    packed_left = panel > 0
    a_row, a_column = packed_left.choose(size, row), packed_left.choose(TILE * size, size)
    with e.range(0, rows, BLOCK_ROWS) as m0:
        m1 = rows.min(m0 + BLOCK_ROWS)
        full = m0 + (m1 - m0) // TILE * TILE
        with e.range(0, terms, BLOCK_TERMS) as k0:
            count = (terms - k0).min(BLOCK_TERMS)
            begins = k0.is_(0)
            with e.when((full < m1) & ~packed_left), e.range(0, TILE) as i, e.range(0, count) as k:
                value = e.get_if(full + i < m1, left + (full + i) * row + (k0 + k) * size, zeros)
                e.put(value, edge + (k * TILE + i) * size)  # the last rows, filled up to a tile
            with e.range(0, columns, wide) as j:
                factor = right + (j * terms + k0 * wide) * size
                first = (start > 0).choose(start + j * size, zeros)
                inner = (j + wide <= columns).choose(full, m0)  # rows of this panel that need no care
                with e.range(m0, inner, TILE) as m:
                    a = left + packed_left.choose(m // TILE * panel, m * row) + k0 * a_column
                    target = out + m * out_row + j * size
                    e.call(
                        tile, count, a, a_row, a_column, factor, begins.choose(first, target), begins.choose(0, out_row),
                        target, out_row,
                    )  # fmt: skip
                with e.range(inner, m1, TILE) as m:
                    target = out + m * out_row + j * size
                    copied = ~packed_left & m.is_(full)
                    a = left + packed_left.choose(m // TILE * panel, m * row) + k0 * a_column
                    source, source_row = begins.choose(start, target), begins.choose(0, out_row)
                    with e.range(0, TILE) as r, e.range(0, wide) as i:
                        valid = (m + r < m1) & (j + i < columns) & (source > 0)
                        where = begins.choose(start + j * size, target) + r * source_row + i * size
                        e.put(e.get_if(valid, where, zeros), corner + (r * wide + i) * size)
                    e.call(
                        tile, count, copied.choose(edge, a), copied.choose(size, a_row), copied.choose(TILE * size, a_column),
                        factor, corner, wide * size, corner, wide * size,
                    )  # fmt: skip
                    with e.range(0, (m1 - m).min(TILE)) as r, e.range(0, (columns - j).min(wide)) as i:
                        e.put(e.get(corner + (r * wide + i) * size), target + r * out_row + i * size)


# ---- rows


def _clear(e: Emitter, n: Int, x: Int) -> None:
    e.over(n, lambda o, _: [e.store(e.zeros, x + o)][:0])


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
                    e.over(k, lambda c, _, o=o, f=factor: [e.store(e.b.fmul(f, e.load(weight + c)), out + o + c)][:0])
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
        layer = _Layer(e, dims, params, tape, total, e.int(0), s, s)
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
                e.over(k, lambda c, _, f=f, x=x: [e.store(e.fma(f, e.load(x + c), e.load(dweight + c)), dweight + c)][:0])
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
                        e.over(n, lambda c, _, x=x, t=target: [e.store(e.b.fadd(e.load(x + c), e.load(t + c)), t + c)][:0])


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
