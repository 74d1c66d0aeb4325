"""From N critics to one value: min of a random pair, its expectation in closed form, min, mean, lower confidence bound."""

from __future__ import annotations

import torch
from torch import Tensor

from robot_rl.learners.config import Reduction, check_reduction
from robot_rl.nn.grad import without_grad


def draw_pair(n: int, generator: torch.Generator | None, device: torch.device | str | None = None) -> Tensor:
    """Two different indices below ``n``, every pair equally likely, (2,) int64; no host sync.

    Raises:
        ValueError: fewer than two heads to draw from.
    """
    if n < 2:
        raise ValueError(f"a pair cannot be drawn from {n} critic head(s): at least 2 are needed")
    first = torch.randint(n, (1,), generator=generator, device=device)
    step = torch.randint(1, n, (1,), generator=generator, device=device)
    return torch.cat((first, (first + step) % n))


def pair_weights(n: int, like: Tensor) -> Tensor:
    """(N,) weight of the k-th smallest value in the expected minimum of a random pair.

    The k-th smallest of N (k from 0) is the smaller one in N - 1 - k of the N(N-1)/2 pairs.
    """
    if n < 2:
        raise ValueError(f"weighted_min_pair needs at least 2 critic heads, got {n}")
    return torch.arange(n - 1, -1, -1, dtype=like.dtype, device=like.device) / (n * (n - 1) / 2)


def reduce(q: Tensor, how: Reduction, generator: torch.Generator | None = None, *, k: Tensor | float = 1.0) -> Tensor:
    """(N, B) values of N heads to (B,), differentiable.

    Args:
        how: ``min_pair`` (REDQ, Chen et al. 2021: one pair per call, without replacement, shared by the batch),
            ``weighted_min_pair`` (its expectation over pairs, no randomness), ``min``, ``mean``,
            ``lcb`` = mean - ``k`` std, with the population standard deviation over heads.
        generator: used by ``min_pair`` only; on the device of ``q``.
    """
    check_reduction(how, len(q))
    if how == "min_pair":
        return q.index_select(0, draw_pair(len(q), generator, q.device)).amin(0)
    if how == "weighted_min_pair":
        return pair_weights(len(q), q) @ q.sort(0).values
    if how == "min":
        return q.amin(0)
    if how == "mean":
        return q.mean(0)
    return q.mean(0) - k * q.std(0, correction=0)


@without_grad
def reduce_with_grad(
    q: Tensor, how: Reduction, generator: torch.Generator | None = None, *, k: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(value (B,), dvalue/dq (N, B)) of :func:`reduce`, without autograd. Where heads tie, the first one gets the gradient."""
    n = len(q)
    check_reduction(how, n)
    if how == "mean":
        return q.mean(0), torch.full_like(q, 1.0 / n)
    if how == "lcb":
        mean, std = q.mean(0), q.std(0, correction=0)
        slope = (q - mean).div_(n * std.clamp_min(torch.finfo(q.dtype).tiny))  # dstd/dq
        return mean - k * std, torch.full_like(q, 1.0 / n).sub_(slope, alpha=k)
    if how == "weighted_min_pair":
        ordered, index = q.sort(0)
        weights = pair_weights(n, q)
        return weights @ ordered, torch.empty_like(q).scatter_(0, index, weights.unsqueeze(1).expand_as(q))
    if how == "min":
        value, index = q.min(0)
        return value, torch.zeros_like(q).scatter_(0, index.unsqueeze(0), 1.0)
    pair = draw_pair(n, generator, q.device)
    value, which = q.index_select(0, pair).min(0)
    return value, torch.zeros_like(q).scatter_(0, pair[which].unsqueeze(0), 1.0)
