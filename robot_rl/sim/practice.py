"""A simulated robot that goes on from where it is: for self-practice, where nobody resets the scene."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from robot_rl.sim.tabletop.core import TabletopEnv
from robot_rl.types import Observation

FALLEN = -0.01  # m below the table's top


class EndlessTabletop:
    """A table-top task that no success and no time limit ends.

    Args:
        env: the task; its own end of an episode is passed over.
        seed: of the scene at the beginning, and again after somebody has helped.
        movable: bodies that must stay where the tool can reach them.
    """

    def __init__(self, env: TabletopEnv, seed: int = 0, movable: tuple[str, ...] = ("object",)) -> None:
        self.env, self.action, self.control_hz = env, env.spec.action, env.spec.control_hz
        try:
            self._bodies = {name: env.model.body(name).id for name in movable}
        except KeyError as error:
            raise ValueError(f"movable={list(movable)}: {error.args[0]}") from None
        self.resets = 0
        self._seed = seed
        self._observation = self._reset()

    def _reset(self) -> Observation:
        return self.env.reset(seed=self._seed + self.resets)[0]

    def observe(self) -> Observation:
        return self._observation

    def step(self, command: np.ndarray) -> Observation:
        self._observation, _, terminated, truncated, _ = self.env.step(command)
        if terminated or truncated:
            self.env.set_state(replace(self.env.get_state(), steps=0, ended=False, memory={}))
        return self._observation

    def trouble(self) -> str:
        box = self.env.workspace
        for name, body in self._bodies.items():
            x, y, z = self.env.data.xpos[body].tolist()
            if z < FALLEN:
                return f"{name} has fallen off the table"
            if not (box.low[0] <= x <= box.high[0] and box.low[1] <= y <= box.high[1]):
                return f"{name} is out of reach, at {x:.2f}, {y:.2f} m"
        return ""

    def help(self) -> None:
        """What a person does: a fresh scene."""
        self.resets += 1
        self._observation = self._reset()

    def get_state(self) -> dict[str, Any]:
        """For a checkpoint: everything that :meth:`set_state` needs."""
        state = self.env.get_state()
        return {
            "physics": state.physics.tolist(), "command": list(state.command), "steps": state.steps, "memory": dict(state.memory),
            "rng": state.rng, "resets": self.resets,
        }  # fmt: skip

    def set_state(self, state: dict[str, Any]) -> None:
        now = self.env.get_state()
        self.env.set_state(
            replace(
                now, physics=np.array(state["physics"]), command=tuple(state["command"]), steps=int(state["steps"]), ended=False,
                memory=dict(state["memory"]), rng=state["rng"],
            )
        )  # fmt: skip
        self.resets = int(state["resets"])
        self._observation = self.env._observe()
