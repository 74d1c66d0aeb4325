"""Scripted operators that demonstrate the table-top tasks well, badly, or anything between.

An expert works in phases (reach, grasp, transport ...) on the true state of the simulation and moves the commanded pose
with a smooth profile. What makes a demonstration human is drawn from the episode's generator and *never from the state*: a
style (speed, approach arc, grasp height), and per attempt an aim error and possibly one slip (closes too early, lifts before
it has closed, lets go, does not align). In every state the demonstrations therefore hold both the good and the bad
continuation; a policy cloned from them has both in its noise, which is what post-training in the noise needs.

``skill`` scales the aim error by ``1 - skill`` and the chance of a slip likewise; ``noise`` is the standard deviation of
temporally correlated action noise, as a fraction of the action limits.

Measured success over 200 starts:

SKILLTABLE
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from robot_rl.sim.tabletop.core import ACTION, GRIPPER_OPEN, TabletopEnv, body_yaw, wrap
from robot_rl.sim.tabletop.tasks import DrawerEnv, LiftEnv, PegInsertionEnv, PlaceInBinEnv
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


class _GraspExpert(ScriptedExpert):
    """Reach above an object, go down, close, and lift it; the part that tasks with a loose object share."""

    def _object(self) -> tuple[float, float, float, float]:
        """x, y of the object, height to grasp it at, and its yaw."""
        raise NotImplementedError

    def _holding(self) -> bool:
        raise NotImplementedError

    def _pick(self, lift_to: float) -> Goal:
        x, y, z, object_yaw = self._object()
        dx, dy, dz = self.attempt.aim
        z += self.grip_height + dz
        yaw = self._yaw_to(object_yaw + self.attempt.turn)
        x, y = x + dx, y + dy
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


class LiftExpert(_GraspExpert):
    """Expert of ``tabletop/Lift``."""

    slips = ("closes early", "lifts early")
    slip_rate = 0.9
    aim_sigma = (0.024, 0.024, 0.012)
    turn_sigma = 0.35
    retry_rate = 0.2

    _env: LiftEnv

    def _object(self) -> tuple[float, float, float, float]:
        position, rotation = self._env.body_pose(self._env.block)
        return float(position[0]), float(position[1]), max(0.012, float(position[2]) - 0.002), body_yaw(rotation)

    def _holding(self) -> bool:
        return bool(self._env.data.xpos[self._env.block, 2] > 0.024)

    def _plan(self) -> Goal:
        if self.phase == "back off" or self._missed():
            return self._back_off()
        return self._wander() if self.phase == "lost" else self._pick(0.19)


class PegInsertionExpert(_GraspExpert):
    """Expert of ``tabletop/PegInsertion``."""

    slips = ("closes early", "lifts early", "lets go")
    slip_rate = 0.3
    aim_sigma = (0.006, 0.006, 0.006)
    turn_sigma = 0.10
    align_sigma: ClassVar[float] = 0.006  # m off the hole at skill 0
    align_turn_sigma: ClassVar[float] = 0.10
    carry_height: ClassVar[float] = 0.060  # m of the peg's tip over the table

    _env: PegInsertionEnv

    def reset(self, env: Any, rng: np.random.Generator) -> None:
        super().reset(env, rng)
        self._new_alignment()

    def _new_alignment(self) -> None:
        lack = 1.0 - self.skill
        self._off = self._rng.normal(0.0, self.align_sigma * lack, 2)
        self._twist = float(self._rng.normal(0.0, self.align_turn_sigma * lack))
        self._tolerance = 0.0015 + float(self._rng.uniform(0.0, 0.004)) * lack

    def _object(self) -> tuple[float, float, float, float]:
        position, rotation = self._env.body_pose(self._env.peg)
        return float(position[0]), float(position[1]), float(position[2]) + 0.026, body_yaw(rotation)

    def _holding(self) -> bool:
        return self._env.peg_tip()[2] > 0.006

    def _plan(self) -> Goal:
        if self.phase == "back off" or self._missed():
            return self._back_off()
        if self.phase == "lost":
            return self._wander()
        if self.phase in ("reach", "hesitate", "descend", "close", "lift"):
            tip = self._env.peg_tip()
            if self.phase == "lift" and self._holding() and tip[2] > 0.02:
                self._enter("transport")
            return self._pick(0.075 + self.carry_height)
        return self._insert()

    def _insert(self) -> Goal:
        env = self._env
        hx, hy, hole_yaw = env.hole()
        tx, ty, tz = env.peg_tip()
        cx, cy, cz, cyaw, _ = env.command
        tool_z = env.tool[2]
        gx, gy = hx + self._off[0], hy + self._off[1]
        peg_yaw = body_yaw(env.data.xmat[env.peg])
        yaw = cyaw + wrap(hole_yaw + self._twist - peg_yaw, np.pi / 2) * 0.7
        # The hand goes where the peg's tip, as it is held, comes over the goal.
        mx, my, _, _ = env.tool
        x, y = gx - tx + mx, gy - ty + my
        up = tool_z - tz + self.carry_height
        width = CLOSED
        if self.phase == "transport":
            if np.hypot(gx - tx, gy - ty) < 0.02:
                self._enter("align")
                if self.attempt.slip == "lets go":
                    self._enter("let go")
            bx, by = self._bow(x, y)
            return Goal(bx, by, up, yaw, width)
        if self.phase == "let go":
            if self._ticks >= 3:
                self._enter("lost")
            return Goal(x, y, up, yaw, GRIPPER_OPEN)
        if self.phase == "align":
            aligned = (
                np.hypot(gx - tx, gy - ty) < self._tolerance and abs(wrap(hole_yaw + self._twist - peg_yaw, np.pi / 2)) < 0.06
            )
            if (aligned and self._ticks >= 2) or self._ticks > 14:
                self._down = (gx, gy)
                self._enter("insert")
            return Goal(x, y, up - 0.008, yaw, width, 0.8)
        if self.phase == "retreat":
            if tz > self.carry_height - 0.012 or self._ticks > 8:
                self._new_alignment()
                self._enter("align")
            return Goal(cx, cy, up, yaw, width)
        if self._stuck(tz, 7):
            if not self._gives_up():
                self._enter("retreat")
            else:
                self._stalled = -100
        # Feedback on the command itself takes out what the servos sag; pressing stays within what the grip holds.
        return Goal(cx + gx - tx, cy + gy - ty, max(cz - 0.03, tool_z - 0.014), yaw, width, 0.3)


class DrawerExpert(ScriptedExpert):
    """Expert of ``tabletop/Drawer``."""

    slips = ("comes down open", "lets go", "stays high")
    slip_rate = 0.9
    aim_sigma = (0.020, 0.020, 0.010)
    turn_sigma = 0.20
    retry_rate = 0.2
    symmetry = np.pi
    approach_width: ClassVar[float] = 0.036  # m; open wide the rear pad does not fit between bar and face

    _env: DrawerEnv

    def _handle(self) -> tuple[float, float, float, float]:
        """x, y, z and yaw of the handle."""
        position, rotation = self._env.body_pose(self._env.handle)
        return float(position[0]), float(position[1]), float(position[2]), body_yaw(rotation)

    def _plan(self) -> Goal:
        env, slip = self._env, self.attempt.slip
        hx, hy, hz, handle_yaw = self._handle()
        dx, dy, dz = self.attempt.aim
        z = hz + 0.5 * self.grip_height + max(dz, -0.004) + (0.014 if slip == "stays high" else 0.0)
        yaw = self._yaw_to(handle_yaw + self.attempt.turn)
        x, y = hx + dx, hy + dy
        over = z + self.hover
        cx, cy, cz, cyaw, width = env.command
        wide = GRIPPER_OPEN if slip == "comes down open" else self.approach_width
        if self.phase == "back off":
            if self._ticks >= 4:
                self._enter("reach")
            return Goal(cx, cy, min(cz + 0.05, 0.2), cyaw, self.approach_width)
        if self.phase in ("reach", "hesitate"):
            if self.phase == "hesitate":
                arrived = self._ticks >= self.attempt.hesitate
            else:
                arrived = self._near(x, y, over, 0.008) and abs(yaw - env.tool[3]) < 0.08
            if arrived:
                self._enter("hesitate" if self.phase == "reach" and self.attempt.hesitate else "descend")
            bx, by = self._bow(x, y) if self.phase == "reach" else (x, y)
            return Goal(bx, by, over, yaw, wide)
        if self.phase == "descend":
            if env.tool[2] < z + 0.003 or self._stuck(env.tool[2], 5):
                self._aimed = (cx, cy, cz, cyaw)
                self._enter("close")
            return Goal(x, y, z, yaw, wide, 0.7)
        if self.phase == "close":
            if self._ticks >= self.attempt.close_steps:
                self._closed_at = env.opening
                self._pull = float(self._rng.uniform(0.02, 0.10))  # where a slip lets go
                self._enter("pull")
            x, y, z, yaw = self._aimed
            return Goal(x, y, z, yaw, CLOSED)
        if self.phase == "lost":
            return Goal(cx, cy, 0.2, cyaw, width, 0.5)
        if slip == "lets go" and env.opening > self._pull:
            self._enter("lost")
            return Goal(cx, cy, cz, cyaw, GRIPPER_OPEN)
        if self._ticks >= 8 and env.opening < self._closed_at + 0.008:
            if self._gives_up():
                self._enter("lost")
            else:
                self._new_attempt("back off")
        pull = 0.10
        return Goal(cx + pull * float(np.sin(handle_yaw)), cy - pull * float(np.cos(handle_yaw)), cz, cyaw, CLOSED, 0.6)


class PlaceInBinExpert(_GraspExpert):
    """Expert of ``tabletop/PlaceInBin``."""

    slips = ("closes early", "lifts early", "lets go")
    slip_rate = 0.8
    aim_sigma = (0.018, 0.018, 0.010)
    turn_sigma = 0.25
    retry_rate = 0.2
    align_sigma: ClassVar[float] = 0.032  # m off the middle of the bin at skill 0

    _env: PlaceInBinEnv

    def reset(self, env: Any, rng: np.random.Generator) -> None:
        super().reset(env, rng)
        self._off = rng.normal(0.0, self.align_sigma * (1.0 - self.skill), 2)
        self._drop = float(rng.uniform(0.05, 0.15))  # how far from the bin a slip lets go

    def _object(self) -> tuple[float, float, float, float]:
        position, rotation = self._env.body_pose(self._env.cube)
        return float(position[0]), float(position[1]), max(0.014, float(position[2]) + 0.002), body_yaw(rotation)

    def _holding(self) -> bool:
        return bool(self._env.data.xpos[self._env.cube, 2] > 0.028)

    def _plan(self) -> Goal:
        env = self._env
        if self.phase == "back off" or self._missed():
            return self._back_off()
        if self.phase == "lost":
            return self._wander()
        cube_x, cube_y, cube_z = env.data.xpos[env.cube].tolist()
        if self.phase in ("reach", "hesitate", "descend", "close", "lift"):
            if self.phase == "lift" and cube_z > 0.05:
                self._enter("transport")
            return self._pick(0.12)
        bx, by, bin_yaw = env.bin_pose()
        gx, gy = bx + self._off[0], by + self._off[1]
        mx, my, mz, _ = env.tool
        cx, cy, cz, cyaw, _ = env.command
        yaw = cyaw + wrap(bin_yaw - body_yaw(env.data.xmat[env.cube]), np.pi / 2) * 0.7
        x, y = gx - cube_x + mx, gy - cube_y + my
        distance = float(np.hypot(gx - cube_x, gy - cube_y))
        if self.phase == "transport":
            if distance < 0.008 and self._ticks >= 2:
                self._enter("lower")
            if self.attempt.slip == "lets go" and distance < self._drop:
                self._enter("lost")
                return Goal(x, y, cz, yaw, GRIPPER_OPEN)
            bx, by = self._bow(x, y)
            return Goal(bx, by, 0.095 + mz - cube_z, yaw, CLOSED)
        if self.phase == "lower":
            if cube_z < 0.055 or self._stuck(cube_z, 6):
                self._enter("release")
            return Goal(x, y, 0.045 + mz - cube_z, yaw, CLOSED, 0.7)
        if self._ticks < 3:
            return Goal(cx, cy, cz, cyaw, GRIPPER_OPEN)
        return Goal(cx, cy, cz + 0.05, cyaw, GRIPPER_OPEN)


EXPERTS: dict[str, type[ScriptedExpert]] = {
    "tabletop/Lift": LiftExpert,
    "tabletop/PegInsertion": PegInsertionExpert,
    "tabletop/Drawer": DrawerExpert,
    "tabletop/PlaceInBin": PlaceInBinExpert,
}
