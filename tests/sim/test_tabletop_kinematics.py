"""The closed-form inverse kinematics against MuJoCo's own forward kinematics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from robot_rl.sim.env import make_env


def test_inverse_is_exact_over_the_workspace() -> None:
    import mujoco

    env = make_env("tabletop/Lift")
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    low, high = env.model.jnt_range[:7].T
    for _ in range(300):
        target = rng.uniform(env.workspace.low, env.workspace.high)
        yaw = rng.uniform(*env.workspace.yaw)
        q = env._arm.solve(*target, yaw)
        assert (q >= low).all()
        assert (q <= high).all()
        env.data.qpos[:7] = q
        mujoco.mj_kinematics(env.model, env.data)
        assert np.allclose(env.tool[:3], target, atol=1e-9)
        assert math.remainder(env.tool[3] - yaw, 2 * math.pi) == pytest.approx(0.0, abs=1e-9)
        assert env.data.site_xmat[env._tcp][8] == pytest.approx(-1.0)


def test_corners_are_reachable_and_beyond_is_refused() -> None:
    env = make_env("tabletop/Lift")
    box = env.workspace
    for x in (box.low[0], box.high[0]):
        for y in (box.low[1], box.high[1]):
            for z in (box.low[2], box.high[2]):
                assert np.isfinite(env._arm.solve(x, y, z, 0.0)).all()
    with pytest.raises(ValueError, match="out of the arm's reach"):
        env._arm.solve(1.0, 0.0, 0.1, 0.0)
