"""What every table-top task shares: the arm, its Cartesian commands, observations, episodes, exact save and restore.

One control step (20 Hz) is one call of ``mj_step`` with 20 physics sub-steps of 2.5 ms; nothing in Python runs between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mujoco
import numpy as np

from robot_rl import paths, seeding
from robot_rl.sim.env import EnvSpec
from robot_rl.sim.tabletop.kinematics import ArmGeometry
from robot_rl.types import OBSERVATION_IMAGES, OBSERVATION_STATE, ActionSpec, FeatureSpec, Observation

CONTROL_HZ = 20.0
CAMERAS = ("front", "wrist")
GRIPPER_OPEN = 0.08  # m between the pads
LEASH = 0.06  # m that the commanded pose may run ahead of the measured one, so that pressing cannot wind up
YAW_LEASH = 0.5  # rad
ACTION = ActionSpec(
    low=(-0.025, -0.025, -0.025, -0.2, 0.0),
    high=(0.025, 0.025, 0.025, 0.2, GRIPPER_OPEN),
    names=("delta_x", "delta_y", "delta_z", "delta_yaw", "gripper_width"),
    kind=("continuous", "continuous", "continuous", "continuous", "gripper_continuous"),
    mode=("delta", "delta", "delta", "delta", "absolute"),
)
ROBOT_NAMES = (
    "ee_x", "ee_y", "ee_z", "ee_yaw", "lag_x", "lag_y", "lag_z", "lag_yaw", "gripper_width", "gripper_command",
)  # fmt: skip
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


def wrap(angle: float, period: float = 2 * math.pi) -> float:
    """``angle`` moved into [-period/2, period/2)."""
    return (angle + period / 2) % period - period / 2


@dataclass(frozen=True)
class Workspace:
    """Box that the commanded tool position is clipped to (metres, table top at z = 0), and the limits of its yaw (radians)."""

    low: tuple[float, float, float] = (-0.20, -0.26, 0.013)  # the pads reach 12 mm below the tool centre
    high: tuple[float, float, float] = (0.20, 0.26, 0.30)
    yaw: tuple[float, float] = (-2.2, 2.2)


@dataclass(frozen=True)
class TabletopState:
    """A saved moment. ``physics`` is MuJoCo's full integration state; ``command`` is x, y, z, yaw, gripper width."""

    env_id: str
    physics: np.ndarray
    command: tuple[float, ...]
    steps: int
    ended: bool
    memory: dict[str, float]
    rng: dict[str, Any]


class TabletopEnv:
    """A task of the table-top family; subclasses add the objects, the observation of them and what success is.

    Args:
        env_id: its registered id.
        cameras: any of ``front``, ``wrist``; each adds ``observation.images.<camera>``.
        image_size: pixels, one number for square pictures or (height, width).
        max_episode_steps: overrides the task's own limit.
        object_state: whether ``observation.state`` tells where the objects are; without, a policy must see it.

    Action (5,), physical units: x, y, z motion of the tool in metres and turn about vertical in radians, added to the last
    *commanded* pose, and the gripper's opening in metres. Values beyond ``spec.action``'s limits are clipped; the commanded
    pose stays in ``workspace`` and within 6 cm of the measured one.

    Observation: ``observation.state``, float32, names in ``spec.observation_features``; ``lag_*`` is commanded minus measured
    pose.

    Attributes:
        looked_at: False repeats the last pictures instead of drawing new ones, for whoever knows that nobody looks.
    """

    scene: ClassVar[str]
    instruction: ClassVar[str]
    limit: ClassVar[int]
    setbacks: ClassVar[tuple[str, ...]] = ("dropped",)
    task_names: ClassVar[tuple[str, ...]]
    workspace: ClassVar[Workspace] = Workspace()
    graspable: int  # geom that the gripper is to hold

    def __init__(
        self,
        *,
        env_id: str,
        cameras: Sequence[str] = (),
        image_size: int | tuple[int, int] = 84,
        max_episode_steps: int | None = None,
        object_state: bool = True,
    ) -> None:
        if not isinstance(object_state, bool):
            raise ValueError(f"object_state={object_state!r}: accepted are true, false")
        cameras = (cameras,) if isinstance(cameras, str) else tuple(cameras)
        for camera in cameras:
            if camera not in CAMERAS:
                raise ValueError(f"cameras: {camera!r} is unknown; accepted are {', '.join(CAMERAS)}")
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or not all(isinstance(n, int) and 8 <= n <= 960 for n in size):
            raise ValueError(f"image_size={image_size!r}: accepted are integers from 8 to 960, one or (height, width)")
        limit = self.limit if max_episode_steps is None else max_episode_steps
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_episode_steps={max_episode_steps!r}: accepted are integers >= 1")
        self._cameras, self._image_size = cameras, size
        names = ROBOT_NAMES + self.task_names
        self._told = len(names) if object_state else len(ROBOT_NAMES)
        features = {OBSERVATION_STATE: FeatureSpec((self._told,), "float32", names[: self._told])}
        features |= {OBSERVATION_IMAGES + c: FeatureSpec((*size, 3), "uint8") for c in cameras}
        self.spec = EnvSpec(env_id, self.instruction, features, ACTION, CONTROL_HZ, limit, setbacks=self.setbacks)
        self.model = mujoco.MjModel.from_xml_path(str(paths.find("sim_assets", "tabletop", f"{self.scene}.xml")))
        # A diverged simulation must be reported, not silently restarted in the middle of an episode.
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.data = mujoco.MjData(self.model)
        self._substeps = round(1.0 / (CONTROL_HZ * self.model.opt.timestep))
        self._arm = ArmGeometry.from_model(self.model)
        self._low, self._high = np.array(ACTION.low), np.array(ACTION.high)
        self._tcp = self.model.site("tcp").id
        self._fingers = [int(self.model.joint(n).qposadr[0]) for n in ("finger_left", "finger_right")]
        pads = {self.model.geom(f"pad_{side}_{part}").id: side for side in ("left", "right") for part in ("a", "b")}
        self._pads: dict[int, str] = pads
        self._camera_ids = {c: self.model.camera(c).id for c in CAMERAS}
        self._state_size = mujoco.mj_stateSize(self.model, _STATE)
        self._observed = np.empty(len(names))
        self.looked_at, self._shown = True, dict[str, np.ndarray]()
        self._command = [0.0] * 5
        self._steps, self._ended = 0, True
        self._memory: dict[str, float] = {}
        self._rng = seeding.rng("tabletop", env_id, 0)

    # --- what a task defines ---

    def _place(self, rng: np.random.Generator) -> dict[str, float]:
        """Put the objects down and return ``info["start"]``."""
        raise NotImplementedError

    def _start_pose(self, rng: np.random.Generator) -> tuple[float, float, float, float, float]:
        """x, y, z, yaw of the tool and the gripper's opening at the start."""
        x, y = rng.uniform((-0.06, -0.05), (0.06, 0.05))
        return float(x), float(y), float(rng.uniform(0.17, 0.22)), float(rng.uniform(-0.3, 0.3)), GRIPPER_OPEN

    def _observe_task(self, out: np.ndarray) -> None:
        """Fill ``out`` with the values of ``task_names``."""
        raise NotImplementedError

    def _judge(self) -> tuple[bool, str]:
        """(success, stage) after a control step; contacts are those of its last sub-step."""
        raise NotImplementedError

    # --- Environment ---

    def reset(self, *, seed: int) -> tuple[Observation, dict[str, Any]]:
        self._rng = seeding.rng("tabletop", self.spec.env_id, int(seed))
        mujoco.mj_resetData(self.model, self.data)
        start = self._place(self._rng)
        pose = self._start_pose(self._rng)
        self._command = list(pose)
        self._write_command()
        for i in range(7):
            self.data.qpos[i] = self.data.ctrl[i]
        for adr in self._fingers:
            self.data.qpos[adr] = pose[4] / 2
        self.data.act[:] = self.data.ctrl[:7]  # the command filters start at rest
        mujoco.mj_forward(self.model, self.data)
        self._steps, self._ended, self._memory, self._shown = 0, False, {}, {}
        start |= {"ee_x": pose[0], "ee_y": pose[1], "ee_z": pose[2], "ee_yaw": pose[3]}
        return self._observe(), {"success": False, "stage": "reach", "start": start}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self._ended:
            raise RuntimeError(f"{self.spec.env_id}: the episode has ended (or never began); call reset(seed=...) before step")
        action = np.asarray(action, np.float64)
        if action.shape != (5,):
            raise ValueError(f"action has shape {action.shape}; {self.spec.env_id} takes (5,): {', '.join(ACTION.names)}")
        if not np.isfinite(action).all():
            bad = [f"{n}={v}" for n, v in zip(ACTION.names, action, strict=True) if not math.isfinite(v)]
            raise ValueError(f"action is not finite: {', '.join(bad)}")
        self._integrate(np.minimum(np.maximum(action, self._low), self._high).tolist())
        self._write_command()
        self.advance(self._substeps)
        self._steps += 1
        success, stage = self._judge()
        terminated = success
        truncated = not terminated and self._steps >= self.spec.max_episode_steps
        self._ended = terminated or truncated
        info = {"success": success, "stage": "done" if success else stage}
        return self._observe(), float(success), terminated, truncated, info

    def render(self, camera: str = "", width: int = 320, height: int = 240) -> np.ndarray:
        """(height, width, 3) uint8 with shadows and smooth edges; for videos. Cameras: ``front`` (default), ``wrist``."""
        camera = camera or "front"
        if camera not in self._camera_ids:
            raise ValueError(f"camera={camera!r}: accepted are {', '.join(CAMERAS)}")
        return self.picture(camera, width, height, self.data, fine=True)

    def get_state(self) -> TabletopState:
        physics = np.empty(self._state_size)
        mujoco.mj_getState(self.model, self.data, physics, _STATE)
        rng = dict(self._rng.bit_generator.state)
        return TabletopState(self.spec.env_id, physics, tuple(self._command), self._steps, self._ended, dict(self._memory), rng)

    def set_state(self, state: TabletopState) -> None:
        """Continue from a state of the same task, bit for bit, in this or another instance or process.

        Raises:
            ValueError: the state is of another task.
        """
        if state.env_id != self.spec.env_id or state.physics.shape != (self._state_size,):
            raise ValueError(f"set_state: the state is of {state.env_id!r}, this environment is {self.spec.env_id!r}")
        mujoco.mj_resetData(self.model, self.data)
        mujoco.mj_setState(self.model, self.data, state.physics, _STATE)
        mujoco.mj_kinematics(self.model, self.data)
        self._command = list(state.command)
        self._steps, self._ended, self._memory = state.steps, state.ended, dict(state.memory)
        self._rng.bit_generator.state = state.rng

    def close(self) -> None:
        self._ended = True

    # --- for a driver that runs in time slices, as a robot does (robot_rl.sim.robot) ---

    def drive(self, x: float, y: float, z: float, yaw: float, width: float) -> None:
        """Command an absolute pose and opening, inside the workspace and within the leash of the measured pose."""
        now, command = self.tool, self._command
        self._integrate([x - command[0], y - command[1], z - command[2], self._turn(yaw, now[3]) - command[3], width])
        self._write_command()

    @staticmethod
    def _turn(yaw: float, near: float) -> float:
        return near + wrap(yaw - near)

    def drive_joints(self, joints: Sequence[float]) -> None:
        """Command the seven joints (radians); the commanded pose follows the measured one."""
        self.data.ctrl[:7] = joints
        self._command[:4] = self.tool

    def drive_gripper(self, width: float) -> None:
        """Command the gripper's opening (m)."""
        self._command[4] = min(max(width, 0.0), GRIPPER_OPEN)
        self.data.ctrl[7] = self.data.ctrl[8] = self._command[4] / 2

    def advance(self, substeps: int) -> None:
        """Physics alone: ``substeps`` of 2.5 ms. Raises RuntimeError when the simulation diverges."""
        mujoco.mj_step(self.model, self.data, substeps)
        self._check_finite()
        mujoco.mj_kinematics(self.model, self.data)  # poses of the state after the last sub-step, not before it

    def assess(self) -> tuple[Observation, bool, str]:
        """(observation, success, stage) now; call it once a control step, because success may count steps."""
        self._steps += 1
        success, stage = self._judge()
        return self._observe(), success, stage

    # --- for experts and tasks ---

    @property
    def command(self) -> tuple[float, float, float, float, float]:
        """The commanded pose: x, y, z (m), yaw (rad), gripper opening (m)."""
        x, y, z, yaw, width = self._command
        return x, y, z, yaw, width

    @property
    def tool(self) -> tuple[float, float, float, float]:
        """The measured pose of the tool: x, y, z (m), yaw (rad)."""
        x, y, z = self.data.site_xpos[self._tcp].tolist()
        r = self.data.site_xmat[self._tcp]
        return x, y, z, math.atan2(-r[1], r[4])

    @property
    def gripper_width(self) -> float:
        """Measured opening between the pads (m)."""
        qpos = self.data.qpos
        return float(qpos[self._fingers[0]] + qpos[self._fingers[1]])

    def body_pose(self, body: int) -> tuple[np.ndarray, np.ndarray]:
        """(position (3,), rotation matrix (9,)) of a body; views that the next step overwrites."""
        return self.data.xpos[body], self.data.xmat[body]

    def touching(self, geom: int) -> tuple[bool, bool]:
        """Whether the left and the right pad touch a geom."""
        sides = {self._pads.get(a if b == geom else b) for a, b in self.data.contact.geom.tolist() if geom in (a, b)}
        return "left" in sides, "right" in sides

    # --- inside ---

    def _integrate(self, action: list[float]) -> None:
        x, y, z, yaw = self.tool
        box, command = self.workspace, self._command
        for i, measured in enumerate((x, y, z)):
            target = command[i] + action[i]
            target = min(max(target, measured - LEASH), measured + LEASH)
            command[i] = min(max(target, box.low[i]), box.high[i])
        turn = min(max(command[3] + action[3], yaw - YAW_LEASH), yaw + YAW_LEASH)
        command[3] = min(max(turn, box.yaw[0]), box.yaw[1])
        command[4] = action[4]

    def _write_command(self) -> None:
        x, y, z, yaw, width = self._command
        ctrl = self.data.ctrl
        ctrl[:7] = self._arm.solve(x, y, z, yaw)
        ctrl[7] = ctrl[8] = width / 2

    def _check_finite(self) -> None:
        warning = self.data.warning
        for kind in (mujoco.mjtWarning.mjWARN_BADQACC, mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL):
            if warning[kind].number:
                self._ended = True
                raise RuntimeError(f"{self.spec.env_id}: the simulation diverged at step {self._steps} ({kind.name})")

    def _observe(self) -> Observation:
        x, y, z, yaw = self.tool
        c, out = self._command, self._observed
        out[: len(ROBOT_NAMES)] = (
            x, y, z, yaw, c[0] - x, c[1] - y, c[2] - z, c[3] - yaw, self.gripper_width, c[4],
        )  # fmt: skip
        self._observe_task(out[len(ROBOT_NAMES) :])
        observation: Observation = {OBSERVATION_STATE: out[: self._told].astype(np.float32)}
        height, width = self._image_size
        for camera in self._cameras:
            if self.looked_at or camera not in self._shown:
                self._shown[camera] = self.picture(camera, width, height, self.data)
            observation[OBSERVATION_IMAGES + camera] = self._shown[camera]
        return observation

    def snapshot(self, into: mujoco.MjData | None = None) -> mujoco.MjData:
        """A copy of the physics state, to be drawn while the physics go on. ``into``: an earlier copy to use again."""
        copy = mujoco.MjData(self.model) if into is None else into
        mujoco.mj_copyData(copy, self.model, self.data)
        return copy

    def picture(self, camera: str, width: int, height: int, data: mujoco.MjData, *, fine: bool = False) -> np.ndarray:
        """(height, width, 3) uint8 of a snapshot, as cameras in observations show it. Any thread may call it."""
        from robot_rl.sim.tabletop.rendering import draw

        mujoco.mj_camlight(self.model, data)  # mj_kinematics leaves cameras where the previous sub-step had them
        return draw(self.model, data, self._camera_ids[camera], width, height, fine=fine)


def body_yaw(rotation: np.ndarray) -> float:
    """Yaw of a row-major (9,) rotation matrix about the vertical."""
    return math.atan2(rotation[3], rotation[0])


def yaw_quaternion(yaw: float) -> list[float]:
    """(w, x, y, z) of a turn about the vertical."""
    return [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]


StartValues = Mapping[str, float]
