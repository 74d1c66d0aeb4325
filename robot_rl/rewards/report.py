"""How good is a reward, before anyone trains on it? (rewards specification 1.9)

Ground truth is the episodes' recorded success. Everything is measured on what the source says about whole episodes, and about
the same episodes reversed, shuffled and under a wrong instruction: a reward that likes those as well knows nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.rewards.labelling import score_safely, trace_of
from robot_rl.rewards.preference import LabelConfig, label_pairs
from robot_rl.rewards.source import EpisodeTrace, RewardSource, ScoreBatch
from robot_rl.rewards.statistics import Calibration, calibration, precision_recall, roc_auc, value_order_correlation
from robot_rl.types import OBSERVATION_IMAGES, Episode, RewardKind

VOC_BAR, AUC_BAR, VALID_BAR, RECALL_BAR = 0.5, 0.8, 0.9, 0.5
WRONG_INSTRUCTION = "to water the plants outside the house"
PICTURES = 12


@dataclass(frozen=True)
class Frame:
    """A picture that should not have been liked."""

    episode_id: str
    step: int
    value: float
    picture: np.ndarray


@dataclass
class EpisodeLine:
    """One episode's row; ``values`` by observation, NaN where unknown."""

    episode_id: str
    success: bool | None
    length: int
    said_success: bool | None
    said_at: int
    last: float
    voc: float
    voc_reversed: float
    voc_shuffled: float
    values: np.ndarray = field(repr=False)


@dataclass
class RewardReport:
    """Everything the page shows; NaN where it could not be measured."""

    source: str
    model_id: str
    prompt_hash: str
    kind: str
    episodes: int
    successes: int
    failures: int
    valid_fraction: float
    invalid: dict[str, int]
    voc: float
    voc_reversed: float
    voc_shuffled: float
    auc: float
    agreement: float
    precision: float
    recall: float
    false_positives: int
    false_positive_episodes: float
    detection_delay: float
    wrong_instruction: float
    right_instruction: float
    order_consistency: float
    calibration: Calibration | None
    seconds_per_episode: float
    latency_p50_ms: float
    latency_p95_ms: float
    cost: dict[str, float]
    lines: list[EpisodeLine] = field(repr=False, default_factory=list)
    frames: list[Frame] = field(repr=False, default_factory=list)

    def findings(self) -> list[str]:
        """Why nobody should train on this source yet; empty when nothing speaks against it."""
        out = []
        if self.valid_fraction < VALID_BAR:
            out.append(f"valid_fraction {self.valid_fraction:.2f} is below {VALID_BAR}")
        if self.kind != RewardKind.SUCCESS.value:
            if math.isnan(self.voc):
                out.append("voc is unknown: no successful episode was scored")
            elif self.voc < VOC_BAR:
                out.append(f"voc {self.voc:.2f} is below {VOC_BAR}")
        if math.isnan(self.auc):
            out.append("auc is unknown: there are no successes and failures to tell apart")
        elif self.auc < AUC_BAR:
            out.append(f"auc {self.auc:.2f} is below {AUC_BAR}")
        if self.kind == RewardKind.SUCCESS.value and self.recall < RECALL_BAR:
            out.append(f"recall {self.recall:.2f} is below {RECALL_BAR}: it calls few of the successes one")
        return out

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("lines", "frames")}
        data["calibration"] = None if self.calibration is None else dataclasses.asdict(self.calibration)
        data["findings"] = self.findings()
        data["per_episode"] = [
            {f.name: getattr(line, f.name) for f in dataclasses.fields(line) if f.name != "values"} for line in self.lines
        ]
        data["false_positive_frames"] = [{"episode_id": f.episode_id, "step": f.step, "value": f.value} for f in self.frames]
        return _plain(data)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def judge_source(
    source: RewardSource, episodes: Iterable[Episode], *, controls: bool = True, swaps: int = 10, seed: int = 0
) -> RewardReport:
    """Measure a source on recorded episodes.

    Args:
        controls: also score reversed and shuffled copies and a wrong instruction (four times the work, and the cost).
        swaps: pairs of frames asked in both orders, for sources that ask a VLM.
    """
    rng = np.random.default_rng(seed)
    lines: list[EpisodeLine] = []
    invalid: dict[str, int] = {}
    frames: list[Frame] = []
    seconds: list[float] = []
    scored = valid = 0
    wrong: list[float] = []
    right: list[float] = []
    pairs: list[tuple[str, np.ndarray, np.ndarray]] = []
    dense = source.kind is not RewardKind.SUCCESS
    for episode in episodes:
        trace, began = trace_of(episode), time.monotonic()
        scores = score_safely(source, trace)
        seconds.append(time.monotonic() - began)
        scored, valid = scored + len(scores.steps), valid + int(np.sum(scores.valid))
        for reason, ok in zip(scores.reason, scores.valid, strict=False):
            if not ok:
                invalid[reason] = invalid.get(reason, 0) + 1
        values = by_observation(scores, trace.length)
        success = episode.meta.success
        voc = back = mixed = math.nan
        if dense and success is not False and np.isfinite(values).sum() > 2:
            voc = value_order_correlation(values)
            if controls:
                back = value_order_correlation(
                    by_observation(score_safely(source, reordered(trace, np.arange(trace.length, -1, -1))), trace.length)
                )
                mixed = value_order_correlation(
                    by_observation(score_safely(source, reordered(trace, rng.permutation(trace.length + 1))), trace.length)
                )
                other = by_observation(score_safely(source, dataclasses.replace(trace, task=WRONG_INSTRUCTION)), trace.length)
                wrong.append(float(np.nanmean(other)) if np.isfinite(other).any() else math.nan)
                right.append(float(np.nanmean(values)))
        known = values[np.isfinite(values)]
        said = scores.success if not dense else None
        last = float(known[-1]) if len(known) else math.nan
        if not dense:
            last = confidence(source, trace, float(bool(said)) if said is not None else math.nan)
        lines.append(EpisodeLine(
            episode.meta.episode_id, success, trace.length, said, scores.success_step, last, voc, back, mixed, values,
        ))  # fmt: skip
        frames += disliked(trace, success, scores, values, dense)
        camera = next((n for n in sorted(source.needs) if n.startswith(OBSERVATION_IMAGES)), "")
        if camera and len(pairs) < swaps and trace.length >= 2:
            pictures = np.asarray(trace.observations[camera])
            a, b = sorted(rng.choice(len(pictures), 2, replace=False).tolist())
            pairs.append((trace.task, pictures[a], pictures[b]))
    frames = sorted(frames, key=lambda f: -f.value)[:PICTURES]
    return _report(source, lines, frames, seconds, scored, valid, invalid, wrong, right, pairs)


def by_observation(scores: ScoreBatch, length: int) -> np.ndarray:
    """(L + 1,) values of an episode, NaN where there is none."""
    values = np.full(length + 1, np.nan)
    values[np.asarray(scores.steps, np.int64)] = scores.value
    return values


def reordered(trace: EpisodeTrace, order: np.ndarray) -> EpisodeTrace:
    """The same pictures in another order, at the same times; under another name, so that nothing is remembered of it."""
    observations = {name: np.asarray(rows)[order] for name, rows in trace.observations.items()}
    return dataclasses.replace(
        trace, episode_id=f"{trace.episode_id}.reordered.{order[0]}.{order[-1]}", observations=observations
    )


def confidence(source: RewardSource, trace: EpisodeTrace, fallback: float) -> float:
    """The largest k-of-n probability of an episode where the source has probabilities, else its verdict as a number."""
    probabilities = getattr(source, "probabilities", None)
    decision = getattr(source, "decision", None)
    if probabilities is None or decision is None:
        return fallback
    p = np.asarray(probabilities(trace.observations), np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(p, (decision.n - 1, 0)), decision.n)
    return float(np.sort(windows, axis=1)[:, -decision.k].max())


def disliked(trace: EpisodeTrace, success: bool | None, scores: ScoreBatch, values: np.ndarray, dense: bool) -> list[Frame]:
    """Frames of failed episodes that were called a success, or that scored highest."""
    camera = next((n for n in sorted(trace.observations) if n.startswith(OBSERVATION_IMAGES)), "")
    if success is not False or not camera:
        return []
    if dense:
        if not np.isfinite(values).any():
            return []
        step = int(np.nanargmax(values))
        return [Frame(trace.episode_id, step, float(values[step]), np.asarray(trace.observations[camera])[step])]
    if not scores.success:
        return []
    step = scores.success_step if scores.success_step >= 0 else trace.length
    return [Frame(trace.episode_id, step, 1.0, np.asarray(trace.observations[camera])[step])]


def _report(
    source: RewardSource, lines: list[EpisodeLine], frames: list[Frame], seconds: list[float], scored: int, valid: int,
    invalid: dict[str, int], wrong: list[float], right: list[float], pairs: list[tuple[str, np.ndarray, np.ndarray]],
) -> RewardReport:  # fmt: skip
    info = source.describe()
    judged = [line for line in lines if line.success is not None]
    truth = np.array([bool(line.success) for line in judged], bool)
    last = np.array([line.last for line in judged])
    known = np.isfinite(last)
    said = np.array([bool(line.said_success) for line in judged], bool)
    dense = source.kind is not RewardKind.SUCCESS
    called = last > 0.5 if dense else said
    precision, recall = precision_recall(called.astype(float), truth, 0.5) if len(judged) else (math.nan, math.nan)
    probable = known & (last >= 0) & (last <= 1)
    false = int((called & ~truth).sum())
    delays = [line.said_at - line.length for line in judged if line.said_success and line.success and line.said_at >= 0]
    consistency, cost = math.nan, {}
    client = getattr(source, "client", None)
    if client is not None:
        consistency = _swaps(source, client, pairs)
        requests, tokens, money = client.budget.spent()
        cost = {"requests_today": float(requests), "tokens_today": float(tokens), "money_today": money}
    latency = np.array(seconds) * 1e3 if seconds else np.zeros(1)
    return RewardReport(
        source=source.name, model_id=info.model_id, prompt_hash=info.prompt_hash, kind=source.kind.value, episodes=len(lines),
        successes=int(truth.sum()), failures=int((~truth).sum()), valid_fraction=valid / scored if scored else 1.0, invalid=invalid,
        voc=_median(line.voc for line in lines), voc_reversed=_median(line.voc_reversed for line in lines),
        voc_shuffled=_median(line.voc_shuffled for line in lines), auc=roc_auc(last[known], truth[known]) if known.any() else math.nan,
        agreement=float((called == truth).mean()) if len(judged) else math.nan, precision=precision, recall=recall,
        false_positives=false, false_positive_episodes=false / max(int((~truth).sum()), 1),
        detection_delay=float(np.median(delays)) if delays else math.nan, wrong_instruction=_median(wrong),
        right_instruction=_median(right), order_consistency=consistency,
        calibration=calibration(last[probable], truth[probable]) if probable.any() else None,
        seconds_per_episode=float(np.mean(seconds)) if seconds else 0.0, latency_p50_ms=float(np.percentile(latency, 50)),
        latency_p95_ms=float(np.percentile(latency, 95)), cost=cost, lines=lines, frames=frames,
    )  # fmt: skip


def _swaps(source: RewardSource, client: Any, pairs: list[tuple[str, np.ndarray, np.ndarray]]) -> float:
    """Share of pairs of frames that a VLM orders the same way whichever is shown first."""
    agreed = swapped = 0
    for task, a, b in pairs:
        goal = task or getattr(source, "goal", "")
        if goal:
            _, report = label_pairs(client, goal, [[a], [b]], np.array([[0, 1]]), LabelConfig(swap_first=1))
            agreed, swapped = agreed + report.agreed, swapped + report.swapped
    return agreed / swapped if swapped else math.nan


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return float(np.median(known)) if known else math.nan


def write_report(report: RewardReport, folder: str | Path) -> Path:
    """``<source>.json`` and ``<source>.html`` in a folder; gives the JSON's path, which a channel's ``report`` names."""
    from robot_rl.rewards.report_page import page

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{report.source}.html").write_text(page(report), encoding="utf-8")
    target = path / f"{report.source}.json"
    target.write_text(json.dumps(report.to_json(), indent=1), encoding="utf-8")
    return target
