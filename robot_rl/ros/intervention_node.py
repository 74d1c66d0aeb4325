"""``intervention_node``: devices to take-over requests, operator commands, human verdicts and the e-stop.

No lifecycle: taking over must not depend on a transition. It never commands the robot; what a person wants goes out on
``operator/*`` with the limits still ahead of it (policy_node's arbiter, or the guard when that one is silent).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TwistStamped
from sensor_msgs.msg import JointState, Joy
from std_msgs.msg import Bool, Float64
from std_srvs.srv import SetBool

from robot_rl.intervention.devices import align_step, joint_gap
from robot_rl.intervention.lerobot_devices import LeRobotConfig, LeRobotReader
from robot_rl.intervention.recorded import Tape, TapePlayer
from robot_rl.intervention.teleop import Buttons, Gamepad, Keyboard, Leader, Reading, SpaceMouse, TeleopDevice, TerminalReader
from robot_rl.replay.ulid import new_ulid
from robot_rl.robots.channels import Channel, channels_of
from robot_rl.robots.description import load_robot
from robot_rl.ros import qos
from robot_rl.ros.base import OK, WARN, PlainNode, run
from robot_rl.ros.commands import Hop
from robot_rl.ros.conversion import from_stamp, joint_state, read_records, records_message
from robot_rl.ros.graph_names import CONSOLE_JOY, INTERVENTION_NODE, JOY, LEADER, LEADER_COMMAND, SPACENAV
from robot_rl.ros.names import (
    END_EPISODE,
    EPISODE_STATUS,
    ESTOP,
    EXECUTED,
    JOINT_STATES,
    OPERATOR_ACTION,
    OPERATOR_STATE,
    REWARD_EVENTS,
    REWARD_VALUE,
)
from robot_rl.ros.synchroniser import Feedback
from robot_rl.wire import EpisodeStatus, OperatorState, StepReward

JOY_TOPICS = {"joy": JOY, "console": CONSOLE_JOY, "replay": "replay/joy"}


class InterventionNode(PlainNode):
    """See the module."""

    def __init__(self, **options: Any) -> None:
        super().__init__(INTERVENTION_NODE, **options)
        p = self.parameters
        p.check()
        self.robot = load_robot(p["robot"])
        self.channels = channels_of(self.robot)
        self._hops = {c.name: Hop(c.command, self.robot) for c in self.channels}
        self._feedback = Feedback(self, self.robot, time.monotonic_ns)
        self._executed: dict[str, np.ndarray] = {}
        self._outputs = {
            c.name: self.create_publisher(self._hops[c.name].type, f"{OPERATOR_ACTION}/{c.name}", qos.COMMAND)
            for c in self.channels
        }
        for c in self.channels:
            self.listen(self._hops[c.name].type, f"{EXECUTED}/{c.name}", self._executed_reader(c), qos.LATEST)
        self._state = self.create_publisher(DiagnosticArray, OPERATOR_STATE, qos.COMMAND)
        self._rewards = self.create_publisher(DiagnosticArray, REWARD_EVENTS, qos.EVENT)
        self._values = self.create_publisher(Float64, REWARD_VALUE, qos.EVENT)
        self._estop = self.create_publisher(Bool, ESTOP, qos.STATE)
        self._leader_command = self.create_publisher(JointState, LEADER_COMMAND, qos.COMMAND)
        self.listen(DiagnosticArray, EPISODE_STATUS, self._on_episode, qos.STATE)
        self.listen(JointState, JOINT_STATES, self._on_joints, qos.SENSOR)
        self.create_service(SetBool, "~/engage", self._on_engage)
        self._end = self.create_client(SetBool, END_EPISODE)
        self._joints: dict[str, float] = {}
        self._episode: EpisodeStatus | None = None
        self._sequence = 0
        self._refused = 0
        self._aligning_since = 0
        self._reader: TerminalReader | None = None
        self._warned_slow = False
        self._lerobot: LeRobotReader | None = None
        self._player: TapePlayer | None = None
        self._lerobot_config = LeRobotConfig.load(p["lerobot"]) if p["lerobot"] else None
        self.devices = [self._device(name) for name in (p["devices"] or ("joy",))]
        if self._lerobot_config is not None and self._lerobot is None:
            wanted = "leader" if self._lerobot_config.joints else "joy"
            raise ValueError(f"lerobot={p['lerobot']!r} stands in for {wanted!r}: accepted with devices that name it")
        if p["replay_bag"] and self._player is None:
            raise ValueError(f"replay_bag={p['replay_bag']!r}: accepted with the device replay")
        self._check_devices()
        self.create_timer(1.0 / p["rate_hz"], self._tick)
        self.add_check("devices", self._check)

    # ---- devices

    def _device(self, name: str) -> TeleopDevice:
        p = self.parameters
        common = {"deadband": p["deadband"], "latch_s": p["latch_s"]}
        if name == "console":  # the page says x, y, z, roll, pitch, yaw, whatever pad is configured beside it
            page = Gamepad(name, axes=range(6), **common)

            def on_page(message: Joy) -> None:
                if page.feed(message.axes, message.buttons, time.monotonic_ns(), from_stamp(message.header.stamp)):
                    self._tick()  # a press must not wait for the timer

            self.listen(Joy, CONSOLE_JOY, on_page, qos.LATEST)
            return page
        if self._lerobot_config is not None and name == ("leader" if self._lerobot_config.joints else "joy"):
            driven = Leader(**common) if name == "leader" else Gamepad(name, axes=range(6), **common)
            self._lerobot = LeRobotReader(self._lerobot_config, driven)
            return driven
        if name == "replay" and p["replay_bag"]:
            recorded = Gamepad(name, self._buttons(), **common)
            self._player = TapePlayer(Tape.read(p["replay_bag"], p["replay_topic"]), recorded)
            return recorded
        if name in JOY_TOPICS:
            pad = Gamepad(name, self._buttons(), **common)

            def on_joy(message: Joy) -> None:
                pad.buttons = self._buttons()
                if pad.feed(message.axes, message.buttons, time.monotonic_ns(), from_stamp(message.header.stamp)):
                    self._tick()

            self.listen(Joy, JOY_TOPICS[name], on_joy, qos.LATEST)
            return pad
        if name == "spacemouse":
            mouse = SpaceMouse(**common)

            def on_twist(message: TwistStamped) -> None:
                v = message.twist
                values = (v.linear.x, v.linear.y, v.linear.z, v.angular.x, v.angular.y, v.angular.z)
                mouse.feed(values, time.monotonic_ns(), from_stamp(message.header.stamp))

            self.listen(TwistStamped, SPACENAV, on_twist, qos.LATEST)
            return mouse
        if name == "leader":
            leader = Leader(**common)

            def on_leader(message: JointState) -> None:
                joints = dict(zip(message.name, message.position, strict=True))
                leader.feed(joints, time.monotonic_ns(), from_stamp(message.header.stamp))

            self.listen(JointState, LEADER, on_leader, qos.LATEST)
            return leader
        keyboard = Keyboard(**common)
        self._reader = TerminalReader(keyboard)
        return keyboard

    def _buttons(self) -> Buttons:
        p = self.parameters
        return Buttons(p["deadman_button"], p["success_button"], p["failure_button"], p["estop_button"], p["gripper_button"])

    def _check_devices(self) -> None:
        """Raises ValueError for a device that cannot drive this robot."""
        cartesian = any(c.command.is_cartesian for c in self.channels)
        for device in self.devices:
            if device.name == "leader" and all(c.command.is_cartesian for c in self.channels):
                raise ValueError(
                    f"devices=['leader']: robot {self.robot.name!r} has no joint channels; accepted are joy, spacemouse, keyboard"
                )
            if device.name in ("joy", "spacemouse", "keyboard", "console") and not cartesian:
                self.report_problem(
                    f"device {device.name}",
                    f"{device.name} drives pose and twist channels, and robot {self.robot.name!r} has none: only its buttons work",
                )

    # ---- callbacks

    def _executed_reader(self, channel: Channel) -> Any:
        hop = self._hops[channel.name]

        def read(message: Any) -> None:
            self._executed[channel.name] = hop.read(message)[0]

        return read

    def _on_joints(self, message: JointState) -> None:
        self._joints = dict(zip(message.name, message.position, strict=False))

    def _on_episode(self, message: DiagnosticArray) -> None:
        for status in read_records(message, EpisodeStatus):
            before, self._episode = self._episode, status
            if self._player is None:
                continue
            if status.state == "running" and (before is None or before.episode_id != status.episode_id):
                self._player.start(time.monotonic_ns())
            elif status.state not in ("running", "paused"):
                self._player.stop(time.monotonic_ns())

    def _on_engage(self, request: Any, response: Any) -> Any:
        for device in self.devices:
            if isinstance(device, Leader):
                gap = self._gap(device.poll(time.monotonic_ns()))
                limit = self.parameters["align_max_gap"]
                if request.data and (gap is None or gap[0] > limit):
                    self._refused += 1
                    response.success = False
                    response.message = (
                        "the leader or the robot is silent" if gap is None
                        else f"{gap[1]} is {gap[0]:.3f} rad away; accepted are at most {limit:.3f}: the leader is driven there, try again"
                    )  # fmt: skip
                    self._aligning_since = time.monotonic_ns()
                    return response
                device.toggled = bool(request.data)
            elif isinstance(device, Keyboard):
                device.on = bool(request.data)
        toggles = [d.name for d in self.devices if isinstance(d, (Leader, Keyboard))]
        response.success = bool(toggles)
        response.message = (
            ("engaged" if request.data else "released") if toggles else "no toggle device: hold the button, or move"
        )
        return response

    def _gap(self, reading: Reading) -> tuple[float, str] | None:
        names = [n for c in self.channels if not c.command.is_cartesian and not c.command.is_gripper for n in c.command.names]
        follower = {n: self._joints[n] for n in names if n in self._joints}
        if reading.joints is None or not follower:
            return None
        return joint_gap(reading.joints, follower)

    # ---- the tick

    def _tick(self) -> None:
        now, stamp = time.monotonic_ns(), self.now_ns()
        records = []
        driving: tuple[TeleopDevice, Reading] | None = None
        if self._player is not None:
            self._player.feed(now)
        for device in self.devices:
            reading = device.poll(now)
            self._presses(reading, stamp)
            aligned = None
            if isinstance(device, Leader):
                gap = self._gap(reading)
                aligned = gap is not None and gap[0] <= self.parameters["align_max_gap"]
                self._align(device, reading, now)
            takeover = reading.engaged and (aligned is not False)
            if takeover and driving is None:
                driving = device, reading
            age = (now - reading.received_ns) / 1e6 if reading.received_ns else -1.0
            self._sequence += 1
            records.append(
                OperatorState(
                    device.name,
                    self.parameters["operator"],
                    self._sequence,
                    reading.engaged,
                    reading.deadman,
                    takeover,
                    aligned,
                    age,
                )
            )
            if device.meter.slow and device.profile.deadman and not self._warned_slow:
                self._warned_slow = True
                self.get_logger().warning(
                    f"{device.name} sends {device.meter.hz:.0f} messages a second, fewer than 30: silence counts as a release after "
                    "0.15 s instead of 0.10 s; set its autorepeat to 50 Hz"
                )
        if driving is not None:
            self._drive(*driving, stamp)
        self._state.publish(records_message(records, stamp, hardware_id=self.robot_id))

    def _drive(self, device: TeleopDevice, reading: Reading, stamp: int) -> None:
        for channel in self.channels:
            reference = self._executed.get(channel.name)
            measured = self._feedback.measured(channel)
            if reference is None:
                reference = measured
            vector = self._vector(channel, reading, reference, measured)
            if vector is not None and np.isfinite(vector).all():
                self._outputs[channel.name].publish(self._hops[channel.name].message(vector, stamp))

    def _vector(
        self, channel: Channel, reading: Reading, reference: np.ndarray | None, measured: np.ndarray | None
    ) -> np.ndarray | None:
        """The channel vector the person wants; None where this device says nothing about the channel."""
        command, p = channel.command, self.parameters
        if command.is_gripper and command.action.open is not None and command.action.closed is not None:
            if reading.gripper_open is None:
                return reference
            return np.array([command.action.open if reading.gripper_open else command.action.closed])
        if reading.joints is not None and not command.is_cartesian:
            missing = [n for n in command.names if n not in reading.joints]
            if missing:
                raise ValueError(f"leader lacks joints {missing}; it has {sorted(reading.joints)}")
            return np.array([reading.joints[n] for n in command.names])
        if reading.twist is None:
            return reference
        twist = reading.twist * np.array([p["linear_speed"]] * 3 + [p["angular_speed"]] * 3)
        if command.kind == "twist":
            return twist
        if command.kind != "pose" or reference is None:
            return reference if not command.is_cartesian else None
        from robot_rl.robots import rotations as rot

        period = 1.0 / self.robot.rates.control_hz
        out = np.array(reference, np.float64)
        out[:3] += twist[:3] * period
        turn = twist[3:] * period
        if command.action.layout == "xyz_yaw":
            turn = np.array([0.0, 0.0, turn[2]])
        elif command.action.layout == "xyz":
            turn = np.zeros(3)
        out[3:] = rot.same_sign(rot.multiply(rot.from_rotvec(turn), out[3:]), out[3:])
        return out

    def _align(self, leader: Leader, reading: Reading, now: int) -> None:
        """Drive an actuated leader towards the robot, one increment a tick, after a refused engagement."""
        p = self.parameters
        left = p["align_s"] - (now - self._aligning_since) / 1e9 if self._aligning_since else 0.0
        if left <= 0.0 or reading.joints is None or leader.toggled:
            return
        follower = {n: v for n, v in self._joints.items() if n in reading.joints}
        if follower:
            step = align_step(reading.joints, follower, left, 1.0 / p["rate_hz"])
            self._leader_command.publish(joint_state(tuple(step), self.now_ns(), position=list(step.values())))

    def _presses(self, reading: Reading, stamp: int) -> None:
        for word in reading.presses:
            if word == "estop":
                self._estop.publish(Bool(data=True))
                self.get_logger().error("e-stop pressed")
                continue
            if word in ("success", "failure"):
                self._verdict(word == "success", stamp)

    def _verdict(self, success: bool, stamp: int) -> None:
        """A running episode ends with it; an episode that has ended gets it as its label."""
        episode = self._episode
        if episode is None or episode.state not in ("running", "paused", "ended", "committed"):
            return
        if episode.state in ("running", "paused") and self._end.service_is_ready():
            self._end.call_async(SetBool.Request(data=success))  # never awaited
        elif episode.state in ("ended", "committed"):
            reward = StepReward(
                source="label", episode_id=episode.episode_id, event_id=new_ulid(), step=max(episode.step, 1), stamp_ns=0,
                kind="success", value=float(success), valid=True, recorded=False, model_id=f"human:{self.parameters['operator']}",
            )  # fmt: skip
            self._rewards.publish(records_message([reward], stamp, hardware_id=self.robot_id))
        self._values.publish(Float64(data=float(success)))

    def _check(self) -> tuple[int, str, dict[str, Any]]:
        now, level = time.monotonic_ns(), OK
        values: dict[str, Any] = {"refused_engagements": self._refused}
        absent = []
        for device in self.devices:
            present = device.present(now) or isinstance(device, Keyboard)
            if not present:
                absent.append(device.name)
            values |= {
                f"{device.name}.present": present,
                f"{device.name}.hz": device.meter.hz,
                f"{device.name}.stale_s": device.meter.stale_s,
            }
            if isinstance(device, SpaceMouse) and present and not device.ever_moved:
                absent.append(f"{device.name} (only zeros: move it once)")
            if device.meter.slow:
                level = WARN
        if self._lerobot is not None and self._lerobot.problem:
            return WARN, f"lerobot: {self._lerobot.problem}", values
        if absent:
            return WARN, f"silent: {', '.join(absent)}", values
        return level, "ok", values

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._lerobot is not None:
            self._lerobot.close()


def main(argv: list[str] | None = None) -> int:
    return run(InterventionNode, argv)


if __name__ == "__main__":
    raise SystemExit(main())
