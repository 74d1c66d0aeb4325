"""A simulated session in this process: environment, control loop, arbiter, safety filter and store, without ROS.

What the page drives here is what it drives on a robot: device samples go to the same arbiter, and its commands through the same safety
filter. For trying the page out, and for its tests.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from robot_rl.console.bridge import Answer, EpisodeView, SessionView, TracePoint, WeightsView
from robot_rl.console.frames import Cameras
from robot_rl.console.messages import Drive
from robot_rl.intervention.arbiter import OperatorArbiter, Request
from robot_rl.intervention.devices import DeviceSample, deflection, profile
from robot_rl.intervention.states import State
from robot_rl.replay.store import EpisodeStore
from robot_rl.replay.ulid import new_ulid
from robot_rl.runtime.chunk_scheduler import ChunkScheduler
from robot_rl.runtime.control_loop import ControlLoop
from robot_rl.runtime.safety import SafetyConfig, SafetyFilter
from robot_rl.sim.env import Environment
from robot_rl.types import ActionSpec, Decision, EpisodeMeta, Observation, RewardEvent, RewardKind, Source

S = 1_000_000_000
DEADBAND = 0.05
STOP_S = 1.0
AXIS_OF = {"x": 0, "y": 1, "z": 2, "roll": 3, "pitch": 4, "yaw": 5}


class Decider(Protocol):
    """What acts: an :class:`~robot_rl.runtime.acting.ActingPolicy`, or anything that answers like one."""

    def decide(self, requests: Any) -> list[Decision]: ...


def axes_to_action(action: ActionSpec, axes: np.ndarray, gripper_open: bool, standstill: np.ndarray) -> np.ndarray:
    """(6,) shares of full speed to (A,): delta dimensions by the last part of their names, grippers open or closed.

    A dimension no axis is for stays where it is; a full deflection is the action's own limit.
    """
    out = np.array(standstill, np.float32)
    low, high = np.asarray(action.low, np.float32), np.asarray(action.high, np.float32)
    for i, name in enumerate(action.names):
        axis = AXIS_OF.get(name.rpartition("_")[2])
        if action.gripper_mask[i]:
            out[i] = high[i] if gripper_open else low[i]
        elif axis is not None and action.delta_mask[i]:
            out[i] = axes[axis] * (high[i] if axes[axis] > 0 else -low[i])
    return out


class SimulatedSession:
    """A :class:`~robot_rl.console.bridge.Bridge` over one environment.

    Args:
        policies: version to what acts with it; 0 is the base. The highest is what ``promote`` lets act.
        cameras: names for ``env.render``.
        size: (width, height) of the pictures.
        store: folder; made where there is none.
        rate_hz: control steps a second; 0: the environment's own rate.
        noise_shape, chunk_horizon: of the policies' decisions, as the store keeps them.
        auto: an episode begins by itself half a second after the last one.
    """

    def __init__(
        self, make_env: Callable[[], Environment], policies: Mapping[int, Decider], store: Path, *, cameras: tuple[str, ...] = (),
        size: tuple[int, int] = (320, 240), rate_hz: float = 0.0, seed: int = 0, auto: bool = False, safety: SafetyConfig | None = None,
        n_obs_steps: int = 1, n_action_steps: int = 1, camera_hz: float = 20.0, noise_shape: tuple[int, int] | None = None,
        chunk_horizon: int | None = None,
    ) -> None:  # fmt: skip
        if 0 not in policies:
            raise ValueError(f"policies of versions {sorted(policies)}: accepted is a table with 0, the base")
        self.cameras = Cameras(hz=camera_hz)
        self._make_env, self._policies, self._path = make_env, dict(policies), store
        self._names, self._size, self._rate, self._seed, self._auto = cameras, size, rate_hz, seed, auto
        self._safety_config, self._n_obs, self._n_action = safety or SafetyConfig(), n_obs_steps, n_action_steps
        self._noise_shape, self._chunk_horizon = noise_shape, chunk_horizon
        self._guard = threading.RLock()
        self._view = SessionView(robot="simulated", run=store.parent.name, cameras=cameras, guard="ok", armed=True,
                                 nodes={"simulation": "active"})  # fmt: skip
        self._drive: tuple[Drive, int, str] | None = None
        self._gripper_open, self._gripper_down = True, False
        self._ending: bool | None = None
        self._start = self._abort = self._running = self._holding = False
        self._pinned: int | None = None
        self._estopped, self._stopped_at = False, 0.0
        self._promoted: list[int] = [0]
        self._last_label: RewardEvent | None = None
        self._traces: list[TracePoint] = []
        self._stop = threading.Event()
        self._ready = threading.Event()
        self.error: BaseException | None = None
        self.commands: list[np.ndarray] = []  # the last ones that were executed
        self.ticks = 0
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)

    # ---- life

    def start(self) -> SimulatedSession:
        """Raises what making the environment raised."""
        self._thread.start()
        self._ready.wait(120.0)
        if self.error is not None:
            raise self.error
        return self

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10.0)
        self.cameras.close()

    def __enter__(self) -> SimulatedSession:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- what the page sees and says

    def view(self) -> SessionView:
        return self._view

    def drive(self, sample: Drive, operator: str) -> None:
        # No lock: the loop holds its own over a whole step, and the server must not wait for that.
        if sample.gripper and not self._gripper_down and sample.held:
            self._gripper_open = not self._gripper_open
        self._gripper_down = sample.gripper
        self._drive = sample, time.monotonic_ns(), operator

    async def ask(self, name: str, values: Mapping[str, Any], operator: str) -> Answer:
        if name == "estop":
            self._arbiter.post(Request.ESTOP)  # heard in the next tick, whoever holds the lock now
        return await asyncio.to_thread(self._locked, name, values, operator)

    def _locked(self, name: str, values: Mapping[str, Any], operator: str) -> Answer:
        with self._guard:
            try:
                return self._ask(name, values, operator)
            except (ValueError, OSError, KeyError) as error:
                return Answer(False, str(error))

    def _ask(self, name: str, values: Mapping[str, Any], operator: str) -> Answer:
        if name in ("success", "failure", "discard") and not self._running:
            return Answer(False, "no episode is running")
        if name in ("success", "failure"):
            self._ending = name == "success"
        elif name == "discard":
            self._abort = True
        elif name == "undo_label":
            return self._undo()
        elif name == "start_episode":
            if self._running or self._estopped or not self._view.armed:
                why = "an episode is running" if self._running else "the e-stop is latched" if self._estopped else "not armed"
                return Answer(False, why)
            self._start = True
        elif name == "estop":
            self._estopped, self._start, self._stopped_at = True, False, time.monotonic()
            self._say(control="estop", guard="estop", guard_reason="pressed on the page", armed=False)
        elif name == "reset_estop":
            if not self._estopped:
                return Answer(False, "the e-stop is not latched")
            if time.monotonic() - self._stopped_at < STOP_S:
                return Answer(False, "the e-stop lasts a second at least")
            if self._drive is not None and self._drive[0].held and time.monotonic_ns() - self._drive[1] < S:
                return Answer(False, "let go of the controls first")
            self._estopped = False
            self._arbiter.state = State.AUTONOMOUS
            self._say(control="autonomous", guard="ok", guard_reason="")
        elif name == "arm":
            if values["on"] and self._estopped:
                return Answer(False, "the e-stop is latched: reset it first")
            self._say(armed=bool(values["on"]))
        elif name == "hold":
            self._holding = bool(values["on"])
        elif name == "hand_back":
            self._arbiter.post(Request.RELEASE)
        elif name == "instruction":
            self._say(task=values["text"])
        elif name in ("promote", "rollback"):
            return self._weights(name)
        elif name == "pause_learning":
            self._say(learning_paused=bool(values["on"]))
        elif name == "act_with":
            version = values["version"]
            if version >= 0 and version not in self._policies:
                return Answer(
                    False, f"version {version} is not here: accepted are {', '.join(map(str, sorted(self._policies)))}"
                )
            self._pinned = None if version < 0 else version
        elif name in ("explore", "operator"):
            pass  # these policies have one way of acting, and samples bring their operator along
        else:
            return Answer(False, f"{name}: this session cannot")
        return Answer(True, "")

    def _weights(self, name: str) -> Answer:
        newest = max(self._policies)
        if name == "promote":
            if self._promoted[-1] == newest:
                return Answer(False, "the newest version acts already" if newest else "no version has been published yet")
            self._promoted.append(newest)
        elif len(self._promoted) == 1:
            return Answer(False, "the base policy acts already")
        else:
            self._promoted.pop()
        self._say(weights=self._weights_view())
        return Answer(True, f"version {self._promoted[-1]} acts from the next episode on")

    def _weights_view(self, acting: int | None = None) -> WeightsView:
        promoted, newest = self._promoted[-1], max(self._policies)
        return WeightsView(
            self._view.weights.acting if acting is None else acting, promoted, 0, 0.0, newest, "promoted" if promoted else ""
        )

    def _undo(self) -> Answer:
        label, self._last_label = self._last_label, None
        if label is None:
            return Answer(False, "no episode was labelled in this session")
        self._store.append_reward(
            replace(label, event_id="", value=float("nan"), valid=False, reason="undone", revokes=label.event_id)
        )
        self._say(episode=replace(self._view.episode, outcome="none"))
        return Answer(True, f"the label of episode {label.episode_id[-6:]} is revoked")

    def _say(self, **changes: Any) -> None:
        self._view = replace(self._view, clock_ns=time.time_ns(), **changes)

    # ---- the loop, in its own thread

    def _run(self) -> None:
        try:
            import robot_rl.runtime.acting  # noqa: F401  (torch, seconds that the first control step would stand still for)

            env = self._make_env()
            spec = env.spec.action
            self._period = 1.0 / (self._rate or env.spec.control_hz)
            if (self._path / "store.json").exists():
                self._store = EpisodeStore.open(self._path, mode="a")
            else:
                features: Any = env.spec.observation_features
                self._store = EpisodeStore.create(
                    self._path, observation_features=features, action=spec, noise_shape=self._noise_shape,
                    chunk_horizon=self._chunk_horizon,
                )  # fmt: skip
            self._arbiter = OperatorArbiter(spec)
            self._loop = ControlLoop(
                spec, ChunkScheduler(spec, self._n_action), SafetyFilter(self._safety_config, spec, 1.0 / self._period),
                n_obs_steps=self._n_obs, arbiter=self._arbiter,
            )  # fmt: skip
            self._standstill = np.zeros(spec.dim, np.float32)
            env.reset(seed=self._seed)
            self._say(task=self._view.task or env.spec.instruction, weights=self._weights_view(0))
        except BaseException as error:
            self.error = error
            self._ready.set()
            return
        self._ready.set()
        try:
            self._work(env)
        except BaseException as error:
            self.error = error
            self._say(problems=(f"the session stopped: {error!r}",), nodes={"simulation": "failed"})
            raise
        finally:
            self._store.close()
            env.close()

    def _work(self, env: Environment) -> None:
        deadline, idle_since = time.monotonic(), time.monotonic()
        observation: Observation = {}
        while not self._stop.is_set():
            with self._guard:
                if not self._running and (
                    self._start or (self._auto and time.monotonic() - idle_since > 0.5 and not self._estopped)
                ):
                    observation = self._begin(env)
                if self._running:
                    observation = self._step(env, observation)
                    idle_since = time.monotonic()
            self._show(env)
            deadline = max(deadline + self._period, time.monotonic() - self._period)
            self._stop.wait(max(0.0, deadline - time.monotonic()))
        if self._running:
            self._loop.abort()

    def _show(self, env: Environment) -> None:
        for name in self._names:
            self.cameras.offer(name, env.render(name, *self._size), time.time_ns())

    def _begin(self, env: Environment) -> Observation:
        observation, _ = env.reset(seed=self._seed)
        self._seed += 1
        acting = self._promoted[-1] if self._pinned is None else self._pinned
        identity = new_ulid()
        meta = EpisodeMeta(
            identity, task=self._view.task, env_id=env.spec.env_id, seed=self._seed - 1, weights_version=acting,
            control_hz=1.0 / self._period,
        )  # fmt: skip
        self._loop.begin(
            observation,
            key=("console", identity),
            recorder=self._store.begin(meta),
            stamp_ns=time.monotonic_ns(),
            measured=self._measured(env),
        )
        self._acting, self._start, self._ending, self._abort, self._running = acting, False, None, False, True
        self._traces, self._began = [], time.monotonic()
        episode = EpisodeView(identity, "running", self._view.episode.index + 1, 0, "policy", self._view.task, "none")
        # What the policy of a hidden comparison is called must be true here: the page is told nothing of it anyway.
        self._say(episode=episode, weights=self._weights_view(acting), traces={})
        return observation

    @staticmethod
    def _measured(env: Environment) -> np.ndarray:
        """Absolute dimensions start where their range allows a gripper to be open."""
        return np.asarray(env.spec.action.high, np.float32) * env.spec.action.gripper_mask

    def _step(self, env: Environment, observation: Observation) -> Observation:
        loop, now = self._loop, time.monotonic_ns()
        if self._abort:
            loop.abort()
            return self._over("aborted", None, "discarded", observation)
        if self._arbiter.end_requested:
            return self._finish("ended", None, "the e-stop was pressed", observation)
        self._offer(now)
        if loop.wants_chunk:
            loop.accept(self._policies[self._acting].decide([loop.request()])[0])
        command = loop.tick(now)
        if self._holding:
            command = loop._standstill()
            loop.correct(command, Source.HOLD)
        pending = loop._pending
        control = "hold" if pending is None else pending.source.name.lower()
        self.ticks += 1
        self.commands = [*self.commands[-199:], command]
        seen, reward, terminated, truncated, info = env.step(command)
        ended = self._ending is not None
        loop.observe(seen, float(reward), terminated or ended, truncated and not ended)
        self._traces.append(TracePoint(loop.step, float(reward), "dense"))
        self._say(
            control=self._arbiter.state.value, device="console" if self._arbiter.state is State.HUMAN else "",
            episode=replace(
                self._view.episode, step=loop.step, control=control, seconds=time.monotonic() - self._began,
                human_steps=self._view.episode.human_steps + (control == "human"),
            ),
            traces={"env": tuple(self._traces)},
        )  # fmt: skip
        if ended or terminated or truncated:
            success = (
                self._ending if ended else bool(info.get("success"))
            )  # the simulator knows; a person may overrule it later
            return self._finish("ended", success, "" if ended or terminated else "time limit", seen)
        return seen

    def _offer(self, now: int) -> None:
        if self._drive is None:
            return
        drive, received, operator = self._drive
        axes = deflection(drive.axes, DEADBAND)
        action = axes_to_action(self._loop.action, axes, self._gripper_open, self._loop._standstill())
        self._arbiter.offer(
            DeviceSample(
                received,
                received,
                "console",
                profile("console"),
                drive.held,
                drive.held,
                action if drive.held else None,
                not drive.held and not axes.any(),
                operator,
            )
        )

    def _finish(self, state: str, success: bool | None, detail: str, observation: Observation) -> Observation:
        identity, steps = self._view.episode.id, self._loop.step
        if steps == 0:
            self._loop.abort()
            return self._over("aborted", None, detail, observation)
        self._loop.finish(success=None, background=False)
        if success is not None:
            self._last_label = self._store.append_reward(
                RewardEvent(identity, steps, "label", float(success), RewardKind.SUCCESS, model_id="human:operator")
            )[0]
        view = self._view
        known = success is not None
        self._say(episodes=view.episodes + 1, successes=view.successes + int(success is True))
        return self._over("committed", success if known else None, detail, observation)

    def _over(self, state: str, success: bool | None, detail: str, observation: Observation) -> Observation:
        self._running, self._ending, self._abort = False, None, False
        outcome = "none" if success is None else "success" if success else "failure"
        control = "estop" if self._estopped else "autonomous"
        self._say(episode=replace(self._view.episode, state=state, outcome=outcome, detail=detail), control=control, device="")
        return observation
