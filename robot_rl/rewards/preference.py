"""Comparisons from a VLM, and the reward trained on them as a source (RL-VLM-F; rewards specification 2.5)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from robot_rl.rewards.causal import CausalSource
from robot_rl.rewards.features import FeatureConfig, FrameFeatures
from robot_rl.rewards.learned import load_model, save_model
from robot_rl.rewards.preference_model import Pairs, PreferenceConfig, PreferenceModel
from robot_rl.rewards.progress import check_encoder
from robot_rl.rewards.vlm.client import VlmClient
from robot_rl.rewards.vlm.questions import Answer, Question, pair
from robot_rl.types import RewardKind

KIND = "preference"
ALARM_AFTER, ALARM_BELOW = 100, 0.6


@dataclass(frozen=True)
class LabelConfig:
    """Attributes:
    swap_first: so many pairs are asked in both orders; ``swap_share`` of those after them.
    identical: pictures whose difference has a smaller norm are never asked about.
    """

    swap_first: int = 200
    swap_share: float = 0.25
    identical: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.swap_share <= 1.0:
            raise ValueError(f"swap_share={self.swap_share}: accepted are 0 to 1")


@dataclass
class LabelReport:
    """What came of asking; ``consistency`` is of the pairs that were decided in both orders."""

    asked: int = 0
    labels: dict[str, int] = field(default_factory=lambda: {"0": 0, "1": 0, "-1": 0})
    invalid: dict[str, int] = field(default_factory=dict)
    swapped: int = 0
    agreed: int = 0
    alarm: bool = False

    @property
    def consistency(self) -> float:
        return self.agreed / self.swapped if self.swapped else float("nan")


def label_pairs(
    client: VlmClient, goal: str, views: Sequence[Sequence[np.ndarray]], chosen: np.ndarray, config: LabelConfig | None = None
) -> tuple[Pairs, LabelReport]:
    """Ask which of two moments is closer to the goal.

    Args:
        views: for each moment, one picture a camera. ``chosen``: (P, 2) moments to compare.

    Returns:
        The pairs that have a label; a pair whose two orders contradict each other, or whose answer is undecided or invalid,
        is left out: never a guess. ``report.labels`` counts the undecided ones.
    """
    config = config or LabelConfig()
    rng, report = np.random.default_rng(config.seed), LabelReport()
    plan: list[tuple[int, int, bool]] = []
    for a, b in chosen.tolist():
        gap = sum(float(np.square(x.astype(np.float32) - y).sum()) for x, y in zip(views[a], views[b], strict=True)) ** 0.5
        if gap < config.identical:
            report.invalid["identical_images"] = report.invalid.get("identical_images", 0) + 1
            continue
        plan.append((a, b, len(plan) < config.swap_first or rng.random() < config.swap_share))
    report.asked = len(plan)

    def questions() -> Iterator[Question]:
        for a, b, both in plan:
            yield pair(goal, views[a], views[b])
            if both:
                yield pair(goal, views[b], views[a])

    answers = client.ask_all(questions())
    kept: list[tuple[int, int, int]] = []
    for a, b, both in plan:
        label = _label(next(answers), report)
        if both:
            back = _label(next(answers), report)
            other = None if back is None else {0: 1, 1: 0, -1: -1}[back]
            if label is not None and other is not None and label >= 0 and other >= 0:
                report.swapped += 1
                report.agreed += label == other
            if label != other:
                if label is not None and other is not None:
                    report.invalid["order_inconsistent"] = report.invalid.get("order_inconsistent", 0) + 1
                label = None
        if label is None:
            continue
        report.labels[str(label)] += 1
        if label >= 0:
            kept.append((a, b, label))
    report.alarm = report.swapped >= ALARM_AFTER and report.consistency < ALARM_BELOW
    rows = np.array(kept, np.int64).reshape(-1, 3)
    return Pairs(rows[:, 0], rows[:, 1], rows[:, 2]), report


def _label(answer: Answer, report: LabelReport) -> int | None:
    if answer.valid:
        return int(answer.value["label"])
    report.invalid[answer.reason] = report.invalid.get(answer.reason, 0) + 1
    return None


@dataclass
class PreferenceSource(CausalSource):
    """The trained ensemble as a reward in [-1, 1] for every frame.

    Attributes:
        model: folder that :func:`save_preferences` wrote.
    """

    model: str
    name: str = "preference"
    encoder_weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kind, self.low = RewardKind.PREFERENCE_MODEL, -1.0
        state, settings, self.model_id = load_model(self.model, KIND)
        self.features = FrameFeatures(FeatureConfig.from_json(settings["features"], self.encoder_weights))
        check_encoder(self.model, settings["encoder_id"], self.features.model_id)
        self._network = PreferenceModel(self.features.dim, PreferenceConfig(**settings["preference"]))
        self._network.load_state_dict(state)

    def values(self, rows: np.ndarray, task: str, first: int) -> np.ndarray:
        return self._network.reward(rows[first:])[0]


def save_preferences(folder: str | os.PathLike[str], model: PreferenceModel, features: FrameFeatures) -> str:
    """Write a model folder for :class:`PreferenceSource`; gives its identity."""
    settings = {
        "features": features.config.to_json(), "encoder_id": features.model_id, "preference": dataclasses.asdict(model.config),
    }  # fmt: skip
    return save_model(folder, KIND, model.state_dict(), settings)
