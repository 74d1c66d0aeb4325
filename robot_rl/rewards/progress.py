"""The progress regressor as a reward source: a potential in (0, 1) for every frame (rewards specification 2.7)."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import numpy as np

from robot_rl.rewards.causal import CausalSource
from robot_rl.rewards.features import FeatureConfig, FrameFeatures
from robot_rl.rewards.learned import load_model, save_model
from robot_rl.rewards.progress_model import ProgressConfig, ProgressModel
from robot_rl.rewards.text import TextEncoder, build_text_encoder

KIND = "progress"


@dataclass
class ProgressSource(CausalSource):
    """Attributes:
    model: folder that :func:`save_progress` wrote.
    instruction: used where an episode names no task.
    encoder_weights: where this machine keeps the encoder's weights, if not where they were in training.
    """

    model: str
    name: str = "progress"
    instruction: str = ""
    encoder_weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        state, settings, self.model_id = load_model(self.model, KIND)
        self.features = FrameFeatures(FeatureConfig.from_json(settings["features"], self.encoder_weights))
        check_encoder(self.model, settings["encoder_id"], self.features.model_id)
        self._text = build_text_encoder(settings["text_weights"], settings["text_dim"])
        self._network = ProgressModel(self.features.dim, self._text.dim, ProgressConfig(**settings["progress"]))
        self._network.load_state_dict(state)
        self._network.eval()

    def values(self, rows: np.ndarray, task: str, first: int) -> np.ndarray:
        sentence = task or self.instruction
        if not sentence:
            raise ValueError(f"{self.name}: the episode names no task, and instruction is empty; accepted is a sentence")
        return self._network.score(rows, self._text.encode([sentence])[0], first)


def save_progress(
    folder: str | os.PathLike[str], model: ProgressModel, features: FrameFeatures, text: TextEncoder, text_weights: str = ""
) -> str:
    """Write a model folder for :class:`ProgressSource`; gives its identity."""
    settings = {
        "features": features.config.to_json(), "encoder_id": features.model_id, "text_weights": text_weights, "text_dim": text.dim,
        "progress": dataclasses.asdict(model.config),
    }  # fmt: skip
    return save_model(folder, KIND, model.state_dict(), settings)


def check_encoder(model: str, trained: str, present: str) -> None:
    """Raises ValueError when a model would be fed by another encoder than the one it was trained on."""
    if trained != present:
        raise ValueError(
            f"model={model!r} was trained on features of {trained!r}: accepted is that encoder, here is {present!r}"
        )
