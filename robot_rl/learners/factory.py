"""From the name of an algorithm to its objective, for every kind of head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from robot_rl.heads.base import Head
from robot_rl.heads.best_of_n import BestOfNHead
from robot_rl.heads.chunk_policy import ChunkPolicyHead
from robot_rl.heads.edit import EditHead
from robot_rl.heads.guidance import GuidedHead
from robot_rl.heads.hybrid import HybridPolicyHead
from robot_rl.heads.one_step import OneStepHead
from robot_rl.heads.residual import GaussianResidualHead
from robot_rl.learners import objectives
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.learners.flow_q import OneStep
from robot_rl.learners.gaussian import ChunkSAC, Edit, ResidualSAC
from robot_rl.learners.guided import Guided
from robot_rl.learners.hybrid import HybridSAC
from robot_rl.learners.objectives import HeadObjective
from robot_rl.learners.selection import BestOfN
from robot_rl.policies.base import BasePolicy

KINDS: dict[str, tuple[type[Head], Any]] = {
    "residual_sac": (GaussianResidualHead, ResidualSAC),
    "edit": (EditHead, Edit),
    "best_of_n": (BestOfNHead, BestOfN),
    "chunk_sac": (ChunkPolicyHead, ChunkSAC),
    "guided": (GuidedHead, Guided),
    "hybrid_sac": (HybridPolicyHead, HybridSAC),
    "one_step": (OneStepHead, OneStep),
}


def make_objective(
    base: BasePolicy,
    head: Head,
    config: OffPolicyConfig,
    generator: torch.Generator,
    init: torch.Generator,
    device: torch.device,
) -> HeadObjective:
    """The objective that ``config.algorithm`` names. Raises ValueError when the head is of another kind."""
    if config.algorithm not in KINDS:
        return objectives.make_objective(base, head, config, generator, init, device)
    head_type, objective = KINDS[config.algorithm]
    if not isinstance(head, head_type):
        raise ValueError(f"algorithm={config.algorithm!r} trains a {head_type.KIND} head; this one is {head.KIND}")
    return objective(base, head, config, generator, init, device)


def resolved(config: OffPolicyConfig, head: Head) -> OffPolicyConfig:
    """The configuration with the target entropy worked out for this head's actor."""
    if config.target_entropy_per_dim == 0.0:
        return config
    width = head.actor.action_dim
    total = config.target_entropy + config.target_entropy_per_dim * width
    return replace(config, target_entropy=total, target_entropy_per_dim=0.0)
