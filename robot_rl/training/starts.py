"""Which start every training episode has: a new one, one that a curriculum chose, or the middle of a demonstration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from robot_rl import seeding
from robot_rl.sim.curriculum import ResetCurriculum, StartCurriculum
from robot_rl.sim.rollout import Rollout
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.demonstrations import gathered
from robot_rl.training.run_folder import RunFolder


@dataclass(frozen=True)
class Start:
    """Of one episode: its seed, what is replayed before the policy acts, and where a curriculum keeps it.

    Attributes:
        group: episodes of one group begin in the same state; a number that no other group of the run has.
        place: position in the curriculum's pool, -1 for a start from elsewhere.
    """

    seed: int
    group: int
    place: int = -1
    prefix: np.ndarray | None = None


class Starts:
    """The starts of a run's rounds; what round r begins with depends on the run's seed, r, and what was recorded before.

    A curriculum's pool is looked at (its starts are reset once) before the first round that needs it.
    """

    def __init__(self, config: PostTrainConfig, folder: RunFolder, rollout: Rollout) -> None:
        self.config, self.folder, self.rollout = config, folder, rollout
        self._curriculum: StartCurriculum | None = None
        self._resets: ResetCurriculum | None = None
        self._saved: dict[str, Any] = {}

    def plan(self, number: int) -> list[Start]:
        """One start an episode of round ``number``; a group's episodes follow each other."""
        schedule, c = self.config.schedule, self.config.curriculum
        size = schedule.group_size
        count = schedule.round_episodes // size
        groups = [number * count + i for i in range(count)]
        seeds = [seeding.key("training", self.config.seed, g) % seeding.TRAINING.last for g in groups]
        starts = [Start(seed, group) for seed, group in zip(seeds, groups, strict=True)]
        if c.starts != "all":
            curriculum = self._pool()
            places = curriculum.choose(count, number)
            starts = [Start(curriculum.seeds[p], group, p) for p, group in zip(places, groups, strict=True)]
        if c.resets != "off":
            for i, found in enumerate(self._demonstrations().choose(count, number)):
                if found is not None:
                    starts[i] = Start(found[0], groups[i], -1, found[1])
        return [start for start in starts for _ in range(size)]

    def record(self, starts: list[Start], successes: list[bool]) -> None:
        """How the round that :meth:`plan` gave went."""
        played = list(zip(starts, successes, strict=True))
        if self._curriculum is not None:
            self._curriculum.record([(s.place, float(success)) for s, success in played if s.place >= 0])
        if self._resets is not None:
            self._resets.record([float(success) for s, success in played if s.prefix is not None])

    def scalars(self) -> dict[str, float]:
        """For the metrics."""
        return {} if self._resets is None else {"curriculum/reset_share_done": self._resets.share_done}

    def state(self) -> dict[str, Any]:
        """JSON; what was loaded and not needed yet stays as it was."""
        parts = {"starts": self._curriculum, "resets": self._resets}
        return self._saved | {name: part.state() for name, part in parts.items() if part is not None}

    def load(self, state: dict[str, Any]) -> None:
        self._saved = dict(state)
        self._curriculum = self._resets = None

    def _pool(self) -> StartCurriculum:
        if self._curriculum is None:
            c, vector = self.config.curriculum, self.rollout.vector
            seeds = [seeding.key("pool", self.config.seed, i) % seeding.TRAINING.last for i in range(c.pool)]
            found: list[dict[str, float]] = []
            for first in range(0, len(seeds), len(vector)):
                some = seeds[first : first + len(vector)]
                results = vector.reset_many(dict(enumerate(some)))
                found += [{k: float(v) for k, v in results[i][1].get("start", {}).items()} for i in range(len(some))]
            self._curriculum = StartCurriculum(c, seeds, found, (self.config.seed,))
            if "starts" in self._saved:
                self._curriculum.load(self._saved["starts"])
        return self._curriculum

    def _demonstrations(self) -> ResetCurriculum:
        if self._resets is None:
            env_id = self.rollout.spec.env_id
            usable = [
                (e.meta.seed, e.action)
                for e in gathered(self.config.demos, self.folder)
                if e.meta.success and e.meta.seed is not None and e.meta.env_id == env_id and e.meta.seed in seeding.TRAINING
            ]
            self._resets = ResetCurriculum(self.config.curriculum, usable, (self.config.seed,))
            if "resets" in self._saved:
                self._resets.load(self._saved["resets"])
        return self._resets
