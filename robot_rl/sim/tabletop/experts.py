"""The scripted expert of each table-top task; how their mistakes are made is in ``operators.py``.

Measured success over 200 starts:

=============  ======  ======  ======  ======  ======
skill          1       0.75    0.5     0.25    0
=============  ======  ======  ======  ======  ======
Lift           1.00    0.98    0.81    0.44    0.20
PegInsertion   1.00    0.97    0.60    0.30    0.15
Drawer         1.00    0.93    0.65    0.35    0.18
PlaceInBin     1.00    0.95    0.72    0.38    0.18
=============  ======  ======  ======  ======  ======

Action noise of 0.1 leaves Lift and PlaceInBin at 0.99 and above at skill 1, and brings Drawer to 0.61 and PegInsertion to 0.32
(100 starts each): a tenth of the action limit is 2.5 mm a step, held for several steps.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from robot_rl.sim.tabletop.core import GRIPPER_OPEN, body_yaw, wrap
from robot_rl.sim.tabletop.operators import CLOSED, Goal, GraspExpert, ScriptedExpert
from robot_rl.sim.tabletop.tasks import DrawerEnv, LiftEnv, PegInsertionEnv, PlaceInBinEnv


class LiftExpert(GraspExpert):
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


class PegInsertionExpert(GraspExpert):
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

    def _aim(self) -> tuple[float, float, float, float]:
        hx, hy, hz, handle_yaw = self._handle()
        dx, dy, dz = self.attempt.aim
        z = hz + 0.5 * self.grip_height + max(dz, -0.004) + (0.014 if self.attempt.slip == "stays high" else 0.0)
        return hx + dx, hy + dy, z, self._yaw_to(handle_yaw + self.attempt.turn)

    def _above(self) -> bool:
        return self._over(*self._aim(), 0.008, 0.08)

    def _plan(self) -> Goal:
        env, slip = self._env, self.attempt.slip
        handle_yaw = self._handle()[3]
        x, y, z, yaw = self._aim()
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


class PlaceInBinExpert(GraspExpert):
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
