"""What each shipped robosuite task shows, when it is solved, and how far an episode got. Plain functions of MuJoCo data.

Observations follow robomimic: ``robot0_eef_pos`` (3, m), ``robot0_eef_quat`` (4, xyzw), ``robot0_gripper_qpos`` (2, m), then
robosuite 1.5's ``object-state``. They are read once a control step, after its last sub-step; robosuite 1.5 computes the
pose of an object relative to the gripper from the object's previous sample, here it is from the present one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

_POSE = ("x", "y", "z"), ("qx", "qy", "qz", "qw")
GRIPPER_NEAR = math.atanh(0.4) / 10.0  # m: closer than this robosuite takes the object as still held


def names(key: str, n: int) -> tuple[str, ...]:
    """Element names of an ``n``-vector called ``key``."""
    if n == 1:
        return (key,)
    return tuple(f"{key}_{s}" for s in (_POSE[n - 3] if n in (3, 4) else range(n)))


class Task(ABC):
    """Reads one robosuite environment. ``stages`` are in order; the last one is success."""

    stages: tuple[str, ...] = ()
    object_names: tuple[str, ...] = ()

    def __init__(self, core: Any) -> None:
        self.core = core
        self.data = core.sim.data._data
        self.model = core.sim.model._model
        robot = core.robots[0]
        self._grip = robot.eef_site_id["right"]
        self._hand = self.model.body(robot.robot_model.eef_name["right"]).id
        self._fingers = np.array(robot._ref_gripper_joint_pos_indexes["right"])
        own = (*names("robot0_eef_pos", 3), *names("robot0_eef_quat", 4), *names("robot0_gripper_qpos", 2))
        self.state_names = (*own, *self.object_names)

    def observe(self) -> np.ndarray:
        """(S,) float32 ``observation.state``."""
        data = self.data
        eef, quat = data.site_xpos[self._grip], data.xquat[self._hand]
        w, x, y, z = quat.tolist()
        return np.array(
            [*eef.tolist(), x, y, z, w, *data.qpos[self._fingers].tolist(), *self.observe_object(eef, quat)], np.float32
        )

    @abstractmethod
    def observe_object(self, eef: np.ndarray, quat: np.ndarray) -> Sequence[float]:
        """robosuite's ``object-state``."""

    @abstractmethod
    def success(self) -> bool:
        """robosuite's own criterion."""

    @abstractmethod
    def stage(self) -> int:
        """Index into ``stages`` of the present state."""

    @abstractmethod
    def start(self) -> dict[str, float]:
        """What the seed moved: m and rad."""

    def _distance(self, point: np.ndarray) -> float:
        a, b = self.data.site_xpos[self._grip].tolist(), point.tolist()
        return math.dist(a, b)


def _yaw(quat: np.ndarray) -> float:
    w, x, y, z = quat.tolist()
    return math.atan2(2.0 * (w * z + x * y), 1.0 - 2.0 * (y * y + z * z))


def _relative(eef: np.ndarray, quat: np.ndarray, pos: np.ndarray, turn: np.ndarray) -> list[float]:
    """Pose of (pos, turn) in the frame of (eef, quat): position (3) and quaternion (4, xyzw, w >= 0)."""
    w, x, y, z = quat.tolist()
    w2, x2, y2, z2 = turn.tolist()
    p, q, r = (pos - eef).tolist()
    # v' = v + 2 u x (u x v - w v) is the rotation by the conjugate
    a, b, c = y * r - z * q - w * p, z * p - x * r - w * q, x * q - y * p - w * r
    out = [p + 2.0 * (y * c - z * b), q + 2.0 * (z * a - x * c), r + 2.0 * (x * b - y * a)]
    rw = w * w2 + x * x2 + y * y2 + z * z2
    rx = w * x2 - x * w2 - y * z2 + z * y2
    ry = w * y2 + x * z2 - y * w2 - z * x2
    rz = w * z2 - x * y2 + y * x2 - z * w2
    sign = -1.0 if rw < 0.0 else 1.0
    return [*out, sign * rx, sign * ry, sign * rz, sign * rw]


class Lift(Task):
    stages = ("reach", "grasp", "lifted")
    object_names = (*names("cube_pos", 3), *names("cube_quat", 4), *names("gripper_to_cube_pos", 3))

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self._cube = core.cube_body_id
        self._goal_height = float(core.model.mujoco_arena.table_offset[2]) + 0.04

    def observe_object(self, eef: np.ndarray, quat: np.ndarray) -> Sequence[float]:
        pos = self.data.xpos[self._cube]
        w, x, y, z = self.data.xquat[self._cube].tolist()
        return [*pos.tolist(), x, y, z, w, *(pos - eef).tolist()]

    def success(self) -> bool:
        return bool(self.data.xpos[self._cube, 2] > self._goal_height)

    def stage(self) -> int:
        if self.success():
            return 2
        return 1 if self._distance(self.data.xpos[self._cube]) < 0.03 else 0

    def start(self) -> dict[str, float]:
        x, y, _ = self.data.xpos[self._cube].tolist()
        return {"cube_x": x, "cube_y": y, "cube_yaw": _yaw(self.data.xquat[self._cube])}


class _Carried(Task):
    """One free object to be brought somewhere."""

    object_key = ""

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self._object = core.obj_body_id[self.object_key]
        self._rest: float | None = None

    def observe_object(self, eef: np.ndarray, quat: np.ndarray) -> Sequence[float]:
        pos, turn = self.data.xpos[self._object], self.data.xquat[self._object]
        w, x, y, z = turn.tolist()
        return [*_relative(eef, quat, pos, turn), *pos.tolist(), x, y, z, w]

    def start(self) -> dict[str, float]:
        x, y, self._rest = self.data.xpos[self._object].tolist()
        key = self.object_key.lower()
        return {f"{key}_x": x, f"{key}_y": y, f"{key}_yaw": _yaw(self.data.xquat[self._object])}

    def stage(self) -> int:
        if self.success():
            return len(self.stages) - 1
        pos = self.data.xpos[self._object]
        if self.above_target(pos):
            return 3
        if self._rest is not None and pos[2] > self._rest + 0.03:
            return 2
        return 1 if self._distance(pos) < 0.08 else 0

    @abstractmethod
    def above_target(self, pos: np.ndarray) -> bool: ...


def _object_names(key: str) -> tuple[str, ...]:
    return (
        *names(f"{key}_to_robot0_eef_pos", 3),
        *names(f"{key}_to_robot0_eef_quat", 4),
        *names(f"{key}_pos", 3),
        *names(f"{key}_quat", 4),
    )


class Can(_Carried):
    object_key = "Can"
    stages = ("reach", "grasp", "lifted", "over bin", "in bin")
    object_names = _object_names("Can")

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        # the can's bin is the far right quarter of the second one
        half = np.array(core.bin_size[:2]) / 2
        self._low, self._high, self._floor = core.bin2_pos[:2].copy(), core.bin2_pos[:2] + half, float(core.bin2_pos[2])

    def above_target(self, pos: np.ndarray) -> bool:
        return bool((self._low < pos[:2]).all() and (pos[:2] < self._high).all())

    def success(self) -> bool:
        x, y, z = self.data.xpos[self._object].tolist()
        inside = self._low[0] < x < self._high[0] and self._low[1] < y < self._high[1] and self._floor < z < self._floor + 0.1
        return bool(inside and self._distance(self.data.xpos[self._object]) > GRIPPER_NEAR)


class Square(_Carried):
    object_key = "SquareNut"
    stages = ("reach", "grasp", "lifted", "over peg", "on peg")
    object_names = _object_names("SquareNut")

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self._peg = core.peg1_body_id
        self._height = float(core.table_offset[2]) + 0.05

    def above_target(self, pos: np.ndarray) -> bool:
        return bool((np.abs(pos[:2] - self.data.xpos[self._peg, :2]) < 0.03).all())

    def success(self) -> bool:
        pos = self.data.xpos[self._object]
        return bool(self.above_target(pos) and pos[2] < self._height and self._distance(pos) > GRIPPER_NEAR)


class Door(Task):
    stages = ("reach", "handle", "unlatched", "open")
    object_names = (
        *names("door_pos", 3), *names("handle_pos", 3), "hinge_qpos",
        *names("door_to_eef_pos", 3), *names("handle_to_eef_pos", 3), "handle_qpos",
    )  # fmt: skip

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self._door = core.object_body_ids["door"]
        self._root = self.model.body(core.door.root_body).id
        self._handle = core.door_handle_site_id
        self._hinge, self._latch = core.hinge_qpos_addr, core.handle_qpos_addr

    def observe_object(self, eef: np.ndarray, quat: np.ndarray) -> Sequence[float]:
        door, handle = self.data.xpos[self._door], self.data.site_xpos[self._handle]
        hinge, latch = float(self.data.qpos[self._hinge]), float(self.data.qpos[self._latch])
        return [*door.tolist(), *handle.tolist(), hinge, *(door - eef).tolist(), *(handle - eef).tolist(), latch]

    def success(self) -> bool:
        return bool(self.data.qpos[self._hinge] > 0.3)

    def stage(self) -> int:
        if self.success():
            return 3
        if self.data.qpos[self._hinge] > 0.03:
            return 2
        return 1 if self._distance(self.data.site_xpos[self._handle]) < 0.06 else 0

    def start(self) -> dict[str, float]:
        x, y, _ = self.model.body_pos[self._root].tolist()
        return {"door_x": x, "door_y": y, "door_yaw": _yaw(self.model.body_quat[self._root])}


class Other(Task):
    """Any other single-arm environment, through robosuite's own sensors (slower)."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.data = core.sim.data._data
        self.model = core.sim.model._model
        found = self._sensors()
        self._keys = [k for k in self._wanted() if k in found]
        self.state_names = tuple(n for k in self._keys for n in names(k, int(np.size(found[k]))))

    def _wanted(self) -> list[str]:
        prefix = self.core.robots[0].robot_model.naming_prefix
        arms = self.core.robots[0].arms
        per_arm = [
            f"{prefix}{a + '_' if len(arms) > 1 else ''}{k}" for a in arms for k in ("eef_pos", "eef_quat", "gripper_qpos")
        ]
        return [*per_arm, "object-state"]

    def _sensors(self) -> dict[str, Any]:
        self.core._update_observables(force=True)  # relative poses read the cache of the update before
        return self.core._get_observations(force_update=True)

    def observe(self) -> np.ndarray:
        found = self._sensors()
        return np.concatenate([np.ravel(found[k]) for k in self._keys]).astype(np.float32)

    def observe_object(self, eef: np.ndarray, quat: np.ndarray) -> Sequence[float]:
        return np.ravel(self._sensors()["object-state"]).tolist()

    def success(self) -> bool:
        return bool(self.core._check_success())

    def stage(self) -> int:
        return int(self.success())

    stages = ("running", "success")

    def start(self) -> dict[str, float]:
        return {}
