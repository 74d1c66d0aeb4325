"""Self-practice: the two directions alternate, success rises without a reset, and a person is called when it is stuck."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from robot_rl.replay import EpisodeStore
from robot_rl.rewards.rule import RuleSource
from robot_rl.rewards.source import ScoreBatch, SourceInfo
from robot_rl.runtime.practice import Practice, PracticeConfig, Progress, Task
from robot_rl.types import ActionSpec, Decision, FeatureSpec, RewardKind

STATE = "observation.state"
ACTION = ActionSpec((-0.2, -0.2), (0.2, 0.2), mode=("delta", "delta"))


class Puck:
    """A puck in the plane that drifts a little; it can be pushed off the table, at 2 m."""

    action, control_hz = ACTION, 10.0

    def __init__(self, seed: int = 0) -> None:
        self.rng, self.at, self.stuck = np.random.default_rng(seed), np.array([-1.0, 0.0]), False

    def observe(self):
        return {STATE: self.at.astype(np.float32)}

    def step(self, command):
        if not self.stuck:
            self.at = self.at + command + self.rng.normal(0, 0.01, 2)
        return self.observe()

    def trouble(self) -> str:
        return "the puck is off the table" if np.abs(self.at).max() > 2.0 else ""


class Aim:
    """Drives towards a place with a fixed error, its parameter; explores around it."""

    def __init__(self, goal: np.ndarray, spread: float, rng: np.random.Generator) -> None:
        self.goal, self.spread, self.rng = goal, spread, rng
        self.tried = goal

    def draw(self) -> Aim:
        self.tried = self.goal + self.rng.normal(0, self.spread, 2)
        return self

    def decide(self, requests):
        wish = np.clip(self.tried - requests[0].observation[STATE][-1], -0.2, 0.2).astype(np.float32)
        return [Decision(step=r.step, noise=None, chunk_base=wish[None], chunk=wish[None]) for r in requests]


def near(place: float) -> RuleSource:
    def side(op: str, value: float, axis: int):
        return {"field": f"{STATE}[{axis}]", "op": op, "value": value}

    low, high = place - 0.15, place + 0.15
    return RuleSource([side(">", low, 0), side("<", high, 0), side(">", -0.15, 1), side("<", 0.15, 1)], frames=2)


@pytest.fixture
def stores(tmp_path):
    opened = [
        EpisodeStore.create(tmp_path / name, observation_features={STATE: FeatureSpec((2,))}, action=ACTION, sync=False)
        for name in ("forward", "backward")
    ]
    yield opened
    for store in opened:
        store.close()


@pytest.mark.parametrize("attempts", [70, pytest.param(200, marks=pytest.mark.slow)])
def test_attempts_without_a_reset_get_better(stores, attempts):
    """Both policies begin with an aim that is off, and learn from what their judges called a success (filtered cloning)."""
    rng = np.random.default_rng(0)
    aims = {"forward": Aim(np.array([0.8, 0.3]), 0.25, rng), "backward": Aim(np.array([-0.7, -0.2]), 0.25, rng)}
    good = {"forward": [], "backward": []}
    seen = []

    def learned(attempt):
        seen.append((attempt.direction, attempt.success))
        if attempt.success:
            aim = aims[attempt.direction]
            good[attempt.direction].append(attempt.episode.observations[STATE][-1])
            aim.goal = np.mean(good[attempt.direction][-10:], 0)
            aim.spread = max(0.03, 0.75 * aim.spread)

    robot, calls = Puck(), []
    tasks = [
        Task("go", aims["forward"].draw, near(1.0), stores[0]),
        Task("come back", aims["backward"].draw, near(-1.0), stores[1]),
    ]
    config = PracticeConfig(attempt_s=2.0, failed_resets=12, attempts=attempts)
    done = Practice(robot, *tasks, config, call=calls.append, learned=learned).run()
    assert done.attempts == len(seen) == attempts
    assert calls == []
    first, last = (np.mean([s for _, s in part]) for part in (seen[:25], seen[-20:]))
    assert first < 0.7
    assert last > 0.8
    for before, after in itertools.pairwise(seen):  # after a success the other, after a failed reset the reset again
        if before[1]:
            assert before[0] != after[0]
        elif before[0] == "backward":
            assert after[0] == "backward"
    assert len(stores[0]) + len(stores[1]) == attempts
    name = next(n for n in stores[0].episode_ids() if stores[0].meta(n).success)
    episode = stores[0].read(name)
    assert episode.reward[-1] == 1.0
    assert episode.terminated[-1]
    assert {e.source: e.value for e in stores[0].rewards(name) if e.valid} == {"rule": 1.0}


def test_a_person_is_called_when_resets_fail_or_the_scene_is_lost(stores):
    rng = np.random.default_rng(0)
    robot, calls = Puck(), []
    goals = {"forward": np.array([1.0, 0.0]), "backward": np.array([-1.0, 0.0])}
    tasks = [
        Task(name, Aim(goals[name], 0.0, rng).draw, near(goals[name][0]), store)
        for name, store in zip(goals, stores, strict=True)
    ]
    practice = Practice(robot, *tasks, PracticeConfig(attempt_s=2.0, failed_resets=3), call=calls.append)
    assert practice.attempt().success
    robot.stuck = True
    done = practice.run()
    assert calls == ["3 backward attempts in a row did not succeed"]
    assert (done.attempts, done.tried["backward"], done.in_a_row["backward"]) == (4, 3, 3)
    with pytest.raises(RuntimeError, match="a person is called"):
        practice.attempt()
    robot.stuck, robot.at = False, np.array([-1.0, 0.0])
    practice.helped()
    goals["forward"][:] = 3.0  # off the table
    lost = practice.attempt()
    assert (lost.direction, lost.success, lost.end) == ("forward", False, "trouble")
    assert calls[-1] == "the puck is off the table"


def test_a_forward_attempt_that_moved_nothing_is_tried_again_and_a_stalled_one_ends_early(stores):
    robot, rng = Puck(), np.random.default_rng(0)
    robot.at = np.array([-0.98, 0.0])
    stay = Aim(np.array([-0.98, 0.0]), 0.0, rng)
    forward = Task("go", stay.draw, near(1.0), stores[0], value=lambda o: -abs(float(o[STATE][0]) - 1.0))
    robot.stuck = True
    practice = Practice(robot, forward, Task("back", stay.draw, near(-1.0), stores[1]), PracticeConfig(stall_decisions=5))
    first = practice.attempt()
    assert (first.end, first.success, first.steps) == ("stalled", False, 6)
    assert practice.progress.direction == "forward"  # the backward judge sees nothing to undo


class Late:
    """A judge that speaks of whole episodes, or breaks: a VLM."""

    name, kind, coverage, needs = "vlm", RewardKind.SUCCESS, "episode", frozenset({STATE})

    def __init__(self) -> None:
        self.answers = [True, None, RuntimeError("server is gone")]

    def describe(self):
        return SourceInfo("vlm:test")

    def score(self, batch):
        raise AssertionError("is asked when the attempt is over")

    def score_episode(self, trace):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            return ScoreBatch.failed(np.array([trace.length]), "timeout")
        one = np.array([trace.length])
        return ScoreBatch(one, np.ones(1, np.float32), np.ones(1, bool), ("",), True, trace.length)


def test_a_judge_of_whole_episodes_is_asked_at_the_end_and_what_it_does_not_know_is_not_a_failure(stores):
    rng, judge = np.random.default_rng(0), Late()
    forward = Task("go", Aim(np.array([1.0, 0.0]), 0.0, rng).draw, judge, stores[0])
    back = Task("back", Aim(np.array([-1.0, 0.0]), 0.0, rng).draw, near(-1.0), stores[1])
    practice = Practice(Puck(), forward, back, PracticeConfig(attempt_s=2.0))
    done = [practice.attempt() for _ in range(6)]
    told = [(a.success, a.episode.reward[-1], stores[0].meta(a.episode.meta.episode_id).success) for a in done[::2]]
    assert told == [(True, 1.0, True), (None, 0.0, None), (None, 0.0, None)]
    reasons = [[e.reason for e in stores[0].rewards(a.episode.meta.episode_id) if not e.valid] for a in done[2::2]]
    assert reasons[0] == ["timeout"]
    assert set(reasons[1]) == {"error"}


def test_wrong_settings_are_refused(stores):
    with pytest.raises(ValueError, match=r"failed_resets=0: accepted are integers >= 1"):
        PracticeConfig(failed_resets=0)
    judge = SimpleNamespace(name="p", kind=RewardKind.POTENTIAL)
    with pytest.raises(ValueError, match=r"backward.judge='p' is of kind potential: accepted is success"):
        Practice(Puck(), Task("a", lambda: None, near(1.0), stores[0]), Task("b", lambda: None, judge, stores[1]))
    assert Progress(**Progress().to_json()) == Progress()
