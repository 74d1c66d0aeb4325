"""What the user says about an OpenVLA checkpoint beyond its path. Reading it costs neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from robot_rl.types import ActionSpec

OPTIONS_FILE = "robot_rl.json"


@dataclass(frozen=True)
class OpenVLAOptions:
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

    def action_spec(self) -> ActionSpec | None:
        if self.action is None:
            return None
        try:
            return ActionSpec(**{k: tuple(v) for k, v in self.action.items()})
        except TypeError as error:
            raise ValueError(f"action={dict(self.action)!r}: accepted are low, high, names, kind, mode ({error})") from None

    def identity(self) -> dict[str, Any]:
        """What changes actions (cache sizes do not)."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("_mb")}


def read_options(folder: Path, given: Mapping[str, Any] | None = None) -> OpenVLAOptions:
    """Options beside a checkpoint, overridden by ``given``.

    Raises:
        ValueError: an unknown option, or a value that is not accepted.
    """
    file = folder / OPTIONS_FILE
    beside = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = [f.name for f in fields(OpenVLAOptions)]
    for origin, values in ((str(file), beside), ("base.options", given or {})):
        for name in values:
            if name not in known:
                raise ValueError(f"{origin}: unknown option {name!r}; accepted are {', '.join(known)}")
    try:
        return OpenVLAOptions(**{**beside, **(given or {})})
    except ValueError as error:
        raise ValueError(f"{folder}: base.options.{error}") from None
