"""What is learned from people (``benchmarks/human_in_the_loop.py``): set-ups that load, how much the person drove, and the bars."""

from __future__ import annotations

import json

import numpy as np
import pytest
from run_kit import benchmark

from robot_rl.config import load
from robot_rl.replay import EpisodeStore
from robot_rl.training.config import PostTrainConfig
from robot_rl.types import ActionSpec, Episode, EpisodeMeta, FeatureSpec


@pytest.fixture(scope="module")
def people():
    return benchmark("human_in_the_loop")


def test_every_set_up_loads_with_its_task_and_a_person(people, tmp_path):
    settings = people.read_settings()
    assert len(settings) == 2
    for task, of in settings.items():
        bench = people.Bench(tmp_path / task, of)
        assert list(of.recipes) == ["hil_serl", "rlif_edit", "hg_dagger", "recap"]
        for recipe in of.recipes:
            config = load(PostTrainConfig, bench.config(recipe, 0))
            assert config.env.id == f"tabletop/{task}"
            assert config.operator.patience > 0
            assert config.evaluation.final_episodes == 200


def test_how_much_the_person_drove_is_counted_where_one_was_there(people, tmp_path):
    """1,000 steps with a person half of the time, 1,000 with none needed, and the gate's episodes in between, which nobody watches."""
    action = ActionSpec((-1.0,), (1.0,))
    with EpisodeStore.create(tmp_path, observation_features={"s": FeatureSpec((1,))}, action=action, sync=False) as store:
        for i in range(300):
            watched = i % 3 != 2
            meta = EpisodeMeta(f"e{i:04d}", extra={"human_steps": 5 if i < 150 else 0} if watched else {})
            store.add(Episode.from_arrays(meta, {"s": np.zeros((11, 1), np.float32)}, np.zeros((10, 1), np.float32)))
    assert people.rates(tmp_path) == {"start": 0.5, "end": 0.25, "lowest": 0.0, "curve": [0.5, 0.0]}


def test_bars(people):
    def row(best, start, end, interval=(0.1, 0.2)):
        return {
            "best": best, "interval": list(interval), "person": [{"start": start, "end": end}] * len(best),
            "against_operator": {"interval": list(interval)},
        }  # fmt: skip

    assert people.judge("hil_serl", row([0.95, 0.99], 0.3, 0.019))
    assert not people.judge("hil_serl", row([0.945, 0.99], 0.3, 0.0))
    assert not people.judge("hil_serl", row([0.99], 0.3, 0.02))
    assert not people.judge("hil_serl", row([0.99], 0.31, 0.0))
    assert people.judge("rlif_edit", row([0.5], 0.2, 0.2))
    nothing_learned = row([0.5], 0.2, 0.2) | {"interval": [0.0, 0.0]}
    assert not people.judge("rlif_edit", nothing_learned), "a base that was better than the person from the start"
    assert not people.judge("recap", row([0.9], 0.2, 0.0, (0.0, 0.5)))


def test_a_row_of_finished_runs_says_who_was_better_on_the_same_starts(people, tmp_path, monkeypatch):
    """The policy wins the first half of its starts; the person alone, played by a stand-in here, wins the first quarter."""
    of = people.People("Lift", tmp_path, people.read_settings()["Lift"], 0.0)
    folder = of.bench.folder("rlif_edit", 0)
    EpisodeStore.create(
        folder / "store", observation_features={"s": FeatureSpec((1,))}, action=ActionSpec((-1.0,), (1.0,)), sync=False
    ).close()
    lines = [{"who": w, "seed": i, "success": w == "policy" and i < 10} for w in ("base", "policy") for i in range(20)]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {
        "task": "tabletop/Lift",
        "env_steps": 9,
        "updates": 9,
        "wall_seconds": 1.0,
        "lowest_acting_minus_base": 0.0,
        "ended": "steps",
    }
    (folder / "result.json").write_text(json.dumps(result))
    of.bench.shared.mkdir(parents=True)
    monkeypatch.setattr(people, "rates", lambda _: {"start": 0.2, "end": 0.1})
    monkeypatch.setattr(people, "alone", lambda config, operator, seeds: [s < 5 for s in seeds])
    row = of.row("rlif_edit", [0])
    assert row["best"] == [0.5]
    assert row["against_operator"]["difference"] == pytest.approx(0.25)
    assert row["against_operator"]["operator_success"] == pytest.approx(0.25)
    assert row["bar_met"] == (row["against_operator"]["interval"][0] > 0.0)
    assert not row["holds"]  # one seed proves nothing
