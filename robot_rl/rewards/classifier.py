"""The success classifier as a reward source: one success an episode, decided by k of n frames (rewards specification 2.3)."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from robot_rl.rewards.causal import scores_of
from robot_rl.rewards.classifier_model import ClassifierConfig, SuccessClassifier, camera_maps
from robot_rl.rewards.decision import Decider, DecisionConfig
from robot_rl.rewards.features import FeatureConfig, FrameFeatures
from robot_rl.rewards.learned import load_model, save_model
from robot_rl.rewards.progress import check_encoder
from robot_rl.rewards.source import Coverage, EpisodeTrace, FrameBatch, ScoreBatch, SourceInfo
from robot_rl.types import OBSERVATION_STATE, RewardKind

KIND = "classifier"


@dataclass
class ClassifierSource:
    """Attributes:
    model: folder that :func:`save_classifier` wrote.
    output: ``decision`` gives one success an episode; ``probability`` gives every frame's as a potential, to be logged.
    threshold, k, n, refractory_s, guards: see :class:`~robot_rl.rewards.decision.DecisionConfig`; without a threshold it is the one
        that the model found in training.
    end_on_success: ask for the end of the episode when success is decided.
    """

    model: str
    name: str = "classifier"
    output: Literal["decision", "probability"] = "decision"
    threshold: float | None = None
    k: int = 3
    n: int = 5
    refractory_s: float = 2.0
    guards: list[dict[str, Any]] = field(default_factory=list)
    end_on_success: bool = True
    encoder_weights: str = ""

    def __post_init__(self) -> None:
        if self.output not in ("decision", "probability"):
            raise ValueError(f"output={self.output!r}: accepted are decision, probability")
        decides = self.output == "decision"
        self.kind = RewardKind.SUCCESS if decides else RewardKind.POTENTIAL
        self.coverage: Coverage = "on_event" if decides else "every_step"
        state, settings, self._model_id = load_model(self.model, KIND)
        threshold = float(settings.get("threshold", DecisionConfig.threshold)) if self.threshold is None else self.threshold
        self.decision = DecisionConfig(threshold, self.k, self.n, self.refractory_s, guards=tuple(self.guards))  # type: ignore[arg-type]
        self.features = FrameFeatures(FeatureConfig.from_json(settings["features"], self.encoder_weights))
        check_encoder(self.model, settings["encoder_id"], self.features.encoder.model_id)
        self.config = ClassifierConfig(**settings["classifier"])
        size = (int(settings["map"][0]), int(settings["map"][1]))
        self._network = SuccessClassifier(len(self.features.config.cameras), self.features.encoder.channels, size, self.config)
        self._network.load_state_dict(state)
        self._network.eval()
        self._decider = Decider(self.decision)
        self._episode, self._last = "", -1

    @property
    def needs(self) -> frozenset[str]:
        state = {OBSERVATION_STATE} if self.config.state else set()
        return self.features.needs | state | {g.feature for g in self.decision.guards}

    def describe(self) -> SourceInfo:
        return SourceInfo(self._model_id)

    def probabilities(self, observations: Any) -> np.ndarray:
        """(N,) calibrated probability of success of every frame."""
        missing = sorted(self.needs - set(observations) - {g.feature for g in self.decision.guards})
        if missing:
            raise KeyError(f"{', '.join(missing)} missing; there are {sorted(observations)}")
        out = []
        count = len(observations[self.features.config.cameras[0]])
        for i in range(0, count, 64):
            maps = [
                camera_maps(self.features.encoder, observations[c][i : i + 64], self.config)
                for c in self.features.config.cameras
            ]
            state = None
            if self.config.state:
                state = torch.from_numpy(
                    np.asarray(observations[OBSERVATION_STATE][i : i + 64, : self.config.state], np.float32)
                )
            out.append(self._network.probability(maps, state))
        return np.concatenate(out) if out else np.zeros(0, np.float32)

    def score(self, batch: FrameBatch) -> ScoreBatch:
        probability = self.probabilities(batch.observations)
        steps = np.asarray(batch.steps, np.int64)
        if self.output == "probability":
            return scores_of(steps, probability)
        if batch.episode_id != self._episode or (len(steps) and steps[0] <= self._last):
            self._decider.reset()
        self._episode, self._last = batch.episode_id, int(steps[-1]) if len(steps) else self._last
        return self._decided(self._decider, probability, steps, np.asarray(batch.stamps_ns), batch.observations, False)

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch:
        probability = self.probabilities(trace.observations)
        steps = np.arange(len(probability))
        if self.output == "probability":
            return scores_of(steps, probability)
        return self._decided(Decider(self.decision), probability, steps, trace.stamps_ns, trace.observations, True)

    def _decided(
        self, decider: Decider, probability: np.ndarray, steps: np.ndarray, stamps: np.ndarray, observations: Any, whole: bool
    ) -> ScoreBatch:
        unreadable = []
        for i, p in enumerate(probability):
            row = {name: rows[i] for name, rows in observations.items() if name in self.needs}
            said = decider.push(float(p), float(stamps[i]) * 1e-9, row)
            if said is None:
                unreadable.append(int(steps[i]))
            elif said and steps[i] > 0:
                one = np.array([steps[i]], np.int64)
                return ScoreBatch(
                    one, np.ones(1, np.float32), np.ones(1, bool), ("",), True, int(steps[i]), self.end_on_success
                )
        if unreadable:
            return ScoreBatch.failed(np.array(unreadable, np.int64), "guard_unavailable")
        nothing = ScoreBatch.none()
        return dataclasses.replace(nothing, success=False) if whole else nothing


def save_classifier(folder: str | os.PathLike[str], model: SuccessClassifier, features: FrameFeatures, **more: Any) -> str:
    """Write a model folder for :class:`ClassifierSource` (``more``: further settings to keep); gives its identity."""
    settings = {
        "features": features.config.to_json(), "encoder_id": features.encoder.model_id,
        "classifier": dataclasses.asdict(model.config), "map": list(model.kernels[0].shape[1:3]), **more,
    }  # fmt: skip
    return save_model(folder, KIND, model.state_dict(), settings)
