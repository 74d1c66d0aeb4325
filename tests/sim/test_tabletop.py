"""The table-top tasks: seeds, exact save and restore, honest ends, actions and pictures."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from robot_rl import seeding
from robot_rl.sim.env import Environment, make_env, make_expert
from robot_rl.sim.tabletop import TASK_IDS
from robot_rl.sim.tabletop.core import LEASH
from robot_rl.types import OBSERVATION_STATE

IDLE = np.array([0.0, 0.0, 0.0, 0.0, 0.08])


@pytest.fixture(scope="module", params=TASK_IDS)
def env(request: pytest.FixtureRequest) -> Environment:
    return make_env(request.param)


@pytest.fixture(scope="module")
def peg() -> Environment:
    return make_env("tabletop/PegInsertion")


def random_actions(env: Environment, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(env.spec.action.low, env.spec.action.high, (n, env.spec.action.dim))


def play(env: Environment, actions: np.ndarray) -> list[tuple]:
    return [(o[OBSERVATION_STATE].tobytes(), r, te, tr, i) for o, r, te, tr, i in map(env.step, actions)]


def demonstrate(env: Environment, seed: int, skill: float = 1.0, noise: float = 0.0) -> tuple[float, bool, bool, dict, int]:
    expert = make_expert(env, skill=skill, noise=noise)
    observation, info = env.reset(seed=seed)
    expert.reset(env, seeding.rng("test-expert", seed))
    total, terminated, truncated, steps = 0.0, False, False, 0
    while not (terminated or truncated):
        observation, reward, terminated, truncated, info = env.step(expert.act(observation))
        total += reward
        steps += 1
    return total, terminated, truncated, info, steps


def test_contract(env: Environment) -> None:
    assert isinstance(env, Environment)
    observation, info = env.reset(seed=1)
    feature = env.spec.observation_features[OBSERVATION_STATE]
    assert observation[OBSERVATION_STATE].shape == feature.shape == (len(feature.names),)
    assert observation[OBSERVATION_STATE].dtype == np.float32
    assert len(set(feature.names)) == len(feature.names)
    assert info["success"] is False
    assert all(isinstance(v, float) for v in info["start"].values())


def test_same_seed_same_episode_whatever_came_before(env: Environment) -> None:
    actions = random_actions(env, 12)
    first = env.reset(seed=7)
    episode = play(env, actions)
    env.reset(seed=8)
    play(env, random_actions(env, 5, seed=1))
    again = env.reset(seed=7)
    assert first[0][OBSERVATION_STATE].tobytes() == again[0][OBSERVATION_STATE].tobytes()
    assert first[1] == again[1]
    assert episode == play(env, actions)
    other = make_env(env.spec.env_id)
    other.reset(seed=7)
    assert episode == play(other, actions)


def test_seeds_give_different_starts(env: Environment) -> None:
    starts = [tuple(env.reset(seed=s)[1]["start"].values()) for s in range(20)]
    assert len(set(starts)) == 20
    spread = np.ptp(np.array(starts), axis=0)
    assert (spread > 0).mean() > 0.9  # everything but the fixed parts is randomised


def test_restored_state_continues_bit_for_bit(env: Environment) -> None:
    """In the middle of a grasp, where contacts, friction and the solver's warm start all matter."""
    expert = make_expert(env)
    observation, _ = env.reset(seed=3)
    expert.reset(env, seeding.rng("x", 3))
    for _ in range(22):
        observation = env.step(expert.act(observation))[0]
    state = pickle.loads(pickle.dumps(env.get_state()))
    actions = random_actions(env, 10)
    actions[:, 4] = 0.0
    expected = play(env, actions)
    env.reset(seed=99)
    env.set_state(state)
    assert play(env, actions) == expected
    fresh = make_env(env.spec.env_id)
    fresh.set_state(state)
    assert play(fresh, actions) == expected


def test_state_of_another_task_is_refused(peg: Environment) -> None:
    lift = make_env("tabletop/Lift")
    lift.reset(seed=0)
    with pytest.raises(ValueError, match=r"tabletop/Lift"):
        peg.set_state(lift.get_state())


def test_expert_succeeds_and_success_terminates_once(env: Environment) -> None:
    for seed in range(4):
        total, terminated, truncated, info, steps = demonstrate(env, seed)
        assert (total, terminated, truncated, info["success"], info["stage"]) == (1.0, True, False, True, "done"), seed
        assert steps < env.spec.max_episode_steps
    with pytest.raises(RuntimeError, match="reset"):
        env.step(IDLE)


def test_doing_nothing_is_truncated_at_the_limit(env: Environment) -> None:
    env.reset(seed=0)
    ends = [env.step(IDLE)[1:4] for _ in range(env.spec.max_episode_steps)]
    assert ends[-1] == (0.0, False, True)
    assert all(e == (0.0, False, False) for e in ends[:-1])
    with pytest.raises(RuntimeError, match="ended"):
        env.step(IDLE)


def test_random_motion_never_succeeds(env: Environment) -> None:
    for seed in range(3):
        env.reset(seed=seed)
        for action in random_actions(env, env.spec.max_episode_steps, seed):
            _, reward, terminated, _, info = env.step(action)
            assert (reward, terminated, info["success"]) == (0.0, False, False)


def test_step_before_reset_is_refused() -> None:
    with pytest.raises(RuntimeError, match="reset"):
        make_env("tabletop/Lift").step(IDLE)


def test_bad_actions_name_what_is_wrong(peg: Environment) -> None:
    peg.reset(seed=0)
    bad = IDLE.copy()
    bad[2] = math.nan
    with pytest.raises(ValueError, match="delta_z=nan"):
        peg.step(bad)
    with pytest.raises(ValueError, match=r"\(4,\).*delta_x"):
        peg.step(IDLE[:4])
    peg.step(IDLE)  # a refused action leaves the episode usable


def test_actions_beyond_the_limits_are_clipped(peg: Environment) -> None:
    peg.reset(seed=2)
    expected = play(peg, np.array([peg.spec.action.high] * 3))
    peg.reset(seed=2)
    assert play(peg, np.array([peg.spec.action.high]).repeat(3, 0) * 50) == expected


@pytest.mark.parametrize(
    "direction", [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (1, 1, 1), (-1, -1, 1), (-1, 1, -1)]
)
def test_tool_stays_in_the_workspace_and_follows(direction: tuple[int, int, int]) -> None:
    env = make_env("tabletop/Lift", max_episode_steps=200)
    env.reset(seed=5)
    for _ in range(60):
        env.step(np.array([*(0.02 * np.array(direction)), 0.0, 0.08]))
        gap = np.abs(np.subtract(env.command[:3], env.tool[:3]))
        assert (gap <= LEASH + 0.025).all()
    box = env.workspace
    assert all(lo - 1e-9 <= c <= hi + 1e-9 for lo, c, hi in zip(box.low, env.command, box.high, strict=False))
    assert np.allclose(env.command[:3], env.tool[:3], atol=0.002)
    for axis, sign in enumerate(direction):
        if sign and direction[2] >= 0:
            assert env.tool[axis] == pytest.approx(box.high[axis] if sign > 0 else box.low[axis], abs=0.003)


def test_yaw_follows_and_the_tool_points_down(peg: Environment) -> None:
    peg.reset(seed=0)
    start = peg.tool[3]
    for _ in range(5):
        peg.step(np.array([0, 0, 0, 0.15, 0.08]))
    for _ in range(8):
        peg.step(IDLE)
    assert peg.tool[3] == pytest.approx(start + 0.75, abs=0.01)
    rotation = peg.data.site_xmat[peg.model.site("tcp").id]
    assert rotation[8] == pytest.approx(-1.0, abs=1e-4)


def test_held_block_does_not_creep_out_of_the_grip() -> None:
    """Success must mean a real grasp: a block held still for five seconds stays where it is in the hand."""
    env = make_env("tabletop/Lift", max_episode_steps=400)
    env.HOLD_STEPS = 10_000
    expert = make_expert(env)
    observation, _ = env.reset(seed=1)
    expert.reset(env, seeding.rng("x", 1))
    for _ in range(45):
        observation = env.step(expert.act(observation))[0]
    before = env.data.xpos[env.block, 2] - env.tool[2]
    for _ in range(100):
        env.step(np.zeros(5))
    assert env.data.xpos[env.block, 2] - env.tool[2] == pytest.approx(before, abs=0.001)


def test_objects_never_fly() -> None:
    """Closing the gripper must not turn penetration into speed, wherever the object is hit."""
    env = make_env("tabletop/Lift")
    for seed in range(15):
        expert = make_expert(env, skill=0.0, noise=0.3)
        observation, _ = env.reset(seed=seed)
        expert.reset(env, seeding.rng("fly", seed))
        ended = False
        while not ended:
            observation, _, terminated, truncated, _ = env.step(expert.act(observation))
            ended = terminated or truncated
            assert env.data.xpos[env.block, 2] < 0.4
            assert np.abs(env.data.qvel).max() < 40


def test_peg_must_be_in_the_hole() -> None:
    """A peg that stands on the block, next to the hole, or tilted in its mouth is no success."""
    env = make_env("tabletop/PegInsertion")
    env.reset(seed=0)
    hx, hy, yaw = env.hole()
    adr = int(env.model.joint("peg").qposadr[0])
    quat = [math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)]
    for position, expected in (
        ((hx, hy, 0.045 + 0.046), False),
        ((hx + 0.06, hy, 0.0451), False),
        ((hx, hy, 0.045 + 0.012), False),
        ((hx, hy, 0.0455), True),
    ):
        env.data.qpos[adr : adr + 7] = [*position, *quat]
        import mujoco

        mujoco.mj_forward(env.model, env.data)
        assert env._judge()[0] is expected, position


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'camera'.*cameras, image_size, max_episode_steps"):
        make_env("tabletop/Lift", camera="front")
    with pytest.raises(ValueError, match=r"'side'.*front, wrist"):
        make_env("tabletop/Lift", cameras=("side",))
    with pytest.raises(ValueError, match="image_size=4"):
        make_env("tabletop/Lift", image_size=4)
    with pytest.raises(ValueError, match=r"tabletop/Lift"):
        make_env("tabletop/Nothing")
    with pytest.raises(ValueError, match=r"skill=1\.5"):
        make_expert(make_env("tabletop/Lift"), skill=1.5)


def test_a_diverged_simulation_is_reported(peg: Environment) -> None:
    peg.reset(seed=0)
    peg.data.qvel[:] = 1e12
    with pytest.raises(RuntimeError, match="diverged"):
        peg.step(IDLE)
    peg.reset(seed=0)
    peg.step(IDLE)


def test_less_skill_succeeds_less_and_the_errors_do_not_depend_on_the_start() -> None:
    env = make_env("tabletop/PegInsertion")
    good = sum(demonstrate(env, s, 1.0)[1] for s in range(10))
    bad = sum(demonstrate(env, s, 0.0)[1] for s in range(10))
    assert good == 10
    assert bad <= 5
    expert = make_expert(env, skill=0.3)
    attempts = []
    for seed in (0, 1):
        env.reset(seed=seed)
        expert.reset(env, np.random.default_rng(5))
        attempts.append(expert.attempt)
    assert attempts[0] == attempts[1]


@pytest.mark.slow
@pytest.mark.parametrize("env_id", TASK_IDS)
def test_expert_succeeds_on_200_seeds(env_id: str) -> None:
    env = make_env(env_id)
    assert sum(demonstrate(env, s)[1] for s in range(1000, 1200)) >= 198
