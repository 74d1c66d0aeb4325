"""``sim_node``: a simulated task that behaves like a robot with its drivers.

Publishes what drivers publish (joint states, tool pose, a state estimate, cameras, ``/clock``), takes what controllers take, and
is silent when nobody asks. Physics runs in a thread of its own on absolute deadlines, cameras in another one.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rclpy.parameter import Parameter as RosParameter
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_srvs.srv import SetBool, Trigger

from robot_rl.robots.description import ImageSource, load_robot
from robot_rl.ros import conversion, names, qos
from robot_rl.ros.base import OK, WARN, PlainNode, run
from robot_rl.ros.commands import controller_type, read_controller
from robot_rl.sim.robot import field_of_view, make_robot
from robot_rl.wire import TaskState

LATE_S = 0.2
LOCKSTEP_S = 3.0
CONCEIVABLE = 1e3
"""A controller takes no command of a kilometre or a thousand radians; a simulator would only diverge."""


class SimNode(PlainNode):
    """One simulated robot."""

    def __init__(self) -> None:
        super().__init__(names.SIM_NODE)
        self.parameters.check()
        p = self.parameters
        self.robot = load_robot(p["robot"])
        self._lock = threading.RLock()
        self.sim = make_robot(p["env"], self.robot, {})
        self._seed = -1
        self._wall = not p["publish_clock"]
        self._sim_ns = 1_000_000_000
        self._stop, self._paused = threading.Event(), False
        self._late = self._frames_late = self._ignored = 0
        self._commanded, self._fresh = threading.Event(), set[str]()
        self._lockstep = p["lockstep"] and p["realtime_factor"] == 0.0
        self._command_at = time.monotonic()
        self._pending: list[tuple[float, str, np.ndarray]] = []
        self._rate = (0, time.monotonic())
        self._said: dict[str, Any] = {}
        self._silent_slices, self._state_every = 0, max(1, round(1.0 / (p["state_hz"] * self.sim.slice_s)))
        self._make_publishers()
        self._controllers()
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_service(Trigger, "~/step", self._on_step)
        self.create_service(SetBool, "~/set_pause", self._on_pause)
        self.add_check("physics", self._check)
        self.reset()
        self._threads = [threading.Thread(target=self._run, name="physics", daemon=True)]
        if self._cameras and p["images"] != "off":
            self._threads.append(threading.Thread(target=self._render, name="cameras", daemon=True))
        for thread in self._threads:
            thread.start()

    # ---- what it publishes and takes

    def _make_publishers(self) -> None:
        robot = self.robot
        self._clock_topic = self.create_publisher(Clock, names.CLOCK, qos.LATEST) if not self._wall else None
        self._joints = self.create_publisher(JointState, robot.feedback.joint_states or names.JOINT_STATES, qos.SENSOR)
        has_pose = self.sim.tool_pose() is not None
        self._pose = (
            self.create_publisher(PoseStamped, robot.feedback.tool_pose or names.TOOL_POSE, qos.SENSOR) if has_pose else None
        )
        self._task = self.create_publisher(DiagnosticArray, "~/task_state", qos.EVENT)
        self._estimates: dict[str, Any] = {}
        known = {robot.feedback.joint_states, robot.feedback.tool_pose}
        for sources in robot.states.values():
            for s in sources:
                if s.topic in known or s.topic in self._estimates:
                    continue
                if s.type != "sensor_msgs/msg/JointState":
                    raise ValueError(f"observation {s.topic} of type {s.type}: sim_node publishes JointState estimates only")
                missing = [n for n in s.names if n not in self.sim.estimate()]
                if missing:
                    raise ValueError(f"{s.topic}: {self.sim.env_id} does not observe {', '.join(missing)}")
                self._estimates[s.topic] = self.create_publisher(JointState, s.topic, qos.SENSOR)
        self._cameras: dict[str, tuple[ImageSource, Any, Any, Any]] = {}
        for name, source in robot.images.items():
            raw, info = self._camera_topics(source)
            kind = self.parameters["images"]
            self._cameras[name.rpartition(".")[2]] = (
                source,
                self.create_publisher(Image, raw, qos.SENSOR) if kind in ("raw", "both") else None,
                self.create_publisher(CompressedImage, f"{raw}/compressed", qos.SENSOR) if kind in ("jpeg", "both") else None,
                self.create_publisher(CameraInfo, info, qos.SENSOR),
            )

    @staticmethod
    def _camera_topics(source: ImageSource) -> tuple[str, str]:
        raw = source.topic.removesuffix("/compressed")
        return raw, source.camera_info or raw.removesuffix("/image_raw") + "/camera_info"

    def _controllers(self) -> None:
        for command in self.robot.commands:
            kind = controller_type(command)
            if kind is None:
                raise ValueError(f"channel {command.channel}: sim_node has no {command.kind}; use gripper_position")
            read = read_controller(command, self.robot)

            def take(message: Any, channel: str = command.channel, read: Any = read, command_kind: str = command.kind) -> None:
                vector = read(message)
                turned = command_kind == "pose" and abs(float(np.linalg.norm(vector[3:])) - 1.0) > 1e-2
                if not np.isfinite(vector).all() or turned or np.abs(vector).max(initial=0.0) > CONCEIVABLE:
                    self._ignored += 1
                    return
                delay = self.parameters["command_latency_s"]
                with self._lock:
                    self._pending.append((time.monotonic() + delay, channel, vector))
                    self._command_at = time.monotonic()
                    self._fresh.add(channel)
                    if len(self._fresh) == len(self.robot.commands):
                        self._commanded.set()

            self.listen(kind, command.topic, take, qos.COMMAND)

    # ---- services

    def reset(self) -> int:
        with self._lock:
            seed = self.parameters["seed"]
            self.sim.reset(seed)
            self._pending.clear()
            self._seed = seed
            self._publish_state(self._stamp(), boundary=True)
        return seed

    def _on_reset(self, request: Any, response: Any) -> Any:
        seed = self.reset()
        self.set_parameters([RosParameter("seed", value=seed + 1)])
        response.success, response.message = True, f"reset with seed {seed}"
        return response

    def _on_step(self, request: Any, response: Any) -> Any:
        if not self._paused:
            response.success, response.message = False, "the simulation runs: pause it with ~/set_pause first"
            return response
        with self._lock:
            while not self._slice():
                pass
        response.success, response.message = True, f"step {self.sim.truth.step}"
        return response

    def _on_pause(self, request: Any, response: Any) -> Any:
        self._paused = bool(request.data)
        response.success, response.message = True, "paused" if self._paused else "running"
        return response

    # ---- physics

    def _stamp(self) -> int:
        return time.time_ns() if self._wall else self._sim_ns

    def _slice(self) -> bool:
        """One slice of physics and what drivers say after it; True at the end of a control step."""
        now = time.monotonic()
        due = [c for c in self._pending if c[0] <= now]
        self._pending = [c for c in self._pending if c[0] > now]
        for _, channel, vector in due:
            self.sim.command(channel, vector)
        timeout = self.parameters["controller_timeout_s"]
        if timeout and now - self._command_at > timeout:
            self.sim.stop()
        boundary = self.sim.advance()
        self._sim_ns += round(self.sim.slice_s * 1e9)
        self._publish_state(self._stamp(), boundary)
        return boundary

    def _run(self) -> None:
        factor = self.parameters["realtime_factor"]
        period = self.sim.slice_s / factor if factor else 0.0
        deadline = time.monotonic()
        patience = self.sim.control_s
        while not self._stop.is_set():
            if self._paused:
                self._stop.wait(0.05)
                deadline = time.monotonic()
                continue
            with self._lock:
                if self._lockstep:  # before the step whose state asks for the next command
                    self._fresh.clear()
                    self._commanded.clear()
                boundary = self._slice()
            if self._lockstep:
                while not boundary:
                    with self._lock:
                        boundary = self._slice()
                # Nobody commands between episodes: then time passes as it does.
                patience = LOCKSTEP_S if self._commanded.wait(patience) else self.sim.control_s
            if not period:
                continue
            deadline += period
            wait = deadline - time.monotonic()
            if wait < -LATE_S:
                self._late += 1
                deadline = time.monotonic()
            elif wait > 0:
                self._stop.wait(wait)

    def _publish_state(self, stamp: int, boundary: bool) -> None:
        self._silent_slices += 1
        if boundary or self._silent_slices >= self._state_every:
            self._silent_slices = 0
            self._publish_measured(stamp)
        if boundary:
            self._publish_task(stamp)
        if self._clock_topic is not None and (boundary or not self._lockstep):  # in lockstep, timers tick on control steps
            self._clock_topic.publish(Clock(clock=conversion.to_stamp(stamp)))

    def _publish_measured(self, stamp: int) -> None:
        """What drivers of the arm measure."""
        fault = self.parameters["fault"]
        joints = self.sim.joints()
        topic = self.robot.feedback.joint_states or names.JOINT_STATES
        if joints and not _silenced(fault, topic):
            values = list(joints.values())
            message = conversion.joint_state(list(joints), stamp, [v[0] for v in values], [v[1] for v in values])
            self._joints.publish(self._perhaps_stale(fault, topic, message))
        pose = self.sim.tool_pose()
        if self._pose is not None and pose is not None and not _silenced(fault, self.robot.feedback.tool_pose):
            message = conversion.pose_message(pose, stamp, self.robot.frames.base)
            self._pose.publish(self._perhaps_stale(fault, self.robot.feedback.tool_pose, message))

    def _publish_task(self, stamp: int) -> None:
        """What perception estimates of the scene, and how the task stands."""
        fault, estimate = self.parameters["fault"], self.sim.estimate()
        for topic, publisher in self._estimates.items():
            if not _silenced(fault, topic):
                publisher.publish(conversion.joint_state(list(estimate), stamp, list(estimate.values())))
        t = self.sim.truth
        state = TaskState(
            env_id=self.sim.env_id, instruction=self.sim.instruction, stamp_ns=stamp, seed=t.seed, step=t.step,
            success=t.success, terminated=t.terminated, truncated=t.truncated, reward=t.reward,
            stage=t.stage or None,
        )  # fmt: skip
        self._task.publish(conversion.records_message([state], stamp, hardware_id=self.robot_id))

    def _perhaps_stale(self, fault: str, topic: str, message: Any) -> Any:
        """Under ``stale:<topic>`` a driver says the same again and again, old stamp and all."""
        if not _fault(fault, "stale", topic):
            self._said.pop(topic, None)
            return message
        return self._said.setdefault(topic, message)

    # ---- cameras

    def _render(self) -> None:
        frozen: dict[str, np.ndarray] = {}
        sizes = {camera: source.size for camera, (source, *_) in self._cameras.items()}
        period = 1.0 / self.parameters["image_hz"]
        deadline = time.monotonic()
        while not self._stop.wait(max(deadline - time.monotonic(), 0.0)):
            deadline += period
            if deadline < time.monotonic():
                self._frames_late += 1
                deadline = time.monotonic()
            if self._paused:
                continue
            fault = self.parameters["fault"]
            with self._lock:
                stamp = self._stamp()
                draw = self.sim.see(sizes)
            for camera, (source, raw, packed, info) in self._cameras.items():
                height, width = source.size
                picture = draw(camera)
                if _fault(fault, "freeze", camera):
                    picture = frozen.setdefault(camera, picture)
                else:
                    frozen.pop(camera, None)
                if _silenced(fault, camera):
                    continue
                if raw is not None:
                    raw.publish(conversion.image_message(picture, stamp, f"{camera}_optical_frame"))
                if packed is not None:
                    packed.publish(conversion.compressed_message(picture, stamp, f"{camera}_optical_frame"))
                fov = field_of_view(self.sim.env, camera)
                info.publish(conversion.camera_info(width, height, fov, stamp, f"{camera}_optical_frame"))

    # ---- figures

    def _check(self) -> tuple[int, str, dict[str, Any]]:
        steps, now = self.sim.truth.step, time.monotonic()
        values = {
            "env": self.sim.env_id, "seed": self._seed, "step": steps, "success": self.sim.truth.success,
            "late_slices": self._late, "late_frames": self._frames_late, "commands_ignored": self._ignored,
        }  # fmt: skip
        before, since = self._rate
        if steps > before and now > since:
            values["realtime_factor"] = (steps - before) * self.sim.control_s / (now - since)
        self._rate = (steps, now)
        late = self._late > 0
        return (WARN if late else OK), ("physics cannot keep up" if late else "running"), values

    def close(self) -> None:
        self._stop.set()
        self._commanded.set()
        for thread in self._threads:
            thread.join(2.0)
        self.sim.close()


def _fault(text: str, kind: str, what: str) -> bool:
    return any(part == f"{kind}:{what}" for part in text.replace(" ", "").split(","))


def _silenced(text: str, topic: str) -> bool:
    return bool(text) and (_fault(text, "stop", topic) or _fault(text, "stop", "all"))


def main(argv: Sequence[str] | None = None) -> int:
    return run(SimNode, argv)


if __name__ == "__main__":
    sys.exit(main())
