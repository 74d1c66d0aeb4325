"""Training a copy of the base on by imitation while a head learns beside it (EXPO, Dong et al. 2025; Q-chunking, Li et al. 2025).

loss = Σ_bh weight_bh l_bh / Σ_bh weight_bh        l: the policy's own denoising loss, mean over action dimensions
acting <- (1 - ema) acting + ema trained           what the head samples from; the frozen base is never touched
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.learners.config import BaseUpdateConfig
from robot_rl.learners.row_class import SUCCEEDED
from robot_rl.learners.updates import frozen_flat, load_network_state, network_state
from robot_rl.nn.flat import FlatAdam, FlatParameters, polyak_
from robot_rl.policies.base import BasePolicy
from robot_rl.replay.batches import ChunkBatch


class CloneRows(NamedTuple):
    """B chunks of H normalised rows to imitate: conditioning (B, C), action (B, H, A), weight (B, H)."""

    conditioning: Tensor
    action: Tensor
    weight: Tensor


def clone_rows(drawn: ChunkBatch, extra: dict[str, np.ndarray], config: BaseUpdateConfig, device: torch.device) -> CloneRows:
    """Rows that ran and may be imitated weigh 1; with ``rows: success`` only those of successes."""
    weight = drawn.mask.astype(np.float32)
    if config.rows == "success":
        weight = weight * (extra[SUCCEEDED] > 0)
    send = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device)  # noqa: E731
    return CloneRows(send(drawn.conditioning[:, 0]), send(drawn.action), send(weight.astype(np.float32)))


class BaseCloner:
    """The copy that is trained, its optimiser, and the averaged copy that acts (a head's ``own``; None: nobody acts with it).

    Raises:
        ValueError: the base's weights are not ours to train (see :class:`FineTunedHead`).
    """

    def __init__(
        self, base: BasePolicy, own: FineTunedHead | None, config: BaseUpdateConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.online = FineTunedHead(base).to(torch.device(device))
        self.online.denoiser.requires_grad_(True)
        self.flat = FlatParameters(self.online.denoiser)
        self.optimizer = FlatAdam(self.flat, config.lr, weight_decay=config.weight_decay)
        self.acting = None if own is None else frozen_flat(own.denoiser)
        self.steps = 0

    def learning_rate(self) -> float:
        """Cosine from ``lr`` to 0 over ``cosine_steps``; constant without them."""
        c = self.config
        if not c.cosine_steps:
            return c.lr
        return c.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, self.steps / c.cosine_steps)))

    def step(self, rows: CloneRows, generator: torch.Generator) -> dict[str, Tensor]:
        """One gradient step of the trained copy; the acting one follows."""
        self.flat.zero_grad()
        with torch.enable_grad():
            per_row = self.online.policy.denoising_loss(rows.conditioning, rows.action, generator).mean(-1)
            # Where nothing counts (no success yet) the loss and its gradient are zero.
            loss = (rows.weight * per_row).sum() / rows.weight.sum().clamp_min(1e-12)
            loss.backward()
        self.optimizer.lr = self.learning_rate()
        if bool(rows.weight.any()):
            self.optimizer.step()
        self.steps += 1
        if self.acting is not None:
            polyak_(self.acting, self.flat, self.config.ema)
        return {"base/loss": loss.detach(), "base/weight": rows.weight.mean()}

    def full_state(self) -> dict[str, Any]:
        return {"online": network_state(self.online, self.optimizer), "steps": torch.tensor(self.steps)}

    def load_full_state(self, state: dict[str, Any]) -> None:
        load_network_state(self.online, self.optimizer, state["online"])
        self.steps = int(state["steps"])
