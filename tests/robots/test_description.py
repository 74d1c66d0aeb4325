"""Robot descriptions: the shipped ones are good, and a bad one is refused with everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from robot_rl import paths
from robot_rl.config import ConfigError
from robot_rl.robots.description import RobotDescription, load_robot
from robot_rl.robots.validation import warnings
from robot_rl.types import ActionSpec, FeatureSpec

SHIPPED = sorted(p.stem for p in paths.find("configs", "robots").glob("*.yaml"))


def good() -> dict:
    joints = ["a", "b"]
    return {
        "schema": 1,
        "name": "toy",
        "rates": {"control_hz": 20.0, "command_hz": 100.0},
        "observations": {
            "observation.state": [
                {"source": "arm", "topic": "joint_states", "type": "sensor_msgs/msg/JointState", "names": joints, "hz": 100, "max_age_s": 0.05}
            ],
            "observation.images.front": {
                "topic": "front/image_raw", "type": "sensor_msgs/msg/Image", "size": [48, 64], "resize": [24, 32], "hz": 30, "max_age_s": 0.1,
            },
        },
        "commands": [
            {"channel": "arm", "kind": "joint_group_position", "topic": "arm/commands", "names": joints, "action": {"slice": [0, 2]}},
        ],
        "limits": {"joints": {j: {"position": [-1.0, 1.0], "velocity": 1.0, "acceleration": 5.0, "jerk": 50.0} for j in joints}},
    }  # fmt: skip


def load(tmp_path: Path, data: dict) -> RobotDescription:
    file = tmp_path / "robot.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_robot(file)


def findings(tmp_path: Path, data: dict) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, data)
    return {f.key: str(f) for f in caught.value.findings}


def test_a_camera_may_be_cropped(tmp_path):
    data = good()
    front = data["observations"]["observation.images.front"]
    front["crop"] = [0, 8, 48, 48]
    assert load(tmp_path, data).images["observation.images.front"].shape == (24, 32, 3)
    del front["resize"]
    assert load(tmp_path, data).images["observation.images.front"].shape == (48, 48, 3)
    for wrong in ([0, 20, 48, 48], [-1, 0, 10, 10], [0, 0, 4, 48]):
        front["crop"] = wrong
        said = findings(tmp_path, data)["observations.observation.images.front.crop"]
        assert "inside 48x64, at least 8 pixels a side" in said


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_descriptions_are_accepted(name):
    robot = load_robot(name)
    assert robot.name == name
    assert robot.action_spec().dim == robot.action_dim


def test_the_named_robots_are_shipped():
    wanted = {"sim_arm", "franka_ros2_control", "franka_crisp", "ur", "so101", "unitree_joint_state"}
    assert wanted <= set(SHIPPED)


def test_features_are_lerobot_names_and_shapes(tmp_path):
    features = load(tmp_path, good()).features
    assert features["observation.state"] == FeatureSpec((2,), "float32", ("a", "b"))
    assert features["observation.images.front"] == FeatureSpec((24, 32, 3), "uint8")


def test_the_hash_ignores_spelling_and_sees_every_change(tmp_path):
    robot = load(tmp_path, good())
    assert load(tmp_path, dict(reversed(list(good().items())))).hash == robot.hash
    changed = good()
    changed["limits"]["joints"]["a"]["jerk"] = 51.0
    assert load(tmp_path, changed).hash != robot.hash


def test_all_mistakes_come_at_once(tmp_path):
    data = good()
    data["commands"][0]["topic"] = "/arm/commands"
    data["limits"]["joints"].pop("b")
    data["limits"]["joints"]["a"]["position"] = [1.0, -1.0]
    data["observations"]["observation.state"][0]["max_age_s"] = 0.001
    data["rates"]["command_hz"] = 20.0
    data["rates"]["control_hz"] = 50.0
    data["sync"] = {"tolerance_s": 0.5}
    found = findings(tmp_path, data)
    assert "leading slash" in found["commands.0.topic"]
    assert {
        "limits.joints.b", "limits.joints.a.position", "observations.observation.state.0.max_age_s", "rates.command_hz", "sync.tolerance_s",
    } <= set(found)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (lambda d: d.update(colour="red"), "colour", "no such key"),
        (lambda d: d.update(schema=2), "schema", "accepted is 1"),
        (lambda d: d["commands"][0]["action"].update(slice=[1, 3]), "commands", "drive nothing"),
        (lambda d: d["commands"][0].update(kind="joint_group_velocity"), "commands.0.controller_timeout_s", "leave the arm moving"),
        (lambda d: d["commands"][0].update(kind="joint_group_effort", controller_timeout_s=0.1), "limits.joints.a.effort", "largest one"),
        (lambda d: d["limits"].update(tool={"linear_speed": 0.2}), "limits.tool", "kinematics"),
        (lambda d: d["limits"].update(wrench={}), "feedback.wrench", "needs the topic"),
        (lambda d: d["observations"]["observation.state"][0].update(type="std_msgs/msg/Strin"), "observations.observation.state.0.type", "accepted are"),
        (lambda d: d["limits"].update(margin=1.0), "limits.joints.a.margin", "half the range"),
        (lambda d: d.update(home={"arm": [0.0, 2.0]}), "home.arm", "inside its limits"),
        (lambda d: d["commands"].append({**d["commands"][0], "channel": "two", "action": {"slice": [2, 4]}}), "commands.1.topic", "never share"),
    ],
)  # fmt: skip
def test_each_rule_names_key_and_remedy(tmp_path, change, key, words):
    data = good()
    change(data)
    found = findings(tmp_path, data)
    assert words in found[key], found


def test_a_pose_channel_needs_limits_and_a_measured_pose(tmp_path):
    data = good()
    data["commands"] = [
        {
            "channel": "arm",
            "kind": "pose",
            "topic": "target_pose",
            "action": {"slice": [0, 4], "mode": "delta", "layout": "xyz_yaw"},
        }
    ]
    assert {"limits.tool", "feedback.tool_pose"} <= set(findings(tmp_path, data))


def test_what_is_unwise_is_said_and_accepted(tmp_path):
    data = good()
    data["rates"]["command_hz"] = 50.0
    data["observations"]["observation.state"][0]["hz"] = 500
    told = " ".join(warnings(load(tmp_path, data)))
    assert "forward controller" in told
    assert "quarter of a core" in told


def test_a_policy_that_does_not_fit_is_told_why(tmp_path):
    robot = load(tmp_path, good())
    action = ActionSpec((-1.0, -1.0, 0.0), (1.0, 1.0, 1.0))
    features = {
        "observation.state": FeatureSpec((2,), "float32", ("b", "a")),
        "observation.images.wrist": FeatureSpec((24, 32, 3), "uint8"),
    }
    told = " ".join(robot.policy_findings(features, action))
    assert "order matters" in told
    assert "observation.images.wrist" in told
    assert "3 dimensions" in told


def test_an_unknown_robot_lists_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match="sim_arm"):
        load_robot("no_such_robot")
