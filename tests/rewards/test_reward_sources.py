"""Reward sources: what the environment's truth and a person's presses say about which observation, and sources by name."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from robot_rl.rewards import EpisodeTrace, FrameBatch, RewardSource, ScoreBatch, SourceInfo, load_source, registry, source_kinds
from robot_rl.rewards.environment import EnvironmentSource, TaskSample
from robot_rl.rewards.human import HumanSource, Press, pressed_step
from robot_rl.types import RewardKind

PERIOD = 50_000_000


def trace(length: int, start: int = 10**9) -> EpisodeTrace:
    return EpisodeTrace("e", {}, start + PERIOD * np.arange(length + 1), "lift")


def fed(source: EnvironmentSource, success_at: int | None, length: int, rewards=None) -> EnvironmentSource:
    t = trace(length)
    for i, stamp in enumerate(t.stamps_ns.tolist()):
        source.feed(
            TaskSample(stamp, float("nan") if rewards is None else rewards[i], success_at is not None and i >= success_at)
        )
    return source


def test_success_at_step_17_of_40_is_one_event_there():
    scores = fed(EnvironmentSource(), 17, 40).score_episode(trace(40))
    assert (scores.steps.tolist(), scores.value.tolist()) == ([17], [1.0])
    assert (scores.success, scores.success_step) == (True, 17)


def test_an_episode_cut_by_the_time_limit_has_no_success_and_a_verdict():
    scores = fed(EnvironmentSource(), None, 40).score_episode(trace(40))
    assert scores.steps.tolist() == []
    assert scores.success is False


def test_without_any_truth_nothing_is_known():
    scores = EnvironmentSource().score_episode(trace(10))
    assert scores.success is None
    assert not scores.valid.any()
    assert set(scores.reason) == {"no_context"}
    dense = fed(EnvironmentSource(mode="dense"), None, 10).score_episode(trace(10))
    assert not dense.valid.any(), "a simulator that gives no reward gives no zero either"


def test_other_modes():
    minus = fed(EnvironmentSource(mode="sparse_minus1"), 7, 10).score_episode(trace(10))
    assert minus.value.tolist() == [-1.0] * 6 + [0.0] + [-1.0] * 3
    rewards = np.arange(11, dtype=float)
    dense = fed(EnvironmentSource(mode="dense"), None, 10, rewards).score_episode(trace(10))
    assert dense.value.tolist() == rewards[1:].tolist()
    with pytest.raises(ValueError, match="mode='sparse'"):
        EnvironmentSource(mode="sparse")


def test_truth_between_two_observations_belongs_to_the_transition_between_them():
    source = EnvironmentSource(mode="dense")
    t = trace(4)
    for k in range(4):
        for part in (1, 2):
            source.feed(TaskSample(int(t.stamps_ns[k]) + part * PERIOD // 2, 0.5))
    assert source.score_episode(t).value.tolist() == [1.0] * 4


def test_while_the_episode_runs_only_success_speaks():
    source = fed(EnvironmentSource(), 5, 10)
    stamps = trace(10).stamps_ns
    assert not len(source.score(FrameBatch({}, np.array([4]), stamps[4:5])).steps)
    found = source.score(FrameBatch({}, np.array([6]), stamps[6:7]))
    assert (found.steps.tolist(), found.terminal) == ([6], True)


def test_a_press_is_about_what_the_person_can_have_seen():
    stamps = trace(10).stamps_ns
    at = int(stamps[6]) + 30_000_000
    assert pressed_step(at, stamps, 80.0) == 5
    assert pressed_step(at, stamps, 0.0) == 6
    source = HumanSource(operator="ann", delay_steps=2)
    source.press(Press(at, 1.0))
    source.press(Press(int(stamps[8]) + 80_000_000, -0.5, verdict=False))
    scores = source.score_episode(trace(10))
    assert (scores.success, scores.success_step) == (True, 5)
    assert (scores.steps.tolist(), scores.value.tolist()) == ([6], [-0.5])
    assert source.describe().model_id == "human:ann"
    with pytest.raises(ValueError, match=r"value=2\.0"):
        source.press(Press(1, 2.0))


def test_answers_are_finite_exactly_where_they_are_valid():
    with pytest.raises(ValueError, match="finite if and only if"):
        ScoreBatch(np.array([1]), np.array([np.nan]), np.array([True]))
    failed = ScoreBatch.failed(np.array([1, 2]), "timeout")
    assert np.isnan(failed.value).all()
    assert failed.reason == ("timeout", "timeout")


# ---- by name


def test_sources_by_name(tmp_path):
    assert load_source("environment").name == "env"
    assert load_source("human").coverage == "on_event"
    path = tmp_path / "mine.yaml"
    path.write_text("kind: environment\nname: truth\nmode: dense\n")
    assert load_source(str(path)).kind is RewardKind.DENSE
    with pytest.raises(FileNotFoundError, match=r"no reward source of that name is installed.*environment, human"):
        load_source("crystal_ball")
    for text, why in (
        ("kind: crystal_ball\n", "kind='crystal_ball' is not installed; installed are classifier, clip_goal, environment"),
        ("mode: dense\n", "accepted is a mapping with `kind`"),
        ("kind: environment\nmoed: dense\n", "moed='dense' is unknown; accepted are name, mode"),
        ("kind: environment\nname: My Source\n", "name='My Source'"),
        ("kind: environment\nmode: fast\n", "accepted are sparse01"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=why):
            load_source(str(path))


def test_another_package_can_add_a_kind(monkeypatch):
    class Steady:
        kind, coverage, needs = RewardKind.DENSE, "every_step", frozenset()

        def __init__(self, name: str, value: float = 0.5) -> None:
            self.name, self.value = name, value

        def describe(self):
            return SourceInfo("steady")

        def score(self, batch):
            n = len(batch.steps)
            return ScoreBatch(batch.steps, np.full(n, self.value, np.float32), np.ones(n, bool))

        def score_episode(self, trace):
            return ScoreBatch.none()

    module = type(sys)("steady_package")
    module.make = Steady
    monkeypatch.setitem(sys.modules, "steady_package", module)
    point = EntryPoint("steady", "steady_package:make", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    assert "steady" in source_kinds()
    source = load_source("steady")
    assert isinstance(source, RewardSource)
    assert source.name == "steady"
    module.make = lambda name: object()
    with pytest.raises(ValueError, match="does not implement"):
        load_source("steady")
