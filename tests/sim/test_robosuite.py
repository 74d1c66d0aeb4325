"""robosuite behind the interface, and its compiled control loop against robosuite's own step."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="robosuite is not installed")

from robot_rl.sim.env import Environment, make_env, make_expert

STATE = "observation.state"
OPTIONS = {"success_terminates": False, "max_episode_steps": 10_000}
_made: dict[tuple, object] = {}


def _env(name, **options):
    """One instance of each kind for the whole module: robosuite takes its time to build."""
    key = (name, *sorted(options.items()))
    if key not in _made:
        _made[key] = make_env(f"robosuite/{name}", **options)
    return _made[key]


def _physics(env):
    data = env.unwrapped.sim.data._data
    return np.r_[data.qpos, data.qvel]


def _random_actions(n, seed=0, gain=0.6):
    rng = np.random.default_rng(seed)
    rows, action = [], np.zeros(7)
    for _ in range(n):
        action = np.clip(0.8 * action + gain * rng.uniform(-1, 1, 7), -1, 1)
        rows.append(action)
    return np.array(rows)


def _scripted_actions(env, n, seed):
    expert = make_expert(env, noise=0.1)
    observation, _ = env.reset(seed=seed)
    expert.reset(env, np.random.default_rng(seed))
    rows = []
    for _ in range(n):
        rows.append(expert.act(observation))
        observation = env.step(rows[-1])[0]
    return np.array(rows)


def _episode(env, actions, seed):
    first, _ = env.reset(seed=seed)
    states, observations = [_physics(env)], [first[STATE]]
    for action in actions:
        observations.append(env.step(action)[0][STATE])
        states.append(_physics(env))
    return np.array(states), np.array(observations)


@pytest.mark.parametrize(("name", "steps"), [("Lift", 20), ("Can", 15)])
def test_compiled_loop_equals_robosuites_own(name, steps):
    own, fast = _env(name, fast=False, **OPTIONS), _env(name, fast=True, **OPTIONS)
    actions = _random_actions(steps)
    expected, expected_observations = _episode(own, actions, seed=4)
    states, observations = _episode(fast, actions, seed=4)
    np.testing.assert_allclose(states, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(observations, expected_observations, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "scripted"])
@pytest.mark.parametrize(("name", "steps"), [("Lift", 150), ("Can", 200), ("Square", 200), ("Door", 200)])
def test_compiled_loop_equals_robosuites_own_over_an_episode(name, steps, kind):
    own, fast = _env(name, fast=False, **OPTIONS), _env(name, fast=True, **OPTIONS)
    for seed in range(2):
        if kind == "random":
            actions = _random_actions(steps, seed)
        elif name == "Door":
            pytest.skip("robosuite/Door has no scripted operator")
        else:
            actions = _scripted_actions(fast, steps, seed)
        expected, _ = _episode(own, actions, seed)
        states, _ = _episode(fast, actions, seed)
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_cheaper_solver_computes_the_same_step():
    # every control step from the same state: rounding does not get the time to be amplified by contacts
    fast, rough = _env("Lift", fast=True, **OPTIONS), _env("Lift", fast="approximate", **OPTIONS)
    actions = _scripted_actions(fast, 60, seed=1)
    fast.reset(seed=1)
    rough.reset(seed=1)
    for action in actions:
        rough.set_state(fast.get_state())
        fast.step(action)
        rough.step(action)
        np.testing.assert_allclose(_physics(rough), _physics(fast), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["Lift", "Can"])
def test_observation_is_robomimics(name):
    env = _env(name, fast=True, **OPTIONS)
    assert isinstance(env, Environment)
    env.reset(seed=0)
    env.step(np.array([0.3, -0.5, 0.2, 0.4, -0.3, 0.8, 1.0]))
    observation = env.step(np.array([0.3, -0.5, 0.2, 0.4, -0.3, 0.8, 1.0]))[0]
    core = env.unwrapped
    core._update_observables(force=True)  # relative poses read the cache of the update before
    native = core._get_observations(force_update=True)
    keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state")
    np.testing.assert_allclose(observation[STATE], np.concatenate([native[k] for k in keys]), atol=1e-6)
    assert observation[STATE].dtype == np.float32
    feature = env.spec.observation_features[STATE]
    assert feature.shape == ({"Lift": 19, "Can": 23}[name],)
    assert len(set(feature.names)) == feature.shape[0]
    spec = env.spec.action
    assert spec.dim == 7
    assert spec.delta_mask.tolist() == [True] * 6 + [False]
    assert spec.gripper_mask.tolist() == [False] * 6 + [True]
    assert env.spec.control_hz == 20.0


def test_seed_fixes_the_start_whatever_happened_before():
    env = _env("Lift", fast=True, **OPTIONS)
    first, info = env.reset(seed=7)
    physics = _physics(env)
    other, _ = env.reset(seed=8)
    assert not np.array_equal(first[STATE], other[STATE])
    for action in _random_actions(5):
        env.step(action)
    again, info_again = env.reset(seed=7)
    np.testing.assert_array_equal(first[STATE], again[STATE])
    np.testing.assert_array_equal(physics, _physics(env))
    assert info["start"] == info_again["start"]
    assert set(info["start"]) == {"cube_x", "cube_y", "cube_yaw"}
    # robosuite draws from numpy's global generator; the caller's must not notice
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    env.reset(seed=1)
    assert np.random.rand() == expected


def test_instances_agree_on_a_seed():
    a, b = _env("Lift", fast=True, **OPTIONS), _env("Lift", fast=False, **OPTIONS)
    np.testing.assert_array_equal(a.reset(seed=21)[0][STATE], b.reset(seed=21)[0][STATE])
    # the cube's size is drawn when the model is built
    np.testing.assert_array_equal(a.unwrapped.sim.model._model.geom_size, b.unwrapped.sim.model._model.geom_size)


@pytest.mark.parametrize("fast", [True, False])
def test_state_restores_bit_for_bit(fast):
    env = _env("Lift", fast=fast, **OPTIONS)
    actions = _random_actions(12, seed=2)
    env.reset(seed=3)
    for action in actions[:4]:
        env.step(action)
    state = env.get_state()
    expected = [np.r_[env.step(a)[0][STATE], _physics(env)] for a in actions[4:8]]
    env.reset(seed=9)
    env.step(actions[8])
    env.set_state(state)
    np.testing.assert_array_equal([np.r_[env.step(a)[0][STATE], _physics(env)] for a in actions[4:8]], expected)


def test_success_is_robosuites_and_ends_the_episode():
    env = make_env("robosuite/Lift")
    expert = make_expert(env)
    observation, info = env.reset(seed=0)
    expert.reset(env, np.random.default_rng(0))
    rewards, stages = [], [info["stage"]]
    for _ in range(env.spec.max_episode_steps):
        observation, reward, terminated, truncated, info = env.step(expert.act(observation))
        rewards.append(reward)
        stages.append(info["stage"])
        assert env.unwrapped._check_success() == info["success"] == terminated
        assert not truncated
        if terminated:
            break
    assert rewards[-1] == 1.0
    assert sum(rewards) == 1.0
    assert list(dict.fromkeys(stages)) == ["reach", "grasp", "lifted"]
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(7))
    env.close()


def test_time_limit_truncates():
    env = _env("Lift", fast=True, max_episode_steps=3)
    env.reset(seed=0)
    ends = [env.step(np.zeros(7))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    with pytest.raises(RuntimeError, match="ended"):
        env.step(np.zeros(7))


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Lfit.*Lift"):
        make_env("robosuite/Lfit")
    with pytest.raises(ValueError, match=r"horizon=3.*max_episode_steps"):
        make_env("robosuite/Lift", horizon=3)
    with pytest.raises(ValueError, match=r"robot='Pnda'.*Panda"):
        make_env("robosuite/Lift", robot="Pnda")
    with pytest.raises(ValueError, match=r"fast='maybe'.*approximate"):
        make_env("robosuite/Lift", fast="maybe")
    with pytest.raises(ValueError, match="hard_reset"):
        make_env("robosuite/Lift", env_options={"hard_reset": True})
    env = _env("Lift", fast=True, **OPTIONS)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="7 finite"):
        env.step(np.zeros(6))
    with pytest.raises(ValueError, match="7 finite"):
        env.step(np.full(7, np.inf))
    with pytest.raises(ValueError, match=r"skill=1\.5"):
        make_expert(env, skill=1.5)
    with pytest.raises(ValueError, match="noise=-1"):
        make_expert(env, noise=-1)


def _success_rate(name, seeds, limit=None, **kwargs):
    env = _env(name, fast=True, max_episode_steps=limit)
    expert = make_expert(env, **kwargs)
    wins = 0
    for seed in seeds:
        observation, info = env.reset(seed=seed)
        expert.reset(env, np.random.default_rng(seed))
        ended = False
        while not ended:
            observation, _, terminated, truncated, info = env.step(expert.act(observation))
            ended = terminated or truncated
        wins += info["success"]
    return wins / len(seeds)


def test_operators_skill_is_a_dial():
    assert _success_rate("Lift", range(5), limit=80) == 1.0
    assert _success_rate("Lift", range(3), limit=80, skill=0.0) == 0.0
    assert 0.1 <= _success_rate("Lift", range(12), limit=80, skill=0.4, noise=0.2) <= 0.8


def test_operator_is_reproducible():
    env = _env("Lift", fast=True)
    runs = []
    for _ in range(2):
        expert = make_expert(env, skill=0.5, noise=0.3)
        observation, _ = env.reset(seed=5)
        expert.reset(env, np.random.default_rng(5))
        actions = []
        for _ in range(10):
            actions.append(expert.act(observation))
            observation = env.step(actions[-1])[0]
        runs.append(actions)
    np.testing.assert_array_equal(runs[0], runs[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Lift", "Can", "Square"])
def test_skilled_operator_nearly_always_succeeds(name):
    assert _success_rate(name, range(100)) >= 0.97


@pytest.mark.slow
def test_any_other_robosuite_task():
    env = make_env("robosuite/Stack", max_episode_steps=4)
    names = env.spec.observation_features[STATE].names
    observation, info = env.reset(seed=0)
    assert observation[STATE].shape == (len(names),)
    assert info["success"] is False
    expected = [env.step(np.full(7, 0.2))[0][STATE] for _ in range(4)]
    env.reset(seed=0)
    np.testing.assert_array_equal([env.step(np.full(7, 0.2))[0][STATE] for _ in range(4)], expected)


@pytest.mark.slow
def test_pictures():
    env = make_env("robosuite/Lift", cameras=("agentview", "robot0_eye_in_hand"), image_size=(48, 64))
    try:
        observation, _ = env.reset(seed=0)
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"no off-screen GL here: {error}")
    for camera in ("agentview", "robot0_eye_in_hand"):
        picture = observation[f"observation.images.{camera}"]
        assert picture.shape == (48, 64, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 5
    # the cube is red, and robosuite's own renderer is upside down: it must show below the middle
    red = (observation["observation.images.agentview"].astype(int) @ np.array([2, -1, -1])) > 150
    assert red.any()
    env.close()
    with pytest.raises(ValueError, match="agentview"):
        make_env("robosuite/Lift", cameras=("front",))
