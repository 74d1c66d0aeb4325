"""The denoising chain as a stochastic policy: every sampling step is a decision (DPPO, Ren et al. 2025; ReinFlow, Zhang et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from robot_rl.heads.base import Mode, Proposal
from robot_rl.heads.config import ChainConfig
from robot_rl.heads.fine_tuned import WHOLE, FineTunedHead
from robot_rl.heads.guidance import need_compact
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.config import AdapterConfig


class ChainHead(FineTunedHead):
    """x_K ~ N(0, I); x_{k-1} = step_k(x_k) + std * e in ``explore`` mode, x_{k-1} = step_k(x_k) in ``eval`` mode.

    A fresh one in ``eval`` mode is the base bit for bit. ``exploration`` holds the e of the trained steps, noisiest first.

    Raises:
        ValueError: not a compact policy, or more trained steps than it samples in.
    """

    KIND, continues = "chain", False  # it walks its own chain

    def __init__(
        self, base: BasePolicy, config: ChainConfig, adapter: AdapterConfig = WHOLE, *, generator: torch.Generator | None = None
    ) -> None:
        need_compact(base, "learning from denoising steps")
        super().__init__(base, adapter, generator=generator)
        steps = self.policy.config.num_steps
        if config.trained_steps > steps:
            raise ValueError(f"trained_steps={config.trained_steps}: accepted are 0 to {steps}, the base's sampling steps")
        self.config, self.steps = config, steps
        self.trained = config.trained_steps or steps
        self.width = self.policy.config.horizon * self.policy.action.dim
        self.exploration_dim = self.trained * self.width

    @torch.no_grad()
    def chain(self, conditioning: Tensor, base: BasePolicy, noise: Tensor, exploration: Tensor | None) -> Tensor:
        """(B, K_ft + 1, H*A) what the trained steps go through, the last one unclamped; ``exploration`` None: no noise."""
        x = noise.flatten(1)
        condition, times = base.chain_inputs(conditioning)  # type: ignore[attr-defined]
        for i in range(self.steps - self.trained):
            x = base.chain_step(i, x, condition, times)  # type: ignore[attr-defined]
        condition, times = self.policy.chain_inputs(conditioning)
        states = [x]
        for j in range(self.trained):
            x = self.policy.chain_step(self.steps - self.trained + j, x, condition, times)
            if exploration is not None:
                x = x + self.config.std * exploration[:, j * self.width : (j + 1) * self.width]
            states.append(x)
        return torch.stack(states, dim=1)

    def means(self, policy: object, conditioning: Tensor, chain: Tensor) -> Tensor:
        """(B, K_ft, H*A) where ``policy`` would step to from each state of a chain, without noise; differentiable."""
        condition, times = policy.chain_inputs(conditioning)  # type: ignore[attr-defined]
        first = self.steps - self.trained
        step = policy.chain_step  # type: ignore[attr-defined]
        return torch.stack([step(first + j, chain[:, j], condition, times) for j in range(self.trained)], dim=1)

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        assert noise is not None
        if mode == "explore" and exploration is None:
            raise ValueError("explore mode needs exploration draws (B, exploration_dim)")
        last = self.chain(conditioning, base, noise, exploration if mode == "explore" else None)[:, -1]
        return Proposal(
            chunk=last.clamp(-1.0, 1.0).unflatten(1, noise.shape[1:]), chunk_base=base.sample(conditioning, noise), noise=noise,
            log_prob=torch.full((len(noise),), float("nan"), device=noise.device),
        )  # fmt: skip
