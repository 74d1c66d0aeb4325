"""How late a person's feedback comes, measured against something of which it is known when it happened (specification 2.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from robot_rl.replay.store import EpisodeStore
from robot_rl.types import Episode

MOST = 12
_PLACE = re.compile(r"(?P<name>observation\.[\w.]+|action)\[(?P<index>\d+)\]")


@dataclass(frozen=True)
class Delay:
    """Attributes:
    steps: by how many control steps feedback lags the signal; ``seconds`` likewise.
    correlation: with the signal at that shift; ``correlations``: at 0, 1, 2 ... steps.
    readings: how many readings it rests on.
    """

    steps: int
    seconds: float
    correlation: float
    correlations: tuple[float, ...]
    readings: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def correlations(signals: Sequence[np.ndarray], feedback: Sequence[np.ndarray], most: int = MOST) -> np.ndarray:
    """(most + 1,) correlation of feedback with the signal so many steps before, over all clips together; NaN where either is constant.

    Args:
        signals, feedback: one (T,) row a clip; NaN in the feedback where the person said nothing.
    """
    out = np.full(most + 1, np.nan)
    for k in range(most + 1):
        pairs = [(u[: len(u) - k], h[k:]) for u, h in zip(signals, feedback, strict=True) if len(u) > k]
        if not pairs:
            break
        u, h = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
        known = np.isfinite(h) & np.isfinite(u)
        if known.sum() >= 3 and u[known].std() > 0 and h[known].std() > 0:
            out[k] = np.corrcoef(u[known], h[known])[0, 1]
    return out


def estimate_delay(
    signals: Sequence[np.ndarray], feedback: Sequence[np.ndarray], control_hz: float = 10.0, most: int = MOST
) -> Delay:
    """The shift at which feedback and signal correlate best.

    Raises:
        ValueError: feedback or signal never changes while it is known.
    """
    found = correlations(signals, feedback, most)
    if not np.isfinite(found).any():
        raise ValueError("feedback never changes while it is known: accepted is feedback that follows the signal")
    at = int(np.nanargmax(found))
    readings = int(sum(np.isfinite(h).sum() for h in feedback))
    return Delay(at, at / control_hz, float(found[at]), tuple(found.tolist()), readings)


def read_signal(store: EpisodeStore, episode: Episode, signal: str) -> np.ndarray:
    """(T + 1,) a known signal at every observation of an episode.

    Args:
        signal: a number of a feature, such as ``observation.state[8]`` or ``action[4]``, or the name of a source in the reward log.

    Raises:
        ValueError: the episode has no such thing.
    """
    found = _PLACE.fullmatch(signal)
    if found is None:
        return recorded_readings(store, episode, signal)
    name, index = found["name"], int(found["index"])
    rows = np.asarray(episode.action) if name == "action" else episode.observations.get(name)
    if rows is None or np.ndim(rows) != 2:
        raise ValueError(
            f"signal={signal!r}: episode {episode.meta.episode_id} has rows of action, {', '.join(sorted(episode.observations))}"
        )
    if index >= np.shape(rows)[1]:
        raise ValueError(f"signal={signal!r}: accepted are 0 to {np.shape(rows)[1] - 1}, {name} has so many numbers")
    column = np.asarray(rows, np.float64)[:, index]
    return np.append(column, column[-1]) if len(column) == len(episode) else column


def recorded_readings(store: EpisodeStore, episode: Episode, source: str, moved: int = 0) -> np.ndarray:
    """(T + 1,) what a source said at every observation, NaN where nothing.

    Args:
        moved: the readings were recorded so many steps back (``delay_steps`` of the human source then); they are moved forward again.

    Raises:
        ValueError: the source said nothing about this episode.
    """
    out = np.full(len(episode) + 1, np.nan)
    events = [e for e in store.rewards(episode.meta.episode_id) if e.source == source and e.valid]
    for event in events:
        if 0 <= event.step + moved < len(out):
            out[event.step + moved] = event.value
    if not np.isfinite(out).any():
        said = sorted({e.source for e in store.rewards(episode.meta.episode_id)})
        raise ValueError(
            f"{source!r} said nothing about episode {episode.meta.episode_id}; accepted are {', '.join(said) or 'none'}"
        )
    return out
