"""Chunked temporal difference with a one-step policy (QC-FQL, Li et al. 2025; CO-RFT's calibrated form is its critic's loss).

    y    = R + disc * reduce(Q_target(s', clamp(f(s', w'))))
    L_f  = weight * mean((f(s, w) - teacher(s, w))^2) - mean(reduce(Q(s, clamp(f(s, w)))))        the second with actor steps only

The teacher is the frozen base, or the copy of it that is cloned on (``base_update``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robot_rl.heads.one_step import OneStepHead
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.objectives import Metrics
from robot_rl.learners.support import Support, penalised
from robot_rl.learners.updates import climb
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.grad import without_grad
from robot_rl.policies.base import BasePolicy


class OneStep:
    """Distils always, so that the head acts like its teacher before it is released; climbs with actor steps."""

    support: Support | None = None

    def __init__(
        self, base: BasePolicy, head: OneStepHead, config: OffPolicyConfig, generator: torch.Generator, init: torch.Generator,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.base, self.head, self.config, self.generator = base, head, config, generator
        self.teacher: BasePolicy = base
        self.optimizer = FlatAdam(head.actor.flat, config.actor_lr)
        self.features = base.spec.conditioning_dim
        self.critic_input_dim = self.features + head.rows * head.dims

    def prior(self, batch: int) -> Tensor:
        assert self.base.spec.noise_shape is not None
        return torch.randn((batch, *self.base.spec.noise_shape), generator=self.generator, device=self.generator.device)

    def critic_input(self, batch: Batch) -> Tensor:
        return torch.cat([batch.conditioning, batch.action.flatten(1)], dim=-1)

    @without_grad
    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        c, head = batch.next_conditioning, self.head
        noise = self.prior(len(c))
        if follow_base:
            rows = self.base.sample(c, noise)[:, : head.rows]
        else:
            rows = head.to_rows(head.actor(head.features(c, noise))[0])
        return torch.cat([c, rows.flatten(1)], dim=-1), torch.zeros(len(c), device=c.device)

    @without_grad
    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        c, head, actor = batch.conditioning, self.head, self.head.actor
        noise = self.prior(len(c))
        taught = self.teacher.sample(c, noise)[:, : head.rows].flatten(1)
        tape = actor.tape(len(c))
        raw = actor.run(head.features(c, noise), tape)[0]
        gap = raw - taught
        slope = self.config.distill_weight * 2.0 / gap.numel() * gap
        metrics: Metrics = {"distill/loss": gap.square().mean()}
        if actor_step:
            rows = head.to_rows(raw)
            x = torch.cat([c, rows.flatten(1)], dim=-1)
            value, gradient = climb(critic, x, self.config.actor_reduce, slice(self.features, None), self.generator)
            gradient, found = penalised(self, c, rows, value, gradient)
            slope = slope + gradient * (raw.abs() <= 1.0)
            metrics |= found | {"actor/value": value.mean()}
        actor.backward(tape, slope.unsqueeze(0))
        self.optimizer.step()
        return metrics

    def full_state(self) -> dict[str, Any]:
        return {"actor_optimizer": self.optimizer.state_dict()}

    def load_full_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["actor_optimizer"])
