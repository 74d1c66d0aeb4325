"""Which step of a compared segment mattered? Attention of a forward model as a prior on credit (Hindsight PRIOR; 2.12)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robot_rl.rewards.learned import Clock, FitBudget, FitReport
from robot_rl.rewards.preference_model import Pairs
from robot_rl.rewards.transformer import CausalTransformer


@dataclass(frozen=True)
class HindsightConfig:
    width: int = 64
    layers: int = 2
    heads: int = 4
    weight: float = 1.0  # of the prior beside the Bradley-Terry loss
    learning_rate: float = 1e-3
    batch: int = 32


class ForwardModel(nn.Module):
    """(B, T, D) states and actions to the next states; attention of its last row says which steps the outcome rests on."""

    def __init__(self, inputs: int, states: int, config: HindsightConfig) -> None:
        super().__init__()
        self.states = states
        self.embed = nn.Linear(inputs, config.width)
        self.trunk = CausalTransformer(config.width, config.layers, config.heads, dropout=0.0)
        self.out = nn.Linear(config.width, states)

    def forward(self, steps: Tensor) -> Tensor:
        return self.out(self.trunk(self.embed(steps)))

    @torch.inference_mode()
    def importance(self, steps: np.ndarray) -> np.ndarray:
        """(B, T) share of each step; rows sum to 1."""
        self.eval()
        return self.trunk.last_attention(self.embed(torch.from_numpy(np.asarray(steps, np.float32)))).numpy()


def fit_forward(
    steps: np.ndarray, states: int, config: HindsightConfig, budget: FitBudget, seed: int = 0
) -> tuple[ForwardModel, FitReport]:
    """Predict (absolute error) each next state of segments (N, T, D), whose first ``states`` columns are the state."""
    clock, x = Clock(budget), torch.from_numpy(np.asarray(steps, np.float32))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ForwardModel(x.shape[-1], states, config)
        optimiser = torch.optim.Adam(model.parameters(), config.learning_rate)
        loss = torch.zeros(())
        while clock.goes_on():
            rows = torch.randint(len(x), (config.batch,), generator=generator)
            loss = (model(x[rows, :-1]) - x[rows, 1:, :states]).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()
    return model, clock.report(float(loss.detach()))


def redistribution_targets(importance: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """(B, T) what each step should earn: its share of the segment's predicted return; rows keep their sum."""
    return importance * rewards.sum(1, keepdims=True)


def fit_hindsight(
    segments: np.ndarray, importance: np.ndarray, pairs: Pairs, config: HindsightConfig, budget: FitBudget, *, width: int = 64,
    seed: int = 0,
) -> tuple[nn.Module, FitReport]:  # fmt: skip
    """A per-step reward from compared segments: Bradley-Terry on sums, plus the prior that returns follow importance.

    Args:
        segments: (N, T, D). ``importance``: (N, T) rows summing to 1. ``pairs``: of segments; undecided ones are left out.

    Returns:
        A network (..., D) to (..., 1), and the report.
    """
    decided = np.asarray(pairs.label) >= 0
    if not decided.any():
        raise ValueError("no decided pairs: accepted is at least one label 0 or 1")
    first, second = torch.from_numpy(pairs.first[decided]), torch.from_numpy(pairs.second[decided])
    label = torch.from_numpy(pairs.label[decided].astype(np.float32))
    x, share = torch.from_numpy(np.asarray(segments, np.float32)), torch.from_numpy(np.asarray(importance, np.float32))
    clock, generator = Clock(budget), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(x.shape[-1], width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, 1)
        )
        optimiser = torch.optim.Adam(network.parameters(), config.learning_rate)
        loss = torch.zeros(())
        while clock.goes_on():
            rows = torch.randint(len(label), (config.batch,), generator=generator)
            both = torch.cat([first[rows], second[rows]])
            reward = network(x[both])[..., 0]
            total = reward.sum(1)
            margin = total[len(rows) :] - total[: len(rows)]
            prior = (reward - (share[both] * total[:, None]).detach()).square().mean()
            loss = functional.binary_cross_entropy_with_logits(margin, label[rows]) + config.weight * prior
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    network.eval()
    return network, clock.report(float(loss.detach()))
