"""The table-top tasks. Each says what is placed where, what is observed, and what honest success is."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from robot_rl.sim.tabletop.core import TabletopEnv, body_yaw, yaw_quaternion


class LiftEnv(TabletopEnv):
    """Pick a 54 x 54 x 36 mm block from the table and hold it 10 cm up.

    The block lies anywhere in a 20 x 24 cm field at any yaw within 45 degrees; the open gripper is 13 mm wider than the block
    on each side, and less when it is turned against it.
    Success: its centre has been 10 cm above its rest height, between both pads, for 4 control steps in a row.
    """

    scene: ClassVar[str] = "lift"
    instruction: ClassVar[str] = "pick up the orange block"
    limit: ClassVar[int] = 70
    task_names: ClassVar[tuple[str, ...]] = (
        "block_from_ee_x", "block_from_ee_y", "block_from_ee_z", "block_turn_sin4", "block_turn_cos4",
        "block_tilt_x", "block_tilt_y", "block_height",
    )  # fmt: skip
    HALF_HEIGHT = 0.018
    LIFTED = 0.10
    HOLD_STEPS = 4

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.block = self.model.body("object").id
        self.graspable = self.model.geom("object").id
        self._adr = int(self.model.joint("object").qposadr[0])

    def _place(self, rng: np.random.Generator) -> dict[str, float]:
        x, y = rng.uniform((-0.09, -0.12), (0.11, 0.12)).tolist()
        yaw = float(rng.uniform(-0.78, 0.78))
        self.data.qpos[self._adr : self._adr + 7] = [x, y, self.HALF_HEIGHT, *yaw_quaternion(yaw)]
        return {"block_x": x, "block_y": y, "block_yaw": yaw}

    def _observe_task(self, out: np.ndarray) -> None:
        tx, ty, tz, tool_yaw = self.tool
        position, rotation = self.body_pose(self.block)
        px, py, pz = position.tolist()
        turn = 4 * (body_yaw(rotation) - tool_yaw)
        out[:] = (px - tx, py - ty, pz - tz, math.sin(turn), math.cos(turn), rotation[2], rotation[5], pz)

    def _judge(self) -> tuple[bool, str]:
        height = float(self.data.xpos[self.block, 2])
        left, right = self.touching(self.graspable)
        held = left and right
        up = held and height > self.HALF_HEIGHT + self.LIFTED
        self._memory["held_up"] = self._memory.get("held_up", 0.0) + 1.0 if up else 0.0
        if held:
            stage = "lift" if height > self.HALF_HEIGHT + 0.01 else "grasp"
            self._memory["lifted"] = max(self._memory.get("lifted", 0.0), float(stage == "lift"))
        else:
            stage = "dropped" if self._memory.get("lifted") else "reach"
        return self._memory["held_up"] >= self.HOLD_STEPS, stage


class PegInsertionEnv(TabletopEnv):
    """Take a standing 20 mm square peg and push it to the bottom of a 22 mm square hole (1 mm clearance a side).

    The peg stands in a 12 x 10 cm field, the block with the hole in a 10 x 10 cm field opposite, both at any yaw within 20
    degrees. Success: the peg's lower end is within 5 mm of the hole's floor, upright, and inside the hole's walls.
    """

    scene: ClassVar[str] = "peg_insertion"
    instruction: ClassVar[str] = "insert the orange peg into the green block"
    limit: ClassVar[int] = 110
    setbacks: ClassVar[tuple[str, ...]] = ("dropped", "toppled")
    task_names: ClassVar[tuple[str, ...]] = (
        "peg_from_ee_x", "peg_from_ee_y", "peg_from_ee_z", "peg_turn_sin4", "peg_turn_cos4", "peg_tilt_x", "peg_tilt_y",
        "hole_from_tip_x", "hole_from_tip_y", "tip_height", "hole_from_ee_x", "hole_from_ee_y",
        "hole_turn_sin4", "hole_turn_cos4",
    )  # fmt: skip
    HALF_LENGTH = 0.045
    BLOCK_HEIGHT = 0.045
    DEPTH = 0.005  # m from the floor that counts as fully in

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.peg = self.model.body("peg").id
        self.socket = self.model.body("socket").id
        self.graspable = self.model.geom("peg").id
        self._adr = int(self.model.joint("peg").qposadr[0])
        self._mocap = int(self.model.body_mocapid[self.socket])

    def _place(self, rng: np.random.Generator) -> dict[str, float]:
        x, y = rng.uniform((-0.07, -0.16), (0.05, -0.06)).tolist()
        hx, hy = rng.uniform((-0.03, 0.06), (0.07, 0.16)).tolist()
        yaw, hole_yaw = rng.uniform(-0.35, 0.35, 2).tolist()
        self.data.qpos[self._adr : self._adr + 7] = [x, y, self.HALF_LENGTH, *yaw_quaternion(yaw)]
        self.data.mocap_pos[self._mocap] = hx, hy, 0.0
        self.data.mocap_quat[self._mocap] = yaw_quaternion(hole_yaw)
        return {"peg_x": x, "peg_y": y, "peg_yaw": yaw, "hole_x": hx, "hole_y": hy, "hole_yaw": hole_yaw}

    def _start_pose(self, rng: np.random.Generator) -> tuple[float, float, float, float, float]:
        x, y, z, yaw, width = super()._start_pose(rng)
        return x, y, z + 0.03, yaw, width

    def peg_tip(self) -> tuple[float, float, float]:
        """Centre of the peg's lower face (m)."""
        x, y, z = self.data.xpos[self.peg].tolist()
        r = self.data.xmat[self.peg]
        half = self.HALF_LENGTH
        return x - half * float(r[2]), y - half * float(r[5]), z - half * float(r[8])

    def hole(self) -> tuple[float, float, float]:
        """x, y (m) and yaw (rad) of the hole."""
        x, y, _ = self.data.xpos[self.socket].tolist()
        return x, y, body_yaw(self.data.xmat[self.socket])

    def _observe_task(self, out: np.ndarray) -> None:
        tx, ty, tz, tool_yaw = self.tool
        px, py, pz = self.data.xpos[self.peg].tolist()
        rotation = self.data.xmat[self.peg]
        hx, hy, hole_yaw = self.hole()
        ex, ey, ez = self.peg_tip()
        peg_yaw = body_yaw(rotation)
        peg_turn, hole_turn = 4 * (peg_yaw - tool_yaw), 4 * (hole_yaw - peg_yaw)
        out[:] = (
            px - tx, py - ty, pz - tz, math.sin(peg_turn), math.cos(peg_turn), rotation[2], rotation[5],
            hx - ex, hy - ey, ez, hx - tx, hy - ty, math.sin(hole_turn), math.cos(hole_turn),
        )  # fmt: skip

    def _judge(self) -> tuple[bool, str]:
        hx, hy, _ = self.hole()
        x, y, z = self.peg_tip()
        upright = float(self.data.xmat[self.peg, 8])
        off = math.hypot(x - hx, y - hy)
        inside = off < 0.004 and upright > 0.99
        success = inside and z < self.DEPTH
        left, right = self.touching(self.graspable)
        if inside and z < self.BLOCK_HEIGHT - 0.002:
            stage = "insert"
        elif upright < 0.7 and not (left and right):
            stage = "toppled"
        elif left and right:
            stage = "align" if off < 0.02 else "transport" if z > 0.01 else "grasp"
        else:
            stage = "dropped" if self._memory.get("carried") else "reach"
        if stage in ("transport", "align", "insert"):
            self._memory["carried"] = 1.0
        return success, stage


class DrawerEnv(TabletopEnv):
    """Take the bar handle of a drawer from above, one pad behind it, and pull the drawer 10 cm open.

    The cabinet stands anywhere in a 14 x 6 cm field turned by up to 15 degrees. There are 30 mm between the bar and the
    drawer's face for a 10 mm pad, so the gripper must come down half closed and in the right place. Success: the drawer is
    open by 10 cm and both pads still hold the bar.
    """

    scene: ClassVar[str] = "drawer"
    instruction: ClassVar[str] = "open the drawer"
    limit: ClassVar[int] = 80
    setbacks: ClassVar[tuple[str, ...]] = ("slipped",)
    task_names: ClassVar[tuple[str, ...]] = (
        "handle_from_ee_x", "handle_from_ee_y", "handle_from_ee_z", "handle_turn_sin2", "handle_turn_cos2",
        "handle_yaw", "drawer_open",
    )  # fmt: skip
    OPEN = 0.10

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.handle = self.model.body("handle").id
        self.graspable = self.model.geom("handle").id
        self._joint = int(self.model.joint("drawer").qposadr[0])
        self._mocap = int(self.model.body_mocapid[self.model.body("cabinet").id])

    def _place(self, rng: np.random.Generator) -> dict[str, float]:
        x, y = rng.uniform((-0.06, 0.20), (0.08, 0.26)).tolist()
        yaw = float(rng.uniform(-0.26, 0.26))
        opening = float(rng.uniform(0.0, 0.01))
        self.data.mocap_pos[self._mocap] = x, y, 0.0
        self.data.mocap_quat[self._mocap] = yaw_quaternion(yaw)
        self.data.qpos[self._joint] = opening
        return {"cabinet_x": x, "cabinet_y": y, "cabinet_yaw": yaw, "opening": opening}

    def _start_pose(self, rng: np.random.Generator) -> tuple[float, float, float, float, float]:
        x, y, z, yaw, width = super()._start_pose(rng)
        return x, y - 0.06, z, yaw, width

    @property
    def opening(self) -> float:
        """How far the drawer is open (m)."""
        return float(self.data.qpos[self._joint])

    def _observe_task(self, out: np.ndarray) -> None:
        tx, ty, tz, tool_yaw = self.tool
        hx, hy, hz = self.data.xpos[self.handle].tolist()
        yaw = body_yaw(self.data.xmat[self.handle])
        turn = 2 * (yaw - tool_yaw)
        out[:] = (hx - tx, hy - ty, hz - tz, math.sin(turn), math.cos(turn), yaw, self.opening)

    def _judge(self) -> tuple[bool, str]:
        left, right = self.touching(self.graspable)
        self._memory.setdefault("start", self.opening)
        pulled = self.opening > self._memory["start"] + 0.01
        held = left and right
        stage = ("pull" if held else "slipped") if pulled else ("grasp" if held else "reach")
        return held and self.opening > self.OPEN, stage


class PlaceInBinEnv(TabletopEnv):
    """Pick a 44 mm cube and leave it in a bin with a 72 mm square opening (14 mm clearance a side) and 45 mm walls.

    Cube and bin stand in two fields opposite each other; the cube at any yaw within 45 degrees, the bin within 20. Success: the
    cube lies on the bin's floor, inside its walls, and the gripper has let go of it.
    """

    scene: ClassVar[str] = "place_in_bin"
    instruction: ClassVar[str] = "put the orange cube into the green bin"
    limit: ClassVar[int] = 100
    task_names: ClassVar[tuple[str, ...]] = (
        "cube_from_ee_x", "cube_from_ee_y", "cube_from_ee_z", "cube_turn_sin4", "cube_turn_cos4", "cube_tilt_x", "cube_tilt_y",
        "bin_from_cube_x", "bin_from_cube_y", "cube_height", "bin_from_ee_x", "bin_from_ee_y", "bin_turn_sin4", "bin_turn_cos4",
    )  # fmt: skip
    HALF = 0.022
    INSIDE = 0.036

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.cube = self.model.body("cube").id
        self.bin = self.model.body("bin").id
        self.graspable = self.model.geom("cube").id
        self._adr = int(self.model.joint("cube").qposadr[0])
        self._mocap = int(self.model.body_mocapid[self.bin])

    def _place(self, rng: np.random.Generator) -> dict[str, float]:
        x, y = rng.uniform((-0.08, -0.17), (0.08, -0.06)).tolist()
        bx, by = rng.uniform((-0.05, 0.07), (0.09, 0.17)).tolist()
        yaw, bin_yaw = float(rng.uniform(-0.78, 0.78)), float(rng.uniform(-0.35, 0.35))
        self.data.qpos[self._adr : self._adr + 7] = [x, y, self.HALF, *yaw_quaternion(yaw)]
        self.data.mocap_pos[self._mocap] = bx, by, 0.0
        self.data.mocap_quat[self._mocap] = yaw_quaternion(bin_yaw)
        return {"cube_x": x, "cube_y": y, "cube_yaw": yaw, "bin_x": bx, "bin_y": by, "bin_yaw": bin_yaw}

    def bin_pose(self) -> tuple[float, float, float]:
        """x, y (m) and yaw (rad) of the bin."""
        x, y, _ = self.data.xpos[self.bin].tolist()
        return x, y, body_yaw(self.data.xmat[self.bin])

    def _observe_task(self, out: np.ndarray) -> None:
        tx, ty, tz, tool_yaw = self.tool
        cx, cy, cz = self.data.xpos[self.cube].tolist()
        rotation = self.data.xmat[self.cube]
        bx, by, bin_yaw = self.bin_pose()
        yaw = body_yaw(rotation)
        turn, bin_turn = 4 * (yaw - tool_yaw), 4 * (bin_yaw - yaw)
        out[:] = (
            cx - tx, cy - ty, cz - tz, math.sin(turn), math.cos(turn), rotation[2], rotation[5],
            bx - cx, by - cy, cz, bx - tx, by - ty, math.sin(bin_turn), math.cos(bin_turn),
        )  # fmt: skip

    def _judge(self) -> tuple[bool, str]:
        bx, by, bin_yaw = self.bin_pose()
        x, y, z = self.data.xpos[self.cube].tolist()
        c, s = math.cos(bin_yaw), math.sin(bin_yaw)
        u, v = c * (x - bx) + s * (y - by), c * (y - by) - s * (x - bx)
        inside = max(abs(u), abs(v)) < self.INSIDE and z < self.HALF + 0.012
        left, right = self.touching(self.graspable)
        if inside:
            stage = "release"
        elif left and right:
            stage = "grasp" if z < self.HALF + 0.01 else "align" if math.hypot(u, v) < 0.03 else "transport"
        else:
            stage = "dropped" if self._memory.get("carried") else "reach"
        if stage in ("transport", "align"):
            self._memory["carried"] = 1.0
        return inside and not left and not right, stage


TASKS: dict[str, type[TabletopEnv]] = {
    "tabletop/Lift": LiftEnv,
    "tabletop/PegInsertion": PegInsertionEnv,
    "tabletop/Drawer": DrawerEnv,
    "tabletop/PlaceInBin": PlaceInBinEnv,
}
