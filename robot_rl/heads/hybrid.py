"""A policy from scratch whose gripper is a choice, not a number (HIL-SERL, Luo et al. 2024)."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from torch import Tensor

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.config import HybridPolicyConfig
from robot_rl.nn.actor import GaussianTanhActor, squashed_log_prob
from robot_rl.nn.mlp import StackedMLP
from robot_rl.policies.base import BasePolicy


def gripper_table(values: tuple[float, ...], grippers: int) -> np.ndarray:
    """(V^G, G): every combination of what G grippers may be told."""
    return np.array(list(product(values, repeat=grippers)), np.float32)


def nearest_choice(command: np.ndarray, values: tuple[float, ...]) -> np.ndarray:
    """(..., G) normalised commands to the row of :func:`gripper_table` that is nearest, dimension by dimension."""
    index = np.abs(command[..., None] - np.array(values, command.dtype)).argmin(-1)
    places = len(values) ** np.arange(command.shape[-1] - 1, -1, -1)
    return (index * places).sum(-1).astype(np.int64)


class HybridPolicyHead(Head):
    """u ~ tanh N(mean(s), std(s)) are the arm's rows; the grippers get the choice that ``gripper`` values most, for all rows.

    ``gripper`` (s) is (1, B, V^G) values; it is published with the head, so acting and targets choose with one network. A fresh
    head does not act like the base; the promotion gate keeps the base acting until it is better.

    Attributes:
        arm, fingers: which action dimensions are continuous, and which are chosen.
        table: (V^G, G) what each choice tells the grippers.

    Raises:
        ValueError: the robot has no gripper, or nothing but grippers.
    """

    KIND = "hybrid_policy"
    table: Tensor

    def __init__(
        self,
        base: BasePolicy,
        config: HybridPolicyConfig,
        values: tuple[float, ...] = (-1.0, 1.0),
        gripper_hidden: tuple[int, ...] = (256, 256),
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        spec, self.config = base.spec, config
        mask = spec.action.gripper_mask
        if not mask.any() or mask.all():
            raise ValueError(
                f"a hybrid_policy head needs an arm and a gripper; this action is {list(spec.action.kind)}. Accepted are actions "
                "with some gripper dimensions, or a chunk_policy head"
            )
        self.rows, self.dims = spec.n_action_steps, spec.action.dim
        self.arm, self.fingers = (torch.from_numpy(np.flatnonzero(m)) for m in (~mask, mask))
        self.register_buffer("table", torch.from_numpy(gripper_table(values, int(mask.sum()))), persistent=False)
        self.actor = GaussianTanhActor(
            spec.conditioning_dim, self.rows * len(self.arm), config.hidden, layer_norm=config.layer_norm, last_scale=1e-2,
            generator=generator,
        )  # fmt: skip
        self.gripper = StackedMLP(
            1, spec.conditioning_dim, len(self.table), gripper_hidden, layer_norm=True, generator=generator
        )
        self.exploration_dim = self.actor.action_dim + (2 if config.gripper_epsilon else 0)

    def to_rows(self, u: Tensor) -> Tensor:
        """Unit actions (B, n*A_arm) to the arm's rows (B, n, A_arm)."""
        return u.unflatten(1, (self.rows, len(self.arm)))

    def choose(self, conditioning: Tensor) -> Tensor:
        """(B,) the choice of greatest value: the one rule, in episodes and in targets."""
        return self.gripper(conditioning)[0].argmax(-1)

    def choice_of(self, rows: Tensor) -> Tensor:
        """(B, n, A) normalised rows to the choice (B,) nearest to their first row's grippers."""
        first = rows[:, 0, self.fingers.to(rows.device)]
        return (first.unsqueeze(1) - self.table.to(first.dtype)).abs().sum(-1).argmin(-1)

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        mean, log_std = self.actor(conditioning)
        width, choice = self.actor.action_dim, self.choose(conditioning)
        if mode == "eval":
            draws = torch.zeros_like(mean)
        elif exploration is None:
            raise ValueError("explore mode needs exploration draws (B, exploration_dim)")
        else:
            draws = exploration[:, :width]
            if self.config.gripper_epsilon:
                coin, lot = torch.special.ndtr(exploration[:, width:]).unbind(1)
                other = (lot * len(self.table)).long().clamp(max=len(self.table) - 1)
                choice = torch.where(coin < self.config.gripper_epsilon, other, choice)
        x = mean + log_std.exp() * draws
        chunk_base = base.sample(conditioning, noise)
        rows = chunk_base[:, : self.rows].clone()
        rows[..., self.arm] = self.to_rows(torch.tanh(x)).to(rows)
        rows[..., self.fingers] = self.table[choice].unsqueeze(1).expand(-1, self.rows, -1).to(rows)
        chunk = torch.cat([rows, chunk_base[:, self.rows :]], dim=1)
        return Proposal(chunk=chunk, chunk_base=chunk_base, noise=noise, log_prob=squashed_log_prob(draws, log_std, x))
