"""Rewards for episodes that are already recorded: any source over a store, written beside the episodes (``robot-rl reward label``)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robot_rl.replay.reward_log import LABEL_SOURCE
from robot_rl.replay.store import EpisodeStore
from robot_rl.rewards.composition_config import CLOSE_SUFFIX, CLOSED, CLOSED_PARTLY
from robot_rl.rewards.source import EpisodeTrace, RewardSource, ScoreBatch
from robot_rl.types import Episode, RewardEvent, RewardKind

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


@dataclass
class LabelSummary:
    """What a labelling pass wrote."""

    source: str
    model_id: str
    episodes: int = 0
    skipped: int = 0
    events: int = 0
    valid: int = 0
    invalid: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, object]:
        share = self.valid / self.events if self.events else 1.0
        return {**self.__dict__, "valid_fraction": share}


def trace_of(episode: Episode) -> EpisodeTrace:
    """What a source sees of a recorded episode."""
    stamps = np.asarray(episode.stamp_ns, np.int64)
    period = int(np.median(np.diff(stamps))) if len(stamps) > 1 else int(1e9 / (episode.meta.control_hz or 10.0))
    return EpisodeTrace(
        episode.meta.episode_id, episode.observations, np.append(stamps, stamps[-1] + max(period, 0)), episode.meta.task
    )


def score_safely(source: RewardSource, trace: EpisodeTrace) -> ScoreBatch:
    """A source that raises gives invalid answers and stops nothing."""
    try:
        return source.score_episode(trace)
    except Exception as error:  # whatever a source does, the others and the episodes to come go on
        logger.error("%s: episode %s: %s: %s", source.name, trace.episode_id, type(error).__name__, error)
        first = 0 if source.kind is RewardKind.POTENTIAL else 1
        return ScoreBatch.failed(np.arange(first, trace.length + 1), "error")


def closing(source: str, length: int, scores: ScoreBatch, common: Mapping[str, Any]) -> list[RewardEvent]:
    """The statement that the source has said all it will of an episode; none where it failed wherever it looked.

    Without it nobody can tell a source that has seen no success from one that has not looked yet.
    """
    share = float(np.mean(scores.valid)) if len(scores.valid) else 1.0
    if share == 0:
        return []
    reason = CLOSED if share == 1.0 else CLOSED_PARTLY
    return [RewardEvent(step=length, source=source + CLOSE_SUFFIX, value=float("nan"), valid=False, reason=reason, **common)]


def events_of(
    source: RewardSource, trace: EpisodeTrace, scores: ScoreBatch, latency_ms: float, verdict: bool
) -> list[RewardEvent]:
    """Events of one episode's scores, and the statement that the source has said all it will."""
    info, kind = source.describe(), source.kind
    common: dict[str, Any] = {
        "episode_id": trace.episode_id,
        "model_id": info.model_id,
        "prompt_hash": info.prompt_hash,
        "latency_ms": latency_ms,
    }
    events = []
    for i, step in enumerate(scores.steps.tolist()):
        valid = bool(scores.valid[i])
        reason = "" if valid else (scores.reason[i] if i < len(scores.reason) else "") or "error"
        value = float(scores.value[i]) if valid else float("nan")
        # The last observation has no stamp of its own: nothing was executed from it.
        stamp = int(trace.stamps_ns[step]) if step < trace.length else 0
        events.append(
            RewardEvent(
                step=step, source=source.name, value=value, kind=kind, valid=valid, reason=reason, stamp_ns=stamp, **common
            )
        )
    events += closing(source.name, trace.length, scores, common)
    if verdict and scores.success is not None:
        step = scores.success_step if scores.success and scores.success_step > 0 else trace.length
        events.append(RewardEvent(step=step, source=LABEL_SOURCE, value=float(scores.success), **common))
    return events


def read_episodes(store: EpisodeStore, source: RewardSource, episodes: Sequence[str] | None = None) -> Iterator[Episode]:
    """The episodes asked for (default: all), with just the features the source needs.

    Raises:
        KeyError: an episode is not in the store. ValueError: the store lacks a feature.
    """
    wants = {n for n in source.needs if n.startswith("observation.")}
    absent = sorted(wants - set(store.observation_features))
    if absent:
        raise ValueError(
            f"source={source.name!r} reads {', '.join(absent)}; the store has {', '.join(sorted(store.observation_features))}"
        )
    for episode_id in store.episode_ids() if episodes is None else episodes:
        yield store.read(episode_id, sorted(wants))


def label_store(
    store: EpisodeStore,
    source: RewardSource,
    *,
    episodes: Sequence[str] | None = None,
    again: bool = False,
    verdict: bool = False,
    progress: Progress | None = None,
) -> LabelSummary:
    """Score episodes and append the events to the store's log.

    Episodes this very model has labelled completely are skipped unless ``again``; so an interrupted pass goes on where it was.
    Newer events replace older ones of the same source by the log's own rule; nothing is deleted.

    Args:
        verdict: also record the source's judgement of success as the episode's.
    """
    info, began = source.describe(), time.monotonic()
    summary, reasons = LabelSummary(source.name, info.model_id), Counter[str]()
    wanted = store.episode_ids() if episodes is None else list(episodes)
    for done, episode_id in enumerate(wanted):
        if progress is not None:
            progress(done, len(wanted))
        if not again and _labelled(store, episode_id, source.name, info.model_id):
            summary.skipped += 1
            continue
        (episode,) = read_episodes(store, source, [episode_id])
        trace, asked = trace_of(episode), time.monotonic()
        scores = score_safely(source, trace)
        store.append_reward(*events_of(source, trace, scores, (time.monotonic() - asked) * 1e3, verdict))
        summary.episodes += 1
        summary.events += len(scores.steps)
        summary.valid += int(np.sum(scores.valid))
        reasons.update(r or "error" for r, ok in zip(scores.reason, scores.valid, strict=False) if not ok)
    if progress is not None:
        progress(len(wanted), len(wanted))
    summary.invalid, summary.seconds = dict(reasons), time.monotonic() - began
    return summary


def _labelled(store: EpisodeStore, episode_id: str, source: str, model_id: str) -> bool:
    """Whether this model has closed the episode with every answer valid."""
    return any(
        e.source == source + CLOSE_SUFFIX and e.model_id == model_id and e.reason == CLOSED for e in store.rewards(episode_id)
    )
