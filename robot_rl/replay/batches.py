"""What a draw from the replay buffer looks like: windows for learners of values, chunks for behaviour cloning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(slots=True)
class WindowBatch:
    """B windows of n rows, float32 unless said otherwise; actions are normalised.

    Attributes:
        conditioning: (B, C) at the window's start.
        action: (B, n, A) executed. Rows past the window's end hold the proposed rows where the window starts at a decision
            whose chunk is known, else the last action (zero in delta dimensions).
        mask: (B, n) bool, rows that ran.
        reward: (B,) discounted sum inside the window.
        discount: (B,) factor of the bootstrap value; 0 after the terminal step.
        next_conditioning: (B, C) after the window's last row.
        weight: (B,) 1.0: windows of weight 0 are not drawn. Divide losses by its sum.
        noise: (B, H_w, A_w) of the decision that starts here, zeros where ``is_decision`` is False; ``None`` without noise.
        action_base, next_action_base: (B, n, A) base actions of these rows, and of the n rows from the bootstrap observation
            on (padded like ``action``; of no meaning where ``discount`` is 0); ``None`` when the buffer holds none.
        is_decision: (B,) bool.
        stratum: (B,) uint8, position in ``list(Stratum)``.
        episode_index: (B,) int64 for :meth:`~robot_rl.replay.buffer.ReplayBuffer.episode_id`.
        step: (B,) int64 start step within the episode.
        extra: name to (B, ...) at the window's start.
    """

    conditioning: np.ndarray
    action: np.ndarray
    mask: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    next_conditioning: np.ndarray
    weight: np.ndarray
    noise: np.ndarray | None
    action_base: np.ndarray | None
    next_action_base: np.ndarray | None
    is_decision: np.ndarray
    stratum: np.ndarray
    episode_index: np.ndarray
    step: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reward)


class PrefixRows(NamedTuple):
    """What every beginning of B windows of n rows is worth learning from; j runs from 1 to n.

    reward, discount, weight (B, n) of the first j rows, next_conditioning (B, n, C) after them. Weight 0: they did not all run, a
    reward is missing, or the observation after them is not known.
    """

    reward: np.ndarray
    discount: np.ndarray
    next_conditioning: np.ndarray
    weight: np.ndarray


class ChunkBatch(NamedTuple):
    """For behaviour cloning: conditioning (B, n_obs, C) oldest first, action (B, H, A), mask (B, H) bool."""

    conditioning: np.ndarray
    action: np.ndarray
    mask: np.ndarray
