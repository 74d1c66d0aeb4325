"""The main job end to end, small: every promised file and field, and resuming that changes nothing but the clock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_kit import TINY, learner_tensors, lines, same_run, tiny

from robot_rl.config import config_hash, load
from robot_rl.evaluation.results import read_jsonl
from robot_rl.replay.store import EpisodeStore
from robot_rl.training import posttrain, session
from robot_rl.training.bc import run as run_bc
from robot_rl.training.config import BCRunConfig, EnvConfig, EvalConfig, PostTrainConfig
from robot_rl.training.evaluate import run as run_evaluation
from robot_rl.training.ingest import ingest
from robot_rl.training.interrupt import Interrupted, InterruptFlag
from robot_rl.training.run_folder import RunFolder, to_json


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Demonstrations and base policy, made once: the run folder of a run that was stopped right after cloning."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    config = tiny(folder)
    spec = posttrain._env_spec(config)
    run_folder = RunFolder(folder)
    posttrain._claim(run_folder, config)
    with InterruptFlag() as flag:
        posttrain.prepare_base(config, spec, run_folder, posttrain.Silent(), flag, "cpu")
    return folder


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory) -> Path:
    """One run from start to end without interruption."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(prepared, folder)
    posttrain.run(tiny(folder))
    return folder


def test_every_promised_field_and_file(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    for who in ("base", "policy"):
        assert result[who].keys() >= {"success", "n", "interval"}
        assert result[who]["n"] == 4
        assert result[who]["interval"][0] <= result[who]["success"] <= result[who]["interval"][1]
    promised = {"env_steps", "wall_seconds", "steps_to", "lowest_acting_minus_base", "config_hash", "seeds", "task", "run_seed"}
    assert result.keys() >= promised
    assert set(result["steps_to"]) == {"50", "75", "90"}
    assert (result["task"], result["run_seed"]) == ("tabletop/Lift", 3)
    assert result["env_steps"] >= TINY["schedule"]["env_steps"]
    assert (finished / "report.html").stat().st_size > 10_000
    evaluations = lines(finished, "evaluations.jsonl")
    assert {line["who"] for line in evaluations} >= {"base", "untrained_head", "zero_noise", "acting"}
    needed = {"env_steps", "who", "version", "mode", "successes", "n", "interval"}
    assert all(line.keys() >= needed for line in evaluations)
    gate = lines(finished, "gate.jsonl")
    assert gate
    assert gate[0]["event"] == "candidate"
    assert all(
        line.keys() >= {"env_steps", "event", "version", "successes", "n", "lower", "upper", "reference"} for line in gate
    )
    metrics = lines(finished, "metrics.jsonl")
    assert all({"env_steps", "updates", "critic/q"} <= line.keys() for line in metrics)
    assert len(metrics) == (4 + result["updates"]) // 8  # one line a period, in the critic warm-up too
    episodes = lines(finished, "episodes.jsonl")
    assert [(e["who"], e["seed"]) for e in episodes] == [(w, 2_001_000 + i) for w in ("base", "policy") for i in range(4)]
    assert all(e.keys() >= {"success", "length", "start", "end"} for e in episodes)
    assert (finished / "tensorboard").is_dir()
    assert any((finished / "weights").iterdir())
    assert config_hash(load(PostTrainConfig, finished / "config.yaml")) == result["config_hash"] == config_hash(tiny(finished))


def test_row_33_only_training_seeds_are_recorded(finished: Path) -> None:
    with EpisodeStore.open(finished / "store", mode="r") as store:
        ids = store.episode_ids()
        assert len(ids) % 4 == 0
        assert len(ids) >= 8
        assert all(store.meta(i).seed < 1_000_000 for i in ids)
        episode = store.read(ids[0])
        assert episode.decisions
        assert episode.meta.base_hash


def test_a_share_of_episodes_is_played_as_candidates_act(finished: Path) -> None:
    with EpisodeStore.open(finished / "store", mode="r") as store:
        episodes = [store.read(i) for i in store.episode_ids()]
    modes = [e.meta.extra["mode"] for e in episodes]
    assert modes[:4] == ["base"] * 4  # the warm-up is the base's
    assert {"explore", "eval"} <= set(modes)
    greedy = [e for e in episodes if e.meta.extra["mode"] == "eval"]
    assert all(e.meta.extra["base_share"] == 0.0 and not any(d.explored for d in e.decisions) for e in greedy)


def test_a_finished_run_is_evaluated_and_reported_again_without_training(finished: Path) -> None:
    before = learner_tensors(finished)
    once = run_evaluation(EvalConfig(policy=finished, who="base", episodes=2, env=EnvConfig("tabletop/Lift", num_envs=2)))
    assert once == run_evaluation(
        EvalConfig(policy=finished / "base", episodes=2, env=EnvConfig("tabletop/Lift", num_envs=2))
    ) | {"policy": str(finished)}
    acting = run_evaluation(EvalConfig(policy=finished, episodes=2, offset=3))
    assert acting["seeds"] == [2_000_003, 2_000_004]
    after = learner_tensors(finished)
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(FileNotFoundError, match="neither a run folder"):
        run_evaluation(EvalConfig(policy=finished / "weights"))


class StopAt:
    """Sets the interrupt flag when a phase has been entered ``count`` times, after ``steps`` more questions of the flag."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, phase: str, count: int, questions: int) -> None:
        self.armed, self.left, self.questions = False, count, questions
        method = getattr(session.Session, f"_{phase}")

        def enter(run):
            self.left -= 1
            self.armed = self.left == 0
            return method(run)

        def asked(flag):
            if self.armed:
                self.questions -= 1
                flag._set = flag._set or self.questions < 0
            return flag._set

        monkeypatch.setattr(session.Session, f"_{phase}", enter)
        monkeypatch.setattr(InterruptFlag, "__call__", asked)


@pytest.mark.parametrize(
    ("phase", "count", "questions"),
    [
        ("collect", 2, 45),
        ("learn", 1, 3),  # the critic's warm-up, right where its two halves meet
        ("learn", 1, 5),
        ("learn", 2, 1),
        pytest.param("gate", 2, 20, marks=pytest.mark.slow),
        pytest.param("evaluate", 2, 5, marks=pytest.mark.slow),
    ],
)
def test_row_11_an_interrupted_run_ends_like_one_that_was_not(
    finished: Path, prepared: Path, tmp_path: Path, phase: str, count: int, questions: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(prepared, folder)
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, phase, count, questions)
        with pytest.raises(Interrupted):
            posttrain.run(tiny(folder))
    assert not (folder / "result.json").exists()
    if phase == "collect":  # and once more in the same round: an episode id that was set aside does not stop the run
        with pytest.MonkeyPatch.context() as patch:
            StopAt(patch, phase, 1, questions)
            with pytest.raises(Interrupted):
                posttrain.run(tiny(folder))
    posttrain.run(tiny(folder))
    same_run(finished, folder)


def test_another_configuration_on_the_same_folder_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match="another configuration"):
        posttrain.run(tiny(finished, seed=4))
    with pytest.raises(ValueError, match="another configuration"):
        posttrain.run(tiny(finished, learner={"gamma": 0.9}))


CHILD = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from run_kit import tiny
from robot_rl.training.posttrain import run
print("started", flush=True)
run(tiny(Path({folder!r})))
"""


def killed_runs(finished: Path, prepared: Path, folder: Path, root: Path, kills: int, seed: int) -> None:
    """Kill -9 at random instants, resume each time, and compare the end with the run that nobody touched."""
    shutil.copytree(prepared, folder)
    code = CHILD.format(root=str(root), here=str(Path(__file__).parent), folder=str(folder))
    rng = np.random.default_rng(seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        # Wait for a place in the run, not for a time: machines differ in speed.
        target = int(rng.integers(1, 4))
        while child.poll() is None and len(list((folder / "store" / "episodes").glob("*"))) < 4 * target - int(
            rng.integers(0, 4)
        ):
            time.sleep(0.02)
        time.sleep(float(rng.uniform(0, 0.3)))
        child.send_signal(signal.SIGKILL)
        child.wait()
    posttrain.run(tiny(folder))
    same_run(finished, folder)


def test_row_11_kill_nine_and_resume(finished: Path, prepared: Path, tmp_path: Path, root: Path) -> None:
    killed_runs(finished, prepared, tmp_path / "run", root, 1, 0)


@pytest.mark.slow
def test_row_11_kill_nine_ten_times(finished: Path, prepared: Path, tmp_path: Path, root: Path) -> None:
    killed_runs(finished, prepared, tmp_path / "run", root, 10, 1)


def test_row_34_a_published_version_does_not_follow_the_learner(finished: Path, tmp_path: Path) -> None:
    """What acts under a version number is a verified copy; training on does not change it."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = tiny(folder)
    base = posttrain.load_policy(folder / "base")
    with posttrain.make_vector("tabletop/Lift", 1, "serial") as vector, InterruptFlag() as flag:
        rollout = posttrain.Rollout(vector, vector.spec)
        run = session.Session(config, RunFolder(folder), base, [], rollout, posttrain.Silent(), flag, "cpu")
        try:
            assert run.resume()
            version = run.core.publish(run.channel).version
            policy = run.policy(version, "eval")
            before = {k: v.clone() for k, v in policy.head.state_dict().items()}
            run.learner.head.actor.flat.data.add_(1.0)
            assert all(torch.equal(before[k], v) for k, v in policy.head.state_dict().items())
            assert run.policy(version, "eval").head is policy.head
        finally:
            run.close()


def test_evicted_episodes_stay_recorded_on_resume(finished: Path, tmp_path: Path) -> None:
    """The buffer forgets, the store does not: only what came after the checkpoint is set aside."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    checkpoint = (folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()) / "state.json"
    content = json.loads(checkpoint.read_text())
    evicted = content["state"]["episodes"].pop(0)
    checkpoint.write_text(json.dumps(content))
    with EpisodeStore.open(folder / "store", mode="a", sync=False) as store:
        first = store.read(evicted)
        first.meta.episode_id = "r999999e000"
        store.add(first)
    with posttrain.make_vector("tabletop/Lift", 1, "serial") as vector, InterruptFlag() as flag:
        base = posttrain.load_policy(folder / "base")
        rollout = posttrain.Rollout(vector, vector.spec)
        run = session.Session(tiny(folder), RunFolder(folder), base, [], rollout, posttrain.Silent(), flag, "cpu")
        try:
            run.resume()
            assert evicted in run.store
            assert evicted not in run.buffer
            assert "r999999e000" not in run.store
        finally:
            run.close()


def test_row_24_episodes_of_other_statistics_are_refused(finished: Path) -> None:
    base = posttrain.load_policy(finished / "base")
    with EpisodeStore.open(finished / "store", mode="r") as store:
        episode = store.read(store.episode_ids()[0])
    episode.meta.stats_hash = "other"
    with pytest.raises(ValueError, match="stats_hash='other'"):
        ingest(None, episode, base)  # type: ignore[arg-type]


def test_baselines_cut_short_leave_no_line_twice(prepared: Path, tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(prepared, folder)
    RunFolder(folder).append("evaluations.jsonl", {"who": "base", "left": "by an attempt that was killed"})
    with posttrain.make_vector("tabletop/Lift", 1, "serial") as vector, InterruptFlag() as flag:
        base = posttrain.load_policy(folder / "base")
        rollout = posttrain.Rollout(vector, vector.spec)
        run = session.Session(tiny(folder), RunFolder(folder), base, [], rollout, posttrain.Silent(), flag, "cpu")
        try:
            assert not run.resume()
        finally:
            run.close()
    assert lines(folder, "evaluations.jsonl") == []


def test_cloning_on_its_own_and_what_it_refuses(prepared: Path, tmp_path: Path) -> None:
    bc = tiny(tmp_path).base.bc
    found = run_bc(BCRunConfig(data=prepared / "demos", out=tmp_path / "a", device="cpu", bc=bc))
    again = run_bc(BCRunConfig(data=prepared / "demos", out=tmp_path / "b", device="cpu", bc=bc))
    assert found["episodes"] == 8
    assert np.isfinite(found["loss"])
    base = posttrain.load_policy(prepared / "base")
    assert found["base_hash"] == again["base_hash"] == base.spec.base_hash
    with pytest.raises(ValueError, match="device='tpu'"):
        run_bc(BCRunConfig(data=prepared / "demos", out=tmp_path / "c", device="tpu", bc=bc))


def test_demonstrations_that_were_cut_short_are_made_again(prepared: Path, tmp_path: Path) -> None:
    """A killed collection is completed from the start, and gives what it would have given."""
    folder = tmp_path / "run"
    shutil.copytree(prepared, folder)
    (folder / "demos" / "complete").unlink()
    shutil.rmtree(folder / "demos" / "episodes")
    config = tiny(folder)
    spec = posttrain._env_spec(config)
    redone = posttrain.gather(config.demos, config.env, spec, config.seed, RunFolder(folder), posttrain.Silent(), 1)
    with EpisodeStore.open(prepared / "demos", mode="r") as store:
        before = [store.read(i) for i in store.episode_ids()]
    assert len(redone) == len(before) == 8
    assert all(np.array_equal(a.action, b.action) for a, b in zip(redone, before, strict=True))


def test_a_policy_of_another_task_is_refused(prepared: Path, tmp_path: Path) -> None:
    spec = posttrain._env_spec(tiny(tmp_path))
    wrong = tiny(tmp_path, base={"path": str(prepared / "base")})
    other = {**spec.observation_features}
    other.pop(next(iter(other)))
    with InterruptFlag() as flag, pytest.raises(ValueError, match=r"base\.path=.*the policy reads"):
        posttrain.prepare_base(
            wrong, replace(spec, observation_features=other), RunFolder(tmp_path), posttrain.Silent(), flag, "cpu"
        )


# ---- small parts


def test_interrupt_flag_asks_once_and_then_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    with InterruptFlag() as flag:
        assert not flag()
        signal.raise_signal(signal.SIGINT)
        assert flag()
        with pytest.raises(Interrupted):
            flag.raise_if_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_logs_are_rewound_and_torn_lines_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("metrics.jsonl", {"a": np.float32(1), "b": float("nan"), "c": np.arange(2)})
    sizes = folder.log_sizes()
    folder.append("metrics.jsonl", {"a": 2})
    folder.append("gate.jsonl", {"a": 3})
    folder.rewind_logs(sizes)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"a": 1.0, "b": None, "c": [0, 1]}]
    assert read_jsonl(tmp_path / "gate.jsonl") == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"a": 5')
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
    assert to_json({"p": Path("x"), "t": (1, float("inf"))}) == {"p": "x", "t": [1, None]}
