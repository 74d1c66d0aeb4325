"""How many steps to 90 % (``benchmarks/sample_efficiency.py``): set-ups that load, who has to be watched for how long, and the bar."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from run_kit import benchmark

from robot_rl.config import load
from robot_rl.training.config import PostTrainConfig


@pytest.fixture(scope="module")
def efficiency():
    return benchmark("sample_efficiency")


@pytest.fixture
def settings(efficiency, monkeypatch):
    """Of each task."""
    monkeypatch.setattr(sys, "argv", ["sample_efficiency.py", "--runs", "none"])
    return efficiency.chosen("", efficiency.SETTINGS)[1]


@pytest.fixture
def race(efficiency, settings, tmp_path):
    return efficiency.Race("Can", tmp_path, settings["Can"], float("inf"))


def finish(race, recipe: str, seed: int, rates: dict[int, float], events: str = "evaluations") -> Path:
    """A run that was played elsewhere."""
    folder = race.bench().folder(recipe, seed)
    folder.mkdir(parents=True)
    result = {
        "task": "robosuite/Can",
        "env_steps": max(rates),
        "gate_steps": 0,
        "updates": 0,
        "wall_seconds": 1.0,
        "ended": "won",
    }
    (folder / "result.json").write_text(json.dumps(result | {"lowest_acting_minus_base": 0.0}))
    lines = {
        "evaluations": [
            {"who": "acting", "version": 1, "env_steps": s, "successes": round(100 * r), "n": 100} for s, r in rates.items()
        ],
        "gate": [
            {"event": "rejected", "env_steps": s, "successes": round(50 * r), "n": 50, "version": 1} for s, r in rates.items()
        ],
        "episodes": [{"who": who, "seed": 7, "success": who == "policy"} for who in ("base", "policy")],
    }
    for name in {events, "episodes"}:
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines[name])))
    return folder


def test_everybody_has_the_same_task_base_and_starts(efficiency, settings, tmp_path):
    assert list(settings) == ["Can", "Square"]
    for task, of in settings.items():
        bench = efficiency.Race(task, tmp_path, of, float("inf")).bench(horizon=12_345)
        found = {recipe: load(PostTrainConfig, bench.config(recipe, 0)) for recipe in of.recipes}
        default = next(iter(found))
        assert {c.env.id for c in found.values()} == {f"robosuite/{task}"}
        assert len({(c.base.path, c.demos.path, c.evaluation.final_episodes) for c in found.values()}) == 1
        assert {name for name, c in found.items() if c.schedule.env_steps == 12_345} == set(found) - {default}


def test_baselines_are_watched_for_twice_the_steps_of_the_median_seed(race):
    assert race.horizon([0, 1]) is None, "before the default has run nothing is known"
    finish(race, "noise_gradient", 0, {0: 0.4, 2000: 0.92})
    assert race.horizon([0, 1]) is None
    finish(race, "noise_gradient", 1, {0: 0.4, 2000: 0.7, 6000: 0.9})
    assert race.horizon([0, 1]) == 8000
    finish(race, "noise_gradient", 2, {0: 0.4, 20_000: 0.95})
    assert race.horizon([0, 1, 2]) == 12_000
    assert race.there([0, 1, 2]) == [2000, 6000, 20_000]


def test_a_default_that_never_got_there_has_no_race(race):
    finish(race, "noise_gradient", 0, {0: 0.4, 60_000: 0.8})
    assert race.horizon([0]) is None


def test_a_baseline_goes_on_where_it_only_ran_out_of_steps(efficiency):
    used_up, won = "6000 environment steps are used up", "the acting head succeeded in 96 of 100 gate episodes"
    assert efficiency.too_short({"env_steps": 6000, "ended": used_up}, 8000)
    assert not efficiency.too_short({"env_steps": 8100, "ended": used_up}, 8000)
    assert not efficiency.too_short({"env_steps": 6000, "ended": won}, 8000)


def test_a_baseline_counts_with_each_version_whether_it_was_let_through_or_not(efficiency, race):
    folder = finish(race, "expo", 0, {4000: 0.3, 8000: 0.94}, "gate")
    assert efficiency.first_there(efficiency.curve_of(folder, gated=False)) == 8000


@pytest.mark.parametrize(
    ("default", "expo", "holds"),
    [
        ([4000, 5000, 6000], [10_000, 12_000, 9000], True),
        ([4000, 5000, 6000], [9000, 9999, 12_000], False),
        ([4000, None, 6000], [12_000, 12_000, 12_000], False),
        ([4000, 5000], [12_000, 12_000], False),
    ],
)
def test_half_of_the_steps_with_three_seeds_of_everybody(efficiency, default, expo, holds):
    assert efficiency.verdict(default, {"expo": expo, "rlpd": [20_000] * 3}) is holds


def test_runs_that_a_table_holds_count_where_their_folders_are_gone(efficiency, race, settings, tmp_path):
    for seed, steps in enumerate((2000, 6000, 4000)):
        finish(race, "noise_gradient", seed, {0: 0.4, steps: 0.9})
    finish(race, "expo", 0, {4000: 0.3, 9000: 0.5}, "gate")
    before = race.table(list(settings["Can"].recipes), [0, 1, 2])
    table = tmp_path / "table.json"
    efficiency.hand_out({"complete": True, "tasks": [before]}, table)
    known = efficiency.read_known(table)["Can"]
    elsewhere = efficiency.Race("Can", tmp_path / "another_machine", settings["Can"], float("inf"), known)
    assert elsewhere.table(["rlpd"], [0])["rows"][0] == json.loads(table.read_text())["tasks"][0]["rows"][0]
    assert elsewhere.horizon([0]) == 8000, "of all three seeds, not of the one that was asked for"
    finish(elsewhere, "expo", 0, {4000: 0.95}, "gate")
    rows = {row["recipe"]: row for row in elsewhere.table(["expo"], [0])["rows"]}
    assert rows["expo"]["steps_to_90"] == [4000], "what was done again goes before"


def test_a_base_that_is_kept_is_everybodys_and_a_missing_one_is_named(efficiency, tmp_path):
    from recipes import Bench, Settings

    few = {"demos": {"episodes": 2}, "base": {"bc": {"steps": 2}}}
    content = {"common": {}, "at_most": {}, "on_policy": {}, "data": {"clumsy": {}}, "task": few}
    with pytest.raises(ValueError, match="base='kept': accepted is a folder"):
        Settings.of(content | {"recipes": {}, "base": "kept"}, tmp_path / "settings.yaml")
    first = Bench(tmp_path / "here", Settings.of(content | {"recipes": {}}, tmp_path / "settings.yaml"))
    first.prepare({"clumsy"})
    shutil.copytree(first.shared / "clumsy" / "base", tmp_path / "kept")
    longer = content | {"task": few | {"base": {"bc": {"steps": 3}}}}
    settings = Settings.of(longer | {"recipes": {}, "base": "kept"}, tmp_path / "settings.yaml")
    second = Bench(tmp_path / "there", settings)
    second.prepare({"clumsy"})
    name = Path("clumsy", "base", "policy.safetensors")
    assert (second.shared / name).read_bytes() == (first.shared / name).read_bytes()
    assert (second.store("clumsy") / "complete").exists()
