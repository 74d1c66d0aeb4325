"""A simulated person beside a simulated robot, for what is learned from interventions (HG-DAgger, HIL-SERL, RLIF ...)."""

from __future__ import annotations

from typing import Any

import numpy as np

from robot_rl import seeding
from robot_rl.intervention.arbitration import Arbitration, Situation
from robot_rl.sim.env import Environment, make_expert
from robot_rl.sim.operator_config import OperatorConfig
from robot_rl.types import Observation, Source


class SimulatedOperator:
    """An arbiter that lets the policy act until the task has made no progress for too long, then drives: to the end, or to the next stage.

    The person sees what the task's own stages say, and drives as its scripted expert does, from wherever the policy has brought
    the robot. Whatever is random about it depends on ``key`` alone.

    Args:
        watched: control steps that the person has watched before, in other episodes, which tires (``fatigue``).

    Raises:
        ValueError: the task has no scripted expert.
    """

    def __init__(self, config: OperatorConfig, env: Environment, key: tuple[int | str, ...], watched: int = 0) -> None:
        self.config, self.env = config, env
        slower = 1.0 + config.fatigue * (watched % config.spell) / config.spell
        self.patience, self.reaction = round(slower * config.patience), round(slower * config.reaction)
        self.expert = make_expert(env, skill=config.skill, noise=slower * config.noise)
        self._rng = seeding.rng("operator", *key)
        self._low, self._high = np.array(env.spec.action.low), np.array(env.spec.action.high)
        self._watches = bool(self._rng.random() < config.share)
        self.begin()

    def begin(self) -> None:
        self._stages: set[str] = set()
        self._stage = ""
        self._waited = 0
        self._lost = 0  # steps since the task was set back
        self._driving = False
        self._reached = False  # what the person took over for
        self._interventions = 0
        self.steps = 0  # driven by the person in this episode

    @property
    def driving(self) -> bool:
        return self._driving

    def saw(self, stage: str) -> None:
        """The stage that the task is in after a control step."""
        setback = self.reaction > 0 and stage in self.env.spec.setbacks
        self._lost = self._lost + 1 if setback else 0
        new = bool(self._stages) and stage not in self._stages and not setback
        self._waited = 0 if new else self._waited + 1
        self._reached |= self._driving and new
        self._stages.add(stage)
        self._stage = stage

    def arbitrate(self, now_ns: int, wish: np.ndarray, observation: Observation, situation: Situation) -> Arbitration:
        if self._driving and self._reached and self.config.hand_back == "stage":
            self._driving, self._waited = False, 0
            # The policy's running chunk was computed while somebody else drove: it looks again.
            return Arbitration(situation.standstill, Source.HOLD, drop_chunk=True)
        takes_over = not self._driving and self._watches and self._comes()
        if not (takes_over or self._driving):
            return Arbitration(wish)
        if takes_over:
            self.expert.take_over(self.env, self._rng)
            self._driving, self._reached = True, False
            self._stages = {self._stage}  # a stage that was lost again is progress when it comes back
            self._interventions += 1
        self.steps += 1
        command = np.clip(self.expert.act(observation), self._low, self._high).astype(np.float32)
        return Arbitration(
            command, Source.HUMAN, human=command, intervention_id=self._interventions - 1, drop_chunk=takes_over,
            operator_stamp_ns=now_ns,
        )  # fmt: skip

    def _comes(self) -> bool:
        """Whether an idle person takes over now, rightly or not. Draws only where there is a chance of a mistake."""
        if self._waited >= self.patience or 0 < self.reaction <= self._lost:
            if not self.config.overlooked or self._rng.random() >= self.config.overlooked:
                return True
            self._waited = self._lost = 0
        return self.config.mistaken > 0.0 and bool(self._rng.random() < self.config.mistaken)

    def report(self) -> dict[str, Any]:
        return {"human_steps": self.steps, "watched": self._watches}
