"""What people said on the operator's page about pairs of recorded segments, and how it becomes the pairs a reward is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robot_rl.rewards.lines import read_lines
from robot_rl.types import Episode

if TYPE_CHECKING:  # it imports torch, which the page's server does without
    from robot_rl.rewards.preference_model import Pairs

FRAMES = 8  # of each segment: rewards are summed over these


@dataclass(frozen=True)
class Segment:
    """Steps ``start`` to ``stop`` (exclusive) of an episode."""

    episode: str
    start: int
    stop: int


@dataclass(frozen=True)
class Pair:
    """Two segments to compare."""

    id: str
    first: Segment
    second: Segment


@dataclass(frozen=True)
class Comparison:
    """A person's choice: ``label`` 0 the first is better, 1 the second, -1 neither."""

    pair: Pair
    label: int
    operator: str
    stamp_ns: int


def read_comparisons(path: str | Path) -> list[Comparison]:
    """``comparisons.jsonl`` of a session; a line that was cut by a crash is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is none of ours.
    """
    return read_lines(path, _comparison, "comparison")


def _comparison(d: Any) -> Comparison:
    pair = Pair(d["pair"]["id"], Segment(**d["pair"]["first"]), Segment(**d["pair"]["second"]))
    return Comparison(pair, int(d["label"]), str(d["operator"]), int(d["stamp_ns"]))


def segment_pairs(
    comparisons: Sequence[Comparison], episodes: Sequence[Episode], cameras: Sequence[str], frames: int = FRAMES
) -> tuple[dict[str, np.ndarray], Pairs]:
    """Frames of every segment, ``frames`` of each evenly over it, and pairs of (P, ``frames``) indices into them.

    Comparisons about episodes that are not given are left out.

    Raises:
        ValueError: none is left.
    """
    from robot_rl.rewards.preference_model import Pairs

    known = {e.meta.episode_id: e for e in episodes}
    kept = [c for c in comparisons if {c.pair.first.episode, c.pair.second.episode} <= set(known)]
    if not kept:
        raise ValueError(f"{len(comparisons)} comparisons, none about the {len(known)} episodes that are read")
    pictures: dict[str, list[np.ndarray]] = {c: [] for c in cameras}
    rows: list[list[np.ndarray]] = [[], []]
    count = 0
    for comparison in kept:
        for side, segment in enumerate((comparison.pair.first, comparison.pair.second)):
            episode = known[segment.episode]
            at = np.linspace(segment.start, min(segment.stop, len(episode)), frames).round().astype(np.int64)
            for camera in cameras:
                pictures[camera].append(np.asarray(episode.observations[camera])[at])
            rows[side].append(np.arange(count, count + frames))
            count += frames
    labels = np.array([c.label for c in kept], np.int64)
    return {c: np.concatenate(v) for c, v in pictures.items()}, Pairs(np.stack(rows[0]), np.stack(rows[1]), labels)
