"""Is the task done in this frame? A small trained head on frozen feature maps (rewards specification 2.3).

Each camera's map is weighed by learned spatial kernels, so that the head knows where as well as what; validation logits are
calibrated at the end, because a threshold on uncalibrated probabilities means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robot_rl.rewards.learned import Clock, FitBudget, FitReport
from robot_rl.rewards.statistics import calibration, precision_recall, roc_auc
from robot_rl.vision.encoders import ImageEncoder

LOOK_EVERY = 20


@dataclass(frozen=True)
class ClassifierConfig:
    """Attributes:
    grid: maps are averaged down to so many cells a side (smaller maps stay as they are).
    kernels: spatial kernels a channel. ``state``: numbers of robot state that are read too.
    crops: versions of every training frame, shifted by up to ``pad`` pixels; the first is the frame itself.
    patience: steps without a better validation loss before it stops.
    """

    grid: int = 8
    kernels: int = 8
    width: int = 256
    state: int = 0
    dropout: float = 0.1
    learning_rate: float = 1e-4
    batch: int = 256
    crops: int = 4
    pad: int = 4
    patience: int = 200

    def __post_init__(self) -> None:
        for name in ("grid", "kernels", "width", "batch", "crops", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"classifier.{name}={getattr(self, name)}: accepted are integers >= 1")


class SuccessClassifier(nn.Module):
    """Maps per camera (B, C, h, w) and state (B, S) to a calibrated logit (B,)."""

    def __init__(self, cameras: int, channels: int, size: tuple[int, int], config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        scale = (size[0] * size[1]) ** -0.5
        self.kernels = nn.ParameterList(
            nn.Parameter(torch.randn(channels, *size, config.kernels) * scale) for _ in range(cameras)
        )
        self.embed = nn.ModuleList(nn.Linear(channels * config.kernels, config.width) for _ in range(cameras))
        self.head = nn.Sequential(
            nn.Linear(cameras * config.width + config.state, config.width), nn.Dropout(config.dropout), nn.LayerNorm(config.width),
            nn.ReLU(), nn.Linear(config.width, 1),
        )  # fmt: skip
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, maps: Sequence[Tensor], state: Tensor | None = None) -> Tensor:
        """The uncalibrated logit, which is what is trained."""
        parts = [
            embed(torch.einsum("bchw,chwk->bck", m, kernel).flatten(1))
            for m, kernel, embed in zip(maps, self.kernels, self.embed, strict=True)
        ]
        if self.config.state:
            if state is None:
                raise ValueError(f"state is missing: this classifier reads {self.config.state} numbers of it")
            parts.append(state)
        return self.head(torch.cat(parts, 1))[:, 0]

    @torch.inference_mode()
    def probability(self, maps: Sequence[Tensor], state: Tensor | None = None) -> np.ndarray:
        """(B,) calibrated probability of success."""
        self.eval()
        return torch.sigmoid(self(maps, state) * self.scale + self.shift).numpy()


def shrunk(maps: Tensor, grid: int) -> Tensor:
    """Maps of at most ``grid`` cells a side."""
    h, w = maps.shape[2:]
    return maps if h <= grid and w <= grid else functional.adaptive_avg_pool2d(maps, (min(h, grid), min(w, grid)))


def camera_maps(encoder: ImageEncoder, images: np.ndarray, config: ClassifierConfig) -> Tensor:
    return shrunk(encoder.maps(images), config.grid)


def shifted(images: np.ndarray, pad: int, rng: np.random.Generator) -> np.ndarray:
    """Every picture moved by up to ``pad`` pixels either way, its edge repeated."""
    n, height, width = images.shape[:3]
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    moves = rng.integers(0, 2 * pad + 1, (n, 2))
    return np.stack([padded[i, y : y + height, x : x + width] for i, (y, x) in enumerate(moves)])


@dataclass(frozen=True)
class LabelledFrames:
    """Frames that somebody called success or not.

    Attributes:
        images: camera to (N, H, W, 3) uint8. ``state``: (N, S) or ``None``.
        positive: (N,) bool. ``episode``: (N,) which episode each is from; validation never shares one with training.
    """

    images: Mapping[str, np.ndarray]
    positive: np.ndarray
    episode: np.ndarray
    state: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.positive)
        for name, rows in {
            **self.images,
            "episode": self.episode,
            **({} if self.state is None else {"state": self.state}),
        }.items():
            if len(rows) != n:
                raise ValueError(f"{name} has {len(rows)} rows: accepted are {n}, one a label")
        if not self.positive.any() or self.positive.all():
            raise ValueError(f"{int(self.positive.sum())} of {n} frames are positive: accepted is some of each kind")


def split_by_episode(frames: LabelledFrames, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) masks; validation gets about ``share`` of the episodes and both kinds of frames.

    Raises:
        ValueError: no split by episode leaves both kinds on both sides.
    """
    episodes = np.unique(frames.episode)
    rng = np.random.default_rng(seed)
    for _ in range(200):
        chosen = rng.permutation(episodes)[: max(1, round(share * len(episodes)))]
        held = np.isin(frames.episode, chosen)
        sides = (frames.positive[held], frames.positive[~held])
        if all(len(s) and s.any() and not s.all() for s in sides):
            return ~held, held
    raise ValueError(
        f"{len(episodes)} episodes: none of 200 splits by episode has successes and failures on both sides; record both kinds in "
        "at least two episodes each"
    )


def fit_classifier(
    frames: LabelledFrames,
    encoder: ImageEncoder,
    config: ClassifierConfig,
    budget: FitBudget,
    *,
    seed: int = 0,
    share: float = 0.25,
) -> tuple[SuccessClassifier, FitReport]:
    """Train, stop at the best validation loss, calibrate. Cameras are read in the order of ``frames.images``.

    The report's metrics are of the validation episodes: ``auc``, ``threshold`` (:func:`deciding_threshold`), ``precision`` and ``recall``
    there, ``ece``.
    """
    rng = np.random.default_rng(seed)
    train, held = split_by_episode(frames, share, seed)
    clock = Clock(budget)
    versions = []
    for k in range(config.crops):
        pictures = {c: v[train] if k == 0 else shifted(v[train], config.pad, rng) for c, v in frames.images.items()}
        versions.append([camera_maps(encoder, p, config) for p in pictures.values()])
    maps = [torch.cat([v[c] for v in versions]) for c in range(len(frames.images))]
    check = [camera_maps(encoder, v[held], config) for v in frames.images.values()]
    labels = np.tile(frames.positive[train], config.crops)
    state = (
        None if frames.state is None else torch.from_numpy(np.tile(frames.state[train].astype(np.float32), (config.crops, 1)))
    )
    check_state = None if frames.state is None else torch.from_numpy(frames.state[held].astype(np.float32))
    truth = torch.from_numpy(frames.positive[held].astype(np.float32))
    weight = torch.where(truth > 0, 0.5 / truth.mean(), 0.5 / (1 - truth.mean()))
    yes, no, half = np.flatnonzero(labels), np.flatnonzero(~labels), config.batch // 2
    target = torch.cat([torch.ones(half), torch.zeros(half)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SuccessClassifier(len(maps), maps[0].shape[1], (int(maps[0].shape[2]), int(maps[0].shape[3])), config)
        optimiser = torch.optim.Adam(model.parameters(), config.learning_rate)
        best, best_step, kept, loss = float("inf"), 0, model.state_dict(), torch.zeros(())
        stopped = ""
        while clock.goes_on():
            model.train()
            rows = torch.from_numpy(np.concatenate([rng.choice(yes, half), rng.choice(no, half)]))
            logits = model([m[rows] for m in maps], None if state is None else state[rows])
            loss = functional.binary_cross_entropy_with_logits(logits, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if clock.steps % LOOK_EVERY == 0 or clock.steps == budget.steps:
                model.eval()
                with torch.no_grad():
                    found = float(functional.binary_cross_entropy_with_logits(model(check, check_state), truth, weight))
                if found < best:
                    best, best_step, kept = found, clock.steps, {k: v.clone() for k, v in model.state_dict().items()}
                elif clock.steps - best_step >= config.patience:
                    stopped = "plateau"
                    break
        model.load_state_dict(kept)
    model.eval()
    with torch.no_grad():
        logits = model(check, check_state)
    scale, shift = platt(logits.numpy(), frames.positive[held])
    model.scale.fill_(scale)
    model.shift.fill_(shift)
    probability = model.probability(check, check_state)
    threshold = deciding_threshold(probability, frames.positive[held])
    precision, recall = precision_recall(probability, frames.positive[held], threshold)
    report = clock.report(
        float(loss.detach()), validation_loss=best, auc=roc_auc(probability, frames.positive[held]), precision=precision,
        recall=recall, threshold=threshold, ece=calibration(probability, frames.positive[held]).error, validation_frames=float(held.sum()),
    )  # fmt: skip
    report.stopped = stopped or report.stopped
    return model, report


def deciding_threshold(probability: np.ndarray, positive: np.ndarray, wanted: float = 0.85) -> float:
    """The probability above which a frame counts: ``wanted``, where half of the successes are above it.

    Calibration on few frames promises little (20 successes never more than 21/22, and less where classes overlap), so that a fixed
    threshold may never be reached. Then it is the one that calls most successes right, a failure called a success costing ten of them.
    """
    _, recall = precision_recall(probability, positive, wanted)
    if recall >= 0.5:
        return wanted
    scores = np.unique(np.asarray(probability, np.float64))
    between = [t for t in 0.5 * (scores[1:] + scores[:-1]) if t < wanted]
    if not between:
        return wanted

    def worth(t: float) -> float:
        said = probability > t
        return float(said[positive].mean() - 10.0 * said[~positive].mean())

    worths = np.array([worth(t) for t in between])
    best = np.flatnonzero(worths >= worths.max() - 1e-12)
    return float(between[best[len(best) // 2]]) if worths.max() > 0.0 else wanted


def platt(logits: np.ndarray, positive: np.ndarray, rounds: int = 100) -> tuple[float, float]:
    """Scale and shift that make logits calibrated on these labels (Platt scaling with its smoothed targets).

    A scale below zero would turn the classifier round; then it is left alone.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    y = np.where(positive, (n + 1) / (n + 2), 1 / (m + 2))
    x = np.stack([logits.astype(np.float64), np.ones(len(logits))], 1)
    theta = np.array([1.0, 0.0])
    prior = np.array([1.0, 0.0])
    for _ in range(rounds):
        p = 1 / (1 + np.exp(-np.clip(x @ theta, -30, 30)))
        gradient = x.T @ (p - y) + 1e-2 * (theta - prior)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-2 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        theta = theta - step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    return (float(theta[0]), float(theta[1])) if theta[0] > 0 else (1.0, 0.0)
