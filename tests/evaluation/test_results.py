"""Run-folder files: exact round trips, torn tails, damage, and the summary numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robot_rl.evaluation.results import (
    EpisodeLine,
    EvaluationLine,
    GateLine,
    RunResult,
    append_jsonl,
    load_lines,
    lowest_acting_minus_base,
    read_jsonl,
    steps_to,
)
from robot_rl.evaluation.statistics import SuccessRate
from robot_rl.runtime.gate import GateConfig, PromotionGate


def point(steps: int, k: int, n: int = 100, who: str = "acting") -> EvaluationLine:
    return EvaluationLine.of(k, n, env_steps=steps, wall_seconds=steps / 50, who=who, version=1, mode="eval")


def test_lines_round_trip(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    lines = [point(0, 40), point(1000, 62)]
    for line in lines:
        append_jsonl(path, line)
    assert load_lines(EvaluationLine, path) == lines
    episode = EpisodeLine("policy", 2_001_003, False, 300, {"cube x": 0.1}, "time limit", "lift")
    append_jsonl(tmp_path / "episodes.jsonl", episode)
    assert load_lines(EpisodeLine, tmp_path / "episodes.jsonl") == [episode]
    assert load_lines(GateLine, tmp_path / "absent.jsonl") == []


def test_the_gates_own_events_are_readable(tmp_path):
    gate = PromotionGate(GateConfig())
    gate.set_reference(160, 400)
    for event in gate.submit(1) + [e for _ in range(40) if gate.on_probation for e in gate.record(1, True)]:
        append_jsonl(tmp_path / "gate.jsonl", event.to_json(env_steps=5000))
    candidate, promoted = load_lines(GateLine, tmp_path / "gate.jsonl")
    assert (candidate.event, promoted.event, promoted.acting, promoted.env_steps) == ("candidate", "promoted", 1, 5000)
    assert promoted.lower >= promoted.reference - 0.05


def test_a_torn_tail_is_ignored_and_removed_by_the_next_append(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    for k in (40, 50):
        append_jsonl(path, point(0, k))
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 2, 9):
        path.write_bytes(whole[:-cut])
        assert [r["successes"] for r in read_jsonl(path)] in ([40], [40, 50])
        append_jsonl(path, point(0, 60))
        assert [r["successes"] for r in read_jsonl(path)] == [40, 60]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(ValueError, match=r"evaluations\.jsonl line 2"):
        read_jsonl(path)
    path.write_text('{"env_steps": 1, "who": "acting"}\n')
    with pytest.raises(ValueError, match=r"evaluations\.jsonl line 1: missing successes, n"):
        load_lines(EvaluationLine, path)
    path.write_text('{"env_steps": "soon", "who": "acting", "successes": 1, "n": 2}\n')
    with pytest.raises(ValueError, match=r"evaluations\.jsonl line 1: invalid literal"):
        load_lines(EvaluationLine, path)
    with pytest.raises(ValueError, match="who='robot': accepted are acting, base"):
        point(0, 1, who="robot")


def test_not_finite_numbers_become_null(tmp_path):
    append_jsonl(tmp_path / "m.jsonl", {"q": float("nan"), "n": np.float32(2.5), "deep": [np.int64(3), float("inf")]})
    assert read_jsonl(tmp_path / "m.jsonl") == [{"q": None, "n": 2.5, "deep": [3, None]}]


def test_steps_to_and_the_dip():
    curve = [(0, 0.4), (30_000, 0.76), (10_000, 0.3), (20_000, 0.5), (40_000, 0.7)]
    assert steps_to(curve) == {"50": 20_000, "75": 30_000, "90": None}
    lines = [point(0, 80, 200, "base"), point(0, 40), point(10_000, 31), point(20_000, 90), point(5, 1, who="policy")]
    assert lowest_acting_minus_base(lines) == pytest.approx(-0.09)
    assert lowest_acting_minus_base(lines[1:]) is None


def test_result_round_trip(tmp_path):
    result = RunResult(
        task="Lift the cube", base=SuccessRate.of(84, 200), policy=SuccessRate.of(196, 200),
        env_steps=150_000, wall_seconds=5400.0,
        steps_to={"50": 20_000, "90": None}, lowest_acting_minus_base=-0.01, config_hash="abc", run_seed=3,
        seeds={"first": 2_001_000, "last": 2_001_200}, extra={"machine": {"cpu": "8 cores"}},
    )  # fmt: skip
    result.save(tmp_path / "result.json")
    assert RunResult.load(tmp_path / "result.json") == result
    raw = json.loads((tmp_path / "result.json").read_text())
    assert raw["policy"]["success"] == 0.98
    assert raw["machine"] == {"cpu": "8 cores"}
    minimal = {
        "base": {"success": 0.42, "n": 200, "interval": [0.35, 0.49]},
        "policy": {"success": 1.0, "n": 200},
        "env_steps": 5,
    }
    assert RunResult.from_json(minimal).base.successes == 84
    with pytest.raises(ValueError, match=r"result\.json: missing policy"):
        RunResult.from_json({"base": {}, "env_steps": 1})
