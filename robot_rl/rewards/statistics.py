"""Numbers that say how good a reward is: rank correlations, areas under curves, calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank."""
    values = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation with ties; 0 where one side is constant: an answer that never changes orders nothing.

    Raises:
        ValueError: lengths differ, or there are fewer than two values.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"spearman of shapes {a.shape} and {b.shape}: accepted are two equal lengths of at least 2")
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else 0.0


def value_order_correlation(values: np.ndarray) -> float:
    """VOC: rank correlation of values with time, over the steps whose value is known; 1 for steady progress."""
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    return spearman(values[known], np.flatnonzero(known).astype(float)) if known.sum() >= 2 else 0.0


def roc_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive outscores a negative (ties count half); NaN without both kinds."""
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    n = int(positive.sum())
    m = len(positive) - n
    return float((ranks(scores)[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def precision_recall(scores: np.ndarray, positive: np.ndarray, threshold: float) -> tuple[float, float]:
    """Precision (NaN where nothing is predicted) and recall (NaN without positives) of ``scores > threshold``."""
    predicted, positive = np.asarray(scores) > threshold, np.asarray(positive, bool)
    hits = float((predicted & positive).sum())
    return (
        hits / predicted.sum() if predicted.any() else float("nan"),
        hits / positive.sum() if positive.any() else float("nan"),
    )


@dataclass(frozen=True)
class Calibration:
    """Reliability of probabilities in equal bins: mean said, share that was true, count of each bin; and their mean gap."""

    said: list[float]
    true: list[float]
    count: list[int]
    error: float


def calibration(probabilities: np.ndarray, positive: np.ndarray, bins: int = 10) -> Calibration:
    """Expected calibration error over ``bins`` equal bins of [0, 1]; empty bins hold NaN."""
    p, y = np.asarray(probabilities, np.float64), np.asarray(positive, np.float64)
    which = np.clip((p * bins).astype(int), 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        said = np.bincount(which, p, bins) / count
        true = np.bincount(which, y, bins) / count
    gaps = np.abs(said - true)[count > 0] * count[count > 0]
    return Calibration(said.tolist(), true.tolist(), count.tolist(), float(gaps.sum() / max(len(p), 1)))
