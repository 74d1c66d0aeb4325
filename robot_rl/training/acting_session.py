"""The acting side of a post-training run: rounds of phases, each of which either completes or changes nothing.

``collect`` plays episodes, ``learn`` lets learning happen (or looks whether it does), ``gate`` puts candidates on probation,
``evaluate`` adds a point to the learning curve; together they are one round. A run can be checkpointed between any two phases
(and, in ``gate``, between any two blocks of probation episodes), so Ctrl-C costs one phase and kill -9 what came after the
last checkpoint. Where the learner runs is the business of the two kinds of session.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from robot_rl import seeding
from robot_rl.heads.base import Head
from robot_rl.intervention.metrics import Driven, intervention_rate, newest
from robot_rl.policies.base import BasePolicy
from robot_rl.progress import Progress
from robot_rl.runtime.acting import ActingMode, ActingPolicy
from robot_rl.runtime.gate import GateEvent, PromotionGate
from robot_rl.runtime.weights import WeightChannel
from robot_rl.sim.rollout import EpisodeOutcome, EpisodePlan, Rollout
from robot_rl.training.build import build_head, open_store
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.interrupt import Interrupted, InterruptFlag
from robot_rl.training.learner_core import LearningCounters
from robot_rl.training.measuring import measure, success_interval
from robot_rl.training.run_folder import RunFolder
from robot_rl.training.scalars import ScalarLog
from robot_rl.training.starts import Starts

PHASES = ("collect", "learn", "gate", "evaluate")


@dataclass
class Counters(LearningCounters):
    """Where a run is; saved with every checkpoint."""

    phase: str = "collect"
    round: int = 0
    gate_steps: int = 0
    evaluation_steps: int = 0
    next_candidate: int = 0
    next_evaluation: int = 0
    candidates: list[list[Any]] = field(default_factory=list)  # (version, mode) still to be submitted this round
    seconds: dict[str, float] = field(default_factory=lambda: {p: 0.0 for p in PHASES})
    done: str = ""  # why the run ended
    driven_first: list[Sequence[int]] = field(default_factory=list)  # (steps, those of a person) of watched episodes
    driven_last: list[Sequence[int]] = field(default_factory=list)

    def watched(self, played: list[Driven], steps: int) -> None:
        """A person sat beside these training episodes; a share is taken over ``steps`` steps."""
        if sum(length for length, _ in self.driven_first) < steps:
            self.driven_first += played
        self.driven_last = [*newest([*map(Driven._make, self.driven_last), *played], steps)]


class ActingSession(ABC):
    """Everything between the frozen base and the final table that does not depend on where the learner runs."""

    KEEP_EPISODES = False
    """Whether :meth:`_played` needs the episodes themselves."""

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
        self.config, self.folder, self.base, self.rollout = config, folder, base, rollout
        self.progress, self.flag, self.device = progress, flag, device
        self.gate = PromotionGate(config.gate)
        self.channel = WeightChannel(folder.weights)
        self.counters = Counters(next_candidate=config.schedule.warmup_steps, next_evaluation=config.schedule.evaluate_every)
        self.scalars = ScalarLog(folder, config)
        self.starts = Starts(config, folder, rollout)
        self.store = open_store(self.folder.store, base.spec)
        self._heads: dict[int, Head] = {}
        self._curve: dict[tuple[int, str], tuple[int, int]] = {}
        self._last_checkpoint = time.monotonic()

    # ---- what the kinds of session differ in

    @property
    @abstractmethod
    def head(self) -> Head:
        """The newest head there is; untrained before learning began."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Gradient updates so far, as far as is known here."""

    @abstractmethod
    def learner_summary(self) -> dict[str, Any]:
        """For ``result.json``: where the learner ran and how it fared."""

    def _prepare(self) -> None:  # noqa: B027
        """Whatever comes before the first round; raises Interrupted after saving a checkpoint."""

    @abstractmethod
    def _explorer(self) -> ActingPolicy:
        """What plays the next round of training episodes."""

    @abstractmethod
    def _make_room(self, ids: list[str]) -> None:
        """These episodes are about to be recorded."""

    @abstractmethod
    def _played(self, outcomes: list[EpisodeOutcome], steps: int) -> None:
        """A round is recorded; counts its steps."""

    @abstractmethod
    def _learn(self) -> None:
        """The phase in which learning happens, or is looked at."""

    @abstractmethod
    def _candidate(self) -> int | None:
        """The version to put on probation now, or None when there is nothing new."""

    @abstractmethod
    def checkpoint(self) -> None:
        """Save everything that the next phase depends on."""

    @abstractmethod
    def resume(self) -> bool:
        """Continue from the latest checkpoint; False when there is none."""

    def _should_stop(self) -> bool:
        """Asked once a control step while episodes are played."""
        return self.flag()

    def _sha256(self, version: int) -> str:
        return self.channel.manifest(version).sha256

    def _explore_with(self, head: Head, version: int) -> ActingPolicy:
        mixture = self.config.mixture
        return ActingPolicy(
            self.base, head, "explore", version, base_share=self.counters.base_share(mixture), device=self.device,
            handover=self.counters.decisions_of_base(mixture), handover_random=mixture.handover == "random",
        )  # fmt: skip

    def _base_explorer(self) -> ActingPolicy:
        """The base, disturbed where the warm-up asks for it."""
        disturbed = self.config.schedule.warmup_perturbation
        return ActingPolicy(self.base, mode="base", device=self.device, perturbation=disturbed)

    def _kept(self) -> set[int | None]:
        """Versions whose heads stay in memory."""
        return {self.gate.acting, self.gate.on_probation}

    def close(self) -> None:
        self.scalars.close()
        self.store.close()

    # ---- acting

    def policy(self, version: int, mode: ActingMode) -> ActingPolicy:
        """The base, or a published version, verified by the weight channel before it acts."""
        if version == 0:
            return ActingPolicy(self.base, mode="base", device=self.device)
        if version not in self._heads:
            head = build_head(self.base, self.config.head, self.config.seed, self.config.learner).to(self.device)
            head.load_state_dict(self.channel.load(version, {n: tuple(t.shape) for n, t in head.state_dict().items()}))
            kept = self._kept()
            self._heads = {v: h for v, h in self._heads.items() if v in kept}
            self._heads[version] = head
        return ActingPolicy(self.base, self._heads[version], mode, version, device=self.device)

    @property
    def acting(self) -> tuple[int, ActingMode]:
        """(version, mode) that the gate lets act."""
        return self.gate.acting, self.gate.acting_mode  # type: ignore[return-value]

    # ---- the run

    def run(self) -> str:
        """Play rounds until a stop rule holds; returns which. Raises Interrupted after saving a checkpoint."""
        self._prepare()
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
            rate = self.intervention_rate
            alone = stop.intervention_rate >= 1.0 or (rate is not None and rate < stop.intervention_rate)
            if n >= stop.episodes and successes >= stop.success * n and alone:
                c.done = f"the acting head succeeded in {successes} of {n} gate episodes"
                if rate is not None:
                    c.done += f"; a person drove {100 * rate:.1f} % of the last {stop.intervention_steps} training steps"
        if not c.done and c.env_steps >= self.config.schedule.env_steps:
            c.done = f"{c.env_steps} environment steps are used up"

    @property
    def intervention_rate(self) -> float | None:
        """The share of the last training steps that a person drove; None where nobody is there, or not for long enough."""
        return intervention_rate(list(map(Driven._make, self.counters.driven_last)), self.config.stop.intervention_steps)

    def intervention_summary(self) -> dict[str, Any]:
        """For ``result.json``: how much a person drove at first and at last; nothing where nobody was there."""
        if not self.config.operator.patience:
            return {}
        steps = self.config.stop.intervention_steps
        played = list(map(Driven._make, self.counters.driven_first))
        while len(played) > 1 and sum(e.steps for e in played[:-1]) >= steps:
            played.pop()  # of the round that filled the window
        return {
            "intervention_rate": {"steps": steps, "first": intervention_rate(played, steps), "last": self.intervention_rate}
        }

    # ---- phases

    def _collect(self) -> None:
        """One round of training episodes: the base during warm-up, then the newest head mixed with the base."""
        c, schedule = self.counters, self.config.schedule
        policy = self._explorer()
        starts = self.starts.plan(c.round)
        ids = [f"r{c.round:06d}e{i:03d}" for i in range(schedule.round_episodes)]
        self._make_room(ids)
        greedy = self._greedy(policy)
        plans = [
            EpisodePlan(
                start.seed,
                ("training", self.config.seed, key),
                greedy if self._is_greedy(key) else policy,
                self._free_id(key),
                start.prefix,
                start.group,
                c.env_steps,
            )
            for start, key in zip(starts, ids, strict=True)
        ]
        outcomes = self.rollout.play(
            plans, store=self.store, keep_episodes=self.KEEP_EPISODES, should_stop=self._should_stop,
            operator=self.config.operator,
        )  # fmt: skip
        self.store.flush()
        if len(outcomes) < len(plans):
            raise Interrupted
        steps = sum(o.length for o in outcomes)
        self._played(outcomes, steps)
        c.round += 1
        self.starts.record(starts, [o.success for o in outcomes])
        shown = self.starts.scalars()
        if self.config.operator.patience:
            shown = shown | {"train/human_steps": sum(o.human_steps for o in outcomes) / steps}
            c.watched([Driven(o.length, o.human_steps) for o in outcomes], self.config.stop.intervention_steps)
        if shown:
            self.scalars.write(shown, c.env_steps)
        c.remember([o.success for o in outcomes])
        c.advance_handover(self.config.mixture, [o.success for o in outcomes])
        self.progress.advance(steps)
        self._show(steps)

    def _greedy(self, explorer: ActingPolicy) -> ActingPolicy:
        """The same head as a candidate would act; the base itself while that explores."""
        if explorer.mode != "explore":
            return explorer
        return ActingPolicy(self.base, explorer.head, "eval", explorer.version, device=self.device)

    def _is_greedy(self, key: str) -> bool:
        share = self.config.mixture.greedy
        return share > 0 and float(seeding.rng("greedy", self.config.seed, key).random()) < share

    def _free_id(self, key: str) -> str:
        """``key``, or with a count behind it where an earlier attempt at the same episode was set aside under that id."""
        attempt, found = 1, key
        while self.store.taken(found):
            attempt += 1
            found = f"{key}-{attempt}"
        return found

    def _gate(self) -> None:
        """Publish a candidate when one is due, and play probation episodes until the gate has decided."""
        c, schedule = self.counters, self.config.schedule
        if c.actor_started_at >= 0 and c.env_steps >= c.next_candidate:
            version = self._candidate()
            if version is not None:
                c.next_candidate = c.env_steps + schedule.candidate_every
                c.version = version
                c.candidates = [[version, mode] for mode in schedule.candidate_modes]
        while True:
            if self.gate.on_probation is None:
                if not c.candidates:
                    break
                version, mode = c.candidates.pop(0)
                self._log_gate(self.gate.submit(version, mode, self._sha256(version)))
                if self.gate.on_probation is None:  # weights that were judged before: decided without an episode
                    continue
            self._probation()
        self._confirm()

    def _probation(self) -> None:
        """One block of probation episodes on gate seeds; interrupting it loses the block and nothing else."""
        version, mode = self.gate.on_probation, self.gate.probation_mode
        assert version is not None
        assert mode is not None
        seeds = self.gate.fresh_seeds(seeding.GATE.take(self.config.gate.n_max, self._gate_offset), len(self.rollout.vector))
        if self.config.gate.min_gain is not None:
            self._acting_keeps_up(self.gate.evidence(version, mode)[1] + len(seeds))
        known = {s: self.gate.cached(s) for s in seeds}
        missing = [s for s in seeds if known[s] is None]
        if missing:
            outcomes = measure(self.rollout, self.policy(version, mode), missing, should_stop=self._should_stop)  # type: ignore[arg-type]
            self.counters.gate_steps += sum(o.length for o in outcomes)
            known |= {o.plan.seed: o.success for o in outcomes}
        for seed in seeds:
            success = known[seed]
            assert success is not None
            self._log_gate(self.gate.record(version, success, mode=mode, seed=seed))

    def _acting_keeps_up(self, n: int) -> None:
        """The acting head plays on until it has ``n`` gate episodes, paired with the candidate's as far as it goes.

        The same rate over more episodes has a higher lower bound: a candidate on its way to ``n_max`` would otherwise take over
        from a better head that once was promoted on ``n_min``.
        """
        while self.gate.acting:
            version, mode = self.acting
            played = self.gate.evidence(version, mode)[1]
            if played >= n:
                return
            seeds = seeding.GATE.take(min(len(self.rollout.vector), n - played), self._gate_offset + played)
            self._play_acting(version, mode, seeds)

    def _play_acting(self, version: int, mode: ActingMode, seeds: list[int]) -> None:
        """Gate episodes of the head that acts."""
        outcomes = measure(self.rollout, self.policy(version, mode), seeds, should_stop=self._should_stop)
        self.counters.gate_steps += sum(o.length for o in outcomes)
        for outcome in outcomes:
            self._log_gate(self.gate.record_acting(outcome.success, version))

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
            self._play_acting(version, mode, seeding.GATE.take(block, first))
            version, mode = self.acting

    def _evaluate(self) -> None:
        """A point of the learning curve: the acting policy on evaluation seeds (nothing to play while it has not changed)."""
        c = self.counters
        if c.env_steps < c.next_evaluation and not self._acting_is_new():
            return
        key = self.acting
        if key not in self._curve:
            seeds = seeding.EVALUATION.take(self.config.evaluation.curve_episodes)
            outcomes = measure(self.rollout, self.policy(*key), seeds, should_stop=self._should_stop)
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
            where = {"env_steps": self.counters.env_steps, "wall_seconds": self.counters.wall_seconds}
            self.folder.append("gate.jsonl", event.to_json(**where))
            if event.event != "candidate":
                self.progress.log(
                    f"{self.counters.env_steps} steps: version {event.version} ({event.mode}) {event.event.replace('_', ' ')}, "
                    f"{event.successes} of {event.n} (reference {event.reference:.0%})"
                )

    def _show(self, steps: int) -> None:
        from robot_rl.evaluation.statistics import wilson

        c = self.counters
        k, n = sum(c.recent), len(c.recent)
        interval = wilson(k, n)
        speed = c.env_steps / max(c.wall_seconds, 1e-9)
        left = (self.config.schedule.env_steps - c.env_steps) / max(speed, 1e-9)
        self.progress.status(
            success=k / n, interval=(interval.low, interval.high), steps_per_s=speed, eta=left, driven=self.intervention_rate
        )
