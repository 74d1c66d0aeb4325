"""Seed ranges and keyed generators: who may use which seed, and noise that depends on the episode alone.

Evaluation seeds fix the start state *and* the policy's noise, so two policies that are evaluated on one seed meet the
same world; they never enter replay (the store refuses them) and never pick a hyper-parameter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SeedRange:
    """Half-open range [first, last) of episode seeds with one use."""

    name: str
    first: int
    last: int

    def __contains__(self, seed: int) -> bool:
        return self.first <= seed < self.last

    def take(self, n: int, offset: int = 0) -> list[int]:
        """The ``n`` seeds from ``offset`` on. Raises ValueError when the range is too small."""
        if self.first + offset + n > self.last:
            raise ValueError(f"{n} {self.name} seeds from offset {offset} asked for; the range holds {self.last - self.first}")
        return list(range(self.first + offset, self.first + offset + n))


TRAINING = SeedRange("training", 0, 1_000_000)
GATE = SeedRange("gate", 1_000_000, 1_010_000)
EVALUATION = SeedRange("evaluation", 2_000_000, 2_001_000)
FINAL = SeedRange("final", 2_001_000, 2_002_000)


def is_held_out(seed: int | None) -> bool:
    """True for seeds whose episodes may never be trained on."""
    return seed is not None and (seed in EVALUATION or seed in FINAL)


def key(*parts: int | str) -> int:
    """A 63-bit seed from any tuple of integers and strings; stable across machines and Python versions."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rng(*parts: int | str) -> np.random.Generator:
    """A numpy generator keyed by ``parts``, e.g. ``rng("noise", run_seed, episode_seed)``."""
    return np.random.default_rng(key(*parts))
