"""A reward from comparisons: Bradley-Terry ensembles (RL-VLM-F, arXiv 2402.03681; rewards specification 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robot_rl.rewards.learned import Clock, FitBudget, FitReport

ROWS = 1024


@dataclass(frozen=True)
class PreferenceConfig:
    """Attributes:
    members: of the ensemble; each sees the pairs in an order of its own.
    width, layers: of the network on features. ``bounded``: end in tanh.
    ties: ``drop`` leaves undecided pairs out, ``soft`` trains them towards one half.
    stop_accuracy: training ends once all members agree with so many of the labels.
    """

    members: int = 3
    width: int = 128
    layers: int = 2
    bounded: bool = True
    ties: Literal["drop", "soft"] = "drop"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch: int = 64
    epochs: int = 30
    stop_accuracy: float = 0.97

    def __post_init__(self) -> None:
        if self.ties not in ("drop", "soft"):
            raise ValueError(f"preference.ties={self.ties!r}: accepted are drop, soft")
        for name in ("members", "width", "layers", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"preference.{name}={getattr(self, name)}: accepted are integers >= 1")


class PreferenceModel(nn.Module):
    """Inputs (N, F) (or pictures, for ``convolutional``) to a reward per member (M, N)."""

    def __init__(self, inputs: int, config: PreferenceConfig, members: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))
        self.mean: Tensor
        self.deviation: Tensor
        self.members = nn.ModuleList(members or [self._mlp(inputs) for _ in range(config.members)])

    def _mlp(self, inputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(self.config.layers):
            layers += [nn.Linear(inputs, self.config.width), nn.LeakyReLU()]
            inputs = self.config.width
        return nn.Sequential(*layers, nn.Linear(inputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = (x - self.mean) / self.deviation
        out = torch.stack([m(x)[:, 0] for m in self.members])
        return torch.tanh(out) if self.config.bounded else out

    @torch.inference_mode()
    def reward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) mean over members and (N,) their standard deviation."""
        self.eval()
        rows = [self(torch.from_numpy(np.asarray(x[i : i + ROWS], np.float32))) for i in range(0, len(x), ROWS)]
        out = torch.cat(rows, 1)
        return out.mean(0).numpy(), out.std(0, unbiased=False).numpy()


def convolutional(
    channels: Sequence[int] = (16, 32, 64, 128), strides: Sequence[int] = (2, 2, 2, 2), kernels: Sequence[int] = (5, 3, 3, 3)
) -> nn.Module:
    """A reward network on pictures (N, 3, H, W) in 0..1."""
    layers: list[nn.Module] = []
    before = 3
    for after, stride, kernel in zip(channels, strides, kernels, strict=True):
        layers += [nn.Conv2d(before, after, kernel, stride, padding=kernel // 2), nn.LeakyReLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(before * 16, 1))


@dataclass(frozen=True)
class Pairs:
    """Comparisons of items: ``first`` and ``second`` (P,) indices into the items, ``label`` (P,) 0, 1, or -1 undecided.

    With segments, indices are (P, K) and rewards are summed over a segment.
    """

    first: np.ndarray
    second: np.ndarray
    label: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.first) == len(self.second) == len(self.label):
            raise ValueError(
                f"{len(self.first)}, {len(self.second)} items and {len(self.label)} labels: accepted are equal counts"
            )
        if not np.isin(self.label, (0, 1, -1)).all():
            raise ValueError(f"labels {sorted(set(np.asarray(self.label).tolist()))}: accepted are 0, 1, -1")


def fit_preferences(
    items: np.ndarray, pairs: Pairs, config: PreferenceConfig, budget: FitBudget, *, seed: int = 0,
    members: Callable[[], nn.Module] | None = None,
) -> tuple[PreferenceModel, FitReport]:  # fmt: skip
    """Train an ensemble so that what was preferred earns more: P(second over first) = sigmoid(r(second) - r(first)).

    Args:
        items: (N, F) features, or (N, 3, H, W) float pictures with ``members`` making networks for them.

    Raises:
        ValueError: no decided pairs.
    """
    kept = np.ones(len(pairs.label), bool) if config.ties == "soft" else np.asarray(pairs.label) >= 0
    if not (np.asarray(pairs.label) >= 0).any():
        raise ValueError(f"none of {len(pairs.label)} pairs is decided: accepted is at least one label 0 or 1")
    first, second = torch.from_numpy(np.asarray(pairs.first)[kept]), torch.from_numpy(np.asarray(pairs.second)[kept])
    label = np.asarray(pairs.label)[kept]
    target = torch.from_numpy(np.where(label < 0, 0.5, label).astype(np.float32))
    decided = torch.from_numpy(label >= 0)
    x = torch.from_numpy(np.asarray(items, np.float32))
    clock, count = Clock(budget), len(target)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [members() for _ in range(config.members)] if members else None
        model = PreferenceModel(x.shape[1] if x.dim() == 2 else 1, config, made)
        if x.dim() == 2:
            model.mean.copy_(x.mean(0))
            model.deviation.copy_(x.std(0).clamp_min(1e-6))
        optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        loss, accuracy, stopped = torch.zeros(()), 0.0, ""
        model.train()
        for _ in range(config.epochs):
            orders = torch.stack([torch.randperm(count, generator=generator) for _ in range(config.members)])
            right = total = 0
            for i in range(0, count, config.batch):
                if not clock.goes_on():
                    stopped = "budget"
                    break
                rows = orders[:, i : i + config.batch]
                margin = _margins(model, x, first, second, rows)
                loss = functional.binary_cross_entropy_with_logits(margin, target[rows], reduction="none").mean(1).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                sure = decided[rows]
                right += int((((margin > 0) == (target[rows] > 0.5)) & sure).sum())
                total += int(sure.sum())
            accuracy = right / max(total, 1)
            if stopped or accuracy >= config.stop_accuracy:
                stopped = stopped or "accuracy"
                break
    model.eval()
    report = clock.report(float(loss.detach()), train_accuracy=accuracy, pairs=float(count))
    report.stopped = report.stopped if stopped == "budget" else stopped or "epochs"
    return model, report


def _margins(model: PreferenceModel, x: Tensor, first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
    """(M, B) logit that the second item is preferred, of each member on its own rows."""
    out = []
    for m, member in enumerate(model.members):
        a, b = first[rows[m]], second[rows[m]]
        shape = a.shape
        both = x[torch.cat([a.reshape(-1), b.reshape(-1)])]
        if both.dim() == 2:
            both = (both - model.mean) / model.deviation
        reward = member(both)[:, 0]
        reward = torch.tanh(reward) if model.config.bounded else reward
        r = reward.view(2, *shape)
        r = r.sum(-1) if len(shape) > 1 else r
        out.append(r[1] - r[0])
    return torch.stack(out)


def choose_pairs(
    count: int, pairs: int, rng: np.random.Generator, how: str = "uniform", spread: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """(P, 2) different items: ``uniform``, or the ones of ten times as many candidates on which an ensemble disagrees most.

    Args:
        spread: (M, N) rewards of the members, for ``disagreement`` and ``entropy``.
    """
    if count < 2:
        raise ValueError(f"{count} items: accepted are at least 2")
    if how not in ("uniform", "disagreement", "entropy"):
        raise ValueError(f"choose={how!r}: accepted are uniform, disagreement, entropy")
    drawn = pairs if how == "uniform" else 10 * pairs
    a = rng.integers(0, count, drawn)
    b = (a + rng.integers(1, count, drawn)) % count
    candidates = np.stack([a, b], 1)
    if how == "uniform":
        return candidates
    if spread is None:
        raise ValueError(f"choose={how!r} needs a trained ensemble: accepted is uniform until there is one")
    p = 1 / (1 + np.exp(-(spread[:, b] - spread[:, a])))
    mean = np.clip(p.mean(0), 1e-6, 1 - 1e-6)
    score = p.std(0) if how == "disagreement" else -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean))
    return candidates[np.argsort(-score, kind="stable")[:pairs]]
