"""Soft actor-critic for the arm and double Q-learning for the gripper, side by side (HIL-SERL, Luo et al. 2024).

y_arm     = R + disc * reduce(Q_target(s', u'))                                  the gripper is no part of this critic's action
y_gripper = R + penalty * changes + disc * G_target(s')[argmax_g G(s')]
L_gripper = 0.5 wmean((G(s)[g] - y_gripper)^2)                                   over windows inside which g does not change
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from robot_rl.heads.hybrid import HybridPolicyHead
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.gaussian import ChunkSAC
from robot_rl.learners.objectives import Metrics
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.grad import without_grad
from robot_rl.policies.base import BasePolicy


class HybridSAC(ChunkSAC):
    """:class:`ChunkSAC` over the arm's dimensions, and the gripper's critic."""

    head: HybridPolicyHead

    def __init__(
        self, base: BasePolicy, head: HybridPolicyHead, config: OffPolicyConfig, generator: torch.Generator,
        init: torch.Generator, device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(base, head, config, generator, init, device)
        self.critic_input_dim = self.features + self.actor.action_dim
        self.arm = head.arm.to(device)
        self.gripper_target = deepcopy(head.gripper).requires_grad_(False)
        self.gripper_optimizer = FlatAdam(head.gripper.flat, config.gripper.lr)
        self._base_choice: Tensor | None = None

    def rows_of(self, batch: Batch) -> Tensor:
        return batch.action[..., self.arm]

    @without_grad
    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        c = batch.next_conditioning
        if not follow_base:
            self._base_choice = None
            return super().next_input(batch, False)
        rows = self.base_rows(c)
        self._base_choice = self.head.choice_of(rows)
        return self.joined(c, rows[..., self.arm]), torch.zeros(len(c), device=c.device)

    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        return self._fit_gripper(batch) | super().improve(batch, critic, actor_step)

    @without_grad
    def _fit_gripper(self, batch: Batch) -> Metrics:
        if batch.gripper_choice is None or batch.gripper_steady is None or batch.gripper_change is None:
            raise ValueError("hybrid_sac reads gripper facts: build the buffer with learners.facts.columns")
        network, c = self.head.gripper, self.config
        best = self.head.choose(batch.next_conditioning) if self._base_choice is None else self._base_choice
        tape = network.tape(len(batch.reward))
        following = self.gripper_target.run(batch.next_conditioning, tape)[0].gather(1, best[:, None])[:, 0]
        y = batch.reward + c.gripper.penalty * batch.gripper_change + batch.discount * following
        weight = batch.weight * batch.gripper_steady
        share = weight / weight.sum().clamp_min(1.0)
        values = network.run(batch.conditioning, tape)
        taken = batch.gripper_choice.long()[None, :, None]
        error = values.gather(2, taken)[0, :, 0] - y
        network.backward(tape, torch.zeros_like(values).scatter_(2, taken, (share * error)[None, :, None]))
        self.gripper_optimizer.step(self.gripper_target.flat, c.tau)
        return {
            "gripper/loss": 0.5 * (share * error.square()).sum(), "gripper/target": y.mean(),
            "gripper/steady": batch.gripper_steady.mean(), "gripper/changes": batch.gripper_change.mean(),
        }  # fmt: skip

    def full_state(self) -> dict[str, Any]:
        return super().full_state() | {
            "gripper_target": {k: v.clone() for k, v in self.gripper_target.state_dict().items()},
            "gripper_optimizer": self.gripper_optimizer.state_dict(),
        }

    def load_full_state(self, state: dict[str, Any]) -> None:
        super().load_full_state(state)
        self.gripper_target.load_state_dict(state["gripper_target"])
        self.gripper_optimizer.load_state_dict(state["gripper_optimizer"])
