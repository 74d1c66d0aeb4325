"""SMDP windows over one episode: the plain rule, and the same rule for every start at once.

The rule is the algorithms specification 0.2: rewards discount per environment step, a window that reaches the terminal step
is exact, one cut short by truncation is dropped, and a robot told to stand still (``hold``) teaches nothing. :func:`window`
is written to be read; :func:`window_table` is what the buffer uses, and tests hold one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robot_rl.types import Episode, Source

STRIDES = ("any", "decision")
DISCOUNT_MODES = ("per_step", "per_chunk_sum")


@dataclass(frozen=True)
class WindowConfig:
    """How windows are cut.

    Attributes:
        n: rows of a window; a window of m <= n rows bootstraps from the observation m steps later.
        gamma: discount per environment step, in (0, 1].
        stride: ``any`` start, or ``decision`` starts only. Decision windows hold rows of one decision that the policy itself
            executed (what a learner of latent noise may use).
        discount_mode: ``per_step`` is exact. ``per_chunk_sum`` sums rewards undiscounted and discounts once per window, as
            published latent-noise systems do; for reproduction only.
    """

    n: int
    gamma: float
    stride: str = "any"
    discount_mode: str = "per_step"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"WindowConfig.n={self.n}: accepted are integers >= 1")
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"WindowConfig.gamma={self.gamma}: accepted are 0 < gamma <= 1")
        if self.stride not in STRIDES:
            raise ValueError(f"WindowConfig.stride={self.stride!r}: accepted are {', '.join(STRIDES)}")
        if self.discount_mode not in DISCOUNT_MODES:
            raise ValueError(f"WindowConfig.discount_mode={self.discount_mode!r}: accepted are {', '.join(DISCOUNT_MODES)}")


@dataclass(frozen=True)
class EpisodeArrays:
    """What the window rule reads of an episode of L steps.

    Attributes:
        action: (L, A) executed.
        reward: (L,) NaN where unknown.
        source: (L,) :class:`Source`.
        terminated: the last step ended the MDP (truncation is everything else).
        delta_mask: (A,) bool, dimensions padded with zero; the others hold their last value.
        final_known: the observation after the last step was really seen. It was not when the tail was recovered after a
            crash; a window that would bootstrap from it is dropped.
        decision_id: (L,) int, rows of one decision share it; -1 where no chunk ran.
        starts: (L,) bool, steps that are the first executed row of a decision made from that step's observation.
        chunk: (D, H, A) proposed chunks, or ``None``; they pad windows that begin at a decision.
        ends: (L,) bool or ``None``, steps that end the MDP in the middle of the recording (being taken over from, where that is all that
            is learned from). A window that reaches one stops there and bootstraps from nothing, as at the terminal step.
    """

    action: np.ndarray
    reward: np.ndarray
    source: np.ndarray
    terminated: bool
    delta_mask: np.ndarray
    final_known: bool = True
    decision_id: np.ndarray | None = None
    starts: np.ndarray | None = None
    chunk: np.ndarray | None = None
    ends: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.action)


@dataclass(frozen=True)
class Window:
    """One window: ``action`` (n, A), ``mask`` (n,) bool, and scalars. Bootstrap from observation ``next_step``."""

    step: int
    action: np.ndarray
    mask: np.ndarray
    reward: float
    discount: float
    next_step: int
    weight: float


def window(episode: EpisodeArrays, t: int, n: int, gamma: float, discount_mode: str = "per_step") -> Window:
    """The window of ``n`` rows from step ``t``, straight from the specification (slow; the reference)."""
    length = len(episode)
    m = min(n, length - t)
    ended = [i for i in range(m) if episode.ends is not None and episode.ends[t + i]]
    m = ended[0] + 1 if ended else m
    per_step = discount_mode == "per_step"
    reward = sum((gamma**i if per_step else 1.0) * float(episode.reward[t + i]) for i in range(m))
    terminal = bool(ended) or (bool(episode.terminated) and t + m == length)
    action = np.zeros((n, episode.action.shape[1]), np.float32)
    for i in range(n):
        if i < m:
            action[i] = episode.action[t + i]
            continue
        action[i] = np.where(episode.delta_mask, 0.0, action[m - 1])
        if episode.chunk is not None and episode.starts is not None and episode.starts[t]:
            assert episode.decision_id is not None
            proposed = episode.chunk[episode.decision_id[t]]
            if i < len(proposed):
                action[i] = proposed[i]
    discount = (gamma**m if per_step else gamma) * (0.0 if terminal else 1.0)
    weight = 1.0 if m == n or terminal else 0.0
    if any(episode.source[t + i] == Source.HOLD for i in range(m)):
        weight = 0.0
    if not np.isfinite(reward):
        weight = 0.0
    if t + m == length and not terminal and not episode.final_known:
        weight = 0.0
    return Window(t, action, np.arange(n) < m, reward, discount, t + m, weight)


def decision_window_ok(episode: EpisodeArrays, t: int, n: int) -> bool:
    """Whether the window from ``t`` is one decision's, executed by the policy alone (slow; the reference)."""
    assert episode.starts is not None
    assert episode.decision_id is not None
    rows = range(t, window(episode, t, n, 1.0).next_step)
    same = all(episode.decision_id[i] == episode.decision_id[t] for i in rows)
    return bool(episode.starts[t]) and same and all(episode.source[i] == Source.POLICY for i in rows)


@dataclass(frozen=True)
class WindowTable:
    """:func:`window` for every start of an episode, without the actions; arrays of length L.

    ``rows`` int32 (m), ``reward`` and ``discount`` float32, ``valid`` bool (weight 1, and fit for the stride).
    """

    rows: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    valid: np.ndarray


def window_table(episode: EpisodeArrays, config: WindowConfig) -> WindowTable:
    """Every start at once: O(n) vector operations."""
    length, n = len(episode), config.n
    t = np.arange(length)
    ends = np.zeros(length, bool) if episode.ends is None else episode.ends
    following = np.minimum.accumulate(np.where(ends, t + 1, length)[::-1])[::-1]  # where what begins at a step is over
    rows = np.minimum(n, following - t)
    per_step = config.discount_mode == "per_step"
    total = np.zeros(length)
    reward = np.asarray(episode.reward, np.float64)
    for i in range(min(n, length)):
        inside = rows[: length - i] > i
        total[: length - i] += np.where(inside, (config.gamma**i if per_step else 1.0) * reward[i:], 0.0)
    terminal = ends[t + rows - 1] | ((t + rows == length) & bool(episode.terminated))
    discount = np.where(terminal, 0.0, np.power(config.gamma, rows) if per_step else config.gamma)
    valid = ((rows == n) | terminal) & np.isfinite(total)
    valid &= _count(episode.source == Source.HOLD, t, rows) == 0
    if not episode.final_known:
        valid &= (t + rows < length) | terminal
    if config.stride == "decision":
        if episode.starts is None or episode.decision_id is None:
            raise ValueError("stride='decision' needs decision_id and starts")
        foreign = _count(episode.source != Source.POLICY, t, rows)
        change = np.zeros(length, bool)
        change[1:] = episode.decision_id[1:] != episode.decision_id[:-1]
        changes = _count(change, t + 1, rows - 1)
        valid &= episode.starts & (foreign == 0) & (changes == 0)
    return WindowTable(rows.astype(np.int32), total.astype(np.float32), discount.astype(np.float32), valid)


def _count(flags: np.ndarray, first: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How many flags are set in [first, first + rows) for every start."""
    total = np.concatenate([[0], np.cumsum(flags)])
    return total[first + rows] - total[first]


def decision_starts(episode: Episode) -> np.ndarray:
    """(L,) bool: steps where a decision made from this very observation begins to be executed at its first row."""
    starts = (episode.chunk_row == 0) & (episode.decision_id >= 0)
    if episode.decisions:
        steps = np.array([d.step for d in episode.decisions])
        chosen = np.clip(episode.decision_id, 0, len(steps) - 1)
        starts &= (steps[chosen] == np.arange(len(episode))) & (episode.decision_id < len(steps))
    return starts


def final_observation_known(episode: Episode) -> bool:
    """False when the observation after the last step is a stand-in (recovered tails, recordings that lack it)."""
    return not episode.meta.recovered and episode.meta.extra.get("final_observation") != "repeated"
