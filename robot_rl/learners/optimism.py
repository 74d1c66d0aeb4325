"""Rewards that are worked out while learning: optimistic labels for data without them, and a bonus for what is rare.

Labels (ExPLORe, Li et al. 2023) for a window (s, a) of unlabelled data, by models that are fitted to the labelled windows::

    R    = r_hat(s, a) + bonus * mean_k (predictor_k(s, a) - random_k(s, a))^2
    disc = gamma^m (1 - sigmoid(end(s, a)))

Rarity (SERA): tanh(log(1 + mean distance to the k nearest in the batch)) of z = [s / std(s), c Q / std(Q)].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robot_rl.learners.batch import Batch
from robot_rl.learners.config import OptimismConfig
from robot_rl.learners.updates import load_network_state, network_state
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.grad import without_grad
from robot_rl.nn.mlp import StackedMLP

Metrics = dict[str, Tensor]


class OptimisticLabels:
    """Models of reward and end, and random network distillation (Burda et al. 2019), over the critic's input x (B, D)."""

    def __init__(self, width: int, config: OptimismConfig, init: torch.Generator, device: torch.device) -> None:
        self.config = config

        def network(out: int) -> StackedMLP:
            return StackedMLP(1, width, out, config.hidden, generator=init, device=device)

        self.reward, self.end = network(1), network(1)
        self.random, self.predictor = network(config.features).requires_grad_(False), network(config.features)
        self.trained = {"reward": self.reward, "end": self.end, "predictor": self.predictor}
        self.optimizers = {name: FlatAdam(net.flat, config.lr) for name, net in self.trained.items()}
        self.fits = 0

    @without_grad
    def bonus(self, x: Tensor) -> Tensor:
        """(B,) how unlike what was practised."""
        tape = self.random.tape(len(x))
        wanted = self.random.run(x, tape)[0].clone()
        return (self.predictor.run(x, tape)[0] - wanted).square().mean(-1) * self.config.bonus

    @without_grad
    def labelled(self, batch: Batch, x: Tensor) -> tuple[Batch, Metrics]:
        """Fit the models on the windows that have rewards, then label those that have none.

        Raises:
            ValueError: the batch does not say which windows are unlabelled.
        """
        if batch.unlabelled is None:
            raise ValueError("optimism reads the column 'unlabelled': build the buffer with learners.facts.columns")
        metrics = self._fit(batch, x, batch.weight * (1.0 - batch.unlabelled))
        tape = self.reward.tape(len(x))
        reward = self.reward.run(x, tape)[0, :, 0].clone()
        end = torch.sigmoid(self.end.run(x, tape)[0, :, 0])
        bonus, guessed = self.bonus(x), batch.unlabelled > 0
        counts = batch.weight if self.fits > self.config.start_updates else batch.weight * (1.0 - batch.unlabelled)
        known = batch.return_known
        new = replace(
            batch, reward=torch.where(guessed, reward + bonus, batch.reward),
            discount=torch.where(guessed, batch.discount * (1.0 - end), batch.discount), weight=counts,
            return_known=None if known is None else known * (1.0 - batch.unlabelled),
        )  # fmt: skip
        share = batch.unlabelled.sum().clamp_min(1.0)
        return new, metrics | {"optimism/bonus": (bonus * batch.unlabelled).sum() / share}

    def _fit(self, batch: Batch, x: Tensor, weight: Tensor) -> Metrics:
        """Squared error of the reward, cross-entropy of the end, and now and then a step of the predictor."""
        part = weight / weight.sum().clamp_min(1.0)
        tape = self.reward.tape(len(x))
        error = self.reward.run(x, tape)[0, :, 0] - batch.reward
        self.reward.backward(tape, (2.0 * part * error)[None, :, None])
        self.optimizers["reward"].step()
        ended = (batch.discount == 0).to(part.dtype)
        logit = self.end.run(x, tape)[0, :, 0].clone()
        self.end.backward(tape, (part * (torch.sigmoid(logit) - ended))[None, :, None])
        self.optimizers["end"].step()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logit, ended, reduction="none")
        metrics = {"optimism/reward_loss": (part * error.square()).sum(), "optimism/end_loss": (part * entropy).sum()}
        self.fits += 1
        if (self.fits - 1) % self.config.every == 0:
            tape = self.random.tape(len(x))
            wanted = self.random.run(x, tape)[0].clone()
            gap = self.predictor.run(x, tape)[0] - wanted
            self.predictor.backward(tape, (2.0 / gap.shape[1] * part[:, None] * gap).unsqueeze(0))
            self.optimizers["predictor"].step()
            metrics["optimism/novelty_loss"] = (part * gap.square().mean(-1)).sum()
        return metrics

    def full_state(self) -> dict[str, Any]:
        parts: dict[str, Any] = {name: network_state(net, self.optimizers[name]) for name, net in self.trained.items()}
        random = {k: v.clone() for k, v in self.random.state_dict().items()}
        return parts | {"random": random, "fits": torch.tensor(self.fits)}

    def load_full_state(self, state: dict[str, Any]) -> None:
        for name, net in self.trained.items():
            load_network_state(net, self.optimizers[name], state[name])
        self.random.load_state_dict(state["random"])
        self.fits = int(state["fits"])


@without_grad
def rarity(states: Tensor, value: Tensor, neighbours: int, value_scale: float) -> Tensor:
    """(B,) in [0, 1): how far the k nearest others of the batch are, for states (B, C) and values (B,); 0 for a batch of one."""
    count = min(neighbours, len(states) - 1)
    if count < 1:
        return torch.zeros_like(value)
    spread = states.std(0, correction=0).clamp_min(1e-6)
    z = torch.cat([states / spread, value_scale * value[:, None] / value.std(correction=0).clamp_min(1e-6)], dim=1)
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(float("inf"))
    return torch.tanh(torch.log1p(distance.topk(count, largest=False).values.mean(1)))
