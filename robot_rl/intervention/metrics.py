"""How much a person did, computed from recorded episodes alone (section 4.6)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robot_rl.replay.store import EpisodeStore
from robot_rl.types import Episode, Source, Stratum


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


def of_store(path: str | Path, window: int = 1000) -> dict[str, Any]:
    """What a person did in a store's episodes, demonstrations left out, in the order of their recording.

    ``share`` of steps by who acted; ``takeovers``: how many, their mean length and the median of an episode's first one in steps, and
    how many came within 2 s of a hand-back; success with and without a take-over; ``curve``: the share that the person drove of every
    ``window`` steps, which is the learning curve of a session with a person beside it.

    Raises:
        ValueError: ``window`` is below 1.
    """
    if window < 1:
        raise ValueError(f"window={window}: accepted are integers >= 1")
    found: list[InterventionMetrics] = []
    with EpisodeStore.open(path, mode="r") as store:
        for name in store.episode_ids():
            if Stratum(store.meta(name).stratum) is not Stratum.DEMONSTRATION:
                found.append(measure(store.read(name, keys=())))
    steps = np.array([m.steps for m in found], np.int64)
    total = max(1, int(steps.sum()))

    def share(name: str) -> float:
        return float(np.dot([getattr(m, f"{name}_share") for m in found], steps)) / total

    def success(helped: bool) -> dict[str, int]:
        known = [m.success for m in found if m.success is not None and (m.count > 0) == helped]
        return {"successes": sum(known), "n": len(known)}

    human = np.array([m.human_share for m in found]) * steps
    piece = (np.cumsum(steps) - 1) // window
    curve = [float(human[piece == p].sum() / steps[piece == p].sum()) for p in np.unique(piece)]
    lengths = [m.mean_length * m.count for m in found]
    first = [m.first_step for m in found if m.first_step >= 0]
    count = sum(m.count for m in found)
    return {
        "episodes": len(found), "steps": int(steps.sum()),
        "share": {name: share(name) for name in ("human", "latched", "blend", "hold", "safety")},
        "takeovers": {
            "count": count, "mean_length": sum(lengths) / count if count else 0.0,
            "median_first_step": float(np.median(first)) if first else None, "retaken": sum(m.retaken for m in found),
        },
        "success": {"helped": success(True), "alone": success(False)},
        "window": window, "curve": curve,
    }  # fmt: skip
