"""``robot-rl practice``: two policies that practise by themselves, each with a head, a learner and a store of its own (RoboFuME).

One simulated robot plays :class:`~robot_rl.runtime.practice.Practice`; after every attempt the learner of its direction takes the
episode in. What a direction is trained with is an ordinary training configuration.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from robot_rl.config import config_hash, load, to_yaml
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.loading import load_policy
from robot_rl.progress import Progress as Display
from robot_rl.progress import Silent
from robot_rl.rewards.registry import load_source
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.practice import Attempt, Direction, Practice, PracticeConfig, Progress, Task
from robot_rl.runtime.weights import WeightChannel
from robot_rl.sim.env import make_env
from robot_rl.sim.practice import EndlessTabletop
from robot_rl.sim.tabletop.core import TabletopEnv
from robot_rl.training.build import open_store, pick_device
from robot_rl.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.interrupt import Interrupted, InterruptFlag
from robot_rl.training.learner_core import LearnerCore, LearningCounters
from robot_rl.training.run_folder import RunFolder
from robot_rl.training.scalars import ScalarLog

LOG = "attempts.jsonl"
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")


@dataclass(frozen=True)
class DirectionConfig:
    """Attributes:
    config: training configuration (a file, or a shipped name): head, learner, schedule, mixture. Its ``base.path`` is the policy.
    judge: reward source of kind success: ``configs/rewards/<name>.yaml``, or a path.
    base: base policy, where another than the configuration's.
    instruction: what the judge and the store are told; empty: the task's own (forward only).
    """

    config: str
    judge: str
    base: str = ""
    instruction: str = ""


@dataclass(frozen=True)
class PracticeEnvConfig:
    """Attributes:
    id: a table-top task; its forward direction.
    movable: bodies that must stay within reach.
    """

    id: str = "tabletop/Lift"
    options: dict[str, Any] = field(default_factory=dict)
    movable: list[str] = field(default_factory=lambda: ["object"])


@dataclass(frozen=True)
class PracticeRunConfig:
    """Attributes:
    help_by: what a call for help does: ``stop`` ends the run, which the same command resumes once somebody has helped; ``reset``
        has the simulation do what a person would, and counts it.
    checkpoint_every: attempts between two checkpoints.
    """

    run_dir: Path
    forward: DirectionConfig
    backward: DirectionConfig
    env: PracticeEnvConfig = field(default_factory=PracticeEnvConfig)
    practice: PracticeConfig = field(default_factory=lambda: PracticeConfig(attempt_s=4.0, attempts=400))
    help_by: Literal["stop", "reset"] = "stop"
    seed: int = 0
    checkpoint_every: int = 10
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.help_by not in ("stop", "reset"):
            raise ValueError(f"help_by={self.help_by!r}: accepted are stop, reset")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every={self.checkpoint_every}: accepted are integers >= 1")


class DirectionLearner:
    """Learner, store and published weights of one direction."""

    def __init__(self, direction: Direction, config: PracticeRunConfig, instruction: str, device: str) -> None:
        own: DirectionConfig = getattr(config, direction)
        self.direction, self.device = direction, device
        self.instruction = own.instruction or instruction
        if not self.instruction:
            raise ValueError(f"{direction}.instruction is empty: accepted is what this direction does, in words")
        more = [f"--run_dir={config.run_dir / direction}", f"--seed={config.seed}"]
        self.config = load(PostTrainConfig, own.config, more + ([f"--base.path={own.base}"] if own.base else []))
        if self.config.base.path is None:
            raise ValueError(f"{direction}.base is empty and {own.config} has no base.path: accepted is a trained base policy")
        if self.config.learner.algorithm == "on_policy":
            raise ValueError(
                f"{direction}.config={own.config!r} learns on-policy, from rounds: accepted are off-policy learners"
            )
        if self.config.reward.channels:
            raise ValueError(
                f"{direction}.config={own.config!r} has reward.channels: accepted are none, the judge gives the reward"
            )
        if self.config.schedule.offline_updates:
            raise ValueError(
                f"{direction}.config={own.config!r} has schedule.offline_updates={self.config.schedule.offline_updates}: accepted is 0, "
                "practice learns from its own attempts (learn offline with robot-rl train first)"
            )
        self.folder = RunFolder(config.run_dir / direction)
        self.base: BasePolicy = load_policy(self.config.base.path, device, dict(self.config.base.options))
        self.counters = LearningCounters()
        self.scalars = ScalarLog(self.folder, self.config)
        self.core = LearnerCore(self.config, self.base, [], self.counters, self.folder, self.scalars, device)
        self.channel = WeightChannel(self.folder.weights)
        self.judge = load_source(own.judge)
        self.store = open_store(self.folder.store, self.base.spec)

    def task(self) -> Task:
        spec = self.base.spec
        return Task(self.instruction, self.policy, self.judge, self.store, None, spec.n_obs_steps, spec.n_action_steps)

    def policy(self) -> ActingPolicy:
        """The base during warm-up, then the newest head mixed with it."""
        c, mixture = self.counters, self.config.mixture
        if not self.core.warm and self.config.schedule.warmup_acting == "base":
            return ActingPolicy(self.base, mode="base", device=self.device)
        return ActingPolicy(
            self.base, self.core.learner.head, "explore", c.version, base_share=c.base_share(mixture) if self.core.warm else 0.0,
            device=self.device,
        )  # fmt: skip

    def learned(self, attempt: Attempt) -> None:
        """Take an attempt in, and do the updates it is worth. One that the judge could not judge is kept in the store only."""
        if attempt.success is None:
            return
        self.core.ingest(attempt.episode)
        self.counters.remember([attempt.success])
        self.core.credit(attempt.steps)
        if self.core.warm_up_due:
            self.core.warm_up()
            self.counters.version = self.core.publish(self.channel).version
        elif self.core.warm:
            self.core.spend()
        else:
            self.counters.updates_owed = 0.0

    def close(self) -> None:
        self.store.close()
        self.scalars.close()
        getattr(self.judge, "close", lambda: None)()


def run(config: PracticeRunConfig, *, progress: Display | None = None) -> dict[str, Any]:
    """Practise in ``config.run_dir``, or go on where it was interrupted or called for help; gives what has come of it.

    Raises:
        ValueError: a configuration that does not fit, or a run folder of another one.
        RuntimeError: another process trains in the run folder.
        Interrupted: Ctrl-C; everything is saved and the same call resumes.
    """
    progress = progress or Silent()
    device = pick_device(config.device)
    env = make_env(config.env.id, **config.env.options)
    if not isinstance(env, TabletopEnv):
        raise ValueError(f"env.id={config.env.id!r}: accepted are table-top tasks, which can go on after a success")
    folder = RunFolder(Path(config.run_dir))
    with ExitStack() as stack, InterruptFlag() as flag:
        stack.callback(env.close)
        stack.enter_context(folder.alone())
        _claim(folder, config)
        sides: dict[Direction, DirectionLearner] = {}
        for direction in DIRECTIONS:
            sides[direction] = DirectionLearner(
                direction, config, env.spec.instruction if direction == "forward" else "", device
            )
            stack.callback(sides[direction].close)
        robot = EndlessTabletop(env, config.seed, tuple(config.env.movable))
        state = _resume(folder, sides, robot)

        def learned(attempt: Attempt) -> None:
            sides[attempt.direction].learned(attempt)
            folder.append(LOG, {
                "attempt": attempt.number, "direction": attempt.direction, "success": attempt.success, "end": attempt.end,
                "steps": attempt.steps, "resets": robot.resets, "trouble": attempt.trouble,
            })  # fmt: skip
            progress.advance(1)

        practice = Practice(
            robot, sides["forward"].task(), sides["backward"].task(), config.practice, learned=learned, seed=config.seed, progress=state,
        )  # fmt: skip
        progress.start("practice", config.practice.attempts or None)
        progress.advance(state.attempts)
        while not config.practice.attempts or state.attempts < config.practice.attempts:
            if state.help:
                if config.help_by == "stop":
                    break
                robot.help()
                practice.helped()
            practice.attempt()
            if flag() or state.help or state.attempts % config.checkpoint_every == 0:
                _save(folder, sides, robot, state)
            if flag():
                raise Interrupted
        for side in sides.values():
            if side.core.warm:
                side.counters.version = side.core.publish(side.channel).version
        _save(folder, sides, robot, state)
        result = {**state.to_json(), "resets": robot.resets, "env_steps": {d: s.counters.env_steps for d, s in sides.items()}}
        folder.write_json("result.json", result)
        return result


def _claim(folder: RunFolder, config: PracticeRunConfig) -> None:
    """Write the resolved configuration, or check that the folder is of the same one; how long to go on may change."""
    same = lambda c: config_hash(replace(c, practice=replace(c.practice, attempts=0), help_by="stop"))  # noqa: E731
    if folder.config.exists():
        before = load(PracticeRunConfig, folder.config)
        if same(before) != same(config):
            raise ValueError(
                f"run_dir={str(folder.path)!r} holds practice of another configuration: accepted is the same, or another run_dir"
            )
    folder.write_text("config.yaml", to_yaml(config))


def _save(folder: RunFolder, sides: dict[Direction, DirectionLearner], robot: EndlessTabletop, state: Progress) -> None:
    kept: dict[str, Any] = {"practice": state.to_json(), "robot": robot.get_state(), "logs": folder.log_sizes((LOG,))}
    tensors: dict[str, Any] = {}
    for name, side in sides.items():
        tensors[name] = side.core.tensors()
        kept[name] = {
            **side.core.state(), "counters": dict(vars(side.counters)), "episodes": side.core.held(), "recorded": side.store.episode_ids(),
        }  # fmt: skip
    save_checkpoint(folder.checkpoints, f"attempt-{state.attempts:09d}", tensors, kept)


def _resume(folder: RunFolder, sides: dict[Direction, DirectionLearner], robot: EndlessTabletop) -> Progress:
    """Where the last checkpoint was; attempts after it are set aside and made again. A person who was called has come meanwhile."""
    path = latest_checkpoint(folder.checkpoints)
    tensors, kept = load_checkpoint(path) if path is not None else ({}, {})
    for name, side in sides.items():
        for late in set(side.store.episode_ids()) - set(kept.get(name, {}).get("recorded", [])):
            side.store.discard(late)
    folder.rewind_logs(kept.get("logs", {}), (LOG,))
    if path is None:
        return Progress()
    for name, side in sides.items():
        side.core.load(tensors[name], kept[name], str(path))
        side.counters = side.core.counters = LearningCounters(**kept[name]["counters"])
        for episode in kept[name]["episodes"]:
            side.core.ingest(side.store.read(episode))
    state = Progress(**kept["practice"])
    robot.set_state(kept["robot"])
    if state.help:
        robot.help()
        state.helped()
    return state
