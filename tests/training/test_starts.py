"""Starts of training episodes: states inside demonstrations to the bit, groups that share them, and a discount that rises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from run_kit import tiny

from robot_rl.policies.checkpoint import load_policy
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.control_loop import ControlLoop
from robot_rl.sim.rollout import EpisodePlan, Rollout
from robot_rl.sim.vector import make_vector
from robot_rl.training import learner_core, posttrain
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.learner_core import LearnerCore, LearningCounters
from robot_rl.training.run_folder import RunFolder
from robot_rl.training.scalars import ScalarLog
from robot_rl.training.starts import Starts


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Eight demonstrations that mostly succeed, and a base policy."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    config = tiny(folder, demos={"episodes": 8, "skill": 1.0, "noise": 0.0}, env={"options": {"max_episode_steps": 80}})
    posttrain._claim(RunFolder(folder), config)
    with InterruptFlag() as flag:
        posttrain.prepare_base(config, posttrain._env_spec(config), RunFolder(folder), posttrain.Silent(), flag, "cpu")
    return folder


def run_config(prepared: Path, **change):
    return tiny(
        prepared.parent / "other", base={"path": str(prepared / "base")}, demos={"source": "store", "path": str(prepared / "demos")},
        env={"options": {"max_episode_steps": 80}}, **change,
    )  # fmt: skip


def test_a_group_begins_in_one_state_inside_a_demonstration_bit_for_bit(prepared: Path, monkeypatch) -> None:
    config = run_config(
        prepared, schedule={"group_size": 2}, curriculum={"resets": "demonstrations", "reset_share": 1.0, "reset_first": 0.5}
    )
    seen: dict[str, np.ndarray] = {}
    begin = ControlLoop.begin

    def watch(loop, observation, *, key, **more):
        seen[key[-1]] = observation["observation.state"].copy()
        return begin(loop, observation, key=key, **more)

    monkeypatch.setattr(ControlLoop, "begin", watch)
    base = ActingPolicy(load_policy(prepared / "base"))
    with make_vector("tabletop/Lift", 2, "serial", max_episode_steps=80) as vector:
        rollout = Rollout(vector, vector.spec)
        starts = Starts(config, RunFolder(prepared), rollout)
        planned = starts.plan(0)
        assert [s.group for s in planned] == [0, 0, 1, 1]
        assert all(s.prefix is not None and len(s.prefix) > 3 for s in planned)
        plans = [EpisodePlan(s.seed, ("t", i), base, prefix=s.prefix, group=s.group) for i, s in enumerate(planned)]
        outcomes = rollout.play(plans)
        for i, plan in enumerate(plans):
            env = vector.envs[0]
            env.reset(seed=plan.seed)
            for action in plan.prefix:
                observation = env.step(action)[0]
            np.testing.assert_array_equal(seen[i], observation["observation.state"])
            saved = env.get_state()
            env.reset(seed=1)
            env.set_state(saved)
            repeat = np.zeros(5, np.float32)
            a = env.step(repeat)[0]["observation.state"]
            env.set_state(saved)
            np.testing.assert_array_equal(a, env.step(repeat)[0]["observation.state"])
        assert np.array_equal(seen[0], seen[1])
        assert not np.array_equal(seen[0], seen[2])
        assert all(o.length <= 80 - len(p.prefix) for o, p in zip(outcomes, plans, strict=True)), (
            "the time limit counts the prefix"
        )
        starts.record(planned, [True] * 4)
        assert starts.state()["resets"]["recent"] == [1.0] * 4


def test_a_curriculum_draws_from_its_pool_and_never_from_held_out_seeds(prepared: Path) -> None:
    from robot_rl import seeding

    config = run_config(prepared, curriculum={"starts": "success", "pool": 7, "uniform": 0.5})
    with make_vector("tabletop/Lift", 3, "serial", max_episode_steps=80) as vector:
        starts = Starts(config, RunFolder(prepared), Rollout(vector, vector.spec))
        planned = starts.plan(0)
        starts.record(planned, [True, False, True, False])
        again = Starts(config, RunFolder(prepared), Rollout(vector, vector.spec))
        again.load(starts.state())
        assert again.state() == starts.state(), "what was not needed yet is kept"
        assert [s.seed for s in starts.plan(1)] == [s.seed for s in again.plan(1)]
    assert all(s.seed in seeding.TRAINING and 0 <= s.place < 7 for s in planned)
    plain = Starts(run_config(prepared), RunFolder(prepared), None)
    expected = [seeding.key("training", 3, n) % seeding.TRAINING.last for n in range(4, 8)]
    assert [s.seed for s in plain.plan(1)] == expected


def test_the_discount_rises_with_success_and_restarts_the_target(prepared: Path, tmp_path: Path) -> None:
    config = run_config(
        prepared, curriculum={"discount_start": 0.9, "discount_stages": 3}, learner={"gamma": 0.99, "tau": 0.001}
    )
    base, folder = load_policy(prepared / "base"), RunFolder(tmp_path / "run")
    demos = posttrain.gather(config.demos, config.env, posttrain._env_spec(config), 3, folder, posttrain.Silent(), 1)
    counters = LearningCounters()
    scalars = ScalarLog(folder, config)
    core = LearnerCore(config, base, demos, counters, folder, scalars, "cpu")
    assert core.buffer.window.gamma == pytest.approx(0.9)
    counters.updates_owed = 3.0
    core.spend()
    assert not torch.equal(core.learner.target.flat.data, core.learner.critic.flat.data)
    batch = core.buffer.sample(64, np.random.default_rng(0))
    whole = batch.discount > 0
    np.testing.assert_allclose(batch.discount[whole], 0.9 ** batch.mask.sum(1)[whole], rtol=1e-5)
    counters.recent = [True, True, False] * learner_core.DISCOUNT_EPISODES
    counters.updates_owed = 0.0
    core.spend()
    assert counters.discount_stage == 2
    assert torch.equal(core.learner.target.flat.data, core.learner.critic.flat.data)
    batch = core.buffer.sample(64, np.random.default_rng(0))
    whole = batch.discount > 0
    np.testing.assert_allclose(batch.discount[whole], 0.96 ** batch.mask.sum(1)[whole], rtol=1e-5)
    counters.recent = [False] * 100
    core.spend()
    assert counters.discount_stage == 2, "it never falls"
    fresh = LearnerCore(config, base, demos, LearningCounters(discount_stage=2), folder, scalars, "cpu")
    again = fresh.buffer.sample(64, np.random.default_rng(0))
    np.testing.assert_array_equal(again.discount, batch.discount)
    scalars.close()
    with pytest.raises(ValueError, match="calql"):
        run_config(prepared, curriculum={"discount_start": 0.9}, learner={"offline_critic": "calql"})
