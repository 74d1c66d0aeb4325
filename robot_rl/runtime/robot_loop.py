"""A :class:`ControlLoop` in front of a robot's command channels; no ROS here.

The loop speaks actions, the robot speaks channel vectors (joints, poses, twists). In between: deltas are added to what was last
executed, commands are interpolated from one control step to the next, and what a guard behind us really sent is written into
the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from robot_rl.robots.channels import ZERO_WHEN_HELD, Channel, channels_of
from robot_rl.robots.description import RobotDescription
from robot_rl.runtime.chunk_scheduler import ChunkScheduler
from robot_rl.runtime.control_loop import Arbiter, ControlLoop, Recorder
from robot_rl.runtime.safety import SafetyConfig, SafetyFilter
from robot_rl.types import ActionSpec, Observation, SafetyFlag, Source

SAME = 1e-6
_INF = float("inf")


def bounded_action(robot: RobotDescription, action: ActionSpec) -> ActionSpec:
    """The policy's action inside the robot's joint limits.

    Raises:
        ValueError: a joint whose limits have nothing in common with the policy's.
    """
    low, high, kinds = list(action.low), list(action.high), list(action.kind)
    for c in robot.commands:
        if c.is_cartesian or c.action.mode == "delta" or c.kind in ZERO_WHEN_HELD:
            continue
        for i, joint in enumerate(c.names, start=c.action.slice[0]):
            limit, margin = robot.limits.joints[joint].position, robot.limits.margin_of(joint)
            low[i], high[i] = max(low[i], limit[0] + margin), min(high[i], limit[1] - margin)
            if not low[i] < high[i]:
                raise ValueError(
                    f"limits.joints.{joint}: [{limit[0]:g}, {limit[1]:g}] minus margin {margin:g} has nothing in common with the "
                    f"policy's range [{action.low[i]:g}, {action.high[i]:g}]"
                )
            if (c.is_gripper or joint in c.action.gripper) and kinds[i] == "continuous":
                kinds[i] = "gripper_continuous"
    return replace(action, low=tuple(low), high=tuple(high), kind=tuple(kinds))


def action_limits(robot: RobotDescription, action: ActionSpec) -> SafetyConfig:
    """The description's limits on the change of each action dimension, for the filter that runs once a control step."""
    velocity, acceleration, jerk = [_INF] * action.dim, [_INF] * action.dim, [_INF] * action.dim
    for c in robot.commands:
        first, tool = c.action.slice[0], robot.limits.tool
        if c.is_cartesian:
            if tool is not None and c.action.mode == "delta":
                for i in range(c.action.width):
                    velocity[first + i] = tool.linear_speed if i < 3 else tool.angular_speed
            continue
        if c.kind in ZERO_WHEN_HELD:
            continue
        for i, joint in enumerate(c.names, start=first):
            limit = robot.limits.joints[joint]
            velocity[i], acceleration[i], jerk[i] = limit.velocity, limit.acceleration, limit.jerk
    grippers = bool(action.gripper_mask.any())
    return SafetyConfig(
        velocity=velocity, acceleration=acceleration, jerk=jerk, position_margin=0.0,
        gripper_toggles_per_s=robot.limits.gripper_toggles_per_s if grippers else None, stop_after_hold_s=None,
    )  # fmt: skip


class RobotLoop:
    """Control steps in actions, commands in channel vectors.

    Args:
        action: the policy's; ``n_action_steps`` rows of a chunk may run.
        arbiter: who decides between policy and person; the policy alone by default.
    """

    def __init__(
        self,
        robot: RobotDescription,
        action: ActionSpec,
        *,
        n_obs_steps: int = 1,
        n_action_steps: int = 1,
        blend_steps: int = 0,
        arbiter: Arbiter | None = None,
    ) -> None:
        self.robot = robot
        self.channels: tuple[Channel, ...] = channels_of(robot)
        spec = bounded_action(robot, action)
        self.scheduler = ChunkScheduler(spec, n_action_steps, blend_steps=blend_steps)
        self.filter = SafetyFilter(action_limits(robot, spec), spec, robot.rates.control_hz)
        self.loop = ControlLoop(spec, self.scheduler, self.filter, n_obs_steps=n_obs_steps, arbiter=arbiter)
        self._ratio = max(1.0, robot.rates.command_hz / robot.rates.control_hz)
        self.per_step = self._periods(0)
        self.changed = 0
        self.command: np.ndarray | None = None
        self._reset()

    def _reset(self) -> None:
        self._before: dict[str, np.ndarray] = {}
        self._target: dict[str, np.ndarray] = {}
        self._executed: dict[str, tuple[np.ndarray, int]] = {}
        self._at_step: dict[str, np.ndarray] = {}
        self._sent_stamp = -1
        self.executed_ns = -1
        self.guard_moving = False
        self.guard_holding = False

    def begin(
        self,
        observation: Observation,
        measured: Mapping[str, np.ndarray | None],
        *,
        key: tuple[int | str, ...],
        recorder: Recorder | None,
        now_ns: int,
        stamp_ns: int,
    ) -> None:
        """Start an episode where the robot stands.

        Raises:
            ValueError: a channel's measured state is needed and unknown.
        """
        self._reset()
        start = np.zeros(self.loop.action.dim)
        for c in self.channels:
            vector = measured.get(c.name)
            if vector is None:
                if c.kind not in ZERO_WHEN_HELD:
                    raise ValueError(f"the measured state of channel {c.name} is unknown: is its driver running?")
                vector = np.zeros(c.width)
            self._before[c.name] = self._target[c.name] = vector
            self._at_step[c.name] = vector
            if c.action.mode == "absolute" and c.kind not in ZERO_WHEN_HELD:
                values = c.executed_action(vector, vector)
                if values is not None:
                    start[c.slice] = values
        self.loop.begin(observation, key=key, recorder=recorder, stamp_ns=stamp_ns, measured=start)
        self.filter.reset(now_ns, measured=start)

    def _periods(self, step: int) -> int:
        """Command periods of a control step; where the ratio is no whole number they differ by one, so that the control rate holds."""
        return int((step + 1) * self._ratio + SAME) - int(step * self._ratio + SAME)

    # ---- what comes back from the guard

    def on_executed(self, channel: str, vector: np.ndarray, stamp_ns: int, now_ns: int) -> None:
        self._executed[channel] = (vector, stamp_ns)
        self.executed_ns = now_ns

    def _reference(self, c: Channel) -> np.ndarray:
        """The value that a delta is added to: what was executed last, as far as it is known."""
        executed = self._executed.get(c.name)
        if executed is None:
            return self._target[c.name] if self.guard_moving else self._at_step[c.name]
        if executed[1] < self._sent_stamp and self.guard_moving:
            return self._target[c.name]  # the answer to our last command is still on its way
        return executed[0]

    # ---- a control step

    def close_step(self, observation: Observation, reward: float, terminated: bool, truncated: bool, stamp_ns: int) -> None:
        """What the last command led to: corrects the record by what the guard sent, then logs the step."""
        action = self._really()
        source = Source.SAFETY if self.guard_holding else None
        if action is not None or source is not None:
            self.loop.correct(action, source, SafetyFlag.NONE)
        self.loop.observe(observation, reward, terminated, truncated, stamp_ns)

    def _really(self) -> np.ndarray | None:
        """The action that was executed in this step, or None where it was the command itself."""
        if self.command is None:
            return None
        out: np.ndarray | None = None
        for c in self.channels:
            executed = self._executed.get(c.name)
            if executed is None or (executed[1] < self._sent_stamp and not self.guard_holding):
                continue
            if np.max(np.abs(executed[0] - self._target[c.name])) <= SAME:
                continue
            values = c.executed_action(executed[0], self._at_step[c.name])
            if values is None or values.shape != self.command[c.slice].shape:
                continue
            out = self.command.copy() if out is None else out
            out[c.slice] = values
        self.changed += out is not None
        return out

    def step(self, now_ns: int, measured: Mapping[str, np.ndarray | None], hold: SafetyFlag = SafetyFlag.NONE) -> np.ndarray:
        """Decide the command of this control step; :meth:`vectors` then says what to send at each command period."""
        self.per_step = self._periods(self.loop.step)
        self.command = self.loop.tick(now_ns, hold)
        for c in self.channels:
            reference = self._reference(c)
            self._before[c.name] = self._at_step[c.name] = reference
            self._target[c.name] = c.target(self.command, reference, measured.get(c.name))
        return self.command

    def vectors(self, part: int, stamp_ns: int) -> dict[str, np.ndarray]:
        """Channel vectors of command period ``part`` (0 .. per_step - 1) of the present control step."""
        self._sent_stamp = stamp_ns
        weight = (part + 1) / self.per_step
        return {c.name: c.between(self._before[c.name], self._target[c.name], weight) for c in self.channels}
