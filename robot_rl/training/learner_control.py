"""What the owner of a learner process may tell it while it runs: one small JSON file in its folder, replaced atomically."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from robot_rl.replay.files import replace_json

CONTROL = "control.json"
IN_USE = "in_use.json"
"""Versions that the acting side may come back to; written by it."""


@dataclass(frozen=True)
class LearnerControl:
    """Zero leaves what the configuration says.

    Attributes:
        paused: no gradient steps; stores are still followed.
        publish_every_s, checkpoint_every_s: seconds.
        updates_per_step: updates an environment step is worth from now on.
        checkpoints: how many extra checkpoints have been asked for so far; one is written when it grows.
    """

    paused: bool = False
    publish_every_s: float = 0.0
    checkpoint_every_s: float = 0.0
    updates_per_step: float = 0.0
    checkpoints: int = 0

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(folder / CONTROL, asdict(self), sync=False)


def read_control(folder: Path) -> LearnerControl:
    """The last word; the defaults where nobody spoke or it cannot be read."""
    try:
        data = json.loads((folder / CONTROL).read_bytes())
        return LearnerControl(**{f.name: data[f.name] for f in fields(LearnerControl)})
    except (OSError, ValueError, KeyError, TypeError):
        return LearnerControl()
