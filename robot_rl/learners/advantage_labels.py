"""Labels for advantage conditioning: which recorded actions were better than usual (RECAP, Amin et al. 2025).

    R_t = -(steps that follow) [- C_fail in a failure]        in units of value_range, cut off at -1
    A_t = -N + V(o_{t+N}) - V(o_t)                            or R_t - V(o_t) where the episode ends within N steps
    label = positive where A_t > eps, for demonstrations that did not fail and for whatever a human did; nothing is said where A_t is unknown

Labels lie in a column of the buffer and never in the recording. They depend on the judging network and on eps alone, both of which
are saved, so a buffer that is filled again after a restart is labelled the same.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from robot_rl.heads.advantage import Advantage
from robot_rl.learners.config import RecapConfig
from robot_rl.learners.facts import ADVANTAGE, OUTCOME, STEPS_LEFT
from robot_rl.learners.row_class import ROW_CLASS, RowClass
from robot_rl.learners.updates import load_network_state, network_state
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.mlp import StackedMLP
from robot_rl.replay.buffer import ReplayBuffer


class AdvantageLabels:
    """The value function that judges, and the labels it has given."""

    def __init__(
        self,
        features: int,
        config: RecapConfig,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.device = config, torch.device(device)
        init = torch.Generator().manual_seed(seed)
        self.network = StackedMLP(1, features, config.bins, config.hidden, generator=init, device=device, dtype=dtype)
        self.optimizer = FlatAdam(self.network.flat, config.lr)
        self.judge = deepcopy(self.network).requires_grad_(False)
        self.threshold = 0.0
        self.judged = -1  # updates when everything was judged last
        self._labelled: set[int] = set()

    # ---- the value

    def returns(self, steps_left: Tensor, outcome: Tensor) -> Tensor:
        """(...,) normalised return; only of meaning where the outcome is known."""
        total = -steps_left - self.config.failure_penalty * (outcome == 0).to(steps_left.dtype)
        return (total / self.config.value_range).clamp(-1.0, 0.0)

    def value(self, network: StackedMLP, conditioning: Tensor) -> Tensor:
        """(B, C) to (B,) in [-1, 0]: the mean of the predicted distribution."""
        chances = network(conditioning)[0].softmax(-1)
        return chances @ torch.linspace(-1.0, 0.0, self.config.bins, dtype=chances.dtype, device=chances.device)

    def fit(self, conditioning: Tensor, steps_left: Tensor, outcome: Tensor) -> dict[str, Tensor]:
        """One step of cross-entropy to the bin of the return, over rows whose outcome is known."""
        known = (outcome >= 0).to(conditioning.dtype)
        bins = ((self.returns(steps_left, outcome) + 1.0) * (self.config.bins - 1)).round().long()
        self.network.flat.zero_grad()
        with torch.enable_grad():
            per_row = F.cross_entropy(self.network(conditioning)[0], bins, reduction="none")
            loss = (known * per_row).sum() / known.sum().clamp_min(1.0)
            loss.backward()
        self.optimizer.step()
        return {"value/loss": loss.detach(), "value/known": known.mean()}

    # ---- labels

    @torch.no_grad()
    def advantages(self, buffer: ReplayBuffer, number: int) -> np.ndarray:
        """(L,) of one episode under the judge, NaN where unknown."""
        n, scale = self.config.n_step, self.config.value_range
        states = torch.from_numpy(buffer.conditioning(number)).to(self.device, self.network.flat.data.dtype)
        value = self.value(self.judge, states).cpu().double()
        left = torch.from_numpy(buffer.rows(STEPS_LEFT, number)).double()
        outcome = torch.from_numpy(buffer.rows(OUTCOME, number).astype(np.int64))
        length = len(left)
        found = self.returns(left, outcome) - value[:length]
        found[outcome < 0] = float("nan")
        inner = max(length - n, 0)
        found[:inner] = -n / scale + value[n : n + inner] - value[:inner]
        return found.numpy()

    def refresh(self, buffer: ReplayBuffer, updates: int) -> None:
        """Judge everything anew when that is due, and label what is not labelled yet."""
        numbers = sorted(buffer.numbers())
        if self.judged < 0 or updates - self.judged >= self.config.relabel_every:
            self.judge.flat.copy_(self.network.flat)
            every = np.concatenate([self.advantages(buffer, i) for i in numbers])
            known = every[np.isfinite(every)]
            self.threshold = float(np.quantile(known, 1 - self.config.positive_share)) if len(known) else 0.0
            self.judged, self._labelled = updates, set()
        for number in numbers:
            if number not in self._labelled:
                buffer.rows(ADVANTAGE, number)[:] = self.labels(buffer, number)
        self._labelled = set(numbers)

    def labels(self, buffer: ReplayBuffer, number: int) -> np.ndarray:
        """(L,) uint8 :class:`Advantage` of one episode."""
        found = self.advantages(buffer, number)
        label = np.where(found > self.threshold, int(Advantage.POSITIVE), int(Advantage.NEGATIVE))
        label[~np.isfinite(found)] = Advantage.UNSAID
        who, failed = buffer.rows(ROW_CLASS, number), buffer.rows(OUTCOME, number) == 0
        # A demonstration is better than usual by assumption, unless it is known to have failed: then it is judged like any other.
        label[(who == RowClass.INTERVENTION) | ((who == RowClass.DEMONSTRATION) & ~failed)] = Advantage.POSITIVE
        return label.astype(np.uint8)

    def judge_again(self) -> None:
        """The value function has changed on purpose: judge before the next batch."""
        self.judged = -1

    # ---- exact resume

    def full_state(self) -> dict[str, Any]:
        return {
            "value": network_state(self.network, self.optimizer),
            "judge": {k: v.clone() for k, v in self.judge.state_dict().items()},
            "judged": torch.tensor(self.judged), "threshold": torch.tensor(self.threshold, dtype=torch.float64),
        }  # fmt: skip

    def load_full_state(self, state: dict[str, Any]) -> None:
        load_network_state(self.network, self.optimizer, state["value"])
        self.judge.load_state_dict(state["judge"])
        self.judged, self.threshold = int(state["judged"]), float(state["threshold"])
        self._labelled = set()
