"""A learner beside the acting side: what it learns from, what it publishes, and what happens when it dies."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from robot_rl.config import to_yaml
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.config import BCConfig, CompactPolicyConfig
from robot_rl.progress import Silent
from robot_rl.replay.store import EpisodeStore
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.gate import GateConfig
from robot_rl.runtime.weights import WEIGHTS, WeightChannel
from robot_rl.sim.env import make_env
from robot_rl.sim.rollout import EpisodePlan, Rollout
from robot_rl.sim.vector import make_vector
from robot_rl.training.async_session import AsyncSession
from robot_rl.training.config import (
    BaseConfig,
    DemosConfig,
    EnvConfig,
    EvaluationConfig,
    HeadConfig,
    LearnerProcessConfig,
    LoggingConfig,
    PostTrainConfig,
    ScheduleConfig,
)
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.learner_control import LearnerControl
from robot_rl.training.learner_core import LearnerCore
from robot_rl.training.learner_loop import LearnerLoop, LoopCounters, read_in_use
from robot_rl.training.learner_process import LearnerProcess
from robot_rl.training.learner_status import read_status
from robot_rl.training.posttrain import prepare_base, run
from robot_rl.training.run_folder import RunFolder
from robot_rl.training.scalars import ScalarLog
from robot_rl.types import RewardEvent, Source, Stratum

HEAD = HeadConfig()
POLICY = CompactPolicyConfig(horizon=8, n_action_steps=8, width=16, num_steps=1)
CONFIG = PostTrainConfig(
    device="cpu",
    threads=1,
    env=EnvConfig("tabletop/Lift", num_envs=2),
    demos=DemosConfig(episodes=2, skill=(0.3, 1.0), noise=0.1),
    base=BaseConfig(bc=BCConfig(POLICY, steps=3, batch_size=8)),
    head=replace(HEAD, latent_noise=replace(HEAD.latent_noise, hidden=(16,))),
    learner=replace(PostTrainConfig().learner, n_critics=2, hidden=(16, 16)),
    schedule=ScheduleConfig(
        env_steps=1000, round_episodes=2, warmup_steps=50, return_updates=2, warmup_updates=3, updates_per_step=0.1,
        batch_size=8, replay_capacity=20_000,
        candidate_every=400, evaluate_every=500, checkpoint_every_s=0.5, learner="process",
    ),
    gate=GateConfig(n_min=2, n_max=4, reference_n_min=2, alpha=0.2),
    evaluation=EvaluationConfig(reference_episodes=2, curve_episodes=2, final_episodes=2, videos=0),
    logging=LoggingConfig(every_updates=5),
    learner_process=LearnerProcessConfig(
        publish_every_s=3600.0, publish_every_updates=5, backoff_s=0.0, poll_s=0.05, threads=1
    ),
)  # fmt: skip
WARM_UP = CONFIG.schedule.warmup_updates


class Recorded(Silent):
    """A progress that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with configuration, demonstrations and base policy, and a few episodes beside it."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("prepared") / "run"
    folder = RunFolder(path)
    folder.write_text("config.yaml", to_yaml(replace(CONFIG, run_dir=path)))
    env = make_env(CONFIG.env.id)
    base = prepare_base(CONFIG, env.spec, folder, Silent(), InterruptFlag(), "cpu")
    env.close()
    with make_vector(CONFIG.env.id, 2, "serial") as vector, _open_store(path.parent / "recorded", base) as store:
        policy = ActingPolicy(base)
        plans = [EpisodePlan(i, ("training", 0, i), policy, f"e{i}") for i in range(4)]
        Rollout(vector, vector.spec).play(plans, store=store)
    return path


def _open_store(path: Path, base, stats_hash: str | None = None) -> EpisodeStore:
    spec = base.spec
    return EpisodeStore.create(
        path, observation_features=spec.observation_features, action=spec.action, noise_shape=spec.noise_shape,
        chunk_horizon=spec.horizon, stats_hash=spec.stats_hash if stats_hash is None else stats_hash, sync=False,
    )  # fmt: skip


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(prepared, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def episodes(prepared: Path) -> list:
    with EpisodeStore.open(prepared.parent / "recorded") as store:
        return [store.read(i) for i in store.episode_ids()]


def make_loop(folder: RunFolder, stores: list[Path] | None = None, config: PostTrainConfig = CONFIG, **changes) -> LearnerLoop:
    base = load_policy(folder.base, "cpu")
    core = LearnerCore(config, base, [], LoopCounters(), folder, ScalarLog(folder, config, job="learner"), "cpu")
    settings = replace(config.learner_process, poll_s=0.001, **changes)
    return LearnerLoop(core, stores or [folder.store], WeightChannel(folder.weights), folder.learner, settings)


def drain(loop: LearnerLoop) -> None:
    """Work until everything recorded is learned from."""
    for _ in range(10_000):
        time.sleep(0.001)
        if not loop.step():
            return
    raise AssertionError("the loop never runs out of work")


def updates_logged(folder: RunFolder) -> list[int]:
    """Which updates have a line (regression on returns counts as none); every one once, in order."""
    updates = [line["updates"] for line in folder.read("metrics.jsonl") if "critic/loss" in line]
    assert updates == sorted(set(updates))
    return updates


def head_bytes(loop: LearnerLoop) -> bytes:
    return b"".join(t.numpy().tobytes() for t in loop.core.learner.head.state_dict().values())


# ---------------------------------------------------------------------------------------------------------------- the loop


def test_learns_what_was_recorded_and_no_more(folder: RunFolder, episodes: list) -> None:
    loop = make_loop(folder)
    assert not loop.step()  # the store does not exist yet
    with _open_store(folder.store, loop.core.base) as store:
        store.add(episodes[0])
        drain(loop)
        steps_at_warm_up = loop.counters.env_steps
        for episode in episodes[1:]:
            store.add(episode)
            drain(loop)
    steps = sum(len(e) for e in episodes)
    assert loop.counters.env_steps == steps
    assert loop.core.buffer.episode_ids() == [e.meta.episode_id for e in episodes]
    paid = loop.core.learner.updates - WARM_UP
    assert paid == int(CONFIG.schedule.updates_per_step * (steps - steps_at_warm_up))
    versions = loop.channel.versions()
    assert loop.channel.manifest(versions[0]).metrics["actor_updates"] == 0  # the warm-up's head came first
    assert all(loop.channel.load(v) for v in versions)
    updates = updates_logged(folder)
    assert 0 <= loop.core.learner.updates - updates[-1] < CONFIG.logging.every_updates
    status = read_status(folder.learner)
    assert status is not None
    assert status.pid == os.getpid()


def test_a_slow_learner_owes_no_more_than_the_bound(folder: RunFolder, episodes: list) -> None:
    loop = make_loop(folder, max_backlog_steps=50)
    with _open_store(folder.store, loop.core.base) as store:
        store.add(episodes[0])
        drain(loop)
        before = loop.core.learner.updates
        for episode in episodes[1:]:
            store.add(episode)
        drain(loop)
    assert loop.core.learner.updates - before == 5  # 50 steps at 0.1
    owed = CONFIG.schedule.updates_per_step * sum(len(e) for e in episodes[1:])
    assert loop.counters.updates_dropped == pytest.approx(owed - 5)


def test_late_rewards_change_what_is_sampled(folder: RunFolder, episodes: list) -> None:
    loop = make_loop(folder)
    with _open_store(folder.store, loop.core.base) as store:
        store.add(episodes[0])
        drain(loop)
        ratios = loop.core.buffer.sample(64, np.random.default_rng(0))
        store.append_reward(RewardEvent(episodes[0].meta.episode_id, 1, "human", 7.0))
        store.append_reward(RewardEvent(episodes[0].meta.episode_id, len(episodes[0]) + 5, "human", 1.0))  # outside
        drain(loop)
    again = loop.core.buffer.sample(64, np.random.default_rng(0))
    first = again.step == 0
    assert first.any()
    assert (again.reward[first] >= ratios.reward[first] + 6.9).all()
    assert loop.counters.rewards_refused == 1


def test_several_stores_and_one_that_does_not_fit(folder: RunFolder, episodes: list, tmp_path: Path) -> None:
    loop = make_loop(folder, [folder.store, tmp_path / "robot2", tmp_path / "stranger"])
    base = loop.core.base
    with _open_store(folder.store, base) as one, _open_store(tmp_path / "robot2", base) as two:
        one.add(episodes[0])
        two.add(episodes[1])
    with _open_store(tmp_path / "stranger", base, stats_hash="other") as three:
        three.add(replace(episodes[2], meta=replace(episodes[2].meta, stats_hash="other")))
    drain(loop)
    assert set(loop.core.buffer.episode_ids()) == {episodes[0].meta.episode_id, episodes[1].meta.episode_id}
    assert loop.counters.episodes_refused == 1


def test_stores_of_robots_come_and_go_between_two_lives(folder: RunFolder, episodes: list, tmp_path: Path) -> None:
    paths = [folder.store, tmp_path / "left", tmp_path / "right"]
    loop = make_loop(folder, paths)
    for path, episode in zip(paths, episodes, strict=False):
        with _open_store(path, loop.core.base) as store:
            store.add(episode)
    drain(loop)
    loop.checkpoint()
    ids = [e.meta.episode_id for e in episodes]
    with _open_store(tmp_path / "third", loop.core.base) as store:
        store.add(episodes[3])
    again = make_loop(folder, [folder.store, tmp_path / "third", tmp_path / "right"])
    assert again.resume()
    assert set(again.core.buffer.episode_ids()) == {ids[0], ids[2]}
    drain(again)
    assert set(again.core.buffer.episode_ids()) == {ids[0], ids[2], ids[3]}, "nothing twice, and the new robot from its start"


def test_an_owner_pauses_and_resumes_learning_and_asks_for_checkpoints(folder: RunFolder, episodes: list) -> None:
    loop = make_loop(folder)
    with _open_store(folder.store, loop.core.base) as store:
        store.add(episodes[0])
        drain(loop)
        before = loop.core.learner.updates
        LearnerControl(paused=True).write(folder.learner)
        time.sleep(0.01)
        store.add(episodes[1])
        drain(loop)
    assert loop.core.learner.updates == before
    assert loop.counters.episodes == 2, "stores are still followed"
    saved = loop.status.checkpoint_ns
    LearnerControl(updates_per_step=0.5, checkpoints=1).write(folder.learner)
    time.sleep(0.01)
    drain(loop)
    assert loop.core.learner.updates > before
    assert loop.core.config.schedule.updates_per_step == 0.5
    assert loop.status.checkpoint_ns > saved


def test_what_a_human_corrected_is_drawn_with_the_demonstrations_share(folder: RunFolder, episodes: list) -> None:
    loop = make_loop(folder)
    with _open_store(folder.store, loop.core.base) as store:
        store.add(episodes[0])
        drain(loop)
        assert Stratum.INTERVENTION not in loop.core._ratios()
        source = episodes[1].source.copy()
        source[10:20] = Source.HUMAN
        store.add(replace(episodes[1], source=source))
        drain(loop)
    ratios = loop.core._ratios()
    assert ratios[Stratum.INTERVENTION] == pytest.approx(CONFIG.schedule.demo_ratio)  # no demonstrations in this buffer
    assert sum(ratios.values()) == pytest.approx(1.0)


def test_a_resumed_loop_goes_on_as_if_nothing_had_happened(folder: RunFolder, episodes: list, tmp_path: Path) -> None:
    loop = make_loop(folder)
    with _open_store(folder.store, loop.core.base) as store:
        for episode in episodes[:3]:
            store.add(episode)
            drain(loop)
        store.append_reward(RewardEvent(episodes[0].meta.episode_id, 2, "human", 3.0))
        drain(loop)
        loop.checkpoint()
        copy = RunFolder(Path(shutil.copytree(folder.path, tmp_path / "copy")))
        with _open_store_again(copy) as other:
            store.add(episodes[3])
            other.add(episodes[3])
        drain(loop)
    again = make_loop(copy)  # killed after the checkpoint: whatever memory held is gone
    assert again.resume()
    drain(again)
    assert again.counters.episodes == loop.counters.episodes == 4
    assert again.core.buffer.episode_ids() == loop.core.buffer.episode_ids()
    assert again.core.learner.updates == loop.core.learner.updates
    assert head_bytes(again) == head_bytes(loop)
    losses, expected = ([x.get("critic/loss") for x in f.read("metrics.jsonl")] for f in (copy, folder))
    assert losses == expected


def _open_store_again(folder: RunFolder) -> EpisodeStore:
    return EpisodeStore.open(folder.store, mode="a", sync=False)


def test_versions_published_before_a_crash_stay(folder: RunFolder, episodes: list) -> None:
    config = replace(CONFIG, schedule=replace(CONFIG.schedule, checkpoint_every_s=3600.0))
    loop = make_loop(folder, config=config)
    with _open_store(folder.store, loop.core.base) as store:
        store.add(episodes[0])
        drain(loop)
        loop.checkpoint()
        for episode in episodes[1:]:
            store.add(episode)
            drain(loop)
    before = {v: loop.channel.manifest(v).sha256 for v in loop.channel.versions()}
    again = make_loop(folder, config=config)
    again.resume()
    drain(again)
    assert {v: again.channel.manifest(v).sha256 for v in before} == before
    assert max(again.channel.versions()) > max(before)


def test_what_the_acting_side_uses_is_not_pruned(folder: RunFolder, episodes: list) -> None:
    loop = make_loop(folder, keep_versions=2)
    folder.learner.mkdir(exist_ok=True)
    (folder.learner / "in_use.json").write_text('{"versions": [1]}')
    with _open_store(folder.store, loop.core.base) as store:
        store.add(episodes[0])
        drain(loop)
        for _ in range(4):
            loop.publish()
    assert loop.channel.versions() == [1, 4, 5]


# --------------------------------------------------------------------------------------------------------- the acting side


@pytest.fixture
def session(folder: RunFolder):
    progress = Recorded()
    with make_vector(CONFIG.env.id, 2, "serial") as vector:
        base = load_policy(folder.base, "cpu")
        made = AsyncSession(CONFIG, folder, base, Rollout(vector, vector.spec), progress, InterruptFlag(), "cpu")
        made.gate.set_reference(1, 2)
        yield made
        made.close()


def test_no_version_acts_that_does_not_verify(session: AsyncSession) -> None:
    tensors = {n: t.clone() for n, t in session.head.state_dict().items()}
    hashes = {"base_hash": session.base.spec.base_hash, "stats_hash": session.base.spec.stats_hash}
    assert session._explorer().mode == "base"
    session.channel.publish(tensors, parent=0, **hashes)
    session._take_newest()
    assert session._explorer().version == 1
    session.channel.publish(tensors, parent=1, **hashes)
    blob = session.channel.path(2) / WEIGHTS
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    session._take_newest()
    huge = {n: torch.full_like(t, 1e38) if t.is_floating_point() else t for n, t in tensors.items()}
    session.channel.publish(huge, parent=1, **hashes)  # finite weights, an action that is not
    session._take_newest()
    session.channel.publish(tensors, parent=1, base_hash="other", stats_hash=hashes["stats_hash"])
    session._take_newest()
    assert session._explorer().version == 1
    assert session.subscriber.refused == 3
    session.channel.publish(tensors, parent=1, **hashes)
    session._take_newest()
    assert session._explorer().version == 5


def test_a_resumed_acting_side_counts_every_episode(session: AsyncSession, episodes: list) -> None:
    session.checkpoint()
    for i, episode in enumerate(episodes):
        session.store.add(replace(episode, meta=replace(episode.meta, episode_id=f"r000003e00{i}")))
    assert session.resume()
    assert session.counters.env_steps == sum(len(e) for e in episodes)
    assert session.counters.round == 4


def test_damaged_candidates_are_out_after_a_restart(session: AsyncSession) -> None:
    hashes = {"base_hash": session.base.spec.base_hash, "stats_hash": session.base.spec.stats_hash}
    session.channel.publish(session.head.state_dict(), parent=0, **hashes)
    session._take_newest()
    version = session._candidate()
    assert version == 1
    session.gate.submit(version, "eval", session._sha256(version))
    assert read_in_use(session.folder.learner) == (1,)
    session.checkpoint()
    (session.channel.path(1) / WEIGHTS).write_bytes(b"torn")
    session._heads.clear()
    session.resume()
    assert session.gate.on_probation is None
    assert session.gate.state(1, "eval") == "rejected"


# -------------------------------------------------------------------------------------------------------------- the watcher


class Scripted(LearnerProcess):
    """Watches any command instead of a learner."""

    code = ""

    def _command(self) -> list[str]:
        return [sys.executable, "-c", self.code]


def look_until(process: LearnerProcess, done: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, process.describe()
        process.look()
        time.sleep(0.05)


def test_a_learner_that_always_dies_is_given_up_and_said_so(tmp_path: Path) -> None:
    progress = Recorded()
    settings = LearnerProcessConfig(restarts=2, backoff_s=0.0)
    process = Scripted(RunFolder(tmp_path), settings, progress)
    process.code = "raise SystemExit(3)"
    process.start()
    look_until(process, lambda: process.given_up)
    assert process.restarts == 2
    assert process.dead_since is not None
    assert "exit status 3" in process.describe()
    assert progress.said("it is not restarted, acting goes on")


def test_a_learner_without_a_heartbeat_is_killed_and_restarted(tmp_path: Path) -> None:
    process = Scripted(RunFolder(tmp_path), LearnerProcessConfig(stale_after_s=1.0, backoff_s=0.0), Recorded())
    process.code = "import time; time.sleep(600)"
    process.start()
    look_until(process, lambda: process.restarts == 1)
    process.stop(0.1)
    assert not process.alive


# ----------------------------------------------------------------------------------------------------------------- together


class Saboteur(Recorded):
    """Kills the learner once it has published, and watches what acting does meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.session: AsyncSession | None = None
        self.killed_at: tuple[int, int] | None = None  # env_steps, version
        self.steps_while_dead = 0

    def status(self, **values) -> None:
        session = self.session
        if session is None or "learner" not in values:
            return
        process, status = session.process, session.process.status
        if self.killed_at is None:
            if (
                session.counters.actor_started_at >= 0
                and process.pid is not None
                and status is not None
                and status.checkpoint_ns
            ):
                os.kill(process.pid, signal.SIGKILL)
                self.killed_at = session.counters.env_steps, session._explorer().version
        elif process.restarts == 0 or process.dead_since is not None or (status and status.state == "starting"):
            self.steps_while_dead = session.counters.env_steps - self.killed_at[0]


@pytest.mark.slow
def test_acting_goes_on_while_the_learner_is_dead_and_it_comes_back(folder: RunFolder) -> None:
    progress = Saboteur()
    flag = InterruptFlag()
    with make_vector(CONFIG.env.id, 2, "serial") as vector:
        base = load_policy(folder.base, "cpu")
        config = replace(
            CONFIG, schedule=replace(CONFIG.schedule, env_steps=10**6, candidate_every=10**9, evaluate_every=10**9)
        )
        folder.write_text("config.yaml", to_yaml(replace(config, run_dir=folder.path)))
        session = AsyncSession(config, folder, base, Rollout(vector, vector.spec), progress, flag, "cpu")
        session.gate.set_reference(1, 2)
        session.set_base_curve(1, 2)
        session.counters.next_candidate = 10**9
        progress.session = session
        until = time.monotonic() + 300.0

        def back_again() -> bool:
            return progress.killed_at is not None and session._explorer().version > progress.killed_at[1]

        session._check_stop = lambda: setattr(  # type: ignore[method-assign]
            session.counters, "done", "enough" if back_again() or time.monotonic() > until else ""
        )
        session.run()
        assert back_again(), progress.lines
        summary = session.learner_summary()
        session.close()
    assert progress.steps_while_dead > 0
    assert summary["restarts"] == 1
    assert progress.said("learner: died (exit status -9)")
    status = read_status(folder.learner)
    assert status is not None
    assert status.state == "stopped"  # SIGTERM at the end: it saved first
    assert (status.episodes_refused, status.error) == (0, "")
    assert max(updates_logged(folder)) > 0
    with EpisodeStore.open(folder.store) as store:
        played = [store.read(i) for i in store.episode_ids()]
        assert session.counters.env_steps == sum(len(e) for e in played)
        for episode in played:  # a swap never happens inside an episode
            assert {d.weights_version for d in episode.decisions} <= {0, episode.meta.weights_version}
    # What the learner did not live to see it reads now, and nothing twice.
    loop = make_loop(folder, config=config)
    assert loop.resume()
    drain(loop)
    assert loop.counters.env_steps == session.counters.env_steps
    assert loop.counters.episodes == len(played)
    assert loop.counters.episodes_refused == 0


@pytest.mark.slow
def test_the_whole_run_gives_the_same_table_and_report(folder: RunFolder) -> None:
    config = replace(
        CONFIG, run_dir=folder.path, learner_process=replace(CONFIG.learner_process, max_lead_steps=400),
        schedule=replace(CONFIG.schedule, env_steps=3000),
    )  # fmt: skip
    (folder.path / "config.yaml").unlink()
    result = run(config)
    assert result["env_steps"] >= 3000
    assert result["learner"]["mode"] == "process"
    assert result["learner"]["restarts"] == 0
    assert result["updates"] > 0
    assert (folder.path / "report.html").exists()
    assert {line["event"] for line in folder.read("gate.jsonl")} & {"candidate"}
    assert [line["who"] for line in folder.read("evaluations.jsonl")][:3] == ["base", "untrained_head", "zero_noise"]
