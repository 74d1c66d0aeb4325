"""Choosing among the base's own chunks by a critic: no trained actor (Q-chunking, Li et al. 2025; Q#, Zhou et al. 2025).

This is the whole rule; acting, temporal-difference targets and the edit head all come through :func:`pick`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.config import SelectionConfig, SelectReduce
from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.inpainting import instead

AT_ONCE = 1024
"""Rows that a critic scores, or the base denoises, in one piece; more go candidate by candidate, which keeps buffers in the cache."""


class Scorer(Protocol):
    """What ranks candidates: an ensemble of critics over (conditioning, rows), see ``learners/ensemble.py``."""

    def reduced_value(
        self, x: Tensor, how: SelectReduce, generator: torch.Generator | None = None, *, k: Tensor | float = 1.0
    ) -> Tensor: ...

    def value(self, x: Tensor, heads: Tensor | None = None) -> Tensor: ...


def tilt(q: Tensor, eta: Tensor | float, risk: str) -> Tensor:
    """(B, M) scores and eta, a number or (B, 1), to unnormalised log weights Q_eta / eta."""
    if risk == "neutral":
        return q / eta
    p = q.clamp(0.0, 1.0)
    inverse = torch.as_tensor(1.0 / eta, dtype=q.dtype, device=q.device)
    return torch.logaddexp(torch.log1p(-p), p.log() + inverse)  # log(1 - p + p e^(1/eta))


def divergence(logits: Tensor) -> Tensor:
    """(B,) log M - H(softmax(logits)): how far the choice is from an even draw of M candidates."""
    log_p = logits.log_softmax(-1)
    return math.log(logits.shape[-1]) + (log_p.exp() * log_p).sum(-1)


def choice_logits(q: Tensor, config: SelectionConfig) -> Tensor:
    """(B, M) scores to log weights of the draw, with eta raised to the KL budget by bisection (40 halvings of its logarithm)."""
    floor = max(config.temperature, 1e-6)
    if config.kl_budget is None:
        return tilt(q, floor, config.risk)
    low = torch.full_like(q[:, :1], math.log(floor))
    high = torch.full_like(low, math.log(1e6))
    fits = divergence(tilt(q, low.exp(), config.risk)).unsqueeze(-1) <= config.kl_budget
    for _ in range(40):
        middle = (low + high) / 2
        over = divergence(tilt(q, middle.exp(), config.risk)).unsqueeze(-1) > config.kl_budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return tilt(q, torch.where(fits, torch.full_like(high, floor), high.exp()), config.risk)


def pick(q: Tensor, config: SelectionConfig, exploration: Tensor | None) -> Tensor:
    """(B, M) scores to the chosen index (B,): the best, or with ``exploration`` (B, M) standard normals a draw (Gumbel trick)."""
    if exploration is None or not config.samples:
        return q.argmax(-1)
    uniform = torch.special.ndtr(exploration).clamp(1e-7, 1 - 1e-7)
    return (choice_logits(q, config) - (-uniform.log()).log()).argmax(-1)


def lean_of(config: SelectionConfig) -> Tensor | None:
    """() ``select_k`` where it matters: published with the head, because a learner may let it fall."""
    return torch.tensor(config.select_k) if config.select_reduce == "lcb" else None


class Selection(NamedTuple):
    index: Tensor  # (B,) of the chosen candidate
    rows: Tensor  # (B, n, A) what runs
    q: Tensor  # (B, M) scores
    candidates: Tensor  # (B, M, n, A)


def score(
    critic: Scorer, conditioning: Tensor, candidates: Tensor, config: SelectionConfig, k: Tensor | None = None,
    pair: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, C) states and (B, M, n, A) candidates to scores (B, M).

    Args:
        k: () replaces ``config.select_k`` where a learner moves it.
        pair: (2,) critics that rank alone, with ``select_reduce: min_pair``; None: its expectation over all pairs.
    """
    b, m = candidates.shape[:2]
    lean = config.select_k if k is None else k
    how: SelectReduce = "weighted_min_pair" if config.select_reduce == "min_pair" else config.select_reduce

    def scored(x: Tensor) -> Tensor:
        return critic.reduced_value(x, how, k=lean) if pair is None else critic.value(x, pair).amin(0)

    flat = candidates.flatten(2)
    if b * m <= AT_ONCE:
        x = torch.cat([conditioning.unsqueeze(1).expand(b, m, -1), flat], dim=-1).flatten(0, 1)
        return scored(x).unflatten(0, (b, m))
    columns = [torch.cat([conditioning, flat[:, i]], dim=-1) for i in range(m)]
    return torch.stack([scored(x) for x in columns], dim=1)


def base_candidates(base: BasePolicy, conditioning: Tensor, noise: Tensor | None, count: int) -> Tensor:
    """(B, C) and prior noise (B, K, H_w, A_w), or (B, H_w, A_w) for K = 1, to the base's chunks (B, K, H, A)."""
    if noise is None or count == 1:
        return base.sample(conditioning, noise).unsqueeze(1)
    if len(conditioning) * count > AT_ONCE:
        return torch.stack([base.sample(conditioning, noise[:, i]) for i in range(count)], dim=1)
    repeated = conditioning.repeat_interleave(count, dim=0)
    return base.sample(repeated, noise.flatten(0, 1)).unflatten(0, (len(conditioning), count))


class BestOfNHead(Head):
    """Draws K chunks of the base and runs the one its critic likes best. It cannot leave what the base does.

    The critic is published with the head: it is the learner's target network.

    Raises:
        ValueError: the base takes no noise, so that all its chunks are one.
    """

    KIND, continues = "best_of_n", True
    critic: nn.Module
    lean: Tensor | None

    def __init__(self, base: BasePolicy, config: SelectionConfig, critic: nn.Module) -> None:
        super().__init__()
        if base.spec.noise_shape is None:
            raise ValueError(
                f"a best-of-N head needs a policy that takes noise, and this one ({base.spec.sampler}) maps each observation to "
                "one chunk; use a residual or edit head"
            )
        self.config, self.rows = config, base.spec.n_action_steps
        self.own = FineTunedHead(base) if config.own_base else None
        self.register_buffer("lean", lean_of(config))
        self.critic = critic.requires_grad_(False)
        self.prior_draws = config.candidates
        self.exploration_dim = config.candidates if config.samples else 0

    def sampler(self, base: BasePolicy) -> BasePolicy:
        """What draws the candidates, in episodes and in targets."""
        return base if self.own is None else instead(base, self.own.policy)

    def select(
        self, conditioning: Tensor, base_rows: Tensor, exploration: Tensor | None, pair: Tensor | None = None
    ) -> Selection:
        """Choose among base rows (B, K, n, A); ``exploration`` (B, exploration_dim) standard normals, None for ``eval``; ``pair`` as
        in :func:`score`."""
        q = score(self.critic, conditioning, base_rows, self.config, self.lean, pair)
        index = pick(q, self.config, exploration)
        return Selection(index, base_rows[torch.arange(len(q), device=q.device), index], q, base_rows)

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        if mode == "explore" and self.exploration_dim and exploration is None:
            raise ValueError("explore mode needs exploration draws (B, exploration_dim)")
        chunks = base_candidates(self.sampler(base), conditioning, noise, self.prior_draws)
        chosen = self.select(conditioning, chunks[:, :, : self.rows], exploration if mode == "explore" else None)
        proposal = chosen_proposal(chosen, chunks, noise, self.rows)
        return proposal if self.own is None else replace(proposal, chunk_base=base.sample(conditioning, proposal.noise))


def chosen_proposal(chosen: Selection, chunks: Tensor, noise: Tensor | None, rows: int) -> Proposal:
    """A proposal from a selection; candidates beyond the K of ``chunks`` (B, K, H, A) are edits of the first ones."""
    each = torch.arange(len(chunks), device=chunks.device)
    origin = chosen.index % chunks.shape[1]
    chunk_base = chunks[each, origin]
    chunk = torch.cat([chosen.rows, chunk_base[:, rows:]], dim=1)
    latent = noise if noise is None or chunks.shape[1] == 1 else noise[each, origin]
    return Proposal(
        chunk=chunk, chunk_base=chunk_base, noise=latent, log_prob=torch.full((len(chunks),), float("nan"), device=chunk.device),
        candidate_index=chosen.index, info={"q": chosen.q},
    )  # fmt: skip
