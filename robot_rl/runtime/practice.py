"""Self-practice without a person: a forward task and the one that undoes it alternate, and judges say how each attempt ended.

After RoboFuME (arXiv 2310.15145). Nobody resets the scene: an attempt begins where the last one ended. The forward task is tried when
the scene is ready for it; whatever it left is undone by the backward task, which has a policy and a reward of its own. What the two
cannot get out of by themselves calls a person, and the robot rests until somebody has helped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from robot_rl.replay.store import EpisodeStore
from robot_rl.rewards.labelling import events_of, score_safely
from robot_rl.rewards.source import EpisodeTrace, FrameBatch, RewardSource, ScoreBatch
from robot_rl.runtime.chunk_scheduler import ChunkScheduler
from robot_rl.runtime.control_loop import ControlLoop
from robot_rl.runtime.safety import SafetyConfig, SafetyFilter
from robot_rl.types import ActionSpec, Decision, Episode, EpisodeMeta, Observation, RewardKind, Stratum

Direction = Literal["forward", "backward"]
End = Literal["success", "time", "stalled", "trouble"]
CLOCK_START_NS = 1_000_000_000


@dataclass(frozen=True)
class PracticeConfig:
    """Attributes:
    attempt_s: an attempt ends after so long.
    stall_decisions: it ends, too, when its value has not risen for so many decisions; 0: never.
    failed_resets: backward attempts in a row without success before a person is called.
    failed_attempts: forward attempts in a row without success before a person is called; 0: never.
    attempts: in all, 0: no limit.
    """

    attempt_s: float = 60.0
    stall_decisions: int = 50
    failed_resets: int = 3
    failed_attempts: int = 0
    attempts: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.attempt_s < float("inf"):
            raise ValueError(f"practice.attempt_s={self.attempt_s}: accepted are positive seconds")
        if self.failed_resets < 1:
            raise ValueError(f"practice.failed_resets={self.failed_resets}: accepted are integers >= 1")
        for name in ("stall_decisions", "failed_attempts", "attempts"):
            if getattr(self, name) < 0:
                raise ValueError(f"practice.{name}={getattr(self, name)}: accepted are integers >= 0")


@dataclass
class Progress:
    """Which task is next, and whether a person is needed; plain data, so that a run can be saved and resumed."""

    direction: Direction = "forward"
    help: str = ""  # why a person is called; empty: nobody is
    attempts: int = 0
    tried: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    succeeded: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    in_a_row: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})  # without success
    calls: int = 0

    def ended(self, config: PracticeConfig, success: bool | None, trouble: str = "", ready: bool = False) -> None:
        """An attempt of the present direction ended.

        Args:
            success: ``None`` where the judge could not say; that is no failure of the policy, and no success to build on.
            trouble: why the robot cannot go on by itself.
            ready: of a forward attempt without success: the scene is as the forward task needs it already.
        """
        if self.help:
            raise RuntimeError(f"a person is called ({self.help}): helped() goes on")
        now = self.direction
        self.attempts += 1
        self.tried[now] += 1
        self.succeeded[now] += success is True
        self.in_a_row[now] = 0 if success else self.in_a_row[now] + 1
        if now == "forward":
            self.direction = "forward" if ready and not success else "backward"
        else:
            self.direction = "forward" if success else "backward"
        limit = config.failed_resets if now == "backward" else config.failed_attempts
        if trouble:
            self._call(trouble)
        elif limit and self.in_a_row[now] >= limit:
            self._call(f"{self.in_a_row[now]} {now} attempts in a row did not succeed")

    def _call(self, why: str) -> None:
        self.help, self.calls = why, self.calls + 1

    def helped(self) -> None:
        """A person has put the scene in order: the forward task is next."""
        self.help, self.direction = "", "forward"
        self.in_a_row = dict.fromkeys(self.in_a_row, 0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Robot(Protocol):
    """A robot, or a simulation, that goes on from where it is."""

    action: ActionSpec
    control_hz: float

    def observe(self) -> Observation: ...

    def step(self, command: np.ndarray) -> Observation:
        """Execute a command for one control period; what is observed then."""
        ...

    def trouble(self) -> str:
        """Why it cannot go on by itself (an object has left the workspace, a fault); empty while it can."""
        ...


class Decides(Protocol):
    """What acts; an :class:`~robot_rl.runtime.acting.ActingPolicy` does."""

    def decide(self, requests: Any) -> list[Decision]: ...


@dataclass
class Task:
    """One of the two directions.

    Attributes:
        policy: gives what acts in the next attempt; asked once an attempt.
        judge: success source. One that speaks of whole episodes (coverage ``episode``) is asked when the attempt is over,
            any other at every step.
        store: where attempts are recorded, with what the judge said.
        value: how good an observation is, for the stall rule; None leaves it out.
        n_obs_steps, n_action_steps: of the policy.
    """

    instruction: str
    policy: Callable[[], Decides]
    judge: RewardSource
    store: EpisodeStore
    value: Callable[[Observation], float] | None = None
    n_obs_steps: int = 1
    n_action_steps: int = 1


@dataclass(frozen=True)
class Attempt:
    """What came of one attempt; ``success`` is None where the judge could not say."""

    number: int
    direction: Direction
    success: bool | None
    end: End
    steps: int
    episode: Episode
    trouble: str = ""


class Practice:
    """Plays attempts, one after the other.

    Args:
        call: told why, when a person is needed; the robot rests until :meth:`helped`.
        learned: told every attempt, before the next one begins.
        safety: limits beyond the action's own.
        seed: keys the policies' randomness.
        now_ns: the clock that stamps observations; by default simulated time that counts control steps.

    Raises:
        ValueError: a judge that does not judge success.
    """

    def __init__(
        self,
        robot: Robot,
        forward: Task,
        backward: Task,
        config: PracticeConfig | None = None,
        *,
        call: Callable[[str], None] = lambda why: None,
        learned: Callable[[Attempt], None] = lambda attempt: None,
        safety: SafetyConfig | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        now_ns: Callable[[], int] | None = None,
    ) -> None:
        self.robot, self.config, self.seed = robot, config or PracticeConfig(), seed
        self.tasks: dict[Direction, Task] = {"forward": forward, "backward": backward}
        for name, task in self.tasks.items():
            if task.judge.kind is not RewardKind.SUCCESS:
                raise ValueError(f"{name}.judge={task.judge.name!r} is of kind {task.judge.kind.value}: accepted is success")
        self.call, self.learned = call, learned
        self.safety = safety or SafetyConfig()
        self.progress = progress or Progress()
        self._steps = 0
        self._period = 1e9 / robot.control_hz
        self._now = now_ns or (lambda: CLOCK_START_NS + round(self._steps * self._period))

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Progress:
        """Attempts until the limit, a stop, or a person is needed."""
        limit = self.config.attempts
        while not (self.progress.help or (limit and self.progress.attempts >= limit) or should_stop()):
            self.attempt()
        return self.progress

    def helped(self) -> None:
        """A person has put the scene in order."""
        self.progress.helped()

    def attempt(self) -> Attempt:
        """One attempt of the task that is next.

        Raises:
            RuntimeError: a person is called and has not come yet.
        """
        if self.progress.help:
            raise RuntimeError(f"a person is called ({self.progress.help}): helped() goes on")
        direction = self.progress.direction
        done = _Attempt(self, direction).play()
        ready = direction == "forward" and not done.success and not done.trouble and self._ready()
        self.progress.ended(self.config, done.success, done.trouble, ready)
        self.learned(done)
        if self.progress.help:
            self.call(self.progress.help)
        return done

    def _ready(self) -> bool:
        """Whether the backward task would have nothing to do: its judge calls the scene as it is now a success.

        Judges that want several frames in a row are shown the same one as often as an attempt may ask.
        """
        task, observation = self.tasks["backward"], self.robot.observe()
        count = READY_FRAMES
        names = [n for n in task.judge.needs if n in observation]
        stack = {n: np.repeat(np.asarray(observation[n])[None], count, 0) for n in names}
        stamps = np.round(self._now() + np.arange(count) * self._period).astype(np.int64)
        trace = EpisodeTrace(f"ready-{self.progress.attempts}", stack, stamps, task.instruction)
        return score_safely(task.judge, trace).success is True


READY_FRAMES = 8


class _Attempt:
    """One attempt while it is played."""

    def __init__(self, practice: Practice, direction: Direction) -> None:
        self.practice, self.direction, self.task = practice, direction, practice.tasks[direction]
        self.number = practice.progress.attempts
        self.name = self._free(f"{direction}-{practice.seed}-{self.number:06d}")
        self.key = ("practice", direction, practice.seed, self.number)
        self.limit = max(1, round(practice.config.attempt_s * practice.robot.control_hz))
        self.seen: list[Observation] = []
        self.stamps: list[int] = []
        self.best, self.stale = -np.inf, 0
        self.latency_ms = 0.0

    def _free(self, name: str) -> str:
        """With a count behind it where an earlier attempt of that number was set aside (a run that was resumed)."""
        again, found = 1, name
        while self.task.store.taken(found):
            again += 1
            found = f"{name}-{again}"
        return found

    def play(self) -> Attempt:
        practice, task, robot = self.practice, self.task, self.practice.robot
        action = robot.action
        loop = ControlLoop(
            action, ChunkScheduler(action, task.n_action_steps), SafetyFilter(practice.safety, action, robot.control_hz),
            n_obs_steps=task.n_obs_steps,
        )  # fmt: skip
        meta = EpisodeMeta(
            self.name, task=task.instruction, stratum=Stratum.ONLINE, control_hz=robot.control_hz,
            extra={"practice": self.direction, "attempt": self.number},
        )  # fmt: skip
        policy, observation = task.policy(), robot.observe()
        self._saw(observation)
        features = task.store.observation_features
        recorder = task.store.begin(meta)
        try:
            loop.begin(self._of(observation, features), key=self.key, recorder=recorder, stamp_ns=self.stamps[0])
            end: End | None = None
            scores, trouble = ScoreBatch.none(), ""
            while end is None:
                if loop.wants_chunk:
                    loop.accept(policy.decide([loop.request()])[0])
                    self._decided(observation)
                observation = robot.step(loop.tick(self.stamps[-1]))
                practice._steps += 1
                self._saw(observation)
                trouble = robot.trouble()
                scores = self._judged() if self.task.judge.coverage != "episode" else scores
                end = self._end(scores, trouble)
                if end not in (None, "success"):  # who looks at the whole says it now
                    scores = score_safely(task.judge, self._trace())
                    if scores.success and not trouble:
                        end = "success"
                reached = end == "success"
                loop.observe(
                    self._of(observation, features), float(reached), reached, end is not None and not reached, self.stamps[-1]
                )
            success = True if end == "success" else scores.success
            success = False if trouble else success
            episode = loop.finish(success=success, background=False)
        except BaseException:
            if loop.running:
                loop.abort()
            raise
        assert episode is not None
        said = replace(scores, success=None)  # the verdict stands in the episode already
        task.store.append_reward(*events_of(task.judge, self._trace(), said, self.latency_ms, False))
        return Attempt(self.number, self.direction, success, end, len(episode), episode, trouble)

    @staticmethod
    def _of(observation: Observation, features: Any) -> Observation:
        return {name: observation[name] for name in features}

    def _saw(self, observation: Observation) -> None:
        self.seen.append({n: observation[n] for n in self.task.judge.needs if n in observation})
        self.stamps.append(self.practice._now())

    def _decided(self, observation: Observation) -> None:
        """The stall rule's count, once a decision."""
        if self.task.value is None:
            return
        value = float(self.task.value(observation))
        self.best, self.stale = (value, 0) if value > self.best else (self.best, self.stale + 1)

    def _end(self, scores: ScoreBatch, trouble: str) -> End | None:
        stall = self.practice.config.stall_decisions
        if trouble:
            return "trouble"
        if scores.success:
            return "success"
        if len(self.stamps) - 1 >= self.limit:
            return "time"
        return "stalled" if stall and self.stale >= stall else None

    def _judged(self) -> ScoreBatch:
        """What a judge of single frames says of the newest."""
        began = time.monotonic()
        frame = {n: np.asarray(v)[None] for n, v in self.seen[-1].items()}
        step = len(self.stamps) - 1
        batch = FrameBatch(frame, np.array([step]), np.array([self.stamps[-1]], np.int64), self.task.instruction, self.name)
        try:
            return self.task.judge.score(batch)
        except Exception:  # whatever a judge does, the robot must not stop in the middle of a motion: unknown
            return ScoreBatch.failed(np.array([step]), "error")
        finally:
            self.latency_ms = (time.monotonic() - began) * 1e3

    def _trace(self) -> EpisodeTrace:
        names = self.seen[0].keys()
        return EpisodeTrace(
            self.name, {n: np.stack([s[n] for s in self.seen]) for n in names}, np.array(self.stamps, np.int64),
            self.task.instruction,
        )  # fmt: skip
