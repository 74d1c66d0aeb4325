"""Simulated episodes through the same control loop that runs on robots, many at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from robot_rl.replay.store import EpisodeStore
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.chunk_scheduler import ChunkScheduler
from robot_rl.runtime.control_loop import ControlLoop
from robot_rl.runtime.safety import SafetyConfig, SafetyFilter
from robot_rl.sim.env import EnvSpec
from robot_rl.sim.operator import SimulatedOperator
from robot_rl.sim.operator_config import OperatorConfig
from robot_rl.sim.vector import ProcessVectorEnv, VectorEnv
from robot_rl.types import Episode, EpisodeMeta, Observation, Stratum

CLOCK_START_NS = 1_000_000_000  # simulated time starts at one second, so that 0 stays "no stamp"


@dataclass(frozen=True)
class EpisodePlan:
    """One episode to play.

    Attributes:
        seed: of the start state.
        key: keys the policy's randomness (evaluation: the seed alone, so that policies meet equal noise).
        policy: what acts.
        episode_id: under which it is recorded.
        prefix: (T, A) physical actions that are executed after the reset, before the policy takes over and recording begins: the
            same seed and prefix give the same state, bit for bit. One that ends the episode is left out.
        group: of episodes that begin in one state, recorded with them; None: episodes of one seed.
        watched: control steps that a simulated person has watched before this episode.
    """

    seed: int
    key: tuple[int | str, ...]
    policy: ActingPolicy
    episode_id: str = ""
    prefix: np.ndarray | None = None
    group: int | None = None
    watched: int = 0


@dataclass
class EpisodeOutcome:
    """What came of a plan. ``end`` is ``success``, ``failure`` or ``time limit``; ``stage`` is where the task says it got to;
    ``human_steps`` are those that a simulated operator drove."""

    plan: EpisodePlan
    success: bool
    length: int
    episode_return: float
    end: str
    start: dict[str, float] = field(default_factory=dict)
    stage: str = ""
    episode: Episode | None = None
    frames: list[np.ndarray] = field(default_factory=list)
    human_steps: int = 0


@dataclass
class _Slot:
    """An environment with its loop, and the plan it is playing."""

    loop: ControlLoop
    plan: EpisodePlan
    order: int
    start: dict[str, float]
    operator: SimulatedOperator | None = None
    success: bool = False
    total: float = 0.0
    frames: list[np.ndarray] = field(default_factory=list)


class Rollout:
    """Plays plans on a vector of simulated robots; every robot runs its own :class:`ControlLoop`.

    Robots that need a chunk at the same control step and play the same policy share one batched call. A robot that has
    finished its plan starts the next one at once. Results come in the order of the plans, whatever finished first.

    Time is simulated: step t has the stamp ``1 s + t / control_hz``.

    Args:
        safety: limits beyond the action's own; by default commands are only kept finite and inside those.
    """

    def __init__(self, vector: VectorEnv | ProcessVectorEnv, spec: EnvSpec, safety: SafetyConfig | None = None) -> None:
        self.vector, self.spec = vector, spec
        self.safety = safety or SafetyConfig()
        self.env_steps = 0

    def play(
        self,
        plans: Sequence[EpisodePlan],
        *,
        store: EpisodeStore | None = None,
        keep_episodes: bool = False,
        film: tuple[int, int] | None = None,
        on_outcome: Callable[[EpisodeOutcome], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        operator: OperatorConfig | None = None,
    ) -> list[EpisodeOutcome]:
        """Play every plan to its end.

        Args:
            store: record the episodes there. ``keep_episodes`` also hands them back in RAM (only with a store).
            film: (width, height) of frames to keep, one a control step.
            on_outcome: called as episodes end.
            should_stop: asked once a control step; True aborts the running episodes and returns what is complete.
            operator: a simulated person watches every episode; needs environments in this process.
        """
        waiting = deque(enumerate(plans))
        slots: dict[int, _Slot] = {}
        results: dict[int, EpisodeOutcome] = {}
        free = list(range(len(self.vector)))
        while waiting or slots:
            if should_stop is not None and should_stop():
                for slot in slots.values():
                    slot.loop.abort()
                break
            slots.update(self._start(waiting, free, store, film, operator))
            self._decide(slots)
            self._advance(slots, free, results, keep_episodes, film, on_outcome)
        self.vector.look(dict.fromkeys(range(len(self.vector)), True))
        return [results[i] for i in sorted(results)]

    def _start(
        self,
        waiting: deque,
        free: list[int],
        store: EpisodeStore | None,
        film: tuple[int, int] | None,
        operator: OperatorConfig | None,
    ) -> dict[int, _Slot]:
        plans = {free.pop(0): waiting.popleft() for _ in range(min(len(free), len(waiting)))}
        if not plans:
            return {}
        started = {}
        self.vector.look(dict.fromkeys(plans, True))
        for index, (observation, info) in self.vector.reset_many({i: plan.seed for i, (_, plan) in plans.items()}).items():
            order, plan = plans[index]
            if plan.prefix is not None:
                observation = self._replayed(index, plan, observation)
            person = self._operator(operator, index, plan)
            loop = self._loop(plan.policy, person)
            recorder = None if store is None else store.begin(self._meta(plan))
            loop.begin(self._seen(observation, plan.policy), key=plan.key, recorder=recorder, stamp_ns=CLOCK_START_NS)
            slot = _Slot(loop, plan, order, dict(info.get("start", {})), person)
            if film is not None:
                slot.frames.append(self.vector.render(index, "", *film))
            started[index] = slot
        return started

    def _replayed(self, index: int, plan: EpisodePlan, observation: Observation) -> Observation:
        """The observation after the plan's prefix; that of the plain start where the prefix ends the episode."""
        assert plan.prefix is not None
        for action in plan.prefix:
            ((observation, _, terminated, truncated, _),) = self.vector.step({index: action})
            if terminated or truncated:
                return self.vector.reset(index, plan.seed)[0]
        return observation

    def _operator(self, config: OperatorConfig | None, index: int, plan: EpisodePlan) -> SimulatedOperator | None:
        if config is None or not config.patience:
            return None
        if isinstance(self.vector, ProcessVectorEnv):
            raise ValueError(
                "a simulated operator looks at the simulation itself, which runs in another process here: accepted are the workers serial, "
                "threads"
            )
        return SimulatedOperator(config, self.vector.envs[index], plan.key, plan.watched)

    def _loop(self, policy: ActingPolicy, person: SimulatedOperator | None = None) -> ControlLoop:
        spec = policy.base.spec
        scheduler = ChunkScheduler(self.spec.action, spec.n_action_steps)
        safety = SafetyFilter(self.safety, self.spec.action, self.spec.control_hz)
        return ControlLoop(self.spec.action, scheduler, safety, n_obs_steps=spec.n_obs_steps, arbiter=person)

    def _meta(self, plan: EpisodePlan) -> EpisodeMeta:
        policy = plan.policy
        more = {} if plan.group is None else {"group": plan.group}
        if plan.prefix is not None:
            more["prefix_steps"] = len(plan.prefix)
        return EpisodeMeta(
            plan.episode_id, task=self.spec.instruction, env_id=self.spec.env_id, seed=plan.seed, stratum=Stratum.ONLINE,
            weights_version=policy.version, base_hash=policy.base.spec.base_hash, stats_hash=policy.base.spec.stats_hash,
            control_hz=self.spec.control_hz, extra={"mode": policy.mode, "base_share": policy.base_share, "key": list(plan.key)} | more,
        )  # fmt: skip

    def _seen(self, observation: Observation, policy: ActingPolicy) -> Observation:
        return {name: observation[name] for name in policy.base.spec.observation_features}

    def _decide(self, slots: dict[int, _Slot]) -> None:
        asking: dict[int, list[_Slot]] = {}
        policies: dict[int, ActingPolicy] = {}
        for slot in slots.values():
            if slot.loop.wants_chunk:
                policy = slot.plan.policy
                policies[id(policy)] = policy
                asking.setdefault(id(policy), []).append(slot)
        for identity, group in asking.items():
            decisions = policies[identity].decide([slot.loop.request() for slot in group])
            for slot, decision in zip(group, decisions, strict=True):
                slot.loop.accept(decision)

    def _advance(
        self,
        slots: dict[int, _Slot],
        free: list[int],
        results: dict[int, EpisodeOutcome],
        keep: bool,
        film: tuple[int, int] | None,
        on_outcome: Callable[[EpisodeOutcome], None] | None,
    ) -> None:
        indices = list(slots)
        period = 1e9 / self.spec.control_hz
        stamps = {i: CLOCK_START_NS + round(slots[i].loop.step * period) for i in indices}
        commands = {i: slots[i].loop.tick(stamps[i]) for i in indices}
        self.vector.look({i: slots[i].loop.reads_next for i in indices})
        for index, (observation, reward, terminated, truncated, info) in zip(
            indices, self.vector.step(commands, indices), strict=True
        ):
            slot = slots[index]
            stamp = CLOCK_START_NS + round((slot.loop.step + 1) * period)
            slot.loop.observe(self._seen(observation, slot.plan.policy), reward, terminated, truncated, stamp)
            if slot.operator is not None:
                slot.operator.saw(str(info.get("stage", "")))
            slot.success |= bool(info["success"])
            slot.total += reward
            self.env_steps += 1
            if film is not None:
                slot.frames.append(self.vector.render(index, "", *film))
            if terminated or truncated:
                episode = slot.loop.finish(success=slot.success)
                end = "success" if slot.success else "failure" if terminated else "time limit"
                outcome = EpisodeOutcome(
                    slot.plan, slot.success, slot.loop.step, slot.total, end, slot.start, str(info.get("stage", "")),
                    episode if keep else None, slot.frames, 0 if slot.operator is None else slot.operator.steps,
                )  # fmt: skip
                results[slot.order] = outcome
                del slots[index]
                free.append(index)
                if on_outcome is not None:
                    on_outcome(outcome)
        free.sort()
