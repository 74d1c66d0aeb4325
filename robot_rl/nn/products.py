"""Matrix products of a few hundred rows and columns as compiled code, for :mod:`robot_rl.nn.kernels`.

The usual way (Goto and van de Geijn 2008): the right matrix is packed into panels two vectors wide, the left one read in tiles of
six rows (after it was written down row by row, if it is a transpose), and a tile of sums stays in registers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from robot_rl.nn.simd import VECTOR_BYTES, Emitter, Int, Kernel

BLOCK_ROWS = 96  # rows of the left matrix that stay in cache while the panels of the right one pass
BLOCK_TERMS = 256  # terms of a dot product between two visits to memory
TILE = 6  # 6 x 2 vectors of sums, 2 of the right matrix and 1 of the left one fill the 16 registers of AVX2
UNROLL = 4  # terms that share an address and a comparison: other instructions cost time wherever a core is not ours alone
EDGE_ELEMENTS = (TILE + 1) * 16  # a tile's result, and one row that stays zero


# ---- packing


def _copy_rows(e: Emitter, source: Int, source_row: Int, target: Int, rows: Int) -> None:
    """Rows of two vectors, written one after another."""
    with e.range(0, rows) as r:
        for v in (0, VECTOR_BYTES):
            e.store(e.load(source + r * source_row + v), target + r * (2 * VECTOR_BYTES) + v)


def _transpose(e: Emitter, source: Int, source_row: Int, target: Int, target_row: Int | int, vectors: Int | int) -> None:
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
            e.store(value, target + block * w * target_row + e.integer(r) * target_row)


def _add_up(e: Emitter, panel: Int, terms: Int, columns: Int, sums: Int) -> None:
    """Sums over the terms of a packed panel, of its first ``columns`` columns."""
    wide = 2 * VECTOR_BYTES

    def body(o: Int, values: list[Any]) -> list[Any]:
        return [e.b.fadd(value, e.load(panel + o + i * VECTOR_BYTES)) for i, value in enumerate(values)]

    low, high = e.loop(e.integer(0), terms * wide, wide, [e.zeros, e.zeros], body)
    whole = ~(columns < 2 * e.width)
    with e.when(whole):
        e.store(low, sums)
        e.store(high, sums + VECTOR_BYTES)
    with e.when(~whole), e.range(0, columns) as i:
        e.put(e.zero, sums + i * e.size)
        with e.range(0, terms) as k:
            value = e.b.fadd(e.get(sums + i * e.size), e.get(panel + k * wide + i * e.size))
            e.put(value, sums + i * e.size)


@Kernel
def pack_right_and_sum(e: Emitter, source: Int, row: Int, terms: Int, columns: Int, target: Int, sums: Int, zeros: Int) -> None:
    """:func:`pack_right`, and the sums over the terms, (columns,)."""
    e.call(pack_right, source, row, terms, columns, target, zeros)
    with e.range(0, columns, 2 * e.width) as j:
        _add_up(e, target + j * terms * e.size, terms, (columns - j).min(2 * e.width), sums + j * e.size)


@Kernel
def pack_right(e: Emitter, source: Int, row: Int, terms: Int, columns: Int, target: Int, zeros: Int) -> None:
    """(terms, columns) row-major into panels (columns / NR, terms, NR), the last one filled up with zeros."""
    wide = 2 * e.width
    full = columns // wide * wide
    with e.range(0, terms, 16) as k:  # so many rows stay in the first cache while the panels take their part
        count = (terms - k).min(16)
        with e.range(0, full, wide) as j:
            _copy_rows(e, source + k * row + j * e.size, row, target + (j * terms + k * wide) * e.size, count)
    with e.range(full, columns, wide) as j, e.range(0, terms) as k, e.range(0, wide) as i:
        value = e.get_if(j + i < columns, source + k * row + (j + i) * e.size, zeros)
        e.put(value, target + (j * terms + k * wide + i) * e.size)


@Kernel
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


@Kernel
def transpose(e: Emitter, source: Int, row: Int, rows: Int, terms: Int, target: Int) -> None:
    """The transpose of a row-major (terms, rows), row-major (rows, terms) without gaps."""
    w, wide, out_row = e.width, 2 * e.width, terms * e.size
    whole_rows, whole_terms = rows // wide * wide, terms // w * w
    with e.range(0, whole_rows, wide) as m, e.range(0, whole_terms, w) as k:  # whole lines of cache are read and written
        _transpose(e, source + k * row + m * e.size, row, target + m * out_row + k * e.size, out_row, 2)
    for ms, ks in (((0, whole_rows), (whole_terms, terms)), ((whole_rows, rows), (0, terms))):
        with e.range(*ms) as m, e.range(*ks) as k:
            e.put(e.get(source + k * row + m * e.size), target + m * out_row + k * e.size)


# ---- the matrix product


def _tile(rows: int) -> Kernel:
    def tile(
        e: Emitter, count: Int, terms: Int, left: Int, row: Int, right: Int, start: Int, start_row: Int, out: Int, out_row: Int,
        gate: Int, gate_row: Int,
    ) -> None:  # fmt: skip
        """``count`` times, one below the other: out (rows, 2 vectors) = start + left @ right, all sums in registers.

        ``start_row`` 0: one row of ``start`` for all. ``gate`` 0: nothing more; 1: negative values become 0; else the address of rows
        where ``out`` becomes 0 that are not positive.
        """
        step, places = 2 * VECTOR_BYTES, [(r, half * VECTOR_BYTES) for r in range(rows) for half in range(2)]
        unroll = UNROLL if rows == TILE else 1  # the others are rare, and take as long to compile
        begin, middle, end = e.integer(0), terms // unroll * (unroll * step), terms * step
        with e.range(0, count) as i:
            below = i * rows
            a, first, target = left + below * row, start + below * start_row, out + below * out_row

            def body(several: int, offset: Int, values: list[Any]) -> list[Any]:
                position, sums = Int(e, values[0]), values[1:]
                for k in range(several):
                    pair = [e.load(right + offset + (k * step + half * VECTOR_BYTES)) for half in range(2)]
                    factors = [e.spread(e.get(a + row * r + position + k * e.size)) for r in range(rows)]
                    sums = [e.fma(factors[n // 2], pair[n % 2], total) for n, total in enumerate(sums)]
                return [(position + several * e.size).value, *sums]

            values = [begin.value, *(e.load(first + start_row * r + half) for r, half in places)]
            values = e.loop(begin, middle, unroll * step, values, partial(body, unroll))
            sums = e.loop(middle, end, step, values, partial(body, 1))[1:]
            with e.when(gate.is_(0)):
                for value, (r, half) in zip(sums, places, strict=True):
                    e.store(value, target + out_row * r + half)
            with e.when(gate.is_(1)):
                for value, (r, half) in zip(sums, places, strict=True):
                    e.store(e.positive(value, value), target + out_row * r + half)
            with e.when(gate > 1):
                mask = gate + below * gate_row
                for value, (r, half) in zip(sums, places, strict=True):
                    e.store(e.positive(e.load(mask + gate_row * r + half), value), target + out_row * r + half)

    tile.__name__ = f"tile{rows}"
    return Kernel(tile)


TILES = [_tile(rows) for rows in range(1, TILE + 1)]  # the last tile of a matrix has what rows are left


@Kernel
def product(
    e: Emitter, rows: Int, columns: Int, terms: Int, left: Int, row: Int, right: Int, start: Int,
    out: Int, out_row: Int, gate: Int, gate_row: Int, edge: Int,
) -> None:  # fmt: skip
    """out (rows, columns) = left @ right + start, and of it what ``gate`` lets through, as :func:`_tile` says.

    Args:
        left: row-major with ``row`` bytes a row.
        right: packed. start: address of one row (columns) for all, or 0.
        edge: scratch of EDGE_ELEMENTS, zero when it was made.
    """
    size, wide = e.size, 2 * e.width
    corner, zeros = edge, edge + TILE * wide * size

    def tile(height: Int, *arguments: Int | int) -> None:
        for count, kernel in enumerate(TILES, 1):
            with e.when(height.is_(count)):
                e.call(kernel, 1, *arguments)

    with e.range(0, rows, BLOCK_ROWS) as m0, e.range(0, terms, BLOCK_TERMS) as k0:
        m1, count = rows.min(m0 + BLOCK_ROWS), (terms - k0).min(BLOCK_TERMS)
        begins, ends = k0.is_(0), ~(k0 + BLOCK_TERMS < terms)
        source_row, through = begins.choose(0, out_row), ends.choose(gate, 0)
        tiles = (m1 - m0) // TILE

        def factors(m: Int, j: Int) -> tuple[Int, ...]:
            return count, left + m * row + k0 * size, row, right + (j * terms + k0 * wide) * size

        def sums_of(m: Int, j: Int) -> tuple[Int, ...]:
            target = out + m * out_row + j * size
            source = begins.choose((start > 0).choose(start + j * size, zeros), target)
            here = (through > 1).choose(through + m * gate_row + j * size, through)
            return source, source_row, target, out_row, here, gate_row

        whole = columns // wide * wide
        with e.range(0, whole, wide) as j:
            e.call(TILES[-1], tiles, *factors(m0, j), *sums_of(m0, j))
            rest = m0 + tiles * TILE
            tile(m1 - rest, *factors(rest, j), *sums_of(rest, j))
        # The last few columns: by way of a tile that has all of them.
        with e.range(whole, columns, wide) as j, e.range(m0, m1, TILE) as m:
            height, target = (m1 - m).min(TILE), out + m * out_row + j * size
            with e.range(0, height) as r, e.range(0, wide) as i:
                valid = (j + i < columns) & (begins.choose(start, target) > 0)
                where = begins.choose(start + j * size, target) + r * source_row + i * size
                e.put(e.get_if(valid, where, zeros), corner + (r * wide + i) * size)
            tile(height, *factors(m, j), corner, wide * size, corner, wide * size, 0, 0)
            with e.range(0, height) as r, e.range(0, columns - j) as i:
                value, place = e.get(corner + (r * wide + i) * size), target + r * out_row + i * size
                e.put(value, place)
                with e.when(through.is_(1)):
                    e.put(e.positive(value, value), place)
                with e.when(through > 1):
                    e.put(e.positive(e.get(through + (m + r) * gate_row + (j + i) * size), value), place)
