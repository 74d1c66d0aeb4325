"""Last-stage limits of one command channel, in the vectors that travel to its controller."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robot_rl.robots import rotations as rot
from robot_rl.robots.channels import Channel
from robot_rl.robots.description import Limits, RobotDescription
from robot_rl.runtime.safety import SafetyConfig, SafetyFilter, SafetyLevel
from robot_rl.types import ActionSpec, SafetyFlag

JUMP_FACTOR = 3.0


@dataclass(frozen=True)
class Verdict:
    """``vector`` may be sent; ``held``: it replaces the wish. ``index`` is the element that was changed most (-1: none)."""

    vector: np.ndarray
    flags: SafetyFlag
    held: bool
    index: int = -1


class ChannelGuard:
    """Limits of one channel at ``command_hz``; subclasses keep what was executed last."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.last: np.ndarray | None = None

    def reset(self, measured: np.ndarray | None, now_ns: int) -> None:
        """Start at rest at ``measured`` (None for channels that are held at zero)."""
        raise NotImplementedError

    def wish(self, vector: np.ndarray, now_ns: int) -> Verdict:
        raise NotImplementedError

    def hold(self, now_ns: int) -> np.ndarray:
        """Brake along the limits, then stay."""
        raise NotImplementedError


class JointGuard(ChannelGuard):
    """Joint values through the same filter that the control loop runs.

    Velocities and efforts are treated as positions of one derivative up: their limits of value and change are those of
    velocity (or effort) and acceleration, and they are held at zero.
    """

    def __init__(self, channel: Channel, limits: Limits, command_hz: float, speed_scale: float) -> None:
        super().__init__(channel)
        command = channel.command
        rows = [limits.joints[j] for j in command.names]
        gripper = [command.is_gripper or j in command.action.gripper for j in command.names]
        self._zero = channel.kind in ("joint_group_velocity", "joint_group_effort")
        if self._zero:
            top = [r.velocity if channel.kind.endswith("velocity") else float(r.effort or 0.0) for r in rows]
            low, high, margin = [-t * speed_scale for t in top], [t * speed_scale for t in top], [0.0] * len(rows)
            config = SafetyConfig(
                velocity=[r.acceleration for r in rows] if channel.kind.endswith("velocity") else None,
                acceleration=[r.jerk for r in rows] if channel.kind.endswith("velocity") else None,
                speed_scale=speed_scale, max_operator_age_s=None, step_jump_factor=None,
            )  # fmt: skip
        else:
            low, high = [r.position[0] for r in rows], [r.position[1] for r in rows]
            margin = [0.0 if g else limits.margin_of(j) for j, g in zip(command.names, gripper, strict=True)]
            config = SafetyConfig(
                position_margin=margin, velocity=[r.velocity for r in rows], acceleration=[r.acceleration for r in rows],
                jerk=[r.jerk for r in rows], speed_scale=speed_scale, step_jump_factor=JUMP_FACTOR, max_operator_age_s=None,
                gripper_toggles_per_s=limits.gripper_toggles_per_s if any(gripper) else None,
            )  # fmt: skip
        kinds = tuple("gripper_continuous" if g else "continuous" for g in gripper)
        spec = ActionSpec(tuple(low), tuple(high), command.names, kinds)
        self._filter = SafetyFilter(config, spec, command_hz)

    def reset(self, measured: np.ndarray | None, now_ns: int) -> None:
        start = np.zeros(self.channel.width) if self._zero or measured is None else np.asarray(measured, np.float64)
        self._filter.reset(now_ns, measured=start)
        self.last = start.copy()

    def wish(self, vector: np.ndarray, now_ns: int) -> Verdict:
        result = self._filter.filter(vector, now_ns=now_ns)
        return self._verdict(vector, result.command, result.flags, result.level >= SafetyLevel.HOLD)

    def hold(self, now_ns: int) -> np.ndarray:
        if self._zero:
            self.last = self._filter.filter(np.zeros(self.channel.width), now_ns=now_ns).command
        else:
            assert self.last is not None
            self.last = self._filter.filter(self.last, now_ns=now_ns, hold=SafetyFlag.WATCHDOG).command
        return self.last

    def _verdict(self, wanted: np.ndarray, sent: np.ndarray, flags: SafetyFlag, held: bool) -> Verdict:
        self.last = np.asarray(sent, np.float64)
        index = int(np.argmax(np.abs(np.nan_to_num(wanted, nan=np.inf) - sent))) if flags else -1
        return Verdict(self.last, flags, held, index)


class _Tool:
    """Limits of a tool in the base frame."""

    def __init__(self, limits: Limits, command_hz: float, speed_scale: float) -> None:
        tool = limits.tool
        assert tool is not None
        self.linear, self.angular = tool.linear_speed * speed_scale, tool.angular_speed * speed_scale
        self.dt = 1.0 / command_hz
        box = tool.workspace
        self.low = None if box is None else np.array(box.min) + tool.margin
        self.high = None if box is None else np.array(box.max) - tool.margin
        self.keep_out = [(np.array(b.min) - tool.margin, np.array(b.max) + tool.margin) for b in tool.keep_out]

    def clamped(self, position: np.ndarray) -> np.ndarray:
        return position if self.low is None or self.high is None else np.clip(position, self.low, self.high)

    def forbidden(self, position: np.ndarray) -> bool:
        return any(bool(np.all(position > low) and np.all(position < high)) for low, high in self.keep_out)


class PoseGuard(ChannelGuard):
    """Absolute poses: workspace and keep-out boxes, speed of the tool, jumps."""

    def __init__(self, channel: Channel, limits: Limits, command_hz: float, speed_scale: float) -> None:
        super().__init__(channel)
        self._tool = _Tool(limits, command_hz, speed_scale)

    def reset(self, measured: np.ndarray | None, now_ns: int) -> None:
        if measured is None:
            raise ValueError(f"channel {self.channel.name}: the measured pose is needed")
        self.last = np.array(measured, np.float64)

    def wish(self, vector: np.ndarray, now_ns: int) -> Verdict:
        assert self.last is not None
        tool, last = self._tool, self.last
        norm = float(np.linalg.norm(vector[3:]))
        if not np.isfinite(vector).all() or abs(norm - 1.0) > 1e-2:
            return Verdict(last, SafetyFlag.NON_FINITE, True, 3 if np.isfinite(vector[:3]).all() else 0)
        flags = SafetyFlag.NONE
        out = vector.copy()
        out[3:] = rot.same_sign(out[3:] / norm, last[3:])
        moved, turned = out[:3] - last[:3], rot.to_rotvec(rot.multiply(out[3:], rot.inverse(last[3:])))
        distance, angle = float(np.linalg.norm(moved)), float(np.linalg.norm(turned))
        far, wide = tool.linear * tool.dt, tool.angular * tool.dt
        if distance > JUMP_FACTOR * far * (1 + 1e-9) or angle > JUMP_FACTOR * wide * (1 + 1e-9):
            return Verdict(last, SafetyFlag.STEP_JUMP, True, int(np.argmax(np.abs(moved))))
        scale = min(1.0, far / distance if distance > far else 1.0, wide / angle if angle > wide else 1.0)
        if scale < 1.0 - 1e-6:
            out[:3] = last[:3] + scale * moved
            out[3:] = rot.same_sign(rot.multiply(rot.from_rotvec(scale * turned), last[3:]), last[3:])
            flags |= SafetyFlag.VELOCITY
        inside = tool.clamped(out[:3])
        # A start outside the box may come back in, at the tool's speed, and never go further out.
        if np.any(np.abs(inside - out[:3]) > 1e-9):
            step = inside - last[:3]
            size = float(np.linalg.norm(step))
            out[:3] = inside if size <= far * JUMP_FACTOR or size == 0.0 else last[:3] + step * (far / size)
            flags |= SafetyFlag.WORKSPACE
        if tool.forbidden(out[:3]):
            return Verdict(last, flags | SafetyFlag.WORKSPACE, True, int(np.argmax(np.abs(moved))))
        self.last = out
        return Verdict(out, flags, False, int(np.argmax(np.abs(vector[:3] - out[:3]))) if flags else -1)

    def hold(self, now_ns: int) -> np.ndarray:
        assert self.last is not None
        return self.last


class TwistGuard(ChannelGuard):
    """Velocities of the tool: speed, and no further out of the workspace. Held at zero."""

    def __init__(self, channel: Channel, limits: Limits, command_hz: float, speed_scale: float) -> None:
        super().__init__(channel)
        self._tool = _Tool(limits, command_hz, speed_scale)
        self.position: np.ndarray | None = None
        self.last = np.zeros(6)

    def reset(self, measured: np.ndarray | None, now_ns: int) -> None:
        self.last = np.zeros(6)
        self.position = None if measured is None else np.array(measured[:3])

    def wish(self, vector: np.ndarray, now_ns: int) -> Verdict:
        tool = self._tool
        if not np.isfinite(vector).all():
            self.last = np.zeros(6)
            return Verdict(self.last, SafetyFlag.NON_FINITE, True, 0)
        linear, angular = float(np.linalg.norm(vector[:3])), float(np.linalg.norm(vector[3:]))
        if linear > JUMP_FACTOR * tool.linear or angular > JUMP_FACTOR * tool.angular:
            self.last = np.zeros(6)
            return Verdict(self.last, SafetyFlag.STEP_JUMP, True, int(np.argmax(np.abs(vector))))
        flags, out = SafetyFlag.NONE, vector.copy()
        scale = min(1.0, tool.linear / linear if linear else 1.0, tool.angular / angular if angular else 1.0)
        if scale < 1.0 - 1e-9:
            out *= scale
            flags |= SafetyFlag.VELOCITY
        if self.position is not None:
            ahead = self.position + out[:3] * tool.dt
            leaving = ((ahead > tool.clamped(ahead)) & (out[:3] > 0)) | ((ahead < tool.clamped(ahead)) & (out[:3] < 0))
            if leaving.any() or tool.forbidden(ahead):
                out[:3] = np.where(leaving, 0.0, out[:3]) if leaving.any() else 0.0
                flags |= SafetyFlag.WORKSPACE
        self.last = out
        return Verdict(out, flags, False, int(np.argmax(np.abs(vector - out))) if flags else -1)

    def hold(self, now_ns: int) -> np.ndarray:
        self.last = np.zeros(6)
        return self.last


def guard_for(channel: Channel, robot: RobotDescription, speed_scale: float) -> ChannelGuard:
    kinds = {"pose": PoseGuard, "twist": TwistGuard}
    return kinds.get(channel.kind, JointGuard)(channel, robot.limits, robot.rates.command_hz, speed_scale)
