"""The control loop of one robot: what happens in every control step, whoever drives it.

The loop does no waiting, no inference and no I/O of its own. A driver (a simulator's rollout, a ROS node's timer) feeds
it observations and chunks and executes what :meth:`ControlLoop.tick` returns::

    loop.begin(observation, key=..., recorder=writer)
    while running:
        if loop.wants_chunk:
            loop.accept(policy.decide([loop.request()])[0])      # inline, or later from an inference thread
        command = loop.tick()
        ...execute for one control period...
        loop.observe(observation, reward, terminated, truncated)
    episode = loop.finish(success=...)
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

import numpy as np

from robot_rl.intervention.arbitration import Arbiter, Arbitration, PolicyOnly, Situation
from robot_rl.runtime.chunk_scheduler import ChunkScheduler
from robot_rl.runtime.safety import SafetyFilter, SafetyLevel
from robot_rl.types import ActionSpec, Decision, Episode, EpisodeMeta, Observation, SafetyFlag, Source, Step

if TYPE_CHECKING:
    from robot_rl.runtime.acting import DecisionRequest


class Recorder(Protocol):
    """What logs an episode; an ``EpisodeWriter`` of the store, or nothing at all."""

    def append(self, step: Step) -> None: ...

    def decide(self, decision: Decision) -> int: ...

    def commit(
        self, final_observation: Observation, *, success: bool | None = None, background: bool = False
    ) -> Episode | None: ...

    def abort(self) -> None: ...


class ControlLoop:
    """One robot's loop: chunk scheduler, arbiter, safety filter, recorder.

    Args:
        n_obs_steps: observations stacked for the policy.
        safety: the last thing before the robot.
        arbiter: who decides between policy and human; the policy alone by default.
    """

    def __init__(
        self,
        action: ActionSpec,
        scheduler: ChunkScheduler,
        safety: SafetyFilter,
        *,
        n_obs_steps: int = 1,
        arbiter: Arbiter | None = None,
    ) -> None:
        self.action, self.scheduler, self.safety = action, scheduler, safety
        self.arbiter: Arbiter = arbiter or PolicyOnly()
        self._frames: deque[Observation] = deque(maxlen=n_obs_steps)
        self._delta = action.delta_mask
        self._recorder: Recorder | None = None
        self._pending: Step | None = None  # commanded, its outcome not seen yet
        self._finished: Step | None = None  # complete, not logged yet
        self._running = False
        self._followed = False  # whether the last step was the policy's
        self._not_before = 0  # chunks computed from earlier observations must not run
        self.step = 0
        self.decisions = 0

    # ---- an episode

    def begin(
        self,
        observation: Observation,
        *,
        key: tuple[int | str, ...],
        recorder: Recorder | None = None,
        stamp_ns: int | None = None,
        measured: np.ndarray | None = None,
    ) -> None:
        """Start an episode. ``key`` keys its randomness; ``measured`` (A,) is where an absolute-commanded robot stands."""
        if self._running:
            raise RuntimeError("begin: an episode is running; finish or abort it first")
        now = time.monotonic_ns() if stamp_ns is None else stamp_ns
        self._frames.clear()
        for _ in range(self._frames.maxlen or 1):
            self._frames.append(observation)
        self.key, self.step, self.decisions = key, 0, 0
        self._observation_stamp, self._recorder = now, recorder
        self._pending = self._finished = None
        self._last = None if measured is None else np.asarray(measured, np.float32)
        self._not_before = 0
        self._followed = False
        self.scheduler.clear()
        self.safety.reset(now, measured=measured)
        self.arbiter.begin()
        self._running = True

    @property
    def running(self) -> bool:
        return self._running

    @property
    def wants_chunk(self) -> bool:
        return self._running and self.scheduler.wants_chunk(self.step)

    @property
    def reads_next(self) -> bool:
        """Asked between :meth:`tick` and :meth:`observe`: whether anybody will read the observation that comes, be it a recorder, an
        arbiter, or the policy, which sees the newest few when it is asked for its next chunk."""
        if self._recorder is not None or not isinstance(self.arbiter, PolicyOnly):
            return True
        frames = self._frames.maxlen or 1
        return self.scheduler.rows_left(self.step + 1) <= self.scheduler.replan_margin + frames - 1

    def request(self, frozen: int | None = None) -> DecisionRequest:
        """The question to put to the policy now.

        Args:
            frozen: rows of the running chunk that will run before the answer is there, where the answer is to continue them. While
                somebody else drives, or the robot was just held, no chunk runs, and there is nothing to continue.
        """
        from robot_rl.runtime.acting import DecisionRequest  # here, because it imports torch, which a teleoperated robot lacks

        names = self._frames[-1].keys()
        stack = {n: np.stack([f[n] for f in self._frames]) for n in names}
        running = self.scheduler.running(self.step, frozen) if frozen is not None and self._followed else None
        return DecisionRequest(stack, self.key, self.decisions, self.step, running)

    def accept(self, decision: Decision) -> bool:
        """Schedule a decision; False if it came too late to run at all (it is logged either way).

        One computed from an observation before the last take-over or hand-back never runs.
        """
        self._log()  # the log keeps the order of events
        identity = self.decisions if self._recorder is None else self._recorder.decide(decision)
        self.decisions += 1
        if decision.step < self._not_before:
            return False
        return self.scheduler.push(
            decision.step,
            self.step,
            decision.chunk,
            decision.chunk_base,
            identity,
            decision.weights_version,
            decision.continues,
        )

    def tick(self, now_ns: int | None = None, hold: SafetyFlag = SafetyFlag.NONE) -> np.ndarray:
        """The command (A,) for this control step, after arbiter and safety filter. Call :meth:`observe` before the next tick.

        ``hold`` names rules that the driver judged itself (a stale topic); with any of them the filter holds.
        """
        if not self._running or self._pending is not None:
            raise RuntimeError("tick: begin an episode first, and observe the outcome of the last tick")
        now = time.monotonic_ns() if now_ns is None else now_ns
        observation = self._frames[-1]
        row = self.scheduler.row(self.step)
        wish = self._standstill() if row is None else row.command
        situation = Situation(self.step, row is not None, self._standstill())
        choice = self.arbiter.arbitrate(now, wish, observation, situation)
        if choice.drop_chunk:
            self.scheduler.clear()
            self._not_before = self.step
        source = Source.HOLD if row is None and choice.source is Source.POLICY else choice.source
        result = self.safety.filter(
            choice.command, now_ns=now, observation_stamp_ns=self._observation_stamp,
            operator_stamp_ns=choice.operator_stamp_ns, chunk_started=row is not None and row.chunk_started,
            hold=hold,
        )  # fmt: skip
        if result.level >= SafetyLevel.HOLD:
            source = Source.SAFETY
        command = result.command.astype(np.float32)
        self._last = command
        self._pending = Step(
            observation=observation,
            action=command,
            action_base=None if row is None else row.base,
            action_policy=None if row is None else row.command,
            action_human=choice.human,
            source=source,
            safety=SafetyFlag(result.flags),
            decision_id=-1 if row is None else row.decision_id,
            chunk_row=-1 if row is None else row.chunk_row,
            weights_version=0 if row is None else row.version,
            intervention_id=choice.intervention_id,
            stamp_ns=self._observation_stamp,
        )
        self._log()
        return command

    def correct(
        self, action: np.ndarray | None = None, source: Source | None = None, safety: SafetyFlag = SafetyFlag.NONE
    ) -> None:
        """Something behind this loop changed the last command (a guard): record what it really did. Nothing if no step is open."""
        step = self._pending
        if step is None:
            return
        if action is not None:
            step.action = np.asarray(action, np.float32)
            self._last = step.action
        if source is not None:
            step.source = source
        step.safety |= safety

    def observe(
        self, observation: Observation, reward: float, terminated: bool, truncated: bool, stamp_ns: int | None = None
    ) -> None:
        """What the executed command led to. The step is complete; the tick that follows logs it, before it returns its command.

        A thread that has just woken pays five times for the same work, because its caches are cold: so the step is only kept
        here, and logged once the next command has been decided.
        """
        step = self._pending
        if step is None:
            raise RuntimeError("observe: call tick first")
        step.reward, step.terminated, step.truncated = reward, terminated, truncated
        self._pending, self._finished = None, step
        self._followed = step.source is Source.POLICY
        if terminated or truncated:
            self._log()  # no tick follows
        self._frames.append(observation)
        self._observation_stamp = time.monotonic_ns() if stamp_ns is None else stamp_ns
        self.step += 1

    def _log(self) -> None:
        step, self._finished = self._finished, None
        if step is not None and self._recorder is not None:
            self._recorder.append(step)

    def finish(self, *, success: bool | None = None, background: bool = True) -> Episode | None:
        """End the episode and commit its recording (off this thread by default); returns it, or None without a recorder."""
        self._running = False
        try:
            self._log()
        finally:  # a step that could not be logged does not cost those before it
            recorder, self._recorder = self._recorder, None
            meta = getattr(recorder, "meta", None)
            if isinstance(meta, EpisodeMeta):
                meta.extra.update(self.arbiter.report())
            episode = None
            if recorder is not None:
                episode = recorder.commit(self._frames[-1], success=success, background=background)
        return episode

    def abort(self) -> None:
        """End the episode and throw its recording away."""
        self._running, self._pending, self._finished = False, None, None
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.abort()

    def _standstill(self) -> np.ndarray:
        """No chunk is scheduled: absolute dimensions keep their last command, deltas are zero."""
        last = np.zeros(self.action.dim, np.float32) if self._last is None else self._last
        return np.where(self._delta, 0.0, last).astype(np.float32)


__all__ = ["Arbiter", "Arbitration", "ControlLoop", "PolicyOnly", "Recorder", "Situation"]
