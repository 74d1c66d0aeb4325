"""The arbiter in the control loop: what the recorded episode says about who did what, and the devices' small parts."""

from __future__ import annotations

import numpy as np
import pytest
from spine_kit import FakeEnv, SmoothBase

from robot_rl.intervention.arbiter import ArbiterConfig, OperatorArbiter, Request
from robot_rl.intervention.blending import Rotation, blend, min_jerk
from robot_rl.intervention.devices import DeviceSample, Hysteresis, RateMeter, align_step, deflection, joint_gap, profile
from robot_rl.intervention.metrics import measure
from robot_rl.replay import EpisodeStore
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.chunk_scheduler import ChunkScheduler
from robot_rl.runtime.control_loop import ControlLoop
from robot_rl.runtime.safety import SafetyConfig, SafetyFilter
from robot_rl.types import EpisodeMeta, Source

PERIOD = 50_000_000


def play(tmp_path, steps=40, first=8, last=15, lose=False):
    base, env = SmoothBase(), FakeEnv(steps)
    spec = base.spec
    arbiter = OperatorArbiter(spec.action, ArbiterConfig(handback_s=0.2))
    loop = ControlLoop(
        spec.action, ChunkScheduler(spec.action, 4), SafetyFilter(SafetyConfig(), spec.action, 20.0),
        n_obs_steps=spec.n_obs_steps, arbiter=arbiter,
    )  # fmt: skip
    policy = ActingPolicy(base)
    hand = np.full(spec.action.dim, 0.25, np.float32)
    store = EpisodeStore.create(
        tmp_path / "store", observation_features=spec.observation_features, action=spec.action,
        noise_shape=spec.noise_shape, chunk_horizon=spec.horizon, sync=False,
    )  # fmt: skip
    with store:
        observation, now = env.reset(seed=0)[0], PERIOD
        loop.begin(observation, key=("x", 0), recorder=store.begin(EpisodeMeta("e", control_hz=20.0)), stamp_ns=now)
        late = None
        for t in range(steps):
            held = first <= t < last
            if not (lose and held and t > first + 1):
                arbiter.offer(
                    DeviceSample(now, now, "joy", profile("joy"), held, held, hand if held else None, not held, "ann")
                )
            if loop.wants_chunk:
                decision = policy.decide([loop.request()])[0]
                if t == last - 1:
                    late = decision  # computed before the hand-back, arrives after it
                else:
                    loop.accept(decision)
            if t == last and late is not None:
                pass
            command = loop.tick(now)
            if t == last and late is not None:
                assert not loop.accept(late), "a chunk from before the hand-back must not run"
            now += PERIOD
            loop.observe(*env.step(command)[:4], now)
        loop.finish(background=False)
        return store.read("e"), hand


def test_the_episode_says_who_did_what(tmp_path):
    episode, hand = play(tmp_path)
    source = episode.source
    assert (source[8:15] == Source.HUMAN).all()
    assert set(source[15:18]) <= {Source.BLEND, Source.HOLD}
    assert (source[25:] == Source.POLICY).all()
    human = source == Source.HUMAN
    np.testing.assert_allclose(episode.action_human[human], np.broadcast_to(hand, episode.action_human[human].shape))
    np.testing.assert_allclose(episode.action[human], episode.action_human[human])
    assert np.isnan(episode.action_human[~human]).all()
    policy = source == Source.POLICY
    np.testing.assert_allclose(episode.action[policy], episode.action_policy[policy])
    assert set(episode.intervention_id[human]) == {0}
    assert set(episode.intervention_id[policy]) == {-1}
    assert np.isfinite(episode.action_policy[10:14]).any(), "the policy goes on in the shadow"
    kept = episode.meta.extra["interventions"]
    assert [(k["device"], k["operator"], k["first_step"], k["end"]) for k in kept] == [("joy", "ann", 8, "released")]
    found = measure(episode)
    assert (found.count, found.first_step, found.mean_length, found.retaken) == (1, 8, 7.0, 0)
    assert found.human_share == pytest.approx(7 / 40)


def test_a_lost_device_is_recorded_as_hold(tmp_path):
    episode, _ = play(tmp_path, lose=True)
    assert (episode.source[8:12] == Source.HUMAN).all()  # fresh for 0.1 s after the last message
    assert (episode.source[12:] == Source.HOLD).all()
    assert np.isnan(episode.action_human[12:]).all()


def test_stop_is_asked_for_by_anyone_and_ends_the_episode():
    action = SmoothBase().spec.action
    arbiter = OperatorArbiter(action)
    arbiter.post(Request.ESTOP)
    loop = ControlLoop(action, ChunkScheduler(action, 4), SafetyFilter(SafetyConfig(), action, 20.0), arbiter=arbiter)
    loop.begin(FakeEnv(3).reset(seed=0)[0], key=(0,), stamp_ns=1)
    loop.tick(PERIOD)
    assert arbiter.end_requested == "estop"


def test_blending():
    assert [min_jerk(x) for x in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    none = np.zeros(4, bool)
    quarter = blend(np.array([0, 0, 0, 1.0]), np.array([0, 0, 1.0, 0]), 0.5, none, [Rotation(0, "quaternion")])
    np.testing.assert_allclose(quarter, [0, 0, np.sqrt(0.5), np.sqrt(0.5)], atol=1e-6)
    # From just above to just below half a turn the short way crosses it, where plain averaging would turn all the way back.
    across = blend(np.array([0, 0, 3.0]), np.array([0, 0, -3.0]), 0.5, none[:3], [Rotation(0, "rotvec")])
    assert abs(across[2]) == pytest.approx(np.pi, abs=1e-5)


def test_raw_input():
    np.testing.assert_allclose(deflection([0.05, -0.1, 0.55, -2.0], 0.1), [0, 0, 0.5, -1])
    with pytest.raises(ValueError, match="finite"):
        deflection([float("nan")], 0.1)
    engaged = Hysteresis(0.1)
    assert [engaged(n) for n in (0.09, 0.11, 0.06, 0.04, 0.06)] == [False, True, True, False, False]
    meter = RateMeter()
    for i in range(10):
        meter.tick(i * 50_000_000)
    assert (meter.hz, meter.slow, meter.stale_s) == (20.0, True, 0.15)
    with pytest.raises(ValueError, match="device='mouse'"):
        profile("mouse")


def test_alignment_comes_closer_every_tick_and_names_the_joint():
    leader, follower = {"a": 1.0, "b": 0.0, "extra": 3.0}, {"a": 0.0, "b": 0.1}
    assert joint_gap(leader, follower) == (1.0, "a")
    with pytest.raises(ValueError, match=r"leader lacks joints \['c'\]"):
        joint_gap(leader, {"c": 0.0})
    left, gaps = 1.0, []
    while left > 0:
        leader = align_step(leader, follower, left, 0.1)
        left -= 0.1
        gaps.append(joint_gap(leader, follower)[0])
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == pytest.approx(0.0, abs=1e-9)
    assert max(np.diff([1.0, *gaps])) <= 0
    assert min(np.diff([1.0, *gaps])) >= -0.11
