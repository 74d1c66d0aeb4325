"""A task that does not tell where its objects are is the same task otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from robot_rl.sim.env import make_env


def test_without_object_state_only_the_observation_is_shorter():
    told, silent = make_env("tabletop/Lift"), make_env("tabletop/Lift", object_state=False)
    try:
        names = silent.spec.observation_features["observation.state"].names
        assert names == told.spec.observation_features["observation.state"].names[: len(names)]
        assert "gripper_width" in names
        assert not any(n.startswith("block") for n in names)
        a, b = told.reset(seed=3)[0], silent.reset(seed=3)[0]
        rng = np.random.default_rng(0)
        for _ in range(20):
            assert b["observation.state"].shape == (len(names),)
            np.testing.assert_array_equal(a["observation.state"][: len(names)], b["observation.state"])
            action = rng.uniform(told.spec.action.low, told.spec.action.high)
            (a, reward, *ends), (b, same, *too) = (e.step(action) for e in (told, silent))
            assert (reward, ends[:2]) == (same, too[:2])
    finally:
        told.close()
        silent.close()
    with pytest.raises(ValueError, match="object_state='no': accepted are true, false"):
        make_env("tabletop/Lift", object_state="no")
