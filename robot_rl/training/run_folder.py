"""The run folder (see docs/architecture.md): where everything lies, and logs that can be rewound to a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robot_rl.evaluation.results import append_jsonl, read_jsonl
from robot_rl.training.exclusive import exclusive

if TYPE_CHECKING:
    from robot_rl.training.config import BaseConfig

UNFINISHED = "unfinished.safetensors"
"""A cloning on its way, in the folder of its policy."""

LOGS = ("metrics.jsonl", "evaluations.jsonl", "gate.jsonl")


def to_json(value: Any) -> Any:
    """Numpy scalars and arrays, paths and non-finite numbers to what strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def base_source(folder: Path, base: BaseConfig) -> Path:
    """Where a run's base is: ``base.path``, unless the run cloned or changed it itself, or it needs what the run's ``base/`` (``folder``)
    knows of it (how it was loaded)."""
    path = base.path
    if path is None or base.replan_every:
        return folder
    told = bool(base.options) or not (path / "policy.json").exists()
    return folder if told and (folder / "policy.json").exists() else path


class RunFolder:
    """Paths and append-only logs of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.base = path / "base"
        self.demos = path / "demos"
        self.store = path / "store"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "weights"
        self.learner = path / "learner"  # only where the learner is a process of its own
        self.videos = path / "videos"
        self.tensorboard = path / "tensorboard"
        self.result = path / "result.json"
        self.config = path / "config.yaml"

    def alone(self) -> AbstractContextManager[None]:
        """Nobody else trains here while this lasts. Raises RuntimeError where somebody does."""
        refusal = f"run_dir={str(self.path)!r}: another process trains in it; accepted is another folder, or this one when that process has ended"
        return exclusive(self.path / ".lock", refusal)

    def append(self, log: str, line: Mapping[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``, ``evaluations.jsonl`` or ``gate.jsonl``."""
        append_jsonl(self.path / log, to_json(line))

    def read(self, log: str) -> list[dict[str, Any]]:
        """Every whole line of a log; a torn last one (the run was killed) is left out."""
        return read_jsonl(self.path / log)

    def write_lines(self, name: str, lines: list[Mapping[str, Any]]) -> None:
        """Replace a whole JSONL file at once."""
        self.write_text(name, "".join(json.dumps(to_json(line), allow_nan=False) + "\n" for line in lines))

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Atomically: readers see the old file or the new one."""
        draft = self.path / f"{name}.tmp"
        draft.write_text(text)
        os.replace(draft, self.path / name)

    def log_sizes(self, logs: Sequence[str] = LOGS) -> dict[str, int]:
        """Bytes of the logs, for :meth:`rewind_logs`."""
        return {log: (self.path / log).stat().st_size if (self.path / log).exists() else 0 for log in logs}

    def rewind_logs(self, sizes: Mapping[str, int], logs: Sequence[str] = LOGS) -> None:
        """Cut the logs back to a checkpoint's sizes: what came after it is about to happen again."""
        for log in logs:
            path = self.path / log
            if path.exists():
                with path.open("r+b") as file:
                    file.truncate(min(sizes.get(log, 0), path.stat().st_size))
