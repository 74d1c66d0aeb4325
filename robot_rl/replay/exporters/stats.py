"""Feature statistics as LeRobot datasets store them: per episode, and pooled over episodes.

Values that are not finite (unknown rewards, absent proposals) are left out; a feature without any finite value has zeros and a
count of zero, so that it weighs nothing when datasets are joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
Stats = dict[str, np.ndarray]
IMAGE_SAMPLES = 100
IMAGE_SIDE = 150


def vector_stats(values: np.ndarray) -> Stats:
    """Statistics of (L,) or (L, n) values: arrays of shape (1,) or (n,), and ``count`` (1,)."""
    rows = np.asarray(values, np.float64).reshape(len(values), -1)
    rows = rows[np.isfinite(rows).all(axis=1)]
    count = len(rows)
    if count == 0:
        rows = np.zeros((1, rows.shape[1]))
    stats = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0), "count": np.array([count])}
    quantiles = np.quantile(rows, list(QUANTILES.values()), axis=0)
    return stats | dict(zip(QUANTILES, quantiles, strict=True))


def image_stats(frames: np.ndarray) -> Stats:
    """Statistics per channel of (L, H, W, 3) uint8 frames, in [0, 1]: arrays of shape (3, 1, 1), from at most 100 frames.

    Large frames are thinned to about 150 pixels a side: the statistics normalise inputs, they need no pixel twice.
    """
    length, height, width = frames.shape[:3]
    picked = np.unique(np.linspace(0, length - 1, min(length, IMAGE_SAMPLES)).round().astype(int))
    stride = max(1, max(height, width) // IMAGE_SIDE) if max(height, width) >= 2 * IMAGE_SIDE else 1
    counts = np.zeros((3, 256))
    for i in picked:  # a histogram of 256 values is exact for uint8 and needs no copy of all frames
        thin = frames[i, ::stride, ::stride]
        for channel in range(3):
            counts[channel] += np.bincount(thin[..., channel].ravel(), minlength=256)
    values = np.arange(256) / 255.0
    total = counts.sum(1)
    mean = counts @ values / total
    cumulative = np.cumsum(counts, axis=1)
    stats = {
        "min": values[(counts > 0).argmax(1)],
        "max": values[255 - (counts[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0.0)),
        **{q: values[(cumulative >= share * total[:, None]).argmax(1)] for q, share in QUANTILES.items()},
    }
    return {k: v.reshape(3, 1, 1) for k, v in stats.items()} | {"count": np.array([len(picked)])}


def pool(parts: Sequence[Stats]) -> Stats:
    """Statistics of the union of several samples. Quantiles are averages weighted by count, as LeRobot pools them."""
    known = [p for p in parts if p["count"][0] > 0] or list(parts[:1])
    counts = np.array([max(int(p["count"][0]), 1) for p in known], np.float64)
    weights = (counts / counts.sum()).reshape(-1, *[1] * known[0]["mean"].ndim)
    means, stds = np.stack([p["mean"] for p in known]), np.stack([p["std"] for p in known])
    mean = (weights * means).sum(0)
    pooled = {
        "min": np.min([p["min"] for p in known], axis=0),
        "max": np.max([p["max"] for p in known], axis=0),
        "mean": mean,
        "std": np.sqrt((weights * (stds**2 + (means - mean) ** 2)).sum(0)),
        "count": np.array([sum(int(p["count"][0]) for p in parts)]),
    }
    return pooled | {q: (weights * np.stack([p[q] for p in known])).sum(0) for q in QUANTILES}
