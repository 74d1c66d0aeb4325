"""An environment that fails, in a module that worker processes can import."""

from __future__ import annotations

from typing import Any

import numpy as np

from robot_rl.sim.env import make_env


class Faulty:
    """Fails on the second step."""

    def __init__(self) -> None:
        self._env = make_env("tabletop/Lift")
        self.spec = self._env.spec
        self.steps = 0

    def reset(self, *, seed: int) -> Any:
        self.steps = 0
        return self._env.reset(seed=seed)

    def step(self, action: np.ndarray) -> Any:
        self.steps += 1
        if self.steps == 2:
            raise ValueError("the gripper came off")
        return self._env.step(action)

    def close(self) -> None:
        pass


def make_faulty() -> Faulty:
    return Faulty()
