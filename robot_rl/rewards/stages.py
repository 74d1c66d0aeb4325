"""Rewards along the way: keyframes of successes, additive attribution of outcomes, stage by stage progress (2.10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.rewards.learned import Clock, FitBudget, FitReport


@dataclass(frozen=True)
class KeyframeConfig:
    """When a sub-task ends, read from the gripper's opening and the hand's speed.

    Attributes:
        gripper_change: share of the opening's range within ``gripper_s`` that counts as grasping or letting go.
        slow: share of the episode's 95th percentile of speed below which, for ``slow_s``, the hand rests.
        merge_s: keyframes closer than this are one. ``before_s``: frames so long before a keyframe are labelled 1.
    """

    gripper_change: float = 0.3
    gripper_s: float = 0.5
    slow: float = 0.1
    slow_s: float = 0.2
    merge_s: float = 0.3
    before_s: float = 0.5


def keyframes(opening: np.ndarray, position: np.ndarray, hz: float, config: KeyframeConfig | None = None) -> list[int]:
    """Steps at which a sub-task ends (VLA-RL's segmentation).

    Args:
        opening: (T,) gripper opening. ``position``: (T, 3) of the hand, metres.
    """
    config = config or KeyframeConfig()
    count = len(opening)
    span = float(opening.max() - opening.min())
    window = max(1, round(config.gripper_s * hz))
    events: list[int] = []
    if span > 0:
        ahead = np.abs(opening[np.minimum(np.arange(count) + window, count - 1)] - opening) > config.gripper_change * span
        for a, b in _runs(ahead):
            piece = opening[a : min(b + window, count)]
            events.append(a + int(np.argmax(np.abs(np.diff(piece)))) + 1 if len(piece) > 1 else a)
    speed = np.linalg.norm(np.diff(position, axis=0), axis=1) * hz
    rest = np.append(speed < config.slow * np.percentile(speed, 95), True) if len(speed) else np.zeros(count, bool)
    least = max(1, round(config.slow_s * hz))
    moved = False
    for a, b in _runs(rest):
        moved = moved or a > 0
        if moved and b - a >= least:  # the rest before the first motion ends nothing
            events.append(a)
    merged: list[int] = []
    for step in sorted(events):
        if merged and step - merged[-1] < config.merge_s * hz:
            continue
        merged.append(step)
    return merged


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """[first, end) of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def keyframe_labels(count: int, frames: Sequence[int], hz: float, before_s: float = 0.5) -> np.ndarray:
    """(T,) bool: true for so long before each keyframe, what the process-reward classifier learns."""
    labels = np.zeros(count, bool)
    for k in frames:
        labels[max(0, k - round(before_s * hz)) : k + 1] = True
    return labels


class Attribution(nn.Module):
    """(B, T, D) steps and (B, T) mask to each step's contribution (B, T); their sum predicts the outcome (SPA)."""

    def __init__(self, inputs: int, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, steps: Tensor, mask: Tensor) -> Tensor:
        return self.net(steps)[..., 0] * mask

    @torch.inference_mode()
    def contributions(self, steps: np.ndarray) -> np.ndarray:
        """(T,) of one episode (T, D)."""
        x = torch.from_numpy(np.asarray(steps, np.float32))[None]
        return self(x, torch.ones(x.shape[:2]))[0].numpy()


def fit_attribution(
    episodes: Sequence[np.ndarray], outcomes: np.ndarray, budget: FitBudget, *, width: int = 64, batch: int = 64,
    learning_rate: float = 3e-3, seed: int = 0,
) -> tuple[Attribution, FitReport]:  # fmt: skip
    """Learn contributions whose sums match the outcomes (N,) of episodes (T_i, D)."""
    if len(episodes) != len(outcomes) or not episodes:
        raise ValueError(f"{len(episodes)} episodes and {len(outcomes)} outcomes: accepted are equal numbers, at least 1")
    longest = max(len(e) for e in episodes)
    x = torch.zeros(len(episodes), longest, episodes[0].shape[1])
    mask = torch.zeros(len(episodes), longest)
    for i, e in enumerate(episodes):
        x[i, : len(e)], mask[i, : len(e)] = torch.from_numpy(np.asarray(e, np.float32)), 1.0
    target = torch.from_numpy(np.asarray(outcomes, np.float32))
    clock, generator = Clock(budget), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Attribution(x.shape[2], width)
        optimiser = torch.optim.Adam(model.parameters(), learning_rate)
        loss = torch.zeros(())
        while clock.goes_on():
            rows = torch.randint(len(x), (batch,), generator=generator)
            loss = (model(x[rows], mask[rows]).sum(1) - target[rows]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()
    return model, clock.report(float(loss.detach()))


def redistribute(contributions: np.ndarray, outcome: float) -> np.ndarray:
    """(T,) contributions corrected evenly so that they sum to the outcome."""
    return contributions + (outcome - contributions.sum()) / len(contributions)


@dataclass(frozen=True)
class StageMap:
    """Stage and progress within it to progress in the whole task (SARM): stages get the share of time they take.

    Attributes:
        shares: mean share of an episode's time each stage takes; they sum to 1.
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.shares or min(self.shares) <= 0 or abs(sum(self.shares) - 1.0) > 1e-6:
            raise ValueError(f"shares={self.shares}: accepted are positive numbers that sum to 1")

    @classmethod
    def from_durations(cls, durations: np.ndarray) -> StageMap:
        """From (N, S) durations of each stage in N demonstrations."""
        each = np.asarray(durations, np.float64)
        return cls(tuple((each / each.sum(1, keepdims=True)).mean(0).tolist()))

    def progress(self, stage: np.ndarray, within: np.ndarray) -> np.ndarray:
        """(T,) progress in [0, 1]; continuous where one stage ends and the next begins."""
        edges = np.concatenate([[0.0], np.cumsum(self.shares)])
        edges[-1] = 1.0
        stage = np.asarray(stage, np.int64)
        return edges[stage] + np.clip(within, 0.0, 1.0) * (edges[stage + 1] - edges[stage])
