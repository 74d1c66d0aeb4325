"""A session whose learner runs inline: collect, learn, gate, evaluate, one after the other.

On one machine a resumed run gives the numbers of one that was never interrupted.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from robot_rl.heads.base import Head
from robot_rl.policies.base import BasePolicy
from robot_rl.progress import Progress
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.sim.rollout import EpisodeOutcome, Rollout
from robot_rl.training.acting_session import PHASES, ActingSession, Counters
from robot_rl.training.build import Learner
from robot_rl.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.interrupt import Interrupted, InterruptFlag
from robot_rl.training.learner_core import LearnerCore
from robot_rl.training.run_folder import RunFolder
from robot_rl.types import Episode

__all__ = ["PHASES", "Counters", "Session"]


OFFLINE_BLOCK = 100  # updates between two looks at the clock


class Session(ActingSession):
    """The reinforcement-learning part of a run with its learner inside: everything between the frozen base and the final table.

    Attributes:
        core: buffer, learner and random state; also reachable as ``learner``, ``buffer``, ``rng``.
    """

    KEEP_EPISODES = True

    def __init__(
        self,
        config: PostTrainConfig,
        folder: RunFolder,
        base: BasePolicy,
        demos: list[Episode],
        rollout: Rollout,
        progress: Progress,
        flag: InterruptFlag,
        device: str,
    ) -> None:
        super().__init__(config, folder, base, rollout, progress, flag, device)
        self.core = LearnerCore(config, base, demos, self.counters, folder, self.scalars, device)

    @property
    def learner(self) -> Learner:
        return self.core.learner

    @property
    def buffer(self) -> ReplayBuffer:
        return self.core.buffer

    @property
    def rng(self) -> np.random.Generator:
        return self.core.rng

    @property
    def head(self) -> Head:
        return self.learner.head

    @property
    def updates(self) -> int:
        return self.learner.updates

    def learner_summary(self) -> dict[str, Any]:
        return {"mode": "inline"}

    # ---- phases

    def _prepare(self) -> None:
        """The offline phase; it may be interrupted after any update."""
        c, total = self.counters, self.config.schedule.offline_updates
        if self.core.on_policy:  # its own policy plays from the first episode on
            c.actor_started_at = max(c.actor_started_at, 0)
        if not self.core.offline_left:
            return
        self.progress.start("offline learning", total)
        self.progress.advance(c.offline_done)
        while self.core.offline_left:
            began, before = time.monotonic(), c.offline_done
            try:
                self.core.learn_offline(min(OFFLINE_BLOCK, self.core.offline_left), self.flag.raise_if_set)
            except Interrupted:
                self._spend("learn", began)
                self.checkpoint()
                raise
            self.progress.advance(c.offline_done - before)
            self._spend("learn", began)
            if time.monotonic() - self._last_checkpoint >= self.config.schedule.checkpoint_every_s:
                self.checkpoint()

    def _explorer(self) -> ActingPolicy:
        """The base during warm-up, then the newest head mixed with the base."""
        if not self.core.warm:
            if self.config.schedule.warmup_acting == "base":
                return self._base_explorer()
            return ActingPolicy(self.base, self.learner.head, "explore", self.counters.version, device=self.device)
        return self._explore_with(self.learner.head, self.counters.version)

    def _make_room(self, ids: list[str]) -> None:
        prefix = ids[0].partition("e")[0] + "e"
        for stale in self.store.episode_ids():
            if stale.startswith(prefix):  # an earlier attempt at this very round was cut short
                self.store.discard(stale)

    def _played(self, outcomes: list[EpisodeOutcome], steps: int) -> None:
        for outcome in outcomes:
            assert outcome.episode is not None
            self.core.ingest(outcome.episode)
        self.core.credit(steps)

    def _learn(self) -> None:
        """Critic warm-up once, then as many updates as the collected steps are worth."""
        c, schedule = self.counters, self.config.schedule
        if self.core.on_policy:
            self.core.learn_round()
        elif self.core.warm_up_due:
            self.progress.log(
                f"critic warm-up on {len(self.buffer)} steps: {schedule.return_updates} updates on returns, "
                f"{schedule.warmup_updates} by temporal difference"
            )
            self.core.warm_up(self.flag.raise_if_set)
        elif self.core.warm:
            self.core.spend(on_update=self.flag.raise_if_set)
        else:
            c.updates_owed = 0.0

    def _candidate(self) -> int | None:
        if self.config.head.starts_as_base and self.learner.actor_updates == 0:
            return None  # it is the base still: probation would spend episodes on what is known
        return self.core.publish(self.channel).version

    # ---- saving and resuming

    def checkpoint(self) -> None:
        state = {
            **self.core.state(),
            "counters": dict(vars(self.counters)),
            "gate": self.gate.state_dict(),
            "starts": self.starts.state(),
            "episodes": [i for i in self.core.held() if i in self.store],
            "recorded": self.store.episode_ids(),  # also what the buffer had no room for any more
            "curve": [[version, mode, *counts] for (version, mode), counts in self._curve.items()],
            "logs": self.folder.log_sizes(),
        }
        save_checkpoint(self.folder.checkpoints, f"step-{self.counters.env_steps:09d}", self.core.tensors(), state)
        self._last_checkpoint = time.monotonic()

    def resume(self) -> bool:
        """Continue from the latest checkpoint; False when there is none.

        Raises:
            ValueError: the checkpoint belongs to another configuration or base policy.
        """
        path = latest_checkpoint(self.folder.checkpoints)
        if path is None:
            self._forget([])
            self.folder.rewind_logs({})  # baselines that were cut short are measured again
            return False
        tensors, state = load_checkpoint(path)
        self.core.load(tensors, state, str(path))
        self.counters = self.core.counters = Counters(**state["counters"])
        self.gate.load_state_dict(state["gate"])
        self.starts.load(state.get("starts", {}))
        self._curve = {(v, m): (k, n) for v, m, k, n in state["curve"]}
        self.folder.rewind_logs(state["logs"])
        self._forget(state["recorded"])
        self.channel.rewind(self.counters.version)
        for episode_id in state["episodes"]:
            self.core.ingest(self.store.read(episode_id))
        self.progress.log(f"resumed at {self.counters.env_steps} steps ({path.name})")
        return True

    def _forget(self, keep: list[str]) -> None:
        """Set aside episodes that came after the checkpoint: the resumed run plays those rounds again."""
        for episode_id in set(self.store.episode_ids()) - set(keep):
            self.store.discard(episode_id)
