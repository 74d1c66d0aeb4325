"""How much a person did, computed from recorded episodes alone (section 4.6)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from robot_rl.types import Episode, Source


@dataclass(frozen=True)
class InterventionMetrics:
    """Of one episode. Shares are of all steps; lengths in steps.

    ``retaken`` counts take-overs within 2 s of a hand-back; ``first_step`` is -1 without a take-over.
    """

    steps: int
    human_share: float
    latched_share: float
    blend_share: float
    hold_share: float
    safety_share: float
    count: int
    mean_length: float
    first_step: int
    retaken: int
    success: bool | None


def measure(episode: Episode) -> InterventionMetrics:
    """Metrics of one episode from its ``source`` and ``intervention_id``."""
    source, ids = episode.source, episode.intervention_id
    length = len(episode)
    share = {s: float((source == s).mean()) if length else 0.0 for s in Source}
    human = np.flatnonzero(source == Source.HUMAN)
    taken = list(dict.fromkeys(ids[human].tolist()))
    spans = [np.flatnonzero((ids == i) & (source == Source.HUMAN)) for i in taken]
    limit = 2.0 * (episode.meta.control_hz or 10.0)
    retaken = sum(int(b[0] - a[-1]) <= limit for a, b in itertools.pairwise(spans))
    return InterventionMetrics(
        steps=length,
        human_share=share[Source.HUMAN],
        latched_share=share[Source.LATCHED],
        blend_share=share[Source.BLEND],
        hold_share=share[Source.HOLD],
        safety_share=share[Source.SAFETY],
        count=len(spans),
        mean_length=float(np.mean([len(s) for s in spans])) if spans else 0.0,
        first_step=int(human[0]) if len(human) else -1,
        retaken=retaken,
        success=episode.meta.success,
    )


class Driven(NamedTuple):
    """Of one episode."""

    steps: int
    human_steps: int


def newest(played: Sequence[Driven], steps: int) -> list[Driven]:
    """The last episodes, as few as have together played ``steps``; all of them where that is fewer."""
    total, first = 0, len(played)
    while first and total < steps:
        first -= 1
        total += played[first].steps
    return list(played[first:])


def intervention_rate(played: Sequence[Driven], steps: int) -> float | None:
    """The share of steps that a person drove, in the :func:`newest` ``steps``; None before there are so many."""
    seen = newest(played, steps)
    total = sum(e.steps for e in seen)
    return sum(e.human_steps for e in seen) / total if total >= steps else None
