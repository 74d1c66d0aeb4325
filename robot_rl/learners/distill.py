"""Distilling several specialised heads into one that reads a code (COMPASS, Liu et al. 2025).

    loss = mean over batch and dimensions of KL(teacher || student)
    KL   = log(sigma_S / sigma_T) + (sigma_T^2 + (mu_T - mu_S)^2) / (2 sigma_S^2) - 1/2

Gaussians are those before squashing, where bounds and scales do not enter. Deterministic corrections are matched by the mean squared
difference of unit actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.heads.base import Head
from robot_rl.heads.distilled import DistilledHead
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.residual import GaussianResidualHead, ResidualHead
from robot_rl.learners.config import DistillConfig
from robot_rl.learners.updates import load_network_state, network_state
from robot_rl.nn.flat import FlatAdam
from robot_rl.policies.base import BasePolicy
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.types import Stratum

Metrics = dict[str, Tensor]
SHAPE = ("noise_bound", "noise_mode", "rank", "executed_rows_only", "scale", "gripper_scale", "mode")
"""What a teacher's unit actions mean; a student that means something else cannot take them over."""


@dataclass(frozen=True)
class Teacher:
    """A specialised head, the student's code for it, and states (N, C) that it met."""

    head: Head
    code: int
    conditioning: Tensor


@dataclass(frozen=True)
class DistillBatch:
    """(B, C) states, and (B,) which teacher each belongs to."""

    conditioning: Tensor
    teacher: Tensor


def gaussian_kl(mean_t: Tensor, log_std_t: Tensor, mean_s: Tensor, log_std_s: Tensor) -> Tensor:
    """KL(teacher || student) per dimension, the shape of its arguments."""
    gap = (2 * log_std_t).exp() + (mean_t - mean_s).square()
    return log_std_s - log_std_t + gap / (2 * (2 * log_std_s).exp()) - 0.5


class DistillLearner:
    """Trains the student on states that the teachers met. What the student plays itself is not learned from."""

    def __init__(
        self,
        base: BasePolicy,
        head: Head,
        config: DistillConfig,
        teachers: Sequence[Teacher],
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(head, DistilledHead):
            raise ValueError(f"algorithm='distill' trains a distilled head; this one is {head.KIND}")
        if not teachers:
            raise ValueError("learner.teachers=[]: accepted is at least one finished run over this base")
        self.base, self.config, self.device = base, config, torch.device(device)
        self.head: DistilledHead = head.to(self.device)
        self.student: Any = head.student
        for teacher in teachers:
            self._check(teacher, head)
        self.teachers = [Teacher(t.head.to(self.device), t.code, t.conditioning.to(self.device)) for t in teachers]
        self.optimizer = FlatAdam(self.student.actor.flat, config.lr)
        self.generator = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.updates = self.actor_updates = 0

    @staticmethod
    def _check(teacher: Teacher, head: DistilledHead) -> None:
        own, student = teacher.head, head.student
        if type(own) is not type(student):
            raise ValueError(
                f"teacher {teacher.code} is a {own.KIND} head, the student a {student.KIND} one; accepted are equal kinds"
            )
        for name in SHAPE:
            theirs, ours = (getattr(h.config, name, None) for h in (own, student))
            if theirs != ours:
                raise ValueError(f"teacher {teacher.code} has {name}={theirs}, the student {ours}; accepted are equal shapes")
        if not 0 <= teacher.code < head.config.slots:
            raise ValueError(f"teacher {teacher.code}: accepted are at most slots={head.config.slots} teachers")

    def sample(
        self,
        buffer: ReplayBuffer,
        rng: np.random.Generator,
        size: int,
        ratios: Mapping[Stratum | str, float] | None = None,
        base_samples: Any = None,
    ) -> DistillBatch:
        """``size`` states, each of an evenly drawn teacher."""
        which = rng.integers(0, len(self.teachers), size)
        rows = rng.random(size)
        states = [
            self.teachers[t].conditioning[int(r * len(self.teachers[t].conditioning))] for t, r in zip(which, rows, strict=True)
        ]
        return DistillBatch(torch.stack(states), torch.from_numpy(which).to(self.device))

    def per_state(self, batch: DistillBatch) -> Tensor:
        """(B,) loss, mean over dimensions; differentiable in the student."""
        codes = torch.tensor([t.code for t in self.teachers], device=self.device)
        coded = self.head.coded(batch.conditioning, codes[batch.teacher])
        rows = None
        if not isinstance(self.student, LatentNoiseHead):  # corrections read what they correct
            shape, noise = self.base.spec.noise_shape, None
            if shape is not None:
                kind = batch.conditioning.dtype
                noise = torch.randn((len(coded), *shape), generator=self.generator, device=self.device, dtype=kind)
            rows = self.base.sample(batch.conditioning, noise)[:, : self.student.rows]
        with torch.no_grad():
            wanted = self._by_teacher(batch, rows)
        found = self._outputs(self.student, coded, rows)
        if len(found) == 1:
            return (found[0] - wanted[0]).square().mean(-1)
        return gaussian_kl(*wanted, *found).mean(-1)

    def _by_teacher(self, batch: DistillBatch, rows: Tensor | None) -> list[Tensor]:
        out: list[Tensor] = []
        for i, teacher in enumerate(self.teachers):
            mine = batch.teacher == i
            parts = self._outputs(teacher.head, batch.conditioning[mine], None if rows is None else rows[mine])
            out = out or [p.new_zeros(len(mine), p.shape[1]) for p in parts]
            for whole, part in zip(out, parts, strict=True):
                whole[mine] = part
        return out

    @staticmethod
    def _outputs(head: Any, conditioning: Tensor, rows: Tensor | None) -> list[Tensor]:
        """Mean and log standard deviation before squashing, or the unit action of a deterministic head; (B, d) each."""
        if isinstance(head, ResidualHead):
            assert rows is not None
            return [head.unit_action(conditioning, rows)]
        if isinstance(head, GaussianResidualHead):
            assert rows is not None
            return list(head.actor(head.features(conditioning, rows)))
        return list(head.actor(conditioning))

    def update(self, batch: DistillBatch, *, train_actor: bool = True, offline: bool = False) -> Metrics:
        """One gradient step of the student; metrics tell the loss of every teacher apart."""
        flat = self.student.actor.flat
        flat.zero_grad()
        with torch.enable_grad():
            each = self.per_state(batch)
            loss = each.mean()
            loss.backward()
        self.updates += 1
        if train_actor:
            self.optimizer.step()
            self.actor_updates += 1
        metrics = {"distill/loss": loss.detach()}
        for i, teacher in enumerate(self.teachers):
            mine = (batch.teacher == i).to(each.dtype)
            metrics[f"distill/loss_{teacher.code}"] = (each.detach() * mine).sum() / mine.sum().clamp_min(1.0)
        return metrics

    def pretrain(self, batch: DistillBatch) -> Metrics:
        """There is no critic: the same as an update."""
        return self.update(batch)

    def finish_pretraining(self) -> None:
        """Nothing follows the student."""

    def check_finite(self) -> None:
        """Raises FloatingPointError when a parameter is not finite."""
        if not bool(torch.isfinite(self.student.actor.flat.data).all()):
            raise FloatingPointError(f"student parameters are not finite after {self.updates} updates; lower lr")

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs; teachers and their states are read from their runs again."""
        return {
            "head": network_state(self.head, self.optimizer),
            "generator": self.generator.get_state().clone(),
            "counters": torch.tensor([self.updates, self.actor_updates]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in place."""
        load_network_state(self.head, self.optimizer, state["head"])
        self.generator.set_state(state["generator"].cpu())
        self.updates, self.actor_updates = (int(x) for x in state["counters"])
