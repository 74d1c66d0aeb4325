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
    """The valid start steps of every episode, and a uniform draw over all of them in O(log episodes).

    Per episode the valid steps are one small array; over episodes there is one cumulative count, rebuilt (a vector
    operation) after a change and not per draw. A draw depends on which episodes are in and in which order they came, never on
    the history of evictions, so a buffer rebuilt after a restart draws the same.
    """

    def __init__(self) -> None:
        self._steps: dict[int, np.ndarray] = {}
        self._dirty = True

    def set(self, number: int, steps: np.ndarray) -> None:
        """Replace the valid steps of episode ``number`` (a later episode has a greater number)."""
        self._steps[number] = steps.astype(np.int32)
        self._dirty = True

    def remove(self, number: int) -> None:
        if self._steps.pop(number, None) is not None:
            self._dirty = True

    def _rebuild(self) -> None:
        numbers = sorted(self._steps)
        counts = np.array([len(self._steps[i]) for i in numbers], np.int64)
        self._numbers = np.array(numbers, np.int64)
        self._ends = np.cumsum(counts)
        self._first = self._ends - counts
        self._flat = np.concatenate([self._steps[i] for i in numbers]) if numbers else np.zeros(0, np.int32)
        self._total = int(self._ends[-1]) if numbers else 0
        self._dirty = False

    @property
    def total(self) -> int:
        """How many starts may be drawn."""
        if self._dirty:
            self._rebuild()
        return self._total

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """``size`` uniform starts with replacement: (episode numbers, steps)."""
        chosen = rng.integers(0, self.total, size)
        episode = np.searchsorted(self._ends, chosen, side="right")
        return self._numbers[episode], self._flat[chosen]


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


def effective_shares(ratios: Mapping[Stratum | str, float], available: Mapping[Stratum, int]) -> tuple[float, ...]:
    """Shares in the order of ``STRATA``: the ratios, with an empty stratum's share spread over the others in proportion.

    Raises:
        ValueError: a negative or non-finite ratio, or none above zero.
        EmptyBufferError: every stratum with a ratio above zero is empty.
    """
    given = {Stratum(k): float(v) for k, v in ratios.items()}
    if any(not np.isfinite(v) or v < 0 for v in given.values()) or not any(v > 0 for v in given.values()):
        raise ValueError(f"ratios={ {k.value: v for k, v in given.items()} }: accepted are numbers >= 0, at least one of them above 0")
    shares = tuple(given.get(s, 0.0) if available.get(s, 0) else 0.0 for s in STRATA)
    if not any(shares):
        asked = ", ".join(k.value for k, v in given.items() if v > 0)
        raise EmptyBufferError(f"no valid window in any of the strata asked for ({asked}); starts per stratum: "
                               f"{ {s.value: n for s, n in available.items()} }")  # fmt: skip
    return shares
