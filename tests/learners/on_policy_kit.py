"""On-policy learners with random weights, and episodes for them."""

from __future__ import annotations

import torch
from recipe_kit import gen, shaken
from spine_kit import SmoothBase, compact

from robot_rl.heads.chain import ChainHead
from robot_rl.heads.config import ChainConfig, LatentNoiseConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.learners.config import OnPolicyConfig
from robot_rl.learners.on_policy import OnPolicyLearner, RoundEpisode


def make(kind: str, sampler: str = "diffusion", trained: int = 0, **config) -> OnPolicyLearner:
    if kind == "chain":
        base = compact(sampler).to(torch.get_default_dtype()).freeze()
        head = ChainHead(base, ChainConfig(std=0.15, trained_steps=trained))
        learner = OnPolicyLearner(base, head, OnPolicyConfig(**{"value_hidden": (8,), **config}))
        shaken(learner.stochastic, 3, 0.02)
        return learner
    base = SmoothBase()
    head = LatentNoiseHead(base, LatentNoiseConfig(hidden=(8,)), generator=gen(1))
    head.basis.matrix = head.basis.matrix.to(torch.get_default_dtype())
    shaken(head.actor, 2)
    return OnPolicyLearner(base, head, OnPolicyConfig(**{"value_hidden": (8,), **config}))


def episode(
    learner: OnPolicyLearner, decisions: int, seed: int, *, terminated: bool, success: float = 0.0, group: int = 0
) -> RoundEpisode:
    g, spec = gen(seed), learner.base.spec
    states = torch.randn(decisions + 1, spec.conditioning_dim, generator=g)
    steps = torch.full((decisions,), spec.n_action_steps)
    steps[-1] = 1  # a time limit or an end inside a chunk
    discount = learner.config.gamma ** steps.to(torch.get_default_dtype())
    if terminated:
        discount[-1] = 0.0
    return RoundEpisode(
        conditioning=states[:-1], next_conditioning=states[1:], noise=torch.randn(decisions, *spec.noise_shape, generator=g),
        exploration=torch.randn(decisions, learner.head.exploration_dim, generator=g),
        reward=torch.randn(decisions, generator=g), steps=steps, discount=discount, success=success, group=group,
    )  # fmt: skip
