"""A simulated task seen as a robot: it runs in time slices, takes what controllers take, and reports what drivers report.

ROS-free; ``sim_node`` wraps it. Table-top tasks run their physics in 10 ms slices under pose, twist, joint and gripper commands;
any other environment advances by whole control steps, with the action rebuilt from the last commands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from robot_rl.robots import rotations as rot
from robot_rl.robots.channels import Channel, channels_of
from robot_rl.robots.description import RobotDescription
from robot_rl.sim.env import Environment, make_env
from robot_rl.types import OBSERVATION_STATE

if TYPE_CHECKING:
    from robot_rl.sim.tabletop.core import TabletopEnv

SLICE_S = 0.01
GRIPPER_JOINT = "gripper_width"
ARM_JOINTS = tuple(f"joint{i}" for i in range(1, 8))
# The tool of the table-top arm points down; its reported orientation is relative to that, so that it is a turn about z.
_DOWN = np.array([0.0, 1.0, 0.0, 0.0])


@dataclass(frozen=True)
class Truth:
    """Ground truth after a control step."""

    seed: int
    step: int
    success: bool
    terminated: bool
    truncated: bool
    stage: str = ""
    reward: float = 0.0


class SimulatedRobot(Protocol):
    """What ``sim_node`` drives."""

    instruction: str
    env_id: str
    slice_s: float
    control_s: float
    truth: Truth

    def reset(self, seed: int) -> None: ...

    def command(self, channel: str, vector: np.ndarray) -> None:
        """A controller received a channel vector; it acts from the next slice on."""
        ...

    def stop(self) -> None:
        """The controllers' command timeout ran out: velocities become zero."""
        ...

    def advance(self) -> bool:
        """One slice of physics; True at the end of a control step."""
        ...

    def joints(self) -> dict[str, tuple[float, float]]:
        """Joint name to (position, velocity)."""
        ...

    def tool_pose(self) -> np.ndarray | None:
        """x, y, z, qx, qy, qz, qw in the base frame."""
        ...

    def estimate(self) -> dict[str, float]:
        """Named values of ``observation.state`` as of the last control step."""
        ...

    def see(self, cameras: Mapping[str, tuple[int, int]]) -> Callable[[str], np.ndarray]:
        """All cameras (name to (height, width)) at this instant; the physics stand still during the call.

        What it returns makes the (height, width, 3) uint8 RGB picture of a camera, while the physics may go on. Called by one thread.
        """
        ...

    def close(self) -> None: ...


def _names(env: Environment) -> tuple[str, ...]:
    spec = env.spec.observation_features.get(OBSERVATION_STATE)
    if spec is None:
        return ()
    return spec.names or tuple(f"state_{i}" for i in range(int(np.prod(spec.shape))))


class TabletopRobot:
    """The table-top arm under pose, twist, joint and gripper commands."""

    def __init__(self, env: TabletopEnv, robot: RobotDescription) -> None:
        self.env = env
        self.env_id, self.instruction = env.spec.env_id, env.spec.instruction
        self.slice_s, self.control_s = SLICE_S, 1.0 / env.spec.control_hz
        self._substeps = round(SLICE_S / env.model.opt.timestep)
        self._slices = round(self.control_s / SLICE_S)
        self._channels = {c.name: c for c in channels_of(robot)}
        for c in self._channels.values():
            unknown = set(c.command.names) - {*ARM_JOINTS, GRIPPER_JOINT}
            if unknown:
                raise ValueError(
                    f"commands.{c.name}.names={sorted(unknown)}: {self.env_id} has {', '.join((*ARM_JOINTS, GRIPPER_JOINT))}"
                )
        self._address = [int(env.model.joint(n).qposadr[0]) for n in ARM_JOINTS]
        self._speed = [int(env.model.joint(n).dofadr[0]) for n in ARM_JOINTS]
        self._finger_speed = [int(env.model.joint(n).dofadr[0]) for n in ("finger_left", "finger_right")]
        self._new: dict[str, np.ndarray] = {}
        self._twist = np.zeros(6)
        self._names = _names(env)
        self._seen: Any = None
        self.reset(0)

    def reset(self, seed: int) -> None:
        observation, info = self.env.reset(seed=seed)
        self._count, self._seed = 0, seed
        self._new.clear()
        self._twist = np.zeros(6)
        self._observed = observation
        self.truth = Truth(seed, 0, False, False, False, str(info.get("stage", "")))

    def command(self, channel: str, vector: np.ndarray) -> None:
        self._new[channel] = vector

    def stop(self) -> None:
        self._twist = np.zeros(6)

    def advance(self) -> bool:
        self._apply()
        self.env.advance(self._substeps)
        self._count += 1
        if self._count % self._slices:
            return False
        self._observed, success, stage = self.env.assess()
        step = self.truth.step + 1
        reward = float(success and not self.truth.success)  # sparse: 1 on the step that reaches success
        success = success or self.truth.success  # reached once is reached; the physics go on until the reset
        truncated = not success and step >= self.env.spec.max_episode_steps
        truncated = truncated or self.truth.truncated
        self.truth = Truth(self._seed, step, success, success, truncated, "done" if success else stage, reward)
        return True

    def _apply(self) -> None:
        env, new = self.env, self._new
        x, y, z, yaw, _ = env.command
        moved = False
        for name, vector in new.items():
            c = self._channels[name]
            if c.kind == "pose":
                x, y, z, yaw, moved = *map(float, vector[:3]), rot.yaw_of(vector[3:]), True
            elif c.kind == "twist":
                self._twist = vector
            else:
                self._drive(c, vector)
        if self._twist.any():
            step = self._twist * self.slice_s
            x, y, z, yaw, moved = x + step[0], y + step[1], z + step[2], yaw + step[5], True
        if moved:
            env.drive(x, y, z, yaw, env.command[4])
        new.clear()

    def _drive(self, c: Channel, vector: np.ndarray) -> None:
        values = dict(zip(c.command.names, vector.tolist(), strict=True))
        if GRIPPER_JOINT in values:
            self.env.drive_gripper(values.pop(GRIPPER_JOINT))
        if values:
            now = self.env.data.ctrl[:7]
            self.env.drive_joints([values.get(n, float(now[i])) for i, n in enumerate(ARM_JOINTS)])

    def joints(self) -> dict[str, tuple[float, float]]:
        data = self.env.data
        out = {
            n: (float(data.qpos[a]), float(data.qvel[v]))
            for n, a, v in zip(ARM_JOINTS, self._address, self._speed, strict=True)
        }
        return out | {GRIPPER_JOINT: (self.env.gripper_width, float(sum(data.qvel[i] for i in self._finger_speed)))}

    def tool_pose(self) -> np.ndarray:
        matrix = self.env.data.site_xmat[self.env.model.site("tcp").id].reshape(3, 3)
        q = rot.multiply(rot.from_matrix(matrix), rot.inverse(_DOWN))
        return np.concatenate([self.env.data.site_xpos[self.env.model.site("tcp").id], q if q[3] >= 0 else -q])

    def estimate(self) -> dict[str, float]:
        return dict(zip(self._names, map(float, self._observed[OBSERVATION_STATE]), strict=True))

    def see(self, cameras: Mapping[str, tuple[int, int]]) -> Callable[[str], np.ndarray]:
        # A copy takes microseconds, a picture in software tens of milliseconds: drivers of the arm do not wait for cameras.
        seen = self._seen = self.env.snapshot(self._seen)
        return lambda camera: self.env.picture(camera, cameras[camera][1], cameras[camera][0], seen)

    def close(self) -> None:
        self.env.close()


class SteppedRobot:
    """Any environment, by whole control steps; the state is the environment's own vector, the tool pose is unknown."""

    def __init__(self, env: Environment, robot: RobotDescription) -> None:
        self.env = env
        self.env_id, self.instruction = env.spec.env_id, env.spec.instruction
        self.slice_s = self.control_s = 1.0 / env.spec.control_hz
        self._channels = {c.name: c for c in channels_of(robot)}
        for c in self._channels.values():
            if c.kind == "pose":
                raise ValueError(
                    f"commands.{c.name}.kind=pose: {self.env_id} reports no tool pose; accepted are twist and joint kinds"
                )
        if robot.action_dim != env.spec.action.dim:
            raise ValueError(
                f"robot {robot.name!r} commands {robot.action_dim} dimensions; {self.env_id} takes {env.spec.action.dim}"
            )
        self._names = _names(env)
        self.reset(0)

    def reset(self, seed: int) -> None:
        self._observed, info = self.env.reset(seed=seed)
        delta = self.env.spec.action.delta_mask
        middle = (np.array(self.env.spec.action.low) + np.array(self.env.spec.action.high)) / 2
        self._action = np.where(delta, 0.0, middle)
        self._before: dict[str, np.ndarray] = {}
        self._seed = seed
        self.truth = Truth(seed, 0, False, False, False, str(info.get("stage", "")))

    def command(self, channel: str, vector: np.ndarray) -> None:
        c = self._channels[channel]
        values = c.executed_action(vector, self._before.get(channel))
        self._before[channel] = vector
        if values is not None:
            self._action[c.slice] = values

    def stop(self) -> None:
        for c in self._channels.values():
            if c.kind == "twist" or c.action.mode == "delta":
                self._action[c.slice] = 0.0

    def advance(self) -> bool:
        if self.truth.terminated or self.truth.truncated:
            return True  # the episode is over: the world stands still until the reset
        self._observed, reward, terminated, truncated, info = self.env.step(self._action)
        success = bool(info["success"]) or self.truth.success
        self.truth = Truth(self._seed, self.truth.step + 1, success, terminated, truncated, str(info.get("stage", "")), reward)
        return True

    def joints(self) -> dict[str, tuple[float, float]]:
        """Commanded joints follow at once: this environment does not say where they are."""
        return {
            joint: (float(value), 0.0)
            for c in self._channels.values()
            for joint, value in zip(c.command.names, self._action[c.slice], strict=False)
        }

    def tool_pose(self) -> None:
        return None

    def estimate(self) -> dict[str, float]:
        state = self._observed.get(OBSERVATION_STATE)
        return {} if state is None else dict(zip(self._names, map(float, np.ravel(state)), strict=True))

    def see(self, cameras: Mapping[str, tuple[int, int]]) -> Callable[[str], np.ndarray]:
        """These environments draw nothing but their present: the physics wait for the pictures."""
        return {c: self.env.render(c, width, height) for c, (height, width) in cameras.items()}.__getitem__

    def close(self) -> None:
        self.env.close()


def make_robot(env_id: str, robot: RobotDescription, options: Mapping[str, Any] | None = None) -> TabletopRobot | SteppedRobot:
    """The simulated robot of a task.

    Raises:
        ValueError: unknown task, or one that cannot take this description's commands.
    """
    env = make_env(env_id, **dict(options or {}))
    if env_id.startswith("tabletop/"):
        return TabletopRobot(env, robot)  # type: ignore[arg-type]
    return SteppedRobot(env, robot)


def field_of_view(env: Any, camera: str) -> float:
    """Vertical field of view of a camera in degrees; 45 where the environment does not say."""
    try:
        return float(env.model.cam_fovy[env.model.camera(camera).id])
    except (AttributeError, KeyError):
        return 45.0


__all__ = ["SimulatedRobot", "SteppedRobot", "TabletopRobot", "Truth", "field_of_view", "make_robot"]
