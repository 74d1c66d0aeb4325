"""Scripted operators of the robosuite tasks, good and bad.

A demonstration is a sequence of attempts. Before each attempt the operator draws, from a generator the observation says
nothing about, whether this one is done well (probability ``skill``) and if not how it goes wrong: reaching beside the
object, taking it too high, lifting before the fingers are closed, letting go too early. After an attempt that failed he
notices and tries again with probability ``skill``, else he carries on with empty fingers to the end. So the same state is
followed by good and by bad actions, and a policy cloned from many demonstrations holds both. ``noise`` is the standard
deviation of a slow disturbance of the arm command (first-order, half a second), in action units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from robot_rl.sim.env import Environment
from robot_rl.types import OBSERVATION_STATE, Observation

OPEN, CLOSE = -1.0, 1.0
_POSITION_GAIN, _TURN_GAIN = 17.0, 2.0  # per m and per rad: critical damping of the controller's response
_WRIST = (-1.9, 3.3)  # rad: yaw that the last joint reaches with the gripper pointing down
_NOISE_MEMORY = math.exp(-0.05 / 0.5)


@dataclass
class _Attempt:
    """How one attempt will go: the same plan for a good one with every field at its default."""

    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)  # m, added to the grasp point
    close_steps: int = 9  # control steps given to the fingers
    drop_after: float = math.inf  # fraction of the way to the goal after which the fingers open
    beside_goal: tuple[float, float] = (0.0, 0.0)  # m, added to the place of release
    good: bool = True


@dataclass(frozen=True)
class _Seen:
    """What the operator sees: metres, radians."""

    hand: np.ndarray  # (3,)
    yaw: float  # of the gripper
    object: np.ndarray  # (3,)
    object_yaw: float
    state: np.ndarray


class ScriptedOperator:
    """Reach, grasp, lift and place as a state machine over the observation. One class for all shipped tasks.

    Args:
        env: a robosuite Lift, Can, Square or Door environment.
        skill: probability in [0, 1] that an attempt is done well.
        noise: standard deviation (>= 0) of the disturbance of each arm dimension, action units.

    Raises:
        ValueError: ``skill`` or ``noise`` out of range.
    """

    mistakes: tuple[str, ...] = ("beside", "high", "early")
    hover = 0.05  # m above the grasp point
    clearance = 0.0

    def __init__(self, env: Environment, *, skill: float = 1.0, noise: float = 0.0) -> None:
        if not 0.0 <= skill <= 1.0:
            raise ValueError(f"skill={skill}: accepted are numbers in [0, 1]")
        if not (noise >= 0.0 and math.isfinite(noise)):
            raise ValueError(f"noise={noise}: accepted are finite numbers >= 0")
        self.skill, self.noise = float(skill), float(noise)
        names = env.spec.observation_features[OBSERVATION_STATE].names
        self._index = {name: i for i, name in enumerate(names)}
        self._dim = env.spec.action.dim

    def reset(self, env: Environment, rng: np.random.Generator) -> None:
        """Begin an episode; ``rng`` draws attempts and disturbance."""
        self._rng = rng
        self._drift = np.zeros(6)
        self._given_up = False
        self._begin()

    def take_over(self, env: Environment, rng: np.random.Generator) -> None:
        """It begins as in an episode: above the object."""
        self.reset(env, rng)

    def act(self, observation: Observation) -> np.ndarray:
        """(7,) float32 action for the present state."""
        seen = self._see(observation[OBSERVATION_STATE].astype(np.float64))
        target, yaw, grip = self._plan(seen)
        action = np.zeros(self._dim)
        action[:3] = (target - seen.hand) * _POSITION_GAIN
        action[5] = _wrap(yaw - seen.yaw) * _TURN_GAIN
        action[3:5] = self._level(seen) * _TURN_GAIN
        if self.noise > 0.0:
            kick = self._rng.standard_normal(6) * self.noise * math.sqrt(1.0 - _NOISE_MEMORY**2)
            self._drift = _NOISE_MEMORY * self._drift + kick
            action[:6] = np.clip(action[:6], -1.0, 1.0) + self._drift
        action[6] = grip
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    # what a task says about itself

    object_key = ""

    def _see(self, state: np.ndarray) -> _Seen:
        i = self._index
        hand = state[i["robot0_eef_pos_x"] : i["robot0_eef_pos_x"] + 3]
        quat = state[i["robot0_eef_quat_qx"] : i["robot0_eef_quat_qx"] + 4]
        thing = state[i[f"{self.object_key}_pos_x"] : i[f"{self.object_key}_pos_x"] + 3]
        turn = state[i[f"{self.object_key}_quat_qx"] : i[f"{self.object_key}_quat_qx"] + 4]
        return _Seen(hand, _yaw(quat), thing, _yaw(turn), state)

    def _level(self, seen: _Seen) -> np.ndarray:
        """Rotation vector (x, y) that turns the gripper back to pointing straight down."""
        i = self._index["robot0_eef_quat_qx"]
        x, y, z, w = seen.state[i : i + 4]
        # the gripper's z axis in the world; straight down is (0, 0, -1), and the turn is their cross product
        axis_x, axis_y = 2.0 * (x * z + w * y), 2.0 * (y * z - w * x)
        return np.array([-axis_y, axis_x])

    def _grasp(self, seen: _Seen) -> tuple[np.ndarray, float]:
        """Point and yaw of the grasp."""
        raise NotImplementedError

    def _goal(self, seen: _Seen) -> tuple[np.ndarray, float, float]:
        """Place of release, yaw there, and height to travel at. Never asked for when there is nothing to place."""
        raise NotImplementedError

    def _placed(self, seen: _Seen) -> bool:
        """Time to let go."""
        raise NotImplementedError

    places = True

    def _held(self, seen: _Seen, grasp: np.ndarray) -> bool:
        return bool(np.linalg.norm(seen.hand - grasp) < 0.035)

    # the state machine

    def _begin(self) -> None:
        self._phase, self._count = "reach", 0
        self._attempt = self._draw()
        self._from: np.ndarray | None = None
        self._grasp_yaw: float | None = None

    def _draw(self) -> _Attempt:
        rng = self._rng
        if rng.random() < self.skill:
            return _Attempt()
        mistake = self.mistakes[int(rng.integers(len(self.mistakes)))]
        side = rng.uniform(-math.pi, math.pi)
        way = np.array([math.cos(side), math.sin(side)])
        if mistake == "beside":
            x, y = way * rng.uniform(0.045, 0.06)
            return _Attempt(offset=(float(x), float(y), 0.0), good=False)
        if mistake == "high":
            return _Attempt(offset=(0.0, 0.0, self.too_high + rng.uniform(0.0, 0.01)), good=False)
        if mistake == "early":
            return _Attempt(close_steps=int(rng.integers(0, 2)), good=False)
        if mistake == "drop":
            return _Attempt(drop_after=float(rng.uniform(0.1, 0.6)), good=False)
        x, y = way * rng.uniform(self.miss, 1.4 * self.miss)
        return _Attempt(beside_goal=(float(x), float(y)), good=False)

    too_high = 0.045
    miss = 0.06
    patience = 60  # control steps for one phase before the attempt counts as failed

    def _enter(self, phase: str, seen: _Seen) -> None:
        self._phase, self._count, self._from = phase, 0, seen.hand.copy()

    def _failed(self, seen: _Seen) -> None:
        if self._given_up or self._rng.random() >= self.skill:
            self._given_up = True  # carries on as if all were well
            return
        self._begin()

    def _plan(self, seen: _Seen) -> tuple[np.ndarray, float, float]:
        """Where to go, which way to turn, and what the fingers do."""
        self._count += 1
        grasp, yaw = self._grasp(seen)
        if self._phase in ("reach", "down"):
            self._grasp_yaw = yaw
        target = grasp + np.array(self._attempt.offset)
        turned = abs(_wrap(yaw - seen.yaw))
        if self._phase == "reach":
            beside = float(np.linalg.norm((target - seen.hand)[:2]))
            if (beside < 0.012 and turned < 0.15) or self._count > self.patience:
                self._enter("down", seen)
            else:
                # come down along a funnel rather than by two legs
                least = self.hover if beside > 0.02 or turned > 0.3 else 0.0
                height = max(least, min(seen.hand[2] - target[2], 1.5 * beside))
                return np.array([*target[:2], target[2] + height]), yaw, OPEN
        if self._phase == "down":
            if (abs(seen.hand[2] - target[2]) < 0.008 and np.linalg.norm((target - seen.hand)[:2]) < 0.01) or self._count > 25:
                self._enter("close", seen)
            else:
                return target, yaw, OPEN
        if self._phase == "close":
            if self._count > self._attempt.close_steps:
                self._enter("lift", seen)
            else:
                assert self._from is not None
                return self._from, seen.yaw, CLOSE
        return self._carry(seen, grasp)

    def _carry(self, seen: _Seen, grasp: np.ndarray) -> tuple[np.ndarray, float, float]:
        assert self._from is not None
        if self._phase == "lift":
            top = self._from + np.array([0.0, 0.0, self.clearance + 0.08])
            lost = seen.hand[2] - self._from[2] > 0.03 and not self._held(seen, grasp)
            if lost and not self._given_up:
                self._failed(seen)
                if not self._given_up:
                    return self._plan(seen)
            if not self.places:
                return top, seen.yaw, CLOSE
            if seen.hand[2] - self._from[2] > self.clearance:
                self._enter("carry", seen)
            else:
                return top, seen.yaw, CLOSE
        goal, yaw, height = self._goal(seen)
        goal = goal + np.array([*self._attempt.beside_goal, 0.0])
        if self._phase == "carry":
            if not self._given_up and not self._held(seen, grasp):
                self._failed(seen)
                if not self._given_up:
                    return self._plan(seen)
            total = max(float(np.linalg.norm((goal - self._from)[:2])), 1e-6)
            left = float(np.linalg.norm((goal - seen.hand)[:2]))
            if 1.0 - left / total > self._attempt.drop_after:
                self._enter("release", seen)
            elif left < self.settled and abs(_wrap(yaw - seen.yaw)) < 0.06:
                self._enter("lower", seen)
            else:
                return np.array([*goal[:2], height if left > self.descend_within else goal[2] + 0.02]), yaw, CLOSE
        if self._phase == "lower":
            if self._placed(seen) or self._count > 30:
                self._enter("release", seen)
            else:
                return goal, yaw, CLOSE
        # released: back off, look, and try again
        if self._count > 14 and not self._given_up:
            self._failed(seen)
            if not self._given_up:
                return self._plan(seen)
        assert self._from is not None
        away = self._from + np.array([0.0, 0.0, 0.08 if self._count > 4 else 0.0])
        return away, seen.yaw, OPEN

    settled = 0.02
    descend_within = 0.05


def _yaw(quat: np.ndarray) -> float:
    """Yaw of the x axis of a (4,) xyzw quaternion."""
    x, y, z, w = quat
    return math.atan2(2.0 * (x * y + w * z), 1.0 - 2.0 * (y * y + z * z))


def _wrap(angle: float, period: float = 2.0 * math.pi) -> float:
    return (angle + period / 2) % period - period / 2


class LiftOperator(ScriptedOperator):
    """robosuite/Lift: fingers along the cube's nearer pair of faces, then up."""

    object_key = "cube"
    places = False

    def _grasp(self, seen: _Seen) -> tuple[np.ndarray, float]:
        # the face pair is chosen against the rest pose of the wrist, so that it does not change while it turns
        return seen.object, _wrap(seen.object_yaw, math.pi / 2)


class CanOperator(ScriptedOperator):
    """robosuite/Can: take the can round its middle, over the rim, drop it above the middle of its bin."""

    object_key = "Can"
    mistakes = ("beside", "early", "drop", "wrong place")
    clearance = 0.08
    miss = 0.16

    def __init__(self, env: Environment, *, skill: float = 1.0, noise: float = 0.0) -> None:

        super().__init__(env, skill=skill, noise=noise)
        core: Any = env.unwrapped  # type: ignore[attr-defined]
        self._bin = np.array([*core.target_bin_placements[core.object_id, :2], core.bin2_pos[2] + 0.12])

    settled = 0.06
    descend_within = 0.12

    def _grasp(self, seen: _Seen) -> tuple[np.ndarray, float]:
        return seen.object + np.array([0.0, 0.0, 0.012]), 0.0

    def _goal(self, seen: _Seen) -> tuple[np.ndarray, float, float]:
        return self._bin, 0.0, self._bin[2] + 0.07

    def _placed(self, seen: _Seen) -> bool:
        return seen.hand[2] < self._bin[2] + 0.03

    def _held(self, seen: _Seen, grasp: np.ndarray) -> bool:
        return bool(np.linalg.norm(seen.hand - seen.object) < 0.06)


class SquareOperator(ScriptedOperator):
    """robosuite/Square: take the nut by its handle, turn it to the peg, put it over."""

    object_key = "SquareNut"
    mistakes = ("beside", "early", "drop", "wrong place")
    clearance = 0.03
    miss = 0.03
    settled = 0.004
    descend_within = 0.0
    _facing: float | None = None

    def __init__(self, env: Environment, *, skill: float = 1.0, noise: float = 0.0) -> None:
        self._facing: float | None = None
        super().__init__(env, skill=skill, noise=noise)
        core: Any = env.unwrapped  # type: ignore[attr-defined]
        self._peg = core.sim.data._data.xpos[core.peg1_body_id].copy()

    def _grasp(self, seen: _Seen) -> tuple[np.ndarray, float]:
        along = np.array([math.cos(seen.object_yaw), math.sin(seen.object_yaw), 0.0])
        return seen.object + 0.054 * along, _wrap(seen.object_yaw, math.pi)

    def _goal(self, seen: _Seen) -> tuple[np.ndarray, float, float]:
        if self._facing is None or self._phase == "lift":
            self._facing = self._choose(seen)
        # square on square; the hand goes where the nut's centre then is over the peg
        turn = _wrap(self._facing - seen.object_yaw)
        c, s = math.cos(turn), math.sin(turn)
        arm = seen.hand - seen.object
        arm = np.array([c * arm[0] - s * arm[1], s * arm[0] + c * arm[1], arm[2]])
        low = np.array([self._peg[0], self._peg[1], self._peg[2] - 0.02])
        return low + arm, seen.yaw + turn, self._peg[2] + 0.16 + arm[2]

    def _choose(self, seen: _Seen) -> float:
        """The nearest quarter turn that points the handle anywhere but away, where the arm would be at full stretch."""
        best = (math.inf, 0.0)
        for facing in (math.pi / 2, math.pi, -math.pi / 2):
            turn = _wrap(facing - seen.object_yaw)
            if _WRIST[0] < seen.yaw + turn < _WRIST[1]:
                best = min(best, (abs(turn), facing))
        return best[1]

    def _begin(self) -> None:
        super()._begin()
        self._facing = None

    def _placed(self, seen: _Seen) -> bool:
        return seen.object[2] < self._peg[2] + 0.005
