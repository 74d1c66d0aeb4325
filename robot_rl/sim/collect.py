"""Scripted demonstrations of chosen quality, written to an episode store.

What is collected depends on the configuration alone: the number of workers changes the time it takes, never an episode.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from robot_rl import seeding
from robot_rl.sim.env import Environment, make_env, make_expert
from robot_rl.types import Episode, EpisodeMeta, Source, Stratum

MAX_ATTEMPTS_PER_EPISODE = 50


class EpisodeSink(Protocol):
    """Anything that takes whole episodes, such as an ``EpisodeStore``."""

    def add(self, episode: Episode) -> Any: ...


@dataclass(frozen=True)
class CollectConfig:
    """What to demonstrate.

    Attributes:
        env_id: a task with a scripted expert.
        episodes: how many to write.
        skill: of the operator, one number in [0, 1] or (low, high), then drawn anew for every episode.
        noise: correlated action noise as a fraction of the action limits.
        seed: of the whole collection.
        only_successful: write successes only (failures are tried and thrown away).
        workers: processes; 1 collects in this process.
        env_options: for :func:`robot_rl.sim.env.make_env`, e.g. ``{"cameras": ("front",)}``.
    """

    env_id: str
    episodes: int
    skill: float | tuple[float, float] = 1.0
    noise: float = 0.0
    seed: int = 0
    only_successful: bool = False
    workers: int = 1
    env_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        low, high = self.skill_range
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"skill={self.skill!r}: accepted are a number from 0 to 1 or (low, high) with low <= high")
        if self.episodes < 1:
            raise ValueError(f"episodes={self.episodes!r}: accepted are integers >= 1")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers!r}: accepted are integers >= 1")
        if not 0.0 <= self.noise < float("inf"):
            raise ValueError(f"noise={self.noise!r}: accepted are finite numbers >= 0")

    @property
    def skill_range(self) -> tuple[float, float]:
        if isinstance(self.skill, (int, float)):
            return float(self.skill), float(self.skill)
        low, high = self.skill
        return float(low), float(high)


@dataclass(frozen=True)
class CollectReport:
    """What was collected. ``attempts`` counts the thrown-away failures too; ``success_rate`` is over attempts."""

    env_id: str
    episodes: int
    attempts: int
    successes: int
    success_rate: float
    steps: int
    mean_length: float
    wall_seconds: float
    failures: dict[str, int]  # stage in which unsuccessful attempts ended

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Progress = Callable[[int, int, int], None]
"""Called after every attempt with (episodes written, attempts, successes)."""


def collect(config: CollectConfig, store: EpisodeSink, progress: Progress | None = None) -> CollectReport:
    """Demonstrate until ``config.episodes`` episodes are in ``store``.

    Raises:
        ValueError: the task is unknown or has no expert.
        RuntimeError: ``only_successful`` and the operator succeeds in fewer than one of 50 attempts.
    """
    started = time.monotonic()
    written = attempts = successes = steps = 0
    failures: dict[str, int] = {}
    limit = config.episodes * MAX_ATTEMPTS_PER_EPISODE if config.only_successful else config.episodes
    stream = _attempts(config, limit)
    try:
        for episode in stream:
            attempts += 1
            success = bool(episode.meta.success)
            successes += success
            if not success:
                stage = str(episode.meta.extra["end_stage"])
                failures[stage] = failures.get(stage, 0) + 1
            if success or not config.only_successful:
                store.add(episode)
                written += 1
                steps += len(episode)
            if progress is not None:
                progress(written, attempts, successes)
            if written == config.episodes:
                break
    finally:
        stream.close()
    if written < config.episodes:
        raise RuntimeError(
            f"{config.env_id}: {successes} successes in {attempts} attempts with skill={config.skill!r}, "
            f"noise={config.noise!r}; only_successful needs {config.episodes}. Raise skill, lower noise, or keep the failures"
        )
    rate, mean = successes / attempts, steps / written
    wall = time.monotonic() - started
    return CollectReport(config.env_id, written, attempts, successes, rate, steps, mean, wall, failures)


def demonstrate(env: Environment, config: CollectConfig, index: int) -> Episode:
    """Attempt number ``index`` of a collection, whatever came before it."""
    rng = seeding.rng("collect", config.env_id, config.seed, index)
    seed = int(rng.integers(seeding.TRAINING.first, seeding.TRAINING.last))
    low, high = config.skill_range
    skill = float(rng.uniform(low, high))
    expert = make_expert(env, skill=skill, noise=config.noise)
    observation, info = env.reset(seed=seed)
    start = {k: float(v) for k, v in info.get("start", {}).items()}
    expert.reset(env, rng)
    observations, actions, rewards = [observation], [], []
    terminated = truncated = False
    low_limit, high_limit = np.array(env.spec.action.low), np.array(env.spec.action.high)
    while not (terminated or truncated):
        # What is stored is what the robot executes: within the limits, in the store's precision.
        action = np.clip(expert.act(observation), low_limit, high_limit).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
    length = len(actions)
    meta = EpisodeMeta(
        episode_id=f"demo-{config.seed}-{index:06d}",
        task=env.spec.instruction,
        env_id=env.spec.env_id,
        seed=seed,
        stratum=Stratum.DEMONSTRATION,
        success=bool(info["success"]),
        control_hz=env.spec.control_hz,
        extra={"skill": skill, "noise": config.noise, "start": start, "end_stage": str(info.get("stage", ""))},
    )
    last = np.arange(length) == length - 1
    return Episode.from_arrays(
        meta,
        {name: np.stack([o[name] for o in observations]) for name in observations[0]},
        np.stack(actions),
        action_human=np.stack(actions),
        source=np.full(length, int(Source.HUMAN)),
        reward=np.array(rewards),
        terminated=last & terminated,
        truncated=last & truncated,
        stamp_ns=np.round(np.arange(length) * (1e9 / env.spec.control_hz)),
    )


def _attempts(config: CollectConfig, limit: int) -> Generator[Episode, None, None]:
    """Attempts 0, 1, 2 ... in order, computed here or in worker processes."""
    if config.workers == 1:
        env = make_env(config.env_id, **config.env_options)
        try:
            for index in range(limit):
                yield demonstrate(env, config, index)
        finally:
            env.close()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, mp_context=context, initializer=_start_worker, initargs=(config,)) as pool:
        waiting: list[Future[Episode]] = []
        submitted = 0
        try:
            while submitted < limit or waiting:
                while submitted < limit and len(waiting) < 2 * config.workers + 1:
                    waiting.append(pool.submit(_work, config, submitted))
                    submitted += 1
                yield waiting.pop(0).result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_ENV: list[Environment] = []


def _start_worker(config: CollectConfig) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _ENV.append(make_env(config.env_id, **config.env_options))


def _work(config: CollectConfig, index: int) -> Episode:
    return demonstrate(_ENV[0], config, index)
