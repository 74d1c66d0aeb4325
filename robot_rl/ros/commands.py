"""Command adapters: channel vectors to the messages of ``action/<ch>`` and of every kind of controller, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from robot_rl.robots.description import Command, RobotDescription
from robot_rl.ros import conversion, qos
from robot_rl.ros.conversion import JointReader
from robot_rl.wire import WireError

FARTHEST = 1e3
"""Metres, radians, newton metres: what is farther than this is no command that anybody gave."""


class MissingMessagePackage(ImportError):
    """A configured adapter needs a message package that is not installed here."""


# ---- between our own nodes


def hop_type(command: Command) -> type:
    """The message of ``action/<ch>``, ``executed/<ch>`` and ``operator/action/<ch>``."""
    return {"pose": PoseStamped, "twist": TwistStamped}.get(command.kind, JointState)


class Hop:
    """Channel vectors as stamped messages with names and frames, checked when read."""

    def __init__(self, command: Command, robot: RobotDescription) -> None:
        self.command, self.type = command, hop_type(command)
        self.frame = command.frame or robot.frames.base
        self.field = {"joint_group_velocity": "velocity", "joint_group_effort": "effort"}.get(command.kind, "position")
        self._joints = JointReader(command.names, self.field)

    def message(self, vector: np.ndarray, stamp_ns: int) -> Any:
        if self.type is PoseStamped:
            return conversion.pose_message(vector, stamp_ns, self.frame)
        if self.type is TwistStamped:
            return conversion.twist_message(vector, stamp_ns, self.frame)
        return conversion.joint_state(self.command.names, stamp_ns, **{self.field: vector})  # type: ignore[arg-type]

    def read(self, message: Any) -> tuple[np.ndarray, int]:
        """(channel vector, stamp). Raises WireError for other names or another frame."""
        stamp = conversion.from_stamp(message.header.stamp)
        if self.type is JointState:
            if len(message.name) != len(self.command.names):
                raise WireError(f"{len(message.name)} joints; accepted are exactly {', '.join(self.command.names)}")
            return self._joints(message), stamp
        if message.header.frame_id != self.frame:
            raise WireError(f"frame {message.header.frame_id!r}; accepted is {self.frame!r}")
        return (conversion.pose_vector if self.type is PoseStamped else conversion.twist_vector)(message), stamp

    def read_plausible(self, message: Any) -> tuple[np.ndarray, int]:
        """As :meth:`read`, for what no guard stands before: numbers that no arm reaches would go into references and recordings.

        Raises:
            WireError: also for values that are not finite or beyond :data:`FARTHEST`.
        """
        vector, stamp = self.read(message)
        if not np.all(np.abs(vector) <= FARTHEST):  # written so that NaN fails
            raise WireError(f"{vector.tolist()}; accepted are numbers up to {FARTHEST:g} (m, rad, N m)")
        if self.type is PoseStamped and abs(float(np.linalg.norm(vector[3:])) - 1.0) > 1e-2:
            raise WireError(f"orientation {vector[3:].tolist()}; accepted are quaternions of length 1")
        return vector, stamp


# ---- to controllers


class Sink(Protocol):
    """Where a channel ends: one controller topic, action or service."""

    def send(self, vector: np.ndarray, stamp_ns: int) -> None: ...

    def close(self) -> None: ...


class TopicSink:
    """A controller that listens to a topic."""

    def __init__(self, node: Node, message_type: type, topic: str, build: Callable[[np.ndarray, int], Any]) -> None:
        self._node, self._build = node, build
        self.publisher = node.create_publisher(message_type, topic, qos.COMMAND)

    def send(self, vector: np.ndarray, stamp_ns: int) -> None:
        self.publisher.publish(self._build(vector, stamp_ns))

    def close(self) -> None:
        self._node.destroy_publisher(self.publisher)


def trajectory_point(names: tuple[str, ...], vector: np.ndarray, horizon_s: float) -> JointTrajectory:
    """One point, due after ``horizon_s``, to start at once (zero header stamp) and to end at rest."""
    seconds = int(horizon_s)
    point = JointTrajectoryPoint(positions=[float(x) for x in vector], velocities=[0.0] * len(vector))
    point.time_from_start.sec, point.time_from_start.nanosec = seconds, int((horizon_s - seconds) * 1e9)
    return JointTrajectory(joint_names=list(names), points=[point])


class TrajectorySink:
    """``joint_trajectory_controller``: each command is a short trajectory through it.

    Velocities are the finite difference of the commands that the guard let through, so that the controller's spline passes a
    point in motion instead of stopping at it; a second point holds it there, so that a dead guard leaves an arm that comes to
    rest within one and a half command periods.
    """

    def __init__(self, node: Node, command: Command, period_s: float) -> None:
        self._node, self._command, self._period = node, command, period_s
        self.publisher = node.create_publisher(JointTrajectory, command.topic, qos.COMMAND)
        self._last: np.ndarray | None = None

    def send(self, vector: np.ndarray, stamp_ns: int) -> None:
        before = vector if self._last is None else self._last
        velocity = (vector - before) / self._period
        self._last = vector.copy()
        message = trajectory_point(self._command.names, vector, self._period)
        if np.any(velocity):
            message.points[0].velocities = [float(v) for v in velocity]
            rest = trajectory_point(self._command.names, vector + velocity * self._period / 4, 1.5 * self._period)
            message.points.append(rest.points[0])
        self.publisher.publish(message)

    def close(self) -> None:
        self._node.destroy_publisher(self.publisher)


class GripperServiceSink:
    """A gripper with an ``open`` and a ``close`` service; hysteresis keeps a wavering command from toggling it."""

    LOW, HIGH = 0.4, 0.6

    def __init__(self, node: Node, command: Command) -> None:
        self._node, self._command = node, command
        self._clients = {
            True: node.create_client(Trigger, command.topic),
            False: node.create_client(Trigger, command.close_topic),
        }
        self._is_open: bool | None = None

    def send(self, vector: np.ndarray, stamp_ns: int) -> None:
        low, high = self._command.action.closed, self._command.action.open
        assert low is not None
        assert high is not None
        share = (float(vector[0]) - low) / (high - low)
        wanted = True if share > self.HIGH else False if share < self.LOW else self._is_open
        if wanted is None or wanted == self._is_open or not self._clients[wanted].service_is_ready():
            return
        self._is_open = wanted
        self._clients[wanted].call_async(Trigger.Request())  # never awaited: the loop does not wait for a gripper

    def close(self) -> None:
        for client in self._clients.values():
            self._node.destroy_client(client)


class GripperActionSink:
    """``GripperCommand`` or ``ParallelGripperCommand``: a goal when the command changed by 2 % of the range, 5 a second at most.

    Raises:
        MissingMessagePackage: ``control_msgs`` is not on the Python package index.
    """

    def __init__(self, node: Node, command: Command) -> None:
        try:
            from control_msgs import action as actions
            from rclpy.action import ActionClient
        except ImportError as error:
            raise MissingMessagePackage(
                f"channel {command.channel}: kind gripper_action needs the package control_msgs, which is not among the wheels on "
                "the package index: install ros-jazzy-control-msgs with apt or RoboStack, or use gripper_position"
            ) from error
        self._node, self._command = node, command
        self._type = getattr(actions, command.action_type)
        self._client = ActionClient(node, self._type, command.topic)
        self._last, self._sent_ns = math.nan, 0

    def send(self, vector: np.ndarray, stamp_ns: int) -> None:
        value, action = float(vector[0]), self._command.action
        assert action.open is not None
        assert action.closed is not None
        small = abs(value - self._last) <= 0.02 * abs(action.open - action.closed)
        now = self._node.get_clock().now().nanoseconds
        if small or now - self._sent_ns < 200_000_000 or not self._client.server_is_ready():
            return
        goal = self._type.Goal()
        if self._command.action_type == "GripperCommand":
            goal.command.position, goal.command.max_effort = value, self._command.max_effort
        else:
            goal.command.name, goal.command.position = list(self._command.names), [value]
            goal.command.effort = [self._command.max_effort] if self._command.max_effort else []
        self._last, self._sent_ns = value, now
        self._client.send_goal_async(goal)

    def close(self) -> None:
        self._client.destroy()


def sink_for(node: Node, command: Command, robot: RobotDescription) -> Sink:
    """The adapter of a channel's kind. Raises MissingMessagePackage where its messages are not installed."""
    kind, topic, names = command.kind, command.topic, command.names
    hop = Hop(command, robot)
    if kind == "gripper_action":
        return GripperActionSink(node, command)
    if kind == "gripper_service":
        return GripperServiceSink(node, command)
    if kind == "joint_trajectory" or (kind == "gripper_position" and command.trajectory_gripper):
        return TrajectorySink(node, command, 1.0 / robot.rates.command_hz)
    if kind in ("joint_state", "pose", "twist"):
        return TopicSink(node, hop.type, topic, hop.message)
    assert names
    return TopicSink(node, Float64MultiArray, topic, lambda v, _: Float64MultiArray(data=[float(x) for x in v]))


def controller_type(command: Command) -> type | None:
    """The message a controller topic carries; None where it is an action or a service."""
    if command.kind in ("gripper_action", "gripper_service"):
        return None
    if command.kind == "joint_trajectory" or (command.kind == "gripper_position" and command.trajectory_gripper):
        return JointTrajectory
    if command.kind in ("joint_state", "pose", "twist"):
        return hop_type(command)
    return Float64MultiArray


def read_controller(command: Command, robot: RobotDescription) -> Callable[[Any], np.ndarray]:
    """What a controller makes of its messages: the channel vector (for sim_node and tests)."""
    kind = controller_type(command)
    if kind is Float64MultiArray:

        def group(message: Float64MultiArray) -> np.ndarray:
            values = np.asarray(message.data, np.float64)
            if values.shape != (len(command.names),):
                raise WireError(f"{command.topic}: {len(values)} values; accepted are {len(command.names)}")
            return values

        return group
    if kind is JointTrajectory:

        def trajectory(message: JointTrajectory) -> np.ndarray:
            where = {n: i for i, n in enumerate(message.joint_names)}
            if not message.points or set(where) != set(command.names):
                raise WireError(
                    f"{command.topic}: a trajectory of {list(where)}; accepted are exactly {', '.join(command.names)}"
                )
            positions = message.points[0].positions
            if len(positions) != len(where):
                raise WireError(f"{command.topic}: {len(positions)} positions for {len(where)} joints")
            return np.array([positions[where[n]] for n in command.names])

        return trajectory
    hop = Hop(command, robot)
    return lambda message: hop.read(message)[0]
