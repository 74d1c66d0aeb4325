"""Success rates and comparisons of policies, each with the interval that its way of collecting data allows.

=====================  ==========================================================================================
question               answer
=====================  ==========================================================================================
one rate, n preset     :func:`wilson` (default everywhere), :func:`jeffreys` as the Bayesian alternative
one rate, peeking      :func:`confidence_sequence`
A against B, paired    :func:`paired_comparison`: exact McNemar test and the interval of the difference
A against B, unpaired  :func:`newcombe_difference`
several training seeds :func:`hierarchical_bootstrap`: seeds first, then episodes within each
how many episodes      :func:`required_n`, :func:`required_n_difference`
=====================  ==========================================================================================

Never a mean plus or minus a standard deviation of zeros and ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, comb, sqrt
from typing import Any, Literal

import numpy as np

from robot_rl.runtime.bounds import (
    Interval,
    beta_cdf,
    beta_quantile,
    check_counts,
    confidence_sequence,
    jeffreys,
    log_evidence_against,
    normal_quantile,
    wilson,
)

__all__ = [
    "Interval", "Outcome", "PairedComparison", "SuccessRate", "beta_cdf", "beta_quantile", "check_counts",
    "confidence_sequence", "hierarchical_bootstrap", "holm", "jeffreys", "log_evidence_against", "mcnemar_exact",
    "newcombe_difference", "normal_quantile", "paired_comparison", "required_n", "required_n_difference", "wilson",
]  # fmt: skip

Method = Literal["wilson", "jeffreys", "sequence"]


@dataclass(frozen=True)
class Outcome:
    """One evaluated episode: which held-out start (``seed``) and whether the task's own rule called it a success."""

    seed: int
    success: bool

    def to_json(self) -> dict[str, Any]:
        return {"seed": self.seed, "success": self.success}


@dataclass(frozen=True)
class SuccessRate:
    """``successes`` of ``n`` episodes, with an interval and the method that made it."""

    successes: int
    n: int
    interval: Interval
    method: str = "wilson"
    confidence: float = 0.95

    @classmethod
    def of(cls, successes: int, n: int, method: Method = "wilson", confidence: float = 0.95) -> SuccessRate:
        """Raises ValueError for impossible counts or an unknown method."""
        if method == "wilson":
            interval = wilson(successes, n, confidence)
        elif method == "jeffreys":
            interval = jeffreys(successes, n, confidence)
        elif method == "sequence":
            interval = confidence_sequence(successes, n, 1.0 - confidence)
        else:
            raise ValueError(f"method={method!r}: accepted are wilson, jeffreys, sequence")
        return cls(int(successes), int(n), interval, method, confidence)

    @classmethod
    def of_outcomes(
        cls, outcomes: Sequence[Outcome | bool], method: Method = "wilson", confidence: float = 0.95
    ) -> SuccessRate:
        wins = sum(o.success if isinstance(o, Outcome) else bool(o) for o in outcomes)
        return cls.of(wins, len(outcomes), method, confidence)

    @property
    def rate(self) -> float:
        """Successes over episodes; NaN for none."""
        return self.successes / self.n if self.n else float("nan")

    def to_json(self) -> dict[str, Any]:
        return {
            "success": self.rate if self.n else None,
            "successes": self.successes,
            "n": self.n,
            "interval": self.interval.to_json(),
            "method": self.method,
            "confidence": self.confidence,
        }

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % [{100 * self.interval.low:.1f}, {100 * self.interval.high:.1f}] of {self.n}"


def newcombe_difference(k_new: int, n_new: int, k_old: int, n_old: int, confidence: float = 0.95) -> Interval:
    """Interval of ``p_new - p_old`` for independent samples: Newcombe (1998), method 10, from two Wilson intervals.

    Raises:
        ValueError: counts out of range or an empty sample.
    """
    if n_new == 0 or n_old == 0:
        raise ValueError(f"n_new={n_new}, n_old={n_old}: both must be at least 1")
    new, old = wilson(k_new, n_new, confidence), wilson(k_old, n_old, confidence)
    p_new, p_old = k_new / n_new, k_old / n_old
    difference = p_new - p_old
    return Interval(
        max(-1.0, difference - sqrt((p_new - new.low) ** 2 + (old.high - p_old) ** 2)),
        min(1.0, difference + sqrt((new.high - p_new) ** 2 + (p_old - old.low) ** 2)),
    )


def mcnemar_exact(new_wins: int, old_wins: int) -> float:
    """One-sided exact McNemar p-value: P(Bin(b + c, 1/2) >= b), with ``b = new_wins`` and ``c = old_wins``."""
    b, c = int(new_wins), int(old_wins)
    if b < 0 or c < 0:
        raise ValueError(f"new_wins={b}, old_wins={c}: accepted are counts >= 0")
    return sum(comb(b + c, i) for i in range(b, b + c + 1)) / 2 ** (b + c)


@dataclass(frozen=True)
class PairedComparison:
    """Two policies on the same held-out starts.

    Attributes:
        new_wins: starts that only the new policy solved (b); ``old_wins``: only the old one (c).
        both, neither: starts on which they agree.
        difference: (b - c) / n; ``interval`` is its large-sample interval at ``confidence``.
        p_value: one-sided exact McNemar test of "the new policy is not better".
    """

    n: int
    new_wins: int
    old_wins: int
    both: int
    neither: int
    difference: float
    interval: Interval
    p_value: float
    confidence: float = 0.95

    def to_json(self) -> dict[str, Any]:
        return {
            "n": self.n, "new_wins": self.new_wins, "old_wins": self.old_wins, "both": self.both, "neither": self.neither,
            "difference": self.difference, "interval": self.interval.to_json(), "p_value": self.p_value,
            "confidence": self.confidence, "test": "exact one-sided McNemar",
        }  # fmt: skip


def _by_seed(name: str, outcomes: Mapping[int, bool] | Sequence[Outcome]) -> dict[int, bool]:
    if isinstance(outcomes, Mapping):
        return {int(seed): bool(success) for seed, success in outcomes.items()}
    table: dict[int, bool] = {}
    for outcome in outcomes:
        if outcome.seed in table:
            raise ValueError(f"{name}: seed {outcome.seed} appears twice; a start counts once")
        table[outcome.seed] = bool(outcome.success)
    return table


def paired_comparison(
    new: Mapping[int, bool] | Sequence[Outcome], old: Mapping[int, bool] | Sequence[Outcome], confidence: float = 0.95
) -> PairedComparison:
    """Compare two policies that were run on the same seeds.

    Args:
        new, old: seed to success, or outcomes. Both must hold the same seeds.

    Raises:
        ValueError: the seeds differ, or there are none: a paired test of different starts means nothing.
    """
    a, b = _by_seed("new", new), _by_seed("old", old)
    if not a or a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())[:5]
        raise ValueError(
            f"paired comparison of {len(a)} and {len(b)} starts: both policies must run the same seeds"
            + (f"; not in both: {odd}" if odd else "; there are none")
        )
    n = len(a)
    wins = sum(a[s] and not b[s] for s in a)
    losses = sum(b[s] and not a[s] for s in a)
    both = sum(a[s] and b[s] for s in a)
    difference = (wins - losses) / n
    half = normal_quantile(0.5 + confidence / 2) * sqrt(max(0.0, wins + losses - (wins - losses) ** 2 / n)) / n
    interval = Interval(max(-1.0, difference - half), min(1.0, difference + half))
    return PairedComparison(
        n, wins, losses, both, n - wins - losses - both, difference, interval, mcnemar_exact(wins, losses), confidence
    )


def hierarchical_bootstrap(
    outcomes_by_seed: Sequence[Sequence[float]] | Mapping[int, Sequence[float]],
    confidence: float = 0.95,
    samples: int = 10_000,
    rng: np.random.Generator | None = None,
) -> Interval:
    """Percentile interval of the mean over training seeds: draws seeds with replacement, then episodes within each.

    Episodes of one training seed share its training and are not independent, so pooling them would be too sure of itself.

    Args:
        outcomes_by_seed: one sequence of outcomes (0/1, or paired differences) per training seed.
        rng: a fixed generator by default, so that a report is reproducible.

    Raises:
        ValueError: no training seed, or one without episodes.
    """
    groups = list(outcomes_by_seed.values()) if isinstance(outcomes_by_seed, Mapping) else list(outcomes_by_seed)
    arrays = [np.asarray(g, np.float64) for g in groups]
    if not arrays or any(a.ndim != 1 or len(a) == 0 for a in arrays):
        raise ValueError(
            f"hierarchical bootstrap of {len(arrays)} seeds: accepted is at least one seed with at least one episode"
        )
    rng = np.random.default_rng(0) if rng is None else rng
    drawn = rng.integers(len(arrays), size=(samples, len(arrays)))
    means = np.empty(drawn.shape)
    for index, values in enumerate(arrays):
        hit = drawn == index
        count = int(hit.sum())
        if set(np.unique(values)) <= {0.0, 1.0}:  # a resampled mean of zeros and ones is a binomial draw
            means[hit] = rng.binomial(len(values), values.mean(), size=count) / len(values)
        else:
            means[hit] = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(count)]
    pooled = means.mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(pooled, [tail, 1 - tail])
    return Interval(float(low), float(high))


def required_n(p: float, half_width: float, confidence: float = 0.95) -> int:
    """Fewest episodes for which the Wilson interval around a rate of ``p`` is at most ``half_width`` to either side.

    Raises:
        ValueError: ``p`` outside [0, 1] or ``half_width`` outside (0, 0.5).
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p}: accepted are numbers in [0, 1]")
    if not 0.0 < half_width < 0.5:
        raise ValueError(f"half_width={half_width}: accepted are numbers in (0, 0.5)")
    z = normal_quantile(0.5 + confidence / 2)

    def half(n: int) -> float:
        return z / (n + z * z) * sqrt(n * p * (1 - p) + z * z / 4)

    low, high = 1, 1
    while half(high) > half_width:
        low, high = high, high * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if half(middle) > half_width else (low, middle)
    return high


def required_n_difference(p_old: float, p_new: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Episodes per policy for a one-sided unpaired test to find ``p_new > p_old`` with the given power (normal approximation).

    Paired starts need fewer: this is the number to plan with. Raises ValueError unless ``0 <= p_old < p_new <= 1``.
    """
    if not 0.0 <= p_old < p_new <= 1.0:
        raise ValueError(f"p_old={p_old}, p_new={p_new}: accepted is 0 <= p_old < p_new <= 1")
    z_alpha, z_power = normal_quantile(1 - alpha), normal_quantile(power)
    mean = (p_old + p_new) / 2
    spread = z_alpha * sqrt(2 * mean * (1 - mean)) + z_power * sqrt(p_old * (1 - p_old) + p_new * (1 - p_new))
    return max(1, ceil((spread / (p_new - p_old)) ** 2))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values, for several tasks or checkpoints compared at once."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}
