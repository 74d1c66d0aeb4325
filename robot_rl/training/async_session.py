"""A session whose learner is another process: episodes are played without a pause while it learns from the store.

The acting side records, polls the weight channel between two rounds of episodes, explores with the newest version it has
verified, and runs gate, evaluation and stop rules exactly as an inline session does. What happens when depends on how fast both
sides are, so two runs of one configuration differ.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from robot_rl.heads.base import Head, prior_shape
from robot_rl.policies.base import BasePolicy
from robot_rl.progress import Progress
from robot_rl.replay.files import replace_json
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.weights import VerificationError, WeightSubscriber
from robot_rl.sim.rollout import EpisodeOutcome, Rollout
from robot_rl.training.acting_session import ActingSession, Counters
from robot_rl.training.build import build_head
from robot_rl.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.learner_core import check_belongs
from robot_rl.training.learner_loop import IN_USE
from robot_rl.training.learner_process import LearnerProcess
from robot_rl.training.run_folder import RunFolder

LOGS = ("evaluations.jsonl", "gate.jsonl")  # metrics.jsonl is the learner's


class AsyncSession(ActingSession):
    """The acting side of a run with ``schedule.learner=process``.

    Attributes:
        process: the learner's watcher.
        subscriber: what was accepted from the weight channel, and refused.
    """

    def __init__(
        self,
        config: PostTrainConfig,
        folder: RunFolder,
        base: BasePolicy,
        rollout: Rollout,
        progress: Progress,
        flag: InterruptFlag,
        device: str,
    ) -> None:
        super().__init__(config, folder, base, rollout, progress, flag, device)
        self.process = LearnerProcess(folder, config.learner_process, progress)
        self._untrained = build_head(base, config.head, config.seed, config.learner).to(device)
        self.subscriber = WeightSubscriber(
            self.channel,
            expected_shapes={n: tuple(t.shape) for n, t in self._untrained.state_dict().items()},
            base_hash=base.spec.base_hash,
            stats_hash=base.spec.stats_hash,
            dry_forward=self._dry_forward,
        )
        self._newest: tuple[int, Head] | None = None
        self._refused = 0

    @property
    def head(self) -> Head:
        return self._newest[1] if self._newest else self._untrained

    @property
    def updates(self) -> int:
        return self.process.status.updates if self.process.status else 0

    def learner_summary(self) -> dict[str, Any]:
        status = self.process.status
        return {
            "mode": "process",
            "restarts": self.process.restarts,
            "error": self.process.last_error,
            "env_steps": status.env_steps if status else 0,
            "updates_dropped": status.updates_dropped if status else 0.0,
            "versions_refused": self.subscriber.refused,
        }

    def run(self) -> str:
        """As :meth:`ActingSession.run`, with the learner running beside it until the end."""
        self._announce()
        self.process.start()
        try:
            return super().run()
        finally:
            self.process.stop()

    def close(self) -> None:
        self.process.stop()
        super().close()

    # ---- phases

    def _explorer(self) -> ActingPolicy:
        """The base until the learner has published, then its newest verified version mixed with the base."""
        if self._newest is None:
            return self._base_explorer()
        version, head = self._newest
        return self._explore_with(head, version)

    def _make_room(self, ids: list[str]) -> None:
        """Nothing: the learner may have read what is there, so recorded episodes stay and rounds get new numbers."""

    def _played(self, outcomes: list[EpisodeOutcome], steps: int) -> None:
        self.counters.env_steps += steps

    def _learn(self) -> None:
        """Look after the learner and take what it has published; waits only where ``max_lead_steps`` asks for it."""
        self.process.look()
        self._take_newest()
        while self._too_far_ahead() and not self.flag():
            time.sleep(0.05)
            self.process.look()
            self._take_newest()
        self.progress.status(learner=self.process.describe())

    def _too_far_ahead(self) -> bool:
        most, status = self.config.learner_process.max_lead_steps, self.process.status
        ratio = self.config.schedule.updates_per_step
        if not most or not self.process.alive:
            return False
        if status is None:  # still starting
            return self.counters.env_steps > most
        unlearned = status.updates_owed / ratio if ratio and self.counters.actor_started_at >= 0 else 0.0
        return self.counters.env_steps - status.env_steps + unlearned > most

    def _take_newest(self) -> None:
        manifest = self.subscriber.poll()
        if self.subscriber.refused > self._refused:
            self._refused = self.subscriber.refused
            self.progress.log(f"weights refused, the version before stays: {self.subscriber.last_error}")
        if manifest is None or (self._newest is not None and manifest.version <= self._newest[0]):
            return
        assert self.subscriber.tensors is not None
        self._newest = manifest.version, self._build(self.subscriber.tensors)
        if self.counters.actor_started_at < 0:
            self.counters.actor_started_at = self.counters.env_steps
            steps = self.counters.env_steps
            self.progress.log(f"{steps} steps: the learner has published version {manifest.version}; its head explores")

    def _build(self, tensors: dict[str, Tensor]) -> Head:
        head = build_head(self.base, self.config.head, self.config.seed, self.config.learner).to(self.device)
        head.load_state_dict(tensors)
        return head

    @torch.no_grad()
    def _dry_forward(self, tensors: dict[str, Tensor]) -> bool:
        """One proposal a mode, off the robot: finite chunks of the right shape."""
        head, spec = self._build(tensors), self.base.spec
        conditioning = torch.zeros(1, spec.conditioning_dim, device=self.device)
        shape = prior_shape(head, self.base, 1)
        noise = None if shape is None else torch.zeros(shape, device=self.device)
        exploration = torch.zeros(1, head.exploration_dim, device=self.device)
        explored = head.propose(conditioning, self.base, noise, exploration, "explore")
        greedy = head.propose(conditioning, self.base, noise, None, "eval")
        return all(bool(torch.isfinite(p.chunk).all()) for p in (explored, greedy))

    def _candidate(self) -> int | None:
        if self._newest is None or self._newest[0] <= self.counters.version:
            return None
        version, head = self._newest
        self._heads[version] = head  # verified already; the file is not needed again before a resume
        self._announce(version)
        return version

    def _sha256(self, version: int) -> str:
        accepted = self.subscriber.accepted
        return accepted.sha256 if accepted is not None and accepted.version == version else super()._sha256(version)

    def _kept(self) -> set[int | None]:
        return super()._kept() | {self.gate.waiting} | {int(v) for v, _ in self.counters.candidates}

    def _announce(self, *more: int) -> None:
        """Tell the learner which versions must stay on disk."""
        self.folder.learner.mkdir(parents=True, exist_ok=True)
        modes = ("explore", "eval")
        alive = ("candidate", "probation", "promoted")
        listed = {v for v in self.channel.versions() if any(self.gate.state(v, m) in alive for m in modes)}
        versions = {int(v) for v in (*listed, *self._kept(), *more) if v}
        replace_json(self.folder.learner / IN_USE, {"versions": sorted(versions)}, sync=False)

    def _should_stop(self) -> bool:
        self.process.look()
        return self.flag()

    # ---- saving and resuming

    def checkpoint(self) -> None:
        """Save the acting side; the learner saves itself."""
        state = {
            "config_hash": self.scalars.config_hash,
            "base_hash": self.base.spec.base_hash,
            "counters": dict(vars(self.counters)),
            "gate": self.gate.state_dict(),
            "starts": self.starts.state(),
            "curve": [[version, mode, *counts] for (version, mode), counts in self._curve.items()],
            "logs": self.folder.log_sizes(LOGS),
        }
        save_checkpoint(self.folder.checkpoints, f"step-{self.counters.env_steps:09d}", {}, state)
        self._last_checkpoint = time.monotonic()

    def resume(self) -> bool:
        """Continue from the latest checkpoint; False when there is none.

        Episodes that were recorded after it count: the learner may have learned from them.

        Raises:
            ValueError: the checkpoint belongs to another configuration or base policy.
        """
        path = latest_checkpoint(self.folder.checkpoints)
        if path is None:
            return False
        _, state = load_checkpoint(path)
        mine = {"config_hash": self.scalars.config_hash, "base_hash": self.base.spec.base_hash}
        check_belongs(state, mine, str(path))
        self.counters = Counters(**state["counters"])
        self.gate.load_state_dict(state["gate"])
        self.starts.load(state.get("starts", {}))
        self._curve = {(v, m): (k, n) for v, m, k, n in state["curve"]}
        self.folder.rewind_logs(state["logs"], LOGS)
        self._recount()
        self._verify_known()
        self.progress.log(f"resumed at {self.counters.env_steps} steps ({path.name})")
        return True

    def _recount(self) -> None:
        """Steps, rounds and recent success as the store knows them."""
        c, ids = self.counters, self.store.episode_ids()
        c.env_steps = sum(int(self.store.attributes(i)["length"]) for i in ids)
        rounds = [int(i[1:7]) for i in ids if i[:1] == "r" and i[1:7].isdigit()]
        c.round = max([c.round, *(r + 1 for r in rounds)])
        known = [self.store.meta(i).success for i in ids[-Counters.RECENT :]]
        c.recent = [bool(s) for s in known if s is not None]

    def _verify_known(self) -> None:
        """Versions of the checkpoint whose weights do not verify any more are out."""
        c = self.counters
        wanted = {self.gate.acting, self.gate.on_probation, self.gate.waiting} | {int(v) for v, _ in c.candidates}
        for version in sorted(int(v) for v in wanted if v):
            try:
                self.policy(version, "eval")
            except (VerificationError, OSError) as error:
                self.progress.log(f"version {version} is out: {error}")
                c.candidates = [pair for pair in c.candidates if int(pair[0]) != version]
                if any(self.gate.state(version, mode) is not None for mode in ("explore", "eval")):
                    self._log_gate(self.gate.fail(version, str(error)))
