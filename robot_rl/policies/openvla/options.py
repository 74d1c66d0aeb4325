"""What the user says about an OpenVLA checkpoint beyond its path. Reading it costs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robot_rl.policies.checkpoint_options import CheckpointOptions, given_options


@dataclass(frozen=True)
class OpenVLAOptions(CheckpointOptions):
    """Options of an OpenVLA base policy; the same keys may lie beside the checkpoint in ``robot_rl.json``.

    Attributes:
        camera: the recorded picture that it is shown, e.g. ``observation.images.front``.
        task: the instruction.
        unnorm_key: whose action statistics apply; the only ones where the checkpoint holds one set.
        decoding: ``greedy`` writes the likeliest words, as OpenVLA does; ``sample`` draws them, by noise of the shape of the chunk.
        temperature: of ``sample``.
        horizon: rows of a chunk. OpenVLA writes one; a checkpoint that was fine-tuned on longer ones writes them row by row.
        picture: how the camera's picture is cut and resized, see :class:`robot_rl.policies.pictures.PictureTransform`; without, pictures
            come in the size that the checkpoint was trained with.
        action: the executed action's limits, names, kinds and modes; a training run puts in the task's.
        dtype: of the weights in memory.
        prompt_cache_mb: memory for embedded observations and instructions, from which a head that trains the model learns.
        input_cache_mb: memory for the observations themselves, from which a forgotten one is embedded again.
    """

    camera: str = ""
    task: str = ""
    unnorm_key: str = ""
    decoding: Literal["greedy", "sample"] = "greedy"
    temperature: float = 1.0
    horizon: int = 1
    picture: Mapping[str, Any] | None = None
    action: Mapping[str, Any] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompt_cache_mb: int = 2048
    input_cache_mb: int = 4096

    def __post_init__(self) -> None:
        if not self.camera.startswith("observation.images."):
            raise ValueError(f"camera={self.camera!r}: accepted is the recorded picture to show, e.g. observation.images.front")
        if self.decoding not in ("greedy", "sample"):
            raise ValueError(f"decoding={self.decoding!r}: accepted are greedy, sample")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: accepted are float32, bfloat16")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: accepted are numbers > 0")
        for name in ("horizon", "prompt_cache_mb", "input_cache_mb"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are integers >= 1")
        if not isinstance(self.task, str) or not self.task:
            raise ValueError(f"task={self.task!r}: accepted is the instruction, a sentence")
        self.action_spec()


def read_options(folder: Path, given: Mapping[str, Any] | None = None) -> OpenVLAOptions:
    """Options beside a checkpoint, overridden by ``given``.

    Raises:
        ValueError: an unknown option, or a value that is not accepted.
    """
    try:
        return OpenVLAOptions(**given_options(OpenVLAOptions, folder, given))
    except ValueError as error:
        raise ValueError(f"{folder}: base.options.{error}") from None
