"""A model that gives a person's running feedback when the person is gone (GUIDE; 2.2); how late it comes: ``delay.py``."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.rewards.causal import CausalSource
from robot_rl.rewards.features import FeatureConfig, FrameFeatures
from robot_rl.rewards.learned import Clock, FitBudget, FitReport, load_model, save_model
from robot_rl.rewards.preference_model import Pairs
from robot_rl.rewards.progress import check_encoder
from robot_rl.types import RewardKind

KIND = "feedback"
FIT_FOR_USE = 0.5
"""Validation correlation from which the model may stand in for the person."""


@dataclass(frozen=True)
class FeedbackConfig:
    width: int = 128
    learning_rate: float = 1e-4
    batch: int = 128
    patience: int = 400


class FeedbackModel(nn.Module):
    """(N, D) observations (and actions) to feedback (N,) in [-1, 1]."""

    def __init__(self, inputs: int, config: FeedbackConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))
        self.mean: Tensor
        self.deviation: Tensor
        w = config.width
        self.net = nn.Sequential(nn.Linear(inputs, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.deviation)[:, 0]

    @torch.inference_mode()
    def predict(self, rows: np.ndarray) -> np.ndarray:
        return self(torch.from_numpy(np.asarray(rows, np.float32))).numpy()


def fit_feedback(
    rows: np.ndarray, feedback: np.ndarray, episode: np.ndarray, config: FeedbackConfig, budget: FitBudget, *, seed: int = 0
) -> tuple[FeedbackModel, FitReport]:
    """Learn what the person would say; the best snapshot on held-out episodes is kept.

    Args:
        rows: (N, D). ``feedback``: (N,) already moved back by its delay, NaN where the person said nothing. ``episode``: (N,).

    Returns:
        The model and a report whose ``correlation`` (held-out) must reach ``FIT_FOR_USE`` before it stands in for the person.
    """
    known = np.isfinite(feedback)
    episodes = np.unique(np.asarray(episode)[known])
    if len(episodes) < 2:
        raise ValueError(f"feedback in {len(episodes)} episodes: accepted are at least 2, one is held out")
    rng = np.random.default_rng(seed)
    held = np.isin(episode, rng.permutation(episodes)[: max(1, len(episodes) // 4)]) & known
    train = known & ~held
    clock = Clock(budget)
    x, y = torch.from_numpy(np.asarray(rows, np.float32)), torch.from_numpy(np.asarray(feedback, np.float32))
    train_rows, held_rows = torch.from_numpy(np.flatnonzero(train)), torch.from_numpy(np.flatnonzero(held))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FeedbackModel(x.shape[1], config)
        model.mean.copy_(x[train_rows].mean(0))
        model.deviation.copy_(x[train_rows].std(0).clamp_min(1e-6))
        optimiser = torch.optim.Adam(model.net.parameters(), config.learning_rate)
        best, best_step, kept, loss = float("inf"), 0, model.state_dict(), torch.zeros(())
        while clock.goes_on():
            chosen = train_rows[torch.from_numpy(rng.integers(0, len(train_rows), config.batch))]
            loss = (model(x[chosen]) - y[chosen]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if clock.steps % 20 == 0:
                with torch.no_grad():
                    found = float((model(x[held_rows]) - y[held_rows]).square().mean())
                if found < best:
                    best, best_step, kept = found, clock.steps, {k: v.clone() for k, v in model.state_dict().items()}
                elif clock.steps - best_step >= config.patience:
                    break
        model.load_state_dict(kept)
    model.eval()
    said = model.predict(rows[held])
    correlation = float(np.corrcoef(said, feedback[held])[0, 1]) if said.std() > 0 and feedback[held].std() > 0 else 0.0
    return model, clock.report(float(loss.detach()), validation_loss=best, correlation=correlation)


def feedback_pairs(
    feedback: np.ndarray, length: int, margin: float, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, Pairs]:
    """Windows of feedback (T,) whose means differ clearly, as preference pairs (Pref-GUIDE): starts (N,), and pairs of them."""
    starts = np.array([s for s in range(0, len(feedback) - length + 1, length) if np.isfinite(feedback[s : s + length]).all()])
    if len(starts) < 2:
        raise ValueError(f"{len(starts)} windows of {length} steps with feedback: accepted are at least 2")
    mean = np.array([feedback[s : s + length].mean() for s in starts])
    a = rng.integers(0, len(starts), count)
    b = (a + rng.integers(1, len(starts), count)) % len(starts)
    clear = np.abs(mean[a] - mean[b]) >= margin
    return starts, Pairs(a[clear], b[clear], (mean[b] > mean[a])[clear].astype(np.int64))


@dataclass
class FeedbackModelSource(CausalSource):
    """The learned feedback, under a model's name and never a person's.

    Attributes:
        model: folder that :func:`save_feedback` wrote.
        accept_weak: use a model whose validation correlation is below ``FIT_FOR_USE``.
    """

    model: str
    name: str = "feedback_model"
    accept_weak: bool = False
    encoder_weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kind, self.low = RewardKind.DENSE, -1.0
        state, settings, self.model_id = load_model(self.model, KIND)
        if settings["correlation"] < FIT_FOR_USE and not self.accept_weak:
            raise ValueError(
                f"model={self.model!r}: correlation with held-out feedback is {settings['correlation']:.2f}, accepted is at least "
                f"{FIT_FOR_USE} (or accept_weak: true); collect more feedback"
            )
        self.features = FrameFeatures(FeatureConfig.from_json(settings["features"], self.encoder_weights))
        check_encoder(self.model, settings["encoder_id"], self.features.model_id)
        self._network = FeedbackModel(self.features.dim, FeedbackConfig(**settings["feedback"]))
        self._network.load_state_dict(state)

    def values(self, rows: np.ndarray, task: str, first: int) -> np.ndarray:
        return self._network.predict(rows[first:])


def save_feedback(folder: str | os.PathLike[str], model: FeedbackModel, features: FrameFeatures, report: FitReport) -> str:
    """Write a model folder for :class:`FeedbackModelSource`; gives its identity."""
    settings: dict[str, Any] = {
        "features": features.config.to_json(), "encoder_id": features.model_id, "feedback": dataclasses.asdict(model.config),
        "correlation": report.metrics["correlation"],
    }  # fmt: skip
    return save_model(folder, KIND, model.state_dict(), settings)
