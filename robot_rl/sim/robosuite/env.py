"""robosuite tasks behind the project's interface, with robosuite's Python control loop replaced by a compiled one."""

from __future__ import annotations

import copy
import logging
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robot_rl.sim.env import EnvSpec
from robot_rl.sim.offscreen import OffscreenCamera
from robot_rl.sim.robosuite import tasks
from robot_rl.types import OBSERVATION_IMAGES, OBSERVATION_STATE, ActionSpec, FeatureSpec, Observation


@dataclass(frozen=True)
class ShippedTask:
    """A task this project knows by name."""

    robosuite_name: str
    instruction: str
    max_episode_steps: int
    task: type[tasks.Task]


SHIPPED = {
    "Lift": ShippedTask("Lift", "Lift the red cube.", 150, tasks.Lift),
    "Can": ShippedTask("PickPlaceCan", "Put the can into its bin.", 200, tasks.Can),
    "Square": ShippedTask("NutAssemblySquare", "Put the square nut onto the square peg.", 300, tasks.Square),
    "Door": ShippedTask("Door", "Turn the handle and open the door.", 250, tasks.Door),
}
_ACTION_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")
_BUILD_SEED = 0  # some models are drawn at random when they are built (Lift's cube): every instance gets the same one
_global_random = threading.Lock()  # robosuite draws from numpy's global generator


@dataclass(frozen=True)
class RobosuiteState:
    """Everything a step depends on."""

    data: Any
    model: dict[str, np.ndarray]
    controller: Any
    steps: int
    success: bool
    ended: bool
    stage: int


class RobosuiteEnv:
    """One robosuite environment with one Panda as an :class:`~robot_rl.sim.env.Environment`.

    Actions (7,) in [-1, 1] are robomimic's: a change of the gripper's pose in the frame of the robot's base (0.05 m and
    0.5 rad at 1), added to the pose reached so far, and the gripper (positive closes). 20 control steps a second.
    ``observation.state`` is described in :mod:`robot_rl.sim.robosuite.tasks`. Reward is 1.0 on the step that first
    reaches robosuite's success, else 0.0. ``info["stage"]`` names the furthest stage of the episode.

    Args:
        env_id: ``robosuite/Lift``, ``Can``, ``Square``, ``Door``, or ``robosuite/<name registered in robosuite>``.
        max_episode_steps: time limit; None: 150 Lift, 200 Can, 300 Square, 250 Door, 500 others.
        success_terminates: end the episode at the first success.
        fast: ``True``: the compiled control loop with the same states as robosuite's own, bit for bit (refused with a
            reason where it cannot be); ``False``: robosuite's own; ``None``: compiled where that is the same;
            ``"approximate"``: compiled with a cheaper solver, equal to rounding in every step but, because contacts
            amplify rounding, not over a whole episode.
        cameras: pictures in the observation, as ``observation.images.<camera>``; ``image_size`` is (height, width).
        render_fast: pictures without shadows, reflections and multisampling (several times faster on a CPU).
        robot: robosuite robot name.
        instruction: the sentence stored as ``task``.
        env_options: passed to ``robosuite.make``.

    Raises:
        ImportError: robosuite is not installed.
        ValueError: unknown task, robot, camera or option.
    """

    def __init__(
        self,
        env_id: str,
        *,
        max_episode_steps: int | None = None,
        success_terminates: bool = True,
        fast: bool | str | None = None,
        cameras: Sequence[str] = (),
        image_size: tuple[int, int] = (84, 84),
        render_fast: bool = True,
        robot: str = "Panda",
        instruction: str = "",
        env_options: dict[str, Any] | None = None,
    ) -> None:
        name = env_id.partition("/")[2]
        shipped = SHIPPED.get(name)
        limit = max_episode_steps if max_episode_steps is not None else shipped.max_episode_steps if shipped else 500
        if int(limit) != limit or limit < 1:
            raise ValueError(f"max_episode_steps={limit!r}: accepted are integers >= 1")
        self._core = _build(env_id, shipped.robosuite_name if shipped else name, robot, dict(env_options or {}))
        self._limit, self._success_terminates = int(limit), bool(success_terminates)
        self._task: tasks.Task = (shipped.task if shipped else tasks.Other)(self._core)
        self._data, self._model = self._core.sim.data._data, self._core.sim.model._model
        self._pristine = {k: getattr(self._model, k).copy() for k in ("body_pos", "body_quat")}
        self._fast = self._make_fast(env_id, fast)
        self._steps, self._success, self._ended, self._stage = 0, False, True, 0
        self._camera = OffscreenCamera(self._model, fast=render_fast, geom_groups=(1,), max_geom=20_000)
        self._image_size = (int(image_size[0]), int(image_size[1]))
        for camera in cameras:
            if camera not in self._camera.names:
                raise ValueError(f"cameras: {camera!r} is not in {env_id}; accepted are {', '.join(self._camera.names)}")
        self._cameras = tuple(cameras)
        low, high = self._core.action_spec
        self._dim = len(low)
        features = {OBSERVATION_STATE: FeatureSpec((len(self._task.state_names),), names=self._task.state_names)}
        features |= {OBSERVATION_IMAGES + c: FeatureSpec((*self._image_size, 3), "uint8") for c in self._cameras}
        known = self._dim == 7
        self.spec = EnvSpec(
            env_id=env_id,
            instruction=instruction or (shipped.instruction if shipped else name),
            observation_features=features,
            action=ActionSpec(
                tuple(low),
                tuple(high),
                names=_ACTION_NAMES if known else (),
                kind=("continuous",) * 6 + ("gripper_continuous",) if known else (),
                mode=("delta",) * 6 + ("absolute",) if known else (),
            ),
            control_hz=float(self._core.control_freq),
            max_episode_steps=self._limit,
            success_terminates=self._success_terminates,
        )

    @property
    def unwrapped(self) -> Any:
        """The robosuite environment. In fast mode its controllers and clocks stand still; its MuJoCo data does not."""
        return self._core

    @property
    def is_fast(self) -> bool:
        """Whether the compiled control loop runs."""
        return self._fast is not None

    def reset(self, *, seed: int) -> tuple[Observation, dict[str, Any]]:
        """Start the episode of ``seed``; ``info["start"]`` holds where the seed put things (m, rad)."""
        for key, value in self._pristine.items():
            getattr(self._model, key)[:] = value  # a door left by the last episode would touch the solver's warm start
        with _seeded(int(seed)):
            self._core.reset()
        if self._fast is not None:
            self._fast.bind(self._core)
        self._steps, self._success, self._ended, self._stage = 0, False, False, 0
        info = {"success": False, "start": self._task.start(), "stage": self._task.stages[0]}
        return self._observe(), info

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One control step (0.05 s). ``info["success"]`` stays True once reached.

        Raises:
            RuntimeError: the episode has ended (or was never reset).
            ValueError: wrong shape or a value that is not finite.
        """
        if self._ended:
            raise RuntimeError(f"{self.spec.env_id}: the episode has ended; call reset(seed=...) before step")
        action = np.asarray(action, np.float64)
        if action.shape != (self._dim,) or not np.isfinite(action).all():
            raise ValueError(f"action={action}: accepted are {self._dim} finite numbers")
        if self._fast is not None:
            self._fast.step(action)
        else:
            self._core.step(action)
        self._steps += 1
        reached = not self._success and self._task.success()
        self._success |= reached
        self._stage = len(self._task.stages) - 1 if self._success else max(self._stage, self._task.stage())
        terminated = reached and self._success_terminates
        truncated = not terminated and self._steps >= self._limit
        self._ended = terminated or truncated
        info = {"success": self._success, "stage": self._task.stages[self._stage]}
        return self._observe(), float(reached), terminated, truncated, info

    def render(self, camera: str = "", width: int = 320, height: int = 240) -> np.ndarray:
        """(H, W, 3) uint8 RGB of ``camera``; empty is ``agentview`` or the scene's first camera."""
        if not camera:
            camera = "agentview" if "agentview" in self._camera.names else self._camera.names[0]
        return self._camera.render(self._data, camera, width, height)

    def get_state(self) -> RobosuiteState:
        """A copy of the MuJoCo data, the moved parts of the model and the controller's memory."""
        model = {k: getattr(self._model, k).copy() for k in self._pristine}
        controller = self._fast.get_state() if self._fast is not None else _own_controller(self._core)
        data = copy.copy(self._data)
        return RobosuiteState(data, model, controller, self._steps, self._success, self._ended, self._stage)

    def set_state(self, state: RobosuiteState) -> None:
        """Continue bit for bit from ``state``, which must come from an instance of the same task and ``fast``."""
        import mujoco

        for key, value in state.model.items():
            getattr(self._model, key)[:] = value
        mujoco.mj_copyData(self._data, self._model, state.data)
        if self._fast is not None:
            self._fast.set_state(state.controller)
        else:
            _set_own_controller(self._core, state.controller)
        self._steps, self._success, self._ended, self._stage = state.steps, state.success, state.ended, state.stage

    def close(self) -> None:
        self._camera.close()
        self._core.close()

    def _make_fast(self, env_id: str, fast: bool | str | None) -> Any:
        if fast not in (True, False, None, "approximate"):
            raise ValueError(f"fast={fast!r}: accepted are True, False, None, 'approximate'")
        if fast is False:
            return None
        from robot_rl.sim.robosuite.fast import FastControl, why_not_fast

        with _seeded(_BUILD_SEED):
            self._core.reset()
        reason = why_not_fast(self._core)
        if reason and fast:
            raise ValueError(f"fast={fast!r} for {env_id}: {reason}; accepted are None and False")
        return None if reason else FastControl(self._core, approximate=fast == "approximate")

    def _observe(self) -> Observation:
        observation = {OBSERVATION_STATE: self._task.observe()}
        height, width = self._image_size
        for camera in self._cameras:
            observation[OBSERVATION_IMAGES + camera] = self._camera.render(self._data, camera, width, height)
        return observation


class _seeded:
    """Both global generators seeded inside, as they were outside; one thread at a time."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        _global_random.acquire()
        self._before = (np.random.get_state(), random.getstate())
        np.random.seed(np.random.SeedSequence(self._seed).generate_state(4))
        random.seed(self._seed)

    def __exit__(self, *_: object) -> None:
        np.random.set_state(self._before[0])
        random.setstate(self._before[1])
        _global_random.release()


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _build(env_id: str, name: str, robot: str, options: dict[str, Any]) -> Any:
    try:
        # it logs a dozen warnings at every reset, about robot parts that a Panda does not have
        logging.getLogger("robosuite_logs").addFilter(_only_errors)
        import robosuite
        from robosuite.controllers import load_composite_controller_config
        from robosuite.environments.base import REGISTERED_ENVS
        from robosuite.robots import ROBOT_CLASS_MAPPING
    except ImportError as error:
        raise ImportError(f"{env_id} needs robosuite: pip install 'robosuite>=1.5,<1.6'") from error
    if name not in REGISTERED_ENVS:
        accepted = [*SHIPPED, *sorted(set(REGISTERED_ENVS) - {t.robosuite_name for t in SHIPPED.values()})]
        raise ValueError(f"env_id={env_id!r}: accepted are robosuite/{{{', '.join(accepted)}}}")
    if robot not in ROBOT_CLASS_MAPPING:
        raise ValueError(f"robot={robot!r}: accepted are {', '.join(sorted(ROBOT_CLASS_MAPPING))}")
    settings: dict[str, Any] = {
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "use_camera_obs": False,
        "use_object_obs": True,
        "control_freq": 20,
        "hard_reset": False,  # rebuilding the model at every reset costs half a second
        "ignore_done": True,  # this adapter keeps the time
        "horizon": 2**31,
    }
    owned = sorted(settings.keys() & options.keys() - {"control_freq"})
    if owned:
        raise ValueError(f"env_options {', '.join(owned)}: set by the adapter; accepted are other options of robosuite.make")
    with _seeded(_BUILD_SEED):
        config = load_composite_controller_config(controller="BASIC", robot=robot)
        try:
            return robosuite.make(name, robots=robot, controller_configs=config, **{**settings, **options})
        except TypeError as error:
            raise ValueError(f"env_options={options} for {env_id}: {error}") from error


def _own_controller(core: Any) -> list[dict[str, Any]]:
    """What robosuite's own controllers remember (numbers and arrays only; the rest never changes in an episode)."""
    memory = []
    for robot in core.robots:
        holders = [*robot.part_controllers.values(), *robot.gripper.values()]
        for holder in holders:
            memory.append({k: copy.deepcopy(v) for k, v in vars(holder).items() if isinstance(v, (np.ndarray, bool, float))})
    return memory


def _set_own_controller(core: Any, memory: list[dict[str, Any]]) -> None:
    saved = iter(memory)
    for robot in core.robots:
        for holder in [*robot.part_controllers.values(), *robot.gripper.values()]:
            for key, value in next(saved).items():
                setattr(holder, key, copy.deepcopy(value))
