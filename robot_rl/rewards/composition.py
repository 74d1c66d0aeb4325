"""From reward events of many sources to the one number a learner trains on (rewards specification 1.2 to 1.5).

Channels stay apart until a reward is asked for, so weights can change without labelling anything again. Which events count
never depends on when they came: an episode's rewards are a function of the set of events about it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from robot_rl.replay.reward_log import LABEL_SOURCE
from robot_rl.rewards.composition_config import CLOSE_SUFFIX, CLOSED, CLOSED_PARTLY, RECORDED, ChannelConfig, CompositionConfig
from robot_rl.types import RewardEvent, RewardKind


@dataclass(frozen=True)
class Channels:
    """Every channel of one episode of T transitions.

    Attributes:
        value: (T + 1, C) by observation, NaN where unknown. ``model``: (T + 1, C) small numbers, equal for equal models.
        closed: (C,) the last observation about which a source has said all it will; -1 for none.
    """

    value: np.ndarray
    model: np.ndarray
    closed: np.ndarray


def channels_of(
    length: int,
    events: Iterable[RewardEvent],
    config: Sequence[ChannelConfig],
    *,
    recorded: np.ndarray | None = None,
    success: bool | None = None,
) -> Channels:
    """The matrix from the active events of one episode (:meth:`RewardTable.active`); order does not matter.

    Args:
        recorded: (L,) rewards the episode was recorded with, for the channel ``recorded``.
        success: the episode's own word, where no ``label`` event says otherwise.

    A verdict (``label``) speaks for success channels that have not spoken themselves: a demonstration needs no classifier.
    """
    column = {c.source: i for i, c in enumerate(config)}
    value = np.full((length + 1, len(config)), np.nan)
    model = np.zeros((length + 1, len(config)), np.int64)
    closed = np.full(len(config), -1)
    models: dict[str, int] = {}
    labels: list[RewardEvent] = []
    for event in events:
        if event.source.endswith(CLOSE_SUFFIX) and event.reason in (CLOSED, CLOSED_PARTLY):
            i = column.get(event.source.removesuffix(CLOSE_SUFFIX))
            if i is not None and not (config[i].model_id and event.model_id != config[i].model_id):
                closed[i] = max(closed[i], min(event.step, length))
            continue
        if not event.valid or event.step > length:
            continue
        if event.source == LABEL_SOURCE:
            labels.append(event)
        i = column.get(event.source)
        if i is None or (event.step == 0 and config[i].kind is not RewardKind.POTENTIAL):
            continue
        if config[i].model_id and event.model_id != config[i].model_id:
            continue
        value[event.step, i] = event.value
        model[event.step, i] = models.setdefault(event.model_id, len(models) + 1)
    if RECORDED in column and recorded is not None:
        value[1:, column[RECORDED]] = recorded
    last = max(labels, key=lambda e: e.event_id, default=None)
    if last is not None or success is not None:
        good, at = (last.value > 0.5, last.step) if last is not None else (bool(success), length)
        for i, channel in enumerate(config):
            if channel.kind is RewardKind.SUCCESS and closed[i] < length and not np.isfinite(value[:, i]).any():
                value[at if good and at > 0 else length, i] = float(good)
    return Channels(value, model, closed)


@dataclass(frozen=True)
class Composed:
    """Rewards (T,) NaN where masked, how many of the transitions may be learned from, and whether the last of those ends the MDP."""

    reward: np.ndarray
    length: int
    terminated: bool


def compose(channels: Channels, config: CompositionConfig, gamma: float, terminated: bool) -> Composed:
    """Rewards of every transition.

    ``gamma`` is the critic's own discount per step: with any other, shaping would change what is best.
    """
    count = len(channels.value) - 1
    end, success_at = count, _success(channels, config)
    if config.success_terminates and success_at > 0:
        end, terminated = success_at, True
    total = np.zeros(count)
    for i, channel in enumerate(config.channels):
        if channel.weight == 0:
            continue
        if channel.kind is RewardKind.POTENTIAL:
            phi = potentials(channels, i, channel, end, terminated, config)
            total += channel.weight * shaping(phi, channels.model[:, i], channel, gamma)
        else:
            total += channel.weight * _terms(channels, i, channel)
    return Composed(total.astype(np.float32), end, terminated)


def _success(channels: Channels, config: CompositionConfig) -> int:
    """The first observation at which a weighted success channel says success; -1 for none."""
    columns = [i for i, c in enumerate(config.channels) if c.kind is RewardKind.SUCCESS and c.weight]
    hits = np.flatnonzero((channels.value[:, columns] > 0.5).any(1)) if columns else np.zeros(0, int)
    return int(hits[0]) if len(hits) else -1


def _terms(channels: Channels, i: int, channel: ChannelConfig) -> np.ndarray:
    """(T,) values of a non-potential channel, at the transition that reached each observation."""
    value = channels.value[1:, i].copy()
    if channel.kind in (RewardKind.SUCCESS, RewardKind.PENALTY):
        # These speak when something happens: once the source is done with an episode, silence means nothing did.
        done = int(channels.closed[i])
        if channel.kind is RewardKind.SUCCESS and np.isfinite(value).any():
            done = len(value)
        quiet = np.isnan(value) & (np.arange(1, len(value) + 1) <= done)
        value[quiet] = 0.0
    else:
        value = channel.scale * value + channel.shift
    return np.nan_to_num(value, nan=0.0) if channel.rule == "zero" else value


def potentials(
    channels: Channels, i: int, channel: ChannelConfig, end: int, terminated: bool, config: CompositionConfig
) -> np.ndarray:
    """(T + 1,) potential of every observation; 0 at a terminal one unless it is to be kept."""
    phi = channels.value[:, i].copy()
    if channel.rule == "hold":
        known = np.flatnonzero(np.isfinite(phi))
        if len(known):
            phi = phi[known[np.maximum(np.searchsorted(known, np.arange(len(phi)), side="right") - 1, 0)]]
    if terminated and config.terminal_phi == "zero":
        phi[end] = 0.0
    return phi


def shaping(phi: np.ndarray, model: np.ndarray, channel: ChannelConfig, gamma: float) -> np.ndarray:
    """(T,) gamma * Phi(o') - Phi(o). A pair of two models' values is no pair: their scales differ."""
    term = gamma * phi[1:] - phi[:-1]
    mixed = (model[1:] != model[:-1]) & (model[1:] > 0) & (model[:-1] > 0)
    term[mixed] = np.nan
    return np.nan_to_num(term, nan=0.0) if channel.rule in ("neutral", "hold") else term


def chunk_reward(
    channels: Channels, config: CompositionConfig, gamma: float, terminated: bool, start: int, steps: int
) -> float:
    """Discounted reward of a window of transitions; of potentials only the two ends need to be known. NaN where masked."""
    plain = CompositionConfig(
        tuple(c for c in config.channels if c.kind is not RewardKind.POTENTIAL), config.terminal_phi, config.success_terminates
    )
    kept = [i for i, c in enumerate(config.channels) if c.kind is not RewardKind.POTENTIAL]
    rest = Channels(channels.value[:, kept], channels.model[:, kept], channels.closed[kept])
    done = compose(rest, plain, gamma, terminated)
    end, over = done.length, done.terminated
    steps = min(steps, end - start)
    total = float(sum(gamma**k * done.reward[start + k] for k in range(steps)))
    for i, channel in enumerate(config.channels):
        if channel.kind is RewardKind.POTENTIAL and channel.weight:
            phi = potentials(channels, i, channel, end, over, config)
            a, b = phi[start], phi[start + steps]
            models = {int(m) for m in channels.model[[start, start + steps], i]} - {0}
            term = gamma**steps * b - a if len(models) <= 1 else np.nan
            total += channel.weight * (0.0 if np.isnan(term) and channel.rule in ("neutral", "hold") else term)
    return total


@dataclass
class ValidShare:
    """How much of the recent data has a known reward; a learner that falls below the bar pauses, collection goes on."""

    bar: float
    recent: int = 5000
    _known: dict[str, tuple[int, int]] = field(default_factory=dict)

    def note(self, episode_id: str, composed: Composed) -> None:
        self._known.pop(episode_id, None)
        self._known[episode_id] = (int(np.isfinite(composed.reward[: composed.length]).sum()), composed.length)
        while len(self._known) > 1 and sum(n for _, n in self._known.values()) > self.recent + self._known[episode_id][1]:
            self._known.pop(next(iter(self._known)))

    def forget(self, kept: Collection[str]) -> None:
        for episode_id in [e for e in self._known if e not in kept]:
            del self._known[episode_id]

    @property
    def share(self) -> float:
        total = sum(n for _, n in self._known.values())
        return sum(k for k, _ in self._known.values()) / total if total else 1.0

    @property
    def enough(self) -> bool:
        return self.share >= self.bar
