"""The learner's heartbeat: one small JSON file, replaced atomically, that the acting side and operators read."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from robot_rl.replay.files import replace_json

STATUS = "status.json"
LearnerState = Literal["starting", "offline", "collecting", "warm-up", "learning", "paused", "stopped", "failed"]


@dataclass
class LearnerStatus:
    """What a learner says about itself. Times are wall-clock nanoseconds of its machine.

    Attributes:
        state: ``collecting`` waits for the warm-up's steps; ``failed`` carries ``error``.
        env_steps, episodes: ingested so far. ``episodes_refused``, ``rewards_refused``: not fit for this learner.
        updates_owed: worth of what was ingested and not yet learned from; ``updates_dropped``: owed beyond the bound.
        version, published_ns, published_updates: of the last publication.
    """

    state: LearnerState = "starting"
    pid: int = 0
    started_ns: int = 0
    heartbeat_ns: int = 0
    updates: int = 0
    actor_updates: int = 0
    env_steps: int = 0
    episodes: int = 0
    episodes_refused: int = 0
    rewards_refused: int = 0
    updates_owed: float = 0.0
    updates_dropped: float = 0.0
    version: int = 0
    published_ns: int = 0
    published_updates: int = 0
    checkpoint_ns: int = 0
    error: str = ""

    @classmethod
    def begin(cls) -> LearnerStatus:
        return cls(pid=os.getpid(), started_ns=time.time_ns())

    def write(self, folder: Path) -> None:
        """Replace ``folder/status.json``; the heartbeat is now."""
        self.heartbeat_ns = time.time_ns()
        replace_json(folder / STATUS, {"schema": 1, **asdict(self)}, sync=False)


def read_status(folder: Path) -> LearnerStatus | None:
    """The last heartbeat, or None when there is none (yet) or it cannot be read."""
    try:
        data = json.loads((folder / STATUS).read_bytes())
        return LearnerStatus(**{f.name: data[f.name] for f in fields(LearnerStatus)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
