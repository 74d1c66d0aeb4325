"""Imitation by optimal transport, with a discount that grows with what has been learned (ADS; specification 2.12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


def cosine_costs(rows: np.ndarray, demonstration: np.ndarray) -> np.ndarray:
    """(T, K) one minus cosine of features (T, D) and (K, D)."""
    a = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    b = demonstration / np.maximum(np.linalg.norm(demonstration, axis=1, keepdims=True), 1e-12)
    return 1.0 - a @ b.T


def sinkhorn(cost: np.ndarray, epsilon: float = 0.05, iterations: int = 100) -> np.ndarray:
    """(T, K) entropic transport plan between uniform marginals, in the log domain; rows sum to 1 / T."""
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"epsilon={epsilon}, iterations={iterations}: accepted are positive numbers")
    kernel = -np.asarray(cost, np.float64) / epsilon
    log_a, log_b = -np.log(cost.shape[0]), -np.log(cost.shape[1])
    u, v = np.zeros(cost.shape[0]), np.zeros(cost.shape[1])
    for _ in range(iterations):
        v = log_b - _log_sum(kernel + u[:, None], 0)
        u = log_a - _log_sum(kernel + v[None], 1)
    return np.exp(kernel + u[:, None] + v[None])


def _log_sum(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis, keepdims=True)
    return np.log(np.exp(x - top).sum(axis)) + top.squeeze(axis)


def transport_rewards(
    rows: np.ndarray, demonstrations: Sequence[np.ndarray], scale: float = 1.0, epsilon: float = 0.05
) -> np.ndarray:
    """(T,) reward -scale * sum_j C_ij mu_ij of each frame, against the closest of the demonstrations."""
    best, total = None, np.inf
    for demonstration in demonstrations:
        cost = cosine_costs(rows, demonstration)
        each = (cost * sinkhorn(cost, epsilon)).sum(1)
        if each.sum() < total:
            best, total = each, float(each.sum())
    if best is None:
        raise ValueError("no demonstrations: accepted is at least one")
    return -scale * best


def longest_increasing(values: np.ndarray) -> int:
    """Length of the longest strictly increasing subsequence."""
    tails: list[float] = []
    for v in values.tolist():
        k = int(np.searchsorted(tails, v, side="left"))
        tails[k : k + 1] = [v]
    return len(tails)


@dataclass
class DiscountSchedule:
    """Automatic discount scheduling: a short horizon until the start of the task is imitated, then longer.

    Attributes:
        demonstrations: (K, D) features each. ``horizon``: of an episode, in steps.
        alpha: the discount is alpha ** (1 / progress). ``first``: share of the horizon it starts with.
        tolerance: share of the demonstrations' own order that an episode must keep to move on; at most ``most`` moves an episode.
    """

    demonstrations: Sequence[np.ndarray]
    horizon: int
    alpha: float = 0.2
    first: float = 0.2
    tolerance: float = 0.9
    most: int = 5
    progress: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.horizon < 2 or not self.demonstrations:
            raise ValueError(f"horizon={self.horizon}, {len(self.demonstrations)} demonstrations: accepted are >= 2 and >= 1")
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"alpha={self.alpha}: accepted are numbers between 0 and 1")
        self.progress = max(1, int(self.first * self.horizon))
        own = self.demonstrations
        pairs = [(a, b) for i, a in enumerate(own) for j, b in enumerate(own) if i != j] or [(own[0], own[0])]
        orders = [np.argmin(cosine_costs(a, b), axis=1) for a, b in pairs]
        # Order that one demonstration keeps in another, for every length of a prefix.
        self._reference = [
            float(np.median([longest_increasing(o[:k]) for o in orders])) for k in range(1, self.horizon + 1)
        ]  # fmt: skip

    @property
    def gamma(self) -> float:
        return float(self.alpha ** (1.0 / self.progress))

    def observe(self, rows: np.ndarray) -> float:
        """Look at a new episode's features (T, D); gives the discount from now on. It never falls."""
        costs = [cosine_costs(rows, d) for d in self.demonstrations]
        for _ in range(self.most):
            k = self.progress
            if k >= min(self.horizon, len(rows)):
                break
            kept = [longest_increasing(np.argmin(c[:k, :k], axis=1)) for c in costs]
            if np.percentile(kept, 90) < int(self.tolerance * self._reference[k - 1]):
                break
            self.progress += 1
        return self.gamma
