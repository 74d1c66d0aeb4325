"""Rewards of a running learner: events in, in any order, and the composed rewards into the replay buffer."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.reward_log import RewardTable
from robot_rl.rewards.composition import Composed, ValidShare, channels_of, compose
from robot_rl.rewards.composition_config import CompositionConfig
from robot_rl.types import Episode, RewardEvent

PENDING_EVENTS, PENDING_S = 100_000, 600.0


@dataclass
class ComposerCounts:
    """``orphans``: events dropped because their episode never came."""

    events: int = 0
    orphans: int = 0


@dataclass(frozen=True)
class _Known:
    """What an episode brought with it."""

    length: int
    terminated: bool
    reward: np.ndarray
    success: bool | None


class RewardComposer:
    """Keeps the buffer's rewards what the events say.

    Args:
        config: channels and weights. ``gamma``: the critic's discount, which is also the buffer's.

    Raises:
        ValueError: the buffer discounts otherwise.
    """

    def __init__(
        self, config: CompositionConfig, buffer: ReplayBuffer, gamma: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if abs(buffer.window.gamma - gamma) > 1e-12:
            raise ValueError(f"reward.gamma={gamma}: accepted is the buffer's {buffer.window.gamma}")
        self.config, self.buffer, self.gamma, self._clock = config, buffer, gamma, clock
        self.counts, self.valid = ComposerCounts(), ValidShare(config.min_valid_fraction)
        self._table = RewardTable()
        self._episodes: dict[str, _Known] = {}
        self._pending: OrderedDict[str, tuple[float, list[RewardEvent]]] = OrderedDict()
        self._waiting = 0

    def begin(self, episode: Episode) -> None:
        """An episode was added to the buffer; what was said about it before counts now."""
        episode_id = episode.meta.episode_id
        self._episodes[episode_id] = _Known(
            len(episode), bool(episode.terminated[-1]), np.array(episode.reward, np.float32), episode.meta.success
        )
        _, early = self._pending.pop(episode_id, (0.0, []))
        self._waiting -= len(early)
        for event in early:
            self._table.add(event)
        self.apply(episode_id)

    def add(self, event: RewardEvent) -> bool:
        """Take an event in; gives whether its episode is in the buffer. One that is not waits, for a while."""
        self.counts.events += 1
        if event.episode_id not in self.buffer or event.episode_id not in self._episodes:
            self._wait(event)
            return False
        self._table.add(event)
        self.apply(event.episode_id)
        return True

    def apply(self, episode_id: str) -> Composed:
        """Work out an episode's rewards again and give them to the buffer."""
        e = self._episodes[episode_id]
        events = self._table.active(episode_id)
        channels = channels_of(e.length, events, self.config.channels, recorded=e.reward, success=e.success)
        composed = compose(channels, self.config, self.gamma, e.terminated)
        self.buffer.set_composed(episode_id, composed.reward, length=composed.length, terminated=composed.terminated)
        self.valid.note(episode_id, composed)
        if len(self._episodes) > 2 * len(self.buffer.episode_ids()) + 8:
            self._forget()
        return composed

    def _forget(self) -> None:
        """Evicted episodes."""
        held = set(self.buffer.episode_ids())
        for episode_id in [e for e in self._episodes if e not in held]:
            del self._episodes[episode_id]
            self._table.forget(episode_id)
        self.valid.forget(held)

    def _wait(self, event: RewardEvent) -> None:
        now = self._clock()
        _, events = self._pending.setdefault(event.episode_id, (now, []))
        events.append(event)
        self._waiting += 1
        while self._pending:
            first = next(iter(self._pending))
            since, old = self._pending[first]
            if now - since <= PENDING_S and self._waiting <= PENDING_EVENTS:
                break
            del self._pending[first]
            self._waiting -= len(old)
            self.counts.orphans += len(old)
