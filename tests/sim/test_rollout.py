"""Rollouts: plans in their order, every episode the same whoever plays beside it, and stored completely."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spine_kit import ARM, STATE, FakeEnv, SmoothBase

from robot_rl.heads.config import LatentNoiseConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.policies.checkpoint import build_policy
from robot_rl.policies.config import CompactPolicyConfig
from robot_rl.policies.normalizer import Normalizer
from robot_rl.replay.store import EpisodeStore
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.sim.rollout import EpisodePlan, Rollout
from robot_rl.sim.tabletop.core import TabletopEnv
from robot_rl.sim.vector import VectorEnv, make_vector


def plans(policy: ActingPolicy, count: int, ids: bool = False) -> list[EpisodePlan]:
    return [EpisodePlan(i, ("training", i), policy, f"e{i}" if ids else "") for i in range(count)]


class Lengths(FakeEnv):
    """Episodes of different lengths: seed k lasts 3 + 2 (k mod 4) steps and every third one succeeds."""

    def reset(self, *, seed: int):
        self.length = 3 + 2 * (seed % 4)
        self.success_at = self.length if seed % 3 == 0 else None
        return super().reset(seed=seed)


def rollout(envs: int, env=Lengths) -> Rollout:
    vector = VectorEnv([env() for _ in range(envs)])
    return Rollout(vector, vector.spec)


def test_results_come_in_the_order_of_the_plans() -> None:
    """Row 6 too: no environment is stepped after its end, or it would raise."""
    ended: list[int] = []
    player = rollout(3)
    outcomes = player.play(plans(ActingPolicy(SmoothBase()), 10), on_outcome=lambda o: ended.append(o.plan.seed))
    assert [o.plan.seed for o in outcomes] == list(range(10))
    assert ended != sorted(ended)
    assert [o.length for o in outcomes] == [3 + 2 * (k % 4) for k in range(10)]
    assert [o.success for o in outcomes] == [k % 3 == 0 for k in range(10)]
    assert [o.end for o in outcomes] == ["success" if k % 3 == 0 else "time limit" for k in range(10)]
    assert [o.start for o in outcomes] == [{"seed": float(k)} for k in range(10)]
    assert player.env_steps == sum(o.length for o in outcomes)


def test_row_28_success_is_counted_once_by_the_tasks_rule() -> None:
    """A task that goes on after success, and one that pays more than 1 without it."""

    class GoesOn(FakeEnv):
        def step(self, action):
            observation, _, _, _, _ = super().step(action)
            self.ended = self.steps >= 50
            success = self.steps == 10 and self.seed == 0
            return observation, 0.5 if self.seed else float(success), False, self.ended, {"success": success}

    player = rollout(1, lambda: GoesOn(length=1000))
    good, bad = player.play(plans(ActingPolicy(SmoothBase()), 2))
    assert (good.success, good.episode_return, good.length, good.end) == (True, 1.0, 50, "success")
    assert (bad.success, bad.episode_return, bad.end) == (False, 25.0, "time limit")


def test_row_4_what_is_stored_replays_and_row_21_is_complete(tmp_path) -> None:
    """Every decision's noise gives its chunk; one base call a batch of decisions; L rows and L + 1 observations."""
    base = SmoothBase()
    store = EpisodeStore.create(
        tmp_path / "s", observation_features=base.spec.observation_features, action=ARM, noise_shape=(3, 3), chunk_horizon=3,
        stats_hash="stats", sync=False,
    )  # fmt: skip
    with store:
        outcomes = rollout(1).play(plans(ActingPolicy(base), 3, ids=True), store=store, keep_episodes=True)
        store.flush()
        decisions = 0
        for o in outcomes:
            episode = store.read(o.plan.episode_id)
            decisions += len(episode.decisions)
            assert len(episode) == o.length == len(episode.observations[STATE]) - 1
            assert episode.meta.success == o.success
            assert (episode.meta.base_hash, episode.meta.stats_hash, episode.meta.seed) == ("smooth-0", "stats", o.plan.seed)
            np.testing.assert_array_equal(episode.action, o.episode.action)
            for d in episode.decisions:
                seen = torch.from_numpy(episode.observations[STATE][d.step][None])
                chunk = base.unnormalize_action(base.sample(base.encode({STATE: seen}), torch.from_numpy(d.noise[None])))
                np.testing.assert_allclose(chunk[0], d.chunk, atol=1e-5)
                base.calls -= 1
        assert base.calls == decisions


def test_stopping_aborts_what_runs_and_keeps_what_is_complete(tmp_path) -> None:
    base = SmoothBase()
    store = EpisodeStore.create(
        tmp_path / "s",
        observation_features=base.spec.observation_features,
        action=ARM,
        noise_shape=(3, 3),
        chunk_horizon=3,
        sync=False,
    )
    with store:
        done: list[int] = []
        outcomes = rollout(2).play(
            plans(ActingPolicy(base), 6, ids=True), store=store, on_outcome=lambda o: done.append(o.plan.seed),
            should_stop=lambda: len(done) >= 2,
        )  # fmt: skip
        store.flush()
        assert sorted(o.plan.seed for o in outcomes) == sorted(done)
        assert len(done) < 6
        assert set(store.episode_ids()) == {f"e{k}" for k in done}
        assert not list((tmp_path / "s" / "wal").glob("*.wal"))


def test_policies_are_not_mixed_up() -> None:
    one, two = SmoothBase(seed=0), SmoothBase(seed=1)
    a, b = ActingPolicy(one), ActingPolicy(two)
    mixed = rollout(4).play([EpisodePlan(i, ("x", i), (a, b)[i % 2]) for i in range(6)])
    apart = {0: rollout(1).play(plans(a, 6)), 1: rollout(1).play(plans(b, 6))}
    assert [o.length for o in mixed] == [apart[i % 2][i].length for i in range(6)]
    assert one.calls > 0 < two.calls


@pytest.fixture(scope="module")
def lift_policy():
    """A tiny random policy of tabletop/Lift, with a head."""
    with make_vector("tabletop/Lift", 1, "serial") as vector:
        spec = vector.spec
    features = dict(spec.observation_features)
    names = [n for n, f in features.items() if f.dtype != "uint8"]
    zeros, ones = {n: np.zeros(features[n].shape) for n in names}, {n: np.ones(features[n].shape) for n in names}
    torch.manual_seed(0)
    config = CompactPolicyConfig(horizon=8, n_action_steps=8, width=16, depth=1, num_steps=2, train_steps=10)
    normalizer = Normalizer(features, zeros, ones, np.array(spec.action.low), np.array(spec.action.high))
    base = build_policy(config, features, spec.action, normalizer).freeze()
    return base, LatentNoiseHead(base, LatentNoiseConfig(hidden=(8,)), generator=torch.Generator().manual_seed(0))


def test_real_task_is_deterministic_and_independent_of_the_number_of_robots(lift_policy) -> None:
    base, head = lift_policy

    def play(envs: int):
        with make_vector("tabletop/Lift", envs, "serial") as vector:
            policy = ActingPolicy(base, head, "explore", 1)
            return Rollout(vector, vector.spec).play([EpisodePlan(100 + i, ("evaluation", i), policy) for i in range(4)])

    one, again, four = play(1), play(1), play(4)
    for a, b, c in zip(one, again, four, strict=True):
        assert (a.length, a.success, a.episode_return, a.start) == (b.length, b.success, b.episode_return, b.start)
        assert (a.success, a.start) == (c.success, c.start)


@pytest.mark.parametrize("n_obs", [1, 2])
def test_pictures_that_nobody_looks_at_are_not_drawn_and_change_nothing(n_obs, tmp_path, monkeypatch) -> None:
    """A policy that is asked every 8 steps plays the same episodes, from an eighth of the pictures; a recording has all of them."""
    drawn = []

    def picture(self, camera, width, height, data, *, fine=False):
        drawn.append(camera)  # the picture tells the time, so a stale one would change what the policy does
        return np.full((height, width, 3), 3 * self._steps % 256, np.uint8)

    monkeypatch.setattr(TabletopEnv, "picture", picture)
    options = {"cameras": ["front"], "image_size": 16, "max_episode_steps": 26}
    with make_vector("tabletop/Lift", 2, "serial", **options) as vector:
        spec = vector.spec
        features = dict(spec.observation_features)
        zeros, ones = {STATE: np.zeros(features[STATE].shape)}, {STATE: np.ones(features[STATE].shape)}
        torch.manual_seed(0)
        config = CompactPolicyConfig(
            horizon=8, n_action_steps=8, n_obs_steps=n_obs, width=16, depth=1, num_steps=2, train_steps=10, image_dim=8
        )
        normalizer = Normalizer(features, zeros, ones, np.array(spec.action.low), np.array(spec.action.high))
        policy = ActingPolicy(build_policy(config, features, spec.action, normalizer).freeze())
        rollout = Rollout(vector, spec)
        few = [(o.length, o.success, o.episode_return) for o in rollout.play(plans(policy, 3))]
        sparse = len(drawn)
        monkeypatch.setattr(type(vector), "look", lambda self, wanted: None)
        assert few == [(o.length, o.success, o.episode_return) for o in rollout.play(plans(policy, 3))]
        every = len(drawn) - sparse
        assert every == sum(length + 1 for length, *_ in few)
        assert sparse <= (n_obs + 1) * every / 8 + 3
        monkeypatch.undo()
        monkeypatch.setattr(TabletopEnv, "picture", picture)
        with EpisodeStore.create(
            tmp_path, observation_features=features, action=spec.action, noise_shape=(8, 5), chunk_horizon=8
        ) as store:
            rollout.play(plans(policy, 1, ids=True), store=store)
        with EpisodeStore.open(tmp_path) as store:
            episode = store.read("e0")
        pictures = episode.observations["observation.images.front"][:, 0, 0, 0]
        np.testing.assert_array_equal(pictures, 3 * np.arange(len(episode) + 1) % 256)
