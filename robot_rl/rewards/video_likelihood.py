"""How expected is the next frame, to a model that has only seen experts? (VIPER, arXiv 2305.14343; specification 2.9)

Frames become tokens by a k-means codebook of patches; a causal transformer over a window of frames gives each frame's
likelihood given the ones before. Scaled between percentiles of calibration clips.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robot_rl.rewards.causal import scores_of
from robot_rl.rewards.learned import Clock, FitBudget, FitReport, load_model, save_model
from robot_rl.rewards.source import Coverage, EpisodeTrace, FrameBatch, ScoreBatch, SourceInfo
from robot_rl.rewards.transformer import CausalTransformer
from robot_rl.types import RewardKind
from robot_rl.vision.encoders import fitted

KIND = "video_likelihood"
ROWS = 64


@dataclass(frozen=True)
class VideoConfig:
    """Attributes:
    size, patch: pictures are scaled to ``size`` and cut into patches of ``patch`` pixels.
    codes: of the codebook. ``window``: frames the model sees at once.
    form: ``conditional``: log p of a frame given those before it; ``joint``: of the whole window.
    """

    size: int = 32
    patch: int = 8
    codes: int = 64
    window: int = 4
    width: int = 64
    layers: int = 2
    heads: int = 4
    form: Literal["conditional", "joint"] = "conditional"
    batch: int = 32
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.size % self.patch:
            raise ValueError(f"video.size={self.size}: accepted are multiples of patch={self.patch}")
        if self.window < 2 or self.codes < 2:
            raise ValueError(f"video.window={self.window}, codes={self.codes}: accepted are at least 2")
        if self.form not in ("conditional", "joint"):
            raise ValueError(f"video.form={self.form!r}: accepted are conditional, joint")


def patches(images: np.ndarray, config: VideoConfig) -> Tensor:
    """(N, H, W, 3) uint8 to (N, P, 3 * patch * patch) in 0..1."""
    pixels = fitted(images, config.size, "squash") / 255.0
    return functional.unfold(pixels, config.patch, stride=config.patch).transpose(1, 2)


def kmeans(rows: Tensor, codes: int, generator: torch.Generator, rounds: int = 25) -> Tensor:
    """(codes, D) centres; seeded by k-means++, empty ones restart at the worst-served row."""
    first = int(torch.randint(len(rows), (1,), generator=generator))
    centres = [rows[first]]
    gap = (rows - centres[0]).square().sum(1)
    for _ in range(codes - 1):
        chance = gap.clamp_min(0)
        pick = int(torch.multinomial(chance, 1, generator=generator)) if float(chance.sum()) > 0 else first
        centres.append(rows[pick])
        gap = torch.minimum(gap, (rows - rows[pick]).square().sum(1))
    book = torch.stack(centres)
    for _ in range(rounds):
        distance = torch.cdist(rows, book)
        nearest = distance.argmin(1)
        counts = torch.bincount(nearest, minlength=codes)
        sums = torch.zeros_like(book).index_add_(0, nearest, rows)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], book)
        empty = torch.nonzero(counts == 0)[:, 0]
        if len(empty):
            moved[empty] = rows[distance.min(1).values.topk(len(empty)).indices]
        if torch.equal(moved, book):
            break
        book = moved
    return book


class VideoModel(nn.Module):
    """Tokens (B, window * P) to log p of each token given all before it."""

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.config = config
        self.cells = (config.size // config.patch) ** 2
        length = config.window * self.cells
        self.register_buffer("book", torch.zeros(config.codes, 3 * config.patch**2))
        self.register_buffer("range", torch.tensor([0.0, 1.0]))
        self.book: Tensor
        self.range: Tensor
        self.token = nn.Embedding(config.codes + 1, config.width)  # the last one begins a window
        self.place = nn.Parameter(torch.randn(length, config.width) * 0.02)
        # What stood in the same cell of the frame before is the best guess; far tokens would have to find it first.
        self.above = nn.Embedding(config.codes + 1, config.width)
        self.trunk = CausalTransformer(config.width, config.layers, config.heads, dropout=0.0)
        self.head = nn.Linear(config.width, config.codes)

    def tokens(self, images: np.ndarray) -> Tensor:
        """(N, P) codes of frames."""
        out = []
        for i in range(0, len(images), 256):
            rows = patches(images[i : i + 256], self.config)
            out.append(torch.cdist(rows.flatten(0, 1), self.book).argmin(1).view(rows.shape[:2]))
        return torch.cat(out)

    def forward(self, window: Tensor) -> Tensor:
        """(B, window, P) codes to (B, window, P) log p."""
        flat = window.flatten(1)
        begin = torch.full_like(flat[:, :1], self.config.codes)
        before = torch.cat([begin, flat[:, :-1]], 1)
        above = torch.cat([begin.expand(-1, self.cells), flat[:, : -self.cells]], 1)
        seen = self.trunk(self.token(before) + self.above(above) + self.place)
        said = functional.log_softmax(self.head(seen), -1)
        return said.gather(-1, flat[..., None])[..., 0].view(window.shape)

    @torch.inference_mode()
    def likelihood(self, codes: Tensor) -> np.ndarray:
        """(T,) log likelihood of every frame of a clip (T, P); the first window - 1 get the running mean of the first window."""
        self.eval()
        n, count = self.config.window, len(codes)
        if count < n:
            return np.full(count, np.nan)
        rows = []
        for i in range(0, count - n + 1, ROWS):
            starts = torch.arange(i, min(i + ROWS, count - n + 1))
            each = self(codes[starts[:, None] + torch.arange(n)]).sum(-1)  # (B, window)
            rows.append(each)
        each = torch.cat(rows)
        first = each[0]
        last = each[:, -1] if self.config.form == "conditional" else each.sum(1)
        # Early frames: what is known of the first window so far, so that the value of a frame never needs a later one.
        early = first.cumsum(0) / torch.arange(1, n + 1) if self.config.form == "conditional" else first.cumsum(0)
        return torch.cat([early[: n - 1], last]).numpy()

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """To [0, 1] between the calibration clips' 1st and 99th percentile."""
        low, high = float(self.range[0]), float(self.range[1])
        return np.clip((values - low) / max(high - low, 1e-9), 0.0, 1.0)


def fit_video(
    clips: Sequence[np.ndarray],
    config: VideoConfig,
    budget: FitBudget,
    *,
    calibration: Sequence[np.ndarray] = (),
    seed: int = 0,
) -> tuple[VideoModel, FitReport]:
    """Learn what expert videos (T, H, W, 3) look like.

    Args:
        calibration: clips, of anything, whose likelihoods set the range; the experts' own when empty.

    Raises:
        ValueError: a clip is shorter than the window.
    """
    short = min((len(c) for c in clips), default=0)
    if short < config.window:
        raise ValueError(f"the shortest of {len(clips)} clips has {short} frames: accepted are at least window={config.window}")
    rng, clock = np.random.default_rng(seed), Clock(budget)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoModel(config)
        rows = torch.cat([patches(c, config).flatten(0, 1) for c in clips])
        rows = rows[torch.randperm(len(rows), generator=generator)[:20_000]]
        model.book.copy_(kmeans(rows, config.codes, generator))
        codes = [model.tokens(c) for c in clips]
        optimiser = torch.optim.Adam(model.parameters(), config.learning_rate)
        loss = torch.zeros(())
        model.train()
        while clock.goes_on():
            which = rng.integers(0, len(codes), config.batch)
            window = torch.stack([
                codes[i][s : s + config.window] for i in which for s in [int(rng.integers(0, len(codes[i]) - config.window + 1))]
            ])  # fmt: skip
            loss = -model(window).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    model.eval()
    found = np.concatenate([model.likelihood(model.tokens(c)) for c in calibration or clips])
    low, high = np.nanpercentile(found, [1, 99])
    model.range.copy_(torch.tensor([float(low), float(high)]))
    return model, clock.report(float(loss.detach()))


@dataclass
class VideoLikelihoodSource:
    """A dense reward for every frame. It pays for looking like an expert and never for trying: use it with exploration.

    Attributes:
        model: folder that :func:`save_video` wrote. ``camera``: the view it was trained on.
    """

    model: str
    camera: str
    name: str = "video_likelihood"

    def __post_init__(self) -> None:
        self.kind = RewardKind.DENSE
        self.coverage: Coverage = "every_step"
        state, settings, self._model_id = load_model(self.model, KIND)
        self._network = VideoModel(VideoConfig(**settings["video"]))
        self._network.load_state_dict(state)
        self.needs = frozenset({self.camera})
        self._codes: list[Tensor] = []
        self._episode, self._last = "", -1

    def describe(self) -> SourceInfo:
        return SourceInfo(self._model_id)

    def score(self, batch: FrameBatch) -> ScoreBatch:
        codes = self._network.tokens(np.asarray(batch.observations[self.camera]))
        steps, out = np.asarray(batch.steps, np.int64), []
        for row, step in zip(codes, steps.tolist(), strict=True):
            if batch.episode_id != self._episode or step <= self._last:
                self._codes.clear()
            self._episode, self._last = batch.episode_id, step
            self._codes.append(row)
            del self._codes[: -self._network.config.window]
            out.append(self._newest())
        values = np.array(out, np.float64)
        return scores_of(steps[steps > 0], values[steps > 0])

    def _newest(self) -> float:
        n, known = self._network.config.window, len(self._codes)
        window = torch.stack(self._codes + [self._codes[-1]] * (n - known))  # causal: what pads is not read
        with torch.inference_mode():
            each = self._network(window[None]).sum(-1)[0]
        conditional = self._network.config.form == "conditional"
        if known < n:
            value = each[:known].mean() if conditional else each[:known].sum()
        else:
            value = each[-1] if conditional else each.sum()
        return float(self._network.scaled(np.array([float(value)]))[0])

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch:
        values = self._network.likelihood(self._network.tokens(np.asarray(trace.observations[self.camera])))
        scaled = np.where(np.isfinite(values), self._network.scaled(values), np.nan)
        steps = np.arange(len(values))
        return scores_of(steps[1:], scaled[1:], "no_context")


def save_video(folder: str | os.PathLike[str], model: VideoModel) -> str:
    """Write a model folder for :class:`VideoLikelihoodSource`; gives its identity."""
    return save_model(folder, KIND, model.state_dict(), {"video": dataclasses.asdict(model.config)})
