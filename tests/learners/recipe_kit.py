"""Learners with random weights and awkward batches, for the tests of the recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from spine_kit import SmoothBase
from torch import Tensor

from robot_rl.heads.best_of_n import BestOfNHead
from robot_rl.heads.chunk_policy import ChunkPolicyHead
from robot_rl.heads.config import (
    ChunkPolicyConfig,
    CorrectionConfig,
    EditConfig,
    HybridPolicyConfig,
    LatentNoiseConfig,
    ResidualConfig,
    SelectionConfig,
)
from robot_rl.heads.edit import EditHead
from robot_rl.heads.hybrid import HybridPolicyHead
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.one_step import OneStepHead
from robot_rl.heads.residual import GaussianResidualHead, ResidualHead
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.off_policy import OffPolicyLearner

FROZEN = {"critic_lr": 0.0, "actor_lr": 0.0}
"""With these an update leaves the parameters alone, so its gradients belong to the parameters it started from."""


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(network: Any, seed: int, amount: float = 0.3) -> None:
    """Random weights everywhere, also where an actor starts at zero."""
    data = network.flat.data
    data.add_(amount * torch.randn(data.shape, generator=gen(seed)).to(data))


def make_head(algorithm: str, base: Any, settings: OffPolicyConfig, **shape: Any) -> Any:
    width = base.spec.conditioning_dim + base.spec.n_action_steps * base.spec.action.dim
    critic = CriticEnsemble(settings.n_critics, width, settings.hidden, layer_norm=True, generator=gen(5))
    wide = {"scale": 0.8, "gripper_scale": 0.2, "hidden": (16,)}
    if algorithm == "edit":
        head = EditHead(base, EditConfig(**{**wide, "candidates": 3, "edits": 2, **shape}), critic, generator=gen(1))
    elif algorithm == "best_of_n":
        return BestOfNHead(base, SelectionConfig(**{"candidates": 3, **shape}), critic)
    elif algorithm == "one_step":
        head = OneStepHead(base, ChunkPolicyConfig(**{"hidden": (16,), **shape}), generator=gen(1))
    elif algorithm == "hybrid_sac":
        config = HybridPolicyConfig(**{"hidden": (16,), **shape})
        head = HybridPolicyHead(base, config, settings.gripper.values or (-1.0, 0.0, 1.0), (16,), generator=gen(1))
        shaken(head.gripper, 6)
    elif algorithm == "chunk_sac":
        head = ChunkPolicyHead(base, ChunkPolicyConfig(**{"hidden": (16,), **shape}), generator=gen(1))
    elif algorithm == "residual_sac":
        head = GaussianResidualHead(base, CorrectionConfig(**{**wide, **shape}), generator=gen(1))
    elif algorithm == "residual":
        head = ResidualHead(base, ResidualConfig(**{**wide, **shape}), generator=gen(1))
    else:
        head = LatentNoiseHead(base, LatentNoiseConfig(**{"hidden": (16,), **shape}), generator=gen(1))
    shaken(head.actor, 2)
    return head


def make(algorithm: str, base: Any = None, shape: dict[str, Any] | None = None, **config: Any) -> OffPolicyLearner:
    """A learner with random (never zero) weights everywhere and a target that is not the critic."""
    base = base or SmoothBase()
    defaults = {"algorithm": algorithm, "n_critics": 4, "hidden": (16, 16), "distill_every": 1}
    settings = OffPolicyConfig(**{**defaults, **config})
    learner = OffPolicyLearner(base, make_head(algorithm, base, settings, **(shape or {})), settings)
    shaken(learner.critic, 3, 0.1)
    shaken(learner.target, 4, 0.1)
    return learner


def random_batch(base: Any, size: int = 12, seed: int = 0, samples: int = 0) -> Batch:
    """Windows with truncation (discount gamma^m), termination (0), rows that must not count, returns partly unknown."""
    g, spec = gen(seed), base.spec
    rows, dims = spec.n_action_steps, spec.action.dim
    kind = torch.get_default_dtype()
    m = torch.randint(1, rows + 1, (size,), generator=g)
    alive = (torch.rand(size, generator=g) > 0.3).to(kind)

    def chunks() -> Tensor | None:
        return torch.rand(size, samples, rows, dims, generator=g) * 2 - 1 if samples else None

    return Batch(
        conditioning=torch.randn(size, spec.conditioning_dim, generator=g),
        action=(torch.rand(size, rows, dims, generator=g) * 2.2 - 1.1).clamp(-1, 1),
        reward=torch.randn(size, generator=g),
        discount=0.9**m * alive,
        next_conditioning=torch.randn(size, spec.conditioning_dim, generator=g),
        weight=(torch.rand(size, generator=g) > 0.2).to(kind),
        noise=None if spec.noise_shape is None else torch.randn(size, *spec.noise_shape, generator=g),
        episode_return=torch.randn(size, generator=g),
        return_known=(torch.rand(size, generator=g) > 0.2).to(kind),
        base_rows=chunks(),
        next_base_rows=chunks(),
    )


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """A learner's state, flat."""
    out: dict[str, Tensor] = {}
    for k, v in tree.items():
        out |= flattened(v, f"{prefix}{k}/") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out


def same_state(a: Any, b: Any) -> None:
    """Two learners hold the same bits."""
    one, two = flattened(a.state_dict()), flattened(b.state_dict())
    assert one.keys() == two.keys()
    assert [k for k in one if not torch.equal(one[k], two[k])] == []


def resumes_exactly(begin: Callable[[], Any], play: Callable[[Any, range], None], updates: int = 6) -> Any:
    """A learner that is saved half-way and loaded into a fresh one ends like one that was not; gives the one that was not."""
    straight, first, resumed = begin(), begin(), begin()
    play(straight, range(updates))
    play(first, range(updates // 2))
    resumed.load_state_dict(first.state_dict())
    play(resumed, range(updates // 2, updates))
    same_state(straight, resumed)
    return straight
