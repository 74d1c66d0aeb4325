"""Rewards of recorded episodes worked out once and written down (``robot-rl reward apply``), for learning without a robot.

A learner that runs composes rewards from events as they come. Offline nothing comes any more: the episodes are copied into another
store whose ``next.reward`` is the composed one, and whatever learns from episodes (IQL, weighted cloning, another program through an
export) needs to know nothing of sources, channels and potentials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from robot_rl.replay.store import EpisodeStore
from robot_rl.rewards.composition import Composed, channels_of, compose
from robot_rl.rewards.composition_config import CompositionConfig
from robot_rl.rewards.gate import admit
from robot_rl.types import Episode


@dataclass
class ApplySummary:
    """What was written. ``unknown``: transitions whose reward nobody knows (NaN, never learned from); ``cut``: those after a success,
    left out; ``skipped``: episodes about whose rewards nothing at all is known."""

    episodes: int = 0
    transitions: int = 0
    unknown: int = 0
    cut: int = 0
    skipped: int = 0
    successes: int = 0
    mean_return: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rewarded(episode: Episode, composed: Composed) -> Episode:
    """The episode with composed rewards, up to where its MDP ends."""
    end = composed.length
    last = np.arange(end) == end - 1
    arrays: dict[str, Any] = {name: np.array(getattr(episode, name)[:end]) for name in Episode.STEP_ARRAYS}
    arrays["reward"] = np.array(composed.reward[:end], np.float32)
    arrays["terminated"] = last & composed.terminated
    arrays["truncated"] = last & (not composed.terminated)
    observations = {name: rows[: end + 1] for name, rows in episode.observations.items()}
    return replace(episode, observations=observations, decisions=[d for d in episode.decisions if d.step < end], **arrays)


def apply_rewards(
    store: EpisodeStore,
    out: EpisodeStore,
    config: CompositionConfig,
    gamma: float,
    *,
    episodes: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ApplySummary:
    """Copy episodes into ``out`` with the rewards that the log's events compose to.

    Args:
        gamma: the discount of whoever learns: potentials are worth ``gamma * after - before``.

    Raises:
        UncalibratedReward: a channel of weight has no report that speaks for it (``config.accept_uncalibrated`` allows it).
        ValueError: no channels, or a discount that is none.
    """
    if not config.channels:
        raise ValueError("reward.channels is empty: accepted is at least one channel")
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma={gamma}: accepted are numbers above 0 and up to 1")
    config, summary, total = admit(config), ApplySummary(), 0.0
    names = store.episode_ids() if episodes is None else list(episodes)
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names))
        episode = store.read(name)
        channels = channels_of(
            len(episode),
            store.rewards(name),
            config.channels,
            recorded=np.asarray(episode.reward),
            success=episode.meta.success,
        )
        composed = compose(channels, config, gamma, bool(episode.terminated[-1]))
        reward = composed.reward[: composed.length]
        if not np.isfinite(reward).any():
            summary.skipped += 1
            continue
        out.add(rewarded(episode, composed))
        summary.episodes += 1
        summary.transitions += composed.length
        summary.unknown += int(np.isnan(reward).sum())
        summary.cut += len(episode) - composed.length
        summary.successes += composed.terminated
        total += float(np.nansum(reward))
    if progress is not None:
        progress(len(names), len(names))
    summary.mean_return = total / max(summary.episodes, 1)
    return summary
