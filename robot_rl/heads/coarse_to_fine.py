"""Coarse-to-fine Q-networks: no actor, the critic is zoomed into level by level (CQN, Seo et al. 2024; CQN-AS, Seo and Abbeel 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.config import CoarseToFineConfig
from robot_rl.policies.base import BasePolicy


class Stream(nn.Module):
    """Half of a duelling network: two layers with LayerNorm, a recurrent one over rows where asked for, and a zero last layer."""

    def __init__(self, inputs: int, hidden: int, out: int, recurrent: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        self.over_rows = nn.GRU(hidden, hidden, batch_first=True) if recurrent else None
        self.last = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, inputs) to (B, rows, out)."""
        h = nn.functional.silu(self.norms[0](self.first(x)))
        h = nn.functional.silu(self.norms[1](self.second(h)))
        if self.over_rows is not None:
            h = self.over_rows(h)[0]
        return self.last(h)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Uniform within 1/sqrt(in), the last layer zero; drawn from ``generator`` alone."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                bound = p.shape[1] ** -0.5
                p.copy_(torch.rand(p.shape, generator=generator) * 2 * bound - bound)
            elif not name.startswith("norms"):
                p.zero_()
        self.last.weight.zero_()


class ZoomNetwork(nn.Module):
    """Distributions of value for every bin of every entry at one level, given the interval's centre so far."""

    def __init__(self, features: int, rows: int, dims: int, config: CoarseToFineConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.rows, self.dims, self.config = rows, dims, config
        self.steps = rows if config.sequence else 1  # rows read one by one, or all of them as one
        self.width = dims if config.sequence else rows * dims
        inputs = features + self.width + config.levels + (rows if config.sequence else 0)
        self.advantage = Stream(inputs, config.hidden, self.width * config.bins * config.atoms, config.sequence)
        self.value = Stream(inputs, config.hidden, self.width * config.atoms, config.sequence)
        for stream in (self.advantage, self.value):
            stream.reset(generator)

    def forward(self, conditioning: Tensor, centre: Tensor, level: int) -> Tensor:
        """(B, C) states and interval centres (B, n*A) to logits (B, n*A, bins, atoms)."""
        b, c = len(conditioning), self.config
        parts = [
            conditioning.unsqueeze(1).expand(-1, self.steps, -1), centre.view(b, self.steps, self.width),
            torch.eye(c.levels).to(centre)[level].expand(b, self.steps, -1),
        ]  # fmt: skip
        if c.sequence:
            parts.append(torch.eye(self.rows).to(centre).expand(b, -1, -1))
        x = torch.cat(parts, dim=-1)
        advantage = self.advantage(x).view(b, -1, c.bins, c.atoms)
        return self.value(x).view(b, -1, 1, c.atoms) + advantage - advantage.mean(2, keepdim=True)


class CoarseToFineHead(Head):
    """Acts by zooming with its published network, which is the learner's target: one rule and one network in episodes and targets.

    A policy from scratch over the executed rows; the base plays the warm-up and lends its encoder. A fresh one acts at random.
    """

    KIND = "coarse_to_fine"
    support: Tensor

    def __init__(self, base: BasePolicy, config: CoarseToFineConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        spec, self.config = base.spec, config
        self.rows, self.dims = spec.n_action_steps, spec.action.dim
        init = generator or torch.Generator().manual_seed(0)
        self.network = ZoomNetwork(spec.conditioning_dim, self.rows, self.dims, config, init).requires_grad_(False)
        support = torch.linspace(config.value_min, config.value_max, config.atoms)
        self.register_buffer("support", support, persistent=False)
        self.exploration_dim = self.rows * self.dims

    def values(self, logits: Tensor) -> Tensor:
        """Mean of each distribution: (..., atoms) to (...)."""
        return logits.softmax(-1) @ self.support.to(logits.dtype)

    def zoom(self, conditioning: Tensor, network: ZoomNetwork | None = None) -> Tensor:
        """(B, n*A) the entries that the network values most, level by level."""
        network = self.network if network is None else network
        low = torch.full((len(conditioning), self.rows * self.dims), -1.0, dtype=conditioning.dtype, device=conditioning.device)
        width = 2.0
        for level in range(self.config.levels):
            best = self.values(network(conditioning, low + width / 2, level)).argmax(-1)
            width /= self.config.bins
            low = low + best * width
        return low + width / 2

    def encode(self, entries: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(B, d) in [-1, 1] to what each level is asked about: interval centres (B, d), and bins (B, d) int64 inside them."""
        low, width = torch.full_like(entries, -1.0), 2.0
        centres, bins = [], []
        for _ in range(self.config.levels):
            centres.append(low + width / 2)
            width /= self.config.bins
            chosen = ((entries - low) / width).floor().clamp(0, self.config.bins - 1)
            bins.append(chosen.long())
            low = low + chosen * width
        return centres, bins

    def rounded(self, entries: Tensor) -> Tensor:
        """(B, d) to the centres of their finest bins."""
        centres, bins = self.encode(entries)
        width = 2.0 / self.config.bins**self.config.levels
        return centres[-1] + (bins[-1] - (self.config.bins - 1) / 2) * width

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        entries = self.zoom(conditioning)
        if mode == "explore":
            if exploration is None:
                raise ValueError("explore mode needs exploration draws (B, exploration_dim)")
            entries = self.rounded((entries + self.config.exploration_std * exploration).clamp(-1.0, 1.0))
        chunk_base = base.sample(conditioning, noise)
        chunk = torch.cat([entries.unflatten(1, (self.rows, self.dims)), chunk_base[:, self.rows :]], dim=1)
        nan = torch.full((len(chunk),), float("nan"), device=chunk.device)
        return Proposal(chunk=chunk, chunk_base=chunk_base, noise=noise, log_prob=nan)
