"""Imitation from experience: one behaviour-cloning loss, many ways to weigh its rows.

    loss = Σ_bh w_bh mask_bh l_bh / Σ_bh w_bh mask_bh        l: the policy's own denoising loss, mean over action dimensions

Rows that nobody should imitate (blended, latched, held, replaced by safety) have mask 0. What the published methods differ in
is w (algorithms specification 3.3); each is a value of ``weights``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.heads.advantage import Advantage, AdvantageHead
from robot_rl.heads.base import Head
from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.learners.advantage_labels import AdvantageLabels
from robot_rl.learners.batch import EPISODE_RETURN, RETURN_KNOWN, Batch
from robot_rl.learners.config import WeightedBCConfig
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.facts import ADVANTAGE, OUTCOME, STEPS_LEFT
from robot_rl.learners.row_advantage import RowAdvantage
from robot_rl.learners.row_class import ROW_CLASS, SUCCEEDED, RowClass
from robot_rl.learners.updates import frozen_flat, load_network_state, network_state
from robot_rl.nn.flat import FlatAdam, FlatParameters, polyak_
from robot_rl.policies.base import BasePolicy
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.types import Stratum

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class CloneBatch:
    """B chunks of H rows, normalised.

    Attributes:
        conditioning: (B, C). action: (B, H, A). mask: (B, H) 1 for rows that ran and may be imitated.
        row_class: (B, H) int64 :class:`RowClass`. succeeded: (B,) 1 in successful episodes (a demonstration counts as one unless it is known to have failed).
        episode_return, return_known: (B,) from the first row on.
        shares: (4,) of the classes among all rows that could have been drawn.
        advantage: (B,) int64 :class:`Advantage` of the first row; steps_left, outcome: (B,) of it, see ``learners/facts.py``; with
            ``recap`` only.
        windows: other rows as transitions, with ``iql`` only.
    """

    conditioning: Tensor
    action: Tensor
    mask: Tensor
    row_class: Tensor
    succeeded: Tensor
    episode_return: Tensor
    return_known: Tensor
    shares: Tensor
    advantage: Tensor | None = None
    steps_left: Tensor | None = None
    outcome: Tensor | None = None
    windows: Batch | None = None


def class_shares(classes: np.ndarray) -> np.ndarray:
    """(4,) float64 share of each :class:`RowClass`."""
    counts = np.bincount(classes, minlength=len(RowClass)).astype(np.float64)
    return counts / max(counts.sum(), 1.0)


def class_weights(config: WeightedBCConfig, shares: Tensor) -> Tensor:
    """(4,) weight of a row of each class, for the weightings that go by class.

    ``sirius``: a class of mass m that makes up the share r of the data weighs m / r. Demonstrations keep their share; roll-outs
    get what the others leave. A class that is absent gives its mass to the roll-outs.
    """
    one = torch.ones_like(shares)
    if config.weights == "hg_dagger":
        return torch.tensor([1.0, 0.0, 1.0, 0.0]).to(shares)
    human = shares[RowClass.INTERVENTION]
    if config.weights == "iwr":
        one[RowClass.INTERVENTION] = torch.where(human > 0, (1 - human) / human.clamp_min(1e-12), torch.ones_like(human))
        return one
    if config.weights == "sirius":
        mass = torch.stack([
            shares[RowClass.DEMONSTRATION], torch.zeros_like(human), torch.full_like(human, config.intervention_mass),
            torch.full_like(human, config.pre_intervention_mass),
        ]) * (shares > 0)  # fmt: skip
        mass[RowClass.ROLLOUT] = (1 - mass.sum()).clamp_min(0.0)
        return torch.where(shares > 0, mass / shares.clamp_min(1e-12), torch.zeros_like(shares))
    return one


class WeightedBCLearner:
    """Trains a copy of the base's denoiser; the head acts with its running average."""

    def __init__(self, base: BasePolicy, head: Head, config: WeightedBCConfig, device: torch.device | str = "cpu") -> None:
        if not isinstance(head, FineTunedHead) or not hasattr(base, "denoising_loss"):
            raise ValueError(f"algorithm='weighted_bc' trains a fine_tuned head; this one is {head.KIND}")
        self.base, self.config, self.device = base, config, torch.device(device)
        self.head: FineTunedHead = head.to(self.device)
        if isinstance(head, AdvantageHead) != (config.weights == "recap"):
            raise ValueError(
                f"weights={config.weights!r} trains a {'advantage_conditioned' if config.weights == 'recap' else 'fine_tuned'} head; this "
                f"one is {head.KIND}"
            )
        self.online = head.twin(base).to(self.device)
        self.online.denoiser.requires_grad_(True)
        self.flat = FlatParameters(self.online.denoiser)
        self.average = frozen_flat(self.head.denoiser)
        self.optimizer = FlatAdam(
            self.flat, config.lr, weight_decay=config.weight_decay, max_grad_norm=config.grad_clip or None
        )
        self.value: CriticEnsemble | None = None
        if config.weights == "awr":
            init = torch.Generator().manual_seed(config.seed)
            self.value = CriticEnsemble(1, base.spec.conditioning_dim, config.value_hidden, generator=init, device=self.device)
            self.value_optimizer = FlatAdam(self.value.flat, config.value_lr)
        self.judge = RowAdvantage(base.spec, config, self.device) if config.weights == "iql" else None
        self.labels: AdvantageLabels | None = None
        if config.weights == "recap":
            kind = self.flat.data.dtype
            self.labels = AdvantageLabels(base.spec.conditioning_dim, config.recap, config.seed, self.device, kind)
        self.generator = torch.Generator(self.device).manual_seed(config.seed + 1)
        self._shares: tuple[tuple[int, int], Tensor] = ((-1, -1), torch.zeros(0))
        self.updates = 0
        self.actor_updates = 0

    def sample(
        self,
        buffer: ReplayBuffer,
        rng: np.random.Generator,
        size: int,
        ratios: Mapping[Stratum | str, float] | None = None,
        base_samples: Any = None,
    ) -> CloneBatch:
        """Draw ``size`` chunks evenly over everything recorded: the weights say what counts, so ``ratios`` do not."""
        windows = None if self.judge is None else Batch.from_windows(buffer.sample(size, rng), self.device)
        if self.labels is not None:
            self.labels.refresh(buffer, self.updates)
        drawn, extra = buffer.sample_chunk_rows(size, rng, self.base.spec.horizon)
        now = (len(buffer), buffer.evicted_episodes)
        if self._shares[0] != now:
            shares = torch.from_numpy(class_shares(buffer.column(ROW_CLASS))).float().to(self.device)
            self._shares = now, shares
        send = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(self.device)  # noqa: E731
        first = {name: send(rows[:, 0]) for name, rows in extra.items()}
        return CloneBatch(
            conditioning=send(drawn.conditioning[:, 0]), action=send(drawn.action), mask=send(drawn.mask).float(),
            row_class=send(extra[ROW_CLASS]).long(), succeeded=first[SUCCEEDED], episode_return=first[EPISODE_RETURN],
            return_known=first[RETURN_KNOWN], shares=self._shares[1],
            advantage=first[ADVANTAGE].long() if ADVANTAGE in first else None, steps_left=first.get(STEPS_LEFT), outcome=first.get(OUTCOME),
            windows=windows,
        )  # fmt: skip

    @torch.no_grad()
    def row_weights(self, batch: CloneBatch) -> Tensor:
        """(B, H) w; no gradient ever flows through it."""
        c = self.config
        rows = torch.ones_like(batch.mask)
        if c.weights in ("hg_dagger", "iwr", "sirius"):
            return class_weights(c, batch.shares)[batch.row_class].to(rows)
        if c.weights in ("uniform", "recap"):
            return rows
        if c.weights == "awr":
            assert self.value is not None
            advantage = batch.episode_return - self.value.value(batch.conditioning)[0]
            weight = (c.beta * advantage).exp().clamp(max=c.weight_clip) * batch.return_known
        elif self.judge is not None:
            weight = (c.beta * self.judge(batch.conditioning, batch.action)).exp().clamp(max=c.weight_clip)
        else:
            weight = batch.succeeded
            if c.weights == "iw_sft":
                weight = weight * self.likelihood_ratio(batch)
        return weight[:, None] * rows

    @torch.no_grad()
    def likelihood_ratio(self, batch: CloneBatch) -> Tensor:
        """(B,) exp(T (l_theta - l_base)), l = -denoising loss (mean over imitated entries), the same draws for both."""
        c, k = self.config, self.config.iw_draws
        conditioning, action = (x.repeat_interleave(k, dim=0) for x in (batch.conditioning, batch.action))
        state = self.generator.get_state()
        own = self.online.policy.denoising_loss(conditioning, action, self.generator)
        after = self.generator.get_state()
        self.generator.set_state(state)
        reference = self.base.denoising_loss(conditioning, action, self.generator)
        self.generator.set_state(after)
        mask = batch.mask.repeat_interleave(k, dim=0)
        gap = ((reference - own).mean(-1) * mask).sum(1) / mask.sum(1).clamp_min(1.0)
        return (c.iw_temperature * gap.unflatten(0, (-1, k)).mean(1)).exp().clamp(max=c.iw_clip)

    def update(self, batch: CloneBatch, *, train_actor: bool = True, offline: bool = False) -> Metrics:
        """One step of what judges (``awr``, ``iql``) and, with ``train_actor``, one of the policy."""
        metrics = self._fit_value(batch)
        self.updates += 1
        if not train_actor:
            return metrics
        weight = self.row_weights(batch) * batch.mask
        total = weight.sum()
        self.flat.zero_grad()
        with self._told(batch), torch.enable_grad():
            per_row = self.online.policy.denoising_loss(batch.conditioning, batch.action, self.generator).mean(-1)
            # Where nothing counts (no success yet) there is nothing to learn: the loss and its gradient are zero.
            loss = (weight * per_row).sum() / total.clamp_min(1e-12)
            loss.backward()
        self.optimizer.step()
        decay = min(self.config.ema, (1 + self.actor_updates) / (10 + self.actor_updates))
        polyak_(self.average, self.flat, 1 - decay)
        self.head.adapted.saw(batch.conditioning)
        self.actor_updates += 1
        return metrics | {"bc/loss": loss.detach(), "bc/weight": weight.mean(), "bc/weight_max": weight.max()}

    def _told(self, batch: CloneBatch) -> AbstractContextManager[None]:
        """The labels of the rows, dropped for some."""
        if self.labels is None:
            return nullcontext()
        assert batch.advantage is not None
        lots = torch.rand(len(batch.advantage), generator=self.generator, device=self.device)
        said = lots >= self.config.recap.dropout
        return self.online.denoiser.told(torch.where(said, batch.advantage, int(Advantage.UNSAID)))

    def _fit_value(self, batch: CloneBatch) -> Metrics:
        if self.labels is not None:
            assert batch.steps_left is not None
            assert batch.outcome is not None
            assert batch.advantage is not None
            positive = (batch.advantage == Advantage.POSITIVE).float().mean()
            return self.labels.fit(batch.conditioning, batch.steps_left, batch.outcome) | {"recap/positive": positive}
        if self.judge is not None:
            assert batch.windows is not None
            return self.judge.fit(batch.windows)
        if self.value is None:
            return {}
        fit = self.value.loss_and_grad(batch.conditioning, batch.episode_return, batch.return_known)
        self.value_optimizer.step()
        return {"value/loss": fit.loss, "value/mean": fit.q.mean()}

    def pretrain(self, batch: CloneBatch) -> Metrics:
        """Before the first policy update: the value function alone."""
        return self._fit_value(batch)

    def finish_pretraining(self) -> None:
        """The value function is fit to judge with."""
        if self.labels is not None:
            self.labels.judge_again()

    def check_finite(self) -> None:
        """Raises FloatingPointError when a parameter is not finite."""
        if not bool(torch.isfinite(self.flat.data).all()):
            raise FloatingPointError(
                f"policy parameters are not finite after {self.updates} updates; lower lr or set grad_clip"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs."""
        state = {
            "head": {k: v.clone() for k, v in self.head.state_dict().items()},
            "online": network_state(self.online, self.optimizer),
            "generator": self.generator.get_state().clone(),
            "counters": torch.tensor([self.updates, self.actor_updates]),
        }
        if self.labels is not None:
            state["labels"] = self.labels.full_state()
        if self.judge is not None:
            state["judge"] = self.judge.full_state()
        return state if self.value is None else state | {"value": network_state(self.value, self.value_optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in place."""
        self.head.load_state_dict(state["head"])
        load_network_state(self.online, self.optimizer, state["online"])
        if self.labels is not None:
            self.labels.load_full_state(state["labels"])
        if self.judge is not None:
            self.judge.load_full_state(state["judge"])
        if self.value is not None:
            load_network_state(self.value, self.value_optimizer, state["value"])
        self.generator.set_state(state["generator"].cpu())
        self.updates, self.actor_updates = (int(x) for x in state["counters"])
