"""``robot-rl practice`` in simulation: two learners, judges by rule, and a run that is cut in two is the same run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robot_rl.cli import main
from robot_rl.replay import EpisodeStore
from robot_rl.sim.collect import CollectConfig, collect
from robot_rl.sim.env import make_env
from robot_rl.sim.practice import EndlessTabletop

UP, DOWN = 'field: "observation.state[17]", op: ">", value: 0.118', 'field: "observation.state[17]", op: "<", value: 0.019'
OPEN = 'field: "observation.state[8]", op: ">", value: 0.07'
TRAINING = """
extends: recipes/noise_gradient.yaml
threads: 1
demos: {prefill: false}
schedule: {warmup_steps: 20, return_updates: 2, warmup_updates: 2, batch_size: 8, updates_per_step: 0.05}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base policy (cloned for a moment), two judges and a training configuration."""
    path = tmp_path_factory.mktemp("practice")
    env = make_env("tabletop/Lift")
    with EpisodeStore.create(
        path / "demos", observation_features=env.spec.observation_features, action=env.spec.action
    ) as store:
        collect(CollectConfig("tabletop/Lift", 2), store)
    small = ["--bc.policy.width=32", "--bc.policy.num_steps=2", "--bc.policy.horizon=4", "--bc.policy.n_action_steps=4"]
    assert main(["bc", f"--data={path / 'demos'}", f"--out={path / 'base'}", "--bc.steps=5", *small, "--quiet"]) == 0
    (path / "up.yaml").write_text(f"kind: rule\nname: up\nrules: [{{{UP}}}]\n")
    (path / "down.yaml").write_text(f"kind: rule\nname: down\nrules: [{{{DOWN}}}, {{{OPEN}}}]\n")
    (path / "training.yaml").write_text(TRAINING)
    return path


def practise(files, run, attempts, *more):
    sides = []
    for name, judge in (("forward", "up"), ("backward", "down")):
        sides += [
            f"--{name}.config={files / 'training.yaml'}",
            f"--{name}.base={files / 'base'}",
            f"--{name}.judge={files / judge}.yaml",
        ]
    limits = [f"--practice.attempts={attempts}", "--practice.attempt_s=0.6", "--checkpoint_every=1", "--help_by=reset"]
    words = ["--backward.instruction=put the block back", f"--run_dir={run}", "--json"]
    return main(["practice", *sides, *limits, *words, *more])


@pytest.mark.slow
def test_a_run_cut_in_two_is_the_same_run(files, tmp_path):
    assert practise(files, tmp_path / "whole", 6) == 0
    assert practise(files, tmp_path / "cut", 3) == 0
    assert practise(files, tmp_path / "cut", 6) == 0
    whole, cut = ((tmp_path / name / "attempts.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut
    lines = [json.loads(line) for line in whole.splitlines()]
    assert {line["direction"] for line in lines} == {"forward", "backward"}
    result = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert result["attempts"] == 6
    assert sum(result["env_steps"].values()) == sum(line["steps"] for line in lines)
    assert (tmp_path / "cut" / "forward" / "weights").is_dir()
    assert practise(files, tmp_path / "cut", 6, "--seed=3") != 0  # of another configuration


def test_the_scene_goes_on_where_it_was_and_lost_things_are_noticed():
    robot = EndlessTabletop(make_env("tabletop/Lift", max_episode_steps=5))
    before = robot.observe()["observation.state"].copy()
    forward = np.array([0.02, 0, 0, 0, 0.08])
    xs = [robot.step(forward)["observation.state"][0] for _ in range(12)]
    assert (np.diff(xs[:9]) > 0).all()  # through two ends of the task's own episodes
    assert xs[8] - before[0] > 0.1
    state = json.loads(json.dumps(robot.get_state()))
    ahead = robot.step(forward)["observation.state"]
    robot.set_state(state)
    np.testing.assert_array_equal(robot.step(forward)["observation.state"], ahead)
    assert robot.trouble() == ""
    robot.env.data.xpos[robot.env.model.body("object").id] = (0.0, 0.5, 0.02)
    assert "object is out of reach" in robot.trouble()
    robot.help()
    assert robot.trouble() == ""
    with pytest.raises(ValueError, match="movable"):
        EndlessTabletop(make_env("tabletop/Lift"), movable=("teapot",))
