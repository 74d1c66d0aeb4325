"""A critic that also values the beginnings of a chunk: a causal transformer over its rows (CO-RFT's critic, 2025).

    Q_j(s, a_1..a_j), j = 1..n          y_j = sum_{i<j} gamma^i r_i + disc_j reduce(Q_target,n(s_{t+j}, a'))
    L = 0.5 sum_heads sum_bj w_bj (Q_j - y_j)^2 / sum_bj w_bj

A window that was cut short still trains the beginnings that ran. What acts and what targets read is Q_n, the whole chunk's value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robot_rl.learners.batch import Batch
from robot_rl.learners.config import OffPolicyConfig, Reduction
from robot_rl.learners.critic_rules import _actions
from robot_rl.learners.ensemble import CriticLoss
from robot_rl.learners.part_configs import PrefixConfig
from robot_rl.learners.reduce import reduce
from robot_rl.nn.flat import FlatParameters
from robot_rl.nn.grad import without_grad


class Prefixes(NamedTuple):
    """reward, discount, weight (B, n) of every beginning of a window; next_conditioning (B, n, C) after it."""

    reward: Tensor
    discount: Tensor
    next_conditioning: Tensor
    weight: Tensor


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a LayerNorm and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.mix(self.norms[0](x)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(nn.functional.gelu(self.wide(self.norms[1](x))))


class PrefixNetwork(nn.Module):
    """(B, C) and (B, n, A) to the values (B, n) of every beginning."""

    def __init__(self, features: int, rows: int, dims: int, config: PrefixConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.state, self.row = nn.Linear(features, config.width), nn.Linear(dims, config.width)
        self.place = nn.Parameter(torch.zeros(rows + 1, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm, self.last = nn.LayerNorm(config.width), nn.Linear(config.width, 1)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() > 1:  # from the generator alone
                    bound = p.shape[1] ** -0.5
                    p.copy_(torch.rand(p.shape, generator=generator, dtype=torch.float32) * 2 * bound - bound)
                elif "norm" not in name:
                    p.zero_()

    def forward(self, conditioning: Tensor, rows: Tensor) -> Tensor:
        x = torch.cat([self.state(conditioning).unsqueeze(1), self.row(rows)], dim=1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x))[:, 1:, 0]


class PrefixCritic(nn.Module):
    """N such networks with the interface of a :class:`CriticEnsemble`, which values the whole chunk."""

    def __init__(
        self, n_heads: int, features: int, rows: int, dims: int, config: PrefixConfig, *, generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__()
        self.n, self.features, self.shape = n_heads, features, (rows, dims)
        self.networks = nn.ModuleList(PrefixNetwork(features, rows, dims, config, generator) for _ in range(n_heads))
        self.to(device)
        self.flat = FlatParameters(self)

    def make_target(self) -> PrefixCritic:
        """A frozen copy."""
        target = deepcopy(self)
        target.flat.zero_grad()
        return target.requires_grad_(False).eval()

    def prefixes(self, x: Tensor) -> Tensor:
        """(B, C + n*A) to (N, B, n); differentiable."""
        c, rows = x[:, : self.features], x[:, self.features :].unflatten(1, self.shape)
        return torch.stack([network(c, rows) for network in self.networks])

    def forward(self, x: Tensor) -> Tensor:
        """(N, B) of whole chunks."""
        return self.prefixes(x)[..., -1]

    @without_grad
    def value(self, x: Tensor, heads: Tensor | None = None) -> Tensor:
        q = self(x)
        return q if heads is None else q.index_select(0, heads)

    @without_grad
    def reduced_value(
        self, x: Tensor, how: Reduction, generator: torch.Generator | None = None, *, k: Tensor | float = 1.0
    ) -> Tensor:
        return reduce(self(x), how, generator, k=k)

    def loss_and_grad(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> CriticLoss:
        """Whole chunks regressed on y (B,), or every beginning on y (B, n) with weight (B, n); overwrites ``flat.grad``."""
        self.flat.zero_grad()
        with torch.enable_grad():
            q = self.prefixes(x) if y.dim() == 2 else self(x)
            weight = torch.ones_like(y) if weight is None else weight
            share = weight / weight.sum().clamp_min(1.0)
            (0.5 * share * (q - y).square()).sum().backward()
        q = q.detach()
        return CriticLoss(q, share * (q - y), y)

    def input_grad(
        self, x: Tensor, dq: Tensor | Callable[[Tensor], Tensor], columns: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`CriticEnsemble.input_grad` for a shared input; ``flat.grad`` is left alone."""
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            q = self(leaf)
            (slope,) = torch.autograd.grad(q, leaf, dq(q.detach()) if callable(dq) else dq)
        return q.detach(), slope if columns is None else slope[:, columns]

    def add_conservative(
        self, objective: Any, batch: Batch, settings: OffPolicyConfig, calibrated: bool, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Add the gradient of :func:`~robot_rl.learners.critic_rules.add_conservative_gradient`'s term, over whole chunks."""
        config = settings.conservative
        samples, density, from_policy = _actions(objective, batch, config.samples, generator)
        data, count, t = objective.critic_input(batch), samples.shape[1], config.temperature
        weight = batch.weight / batch.weight.sum().clamp_min(1.0)
        with torch.enable_grad():
            states = batch.conditioning.repeat_interleave(count, 0)
            q = self(torch.cat([states, samples.flatten(0, 1)], dim=-1)).unflatten(1, (-1, count))
            if calibrated:
                if batch.episode_return is None:
                    raise ValueError("calql needs episode returns: build the buffer with the extra feature 'episode_return'")
                known = torch.ones_like(batch.reward) if batch.return_known is None else batch.return_known
                bound = torch.where(known > 0, batch.episode_return, torch.full_like(batch.episode_return, -math.inf))
                q = torch.where(from_policy, torch.maximum(q, bound[None, :, None]), q)
            q_data = self(data)
            if density is None:
                logits = torch.cat([q, q_data.unsqueeze(-1)], dim=-1) / t
                offset = -t * math.log(count + 1)
            else:
                logits, offset = (q - density) / t, 0.0
            gap = t * logits.logsumexp(-1) + offset - q_data
            (0.5 * config.weight * (weight * gap).sum()).backward()
        return {"critic/gap": (weight * gap.detach()).sum(-1).mean()}
