"""The contract of a base policy: a frozen, deterministic map from (observation, noise) to an action chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from robot_rl.types import ActionSpec, FeatureSpec


@dataclass(frozen=True)
class PolicySpec:
    """What a policy says about itself.

    Attributes:
        observation_features: features it reads, physical units.
        action: the executed action.
        horizon: H, rows of the chunk it returns.
        n_action_steps: n <= H, rows meant to be executed before re-planning.
        n_obs_steps: stacked frames it reads (oldest first).
        noise_shape: (H_w, A_w) of the sampler's initial noise; ``None`` for a policy that takes none.
        conditioning_dim: C, width of :meth:`BasePolicy.encode`.
        sampler, num_steps: e.g. ``ddim`` and 8; ``euler`` and 4.
        stats_hash: hash of the normalisation statistics; data normalised with others must be refused.
        base_hash: hash of weights, sampler, step count and statistics; keys every cache.
    """

    observation_features: Mapping[str, FeatureSpec]
    action: ActionSpec
    horizon: int
    n_action_steps: int
    n_obs_steps: int
    noise_shape: tuple[int, int] | None
    conditioning_dim: int
    sampler: str
    num_steps: int
    stats_hash: str
    base_hash: str


@runtime_checkable
class BasePolicy(Protocol):
    """Batched, stateless, in ``eval`` mode, without gradient, and bitwise deterministic in ``noise``."""

    spec: PolicySpec

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Physical observations, each (B, n_obs, ...), to the conditioning (B, C) that sampler, heads and critics read."""
        ...

    def sample(self, conditioning: Tensor, noise: Tensor) -> Tensor:
        """(B, C) and (B, H_w, A_w) to a normalised chunk (B, H, A) in [-1, 1]. Same inputs, same bits."""
        ...

    def normalize_action(self, action: Tensor) -> Tensor:
        """Physical (..., A) to normalised (..., A)."""
        ...

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """Normalised (..., A) to physical (..., A)."""
        ...


def differentiable(base: BasePolicy) -> bool:
    """Whether ``sample(..., grad=True)`` keeps the graph from noise to chunk; a policy says so by ``differentiable = True``."""
    return bool(getattr(base, "differentiable", False))


def prior_noise(base: BasePolicy, batch: int, generator: torch.Generator) -> Tensor:
    """Noise of the base's own prior, N(0, I), (B, H_w, A_w), on the generator's device.

    Raises:
        ValueError: the policy takes no noise.
    """
    if base.spec.noise_shape is None:
        raise ValueError(f"policy with sampler {base.spec.sampler!r} takes no noise: use a residual or edit head on it")
    return torch.randn((batch, *base.spec.noise_shape), generator=generator, device=generator.device)
