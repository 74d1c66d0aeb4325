"""Actions to channel vectors and back.

A channel vector is what ``action/<ch>`` carries: joint values in the order of ``names``; x, y, z, qx, qy, qz, qw of a pose;
linear and angular velocity of a twist.
"""

from __future__ import annotations

import numpy as np

from robot_rl.robots import rotations as rot
from robot_rl.robots.description import Command, RobotDescription, ToolLimits

ZERO_WHEN_HELD = ("joint_group_velocity", "joint_group_effort", "twist")


class Channel:
    """One command channel: its slice of the action, and the vector it becomes.

    Args:
        tool: limits whose workspace bounds an integrated pose, so that pushing against the box cannot wind up.
    """

    def __init__(self, command: Command, control_hz: float, tool: ToolLimits | None = None) -> None:
        self.command, self.control_hz = command, control_hz
        self.name, self.kind, self.action = command.channel, command.kind, command.action
        self.slice = slice(*command.action.slice)
        self.width = {"pose": 7, "twist": 6}.get(command.kind, len(command.names))
        self._tool = tool

    @property
    def needs_reference(self) -> bool:
        """Whether a target is relative to the last executed value."""
        return self.action.mode == "delta" and self.kind != "twist"

    def target(self, action: np.ndarray, reference: np.ndarray | None, measured: np.ndarray | None = None) -> np.ndarray:
        """The channel vector (float64) of an action vector (A,).

        Args:
            reference: last executed channel vector (of a delta).
            measured: measured pose, for the leash.

        Raises:
            ValueError: a delta without a reference.
        """
        values = np.asarray(action, np.float64)[self.slice]
        if self.kind == "twist":
            return self._twist(values)
        if self.needs_reference and reference is None:
            raise ValueError(f"channel {self.name}: a delta needs the last executed value, and there is none yet")
        if self.kind == "pose":
            return self._pose(values, reference, measured)
        if self.action.mode == "delta":
            assert reference is not None
            return reference + values
        return values

    def _twist(self, values: np.ndarray) -> np.ndarray:
        out = np.zeros(6)
        rate = self.control_hz if self.action.mode == "delta" else 1.0
        out[:3] = values[:3] * rate
        if self.action.layout == "xyz_yaw":
            out[5] = values[3] * rate
        elif self.action.layout == "xyz_rotvec":
            out[3:] = values[3:] * rate
        return out

    def _pose(self, values: np.ndarray, reference: np.ndarray | None, measured: np.ndarray | None) -> np.ndarray:
        layout, out = self.action.layout, np.empty(7)
        if self.action.mode == "absolute":
            out[:3] = values[:3]
            if layout == "xyz_quat":
                out[3:] = rot.normalized(values[3:])
            elif layout == "xyz_rot6d":
                out[3:] = rot.from_rot6d(values[3:])
            elif layout == "xyz_rotvec":
                out[3:] = rot.from_rotvec(values[3:])
            elif layout == "xyz_yaw":
                out[3:] = rot.from_rotvec(np.array([0.0, 0.0, values[3]]))
            else:
                out[3:] = rot.IDENTITY if reference is None else reference[3:]
            return out if reference is None else self._continued(out, reference)
        assert reference is not None
        out[:3] = reference[:3] + values[:3]
        turn = np.zeros(3)
        if layout == "xyz_yaw":
            turn[2] = values[3]
        elif layout == "xyz_rotvec":
            turn = values[3:]
        out[3:] = rot.multiply(rot.from_rotvec(turn), reference[3:])
        leash = self.action.leash
        if measured is not None and leash.linear:
            out[:3] = np.clip(out[:3], measured[:3] - leash.linear, measured[:3] + leash.linear)
        if measured is not None and leash.angular:
            ahead = rot.to_rotvec(rot.multiply(out[3:], rot.inverse(measured[3:])))
            size = float(np.linalg.norm(ahead))
            if size > leash.angular:
                out[3:] = rot.multiply(rot.from_rotvec(ahead * (leash.angular / size)), measured[3:])
        return self._continued(self._inside(out), reference)

    def _inside(self, pose: np.ndarray) -> np.ndarray:
        tool = self._tool
        if tool is not None and tool.workspace is not None:
            pose[:3] = np.clip(pose[:3], np.array(tool.workspace.min) + tool.margin, np.array(tool.workspace.max) - tool.margin)
        if tool is not None and tool.yaw is not None:
            yaw = rot.yaw_of(pose[3:])
            inside = min(max(yaw, tool.yaw[0]), tool.yaw[1])
            if inside != yaw:
                pose[3:] = rot.multiply(rot.from_rotvec(np.array([0.0, 0.0, inside - yaw])), pose[3:])
        return pose

    @staticmethod
    def _continued(pose: np.ndarray, reference: np.ndarray) -> np.ndarray:
        pose[3:] = rot.same_sign(pose[3:] / np.linalg.norm(pose[3:]), reference[3:])
        return pose

    def executed_action(self, executed: np.ndarray, before: np.ndarray | None) -> np.ndarray | None:
        """The slice of the action that ``executed`` stands for; None where that cannot be said."""
        layout = self.action.layout
        if self.kind == "twist":
            rate = 1.0 / self.control_hz if self.action.mode == "delta" else 1.0
            turn = {"xyz": executed[:0], "xyz_yaw": executed[5:6]}.get(layout, executed[3:])
            return np.concatenate([executed[:3], turn]) * rate
        if self.action.mode == "delta":
            if before is None:
                return None
            if self.kind != "pose":
                return executed - before
            turn = rot.to_rotvec(rot.multiply(executed[3:], rot.inverse(before[3:])))
            part = {"xyz": turn[:0], "xyz_yaw": turn[2:3]}.get(layout, turn)
            return np.concatenate([executed[:3] - before[:3], part])
        if self.kind != "pose":
            return executed
        q = executed[3:]
        part = {
            "xyz": lambda: q[:0], "xyz_quat": lambda: q, "xyz_rot6d": lambda: rot.to_rot6d(q),
            "xyz_rotvec": lambda: rot.to_rotvec(q), "xyz_yaw": lambda: np.array([rot.yaw_of(q)]),
        }[layout]()  # fmt: skip
        return np.concatenate([executed[:3], part])

    def between(self, before: np.ndarray, after: np.ndarray, weight: float) -> np.ndarray:
        """``weight`` of the way between two targets of this channel."""
        if self.action.interpolate == "hold" or self.kind in ZERO_WHEN_HELD or weight >= 1.0:
            return after
        if self.kind != "pose":
            out = before + weight * (after - before)
            for i, joint in enumerate(self.command.names):
                if joint in self.action.gripper:
                    out[i] = after[i]
            return out
        out = before + weight * (after - before)
        out[3:] = rot.same_sign(rot.slerp(before[3:], after[3:], weight), before[3:])
        return out

    def held(self, last: np.ndarray) -> np.ndarray:
        """What standing still looks like after ``last``."""
        return np.zeros(self.width) if self.kind in ZERO_WHEN_HELD else last

    def distance(self, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
        """(largest joint or linear distance, angle) between two vectors of a position-like channel."""
        if self.kind == "pose":
            turn = float(np.linalg.norm(rot.to_rotvec(rot.multiply(a[3:], rot.inverse(b[3:])))))
            return float(np.linalg.norm(a[:3] - b[:3])), turn
        return float(np.max(np.abs(a - b), initial=0.0)), 0.0


def channels_of(robot: RobotDescription) -> tuple[Channel, ...]:
    return tuple(Channel(c, robot.rates.control_hz, robot.limits.tool) for c in robot.commands)
