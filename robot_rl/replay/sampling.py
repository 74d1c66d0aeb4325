"""Choosing what to sample: start indices that are kept up to date, and sub-batch-proof mixing of strata."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from robot_rl.types import Stratum

STRATA: tuple[Stratum, ...] = tuple(Stratum)
CODE: dict[Stratum, int] = {s: i for i, s in enumerate(STRATA)}
"""Stratum to the uint8 that batches carry."""


class EmptyBufferError(LookupError):
    """Nothing that may be sampled is in the buffer (yet)."""


class StartIndex:
    """Which episodes hold how many valid starts, and a uniform draw over all of them in O(log episodes).

    Episodes are kept by number (a later one has a greater number), with the place of their start steps in a shared array.
    After a change one cumulative sum over episodes is renewed, not per draw. A draw depends on which episodes are in and in
    which order they came, never on evictions in between, so a buffer rebuilt after a restart draws the same.
    """

    def __init__(self) -> None:
        self._table = np.zeros((16, 4), np.int64)  # number, offset of its steps, first row in the ring, count
        self._size = 0
        self._ends: np.ndarray | None = np.zeros(0, np.int64)

    def _find(self, number: int) -> tuple[int, bool]:
        at = int(np.searchsorted(self._table[: self._size, 0], number))
        return at, at < self._size and self._table[at, 0] == number

    def set(self, number: int, offset: int, base: int, count: int) -> None:
        at, known = self._find(number)
        if not known:
            if self._size == len(self._table):
                self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._table[at + 1 : self._size + 1] = self._table[at : self._size]
            self._size += 1
        self._table[at] = number, offset, base, count
        self._ends = None

    def remove(self, number: int) -> None:
        at, known = self._find(number)
        if known:
            self._table[at : self._size - 1] = self._table[at + 1 : self._size]
            self._size -= 1
            self._ends = None

    def shift(self, number: int, by: int) -> None:
        """The episode moved by ``by`` rows."""
        at, known = self._find(number)
        if known:
            self._table[at, 1:3] += by

    def _cumulative(self) -> np.ndarray:
        if self._ends is None:
            self._ends = np.cumsum(self._table[: self._size, 3])
        return self._ends

    @property
    def total(self) -> int:
        """How many starts may be drawn."""
        ends = self._cumulative()
        return int(ends[-1]) if len(ends) else 0

    def draw(self, size: int, rng: np.random.Generator, steps: np.ndarray | None) -> np.ndarray:
        """(3, size) episode number, first row and step of uniform starts, with replacement; ``steps=None``: all."""
        ends = self._cumulative()
        chosen = rng.integers(0, int(ends[-1]), size)
        at = np.searchsorted(ends, chosen, side="right")
        within = chosen - (ends[at] - self._table[at, 3])
        out = np.empty((3, size), np.int64)
        out[0], out[1] = self._table[at, 0], self._table[at, 2]
        out[2] = within if steps is None else steps[self._table[at, 1] + within]
        return out


class StartGroup:
    """Starts for one way of sampling: over everything, and per stratum in fixed ratios."""

    def __init__(self, rows: int, *, every_step: bool = False):
        # The second half holds starts that an episode lends to another stratum (interventions in online episodes).
        self._rows = rows
        self._steps = None if every_step else np.zeros(2 * rows, np.int32)
        self.all = StartIndex()
        self.strata = {s: StartIndex() for s in STRATA}

    def set(self, number: int, base: int, stratum: Stratum, steps: np.ndarray | int, *, lent: bool = False) -> None:
        """Valid start steps of an episode (or, where every step counts, how many it has)."""
        offset = base + self._rows if lent else base
        count = int(steps) if self._steps is None else len(np.atleast_1d(steps))
        if self._steps is not None:
            self._steps[offset : offset + count] = steps
        self.strata[stratum].set(number, offset, base, count)
        if not lent:
            self.all.set(number, offset, base, count)

    def remove(self, number: int) -> None:
        for index in (self.all, *self.strata.values()):
            index.remove(number)

    def move(self, number: int, old: int, new: int, size: int) -> None:
        """The episode's ``size`` rows moved from ``old`` to ``new``."""
        if self._steps is not None:
            for half in (0, self._rows):
                self._steps[half + new : half + new + size] = self._steps[half + old : half + old + size].copy()
        for index in (self.all, *self.strata.values()):
            index.shift(number, new - old)

    def available(self) -> dict[Stratum, int]:
        return {s: index.total for s, index in self.strata.items()}

    def draw(
        self, size: int, rng: np.random.Generator, ratios: Mapping[Stratum | str, float] | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(3, size) number, first row, step; and the (size,) stratum code each row was drawn for (``None`` without ratios)."""
        if ratios is None:
            if not self.all.total:
                raise EmptyBufferError("nothing in the buffer may be sampled yet: no episode holds a valid window")
            return self.all.draw(size, rng, self._steps), None
        shares = effective_shares(ratios, self.available())
        pattern, places = _places(size, shares)
        out = np.empty((3, size), np.int64)
        for code, where in places:
            out[:, where] = self.strata[STRATA[code]].draw(len(where), rng, self._steps)
        return out, pattern


@lru_cache(maxsize=256)
def interleave(batch_size: int, shares: tuple[float, ...]) -> np.ndarray:
    """(batch_size,) index of a share per row, so spread that every slice keeps the shares to within one row.

    Row by row the share that lags most behind is served (ties: the first), as a line is drawn on pixels.
    """
    weights = np.asarray(shares, np.float64) / np.sum(shares)
    served = np.zeros(len(weights))
    out = np.empty(batch_size, np.int64)
    for i in range(batch_size):
        pick = int(np.argmax(weights * (i + 1) - served + np.where(weights > 0, 0.0, -np.inf)))
        served[pick] += 1
        out[i] = pick
    out.flags.writeable = False
    return out


@lru_cache(maxsize=256)
def _places(batch_size: int, shares: tuple[float, ...]) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    pattern = interleave(batch_size, shares)
    found = [(code, np.flatnonzero(pattern == code)) for code in range(len(shares))]
    return pattern.astype(np.uint8), [(code, where) for code, where in found if len(where)]


def effective_shares(ratios: Mapping[Stratum | str, float], available: Mapping[Stratum, int]) -> tuple[float, ...]:
    """Shares in the order of ``STRATA``: the ratios, with an empty stratum's share spread over the others in proportion.

    Raises:
        ValueError: a negative or non-finite ratio, or none above zero.
        EmptyBufferError: every stratum with a ratio above zero is empty.
    """
    given = {Stratum(k): float(v) for k, v in ratios.items()}
    if any(not np.isfinite(v) or v < 0 for v in given.values()) or not any(v > 0 for v in given.values()):
        raise ValueError(
            f"ratios={ {k.value: v for k, v in given.items()} }: accepted are numbers >= 0, at least one of them above 0"
        )
    shares = tuple(given.get(s, 0.0) if available.get(s, 0) else 0.0 for s in STRATA)
    if not any(shares):
        asked = ", ".join(k.value for k, v in given.items() if v > 0)
        raise EmptyBufferError(f"no valid window in any of the strata asked for ({asked}); starts per stratum: "
                               f"{ {s.value: n for s, n in available.items()} }")  # fmt: skip
    return shares
