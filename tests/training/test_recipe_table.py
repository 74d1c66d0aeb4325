"""The table of all recipes (``benchmarks/recipes.py``): set-ups that load, paired differences, failures that stop nobody, figures in the docs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from run_kit import TINY, lines, merged, same_run

from robot_rl.config import decode, load
from robot_rl.intervention.metrics import Driven, intervention_rate
from robot_rl.replay import EpisodeStore
from robot_rl.training import posttrain
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.interrupt import Interrupted, InterruptFlag

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("recipes_benchmark", ROOT / "benchmarks" / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def finished(bench, folder: Path, base: list[bool], policy: list[bool], **more) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"who": who, "seed": i, "success": s}
        for who, played in (("base", base), ("policy", policy))
        for i, s in enumerate(played)
    ]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rate = lambda x: {"success": sum(x) / len(x), "n": len(x)}  # noqa: E731
    result = {
        "task": "tabletop/Lift", "base": rate(base), "policy": rate(policy), "env_steps": 4000, "updates": 10, "wall_seconds": 60.0,
        "steps_to": {"50": 100, "75": None, "90": None}, "lowest_acting_minus_base": 0.1, "ended": "steps",
    } | more  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_every_recipe_has_a_set_up_that_loads(bench, tmp_path: Path) -> None:
    """All recipes are there, each with the shared base, the same number of final starts, and no number above its cap."""
    settings = bench.Settings.read()
    assert set(settings.recipes) == {p.stem for p in (ROOT / "configs" / "recipes").glob("*.yaml")}
    made = bench.Bench(tmp_path, settings)
    for name in settings.recipes:
        config = load(PostTrainConfig, made.config(name, 0))
        assert config.base.path == tmp_path / "shared" / "clumsy" / "base", name
        assert config.evaluation.final_episodes == 200, name
        assert config.schedule.warmup_steps <= settings.at_most["schedule.warmup_steps"], name
        assert (
            config.learner.algorithm == load(PostTrainConfig, ROOT / "configs" / "recipes" / f"{name}.yaml").learner.algorithm
        )


def test_differences_are_paired_and_one_seed_proves_nothing(bench, tmp_path: Path) -> None:
    """Starts that both policies solve cancel: thirty wins of two hundred exclude zero however hard the others are."""
    base = [i % 2 == 0 for i in range(200)]
    better = [s or i < 60 for i, s in enumerate(base)]
    one = bench.finished(finished(bench, tmp_path / "a", base, better))
    row = bench.summary([one])
    assert row["difference"] == pytest.approx(0.15)
    assert 0.08 < row["interval"][0] < 0.12
    assert not row["holds"]
    two = bench.summary([one, bench.finished(finished(bench, tmp_path / "b", base, better))])
    assert two["holds"]
    worse = bench.summary([one, bench.finished(finished(bench, tmp_path / "c", base, [False] * 200))])
    assert not worse["holds"]
    assert worse["base"] == [0.5, 0.5]


def test_a_recipe_that_fails_is_reported_and_stops_nobody(bench, tmp_path: Path, monkeypatch) -> None:
    settings = bench.Settings.read()
    settings.recipes["residual"] = bench.Entry(set={"head": {"residual": {"scale": -1.0}}})
    made = bench.Bench(tmp_path, settings)
    monkeypatch.setattr(bench.Bench, "_wait", lambda self, child: child.wait())
    assert made.play("residual", 0)
    finished(bench, made.folder("edit", 0), [True, False], [True, True])
    rows = {row["recipe"]: row for row in made.table(["residual", "edit"], [0])["rows"]}
    assert "scale" in rows["residual"]["failed"][0]
    assert rows["edit"]["difference"] == 0.5
    assert made.play("residual", 0), "it is not tried again by itself"
    made.forget_failures(["residual"], [0])
    assert not made.folder("residual", 0).exists()


def test_nothing_is_started_when_time_is_up(bench, tmp_path: Path) -> None:
    import time

    made = bench.Bench(tmp_path, bench.Settings.read(), deadline=time.monotonic() - 1.0)
    assert not made.play("edit", 0)
    assert not (made.folder("edit", 0)).exists()
    assert not made.play("compass", 0), "nor are the runs it is made of"


def test_runs_of_another_machine_stay_in_the_table(bench, tmp_path: Path) -> None:
    """One seed here and one there are two seeds; what was run again counts as it came out now."""
    here, there = (bench.Bench(tmp_path / name, bench.Settings.read()) for name in ("here", "there"))
    base = [False, True] * 20
    finished(bench, there.folder("edit", 1), base, [True] * 40)
    finished(bench, there.folder("expo", 0), base, base)
    out = tmp_path / "table.json"
    out.write_text(json.dumps(there.table(["edit", "expo"], [0, 1])))
    finished(bench, here.folder("edit", 0), base, [True] * 40)
    table = here.table(["edit"], [0, 1], bench.read_known(out))
    rows = {row["recipe"]: row for row in table["rows"]}
    assert rows["edit"]["seeds"] == [0, 1]
    assert rows["edit"]["holds"]
    assert rows["expo"]["seeds"] == [0]
    finished(bench, here.folder("edit", 1), base, base)
    again = {row["recipe"]: row for row in here.table(["edit"], [0, 1], bench.read_known(out))["rows"]}
    assert again["edit"]["best"] == [1.0, 0.5]
    assert bench.read_known(tmp_path / "none.json") == {}


def test_figures_reach_the_docs_and_other_columns_stay(bench, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    docs = tmp_path / "recipes.md"
    docs.write_text(text)
    made = bench.Bench(tmp_path / "runs", bench.Settings.read())
    finished(bench, made.folder("edit", 0), [True, False] * 100, [True] * 200)
    table = made.table(["edit", "expo"], [0])
    assert bench.write_docs(table, docs) == 1
    changed = [(a, b) for a, b in zip(text.split("\n"), docs.read_text().split("\n"), strict=True) if a != b]
    assert len(changed) == 1
    before, after = (line.split("|") for line in changed[0])
    assert before[:5] == after[:5]
    assert "1 seed: 50.0 to 100.0 %; +50 points" in after[5]
    assert bench.write_docs(table, docs) == 0, "the same figures change nothing"


def test_a_run_with_a_simulated_operator_resumes_exactly(tmp_path: Path) -> None:
    """Interventions and all: hg_dagger interrupted once is hg_dagger that never was."""
    change = {
        "head": {"kind": "fine_tuned"}, "operator": {"patience": 6}, "stop": {"intervention_steps": 50},
        "learner": {"algorithm": "weighted_bc", "weights": "hg_dagger", "n_critics": None, "hidden": None},
        "schedule": {"return_updates": 0, "warmup_updates": 0, "env_steps": 200}, "mixture": {"start": 0.0, "end": 0.0, "greedy": 0.0},
    }  # fmt: skip

    def config(folder: Path) -> PostTrainConfig:
        data = merged(TINY, change) | {"run_dir": str(folder)}
        data["learner"] = {"algorithm": "weighted_bc", "weights": "hg_dagger"}
        return decode(PostTrainConfig, data)

    posttrain.run(config(tmp_path / "straight"))
    asked = 0

    def once(flag: InterruptFlag) -> bool:
        nonlocal asked
        asked += 1
        flag._set = flag._set or asked == 150
        return flag._set

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterruptFlag, "__call__", once)
        with pytest.raises(Interrupted):
            posttrain.run(config(tmp_path / "resumed"))
    posttrain.run(config(tmp_path / "resumed"))
    same_run(tmp_path / "straight", tmp_path / "resumed")
    result = json.loads((tmp_path / "resumed" / "result.json").read_text())
    with EpisodeStore.open(tmp_path / "resumed" / "store") as store:
        played = [
            Driven(int(store.attributes(e)["length"]), store.meta(e).extra["human_steps"]) for e in sorted(store.episode_ids())
        ]
    assert result["intervention_rate"]["last"] == intervention_rate(played, 50)
    assert result["intervention_rate"]["first"] is not None
    weights = [line["bc/weight"] for line in lines(tmp_path / "straight", "metrics.jsonl") if "bc/weight" in line]
    assert weights
    assert max(weights) > 0, "what the operator did counts"


def test_an_operator_is_refused_where_nobody_could_use_one() -> None:
    with pytest.raises(ValueError, match="on-policy learner, which learns from its own steps"):
        load(PostTrainConfig, ROOT / "configs" / "recipes" / "dppo.yaml", ["--operator.patience=5"])
    with pytest.raises(ValueError, match="nobody can watch"):
        load(
            PostTrainConfig,
            ROOT / "configs" / "recipes" / "hil_serl.yaml",
            ["--operator.patience=5", "--env.workers=processes"],
        )
    with pytest.raises(ValueError, match="where nobody could drive less"):
        load(PostTrainConfig, ROOT / "configs" / "recipes" / "hil_serl.yaml", ["--stop.intervention_rate=0.02"])
    with pytest.raises(ValueError, match=r"intervention_rate=0\.0: accepted"):
        load(PostTrainConfig, ROOT / "configs" / "recipes" / "hil_serl.yaml", ["--stop.intervention_rate=0"])


def test_a_table_that_does_not_hold_its_runs_is_not_written_over(bench, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": [{"recipe": "dsrl_na", "seeds": []}, {"recipe": "expo", "seeds": [0], "base": [0.3]}]}))
    with pytest.raises(ValueError, match="the rows expo do not hold their runs"):
        bench.read_known(path)
