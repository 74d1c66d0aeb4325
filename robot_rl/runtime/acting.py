"""Deciding: base policy and head on batches of observations, with randomness that depends on the episode alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from robot_rl import seeding
from robot_rl.heads.base import Head, Mode
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.inpainting import ContinuingPolicy, soft_mask, why_not
from robot_rl.runtime.chunk_scheduler import RunningChunk
from robot_rl.types import Decision

ActingMode = Literal["base", "explore", "eval", "zero_noise"]


@dataclass(frozen=True)
class DecisionRequest:
    """One robot asks for a chunk.

    Attributes:
        observation: feature to (n_obs, ...) stack, oldest first.
        key: what the randomness of this episode is keyed by, e.g. ``("eval", 2000007)``.
        index: how many decisions this episode has made before.
        step: control step of the newest observation.
        running: the chunk that the answer has to continue, or None.
    """

    observation: dict[str, np.ndarray]
    key: tuple[int | str, ...]
    index: int
    step: int
    running: RunningChunk | None = None


def drawn(
    base: BasePolicy, width: int, key: Sequence[int | str], index: int
) -> tuple[np.ndarray | None, float, np.ndarray | None]:
    """What decision ``index`` of the episode ``key`` draws: prior noise, the mixture's coin, ``width`` normals to explore with.

    It depends on nothing else, so a learner that knows the key has the draws without their being stored.
    """
    g = seeding.rng("decision", *key, index)
    shape = base.spec.noise_shape
    noise = None if shape is None else g.standard_normal(shape, np.float32)
    coin = g.random()
    return noise, coin, g.standard_normal(width, np.float32) if width else None


@dataclass(frozen=True)
class ActingPolicy:
    """What acts in an episode: the base alone, or one version of a head in one mode.

    ``base_share`` is the chance per decision that the base acts with its own prior noise instead of the head (mixture
    acting); evaluation and probation run with 0. ``handover``: the base makes the first so many decisions of an episode, the
    head the others (JSRL); with ``handover_random`` an episode draws its own number of them from 0 to ``handover``. ``perturbation``: in ``base`` mode, uniform noise up to this much on the normalised chunk, grippers
    excepted.
    """

    base: BasePolicy
    head: Head | None = None
    mode: ActingMode = "base"
    version: int = 0
    base_share: float = 0.0
    device: str = "cpu"
    perturbation: float = 0.0
    handover: int = 0
    handover_random: bool = False

    def __post_init__(self) -> None:
        if self.mode in ("explore", "eval") and self.head is None:
            raise ValueError(f"acting mode {self.mode!r} needs a head; without one accepted are base, zero_noise")

    @torch.no_grad()
    def decide(self, requests: Sequence[DecisionRequest]) -> list[Decision]:
        """One batched call of the policy; decisions in physical units, in the order of the requests."""
        names = requests[0].observation.keys()
        observation = {n: torch.from_numpy(np.stack([r.observation[n] for r in requests])).to(self.device) for n in names}
        conditioning = self.base.encode(observation)
        base = self._continuing(requests)
        noise, exploration, by_base, more = self._draw(requests)
        candidate = np.full(len(requests), -1)
        if self.mode in ("base", "zero_noise"):
            latent = torch.zeros_like(noise) if self.mode == "zero_noise" and noise is not None else noise
            chunk = chunk_base = base.sample(conditioning, latent)
            log_prob = np.full(len(requests), np.nan)
            if self.mode == "base" and self.perturbation > 0:
                chunk = self._perturbed(chunk, requests)
        else:
            assert self.head is not None
            prior = noise if noise is None or more is None else torch.cat([noise.unsqueeze(1), more], dim=1)
            proposal = self.head.propose(conditioning, base, prior, exploration, cast(Mode, self.mode))
            chunk, chunk_base, latent = proposal.chunk, proposal.chunk_base, proposal.noise
            log_prob = proposal.log_prob.cpu().numpy().copy()
            if proposal.candidate_index is not None:
                candidate = np.where(by_base, -1, proposal.candidate_index.cpu().numpy())
            if by_base.any():
                rows = torch.from_numpy(by_base).to(self.device)
                own = base.sample(conditioning, noise)
                chunk = torch.where(rows[:, None, None], own, chunk)
                chunk_base = torch.where(rows[:, None, None], own, chunk_base)
                latent = None if latent is None or noise is None else torch.where(rows[:, None, None], noise, latent)
                log_prob[by_base] = np.nan
        physical = self.base.unnormalize_action(chunk).cpu().numpy()
        physical_base = physical if chunk is chunk_base else self.base.unnormalize_action(chunk_base).cpu().numpy()
        latents = None if latent is None else latent.cpu().numpy()
        if any(r.running is not None for r in requests):
            physical, physical_base = physical.copy(), physical_base.copy()  # they may be one array
            for i, running in ((i, r.running) for i, r in enumerate(requests) if r.running is not None):
                k = min(running.frozen, self.base.spec.horizon)
                physical[i, :k], physical_base[i, :k] = running.rows[:k], running.base[:k]
        return [
            Decision(
                step=r.step,
                noise=None if latents is None else latents[i],
                chunk_base=physical_base[i],
                chunk=physical[i],
                log_prob=float(log_prob[i]),
                candidate_index=int(candidate[i]),
                weights_version=0 if by_base[i] else self.version,
                explored=bool(by_base[i]),
                continues=r.running is not None,
            )
            for i, r in enumerate(requests)
        ]

    def cannot_continue(self) -> str:
        """Why chunks cannot continue a running one; nothing where they can."""
        if reason := why_not(self.base):
            return reason
        if self.mode in ("explore", "eval") and self.head is not None and not self.head.continues:
            return f"a {self.head.KIND} head does not act through the base's sampler, so that the rows that already run cannot be in-painted"
        return ""

    def _continuing(self, requests: Sequence[DecisionRequest]) -> BasePolicy:
        """The base, or where a request has a running chunk, one that goes on from there."""
        if all(r.running is None for r in requests):
            return self.base
        if reason := self.cannot_continue():
            raise ValueError(f"running: {reason}; accepted is None")
        spec = self.base.spec
        known = torch.zeros((len(requests), spec.horizon, spec.action.dim))
        weight = torch.zeros((len(requests), spec.horizon))
        for i, running in ((i, r.running) for i, r in enumerate(requests) if r.running is not None):
            m = min(len(running.base), spec.horizon)
            known[i, :m] = torch.from_numpy(np.array(running.base[:m]))
            weight[i] = soft_mask(min(running.frozen, m), m, spec.horizon)
        known = self.base.normalize_action(known.to(self.device)).clamp(-1.0, 1.0)
        return ContinuingPolicy(self.base, known, weight.to(self.device))

    def _handed_over_at(self, request: DecisionRequest) -> int:
        if not self.handover_random:
            return self.handover
        return int(seeding.rng("handover", *request.key).integers(0, self.handover + 1))

    def _perturbed(self, chunk: Tensor, requests: Sequence[DecisionRequest]) -> Tensor:
        streams = [seeding.rng("perturbation", *r.key, r.index) for r in requests]
        drawn = np.stack([g.uniform(-self.perturbation, self.perturbation, chunk.shape[1:]) for g in streams])
        drawn[..., self.base.spec.action.gripper_mask] = 0.0
        return (chunk + torch.from_numpy(drawn).to(chunk)).clamp(-1.0, 1.0)

    def _draw(self, requests: Sequence[DecisionRequest]) -> tuple[Tensor | None, Tensor | None, np.ndarray, Tensor | None]:
        """Prior noise, head exploration, the mixture's coin, and the prior draws beyond the first, keyed by (episode, decision)."""
        shape, head = self.base.spec.noise_shape, self.head if self.mode in ("explore", "eval") else None
        exploring = self.mode == "explore" and head is not None
        width = head.exploration_dim if exploring and head is not None else 0
        draws = [drawn(self.base, width, r.key, r.index) for r in requests]
        noise = None if shape is None else np.stack([d[0] for d in draws])  # type: ignore[misc]
        coins = np.array([d[1] for d in draws])
        exploration = np.stack([d[2] for d in draws]) if width else None  # type: ignore[misc]
        more, extra = None, 0 if head is None or shape is None else head.prior_draws - 1
        if extra:  # of a stream of their own: explore and eval meet the same candidates
            streams = [seeding.rng("candidates", *r.key, r.index) for r in requests]
            more = np.stack([g.standard_normal((extra, *shape), np.float32) for g in streams])  # type: ignore[misc]
        as_tensor = lambda x: None if x is None else torch.from_numpy(x).to(self.device)  # noqa: E731
        by_base = coins < (self.base_share if exploring else 0.0)
        if exploring and self.handover:
            by_base |= np.array([r.index < self._handed_over_at(r) for r in requests])
        return as_tensor(noise), as_tensor(exploration), by_base, as_tensor(more)
