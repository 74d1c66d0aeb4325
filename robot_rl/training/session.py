"""A post-training run as a sequence of phases, each of which either completes or changes nothing.

``collect`` plays episodes, ``learn`` updates on them, ``gate`` puts candidates on probation, ``evaluate`` adds a point to
the learning curve; together they are one round. The run can be checkpointed between any two phases (and, in ``gate``,
between any two blocks of probation episodes), so Ctrl-C costs one phase and kill -9 what came after the last checkpoint.
On one machine a resumed run gives the numbers of one that was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from robot_rl import seeding
from robot_rl.heads.base import Head
from robot_rl.learners.batch import EPISODE_RETURN, RETURN_KNOWN, Batch
from robot_rl.learners.objectives import Metrics
from robot_rl.learners.off_policy import OffPolicyLearner
from robot_rl.policies.base import BasePolicy
from robot_rl.progress import Progress
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.store import EpisodeStore
from robot_rl.replay.windows import WindowConfig
from robot_rl.runtime.acting import ActingMode, ActingPolicy
from robot_rl.runtime.gate import GateEvent, PromotionGate
from robot_rl.runtime.weights import WeightChannel
from robot_rl.sim.rollout import EpisodePlan, Rollout
from robot_rl.training.build import build_head
from robot_rl.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.ingest import ingest
from robot_rl.training.interrupt import Interrupted, InterruptFlag
from robot_rl.training.measuring import measure, success_interval
from robot_rl.training.run_folder import RunFolder
from robot_rl.training.scalars import ScalarLog
from robot_rl.types import Episode, FeatureSpec, Stratum

PHASES = ("collect", "learn", "gate", "evaluate")


@dataclass
class Counters:
    """Where a run is; saved with every checkpoint."""

    phase: str = "collect"
    round: int = 0
    env_steps: int = 0  # training steps; probation and evaluation are counted apart
    gate_steps: int = 0
    evaluation_steps: int = 0
    wall_seconds: float = 0.0
    updates_owed: float = 0.0
    unlogged: int = 0  # updates since the last line of metrics
    actor_started_at: int = -1  # env_steps at the first actor update
    next_candidate: int = 0
    next_evaluation: int = 0
    version: int = 0
    candidates: list[list[Any]] = field(default_factory=list)  # (version, mode) still to be submitted this round
    recent: list[bool] = field(default_factory=list)  # success of the last training episodes
    seconds: dict[str, float] = field(default_factory=lambda: {p: 0.0 for p in PHASES})
    done: str = ""  # why the run ended

    RECENT = 100


class Session:
    """The reinforcement-learning part of a run: everything between the frozen base and the final table.

    Args:
        reference: base successes and episodes on gate seeds; ``base_curve``: the same on evaluation seeds.
    """

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
        self.config, self.folder, self.base, self.rollout = config, folder, base, rollout
        self.progress, self.flag, self.device = progress, flag, device
        self.learner = OffPolicyLearner(base, build_head(base, config.head, config.seed), config.learner, device)
        self.gate = PromotionGate(config.gate)
        self.channel = WeightChannel(folder.weights)
        self.counters = Counters(next_candidate=config.schedule.warmup_steps, next_evaluation=config.schedule.evaluate_every)
        self.rng = np.random.default_rng(seeding.key("replay", config.seed))
        self.buffer = self._make_buffer()
        if config.demos.prefill:
            for episode in demos:
                ingest(self.buffer, episode, base, stratum=Stratum.DEMONSTRATION, device=device)
        self.store = self._open_store()
        self.scalars = ScalarLog(folder, config)
        self._heads: dict[int, Head] = {}
        self._curve: dict[tuple[int, str], tuple[int, int]] = {}
        self._metrics: dict[str, list[torch.Tensor]] = {}
        self._last_checkpoint = time.monotonic()

    # ---- building

    def _make_buffer(self) -> ReplayBuffer:
        spec, learner = self.base.spec, self.config.learner
        return ReplayBuffer(
            self.config.schedule.replay_capacity,
            conditioning_dim=spec.conditioning_dim,
            action_dim=spec.action.dim,
            window=WindowConfig(spec.n_action_steps, learner.gamma, "decision" if learner.algorithm == "dsrl_sac" else "any"),
            delta_mask=spec.action.delta_mask,
            noise_shape=spec.noise_shape if learner.algorithm == "dsrl_sac" else None,
            chunk_horizon=spec.horizon,
            extra={EPISODE_RETURN: FeatureSpec(()), RETURN_KNOWN: FeatureSpec(())},
        )

    def _open_store(self) -> EpisodeStore:
        if (self.folder.store / "store.json").exists():
            return EpisodeStore.open(self.folder.store, mode="a", sync=False)
        spec = self.base.spec
        return EpisodeStore.create(
            self.folder.store, observation_features=spec.observation_features, action=spec.action, noise_shape=spec.noise_shape,
            chunk_horizon=spec.horizon, stats_hash=spec.stats_hash, sync=False,
        )  # fmt: skip

    def close(self) -> None:
        self.scalars.close()
        self.store.close()

    # ---- acting

    def policy(self, version: int, mode: ActingMode) -> ActingPolicy:
        """The base, or a published version, verified by the weight channel before it acts."""
        if version == 0:
            return ActingPolicy(self.base, mode="base", device=self.device)
        if version not in self._heads:
            head = build_head(self.base, self.config.head, self.config.seed).to(self.device)
            head.load_state_dict(self.channel.load(version, {n: tuple(t.shape) for n, t in head.state_dict().items()}))
            self._heads = {v: h for v, h in self._heads.items() if v in (self.gate.acting, self.gate.on_probation)}
            self._heads[version] = head
        return ActingPolicy(self.base, self._heads[version], mode, version, device=self.device)

    @property
    def acting(self) -> tuple[int, ActingMode]:
        """(version, mode) that the gate lets act."""
        return self.gate.acting, self.gate.acting_mode  # type: ignore[return-value]

    # ---- the run

    def run(self) -> str:
        """Play rounds until a stop rule holds; returns which. Raises Interrupted after saving a checkpoint."""
        self.progress.start("reinforcement learning", self.config.schedule.env_steps)
        self.progress.advance(self.counters.env_steps)
        while not self.counters.done:
            phase = self.counters.phase
            began = time.monotonic()
            try:
                self.flag.raise_if_set()
                getattr(self, f"_{phase}")()
            except Interrupted:
                self._spend(phase, began)
                self.checkpoint()
                raise
            self._spend(phase, began)
            self.counters.phase = PHASES[(PHASES.index(phase) + 1) % len(PHASES)]
            self._check_stop()
            due = time.monotonic() - self._last_checkpoint >= self.config.schedule.checkpoint_every_s
            if due or self.counters.done:
                self.checkpoint()
        return self.counters.done

    def _spend(self, phase: str, began: float) -> None:
        elapsed = time.monotonic() - began
        self.counters.seconds[phase] += elapsed
        self.counters.wall_seconds += elapsed

    def _check_stop(self) -> None:
        c, stop = self.counters, self.config.stop
        if c.phase != "collect":
            return
        if self.gate.acting:
            successes, n = self.gate.evidence(*self.acting)
            if n >= stop.episodes and successes >= stop.success * n:
                c.done = f"the acting head succeeded in {successes} of {n} gate episodes"
        if not c.done and c.env_steps >= self.config.schedule.env_steps:
            c.done = f"{c.env_steps} environment steps are used up"

    # ---- phases

    def _collect(self) -> None:
        """One round of training episodes: the base during warm-up, then the newest head mixed with the base."""
        c, schedule = self.counters, self.config.schedule
        warm = c.actor_started_at >= 0
        share = self.config.mixture.share(c.env_steps - c.actor_started_at) if warm else 1.0
        policy = (
            ActingPolicy(self.base, self.learner.head, "explore", c.version, base_share=share, device=self.device)
            if warm
            else ActingPolicy(self.base, mode="base", device=self.device)
        )
        first = c.round * schedule.round_episodes
        seeds = [seeding.key("training", self.config.seed, first + i) % seeding.TRAINING.last for i in range(schedule.round_episodes)]
        keys = [f"r{c.round:06d}e{i:03d}" for i in range(schedule.round_episodes)]
        for stale in self.store.episode_ids():
            if stale.startswith(f"r{c.round:06d}e"):  # an earlier attempt at this very round was cut short
                self.store.discard(stale)
        plans = [
            EpisodePlan(seed, ("training", self.config.seed, key), policy, self._free_id(key))
            for seed, key in zip(seeds, keys, strict=True)
        ]
        outcomes = self.rollout.play(plans, store=self.store, keep_episodes=True, should_stop=self.flag)
        self.store.flush()
        if len(outcomes) < len(plans):
            raise Interrupted
        for outcome in outcomes:
            assert outcome.episode is not None
            ingest(self.buffer, outcome.episode, self.base, device=self.device)
        steps = sum(o.length for o in outcomes)
        c.env_steps += steps
        c.round += 1
        c.updates_owed += steps * schedule.updates_per_step
        c.recent = (c.recent + [o.success for o in outcomes])[-Counters.RECENT :]
        self.progress.advance(steps)
        self._show(steps)

    def _free_id(self, key: str) -> str:
        """``key``, or with a count behind it where an earlier attempt at the same episode was set aside under that id."""
        attempt, found = 1, key
        while self.store.taken(found):
            attempt += 1
            found = f"{key}-{attempt}"
        return found

    def _learn(self) -> None:
        """Critic warm-up once, then as many updates as the collected steps are worth."""
        c, schedule = self.counters, self.config.schedule
        if c.env_steps < schedule.warmup_steps:
            c.updates_owed = 0.0
            return
        if c.actor_started_at < 0:
            self.progress.log(
                f"critic warm-up on {len(self.buffer)} steps: {schedule.return_updates} updates on returns, "
                f"{schedule.warmup_updates} by temporal difference"
            )
            self._train(schedule.return_updates, self.learner.pretrain)
            if schedule.return_updates:
                self.learner.finish_pretraining()
            self._train(schedule.warmup_updates, lambda batch: self.learner.update(batch, train_actor=False))
            c.actor_started_at = c.env_steps
            c.updates_owed = 0.0
            return
        updates = int(c.updates_owed)
        c.updates_owed -= updates
        self._train(updates, self.learner.update)

    def _train(self, updates: int, update: Callable[[Batch], Metrics]) -> None:
        c, schedule = self.counters, self.config.schedule
        share = schedule.demo_share(c.env_steps) if self.config.demos.prefill else 0.0
        ratios = {Stratum.ONLINE: 1.0 - share, Stratum.DEMONSTRATION: share}
        every = self.config.logging.every_updates
        for _ in range(updates):
            windows = self.buffer.sample(schedule.batch_size, self.rng, ratios)
            metrics = update(Batch.from_windows(windows, self.device))
            for name, value in metrics.items():
                self._metrics.setdefault(name, []).append(value)
            c.unlogged += 1
            if c.unlogged >= every:
                self._log_metrics()
        self.learner.check_finite()

    def _gate(self) -> None:
        """Publish a candidate when one is due, and play probation episodes until the gate has decided."""
        c, schedule = self.counters, self.config.schedule
        if c.actor_started_at >= 0 and c.env_steps >= c.next_candidate:
            c.next_candidate = c.env_steps + schedule.candidate_every
            c.version = self._publish()
            c.candidates = [[c.version, mode] for mode in schedule.candidate_modes]
        while True:
            if self.gate.on_probation is None:
                if not c.candidates:
                    break
                version, mode = c.candidates.pop(0)
                self._log_gate(self.gate.submit(version, mode, self.channel.manifest(version).sha256))
            self._probation()
        self._confirm()

    def _probation(self) -> None:
        """One block of probation episodes on gate seeds; interrupting it loses the block and nothing else."""
        version, mode = self.gate.on_probation, self.gate.probation_mode
        assert version is not None and mode is not None
        seeds = self.gate.fresh_seeds(seeding.GATE.take(self.config.gate.n_max, self._gate_offset), len(self.rollout.vector))
        known = {s: self.gate.cached(s) for s in seeds}
        missing = [s for s in seeds if known[s] is None]
        if missing:
            outcomes = measure(self.rollout, self.policy(version, mode), missing, should_stop=self.flag)  # type: ignore[arg-type]
            self.counters.gate_steps += sum(o.length for o in outcomes)
            known |= {o.plan.seed: o.success for o in outcomes}
        for seed in seeds:
            success = known[seed]
            assert success is not None
            self._log_gate(self.gate.record(version, success, mode=mode, seed=seed))

    @property
    def _gate_offset(self) -> int:
        # Candidates meet the starts the reference was measured on first: the comparison is paired as far as it goes.
        return 0

    def _confirm(self) -> None:
        """More gate episodes of the acting head when it looks good enough to end the run."""
        version, mode = self.acting
        stop = self.config.stop
        while version:
            successes, n = self.gate.evidence(version, mode)
            if n >= stop.episodes or successes < (stop.success - 0.03) * n:
                return
            first = self.config.gate.n_max + n
            block = min(len(self.rollout.vector), stop.episodes - n)
            outcomes = measure(self.rollout, self.policy(version, mode), seeding.GATE.take(block, first), should_stop=self.flag)
            self.counters.gate_steps += sum(o.length for o in outcomes)
            for outcome in outcomes:
                self._log_gate(self.gate.record_acting(outcome.success, version))
            version, mode = self.acting

    def _evaluate(self) -> None:
        """A point of the learning curve: the acting policy on evaluation seeds (nothing to play while it has not changed)."""
        c = self.counters
        if c.env_steps < c.next_evaluation and not self._acting_is_new():
            return
        key = self.acting
        if key not in self._curve:
            seeds = seeding.EVALUATION.take(self.config.evaluation.curve_episodes)
            outcomes = measure(self.rollout, self.policy(*key), seeds, should_stop=self.flag)
            c.evaluation_steps += sum(o.length for o in outcomes)
            successes, n, _ = success_interval(outcomes)
            self._curve[key] = (successes, n)
        while c.next_evaluation <= c.env_steps:
            c.next_evaluation += self.config.schedule.evaluate_every
        self.record_evaluation("acting", *self._curve[key], version=key[0], mode=key[1])

    def _acting_is_new(self) -> bool:
        return self.acting not in self._curve

    # ---- logs

    def set_base_curve(self, successes: int, n: int) -> None:
        """The base's own point on the curve, which needs no second measurement while the base acts."""
        self._curve[0, "base"] = (successes, n)

    def record_evaluation(self, who: str, successes: int, n: int, *, version: int = 0, mode: str = "base") -> None:
        from robot_rl.evaluation.statistics import wilson

        interval = wilson(successes, n)
        self.folder.append("evaluations.jsonl", {
            "env_steps": self.counters.env_steps, "wall_seconds": self.counters.wall_seconds, "who": who, "version": version,
            "mode": mode, "successes": successes, "n": n, "interval": [interval.low, interval.high],
        })  # fmt: skip
        self.scalars.write({f"evaluation/{who}": successes / n}, self.counters.env_steps)
        if who == "acting":
            self.progress.log(
                f"{self.counters.env_steps} steps: acting version {version} ({mode}) succeeds in {successes} of {n} "
                f"[{interval.low:.0%}, {interval.high:.0%}]"
            )

    def _log_gate(self, events: list[GateEvent]) -> None:
        for event in events:
            self.folder.append("gate.jsonl", event.to_json(env_steps=self.counters.env_steps, wall_seconds=self.counters.wall_seconds))
            if event.event != "candidate":
                self.progress.log(
                    f"{self.counters.env_steps} steps: version {event.version} ({event.mode}) {event.event.replace('_', ' ')}, "
                    f"{event.successes} of {event.n} (reference {event.reference:.0%})"
                )

    def _log_metrics(self) -> None:
        c = self.counters
        c.unlogged = 0
        values = {name: float(torch.stack(v).mean()) for name, v in self._metrics.items()}
        self._metrics.clear()
        if c.recent:
            values["train/success"] = float(np.mean(c.recent))
        values["train/base_share"] = self.config.mixture.share(c.env_steps - c.actor_started_at) if c.actor_started_at >= 0 else 1.0
        line = {"env_steps": c.env_steps, "updates": self.learner.updates, "wall_seconds": c.wall_seconds, **values}
        self.folder.append("metrics.jsonl", line)
        self.scalars.write(values, c.env_steps)

    def _show(self, steps: int) -> None:
        from robot_rl.evaluation.statistics import wilson

        c = self.counters
        k, n = sum(c.recent), len(c.recent)
        interval = wilson(k, n)
        speed = c.env_steps / max(c.wall_seconds, 1e-9)
        left = (self.config.schedule.env_steps - c.env_steps) / max(speed, 1e-9)
        self.progress.status(success=k / n, interval=(interval.low, interval.high), steps_per_s=speed, eta=left)

    def _publish(self) -> int:
        successes = {"train_success": float(np.mean(self.counters.recent)) if self.counters.recent else 0.0}
        manifest = self.channel.publish(
            self.learner.head.state_dict(), parent=self.counters.version, config_hash=self.scalars.config_hash, metrics=successes,
            kind=self.learner.head.KIND, base_hash=self.base.spec.base_hash, stats_hash=self.base.spec.stats_hash,
        )  # fmt: skip
        return manifest.version

    # ---- saving and resuming

    def checkpoint(self) -> None:
        """Save everything that the next phase depends on."""
        state = {
            "counters": {k: v for k, v in vars(self.counters).items()},
            "gate": self.gate.state_dict(),
            "rng": self.rng.bit_generator.state,
            "episodes": [i for i in self.buffer.episode_ids() if i in self.store],
            "recorded": self.store.episode_ids(),  # also what the buffer had no room for any more
            "curve": [[version, mode, *counts] for (version, mode), counts in self._curve.items()],
            "logs": self.folder.log_sizes(),
            "config_hash": self.scalars.config_hash,
            "base_hash": self.base.spec.base_hash,
        }
        pending = {name: torch.stack(values) for name, values in self._metrics.items()}
        tensors = {"learner": self.learner.state_dict(), "pending": {n.replace("/", "|"): v for n, v in pending.items()}}
        save_checkpoint(self.folder.checkpoints, f"step-{self.counters.env_steps:09d}", tensors, state)
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
        for name, found in (("config_hash", self.scalars.config_hash), ("base_hash", self.base.spec.base_hash)):
            if state[name] != found:
                raise ValueError(
                    f"{path}: {name}={state[name]!r}, this run has {found!r}; accepted are the configuration and base policy that the "
                    "run was started with (or another run_dir)"
                )
        self.learner.load_state_dict(tensors["learner"])
        self._metrics = {n.replace("|", "/"): list(v.unbind()) for n, v in tensors.get("pending", {}).items()}
        self.counters = Counters(**state["counters"])
        self.gate.load_state_dict(state["gate"])
        self.rng.bit_generator.state = state["rng"]
        self._curve = {(v, m): (k, n) for v, m, k, n in state["curve"]}
        self.folder.rewind_logs(state["logs"])
        self._forget(state["recorded"])
        self.channel.rewind(self.counters.version)
        for episode_id in state["episodes"]:
            ingest(self.buffer, self.store.read(episode_id), self.base, device=self.device)
        self.progress.log(f"resumed at {self.counters.env_steps} steps ({path.name})")
        return True

    def _forget(self, keep: list[str]) -> None:
        """Set aside episodes that came after the checkpoint: the resumed run plays those rounds again."""
        for episode_id in set(self.store.episode_ids()) - set(keep):
            self.store.discard(episode_id)
