"""On-policy learning of a head from the round that was just played: PPO over noise heads, DPPO over denoising chains, tokens, RLOO.

A decision is S stochastic steps (one for a noise head, K_ft for a denoising chain, a word each for tokens), all with the
decision's advantage::

    ratio  = exp(log p - log p_old) per step             A_k = A * gamma_d^(S - 1 - k)
    L      = -mean(min(ratio A_k, clip(ratio, 1 - eps_k, 1 + eps_k) A_k)) + kl_base * KL(head || base)
    eps_k  = c0 + (c1 - c0) (exp(3 t) - 1) / (exp(3) - 1),  t = k / (S - 1)

Instead of that surrogate, ``reinforce`` takes -mean(sum_k A log p_k) (DPOK), and ``value_gradient`` the module ``chain_value`` (VARD).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from robot_rl.heads.base import Head
from robot_rl.heads.chain import ChainHead
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.token import TokenHead
from robot_rl.learners.chain_value import ChainValue
from robot_rl.learners.config import OnPolicyConfig
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.token_steps import TokenSteps
from robot_rl.learners.updates import load_network_state, network_state
from robot_rl.nn.actor import HALF_LOG_2PI
from robot_rl.nn.flat import FlatAdam, FlatParameters
from robot_rl.policies.base import BasePolicy

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class RoundEpisode:
    """An episode of D decisions, as tensors.

    Attributes:
        conditioning, next_conditioning: (D, C) at a decision and at the next (after the last: the episode's final observation).
        noise: (D, H_w, A_w), or (D, 0) of a base that takes none. exploration: (D, exploration_dim).
        reward: (D,) discounted sum inside a decision. steps: (D,) its m. discount: (D,) gamma^m, 0 after a terminal step.
        success: of the episode. group: episodes of one start share it.
    """

    conditioning: Tensor
    next_conditioning: Tensor
    noise: Tensor
    exploration: Tensor
    reward: Tensor
    steps: Tensor
    discount: Tensor
    success: float
    group: int


def gae(reward: Tensor, discount: Tensor, steps: Tensor, value: Tensor, following: Tensor, gamma: float, lam: float) -> Tensor:
    """(D,) advantages of one episode: delta = R + discount V(s') - V(s); A_t = delta + gamma^m lambda A_{t+1}, nothing after its end."""
    delta = reward + discount * following - value
    advantage, later = torch.empty_like(delta), torch.zeros((), dtype=delta.dtype, device=delta.device)
    for t in range(len(delta) - 1, -1, -1):
        later = delta[t] + gamma ** int(steps[t]) * lam * later
        advantage[t] = later
    return advantage


def rloo(success: list[float], group: list[int]) -> list[float | None]:
    """Per episode K/(K-1) (R - mean of its group); None for episodes of groups that all ended alike."""
    members: dict[int, list[float]] = {}
    for r, g in zip(success, group, strict=True):
        members.setdefault(g, []).append(r)
    out: list[float | None] = []
    for r, g in zip(success, group, strict=True):
        of = members[g]
        same = len(of) < 2 or max(of) == min(of)
        out.append(None if same else len(of) / (len(of) - 1) * (r - sum(of) / len(of)))
    return out


def returns(episode: RoundEpisode) -> Tensor:
    """(D,) what the episode still earned from each decision on: G_t = R_t + discount_t G_{t+1}, nothing after its end."""
    total, later = torch.empty_like(episode.reward), torch.zeros((), dtype=episode.reward.dtype, device=episode.reward.device)
    for t in range(len(total) - 1, -1, -1):
        later = episode.reward[t] + episode.discount[t] * later
        total[t] = later
    return total


def diversity(paths: list[Tensor], scale: float) -> float:
    """Mean over pairs of 1 - exp(-distance / scale); the distance of two paths (D, C) is root mean square, as far as both go."""
    pairs = list(combinations(paths, 2))
    if not pairs:
        return 0.0
    gaps = [(a[: len(b)] - b[: len(a)]).square().mean().sqrt() for a, b in pairs]
    return float(sum(1.0 - torch.exp(-gap / scale) for gap in gaps) / len(gaps))


def polychromic(episodes: list[RoundEpisode], set_size: int, scale: float) -> list[float | None]:
    """Per episode the mean over its sets of f(g) - mean f, f(g) = mean success times diversity, over all sets of ``set_size``
    episodes from one start; None where all sets score alike, or there are too few episodes for one."""
    members: dict[int, list[int]] = {}
    for i, e in enumerate(episodes):
        members.setdefault(e.group, []).append(i)
    out: list[float | None] = [None] * len(episodes)
    for group in members.values():
        sets = list(combinations(group, set_size))
        scores = [
            sum(episodes[i].success for i in g) / set_size * diversity([episodes[i].conditioning for i in g], scale)
            for g in sets
        ]
        if not scores or max(scores) - min(scores) < 1e-12:
            continue
        mean = sum(scores) / len(scores)
        for i in group:
            own = [f - mean for g, f in zip(sets, scores, strict=True) if i in g]
            out[i] = sum(own) / len(own)
    return out


class ChainSteps:
    """Likelihoods of a denoising chain: mean over the executed rows' entries, so that its size does not depend on theirs."""

    def __init__(self, base: BasePolicy, head: ChainHead, config: OnPolicyConfig) -> None:
        self.base, self.head, self.config = base, head, config
        self.rows, self.dims = base.spec.n_action_steps, base.spec.action.dim
        head.denoiser.requires_grad_(True)
        self.flat = FlatParameters(head.denoiser)

    def trace(self, episode: RoundEpisode) -> Tensor:
        """(D, S + 1, H*A) the chain that was played."""
        return self.head.chain(episode.conditioning, self.base, episode.noise, episode.exploration)

    def log_prob(self, conditioning: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) log likelihood per step, and (B,) the divergence from the base summed over steps."""
        std = self.head.config.std
        mean = self.head.means(self.head.policy, conditioning, trace)
        z = (trace[:, 1:] - mean) / std
        entry = (-0.5 * z.square() - math.log(std) - HALF_LOG_2PI).clamp(self.config.log_prob_min, self.config.log_prob_max)
        per_step = entry.unflatten(2, (-1, self.dims))[:, :, : self.rows].mean((2, 3))
        if not self.config.kl_base:
            return per_step, torch.zeros_like(per_step[:, 0])
        with torch.no_grad():
            reference = self.head.means(self.base, conditioning, trace)
        return per_step, (mean - reference).square().sum((1, 2)) / (2 * std**2)


class NoiseSteps:
    """Likelihoods of a noise head's draw before squashing (the squashing cancels in every ratio)."""

    def __init__(self, base: BasePolicy, head: LatentNoiseHead, config: OnPolicyConfig) -> None:
        self.base, self.head, self.config = base, head, config
        self.flat = head.actor.flat

    @torch.no_grad()
    def trace(self, episode: RoundEpisode) -> Tensor:
        """(D, 2, d): the draw x = mean + std e, twice, so that it has the shape of a chain of one step."""
        mean, log_std = self.head.actor(episode.conditioning)
        x = mean + log_std.exp() * episode.exploration
        return torch.stack([x, x], dim=1)

    def log_prob(self, conditioning: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.head.actor(conditioning)
        z = (trace[:, 1] - mean) * (-log_std).exp()
        log_prob = (-0.5 * z.square() - log_std - HALF_LOG_2PI).sum(-1, keepdim=True)
        return log_prob, 0.5 * ((2 * log_std).exp() + mean.square() - 1 - 2 * log_std).sum(-1)


class OnPolicyLearner:
    """Learns from one round at a time; the head that acts is the one that is trained."""

    def __init__(self, base: BasePolicy, head: Head, config: OnPolicyConfig, device: torch.device | str = "cpu") -> None:
        self.base, self.config, self.device = base, config, torch.device(device)
        self.head = head.to(self.device)
        self.stochastic: ChainSteps | NoiseSteps | TokenSteps
        if isinstance(self.head, ChainHead):
            self.stochastic = ChainSteps(base, self.head, config)
        elif isinstance(self.head, LatentNoiseHead):
            self.stochastic = NoiseSteps(base, self.head, config)
        elif isinstance(self.head, TokenHead):
            self.stochastic = TokenSteps(base, self.head, config)
        else:
            raise ValueError(f"algorithm='on_policy' trains a chain, latent_noise or token head; this one is {head.KIND}")
        self.optimizer = FlatAdam(self.stochastic.flat, config.lr, max_grad_norm=config.grad_clip or None)
        self.value: CriticEnsemble | None = None
        if config.advantage == "gae":
            init = torch.Generator().manual_seed(config.seed)
            self.value = CriticEnsemble(1, base.spec.conditioning_dim, config.value_hidden, generator=init, device=self.device)
            self.value_optimizer = FlatAdam(self.value.flat, config.value_lr)
        self.chain_value: ChainValue | None = None
        if config.objective == "value_gradient":
            if not isinstance(self.head, ChainHead):
                raise ValueError(f"objective='value_gradient' climbs a chain's value step by step; this head is {head.KIND}")
            self.chain_value = ChainValue(base, self.head, config, self.device)
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        self.updates = self.actor_updates = self.rounds = 0

    # ---- a round

    def advantages(self, episodes: list[RoundEpisode]) -> tuple[list[int], Tensor, Tensor | None]:
        """Which episodes count, the advantages (N,) of their decisions one after the other, and value targets (N,) of GAE."""
        c = self.config
        if c.advantage == "return":
            return list(range(len(episodes))), torch.cat([returns(e) for e in episodes]), None
        if c.advantage in ("rloo", "polychromic"):
            if c.advantage == "rloo":
                found = rloo([e.success for e in episodes], [e.group for e in episodes])
            else:
                found = polychromic(episodes, c.set_size, c.diversity_scale)
            kept = [i for i, a in enumerate(found) if a is not None]
            parts = [torch.full_like(episodes[i].reward, float(found[i] or 0.0)) for i in kept]
            return kept, torch.cat(parts) if parts else torch.zeros(0, device=self.device), None
        assert self.value is not None
        advantage, target = [], []
        for e in episodes:
            now, following = self.value.value(e.conditioning)[0], self.value.value(e.next_conditioning)[0]
            a = gae(e.reward, e.discount, e.steps, now, following, c.gamma, c.lam)
            advantage.append(a)
            target.append(a + now)
        return list(range(len(episodes))), torch.cat(advantage), torch.cat(target)

    def shaped(self, advantage: Tensor) -> Tensor:
        """GAE's are centred and scaled over the round, then clipped to quantiles; groups' are centred already, returns stay as they are."""
        c = self.config
        if c.advantage == "gae" and len(advantage) > 1:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        if c.advantage_quantile and len(advantage):
            low, high = (torch.quantile(advantage, q) for q in (c.advantage_quantile, 1 - c.advantage_quantile))
            advantage = torch.minimum(torch.maximum(advantage, low), high)
        return advantage

    def learn(self, episodes: list[RoundEpisode], batch_size: int) -> Metrics:
        """All epochs over one round. Metrics are means over its minibatches."""
        kept, advantage, target = self.advantages(episodes)
        chosen = [episodes[i] for i in kept]
        self.rounds += 1
        metrics: dict[str, list[Tensor]] = {"round/decisions": [torch.tensor(float(len(advantage)))]}
        if not chosen:
            return {k: torch.stack(v).mean() for k, v in metrics.items()}
        advantage = self.shaped(advantage)
        conditioning = torch.cat([e.conditioning for e in chosen])
        if isinstance(self.head, ChainHead):
            self.head.adapted.saw(conditioning)
        trace = torch.cat([self.stochastic.trace(e) for e in chosen])
        with torch.no_grad():
            old = torch.cat([
                self.remembered(c, t) for c, t in zip(conditioning.split(batch_size), trace.split(batch_size), strict=True)
            ])  # fmt: skip
        actor = self.rounds > self.config.critic_warmup_rounds
        stopped = False
        for _ in range(self.config.epochs):
            order = torch.randperm(len(advantage), generator=self.generator).to(self.device)
            for rows in order.split(batch_size):
                found: Metrics = {}
                if self.chain_value is not None:
                    found |= self.chain_value.fit(conditioning[rows], trace[rows], advantage[rows])
                if self.value is not None and target is not None:
                    found["value/loss"] = self.value.loss_and_grad(conditioning[rows], target[rows]).loss
                    self.value_optimizer.step()
                if actor and not stopped:
                    found |= self.step(conditioning[rows], trace[rows], old[rows], advantage[rows])
                    stopped = bool(found["actor/kl"] > self.config.target_kl)
                self.updates += 1
                for name, v in found.items():
                    metrics.setdefault(name, []).append(v)
            if stopped and self.value is None and self.chain_value is None:
                break
        return {k: torch.stack(v).mean() for k, v in metrics.items()}

    @torch.no_grad()
    def remembered(self, conditioning: Tensor, trace: Tensor) -> Tensor:
        """What the objective compares with later: log likelihoods (B, S), or for a value's gradient the noise of each step (B, S, H*A)."""
        if self.chain_value is None:
            return self.stochastic.log_prob(conditioning, trace)[0]
        return trace[:, 1:] - self.chain_value.head.means(self.chain_value.head.policy, conditioning, trace)

    def loss(self, conditioning: Tensor, trace: Tensor, old: Tensor, advantage: Tensor) -> tuple[Tensor, Metrics]:
        """The objective on decisions (B,); see the module's formulas."""
        c, steps = self.config, old.shape[1]
        if self.chain_value is not None:
            return self.chain_value.loss(conditioning, trace, old)
        log_prob, divergence = self.stochastic.log_prob(conditioning, trace)
        if c.objective == "reinforce":
            loss = -(advantage[:, None] * log_prob).sum(1).mean() + c.kl_base * divergence.mean()
            found = {"actor/loss": loss.detach(), "actor/kl": (log_prob - old).detach().abs().mean()}
            return loss, found | {"actor/kl_base": divergence.detach().mean()}
        ratio = (log_prob - old).exp()
        k = torch.arange(steps, device=old.device, dtype=old.dtype)
        weighed = advantage[:, None] * c.denoise_gamma ** (steps - 1 - k)
        t = k / max(steps - 1, 1) if steps > 1 else torch.ones_like(k)
        clip = c.clip_start + (c.clip - c.clip_start) * (torch.exp(3 * t) - 1) / (math.exp(3) - 1)
        surrogate = torch.minimum(ratio * weighed, torch.maximum(torch.minimum(ratio, 1 + clip), 1 - clip) * weighed)
        loss = -surrogate.mean() + c.kl_base * divergence.mean()
        with torch.no_grad():
            kl = ((ratio - 1) - (log_prob - old)).mean()
            clipped = ((ratio - 1).abs() > clip).to(ratio.dtype).mean()
        found = {"actor/loss": loss.detach(), "actor/kl": kl, "actor/clipped": clipped}
        return loss, found | {"actor/kl_base": divergence.detach().mean()}

    def step(self, conditioning: Tensor, trace: Tensor, old: Tensor, advantage: Tensor) -> Metrics:
        """One gradient step of the head; none where the divergence has passed the target already."""
        self.stochastic.flat.zero_grad()
        with torch.enable_grad():
            loss, metrics = self.loss(conditioning, trace, old, advantage)
            if not bool(metrics["actor/kl"] > self.config.target_kl):
                loss.backward()
                self.optimizer.step()
                self.actor_updates += 1
        return metrics

    # ---- what every learner has

    def check_finite(self) -> None:
        """Raises FloatingPointError when a parameter is not finite."""
        if not bool(torch.isfinite(self.stochastic.flat.data).all()):
            raise FloatingPointError(f"head parameters are not finite after {self.updates} updates; lower lr or set grad_clip")

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs."""
        state = {
            "head": network_state(self.head, self.optimizer),
            "generator": self.generator.get_state().clone(),
            "counters": torch.tensor([self.updates, self.actor_updates, self.rounds]),
        }
        if self.chain_value is not None:
            state["chain_value"] = network_state(self.chain_value.network, self.chain_value.optimizer)
        return state if self.value is None else state | {"value": network_state(self.value, self.value_optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in place."""
        load_network_state(self.head, self.optimizer, state["head"])
        if self.chain_value is not None:
            load_network_state(self.chain_value.network, self.chain_value.optimizer, state["chain_value"])
        if self.value is not None:
            load_network_state(self.value, self.value_optimizer, state["value"])
        self.generator.set_state(state["generator"].cpu())
        self.updates, self.actor_updates, self.rounds = (int(x) for x in state["counters"])
