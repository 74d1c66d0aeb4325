"""Scripted operators that demonstrate the table-top tasks well, badly, or anything between.

An expert works in phases (reach, grasp, transport ...) on the true state of the simulation and moves the commanded pose
with a smooth profile. What makes a demonstration human is drawn from the episode's generator and *never from the state*: a
style (speed, approach arc, grasp height), and per attempt an aim error and possibly one slip (closes too early, lifts before
it has closed, lets go, does not align). In every state the demonstrations therefore hold both the good and the bad
continuation; a policy cloned from them has both in its noise, which is what post-training in the noise needs.

``skill`` scales the aim error by ``1 - skill`` and the chance of a slip likewise; ``noise`` is the standard deviation of
temporally correlated action noise, as a fraction of the action limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from robot_rl.sim.tabletop.core import ACTION, GRIPPER_OPEN, TabletopEnv, wrap
from robot_rl.types import Observation

CLOSED = 0.0
NOISE_CORRELATION = 0.8
_LIMIT = np.array(ACTION.high[:4])


@dataclass(frozen=True)
class Attempt:
    """What goes wrong in one attempt: ``aim`` in metres, ``turn`` in radians, ``slip`` names one mistake or is empty."""

    aim: tuple[float, float, float]
    turn: float
    slip: str
    hesitate: int
    close_steps: int


@dataclass(frozen=True)
class Goal:
    """Where the expert wants the commanded pose now; ``speed`` is a fraction of the action limits."""

    x: float
    y: float
    z: float
    yaw: float
    width: float
    speed: float = 1.0


class ScriptedExpert:
    """Phases, style and mistakes that all experts share; subclasses say what each phase wants and when it is over."""

    slips: ClassVar[tuple[str, ...]] = ()
    slip_rate: ClassVar[float] = 0.5  # chance of a slip per attempt at skill 0
    aim_sigma: ClassVar[tuple[float, float, float]] = (0.010, 0.010, 0.006)  # m, at skill 0
    turn_sigma: ClassVar[float] = 0.15  # rad, at skill 0
    retry_rate: ClassVar[float] = 0.5  # chance to notice and try again at skill 0; 1 at skill 1
    symmetry: ClassVar[float] = np.pi / 2  # turn of the object that looks the same to the gripper

    def __init__(self, env: Any, *, skill: float = 1.0, noise: float = 0.0) -> None:
        if not 0.0 <= skill <= 1.0:
            raise ValueError(f"skill={skill!r}: accepted are numbers from 0 to 1")
        if not 0.0 <= noise < float("inf"):
            raise ValueError(f"noise={noise!r}: accepted are finite numbers >= 0")
        self.skill, self.noise = float(skill), float(noise)
        self._env = env

    def reset(self, env: Any, rng: np.random.Generator) -> None:
        if not isinstance(env, TabletopEnv):
            raise TypeError(f"{type(self).__name__} demonstrates a tabletop task, not {type(env).__name__}")
        self._env, self._rng = env, rng
        self._drift = np.zeros(4)
        self.speed = float(rng.uniform(0.75, 1.0))
        self.arc = np.clip(rng.normal(0.0, 0.02, 2), -0.04, 0.04)  # sideways bow of the approach, m
        self.hover = float(rng.uniform(0.05, 0.08))
        self.grip_height = float(rng.uniform(-0.003, 0.003))
        self.attempts = 0
        self._new_attempt("reach")

    def take_over(self, env: Any, rng: np.random.Generator) -> None:
        """As a person does it: what is in the hand stays there, and whoever is above the object already goes down to it.

        Beginning with the first phase everywhere would teach to move away from the object in just the states where it is nearly reached.
        """
        self.reset(env, rng)
        left, right = env.touching(env.graspable)
        if left and right:
            x, y, z, yaw, _ = env.command
            self._aimed = (x, y, z, yaw)
            self._enter("close")
        elif self._above():
            self._enter("descend")

    def act(self, observation: Observation) -> np.ndarray:
        """(5,) float64 action; it reads the simulation rather than ``observation``."""
        goal = self._plan()
        self._ticks += 1
        command = self._env.command
        delta = np.array([goal.x - command[0], goal.y - command[1], goal.z - command[2], wrap(goal.yaw - command[3])])
        limit = goal.speed * self.speed * _LIMIT
        motion = np.clip(0.5 * delta, -limit, limit)
        longest = float(np.max(np.abs(0.5 * delta[:3]) / limit[:3]))
        if longest > 1.0:  # straight lines: slow down every axis alike
            motion[:3] = 0.5 * delta[:3] / longest
        if self.noise > 0.0:
            fresh = self._rng.normal(size=4) * (self.noise * np.sqrt(1 - NOISE_CORRELATION**2))
            self._drift = NOISE_CORRELATION * self._drift + fresh
            motion = motion + self._drift * _LIMIT
        return np.append(np.clip(motion, -_LIMIT, _LIMIT), goal.width)

    # --- helpers ---

    def _plan(self) -> Goal:
        raise NotImplementedError

    def _above(self) -> bool:
        """Whether the tool is where going down begins, or on its way down."""
        raise NotImplementedError

    def _over(self, x: float, y: float, z: float, yaw: float, within: float, turned: float) -> bool:
        tx, ty, tz, tool_yaw = self._env.tool
        return bool(np.hypot(x - tx, y - ty) < within and tz < z + self.hover + within and abs(yaw - tool_yaw) < turned)

    def _new_attempt(self, phase: str) -> None:
        rng, lack = self._rng, 1.0 - self.skill
        aim = rng.normal(size=3) * np.array(self.aim_sigma) * lack
        turn = float(rng.normal() * self.turn_sigma * lack)
        slipped = rng.random() < self.slip_rate * lack
        slip = str(rng.choice(self.slips)) if self.slips else ""
        hesitate = int(rng.integers(0, 5)) if rng.random() < 0.5 * lack else 0
        close = 5 + int(rng.integers(0, 3))
        self.attempt = Attempt((float(aim[0]), float(aim[1]), float(aim[2])), turn, slip if slipped else "", hesitate, close)
        self.attempts += 1
        self._enter(phase)

    def _enter(self, phase: str) -> None:
        self.phase, self._ticks = phase, 0
        self._best, self._stalled = float("inf"), 0
        tool = self._env.tool
        self._from = tool[:2]

    def _gives_up(self) -> bool:
        """Whether this operator carries on with a failing attempt rather than starting again."""
        return bool(self._rng.random() > self.retry_rate + (1.0 - self.retry_rate) * self.skill)

    def _stuck(self, height: float, steps: int) -> bool:
        """True once ``height`` has not fallen by half a millimetre for ``steps`` calls."""
        if height < self._best - 0.0005:
            self._best, self._stalled = height, 0
        else:
            self._stalled += 1
        return self._stalled >= steps

    def _yaw_to(self, target: float) -> float:
        """The commanded yaw nearest to the present one that looks like ``target`` under the object's symmetry."""
        return self._env.command[3] + wrap(target - self._env.command[3], self.symmetry)

    def _bow(self, x: float, y: float) -> tuple[float, float]:
        """A via point off the straight line that fades out as the tool comes near."""
        tx, ty, _, _ = self._env.tool
        fade = min(max((np.hypot(x - tx, y - ty) - 0.02) / 0.12, 0.0), 1.0)
        return x + float(self.arc[0]) * fade, y + float(self.arc[1]) * fade

    def _near(self, x: float, y: float, z: float, within: float) -> bool:
        tx, ty, tz, _ = self._env.tool
        return bool(np.hypot(x - tx, y - ty) < within and abs(z - tz) < within)


class GraspExpert(ScriptedExpert):
    """Reach above an object, go down, close, and lift it; the part that tasks with a loose object share."""

    def _object(self) -> tuple[float, float, float, float]:
        """x, y of the object, height to grasp it at, and its yaw."""
        raise NotImplementedError

    def _holding(self) -> bool:
        raise NotImplementedError

    def _aim(self) -> tuple[float, float, float, float]:
        """Where this attempt would grasp: the object, and what the operator is off by."""
        x, y, z, object_yaw = self._object()
        dx, dy, dz = self.attempt.aim
        return x + dx, y + dy, z + (self.grip_height + dz), self._yaw_to(object_yaw + self.attempt.turn)

    def _above(self) -> bool:
        return self._over(*self._aim(), 0.012, 0.1)

    def _pick(self, lift_to: float) -> Goal:
        x, y, z, yaw = self._aim()
        slip = self.attempt.slip
        if self.phase == "reach":
            if self._near(x, y, z + self.hover, 0.012) and abs(yaw - self._env.tool[3]) < 0.1:
                self._enter("hesitate" if self.attempt.hesitate else "descend")
            bx, by = self._bow(x, y)
            return Goal(bx, by, z + self.hover, yaw, GRIPPER_OPEN)
        if self.phase == "hesitate":
            if self._ticks >= self.attempt.hesitate:
                self._enter("descend")
            return Goal(x, y, z + self.hover, yaw, GRIPPER_OPEN)
        if self.phase == "descend":
            early = slip == "closes early"
            level = z + (0.034 if early else 0.004)
            if self._env.tool[2] < level or self._stuck(self._env.tool[2], 6):
                self._aimed = (x, y, z, yaw)
                self._enter("close")
            return Goal(x, y, z, yaw, GRIPPER_OPEN, 0.8)
        if self.phase == "close":
            # The aim is frozen: a closing gripper moves the object, and chasing it would push it away.
            x, y, z, yaw = self._aimed
            if slip == "lifts early" or self._ticks >= self.attempt.close_steps:
                self._enter("lift")
            return Goal(x, y, z, yaw, GRIPPER_OPEN if slip == "lifts early" else CLOSED)
        x, y, _, yaw = self._aimed
        late = slip == "lifts early" and self._ticks < 4
        return Goal(x, y, lift_to, yaw, GRIPPER_OPEN if late else CLOSED, 0.9)

    def _missed(self) -> bool:
        """After the lift began: nothing in the hand and the operator tries again."""
        if self.phase == "lift" and self._ticks >= 5 and not self._holding():
            if self._gives_up():
                self._enter("lost")
                return False
            self._new_attempt("back off")
            return True
        return False

    def _back_off(self) -> Goal:
        x, y, z, yaw, _ = self._env.command
        if self._ticks >= 3:
            self._enter("reach")
        return Goal(x, y, min(z + 0.05, 0.2), yaw, GRIPPER_OPEN)

    def _wander(self) -> Goal:
        """What an operator who has lost the object does: carries on upwards and waits."""
        x, y, _, yaw, width = self._env.command
        return Goal(x, y, 0.2, yaw, width, 0.5)
