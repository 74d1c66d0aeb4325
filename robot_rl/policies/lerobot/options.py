"""What the user may say about a LeRobot checkpoint beyond its path. Reading it costs neither torch nor lerobot.

The same keys may lie beside the checkpoint in ``robot_rl.json``; a configuration's ``base.options`` go before them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from robot_rl.policies.checkpoint_options import CheckpointOptions, given_options

_SLICE = re.compile(r"(?P<name>[A-Za-z0-9_.]+)\[(?P<start>\d+):(?P<stop>\d+)\]")


@dataclass(frozen=True)
class FeatureSource:
    """Columns ``start`` to ``stop`` (exclusive) of a recorded vector feature."""

    name: str
    start: int
    stop: int

    @classmethod
    def parse(cls, feature: str, text: object) -> FeatureSource:
        found = _SLICE.fullmatch(text) if isinstance(text, str) else None
        if found is None or int(found["start"]) >= int(found["stop"]):
            raise ValueError(f"features.{feature}={text!r}: accepted is e.g. observation.state[0:10], start below stop")
        return cls(found["name"], int(found["start"]), int(found["stop"]))


@dataclass(frozen=True)
class LeRobotOptions(CheckpointOptions):
    """Options of a LeRobot base policy.

    Attributes:
        num_inference_steps: DDIM or Euler steps; ``None`` keeps the checkpoint's where it already samples deterministically,
            and takes 8 DDIM steps where it was saved with DDPM.
        features: policy feature to the columns of a recorded one it is made of, e.g. ``observation.environment_state:
            observation.state[10:18]``, for tasks that keep in one vector what the policy reads as two.
        cameras: recorded picture to how it is cut and resized, see :class:`robot_rl.policies.pictures.PictureTransform`, e.g.
            ``observation.images.top: {size: [480, 640], crop: [0, 80, 480, 480], resize: [96, 96]}``; without, pictures come in
            the size that the policy was trained with.
        action: the executed action's limits, names, kinds and modes; a training run puts in the task's.
        task: the instruction that a language-conditioned policy is given.
        temporal_ensemble: an ACT saved with temporal ensembling averages its own past chunks, which a stateless policy cannot;
            ``off`` runs its chunks as they are.
        noise_dims: ``all`` noise columns of a policy with padded action dimensions, or those of ``real`` actions alone (the
            padding then keeps noise 0).
        prefix_cache_mb: memory for what a language-conditioned policy computes from an observation before it denoises.
        input_cache_mb: memory for the observations themselves, from which a forgotten prefix is computed again.
    """

    num_inference_steps: int | None = None
    features: Mapping[str, str] = field(default_factory=dict)
    cameras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    action: Mapping[str, Any] | None = None
    task: str = ""
    temporal_ensemble: Literal["refuse", "off"] = "refuse"
    noise_dims: Literal["all", "real"] = "all"
    prefix_cache_mb: int = 2048
    input_cache_mb: int = 4096

    def __post_init__(self) -> None:
        if self.num_inference_steps is not None and not (
            isinstance(self.num_inference_steps, int) and self.num_inference_steps >= 1
        ):
            raise ValueError(f"num_inference_steps={self.num_inference_steps!r}: accepted are null or integers >= 1")
        if self.temporal_ensemble not in ("refuse", "off"):
            raise ValueError(f"temporal_ensemble={self.temporal_ensemble!r}: accepted are refuse, off")
        if self.noise_dims not in ("all", "real"):
            raise ValueError(f"noise_dims={self.noise_dims!r}: accepted are all, real")
        for name in ("prefix_cache_mb", "input_cache_mb"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are integers >= 1")
        if not isinstance(self.task, str):
            raise ValueError(f"task={self.task!r}: accepted is a sentence")
        self.sources()
        self.action_spec()

    def sources(self) -> dict[str, FeatureSource]:
        """Policy feature to where it comes from, for those that are columns of another."""
        if not isinstance(self.features, Mapping):
            raise ValueError(f"features={self.features!r}: accepted is a mapping of policy features to recorded columns")
        return {name: FeatureSource.parse(name, text) for name, text in self.features.items()}


def read_options(folder: Path, given: Mapping[str, Any] | None = None) -> LeRobotOptions:
    """Options beside a checkpoint, overridden by ``given``.

    Raises:
        ValueError: an unknown option, or a value that is not accepted.
    """
    return LeRobotOptions(**given_options(LeRobotOptions, folder, given))
