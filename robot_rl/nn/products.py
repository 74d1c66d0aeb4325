"""Matrix products of a few hundred rows and columns as compiled code, for :mod:`robot_rl.nn.kernels`.

The usual way (Goto and van de Geijn 2008): the right matrix is packed into panels two vectors wide, the left one read in tiles of
six rows (or packed into panels of six columns when it is transposed), and a tile of sums stays in registers.
"""

from __future__ import annotations

from typing import Any

from robot_rl.nn.simd import VECTOR_BYTES, Emitter, Int, Kernel

BLOCK_ROWS = 96  # rows of the left matrix that stay in cache while the panels of the right one pass
BLOCK_TERMS = 256  # terms of a dot product between two visits to memory
TILE = 6  # 6 x 2 vectors of sums, 2 of the right matrix and 1 of the left one fill the 16 registers of AVX2
EDGE_ELEMENTS = TILE * BLOCK_TERMS + (TILE + 1) * 16  # a tile's left matrix, its result, and one row that stays zero


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


@Kernel
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


def left_panel(e: Emitter, terms: Int) -> Int:
    """Bytes from one packed panel of the left matrix to the next; eight elements of slack, because rows are copied whole."""
    return (terms * TILE + 8) * e.size


@Kernel
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


@Kernel
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
    sums = e.loop(e.integer(0), terms * step, step, [e.integer(0).value, *sums], body)[1:]
    for r in range(TILE):
        e.store(sums[2 * r], out + out_row * r)
        e.store(sums[2 * r + 1], out + out_row * r + VECTOR_BYTES)


@Kernel
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
