"""The Gymnasium adapter against Gymnasium itself."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed")

from robot_rl.sim.env import Environment, make_env  # noqa: E402

STATE = "observation.state"
DATA = Path(os.environ.get("ROBOT_RL_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))


def _actions(env, n, seed=0):
    spec = env.spec.action
    return np.random.default_rng(seed).uniform(spec.low, spec.high, (n, spec.dim)).astype(np.float32)


@pytest.fixture(scope="module")
def door():
    pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed")
    env = make_env("gymnasium/AdroitHandDoor-v1")
    yield env
    env.close()


def _roll(env, actions):
    rows = []
    for a in actions:
        observation, reward, terminated, truncated, _ = env.step(a)
        rows.append(np.r_[observation[STATE], reward, terminated, truncated])
    return np.array(rows)


def test_spec_of_the_door(door):
    assert isinstance(door, Environment)
    feature = door.spec.observation_features[STATE]
    assert feature.shape == (39,)
    assert len(set(feature.names)) == 39
    assert door.spec.action.dim == 28
    assert set(door.spec.action.low) == {-1.0}
    assert set(door.spec.action.high) == {1.0}
    assert set(door.spec.action.mode) == {"absolute"}
    assert door.spec.max_episode_steps == 200
    observation, info = door.reset(seed=3)
    assert observation[STATE].dtype == np.float32
    assert set(info["start"]) == {"frame_x", "frame_y", "frame_z"}
    assert info["success"] is False


def test_same_states_as_gymnasium_itself(door):
    own = gymnasium.make("AdroitHandDoor-v1", disable_env_checker=True)
    native, _ = own.reset(seed=11)
    observation, _ = door.reset(seed=11)
    np.testing.assert_array_equal(observation[STATE], native.astype(np.float32))
    for action in _actions(door, 60):
        native = own.step(action)[0]
        observation = door.step(action)[0]
    np.testing.assert_array_equal(observation[STATE], native.astype(np.float32))
    np.testing.assert_array_equal(door.unwrapped.data.qpos, own.unwrapped.data.qpos)


def test_seed_fixes_the_start_whatever_happened_before(door):
    first, info = door.reset(seed=5)
    other, other_info = door.reset(seed=6)
    assert info["start"] != other_info["start"]
    assert not np.array_equal(first[STATE], other[STATE])
    _roll(door, _actions(door, 37))
    again, info_again = door.reset(seed=5)
    np.testing.assert_array_equal(first[STATE], again[STATE])
    assert info["start"] == info_again["start"]


@pytest.mark.parametrize("name", ["AdroitHandDoor-v1", "Ant-v5", "Pendulum-v1"])
def test_state_restores_bit_for_bit(name):
    options = {"env_options": {"terminate_when_unhealthy": False}} if name == "Ant-v5" else {}
    env = make_env(f"gymnasium/{name}", max_episode_steps=120, **options)
    actions = _actions(env, 80)
    env.reset(seed=2)
    _roll(env, actions[:20])
    state = env.get_state()
    expected = _roll(env, actions[20:50])
    env.reset(seed=9)
    _roll(env, actions[50:])
    env.set_state(state)
    np.testing.assert_array_equal(_roll(env, actions[20:50]), expected)


def test_time_limit_truncates_and_a_finished_episode_is_never_stepped():
    env = make_env("gymnasium/HalfCheetah-v5", max_episode_steps=7)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(6, np.float32))
    env.reset(seed=0)
    rows = _roll(env, _actions(env, 7))
    assert rows[:, -1].tolist() == [0] * 6 + [1]
    assert not rows[:, -2].any()
    with pytest.raises(RuntimeError, match="ended"):
        env.step(np.zeros(6, np.float32))


def test_dense_reward_is_kept_where_no_success_is_reported():
    env = make_env("gymnasium/HalfCheetah-v5")
    own = gymnasium.make("HalfCheetah-v5")
    env.reset(seed=1)
    own.reset(seed=1)
    for action in _actions(env, 10):
        _, reward, _, _, info = env.step(action)
        assert reward == own.step(action)[1]
        assert info["success"] is False


def _demonstrated_success():
    path = DATA / "adroit_door_human" / "demos.npz"
    if not path.is_file():
        pytest.skip(f"recorded demonstrations are absent: {path} (set ROBOT_RL_DATA)")
    with np.load(path, allow_pickle=False) as demos:
        which = 8  # a recording that opens the door when its actions are replayed from its start
        ends = demos["episode_ends"]
        state = {
            "qpos": demos["init_qpos"][which],
            "qvel": demos["init_qvel"][which],
            "door_body_pos": demos["init_door_body_pos"][which],
        }
        return state, demos["actions"][ends[which - 1] : ends[which]].astype(np.float32)


@pytest.mark.parametrize("terminates", [True, False])
def test_first_success_is_rewarded_once(door, terminates):
    state, actions = _demonstrated_success()
    env = make_env("gymnasium/AdroitHandDoor-v1", max_episode_steps=300, success_terminates=terminates)
    env.reset(seed=0)
    env.unwrapped.set_env_state(state)
    rewards, ends, angles = [], [], []
    for action in actions:
        _, reward, terminated, truncated, info = env.step(action)
        angles.append(env.unwrapped.data.qpos[env.unwrapped.door_hinge_addrs])
        rewards.append(reward)
        ends.append(terminated)
        assert info["success"] == (max(angles) >= 1.35)
        if terminated or truncated:
            break
    assert max(angles) >= 1.35
    assert sum(rewards) == 1.0
    assert any(ends) is terminates
    if terminates:
        assert rewards[-1] == 1.0
        assert ends[-1]


def test_bad_input_is_refused_by_name(door):
    with pytest.raises(ValueError, match="AdroitHandDoor"):
        make_env("gymnasium/AdroitHandDor-v1")
    with pytest.raises(ValueError, match=r"horizon=3.*max_episode_steps"):
        make_env("gymnasium/AdroitHandDoor-v1", horizon=3)
    with pytest.raises(ValueError, match="reward='dense'"):
        make_env("gymnasium/AdroitHandDoor-v1", reward="dense")
    with pytest.raises(ValueError, match="CartPole"):
        make_env("gymnasium/CartPole-v1")
    door.reset(seed=0)
    with pytest.raises(ValueError, match="28 finite"):
        door.step(np.zeros(27, np.float32))
    with pytest.raises(ValueError, match="28 finite"):
        door.step(np.full(28, np.nan, np.float32))


def test_picture(door):
    door.reset(seed=0)
    try:
        frame = door.render(width=64, height=48)
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"no off-screen GL here: {error}")
    assert frame.shape == (48, 64, 3)
    assert frame.dtype == np.uint8
    assert frame.std() > 5
    with pytest.raises(ValueError, match="vil_camera"):
        door.render(camera="nowhere")
