"""What every learner does, wherever it runs: a buffer, updates on it, metrics, publications, and a state that resumes exactly.

:class:`~robot_rl.training.session.Session` drives one inline, between two rounds of episodes;
:class:`~robot_rl.training.learner_loop.LearnerLoop` drives one in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from robot_rl import seeding
from robot_rl.learners.batch import EPISODE_RETURN, RETURN_KNOWN, Batch
from robot_rl.learners.objectives import Metrics
from robot_rl.learners.off_policy import OffPolicyLearner
from robot_rl.policies.base import BasePolicy
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.windows import WindowConfig
from robot_rl.runtime.weights import Manifest, WeightChannel
from robot_rl.training.build import build_head
from robot_rl.training.config import MixtureConfig, PostTrainConfig
from robot_rl.training.ingest import ingest
from robot_rl.training.run_folder import RunFolder
from robot_rl.training.scalars import ScalarLog
from robot_rl.types import Episode, FeatureSpec, Source, Stratum

OnUpdate = Callable[[], None]


@dataclass
class LearningCounters:
    """Where learning is; saved with every checkpoint."""

    env_steps: int = 0  # training steps; probation and evaluation are counted apart
    wall_seconds: float = 0.0
    updates_owed: float = 0.0
    unlogged: int = 0  # updates since the last line of metrics
    warm_up_updates: int = 0  # of the critic's warm-up, done so far
    actor_started_at: int = -1  # env_steps at the first actor update
    version: int = 0
    recent: list[bool] = field(default_factory=list)  # success of the last training episodes

    RECENT = 100

    def remember(self, successes: list[bool]) -> None:
        self.recent = (self.recent + successes)[-self.RECENT :]

    def base_share(self, mixture: MixtureConfig) -> float:
        """The chance per decision that the base acts in training episodes."""
        return mixture.share(self.env_steps - self.actor_started_at) if self.actor_started_at >= 0 else 1.0


class LearnerCore:
    """Learner, replay buffer and random state, driven by its owner.

    Attributes:
        counters: shared with the owner; the core moves ``updates_owed`` and ``actor_started_at``.
        learner, buffer, rng: the parts.
    """

    def __init__(
        self,
        config: PostTrainConfig,
        base: BasePolicy,
        demos: list[Episode],
        counters: LearningCounters,
        folder: RunFolder,
        scalars: ScalarLog,
        device: str,
    ) -> None:
        self.config, self.base, self.counters = config, base, counters
        self.folder, self.scalars, self.device = folder, scalars, device
        self.learner = OffPolicyLearner(base, build_head(base, config.head, config.seed), config.learner, device)
        self.rng = np.random.default_rng(seeding.key("replay", config.seed))
        self.buffer = make_buffer(config, base)
        self._metrics: dict[str, list[torch.Tensor]] = {}
        self._helped = False
        if config.demos.prefill:
            for episode in demos:
                self.ingest(episode, Stratum.DEMONSTRATION)

    # ---- data

    def ingest(self, episode: Episode, stratum: Stratum | None = None) -> None:
        """Add an episode to the buffer. Raises ValueError when it does not belong to this base or is in there already."""
        ingest(self.buffer, episode, self.base, stratum=stratum, device=self.device)
        practice = Stratum(stratum or episode.meta.stratum) in (Stratum.ONLINE, Stratum.INTERVENTION)
        self._helped |= practice and bool((episode.source == Source.HUMAN).any())

    def credit(self, steps: int) -> None:
        """``steps`` more environment steps were played: they are worth ``updates_per_step`` updates each."""
        self.counters.env_steps += steps
        self.counters.updates_owed += steps * self.config.schedule.updates_per_step

    @property
    def ready(self) -> bool:
        """Whether a batch can be drawn at all (late rewards may still be missing)."""
        starts = self.buffer.starts()
        return any(starts.get(Stratum(stratum), 0) for stratum in self._ratios())

    # ---- updates

    @property
    def warm(self) -> bool:
        """Whether the critic's warm-up is over."""
        return self.counters.actor_started_at >= 0

    @property
    def warm_up_due(self) -> bool:
        return not self.warm and self.counters.env_steps >= self.config.schedule.warmup_steps

    def warm_up(self, on_update: OnUpdate | None = None) -> None:
        """Regress the critic on returns, then evaluate the base by temporal difference; no actor update yet.

        Where ``on_update`` raised, the same call goes on from there.
        """
        schedule, counters, learner = self.config.schedule, self.counters, self.learner

        def counted(update: Callable[[Batch], Metrics]) -> Callable[[Batch], Metrics]:
            def call(batch: Batch) -> Metrics:
                counters.warm_up_updates += 1
                return update(batch)

            return call

        first, total = schedule.return_updates, schedule.return_updates + schedule.warmup_updates
        self.train(first - counters.warm_up_updates, counted(learner.pretrain), on_update)
        if first and counters.warm_up_updates == first:
            learner.finish_pretraining()
        self.train(total - counters.warm_up_updates, counted(lambda batch: learner.update(batch, train_actor=False)), on_update)
        self.counters.actor_started_at = self.counters.env_steps
        self.counters.updates_owed = 0.0

    def spend(self, limit: int | None = None, on_update: OnUpdate | None = None) -> int:
        """Do the updates that are owed, at most ``limit`` of them; gives how many. Where ``on_update`` raises, the rest stays owed."""
        updates = int(self.counters.updates_owed) if limit is None else min(int(self.counters.updates_owed), limit)

        def paid(batch: Batch) -> Metrics:
            self.counters.updates_owed -= 1
            return self.learner.update(batch)

        self.train(updates, paid, on_update)
        return updates

    def train(self, updates: int, update: Callable[[Batch], Metrics], on_update: OnUpdate | None = None) -> None:
        """``updates`` calls of ``update`` on fresh batches; ``on_update`` is called after each and may raise.

        Raises:
            FloatingPointError: parameters are not finite afterwards.
        """
        schedule, every, ratios = self.config.schedule, self.config.logging.every_updates, self._ratios()
        for _ in range(updates):
            windows = self.buffer.sample(schedule.batch_size, self.rng, ratios)
            metrics = update(Batch.from_windows(windows, self.device))
            for name, value in metrics.items():
                self._metrics.setdefault(name, []).append(value)
            self.counters.unlogged += 1
            if self.counters.unlogged >= every:
                self.log_metrics()
            if on_update is not None:
                on_update()
        self.learner.check_finite()

    def _ratios(self) -> dict[Stratum | str, float]:
        """Shares of the strata. Once a human has stepped in, what humans did is drawn with the demonstrations' share too."""
        share = self.config.schedule.demo_share(self.counters.env_steps)
        starts = self.buffer.starts()
        helped = starts.get(Stratum.INTERVENTION, 0)
        if not (self._helped and helped):  # demonstrations may be a human's from end to end: they are no interventions
            share = share if self.config.demos.prefill else 0.0
            return {Stratum.ONLINE: 1.0 - share, Stratum.DEMONSTRATION: share}
        part = helped / (helped + starts.get(Stratum.DEMONSTRATION, 0))
        return {Stratum.ONLINE: 1.0 - share, Stratum.DEMONSTRATION: share * (1.0 - part), Stratum.INTERVENTION: share * part}

    # ---- what it tells

    def log_metrics(self) -> None:
        """One line of ``metrics.jsonl``: means since the line before."""
        c = self.counters
        values = {name: float(torch.stack(v).mean()) for name, v in self._metrics.items()}
        self._metrics.clear()
        c.unlogged = 0
        if c.recent:
            values["train/success"] = float(np.mean(c.recent))
        values["train/base_share"] = c.base_share(self.config.mixture)
        line = {"env_steps": c.env_steps, "updates": self.learner.updates, "wall_seconds": c.wall_seconds, **values}
        self.folder.append("metrics.jsonl", line)
        self.scalars.write(values, c.env_steps)

    def publish(self, channel: WeightChannel, metrics: dict[str, float] | None = None) -> Manifest:
        """Publish the head as it is now. Raises VerificationError when it is not finite."""
        recent = self.counters.recent
        success = {"train_success": float(np.mean(recent)) if recent else 0.0}
        return channel.publish(
            self.learner.head.state_dict(), parent=self.counters.version, config_hash=self.scalars.config_hash,
            metrics=success | (metrics or {}), kind=self.learner.head.KIND, base_hash=self.base.spec.base_hash,
            stats_hash=self.base.spec.stats_hash,
        )  # fmt: skip

    # ---- saving and resuming

    def tensors(self) -> dict[str, Any]:
        """For :func:`~robot_rl.training.checkpoint.save_checkpoint`: the learner, and metrics that wait for their line."""
        pending = {name: torch.stack(values) for name, values in self._metrics.items()}
        return {"learner": self.learner.state_dict(), "pending": {n.replace("/", "|"): v for n, v in pending.items()}}

    def state(self) -> dict[str, Any]:
        """The JSON half of a checkpoint; counters are the owner's to save."""
        return {
            "rng": self.rng.bit_generator.state,
            "config_hash": self.scalars.config_hash,
            "base_hash": self.base.spec.base_hash,
        }

    def load(self, tensors: dict[str, Any], state: dict[str, Any], where: str) -> None:
        """Continue from :meth:`tensors` and :meth:`state`. Raises ValueError naming ``where`` when they are of another run."""
        check_belongs(state, self.state(), where)
        self.learner.load_state_dict(tensors["learner"])
        self._metrics = {n.replace("|", "/"): list(v.unbind()) for n, v in tensors.get("pending", {}).items()}
        self.rng.bit_generator.state = state["rng"]


def make_buffer(config: PostTrainConfig, base: BasePolicy) -> ReplayBuffer:
    """An empty buffer for what this learner reads of this base's episodes."""
    spec, learner = base.spec, config.learner
    return ReplayBuffer(
        config.schedule.replay_capacity,
        conditioning_dim=spec.conditioning_dim,
        action_dim=spec.action.dim,
        window=WindowConfig(spec.n_action_steps, learner.gamma, "decision" if learner.algorithm == "dsrl_sac" else "any"),
        delta_mask=spec.action.delta_mask,
        noise_shape=spec.noise_shape if learner.algorithm == "dsrl_sac" else None,
        chunk_horizon=spec.horizon,
        extra={EPISODE_RETURN: FeatureSpec(()), RETURN_KNOWN: FeatureSpec(())},
    )


def check_belongs(saved: dict[str, Any], mine: dict[str, Any], where: str) -> None:
    """Raises ValueError when a checkpoint was made with another configuration or base policy."""
    for name in ("config_hash", "base_hash"):
        if saved[name] != mine[name]:
            raise ValueError(
                f"{where}: {name}={saved[name]!r}, this run has {mine[name]!r}; accepted are the configuration and base policy "
                "that the run was started with (or another run_dir)"
            )
