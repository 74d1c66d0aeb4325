"""Progress by asking a VLM: shuffled frames, pairwise changes, trends, token probabilities, a scale of five (specification 2.6)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from robot_rl.rewards.causal import scores_of
from robot_rl.rewards.features import spread
from robot_rl.rewards.source import Coverage, EpisodeTrace, FrameBatch, ScoreBatch, SourceInfo
from robot_rl.rewards.vlm.client import VlmClient
from robot_rl.rewards.vlm.config import vlm_config
from robot_rl.rewards.vlm.questions import Answer, Question, claim, delta, done, rubric, shuffled_progress, trend
from robot_rl.types import RewardKind

Method = Literal["shuffled", "pairwise", "trend", "claim", "rubric", "done"]
# What a stretch is worth (RLinf): losing ground costs less than gaining it brings, so that trying is not punished.
TRENDS = {"positive": 1.0, "unclear": 0.0, "negative": -0.2}


def shuffle_order(episode_id: str, step: int, count: int) -> np.ndarray:
    """A permutation that only the episode and step decide: the same question again hits the cache."""
    seed = int.from_bytes(hashlib.sha256(f"{episode_id}\x00{step}".encode()).digest()[:8], "big")
    return np.random.default_rng(seed).permutation(count)


def shuffled_values(
    client: VlmClient, goal: str, frames: np.ndarray, episode_id: str, most: int = 15, shuffle: bool = True
) -> tuple[np.ndarray, str]:
    """(T,) progress in [0, 1] of every frame from one question about at most ``most`` of them, linear in between; a reason if none.

    The first frame is shown in its place and counts as 0; the others come in random order, because in order a model can
    answer "rising" without looking (GVL, arXiv 2411.04549).
    """
    count = len(frames)
    if count < 2:
        return np.full(count, np.nan), "no_context"
    chosen = spread(count, most)
    others = chosen[1:]
    order = shuffle_order(episode_id, count - 1, len(others)) if shuffle else np.arange(len(others))
    answer = client.ask(shuffled_progress(goal, frames[0], [frames[i] for i in others[order]]))
    if not answer.valid:
        return np.full(count, np.nan), answer.reason
    said = np.zeros(len(others))
    for row in answer.value["frames"]:
        said[order[int(row["i"]) - 2]] = float(row["progress"]) / 100.0
    return np.interp(np.arange(count), chosen, np.concatenate([[0.0], said])), ""


def advance(value: float, change: float) -> float:
    """VLAC's update of progress (0..100) by a signed share of what remains (gains) or of what was done (losses)."""
    c = min(100.0, max(-99.0, change))
    v = min(100.0, max(0.0, value))
    if c > 0:
        return v + (100.0 - v) * c / 100.0
    if c < 0:
        return max(10.0, 100.0 - (100.0 - v) * 100.0 / (100.0 + c)) if v > 50.0 else v + v * c / 100.0
    return v


def token_margin(top: dict[str, float], yes: str = "True", no: str = "False") -> float:
    """log p(yes) - log p(no); an absent word is bounded by the smallest probability that was returned; NaN without either."""
    if yes not in top and no not in top:
        return math.nan
    least = min(top.values())
    return top.get(yes, least) - top.get(no, least)


@dataclass
class VlmProgressSource:
    """A potential asked of a VLM once an episode (``shuffled``) or along it, a dense reward (``trend``), or a verdict (``done``).

    Attributes:
        vlm: settings of :class:`~robot_rl.rewards.vlm.VlmConfig`, budget included.
        camera: the view that is shown. ``goal``: used where an episode names no task.
        method: ``shuffled`` frames, ``pairwise`` changes every ``stride`` steps, ``trend`` (every ``stride`` steps, whether the stretch
            behind gained, 1, lost, -0.2, or neither, 0), ``claim`` (token probabilities of a claim of success), ``rubric`` (final
            state on a scale of five) or ``done`` (a success verdict on the last frame).
        frames: shown at most. ``midpoint``, ``softness``: of ``claim``'s sigmoid, from calibration.
        shuffle: off only to measure what shuffling changes.
    """

    vlm: dict[str, Any]
    camera: str
    name: str = "vlm"
    goal: str = ""
    method: Method = "shuffled"
    frames: int = 15
    stride: int = 5
    threshold: float = 0.9
    midpoint: float = 0.0
    softness: float = 1.0
    shuffle: bool = True
    coverage: Coverage = field(default="every_step", init=False)

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r}: accepted are {', '.join(get_args(Method))}")
        if not 2 <= self.frames <= 32 or self.stride < 1 or self.softness <= 0:
            raise ValueError(
                f"frames={self.frames}, stride={self.stride}, softness={self.softness}: accepted are 2 to 32, >= 1, and > 0"
            )
        kinds = {"done": RewardKind.SUCCESS, "trend": RewardKind.DENSE}
        self.kind = kinds.get(self.method, RewardKind.POTENTIAL)
        if self.method in ("done", "rubric", "claim"):
            self.coverage = "episode"
        elif self.method == "trend":
            self.coverage = "on_event"
        self.needs = frozenset({self.camera})
        self.client = VlmClient(vlm_config(self.vlm))
        self._prompt = self._example().prompt_hash

    def _example(self) -> Any:
        blank = np.zeros((2, 2, 3), np.uint8)
        asked = {"pairwise": delta("g", blank, blank), "claim": claim("g", [blank]), "rubric": rubric("g", [blank])}
        asked |= {"done": done("g", [blank]), "shuffled": shuffled_progress("g", blank, [blank]), "trend": trend("g", [blank])}
        return asked[self.method]

    def describe(self) -> SourceInfo:
        return SourceInfo(f"{self.client.config.model_id}/{self.method}", self._prompt, deterministic=False)

    def connect(
        self, endpoint: str = "", model: str = "", max_qps: float = 0.0, max_in_flight: int = 0, cache: str = ""
    ) -> None:
        """Change where and how hard the server is asked; empty and 0 leave what was configured. The budget stays."""
        given = {"base_url": endpoint, "model": model, "rate_per_s": max_qps, "in_flight": max_in_flight, "cache": cache}
        changed = {name: value for name, value in given.items() if value}
        if any(getattr(self.client.config, k) != v for k, v in changed.items()):
            config = dataclasses.replace(self.client.config, **changed)  # type: ignore[arg-type]
            self.client.close()
            self.client = VlmClient(config)

    def figures(self) -> dict[str, Any]:
        """For the node's diagnostics."""
        return self.client.state()

    def close(self) -> None:
        self.client.close()

    def score(self, batch: FrameBatch) -> ScoreBatch:
        return ScoreBatch.none()  # asked about whole episodes, never in the stream of frames

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch:
        frames = np.asarray(trace.observations[self.camera])
        goal, last = trace.task or self.goal, len(frames) - 1
        if not goal:
            return ScoreBatch.failed(np.array([last]), "no_context")
        steps = np.arange(len(frames))
        if self.method == "shuffled":
            values, reason = shuffled_values(self.client, goal, frames, trace.episode_id, self.frames, self.shuffle)
            return scores_of(steps, values, reason)
        if self.method == "pairwise":
            return self._pairwise(goal, frames, steps)
        if self.method == "trend":
            return self._trend(goal, frames)
        shown = [frames[i] for i in spread(len(frames), self.frames)]
        one = np.array([last], np.int64)
        if self.method == "claim":
            answer = self.client.ask(claim(goal, shown))
            margin = token_margin(answer.top) if answer.valid else math.nan
            if not math.isfinite(margin):
                return ScoreBatch.failed(one, answer.reason or "parse")
            return scores_of(one, np.array([1 / (1 + math.exp(-(margin - self.midpoint) / self.softness))]))
        if self.method == "rubric":
            answer = self.client.ask(rubric(goal, shown))
            return (
                scores_of(one, np.array([(answer.value["score"] - 1) / 4.0]))
                if answer.valid
                else ScoreBatch.failed(one, answer.reason)
            )
        return self._verdict(self.client.ask(done(goal, [frames[-1]])), one)

    def _stretches(self, count: int) -> list[tuple[int, int]]:
        """(first, last) frame of every stretch of ``stride`` steps; the last one may be shorter."""
        looked = np.unique(np.append(np.arange(0, count, self.stride), count - 1)).tolist()
        return list(itertools.pairwise(looked))

    def _trend(self, goal: str, frames: np.ndarray) -> ScoreBatch:
        stretches = self._stretches(len(frames))

        def question(first: int, last: int) -> Question:
            return trend(goal, [frames[first + i] for i in spread(last - first + 1, self.frames)])

        answers = list(self.client.ask_all(question(a, b) for a, b in stretches))
        values = np.array([TRENDS[a.value["trend"]] if a.valid else math.nan for a in answers], np.float32)
        valid = np.isfinite(values)
        return ScoreBatch(np.array([b for _, b in stretches], np.int64), values, valid, tuple(a.reason for a in answers))

    def _pairwise(self, goal: str, frames: np.ndarray, steps: np.ndarray) -> ScoreBatch:
        pairs = self._stretches(len(frames))
        looked = np.array([0, *(b for _, b in pairs)])
        answers = list(self.client.ask_all(delta(goal, frames[a], frames[b]) for a, b in pairs))
        values, value, known = [0.0], 0.0, len(looked)
        for k, answer in enumerate(answers):
            if not answer.valid:  # what follows a gap cannot be known: changes add up
                known = k + 1
                break
            value = advance(value, float(answer.value["delta"]))
            values.append(value / 100.0)
        out = np.interp(steps, looked[:known], values[:known])
        if known < len(looked):
            out[looked[known - 1] + 1 :] = np.nan
        return scores_of(steps, out, next((a.reason for a in answers if not a.valid), ""))

    def _verdict(self, answer: Answer, one: np.ndarray) -> ScoreBatch:
        if not answer.valid:
            return ScoreBatch.failed(one, answer.reason)
        sure = float(answer.value["confidence"]) >= self.threshold
        success = bool(answer.value["success"]) and sure
        return ScoreBatch(
            one, np.array([float(success)], np.float32), np.ones(1, bool), ("",), success, int(one[0]) if success else -1
        )


def binned_progress(probabilities: Sequence[Sequence[float]]) -> np.ndarray:
    """(T,) expected progress from (T, K) probabilities over equal bins of [0, 1], as served reward models give them."""
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or (p < 0).any() or not np.allclose(p.sum(1), 1.0, atol=1e-3):
        raise ValueError(f"probabilities of shape {p.shape}: accepted are rows that sum to 1")
    return p @ np.linspace(0.0, 1.0, p.shape[1])
