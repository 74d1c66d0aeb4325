"""Steering the base's sampler by the gradient of a reward: differentiable costs (VLS) and learnt values, without training the base.

    for i in 0 .. K - 1:
        x <- step_i(x)                                              the base's own sampling step
        M times:   x <- x + lambda_(i+1) g / max(1, |g| / g_max),   g = grad_x R(clamp(clean_(i+1)(x)))
    a = clamp(x), then within max_displacement of the base's own chunk

``clean_i`` is the network's estimate of the finished chunk (the state itself after the last step); the clamp passes gradients
through. R = value_weight * Q(s, a) - sum of weighed costs. Strength 0 is the base bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.costs import ChunkCosts
from robot_rl.heads.guidance_config import GuidanceConfig, ScoreCorrectionConfig
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.compact import CompactPolicy


def need_compact(base: BasePolicy, what: str) -> CompactPolicy:
    """Raises ValueError unless the base hands out its sampling steps."""
    if not isinstance(base, CompactPolicy):
        raise ValueError(
            f"{what} works inside the base's sampler, and a {type(base).__name__} does not hand it out; accepted are compact "
            "diffusion and flow policies, or a latent-noise, residual or edit head"
        )
    return base


def systematic_resample(log_weight: Tensor) -> Tensor:
    """(B, P) log weights to indices (B, P): each particle as often as its weight says, to within one (offset one half)."""
    p = log_weight.shape[1]
    edges = log_weight.softmax(-1).cumsum(-1)
    at = (torch.arange(p, dtype=edges.dtype, device=edges.device) + 0.5) / p
    return torch.searchsorted(edges, at.expand_as(edges).contiguous()).clamp_max(p - 1)


class GuidedHead(Head):
    """The base's sampler with a gradient beside it. Both modes are the same: what explores is the base's own noise.

    The critic, where there is one, is published with the head: it is the learner's target network.

    Raises:
        ValueError: the base is no compact policy, nothing guides, or a cost names what the base does not have.
    """

    KIND = "guided"
    strength: Tensor

    def __init__(self, base: BasePolicy, config: GuidanceConfig, critic: Any = None) -> None:
        super().__init__()
        self.config, self.rows = config, need_compact(base, "guidance").spec.n_action_steps
        costs = config.all_costs
        if not costs and critic is None:
            raise ValueError(
                "guided.costs=[] with guided.value_weight=0: nothing guides; accepted is one cost, or value_weight > 0"
            )
        self._costs = ChunkCosts(base, costs, config.path) if costs else None  # type: ignore[arg-type]
        if critic is not None:
            self.critic: nn.Module = critic.requires_grad_(False)
        self.register_buffer("strength", torch.tensor(config.strength))  # a head without a critic must publish something
        self.prior_draws, self.exploration_dim = config.particles, 0

    def reward_and_slope(self, conditioning: Tensor, chunk: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """R (B,) and dR/dchunk (B, H, A) for clamped normalised chunks."""
        value, slope = chunk.new_zeros(len(chunk)), torch.zeros_like(chunk)
        if self._costs is not None:
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_(True)
                reward = self._costs.reward(conditioning, leaf, reference)
                if reward.requires_grad:  # costs of the observation alone have no slope
                    (slope,) = torch.autograd.grad(reward.sum(), leaf)
            value = value + reward.detach()
        if self.config.value_weight > 0:
            c, x = self.config, torch.cat([conditioning, chunk[:, : self.rows].flatten(1)], dim=-1)
            q, dq = self.critic.reduced_input_grad(x, c.value_reduce, k=c.value_k, columns=slice(conditioning.shape[1], None))
            slope = slope.clone()
            slope[:, : self.rows] += c.value_weight * dq.unflatten(1, (self.rows, -1))
            value = value + c.value_weight * q
        return value, slope

    def _climb(
        self, base: CompactPolicy, conditioning: Tensor, i: int, x: Tensor, condition: Tensor, times: Tensor, reference: Tensor
    ) -> tuple[Tensor, Tensor]:
        """R (B,) at the state before step ``i``, and its limited gradient (B, H*A)."""
        shape = reference.shape[1:]
        whole = self.config.through == "denoiser"
        with torch.set_grad_enabled(whole):
            leaf = x.detach().requires_grad_(whole)
            clean = base.clean_estimate(i, leaf, condition, times)
        value, slope = self.reward_and_slope(conditioning, clean.detach().clamp(-1.0, 1.0).unflatten(1, shape), reference)
        g = slope.flatten(1)
        if whole and clean is not leaf:
            (g,) = torch.autograd.grad(clean, leaf, g)
        return value, g / (g.norm(dim=1, keepdim=True) / self.config.gradient_max).clamp_min(1.0)

    def _strength(self, base: CompactPolicy, i: int) -> float:
        return self.config.strength * (1.0 if self.config.schedule == "constant" else base.level(i)[1])

    @torch.no_grad()
    def guide(self, conditioning: Tensor, base: BasePolicy, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The one rule, for episodes and targets alike.

        Args:
            noise: (B, H_w, A_w), or (B, P, H_w, A_w) with P > 1 particles.

        Returns: the chunk (B, H, A), the base's own chunk of the same noise, which particle (B,), and its reward (B,).
        """
        assert isinstance(base, CompactPolicy)
        c, p, b = self.config, self.config.particles, len(conditioning)
        drawn = noise.flatten(0, 1) if p > 1 else noise
        cond = conditioning.repeat_interleave(p, dim=0) if p > 1 else conditioning
        own = base.sample(cond, drawn)
        condition, times = base.chain_inputs(cond)
        x, before = drawn.flatten(1), None
        origin = torch.arange(p, device=x.device).expand(b, p)
        for i in range(base.config.num_steps):
            x = base.chain_step(i, x, condition, times)
            if i < c.from_step:
                continue
            amount = self._strength(base, i + 1)
            for _ in range(c.inner_steps if amount else 0):
                value, g = self._climb(base, cond, i + 1, x, condition, times, own)
                x = x + amount * g
            due = c.resample_every and (i + 1) % c.resample_every == 0 and i + 1 < base.config.num_steps
            if due:
                value, _ = self._climb(base, cond, i + 1, x, condition, times, own)
                now = value.unflatten(0, (b, p))
                index = systematic_resample((now - (0 if before is None else before)) / c.resample_temperature)
                rows = (index + p * torch.arange(b, device=x.device)[:, None]).flatten()
                x, own, origin = x[rows], own[rows], origin.gather(1, index)
                before = now.gather(1, index)
        chunk = x.clamp(-1.0, 1.0).unflatten(1, own.shape[1:])
        chunk = torch.minimum(torch.maximum(chunk, own - c.max_displacement), own + c.max_displacement)
        value, _ = self.reward_and_slope(cond, chunk, own)
        best = value.unflatten(0, (b, p)).argmax(1)
        rows = best + p * torch.arange(b, device=x.device)
        return chunk[rows], own[rows], origin.gather(1, best[:, None]).squeeze(1), value[rows]

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        assert noise is not None
        chunk, own, which, value = self.guide(conditioning, base, noise)
        several = self.config.particles > 1
        return Proposal(
            chunk=chunk, chunk_base=own, noise=noise[torch.arange(len(own), device=noise.device), which] if several else noise,
            log_prob=torch.full((len(chunk),), float("nan"), device=chunk.device), candidate_index=which if several else None,
            info={"reward": value, "displacement": (chunk - own).abs().amax((1, 2))},
        )  # fmt: skip


def corrected(base: CompactPolicy, conditioning: Tensor, chunk: Tensor, config: ScoreCorrectionConfig) -> Tensor:
    """CDSA's filter: a <- clamp(a + rate * score(a)), ``steps`` times; (B, H, A) normalised. No steps or no rate: the chunk itself."""
    if config.steps == 0 or config.rate == 0.0:
        return chunk
    free = torch.ones(chunk.shape[2], dtype=torch.bool, device=chunk.device)
    if not config.gripper:
        free = ~torch.from_numpy(base.spec.action.gripper_mask).to(chunk.device)
    a = chunk
    for _ in range(config.steps):
        moved = a + config.rate * base.score(a.flatten(1), conditioning, config.level).unflatten(1, chunk.shape[1:])
        a = torch.where(free, moved.clamp(-1.0, 1.0), a)
    return a


class ScoreCorrectedHead(Head):
    """Whatever another head does, pulled towards what the base was trained on. ``inner`` None filters the base itself."""

    KIND = "score_corrected"
    rate: Tensor

    def __init__(self, base: BasePolicy, config: ScoreCorrectionConfig, inner: Head | None = None) -> None:
        super().__init__()
        need_compact(base, "score correction")
        self.config = config
        self.inner = inner
        self.register_buffer("rate", torch.tensor(config.rate))
        self.prior_draws = 1 if inner is None else inner.prior_draws
        self.exploration_dim = 0 if inner is None else inner.exploration_dim

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        assert isinstance(base, CompactPolicy)
        assert noise is not None
        if self.inner is None:
            chunk = base.sample(conditioning, noise)
            nan = torch.full((len(chunk),), float("nan"), device=chunk.device)
            proposal = Proposal(chunk=chunk, chunk_base=chunk, noise=noise, log_prob=nan)
        else:
            proposal = self.inner.propose(conditioning, base, noise, exploration, mode)
        before = proposal.chunk
        proposal.chunk = corrected(base, conditioning, before, self.config)
        proposal.info["displacement"] = (proposal.chunk - before).abs().amax((1, 2))
        return proposal
