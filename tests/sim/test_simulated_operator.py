"""A simulated person takes over when an episode goes wrong, saves it, and is recorded as the one who drove."""

from __future__ import annotations

import numpy as np
import pytest
from spine_kit import FakeEnv, SmoothBase, compact

from robot_rl.learners.facts import takeovers
from robot_rl.policies.base import BasePolicy
from robot_rl.replay.store import EpisodeStore
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.sim.env import make_env, make_expert
from robot_rl.sim.operator_config import OperatorConfig
from robot_rl.sim.rollout import EpisodePlan, Rollout
from robot_rl.sim.vector import ProcessVectorEnv, VectorEnv, make_vector
from robot_rl.types import Source

STATE = "observation.state"


@pytest.fixture(scope="module")
def lost() -> BasePolicy:
    """A policy that never lifts anything."""
    env = make_env("tabletop/Lift")
    policy = compact(action=env.spec.action, state=env.spec.observation_features[STATE].shape[0], horizon=8, n_action_steps=8)
    env.close()
    return policy


def play(policy: BasePolicy, tmp_path, operator: OperatorConfig | None, seeds=range(4), envs: int = 2):
    acting, spec = ActingPolicy(policy), policy.spec
    store = EpisodeStore.create(
        tmp_path / "store", observation_features=spec.observation_features, action=spec.action, noise_shape=spec.noise_shape,
        chunk_horizon=spec.horizon, stats_hash=spec.stats_hash, sync=False,
    )  # fmt: skip
    with store, make_vector("tabletop/Lift", envs, "serial") as vector:
        plans = [EpisodePlan(s, ("training", s), acting, f"e{s}") for s in seeds]
        return Rollout(vector, vector.spec).play(plans, store=store, keep_episodes=True, operator=operator)


def test_it_takes_over_saves_the_episode_and_is_recorded(lost, tmp_path) -> None:
    alone = play(lost, tmp_path / "alone", None)
    helped = play(lost, tmp_path / "helped", OperatorConfig(patience=10))
    assert not any(o.success for o in alone)
    assert [o.human_steps for o in alone] == [0] * 4
    assert sum(o.success for o in helped) >= 3
    for before, o in zip(alone, helped, strict=True):
        human = o.episode.source == Source.HUMAN
        assert o.human_steps == human.sum() == o.episode.meta.extra["human_steps"]
        first = int(np.flatnonzero(human)[0])
        assert first == 10
        assert human[first:].all(), "whoever has taken over drives to the end"
        assert takeovers(o.episode).tolist() == [9]
        np.testing.assert_allclose(o.episode.action[:first], before.episode.action[:first], atol=1e-6)
        np.testing.assert_array_equal(o.episode.action[first:], o.episode.action_human[first:])


def test_an_episode_does_not_depend_on_who_plays_beside_it(lost, tmp_path) -> None:
    operator = OperatorConfig(patience=8, skill=0.5, noise=0.2, share=0.5)
    many = play(lost, tmp_path / "many", operator, range(6), 3)
    (one,) = play(lost, tmp_path / "one", operator, [4], 1)
    assert one.human_steps == many[4].human_steps
    np.testing.assert_allclose(one.episode.action[:20], many[4].episode.action[:20], atol=1e-5)
    assert {o.human_steps > 0 for o in many} == {True, False}, "half of the episodes are watched"


def test_a_person_may_only_help_to_the_next_stage(lost, tmp_path) -> None:
    """Whoever hands back after a stage drives less, rests for a step, and comes again where the policy is lost again."""
    whole = play(lost, tmp_path / "whole", OperatorConfig(patience=10))
    brief = play(lost, tmp_path / "brief", OperatorConfig(patience=10, hand_back="stage"))
    assert sum(o.human_steps for o in brief) < sum(o.human_steps for o in whole)
    for o in brief:
        source, driven = o.episode.source, o.episode.source == Source.HUMAN
        assert o.human_steps == driven.sum()
        ends = np.flatnonzero(driven[:-1] & ~driven[1:]) + 1
        assert (source[ends] == Source.HOLD).all()
        begins = np.flatnonzero(~driven[:-1] & driven[1:]) + 1
        assert o.episode.intervention_id[begins].tolist() == list(range(len(begins)))
        assert takeovers(o.episode).tolist() == (begins - 1).tolist()
        assert (np.diff(np.sort([*begins, *ends]))[1::2] >= 10).all(), "patience begins anew"
    assert any((o.episode.source == Source.HOLD).any() for o in brief)


@pytest.mark.parametrize("task", ["tabletop/Lift", "tabletop/Drawer", "tabletop/PlaceInBin"])
def test_whoever_takes_over_goes_on_from_where_the_robot_is(task) -> None:
    """From any step of a good attempt another person ends it, without moving away from the object and without letting it go."""
    env = make_env(task)
    low, high = np.array(env.spec.action.low), np.array(env.spec.action.high)
    ended = []
    for step in (2, 14, 20, 24, 27):
        first, second = make_expert(env), make_expert(env)
        observation, _ = env.reset(seed=11)
        first.reset(env, np.random.default_rng(0))
        for _ in range(step):
            observation, *_ = env.step(np.clip(first.act(observation), low, high).astype(np.float32))
        held, phase = all(env.touching(env.graspable)), first.phase
        second.take_over(env, np.random.default_rng(1))
        ended.append(second.phase)
        assert (second.phase == "close") == held
        assert held or phase not in ("descend", "close") or second.phase == "descend"
        over, success = False, False
        while not over:
            action = np.clip(second.act(observation), low, high).astype(np.float32)
            if held:
                assert action[4] == 0.0, "what is in the hand stays there"
                held = env.spec.env_id != "tabletop/PlaceInBin"  # where it is let go in the end
            observation, _, terminated, truncated, info = env.step(action)
            over, success = terminated or truncated, bool(info["success"])
        assert success, (step, phase)
    assert {"reach", "close"} <= set(ended)
    env.close()


def test_progress_is_waited_for(lost, tmp_path) -> None:
    """A new stage of the task starts the patience anew; being in one seen before does not."""
    from robot_rl.sim.operator import SimulatedOperator

    env = make_env("tabletop/Lift")
    person = SimulatedOperator(OperatorConfig(patience=3), env, ("k",))
    waited = []
    for stage in ("reach", "reach", "grasp", "reach", "reach", "reach"):
        person.saw(stage)
        waited.append(person._waited)
    assert waited == [1, 2, 0, 1, 2, 3]
    env.close()


def test_who_knows_a_setback_comes_soon_and_does_not_take_it_for_progress(lost) -> None:
    from robot_rl.sim.operator import SimulatedOperator

    env = make_env("tabletop/Lift")
    assert env.spec.setbacks == ("dropped",)
    stages = ("reach", "grasp", "lift", "dropped", "dropped", "dropped")
    waited = {}
    for reaction in (0, 2):
        person = SimulatedOperator(OperatorConfig(patience=30, reaction=reaction), env, ("k",))
        for stage in stages:
            person.saw(stage)
            calls = 0 < reaction <= person._lost
            waited[reaction] = (*waited.get(reaction, ()), (person._waited, calls))
    assert waited[0] == ((1, False), (0, False), (0, False), (0, False), (1, False), (2, False))
    assert waited[2] == ((1, False), (0, False), (0, False), (1, False), (2, True), (3, True))
    env.close()


def test_a_person_tires_and_rests(lost) -> None:
    from robot_rl.sim.operator import SimulatedOperator

    env = make_env("tabletop/Lift")
    config = OperatorConfig(patience=20, reaction=4, noise=0.1, fatigue=0.5, spell=1000)
    people = [SimulatedOperator(config, env, ("k",), watched) for watched in (0, 500, 999, 1000)]
    assert [p.patience for p in people] == [20, 25, 30, 20]
    assert [p.reaction for p in people] == [4, 5, 6, 4]
    assert [round(p.expert.noise, 3) for p in people] == [0.1, 0.125, 0.15, 0.1]
    env.close()


def test_a_person_overlooks_and_errs(lost, tmp_path) -> None:
    """Overlooked moments come again as late as the first; takeovers for nothing come before patience is over."""
    sure = play(lost, tmp_path / "sure", OperatorConfig(patience=10), range(8), 4)
    careless = play(lost, tmp_path / "careless", OperatorConfig(patience=10, overlooked=0.6), range(8), 4)
    hasty = play(lost, tmp_path / "hasty", OperatorConfig(patience=10, mistaken=0.2), range(8), 4)

    def first(outcomes) -> list[int]:
        return [int(np.flatnonzero(o.episode.source == Source.HUMAN)[0]) if o.human_steps else -1 for o in outcomes]

    assert first(sure) == [10] * 8
    assert {t for t in first(careless) if t >= 0} <= {10, 20, 30, 40, 50, 60}
    assert max(first(careless)) > 10
    assert min(first(hasty)) < 10
    assert max(first(hasty)) <= 10
    again = play(lost, tmp_path / "again", OperatorConfig(patience=10, mistaken=0.2), range(8), 4)
    assert first(again) == first(hasty)


def test_refusals(lost) -> None:
    with pytest.raises(ValueError, match="patience=-1"):
        OperatorConfig(patience=-1)
    with pytest.raises(ValueError, match=r"reaction=3, fatigue=0\.5 with patience=0"):
        OperatorConfig(reaction=3, fatigue=0.5)
    with pytest.raises(ValueError, match="mistaken=1"):
        OperatorConfig(patience=1, mistaken=1.0)
    with pytest.raises(ValueError, match="spell=0"):
        OperatorConfig(patience=1, spell=0)
    with pytest.raises(ValueError, match="hand_back='later'"):
        OperatorConfig(hand_back="later")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share=0"):
        OperatorConfig(share=0.0)
    processes = object.__new__(ProcessVectorEnv)
    with pytest.raises(ValueError, match="serial, threads"):
        Rollout(processes, None)._operator(OperatorConfig(patience=1), 0, EpisodePlan(0, (0,), ActingPolicy(lost)))  # type: ignore[arg-type]
    vector = VectorEnv([FakeEnv()])
    plan, player = EpisodePlan(0, (0,), ActingPolicy(SmoothBase())), Rollout(vector, vector.spec)
    with pytest.raises(ValueError, match="no scripted expert"):
        player.play([plan], operator=OperatorConfig(patience=1))
