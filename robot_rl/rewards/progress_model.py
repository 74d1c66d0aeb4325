"""How far along is it? A causal transformer over an episode's frames and its instruction (ReWiND, arXiv 2505.10911).

Trained on demonstrations alone: time is the target, and augmentation supplies what demonstrations never show. Rewound clips
undo what they did, reversed clips begin at the goal, and wrong instructions make no progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.rewards.features import spread
from robot_rl.rewards.learned import Clock, FitBudget, FitReport, Whitening
from robot_rl.rewards.statistics import value_order_correlation
from robot_rl.rewards.transformer import CausalTransformer

READ_ROWS = 512


@dataclass(frozen=True)
class ProgressConfig:
    """Attributes:
    frames: length of the window; it always starts at the episode's first frame.
    width, layers, heads, dropout: of the transformer. ``components``: whitened principal directions it reads; 0 reads
        features as they are.
    target: ``absolute``: share of the demonstration that has passed; ``clip``: share of what remained when the clip began.
    rewind, reverse, mismatch: chances that a clip is rewound, whole reversed, or given another task's instruction.
    reference: ``frame``: every frame as it is; ``first``: the first frame as it is and the others as what has changed since.
        The first says which way progress goes, the change how far; with few demonstrations that generalises better.
    from_start: chance that a training clip begins where the demonstration does, as every window does that is scored.
    noise: standard deviation added to (whitened) features in training.
    mirror: each batch element is repeated with another task's instruction and target 0.
    """

    frames: int = 16
    width: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    components: int = 0
    target: Literal["absolute", "clip"] = "absolute"
    rewind: float = 0.8
    reverse: float = 0.3
    mismatch: float = 0.2
    reference: Literal["frame", "first"] = "frame"
    from_start: float = 0.0
    noise: float = 0.0
    mirror: bool = True
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.target not in ("absolute", "clip"):
            raise ValueError(f"progress.target={self.target!r}: accepted are absolute, clip")
        if self.reverse and self.target == "clip":
            raise ValueError(
                f"progress.reverse={self.reverse}: accepted is 0 with target=clip (a reversed clip has no remainder)"
            )
        if self.reference not in ("frame", "first"):
            raise ValueError(f"progress.reference={self.reference!r}: accepted are frame, first")
        for name in ("rewind", "reverse", "mismatch", "dropout", "from_start"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"progress.{name}={getattr(self, name)}: accepted are 0 to 1")
        for name in ("frames", "width", "layers", "heads", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"progress.{name}={getattr(self, name)}: accepted are integers >= 1")


@dataclass(frozen=True)
class Clip:
    """A successful demonstration: (T, F) features from start to goal, and its instruction's (L,) embedding."""

    features: np.ndarray
    text: np.ndarray


class ProgressModel(nn.Module):
    """Window (B, N, F), text (B, L), valid counts (B,) to progress (B, N) in (0, 1); row i sees rows 0..i."""

    def __init__(self, features: int, text: int, config: ProgressConfig) -> None:
        super().__init__()
        self.config = config
        self.whitening = Whitening(features, config.components) if config.components else None
        self.image = nn.Linear(config.components or features, config.width)
        self.text = nn.Linear(text, config.width)
        self.first = nn.Parameter(torch.zeros(config.width))  # frames carry no other position: it would count them
        self.trunk = CausalTransformer(config.width, config.layers, config.heads, config.dropout)
        half = max(config.width // 2, 1)
        self.head = nn.Sequential(
            nn.Linear(config.width, half), nn.LayerNorm(half), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(half, 1)
        )

    def reduce(self, features: Tensor) -> Tensor:
        """(..., F) to what the transformer reads."""
        return features if self.whitening is None else self.whitening(features)

    def forward(self, reduced: Tensor, text: Tensor) -> Tensor:
        if self.config.reference == "first":
            reduced = torch.cat([reduced[:, :1], reduced[:, 1:] - reduced[:, :1]], 1)
        frames = self.image(reduced)
        frames = torch.cat([frames[:, :1] + self.first, frames[:, 1:]], 1)
        seen = self.trunk(torch.cat([self.text(text)[:, None], frames], 1))[:, 1:]
        return torch.sigmoid(self.head(seen).squeeze(-1))

    @torch.inference_mode()
    def score(self, features: np.ndarray, text: np.ndarray, first: int = 0) -> np.ndarray:
        """(T - first,) progress at every frame from ``first`` on, each from the frames up to it.

        Args:
            features: (T, F) of one episode from its first frame on.
            text: (L,) embedding of its instruction.
        """
        self.eval()
        count, frames = len(features), self.config.frames
        rows = np.zeros((count - first, frames), np.int64)
        last = np.zeros(count - first, np.int64)
        for i, t in enumerate(range(first, count)):
            chosen = spread(t + 1, frames)
            rows[i, : len(chosen)], rows[i, len(chosen) :] = chosen, t
            last[i] = len(chosen) - 1
        needed, rows = np.unique(rows, return_inverse=True)  # online, a window is a few of many frames
        rows = rows.reshape(count - first, frames)
        reduced = self.reduce(torch.from_numpy(np.asarray(features[needed], np.float32)))
        sentence = torch.from_numpy(np.asarray(text, np.float32))
        out = []
        for k in range(0, len(rows), READ_ROWS):
            window = reduced[torch.from_numpy(rows[k : k + READ_ROWS])]
            values = self(window, sentence.expand(len(window), -1))
            # What lies after the last valid row is padding; causal attention keeps it out of every row before.
            out.append(values.gather(1, torch.from_numpy(last[k : k + READ_ROWS])[:, None])[:, 0])
        return torch.cat(out).numpy() if out else np.zeros(0, np.float32)


class ClipSampler:
    """Draws training windows: indices into a demonstration and their targets."""

    def __init__(self, config: ProgressConfig, clips: Sequence[Clip], others: np.ndarray, rng: np.random.Generator) -> None:
        if not clips:
            raise ValueError("no demonstrations: accepted is at least one successful episode")
        short = min(len(c.features) for c in clips)
        if short < 4:
            raise ValueError(f"a demonstration has {short} frames: accepted are at least 4")
        self.config, self.clips, self.rng = config, clips, rng
        texts, self.task = np.unique(np.stack([c.text for c in clips]), axis=0, return_inverse=True)
        self.task = self.task.reshape(-1)
        self.texts = np.concatenate([texts, others.reshape(-1, texts.shape[1])]).astype(np.float32)

    def window(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame indices of one augmented clip of a demonstration of ``length`` frames, and a target each."""
        c, rng = self.config, self.rng
        start = 0 if rng.random() < c.from_start else int(rng.integers(0, length // 2 + 1))
        end = int(rng.integers(max(length // 2, start + 2), length + 1))
        rows = np.arange(start, end)
        if rng.random() < c.reverse:
            rows = length - 1 - rows  # the same stretch of the demonstration played backwards
            return self._fit(rows, (rows + 1) / length)
        target = (rows + 1) / length if c.target == "absolute" else (rows - start + 1) / (length - start)
        if rng.random() < c.rewind:
            back = int(rng.integers(2, len(rows) + 1))
            turn = slice(len(rows) - 2, len(rows) - 1 - back if back < len(rows) else None, -1)  # the turning frame once only
            rows, target = np.concatenate([rows, rows[turn]]), np.concatenate([target, target[turn]])
        return self._fit(rows, target)

    def _fit(self, rows: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = spread(len(rows), self.config.frames)
        return rows[chosen], target[chosen]

    def batch(self) -> tuple[list[tuple[int, np.ndarray]], np.ndarray, np.ndarray, np.ndarray]:
        """(demonstration, rows) of each window; texts (B, L); targets (B, N); weights (B, N), 0 on padding."""
        c, rng = self.config, self.rng
        drawn, sentences = [], []
        target, weight = np.zeros((c.batch, c.frames), np.float32), np.zeros((c.batch, c.frames), np.float32)
        for b in range(c.batch):
            i = int(rng.integers(len(self.clips)))
            rows, wanted = self.window(len(self.clips[i].features))
            right = int(self.task[i])
            wrong = len(self.texts) > 1 and rng.random() < c.mismatch
            sentences.append(self._other(right) if wrong else right)
            target[b, : len(rows)] = 0.0 if wrong else wanted
            weight[b, : len(rows)] = 1.0
            if c.target == "clip":
                weight[b, 0] = 0.0  # the first frame of a clip says nothing about its share
            drawn.append((i, np.pad(rows, (0, c.frames - len(rows)), mode="edge")))
        if c.mirror and len(self.texts) > 1:
            drawn += drawn
            sentences += [self._other(int(self.task[i])) for i, _ in drawn[: c.batch]]
            target, weight = np.concatenate([target, np.zeros_like(target)]), np.concatenate([weight, weight])
        return drawn, self.texts[sentences], target, weight

    def _other(self, task: int) -> int:
        other = int(self.rng.integers(len(self.texts) - 1))
        return other + (other >= task)


def fit_progress(
    clips: Sequence[Clip],
    config: ProgressConfig,
    budget: FitBudget,
    *,
    others: np.ndarray | None = None,
    held_out: Sequence[Clip] = (),
    seed: int = 0,
) -> tuple[ProgressModel, FitReport]:
    """Train on demonstrations.

    Args:
        others: (M, L) embeddings of instructions of other tasks; without them (and with one task) text cannot be learned.
        held_out: further demonstrations for the report: median VOC forward, reversed, and mean value under a wrong instruction.

    Raises:
        ValueError: no or too short demonstrations.
    """
    rng = np.random.default_rng(seed)
    text = len(clips[0].text) if clips else 0
    extra = np.zeros((0, text), np.float32) if others is None else np.asarray(others, np.float32)
    sampler = ClipSampler(config, clips, extra, rng)
    clock = Clock(budget)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ProgressModel(clips[0].features.shape[1], text, config)
        if model.whitening is not None:
            model.whitening.fit(np.concatenate([c.features for c in clips]))
        reduced = [model.reduce(torch.from_numpy(np.asarray(c.features, np.float32))).detach() for c in clips]
        optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        model.train()
        loss = torch.zeros(())
        while clock.goes_on():
            drawn, texts, target, weight = sampler.batch()
            window = torch.stack([reduced[i][torch.from_numpy(rows)] for i, rows in drawn])
            if config.noise:
                window = window + config.noise * torch.randn_like(window)
            value = model(window, torch.from_numpy(texts))
            w = torch.from_numpy(weight)
            loss = ((value - torch.from_numpy(target)).square() * w).sum() / w.sum()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    model.eval()
    report = clock.report(float(loss.detach()))
    if held_out:
        forward = [value_order_correlation(model.score(c.features, c.text)) for c in held_out]
        backward = [value_order_correlation(model.score(c.features[::-1].copy(), c.text)) for c in held_out]
        report.metrics |= {"voc": float(np.median(forward)), "voc_reversed": float(np.median(backward))}
        if len(sampler.texts) > 1:
            wrong = [float(model.score(c.features, sampler.texts[-1]).mean()) for c in held_out]
            report.metrics["wrong_instruction"] = float(np.mean(wrong))
    return model, report
