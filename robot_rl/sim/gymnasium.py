"""Gymnasium environments behind the project's interface: ``gymnasium/<any registered id>``.

``gymnasium/AdroitHandDoor-v1`` and everything else in gymnasium-robotics is registered when it is first asked for.

Rewards. An environment that reports success in its ``info`` (Adroit, Fetch, hand manipulation: found out by trying one
step) gets the project's sparse reward, 1.0 on the step that first reaches success. An environment that reports none
(HalfCheetah, Pendulum, ...) keeps its own dense reward and its ``success`` is always False. ``reward="native"`` keeps
the environment's own reward in any case.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from robot_rl.sim.adapters import checked_factory
from robot_rl.sim.env import EnvSpec, register_env
from robot_rl.sim.offscreen import OffscreenCamera
from robot_rl.types import OBSERVATION_IMAGES, OBSERVATION_STATE, ActionSpec, FeatureSpec, Observation

_INSTRUCTIONS = {
    "AdroitHandDoor": "Undo the latch and swing the door open.",
    "AdroitHandHammer": "Pick up the hammer and drive the nail into the board.",
    "AdroitHandPen": "Turn the pen to the shown orientation.",
    "AdroitHandRelocate": "Move the ball to the target.",
}
_SUCCESS_KEYS = ("success", "is_success")
_RENDERING = ("mujoco_renderer", "screen", "clock", "surf", "viewer", "renderer", "window")
_FIXED = ("spec", "model", "action_space", "observation_space", "metadata", "_mujoco", "_utils", "_model_names", "_state_space")
_MOVABLE = ("body_pos", "body_quat", "geom_pos", "geom_quat", "site_pos", "site_quat", "geom_rgba", "site_rgba")
_PLAIN = (bool, int, float, str, bytes, complex, np.ndarray, np.generic, type(None))
_make_lock = threading.Lock()


@dataclass(frozen=True)
class GymnasiumState:
    """Everything a step depends on. ``data`` is a MuJoCo ``MjData`` copy (None without MuJoCo)."""

    data: Any
    model: dict[str, np.ndarray]
    attributes: dict[str, Any]
    random: dict[str, Any] | None
    steps: int
    success: bool
    ended: bool


class GymnasiumEnv:
    """One Gymnasium environment as an :class:`~robot_rl.sim.env.Environment`.

    The innermost environment is stepped directly: Gymnasium's own wrappers (checker, order, time limit) are replaced by
    this class, which costs a tenth of their time. Environments registered with further wrappers keep those.

    Args:
        env_id: ``gymnasium/<id>``.
        max_episode_steps: time limit; None takes the registered one. (Adroit's is 200; human demonstrations run to 300.)
        success_terminates: end the episode at the first success.
        reward: ``auto`` (sparse where success is reported, else native), ``sparse`` or ``native``.
        instruction: the sentence stored as ``task``.
        render_fast: pictures without shadows, reflections and multisampling.
        env_options: passed to ``gymnasium.make``.

    Raises:
        ValueError: unknown id or option, an action space that is not a bounded Box, an observation space that is neither
            Box nor Dict of Box.
    """

    def __init__(
        self,
        env_id: str,
        *,
        max_episode_steps: int | None = None,
        success_terminates: bool = True,
        reward: str = "auto",
        instruction: str = "",
        render_fast: bool = True,
        env_options: dict[str, Any] | None = None,
    ) -> None:
        if reward not in ("auto", "sparse", "native"):
            raise ValueError(f"reward={reward!r}: accepted are auto, sparse, native")
        name = env_id.partition("/")[2]
        self._env, registered_limit = _make(env_id, name, reward, dict(env_options or {}))
        self._core = self._env.unwrapped
        limit = registered_limit if max_episode_steps is None else max_episode_steps
        if limit is None or int(limit) < 1:
            raise ValueError(f"max_episode_steps={limit} for {env_id}: accepted are integers >= 1 (the id registers none)")
        self._mujoco = hasattr(self._core, "model") and hasattr(self._core, "data")
        self._success_terminates = bool(success_terminates)
        self._limit = int(limit)
        self._flatten, features = _observation(self._core, env_id)
        box = self._core.action_space
        if not hasattr(box, "low") or len(box.shape) != 1 or not np.all(np.isfinite([box.low, box.high])):
            raise ValueError(
                f"{env_id}: action space {box} is not accepted; accepted are Box spaces of one axis with finite limits"
            )
        self._low, self._high, self._dtype = box.low.copy(), box.high.copy(), box.dtype
        self._steps, self._success, self._ended = 0, False, True
        self._pristine = self._snapshot()
        self._success_key = self._find_success_key()
        self._sparse = reward == "sparse" or (reward == "auto" and self._success_key is not None)
        if reward == "sparse" and self._success_key is None:
            raise ValueError(f"reward='sparse': {env_id} reports no success in its info; accepted is native")
        self._camera = self._make_camera(render_fast)
        self.spec = EnvSpec(
            env_id=env_id,
            instruction=instruction or _INSTRUCTIONS.get(name.partition("-")[0].replace("Sparse", ""), name),
            observation_features=features,
            action=ActionSpec(tuple(self._low), tuple(self._high), names=_action_names(self._core, len(self._low))),
            control_hz=self._control_hz(),
            max_episode_steps=self._limit,
            success_terminates=self._success_terminates,
        )

    def reset(self, *, seed: int) -> tuple[Observation, dict[str, Any]]:
        """Start the episode of ``seed``; ``info["start"]`` holds what the seed moved."""
        # Some environments keep solver warm starts, goals or mocap poses over a reset: begin from the same everything.
        self._restore(self._pristine)
        native, _ = self._env.reset(seed=int(seed))
        self._steps, self._success, self._ended = 0, False, False
        observation = self._flatten(native)
        return observation, {"success": False, "start": self._start(observation)}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One control step; ``action`` (A,) is clipped to the limits. ``info["success"]`` stays True once reached.

        Raises:
            RuntimeError: the episode has ended (or was never reset).
            ValueError: wrong shape or a value that is not finite.
        """
        if self._ended:
            raise RuntimeError(f"{self.spec.env_id}: the episode has ended; call reset(seed=...) before step")
        action = np.asarray(action, self._dtype)
        if action.shape != self._low.shape or not np.isfinite(action).all():
            raise ValueError(f"action={action}: accepted are {len(self._low)} finite numbers")
        action = np.minimum(np.maximum(action, self._low), self._high)
        native, reward, terminated, truncated, info = self._env.step(action)
        self._steps += 1
        reached = self._success_key is not None and bool(info[self._success_key]) and not self._success
        self._success |= reached
        terminated = bool(terminated) or (reached and self._success_terminates)
        truncated = not terminated and (bool(truncated) or self._steps >= self._limit)
        self._ended = terminated or truncated
        info["success"] = self._success
        return self._flatten(native), (float(reached) if self._sparse else float(reward)), terminated, truncated, info

    def render(self, camera: str = "", width: int = 320, height: int = 240) -> np.ndarray:
        """(H, W, 3) uint8 RGB. Environments without MuJoCo have one view of one size, which is resampled."""
        if self._camera is not None:
            return self._camera.render(self._core.data, camera, width, height)
        if camera:
            raise ValueError(f"camera={camera!r}: {self.spec.env_id} has one view, accepted is ''")
        frame = self._core.render() if self._core.render_mode == "rgb_array" else None
        if frame is None:
            raise RuntimeError(f"{self.spec.env_id} cannot make pictures (it has no rgb_array render mode)")
        frame = np.asarray(frame, np.uint8)
        rows = (np.arange(height) + 0.5) * frame.shape[0] // height
        columns = (np.arange(width) + 0.5) * frame.shape[1] // width
        return np.ascontiguousarray(frame[rows.astype(int)][:, columns.astype(int)])

    def get_state(self) -> GymnasiumState:
        """A copy of everything a step depends on (MuJoCo data, moved model parts, Python attributes, random state).

        Raises:
            NotImplementedError: the environment keeps state in objects that cannot be copied (Box2D, Atari).
        """
        return self._snapshot(strict=True)

    def set_state(self, state: GymnasiumState) -> None:
        """Continue bit for bit from ``state``."""
        self._restore(state)

    def close(self) -> None:
        if self._camera is not None:
            self._camera.close()
        self._env.close()

    @property
    def unwrapped(self) -> Any:
        """The innermost Gymnasium environment."""
        return self._core

    def _find_success_key(self) -> str | None:
        self._env.reset(seed=0)
        info = self._env.step(((self._low + self._high) / 2).astype(self._dtype))[4]
        self._restore(self._pristine)
        return next((k for k in _SUCCESS_KEYS if k in info), None)

    def _control_hz(self) -> float:
        dt = getattr(self._core, "dt", None)
        return 1.0 / float(dt) if dt else float(self._core.metadata.get("render_fps", 0.0))

    def _start(self, observation: Observation) -> dict[str, float]:
        if self._mujoco:
            # a frame that the seed moved (Adroit's door, board, target) says more than joint angles
            moved = np.argwhere(np.abs(self._core.model.body_pos - self._pristine.model["body_pos"]) > 1e-12)
            bodies = {int(b) for b, _ in moved}
            if bodies:
                model = self._core.model
                return {
                    f"{model.body(b).name}_{x}": float(v)
                    for b in sorted(bodies)
                    for x, v in zip("xyz", model.body_pos[b], strict=True)
                }
        if OBSERVATION_STATE not in observation:
            return {}
        state = observation[OBSERVATION_STATE]
        names = self.spec.observation_features[OBSERVATION_STATE].names
        return {n: float(v) for n, v in zip(names, state, strict=True)} if len(state) <= 64 else {}

    def _make_camera(self, fast: bool) -> OffscreenCamera | None:
        if not self._mujoco:
            return None
        config = getattr(getattr(self._core, "mujoco_renderer", None), "default_cam_config", None) or {}

        def aim(camera: Any) -> None:
            for key, value in (config or {}).items():
                if isinstance(value, np.ndarray):
                    getattr(camera, key)[:] = value
                else:
                    setattr(camera, key, value)

        return OffscreenCamera(self._core.model, fast=fast, free_camera=aim if config else None)

    def _snapshot(self, strict: bool = False) -> GymnasiumState:
        core = self._core
        skipped = (*_RENDERING, *_FIXED, "data", "_np_random", "_np_random_seed")
        attributes = {}
        for name, value in vars(core).items():
            if name in skipped:
                continue
            if _is_plain(value):
                attributes[name] = copy.deepcopy(value)
            elif strict and not self._mujoco:
                raise NotImplementedError(f"{self.spec.env_id}: attribute {name} ({type(value).__name__}) cannot be copied")
        model, data = {}, None
        if self._mujoco:
            data = copy.copy(core.data)
            m = core.model
            model = {
                k: getattr(m, k).copy() for k in ("body_pos", "body_quat", "geom_pos", "geom_quat", "site_pos", "site_quat")
            }
        random = core._np_random.bit_generator.state if getattr(core, "_np_random", None) is not None else None
        return GymnasiumState(data, model, attributes, random, self._steps, self._success, self._ended)

    def _restore(self, state: GymnasiumState) -> None:
        core = self._core
        if self._mujoco:
            import mujoco

            for key, value in state.model.items():
                getattr(core.model, key)[:] = value
            mujoco.mj_copyData(core.data, core.model, state.data)
        for name, value in state.attributes.items():
            setattr(core, name, copy.deepcopy(value))
        if state.random is not None and getattr(core, "_np_random", None) is not None:
            core.np_random.bit_generator.state = state.random
        self._steps, self._success, self._ended = state.steps, state.success, state.ended


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    return isinstance(value, _PLAIN) and not (isinstance(value, np.ndarray) and value.dtype == object)


def _make(env_id: str, name: str, reward: str, options: dict[str, Any]) -> tuple[Any, int | None]:
    """Build ``name`` without wrappers that this adapter replaces; says its registered time limit."""
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(f"{env_id} needs gymnasium: pip install 'robot_rl'") from error
    with _make_lock:  # registration is global
        if name not in gymnasium.registry:
            try:
                import gymnasium_robotics
            except ImportError as error:
                if name.startswith(("Adroit", "Fetch", "Hand", "Franka", "Point", "Ant")):
                    raise ImportError(f"{env_id} needs gymnasium-robotics: pip install gymnasium-robotics") from error
            else:
                gymnasium.register_envs(gymnasium_robotics)
        if name not in gymnasium.registry:
            import difflib

            near = difflib.get_close_matches(name, gymnasium.registry, n=4, cutoff=0.4)
            raise ValueError(f"env_id={env_id!r}: no such registered environment; close names: {', '.join(near) or 'none'}")
        registered = gymnasium.registry[name]
        entry = registered.entry_point if isinstance(registered.entry_point, str) else ""
        if ".adroit_hand." in entry and reward != "native":
            options.setdefault("reward_type", "sparse")  # skips computing a dense reward nobody reads
        if ".mujoco." not in entry and not entry.startswith("gymnasium_robotics"):
            options.setdefault("render_mode", "rgb_array")
        try:
            env = gymnasium.make(name, disable_env_checker=True, **options)
        except TypeError as error:
            raise ValueError(f"env_options={options} for {env_id}: {error}") from error
        except gymnasium.error.DependencyNotInstalled as error:
            raise ImportError(f"{env_id}: {error}") from error
    return (env if registered.additional_wrappers else env.unwrapped), registered.max_episode_steps


def _observation(core: Any, env_id: str) -> tuple[Callable[[Any], Observation], dict[str, FeatureSpec]]:
    """How a native observation becomes ours, and what it holds."""
    space = core.observation_space
    if isinstance(getattr(space, "spaces", None), dict):
        # a goal environment: the achieved goal is part of the observation already, but its place differs by task: keep all
        order = [k for k in ("observation", "achieved_goal", "desired_goal") if k in space.spaces]
        order += sorted(k for k in space.spaces if k not in order)
        parts = [space.spaces[k] for k in order]
        if all(hasattr(p, "low") and len(p.shape) == 1 for p in parts):
            names = tuple(f"{k}_{i}" for k, p in zip(order, parts, strict=True) for i in range(p.shape[0]))

            def join(native: Any) -> Observation:
                return {OBSERVATION_STATE: np.concatenate([native[k] for k in order]).astype(np.float32)}

            return join, {OBSERVATION_STATE: FeatureSpec((len(names),), names=names)}
    elif hasattr(space, "low") and len(space.shape) == 1:
        names = _state_names(core, space.shape[0])

        def vector(native: Any) -> Observation:
            return {OBSERVATION_STATE: np.array(native, np.float32)}

        return vector, {OBSERVATION_STATE: FeatureSpec(space.shape, names=names)}
    elif hasattr(space, "low") and len(space.shape) == 3 and space.dtype == np.uint8 and space.shape[2] == 3:
        key = OBSERVATION_IMAGES + "main"

        def image(native: Any) -> Observation:
            return {key: np.array(native, np.uint8)}

        return image, {key: FeatureSpec(space.shape, "uint8")}
    raise ValueError(
        f"{env_id}: observation space {space}: accepted are a Box of one axis, (H, W, 3) uint8, or a Dict of vectors"
    )


def _state_names(core: Any, size: int) -> tuple[str, ...]:
    if type(core).__name__ == "AdroitHandDoorEnv":
        joints = [core.model.joint(i).name for i in range(1, core.model.nq - 2)]
        axes = [f"{what}_{k}" for what in ("palm", "handle", "palm_to_handle") for k in "xyz"]
        return (*joints, "latch", "door_hinge", *axes, "door_open")
    return tuple(f"state_{i}" for i in range(size))


def _action_names(core: Any, size: int) -> tuple[str, ...]:
    model = getattr(core, "model", None)
    if model is not None and getattr(model, "nu", -1) == size:
        names = tuple(model.actuator(i).name for i in range(size))
        if all(names) and len(set(names)) == size:
            return names
    return tuple(f"a{i}" for i in range(size))


_factory = checked_factory(GymnasiumEnv)
register_env("gymnasium/AdroitHandDoor-v1", _factory)
register_env("gymnasium/*", _factory)
