"""What every learner does, wherever it runs: a buffer, updates on it, metrics, publications, and a state that resumes exactly.

:class:`~robot_rl.training.session.Session` drives one inline, between two rounds of episodes;
:class:`~robot_rl.training.learner_loop.LearnerLoop` drives one in a process of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from robot_rl import seeding
from robot_rl.learners.batch import EPISODE_RETURN, RETURN_KNOWN
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.learners.facts import columns
from robot_rl.learners.objectives import Metrics
from robot_rl.learners.off_policy import OffPolicyLearner
from robot_rl.learners.on_policy import OnPolicyLearner
from robot_rl.policies.base import BasePolicy
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.windows import WindowConfig, decision_starts
from robot_rl.rewards.composer import RewardComposer
from robot_rl.rewards.gate import admit
from robot_rl.runtime.weights import Manifest, WeightChannel
from robot_rl.training.base_samples import BaseSamples
from robot_rl.training.build import build_learner
from robot_rl.training.config import MixtureConfig, PostTrainConfig
from robot_rl.training.hold_out import HoldOut
from robot_rl.training.ingest import Ingested, ingest
from robot_rl.training.rounds import round_data
from robot_rl.training.run_folder import RunFolder
from robot_rl.training.scalars import ScalarLog
from robot_rl.types import Episode, FeatureSpec, RewardEvent, Source, Stratum

logger = logging.getLogger(__name__)
USELESS_IN_A_ROW = 5  # episodes after which to say that nothing can be learned from them
DISCOUNT_EPISODES = 20  # training episodes before their success counts for the discount's schedule
GATE_BLOCK = 500  # updates between two looks at the warm-up gate
OnUpdate = Callable[[], None]


@dataclass
class LearningCounters:
    """Where learning is; saved with every checkpoint."""

    offline_done: int = 0  # updates of the offline phase
    env_steps: int = 0  # training steps; probation and evaluation are counted apart
    wall_seconds: float = 0.0
    updates_owed: float = 0.0
    unlogged: int = 0  # updates since the last line of metrics
    warm_up_updates: int = 0  # of the critic's warm-up, done so far
    actor_started_at: int = -1  # env_steps at the first actor update
    version: int = 0
    recent: list[bool] = field(default_factory=list)  # success of the last training episodes
    handover_stage: int = 0
    handover_best: float = 0.0
    handover_recent: list[bool] = field(default_factory=list)
    discount_stage: int = 0

    RECENT = 100

    def remember(self, successes: list[bool]) -> None:
        self.recent = (self.recent + successes)[-self.RECENT :]

    def decisions_of_base(self, mixture: MixtureConfig) -> int:
        """How many decisions the base makes before the head may, in the coming episodes."""
        if mixture.handover != "curriculum":
            return mixture.handover_decisions
        return round(mixture.handover_decisions * (1 - self.handover_stage / mixture.handover_stages))

    def advance_handover(self, mixture: MixtureConfig, successes: list[bool]) -> None:
        """Move the curriculum on when the stage's last episodes succeeded about as often as the best stage's."""
        if mixture.handover != "curriculum" or self.actor_started_at < 0 or self.handover_stage >= mixture.handover_stages:
            return
        self.handover_recent = (self.handover_recent + successes)[-mixture.handover_window :]
        rate = float(np.mean(self.handover_recent))
        if len(self.handover_recent) < mixture.handover_window or rate < self.handover_best - mixture.handover_tolerance:
            return
        self.handover_stage += 1
        self.handover_best, self.handover_recent = max(self.handover_best, rate), []

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
        self.learner = build_learner(base, config, device)
        self.rng = np.random.default_rng(seeding.key("replay", config.seed))
        self.buffer = make_buffer(config, base)
        composed = bool(config.reward.channels)
        self.composer = RewardComposer(admit(config.reward), self.buffer, config.learner.gamma) if composed else None
        cached = config.learner.base_samples if isinstance(config.learner, OffPolicyConfig) else 0
        distils = config.learner.algorithm == "dsrl_na"
        self.base_samples = BaseSamples(base, cached, config.seed, device, keeps_noise=distils) if cached else None
        self.round: list[Episode] = []  # of an on-policy learner, until it has learned from them
        gated = config.schedule.warmup_gate > 0 and isinstance(config.learner, OffPolicyConfig)
        self.hold_out: HoldOut | None = HoldOut(lambda: make_buffer(config, base)) if gated else None
        self._metrics: dict[str, list[torch.Tensor]] = {}
        self._helped = False
        self._useless = 0
        if isinstance(self.learner, OffPolicyLearner):
            self.learner.know_demonstrations(config.demos.episodes if not demos else len(demos))
        if config.demos.prefill:
            for episode in demos:
                self.ingest(episode, Stratum.DEMONSTRATION)

    # ---- data

    @property
    def on_policy(self) -> bool:
        """Whether only the newest round's episodes are learned from."""
        return isinstance(self.learner, OnPolicyLearner)

    def held(self) -> list[str]:
        """Ids of the episodes that are to be learned from (again), oldest first."""
        waiting = [] if self.hold_out is None else [e.meta.episode_id for e in self.hold_out.episodes]
        return [e.meta.episode_id for e in self.round] if self.on_policy else self.buffer.episode_ids() + waiting

    def ingest(self, episode: Episode, stratum: Stratum | None = None) -> None:
        """Add an episode to the buffer. Raises ValueError when it does not belong to this base or is in there already."""
        if (
            self.hold_out is not None
            and not self.warm
            and stratum is not Stratum.DEMONSTRATION
            and self.hold_out.takes(episode)
        ):
            return
        if self.on_policy:
            if stratum is not Stratum.DEMONSTRATION:
                self.round.append(episode)
            return
        self._apply_discount()
        new = self._take(self.buffer, episode, stratum)
        if self.composer is not None:
            self.composer.begin(episode)
        if self.base_samples is not None:
            self.base_samples.add(new.number, episode.meta.episode_id, new.conditioning)
            self.base_samples.forget(self.base_samples.numbers() - self.buffer.numbers())
        practice = Stratum(stratum or episode.meta.stratum) in (Stratum.ONLINE, Stratum.INTERVENTION)
        self._helped |= practice and bool((episode.source == Source.HUMAN).any())
        if practice and self.buffer.window.stride == "decision":
            self._watch_starts(episode)

    def _take(self, buffer: ReplayBuffer, episode: Episode, stratum: Stratum | None = None) -> Ingested:
        """Into this buffer, as this run's learner wants it."""
        learner = self.config.learner
        return ingest(
            buffer, episode, self.base, stratum=stratum, device=self.device, failure_reward=learner.failure_reward,
            shift=self.config.schedule.random_shift, learner=learner,
        )  # fmt: skip

    def reward(self, event: RewardEvent) -> None:
        """A reward event, at any time. Raises ValueError for one that cannot be about its episode."""
        if self.composer is not None:
            self.composer.add(event)
        else:
            self.buffer.update_reward(event)

    def _watch_starts(self, episode: Episode) -> None:
        """Say so when a learner that wants whole decisions gets none: it would wait for ever."""
        self._useless = 0 if decision_starts(episode).any() else self._useless + 1
        if self._useless == USELESS_IN_A_ROW:
            logger.warning(
                "learner.algorithm=%s learns from chunks that begin at the very step they were decided at, and the last %d "
                "episodes (up to %s) have none: every chunk came at least one step late. Nothing is learned from such episodes. "
                "Make inference faster or the control rate lower, or take an algorithm that learns from every step, e.g. dsrl_na",
                self.config.learner.algorithm, self._useless, episode.meta.episode_id,
            )  # fmt: skip

    def credit(self, steps: int) -> None:
        """``steps`` more environment steps were played: they are worth ``updates_per_step`` updates each."""
        self.counters.env_steps += steps
        self.counters.updates_owed += steps * self.config.schedule.updates_per_step

    @property
    def ready(self) -> bool:
        """Whether a batch can be drawn at all: late rewards may still be missing, or too many of them be invalid."""
        if self.composer is not None and not self.composer.valid.enough:
            return False
        starts = self.buffer.starts()
        return any(starts.get(Stratum(stratum), 0) for stratum in self._ratios())

    # ---- updates

    @property
    def offline_left(self) -> int:
        """Updates of the offline phase that are still to be done."""
        return max(0, self.config.schedule.offline_updates - self.counters.offline_done)

    def learn_offline(self, updates: int, on_update: OnUpdate | None = None) -> None:
        """Part of the offline phase: recorded data only. Where ``on_update`` raises, the rest stays to be done."""
        learner = self.learner
        assert not isinstance(learner, OnPolicyLearner)
        actor = self.config.learner.offline_actor if isinstance(self.config.learner, OffPolicyConfig) else True
        starts = self.buffer.starts()
        present: dict[Stratum | str, float] = {s: float(starts.get(s, 0)) for s in (Stratum.DEMONSTRATION, Stratum.PRIOR)}

        def counted(batch: Any) -> Metrics:
            self.counters.offline_done += 1
            return learner.update(batch, train_actor=actor, offline=True)

        self.train(updates, counted, on_update, present)

    def learn_round(self) -> None:
        """Learn from the round that was just played, and forget it."""
        assert isinstance(self.learner, OnPolicyLearner)
        rounds = [round_data(e, self.base, self.learner, self.device) for e in self.round]
        metrics = self.learner.learn(rounds, self.config.schedule.batch_size)
        self.learner.check_finite()
        for name, value in metrics.items():
            self._metrics.setdefault(name, []).append(value)
        self.log_metrics()
        self.round.clear()
        self.counters.updates_owed = 0.0

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
        assert not isinstance(learner, OnPolicyLearner)

        def evaluated(batch: Any) -> Metrics:
            counters.warm_up_updates += 1
            return learner.update(batch, train_actor=False)

        def regressed(batch: Any) -> Metrics:
            counters.warm_up_updates += 1
            return learner.pretrain(batch)

        first, total = schedule.return_updates, schedule.return_updates + schedule.warmup_updates
        self.train(first - counters.warm_up_updates, regressed, on_update)
        if first and counters.warm_up_updates == first:
            learner.finish_pretraining()
        self.train(total - counters.warm_up_updates, evaluated, on_update)
        if self.hold_out is not None:
            self._pass_gate(self.hold_out, total, evaluated, on_update)
        self.counters.actor_started_at = self.counters.env_steps
        self.counters.updates_owed = 0.0

    def _pass_gate(self, hold_out: HoldOut, before: int, update: Callable[[Any], Metrics], on_update: OnUpdate | None) -> None:
        """More warm-up until the critic ranks held-out episodes well enough; then they join the others.

        ``before``: updates of the warm-up without the gate. Ranks are looked at every ``GATE_BLOCK`` updates after them.
        """
        assert isinstance(self.learner, OffPolicyLearner)
        schedule, counters = self.config.schedule, self.counters

        while True:
            spent = counters.warm_up_updates - before
            if spent % GATE_BLOCK == 0 or spent >= schedule.warmup_gate_limit:
                found = hold_out.correlation(self.learner, self._take)
                self._metrics.setdefault("warmup/rank_correlation", []).append(torch.tensor(found))
                if found >= schedule.warmup_gate or spent >= schedule.warmup_gate_limit:
                    break
            self.train(min(GATE_BLOCK - spent % GATE_BLOCK, schedule.warmup_gate_limit - spent), update, on_update)
        self.hold_out = None
        for episode in hold_out.episodes:
            self.ingest(episode)

    def spend(self, limit: int | None = None, on_update: OnUpdate | None = None) -> int:
        """Do the updates that are owed, at most ``limit`` of them; gives how many. Where ``on_update`` raises, the rest stays owed."""
        updates = int(self.counters.updates_owed) if limit is None else min(int(self.counters.updates_owed), limit)

        learner = self.learner
        assert not isinstance(learner, OnPolicyLearner)
        self._raise_discount()

        def paid(batch: Any) -> Metrics:
            self.counters.updates_owed -= 1
            return learner.update(batch)

        self.train(updates, paid, on_update)
        return updates

    @property
    def discount(self) -> float:
        """gamma of the present stage."""
        return self.config.curriculum.discount(self.config.learner.gamma, self.counters.discount_stage)

    def _raise_discount(self) -> None:
        """A longer horizon where success in training has earned it; the target network starts again from the critic then."""
        c, curriculum = self.counters, self.config.curriculum
        if curriculum.discount_start is None or len(c.recent) < DISCOUNT_EPISODES:
            return
        stage = curriculum.discount_stage(float(np.mean(c.recent)))
        if stage > c.discount_stage:
            c.discount_stage = stage
            self._apply_discount()
            assert isinstance(self.learner, OffPolicyLearner)
            self.learner.finish_pretraining()
            logger.info("discount is now %.4f (stage %d of %d)", self.discount, stage, curriculum.discount_stages)

    def _apply_discount(self) -> None:
        """Windows are cut with the present stage's gamma."""
        if self.buffer.window.gamma != self.discount:
            self.buffer.set_gamma(self.discount)

    def train(
        self,
        updates: int,
        update: Callable[[Any], Metrics],
        on_update: OnUpdate | None = None,
        ratios: Mapping[Stratum | str, float] | None = None,
    ) -> None:
        """``updates`` calls of ``update`` on fresh batches; ``on_update`` is called after each and may raise.

        Raises:
            FloatingPointError: parameters are not finite afterwards.
        """
        self._apply_discount()
        schedule, every = self.config.schedule, self.config.logging.every_updates
        ratios = ratios or self._ratios()
        assert not isinstance(self.learner, OnPolicyLearner)
        for _ in range(updates):
            metrics = update(self.learner.sample(self.buffer, self.rng, schedule.batch_size, ratios, self.base_samples))
            for name, value in metrics.items():
                self._metrics.setdefault(name, []).append(value)
            self.counters.unlogged += 1
            if self.counters.unlogged >= every:
                self.log_metrics()
            if on_update is not None:
                on_update()
        self.learner.check_finite()

    def _ratios(self) -> dict[Stratum | str, float]:
        """Shares of the strata. Once a human has stepped in, what humans did is drawn with the demonstrations' share too; so are
        logs that a learner labels by itself."""
        share = self.config.schedule.demo_share(self.counters.env_steps)
        starts = self.buffer.starts()
        beside = {Stratum.INTERVENTION: starts.get(Stratum.INTERVENTION, 0) if self._helped else 0}
        if "prior" in getattr(getattr(self.config.learner, "optimism", None), "strata", ()):
            beside[Stratum.PRIOR] = starts.get(Stratum.PRIOR, 0)
        if not any(beside.values()):  # demonstrations may be a human's from end to end: they are no interventions
            share = share if self.config.demos.prefill else 0.0
            return {Stratum.ONLINE: 1.0 - share, Stratum.DEMONSTRATION: share}
        total = sum(beside.values()) + starts.get(Stratum.DEMONSTRATION, 0)
        others: dict[Stratum | str, float] = {s: share * n / total for s, n in beside.items() if n}
        return {Stratum.ONLINE: 1.0 - share, Stratum.DEMONSTRATION: share - sum(others.values()), **others}

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
        if self.config.curriculum.discount_start is not None:
            values["train/gamma"] = self.discount
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
    extra = {EPISODE_RETURN: FeatureSpec(()), RETURN_KNOWN: FeatureSpec(())}
    extra |= columns(learner)
    return ReplayBuffer(
        config.schedule.replay_capacity,
        conditioning_dim=spec.conditioning_dim,
        action_dim=spec.action.dim,
        window=WindowConfig(
            spec.n_action_steps * getattr(learner, "n_step", 1),
            learner.gamma,
            "decision" if learner.algorithm == "dsrl_sac" else "any",
        ),
        delta_mask=spec.action.delta_mask,
        noise_shape=spec.noise_shape if learner.algorithm == "dsrl_sac" else None,
        chunk_horizon=spec.horizon,
        extra=extra,
        views=_views(config, base),
    )


def _views(config: PostTrainConfig, base: BasePolicy) -> int:
    """Encodings of an observation. Raises ValueError where pictures were to be moved and there are none."""
    schedule = config.schedule
    if not schedule.random_shift:
        return 1
    if not any(f.dtype == "uint8" for f in base.spec.observation_features.values()):
        raise ValueError(f"schedule.random_shift={schedule.random_shift}: the base reads no pictures; accepted is 0")
    return schedule.shift_views


def check_belongs(saved: dict[str, Any], mine: dict[str, Any], where: str) -> None:
    """Raises ValueError when a checkpoint was made with another configuration or base policy."""
    for name in ("config_hash", "base_hash"):
        if saved[name] != mine[name]:
            raise ValueError(
                f"{where}: {name}={saved[name]!r}, this run has {mine[name]!r}; accepted are the configuration and base policy "
                "that the run was started with (or another run_dir)"
            )
