"""Chunks that continue the one that runs while they are computed: real-time chunking (Black, Galliker and Levine 2025).

A policy that takes d control steps to decide hands over a chunk whose first d rows have already been executed, from the chunk
before. Rows after those should go on from there. So the new chunk is in-painted: at each step of the sampler, the network's
estimate A of the finished chunk is pulled to the known rows Y by the gradient through the network (the pseudo-inverse guidance of
Song et al. 2023):

    A'  = A + min(beta s / d^2, (a^2 + s^2 / d^2) / a) * J^T W (Y - A),     J = dA/dx,     x = a chunk + s noise
    A'' = A' + W (Y - A')

W is 1 for the rows that run before the chunk arrives, falls off over the other known ones and is 0 where nothing is known; d is
the standard deviation of chunks. For a flow, a = t and s = 1 - t, and with d = 1 the first line is the published rule on
velocities. Chunks that fill the unit cube vary less than noise does, so their rows were pulled too weakly by it. The second line
is ours, too: with the four to eight steps of robot policies guidance alone leaves half of the distance to rows that are certain,
while replacing them lets every further step of the network see them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from robot_rl.policies.base import BasePolicy

STRONGEST = 5.0
"""beta: keeps the first steps, where the other term has no bound, from overshooting in samplers of few steps (the paper's)."""


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Denoising:
    """A policy's sampler for one batch of observations, taken apart. States x are (B, H_w, A_w) or wider.

    Attributes:
        levels: (a, s) before each step: x = a chunk + s noise.
        clean: (i, x) to the network's estimate of the finished x, not clamped, through which gradients pass.
        advance: (i, x, clean) to the state after step i; with the network's own estimate this is the sampler itself.
        finish: the last state to a chunk (B, H, A) in the unit cube.
        own: a chunk (B, H, A) of the unit cube to the sampler's numbers, the other way round.
        deviation: d, about one half where the range of recorded actions is the unit cube, 1 where they are standardised.
        first_row: the row of x that a chunk begins with.
        start: noise (B, H_w, A_w) to the first state; the noise itself by default.
    """

    levels: Sequence[tuple[float, float]]
    clean: Callable[[int, Tensor], Tensor]
    advance: Callable[[int, Tensor, Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    own: Callable[[Tensor], Tensor]
    deviation: float = 0.5
    first_row: int = 0
    start: Callable[[Tensor], Tensor] = _same


@runtime_checkable
class Denoiser(Protocol):
    """A policy that hands out its sampler, and can therefore in-paint."""

    def denoising(self, conditioning: Tensor) -> Denoising: ...


def soft_mask(frozen: int, known: int, horizon: int) -> Tensor:
    """W, (horizon,): 1 for ``frozen`` rows, falling off over the rows up to ``known``, 0 beyond (equation 5 of the paper)."""
    rows = torch.arange(horizon, dtype=torch.float32)
    c = ((known - rows) / (known - frozen + 1)).clamp(0.0, 1.0)
    weight = c * torch.expm1(c) / math.expm1(1.0)
    weight[:frozen] = 1.0
    weight[known:] = 0.0
    return weight


def inpaint(sampler: Denoising, noise: Tensor, known: Tensor, weight: Tensor) -> Tensor:
    """The chunk (B, H, A) in the unit cube that ``noise`` becomes when it is drawn to ``known`` (B, H, A) with ``weight`` (B, H)."""
    rows = slice(sampler.first_row, sampler.first_row + known.shape[1])
    wanted, w, x = sampler.own(known), weight.unsqueeze(-1), sampler.start(noise)
    width = wanted.shape[-1]
    for i, (a, s) in enumerate(sampler.levels):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            clean = sampler.clean(i, leaf)
            estimate = clean.detach().clone()
            off = torch.zeros_like(estimate)
            off[:, rows, :width] = w * (wanted - estimate[:, rows, :width])
            (pull,) = torch.autograd.grad(clean, leaf, off)
        spread = s / sampler.deviation**2
        strength = STRONGEST * spread if a == 0.0 else min(STRONGEST * spread, (a * a + s * spread) / a)
        estimate += strength * pull
        estimate[:, rows, :width] += w * (wanted - estimate[:, rows, :width])
        x = sampler.advance(i, x, estimate)
    return sampler.finish(x)


class ContinuingPolicy:
    """A base policy for one batch of decisions, whose chunks continue known ones; heads use it like the base itself.

    Args:
        known: (B, H, A) normalised rows of the chunks that run, from these decisions' own control step on.
        weight: (B, H), see :func:`soft_mask`; a row of zeros leaves its chunk as it is.

    Raises:
        ValueError: the base does not hand out its sampler.
    """

    def __init__(self, base: BasePolicy, known: Tensor, weight: Tensor) -> None:
        if reason := why_not(base):
            raise ValueError(reason)
        self.base, self.known, self.weight, self.spec = base, known, weight, base.spec

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        return self.base.encode(observation)

    def sample(self, conditioning: Tensor, noise: Tensor, **options: Any) -> Tensor:
        """Like the base's, for one or several candidates per decision (those of a decision one after the other).

        Raises:
            ValueError: ``grad``: what is learned from is the base's own map from noise to chunk.
        """
        if options.get("grad"):
            raise ValueError("grad=True: a chunk that continues another one has no gradient to its noise; sample from the base")
        assert isinstance(self.base, Denoiser)
        times = len(conditioning) // len(self.known)
        known, weight = (t.repeat_interleave(times, dim=0) if times > 1 else t for t in (self.known, self.weight))
        return inpaint(self.base.denoising(conditioning), noise, known, weight)

    def normalize_action(self, action: Tensor) -> Tensor:
        return self.base.normalize_action(action)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        return self.base.unnormalize_action(action)


def instead(base: BasePolicy, policy: BasePolicy) -> BasePolicy:
    """``policy``, which continues what ``base`` continues: for heads that sample from weights of their own."""
    return ContinuingPolicy(policy, base.known, base.weight) if isinstance(base, ContinuingPolicy) else policy


def why_not(base: BasePolicy) -> str:
    """Why a base cannot continue a running chunk; nothing where it can."""
    if isinstance(base, Denoiser):
        return ""
    return (
        f"a {type(base).__name__} (sampler {base.spec.sampler}) does not hand out its sampler, so that the rows that already run cannot "
        "be in-painted"
    )
