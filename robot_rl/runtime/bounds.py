"""Intervals for a success rate that a promotion gate may act on: Wilson, Jeffreys and an anytime-valid sequence.

Pure Python on purpose: the gate runs beside the robot and the report runs anywhere. It lives in this room rather than in
``evaluation/`` because the gate needs it and may import lower floors only; :mod:`robot_rl.evaluation.statistics` offers
the same names together with the comparisons between policies.
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, inf, lgamma, log, log1p, pi, sqrt
from statistics import NormalDist
from typing import NamedTuple

_LOG_BETA_HALF = log(pi)  # log B(1/2, 1/2)


class Interval(NamedTuple):
    """Closed interval of a proportion (or of a difference of two proportions)."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def to_json(self) -> list[float]:
        return [self.low, self.high]


def check_counts(k: int, n: int) -> None:
    """Raise ValueError unless ``0 <= k <= n`` are whole numbers."""
    if int(k) != k or int(n) != n or not 0 <= k <= n:
        raise ValueError(f"successes={k} of n={n}: accepted are whole numbers with 0 <= successes <= n")


def _check_probability(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name}={value}: accepted are numbers strictly between 0 and 1")


def normal_quantile(p: float) -> float:
    """The ``p`` quantile of the standard normal distribution."""
    _check_probability("p", p)
    return NormalDist().inv_cdf(p)


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Two-sided Wilson score interval (Wilson, 1927) for ``k`` successes in ``n`` trials fixed in advance.

    The lower end of ``confidence = 1 - 2 * alpha`` is the one-sided ``1 - alpha`` bound. Looked at after every episode it
    does not hold its level (21-31 % errors instead of 5 %): use :func:`confidence_sequence` for that.

    Raises:
        ValueError: counts or confidence out of range.
    """
    check_counts(k, n)
    _check_probability("confidence", confidence)
    if n == 0:
        return Interval(0.0, 1.0)
    z = normal_quantile(0.5 + confidence / 2)
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * sqrt(k * (n - k) / n + z * z / 4)
    return Interval(0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half))


def log_evidence_against(k: int, n: int, p: float) -> float:
    """Log of the beta-binomial mixture likelihood ratio against ``p``; ``inf`` when ``p`` cannot have produced the data.

    ``B(1/2 + k, 1/2 + n - k) / (B(1/2, 1/2) p^k (1 - p)^(n - k))`` is a non-negative martingale with mean one when the
    true rate is ``p`` (Robbins, 1970), so it exceeds ``1 / alpha`` at *any* time with probability at most ``alpha``.
    """
    if (p <= 0.0 and k > 0) or (p >= 1.0 and k < n):
        return inf
    value = lgamma(0.5 + k) + lgamma(0.5 + n - k) - lgamma(n + 1.0) - _LOG_BETA_HALF
    if k:
        value -= k * log(p)
    if n - k:
        value -= (n - k) * log1p(-p)
    return value


@lru_cache(maxsize=65536)
def confidence_sequence(k: int, n: int, alpha: float = 0.05) -> Interval:
    """Anytime-valid interval: over all looks at a growing ``n``, it ever misses the true rate with probability <= alpha.

    The set of rates ``p`` that :func:`log_evidence_against` does not exclude at ``1 / alpha`` (beta-binomial mixture with
    Jeffreys' prior). Wider than Wilson by the price of being allowed to look after every episode.

    Raises:
        ValueError: counts or alpha out of range.
    """
    check_counts(k, n)
    _check_probability("alpha", alpha)
    if n == 0:
        return Interval(0.0, 1.0)
    threshold = -log(alpha)
    mean = k / n

    def crossing(outside: float) -> float:
        inside = mean  # the likelihood is largest here, so the evidence against it is smallest
        for _ in range(60):
            middle = 0.5 * (outside + inside)
            if log_evidence_against(k, n, middle) >= threshold:
                outside = middle
            else:
                inside = middle
        return outside

    return Interval(0.0 if k == 0 else crossing(0.0), 1.0 if k == n else crossing(1.0))


def _incomplete_beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, evaluated by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1.0 + step * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + step / c
            c = c if abs(c) > tiny else tiny
            value *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return value


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b), to about 1e-12."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _incomplete_beta_fraction(a, b, x) / a
    return 1.0 - front * _incomplete_beta_fraction(b, a, 1.0 - x) / b


def beta_quantile(q: float, a: float, b: float) -> float:
    """The ``q`` quantile of Beta(a, b), by bisection."""
    _check_probability("q", q)
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        if beta_cdf(middle, a, b) < q:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def jeffreys(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Equal-tailed credible interval of Beta(1/2 + k, 1/2 + n - k), Jeffreys' prior; 0 and 1 are kept at the ends.

    Raises:
        ValueError: counts or confidence out of range.
    """
    check_counts(k, n)
    _check_probability("confidence", confidence)
    tail = (1.0 - confidence) / 2
    low = 0.0 if k == 0 else beta_quantile(tail, 0.5 + k, 0.5 + n - k)
    high = 1.0 if k == n else beta_quantile(1 - tail, 0.5 + k, 0.5 + n - k)
    return Interval(low, high)
