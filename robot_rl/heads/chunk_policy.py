"""A policy from scratch: a squashed Gaussian over the whole chunk. The base lends its encoder and its roll-outs, no more."""

from __future__ import annotations

import torch
from torch import Tensor

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.config import ChunkPolicyConfig
from robot_rl.nn.actor import GaussianTanhActor, squashed_log_prob
from robot_rl.policies.base import BasePolicy


class ChunkPolicyHead(Head):
    """u ~ tanh N(mean(s), std(s)) is the chunk's executed rows, normalised. What plain RL is: it starts from nothing.

    A fresh head does not act like the base (and is no better than random); the promotion gate keeps the base acting until it is.
    """

    KIND = "chunk_policy"

    def __init__(self, base: BasePolicy, config: ChunkPolicyConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        spec, self.config = base.spec, config
        self.rows, self.dims = spec.n_action_steps, spec.action.dim
        self.actor = GaussianTanhActor(
            spec.conditioning_dim, self.rows * self.dims, config.hidden, layer_norm=config.layer_norm, last_scale=1e-2,
            generator=generator,
        )  # fmt: skip
        self.exploration_dim = self.rows * self.dims

    def to_rows(self, u: Tensor) -> Tensor:
        """Unit actions (B, n*A) to rows (B, n, A)."""
        return u.unflatten(1, (self.rows, self.dims))

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        mean, log_std = self.actor(conditioning)
        if mode == "eval":
            exploration = torch.zeros_like(mean)
        elif exploration is None:
            raise ValueError("explore mode needs exploration draws (B, exploration_dim)")
        x = mean + log_std.exp() * exploration
        chunk_base = base.sample(conditioning, noise)
        chunk = torch.cat([self.to_rows(torch.tanh(x)), chunk_base[:, self.rows :]], dim=1)
        return Proposal(chunk=chunk, chunk_base=chunk_base, noise=noise, log_prob=squashed_log_prob(exploration, log_std, x))
