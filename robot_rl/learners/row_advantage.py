"""How much better than usual a recorded chunk is, by IQL: what weighted cloning weighs rows with (``weights: iql``).

Implicit Q-learning and its extraction step (Kostrikov et al. 2022), as RL-VLM-F's offline form uses them (arXiv 2411.05273)::

    u = min_i Q_target,i(s, a) - V(s)        a: the rows that one decision executes
    weight = min(exp(beta u), weight_clip)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robot_rl.learners.batch import Batch
from robot_rl.learners.config import OffPolicyConfig, WeightedBCConfig
from robot_rl.learners.critic_rules import ValueRule
from robot_rl.learners.updates import load_network_state, make_critic, network_state
from robot_rl.nn.flat import FlatAdam
from robot_rl.policies.base import PolicySpec

Metrics = dict[str, Tensor]


class RowAdvantage:
    """Critics Q(s, a) and a value V(s) that learn from recorded transitions alone, late and composed rewards included."""

    def __init__(self, spec: PolicySpec, config: WeightedBCConfig, device: torch.device | str = "cpu") -> None:
        own, device = config.iql, torch.device(device)
        self.config, self.rows = own, spec.n_action_steps
        rule = OffPolicyConfig(
            n_critics=own.n_critics, hidden=config.value_hidden, critic_lr=config.value_lr, expectile=own.expectile,
            target_reduce="min", gamma=config.gamma, tau=own.tau,
        )  # fmt: skip
        init = torch.Generator().manual_seed(config.seed)
        self.critic = make_critic(rule, spec.conditioning_dim + self.rows * spec.action.dim, init, device)
        self.target = self.critic.make_target()
        self.value = ValueRule(rule, spec.conditioning_dim, init, device)
        self.optimizer = FlatAdam(self.critic.flat, config.value_lr)
        self._unused = torch.Generator(device)  # nothing is drawn: the minimum is over all critics

    def _input(self, conditioning: Tensor, action: Tensor) -> Tensor:
        return torch.cat([conditioning, action[:, : self.rows].flatten(1)], dim=-1)

    def fit(self, batch: Batch) -> Metrics:
        """One step of V and one of the critics."""
        x = self._input(batch.conditioning, batch.action)
        y, metrics = self.value.target(batch, x, self.target, self._unused)
        result = self.critic.loss_and_grad(x, y, batch.weight)
        told = {"critic/loss": result.loss, "critic/q": result.q.mean()}
        self.optimizer.step(self.target.flat, self.config.tau)
        return metrics | told

    @torch.no_grad()
    def __call__(self, conditioning: Tensor, action: Tensor) -> Tensor:
        """(B,) advantage of chunks (B, H, A), H at least the rows that a decision executes, in states (B, C)."""
        q = self.target.reduced_value(self._input(conditioning, action), "min")
        return q - self.value.network.value(conditioning)[0]

    def full_state(self) -> dict[str, Any]:
        state = network_state(self.critic, self.optimizer)
        target = {name: tensor.clone() for name, tensor in self.target.state_dict().items()}
        return {"critic": state, "target": target, "value": self.value.full_state()}

    def load_full_state(self, state: dict[str, Any]) -> None:
        load_network_state(self.critic, self.optimizer, state["critic"])
        self.target.load_state_dict(state["target"])
        self.value.load_full_state(state["value"])
