"""LeRobot teleoperators through their own API: what they say reaches the device as it was meant, and nothing is made up."""

from __future__ import annotations

import math
import time

import pytest

from robot_rl.intervention.lerobot_devices import JointMap, LeRobotConfig, LeRobotReader, make_teleoperator
from robot_rl.intervention.teleop import Gamepad, Leader


class Teleoperator:
    """What LeRobot's base class asks for, as far as it is used."""

    def __init__(self, action, events=None):
        self.action, self.connected, self.reads = action, False, 0
        if events is not None:
            self.events = events
            self.get_teleop_events = lambda: dict(self.events)

    def connect(self, calibrate=True):
        self.connected = True

    def disconnect(self):
        self.connected = False

    def get_action(self):
        self.reads += 1
        if isinstance(self.action, Exception):
            raise self.action
        return dict(self.action)


LEADER = LeRobotConfig("so101_leader", joints={"pan": JointMap("shoulder_pan.pos", math.pi / 180), "lift": JointMap("shoulder_lift.pos", -math.pi / 180, 0.5)})  # fmt: skip
ARM = {"shoulder_pan.pos": 90.0, "shoulder_lift.pos": 180.0}
PAD = LeRobotConfig("gamepad", axes={"delta_x": "x", "delta_y": "y", "delta_z": "z"})
DELTAS = {"delta_x": 1.0, "delta_y": 0.0, "delta_z": -0.5}


def wait(condition):
    until = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_leader_gives_joints_in_the_robots_units():
    arm, device = Teleoperator(ARM, {"is_intervention": False}), Leader()
    reader = LeRobotReader(LEADER, device, arm, rate_hz=200.0)
    try:
        now = time.monotonic_ns()
        reading = device.poll(now)
        assert reading.joints == pytest.approx({"pan": math.pi / 2, "lift": 0.5 - math.pi})
        assert not reading.engaged
        arm.events = {"is_intervention": True}
        wait(lambda: device.toggled)
        assert device.poll(time.monotonic_ns()).engaged
        arm.action = ConnectionError("unplugged")
        wait(lambda: reader.problem)
        assert reader.problem == "ConnectionError: unplugged"
        time.sleep(0.2)
        assert not device.poll(time.monotonic_ns()).engaged, "a silent leader does not drive"
        arm.action = ARM
        wait(lambda: not reader.problem)
    finally:
        reader.close()
    assert not arm.connected


def test_a_gamepad_gives_a_twist_while_it_intervenes():
    pad, device = (
        Teleoperator({**DELTAS, "gripper": 2.0}, {"is_intervention": True, "success": False, "failure": False}),
        Gamepad(axes=range(6)),
    )
    reader = LeRobotReader(PAD, device, pad, rate_hz=200.0)
    try:
        reading = device.poll(time.monotonic_ns())
        assert reading.engaged
        assert reading.twist[0] == 1.0
        assert reading.twist[2] < -0.4
        assert reading.gripper_open is True
        pad.events = {"is_intervention": False, "success": True}
        wait(lambda: "success" in device.poll(time.monotonic_ns()).presses)
        assert not device.poll(time.monotonic_ns()).engaged
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("action", "what"),
    [
        ({"shoulder_pan.pos": 1.0}, "gives no shoulder_lift.pos"),
        ({**ARM, "elbow_flex.pos": 0.0}, "gives elbow_flex.pos too"),
        ({**ARM, "shoulder_pan.pos": float("nan")}, "finite"),
    ],
)
def test_what_is_not_configured_is_an_error_and_never_zero(action, what):
    arm = Teleoperator(action)
    with pytest.raises(ValueError, match=what):
        LeRobotReader(LEADER, Leader(), arm)
    assert not arm.connected


def test_configurations(tmp_path):
    path = tmp_path / "arm.yaml"
    path.write_text(
        "type: so101_leader\noptions: {port: /dev/ttyACM0}\njoints: {pan: {key: shoulder_pan.pos, scale: 0.01745}}\n"
    )
    found = LeRobotConfig.load(path)
    assert found.joints == {"pan": JointMap("shoulder_pan.pos", 0.01745)}
    for text, what in (
        ("type: x", "either joints"),
        ("type: x\naxes: {a: sideways}", "sideways"),
        ("type: x\nport: 3\naxes: {a: x}", "unknown keys port"),
        ("type: x\njoints: {a: {key: b, gain: 2}}", "accepted are key, scale, offset"),
        ("type: x\njoints: {a: {key: b, scale: 0}}", "scale not 0"),
        ("- 3", "a mapping with type"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=what):
            LeRobotConfig.load(path)
    with pytest.raises(ValueError, match="joints are a leader's"):
        LeRobotReader(PAD, Leader(), Teleoperator(DELTAS))


@pytest.mark.slow
def test_lerobots_own_leader_is_found_and_its_keys_are_ours():
    pytest.importorskip("lerobot", reason="pip install lerobot")
    names = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
    config = LeRobotConfig("so101_leader", {"port": "/dev/none"}, {n: JointMap(f"{n}.pos") for n in names})
    with pytest.raises(ValueError, match="no_such_arm"):
        make_teleoperator(LeRobotConfig("no_such_arm", joints={"a": JointMap("a.pos")}))
    try:
        made = make_teleoperator(config)
    except ImportError as error:  # the motors' drivers are extras of LeRobot
        pytest.skip(f"LeRobot's feetech driver is not installed: {error}")
    assert set(made.action_features) == config.keys
