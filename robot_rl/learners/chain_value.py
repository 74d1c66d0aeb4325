"""A value of half-denoised chunks, climbed one denoising step at a time (VARD).

With x_0 ... x_S a chain from noise to chunk, G what the decision's episode still earned, and std e_k the noise that step k drew::

    L_V = 0.5 mean_k (V(s, x_k, k / S) - G)^2
    L_θ = -mean_k V(s, mean_θ(x_k) + std e_k, (k + 1) / S) + kl_base sum_k |mean_θ(x_k) - mean_base(x_k)|^2 / (2 std^2)

The gradient of L_θ goes through one step of the sampler each; rewards need not be differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robot_rl.heads.chain import ChainHead
from robot_rl.learners.config import OnPolicyConfig
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.nn.flat import FlatAdam
from robot_rl.policies.base import BasePolicy

Metrics = dict[str, Tensor]


class ChainValue:
    """V(s, x, t) and the loss of the chain that climbs it."""

    def __init__(self, base: BasePolicy, head: ChainHead, config: OnPolicyConfig, device: torch.device | str) -> None:
        self.base, self.head, self.config = base, head, config
        init = torch.Generator().manual_seed(config.seed + 2)
        width = base.spec.conditioning_dim + head.width + 1
        self.network = CriticEnsemble(1, width, config.value_hidden, generator=init, device=device)
        self.optimizer = FlatAdam(self.network.flat, config.value_lr)

    @staticmethod
    def inputs(conditioning: Tensor, states: Tensor, first: int, steps: int) -> Tensor:
        """(B, C) and chain states (B, K, H*A), the first of which is number ``first`` of ``steps``, to (B*K, C + H*A + 1)."""
        count = states.shape[1]
        time = (torch.arange(count, dtype=states.dtype, device=states.device) + first) / steps
        parts = [conditioning.unsqueeze(1).expand(-1, count, -1), states, time[None, :, None].expand(len(states), -1, 1)]
        return torch.cat(parts, dim=-1).flatten(0, 1)

    def fit(self, conditioning: Tensor, trace: Tensor, earned: Tensor) -> Metrics:
        """One regression step of all states of chains (B, S + 1, H*A) on what was earned (B,)."""
        states = trace.shape[1]
        x = self.inputs(conditioning, trace, 0, states - 1)
        loss = self.network.loss_and_grad(x, earned.repeat_interleave(states)).loss
        self.optimizer.step()
        return {"value/loss": loss}

    def loss(self, conditioning: Tensor, trace: Tensor, noise: Tensor) -> tuple[Tensor, Metrics]:
        """L_θ for chains (B, S + 1, H*A) whose steps drew ``noise`` (B, S, H*A); differentiable in the head's weights."""
        mean = self.head.means(self.head.policy, conditioning, trace)
        steps = mean.shape[1]
        value = self.network(self.inputs(conditioning, mean + noise, 1, steps))[0].mean()
        with torch.no_grad():
            reference = self.head.means(self.base, conditioning, trace)
        divergence = ((mean - reference).square().sum((1, 2)) / (2 * self.head.config.std**2)).mean()
        loss = -value + self.config.kl_base * divergence
        seen = divergence.detach()
        return loss, {"actor/loss": loss.detach(), "actor/value": value.detach(), "actor/kl": seen, "actor/kl_base": seen}
