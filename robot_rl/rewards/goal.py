"""Goals as pictures or words: how far along the line from start to goal a frame lies (rewards specification 2.4).

The goal-baseline projection is VLM-RM's (arXiv 2310.12921); the start-goal form takes the episode's own first frames as baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from robot_rl.rewards.causal import CausalSource
from robot_rl.rewards.features import FeatureConfig, FrameFeatures
from robot_rl.vision.encoders import EncoderConfig, file_hash, pooled

Measure = Literal["projection", "cosine", "distance"]


def goal_baseline(
    x: np.ndarray, goals: np.ndarray, baselines: np.ndarray, alpha: float = 0.5, normalise_goal: bool = True
) -> np.ndarray:
    """(N,) reward 1 - ||P_alpha (x - g)||^2 / 2 of unit vectors (N, D) against goal (P, D) and baseline (P, D) prompts.

    Raises:
        ValueError: unequal or no prompts, alpha outside [0, 1], or goal and baseline mean the same.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha}: accepted are 0 to 1")
    if len(goals) != len(baselines) or not len(goals):
        raise ValueError(
            f"{len(goals)} goal prompts and {len(baselines)} baseline prompts: accepted are equal numbers, at least 1"
        )
    g, b = np.asarray(goals, np.float64).mean(0), np.asarray(baselines, np.float64).mean(0)
    if normalise_goal:
        g, b = g / np.linalg.norm(g), b / np.linalg.norm(b)
    d = g - b
    length = float(np.linalg.norm(d))
    if length < 1e-6:
        raise ValueError("goal and baseline prompts have the same embedding: accepted are prompts that differ")
    off = np.asarray(x, np.float64) - g
    along = (off @ d / length**2)[:, None] * d
    return 1.0 - np.square(alpha * along + (1 - alpha) * off).sum(1) / 2.0


def start_goal_projection(rows: np.ndarray, start: np.ndarray, goal: np.ndarray, clip: bool = True) -> np.ndarray:
    """(N,) share of the way from ``start`` to ``goal`` (D,) of feature rows (N, D); clipped to [0, 1] unless told not to.

    NaN where start and goal cannot be told apart.
    """
    way = np.asarray(goal, np.float64) - start
    length = float(way @ way)
    if length < 1e-12:
        return np.full(len(rows), np.nan)
    share = (np.asarray(rows, np.float64) - start) @ way / length
    return np.clip(share, 0.0, 1.0) if clip else share


def ends(count: int, share: float) -> int:
    """How many frames make up the first (or last) ``share`` of an episode; at least one."""
    return max(1, int(count * share))


def measure(rows: np.ndarray, start: np.ndarray, goal: np.ndarray, how: Measure = "projection") -> np.ndarray:
    """(N,) closeness of feature rows to a goal."""
    if how == "projection":
        return start_goal_projection(rows, start, goal)
    if how == "distance":
        return -np.linalg.norm(rows - goal, axis=1)
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(goal)
    return (rows @ goal) / np.maximum(norms, 1e-12)


@dataclass
class GoalImageSource(CausalSource):
    """Potential from goal pictures: each camera's frames against its own goal, averaged over cameras.

    Attributes:
        cameras: features to look at. ``goals``: camera to a picture file, or to several whose features are averaged: the last
            frames of a demonstration.
        measure: ``projection`` on the way from the episode's first frames to the goal, ``cosine``, or negative ``distance``.
        first_frames: how many frames of the episode are averaged into its start.
        encoder, grid: see :class:`~robot_rl.rewards.features.FeatureConfig`.
    """

    cameras: list[str]
    goals: dict[str, str | list[str]]
    name: str = "goal_image"
    measure: Measure = "projection"
    first_frames: int = 3
    encoder: dict[str, object] = field(default_factory=dict)
    grid: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure not in ("projection", "cosine", "distance"):
            raise ValueError(f"measure={self.measure!r}: accepted are projection, cosine, distance")
        if self.first_frames < 1:
            raise ValueError(f"first_frames={self.first_frames}: accepted are integers >= 1")
        if set(self.goals) != set(self.cameras):
            raise ValueError(f"goals={sorted(self.goals)}: accepted is a picture for each of cameras={sorted(self.cameras)}")
        config = FeatureConfig(tuple(self.cameras), EncoderConfig(**self.encoder), self.grid)  # type: ignore[arg-type]
        self.features = FrameFeatures(config)
        self._view = self.features.dim // len(self.cameras)
        self._goals = []
        digests = []
        for camera in self.cameras:
            given = self.goals[camera]
            files = [Path(f).expanduser() for f in ([given] if isinstance(given, str) else given)]
            absent = [str(f) for f in files if not f.is_file()]
            if absent or not files:
                raise ValueError(f"goals.{camera}={given!r}: no such picture {', '.join(absent)}")
            pictures = [read_picture(f) for f in files]
            self._goals.append(
                np.mean([pooled(self.features.encoder.maps(p[None]), self.grid).numpy()[0] for p in pictures], 0)
            )
            digests += [file_hash(f) for f in files]
        self.model_id = f"goal@{'+'.join(digests)[:40]}/{self.features.model_id}/{self.measure}"

    def values(self, rows: np.ndarray, task: str, first: int) -> np.ndarray:
        total = np.zeros(len(rows) - first)
        for k, goal in enumerate(self._goals):
            view = rows[:, k * self._view : (k + 1) * self._view]
            # The start is known from the first frames; until they are all there, from those that are.
            for i, t in enumerate(range(first, len(view))):
                start = view[: min(self.first_frames, t + 1)].mean(0)
                total[i] += measure(view[t : t + 1], start, goal, self.measure)[0]
        return total / len(self._goals)


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image file."""
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


@dataclass
class ClipGoalSource(CausalSource):
    """Goal and baseline in words, through a paired image and text encoder whose weights are on this disk (open_clip).

    Attributes:
        goal, baseline: equally many sentences: the task done, and the scene without it.
        alpha: 1 measures only along the line from baseline to goal, 0 the plain distance.
    """

    cameras: list[str]
    goal: list[str]
    baseline: list[str]
    model: str
    weights: str
    name: str = "clip_goal"
    alpha: float = 0.5
    size: int = 224
    normalise_goal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        config = FeatureConfig(tuple(self.cameras), EncoderConfig("open_clip", self.weights, self.model, self.size, "crop"), 1)
        self.features = FrameFeatures(config)
        import open_clip
        import torch

        tokens = open_clip.get_tokenizer(self.model)([*self.goal, *self.baseline])
        whole = open_clip.create_model(self.model, pretrained=self.weights).eval()
        with torch.inference_mode():
            text = torch.nn.functional.normalize(whole.encode_text(tokens), dim=-1).numpy()
        self._goal, self._baseline = text[: len(self.goal)], text[len(self.goal) :]
        goal_baseline(self._goal, self._goal, self._baseline, self.alpha, self.normalise_goal)  # refuses what cannot work
        self.model_id = f"clip_goal/{self.features.model_id}/a{self.alpha:g}"

    def values(self, rows: np.ndarray, task: str, first: int) -> np.ndarray:
        views = np.split(rows[first:], len(self.cameras), axis=1)
        unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in views]
        each = [goal_baseline(v, self._goal, self._baseline, self.alpha, self.normalise_goal) for v in unit]
        return np.mean(each, 0)
