"""Actions to channel vectors and back: what is executed is what was meant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robot_rl.robots import rotations as rot
from robot_rl.robots.channels import Channel
from robot_rl.robots.description import ActionMap, Box, Command, Leash, ToolLimits

VECTOR = st.lists(st.floats(-2.0, 2.0), min_size=3, max_size=3).map(np.array)


@given(VECTOR)
def test_rotation_vectors_come_back(v):
    q = rot.from_rotvec(v)
    assert np.allclose(rot.to_rotvec(q), v if np.linalg.norm(v) <= np.pi else rot.to_rotvec(q), atol=1e-9)
    assert np.allclose(rot.to_matrix(rot.from_matrix(rot.to_matrix(q))), rot.to_matrix(q), atol=1e-9)
    assert np.allclose(rot.to_matrix(rot.from_rot6d(rot.to_rot6d(q))), rot.to_matrix(q), atol=1e-9)


@given(VECTOR, VECTOR)
def test_multiplying_quaternions_is_multiplying_matrices(a, b):
    p, q = rot.from_rotvec(a), rot.from_rotvec(b)
    assert np.allclose(rot.to_matrix(rot.multiply(p, q)), rot.to_matrix(p) @ rot.to_matrix(q), atol=1e-9)


def pose_channel(layout: str, mode: str, **more) -> Channel:
    width = {"xyz": 3, "xyz_yaw": 4, "xyz_rotvec": 6, "xyz_quat": 7, "xyz_rot6d": 9}[layout]
    tool = more.pop("tool", None)
    action = ActionMap(slice=(0, width), mode=mode, layout=layout, **more)  # type: ignore[arg-type]
    return Channel(Command(channel="arm", kind="pose", topic="t", action=action), 20.0, tool)


START = np.array([0.4, 0.1, 0.3, *rot.from_rotvec(np.array([0.3, -0.2, 0.9]))])


@pytest.mark.parametrize("layout", ["xyz", "xyz_yaw", "xyz_rotvec"])
def test_a_delta_that_was_executed_reads_back_as_itself(layout):
    c = pose_channel(layout, "delta")
    action = np.array([0.01, -0.02, 0.005, 0.1, -0.05, 0.2])[: c.action.width]
    if layout == "xyz_yaw":
        action[3] = 0.15
    target = c.target(action, START)
    back = c.executed_action(target, START)
    assert back is not None
    assert np.allclose(back, action, atol=1e-9)


@pytest.mark.parametrize("layout", ["xyz_rotvec", "xyz_quat", "xyz_rot6d"])
def test_absolute_poses_read_back_as_the_same_pose(layout):
    c = pose_channel(layout, "absolute")
    values = c.executed_action(START, None)
    assert values is not None
    assert np.allclose(rot.to_matrix(c.target(values, START)[3:]), rot.to_matrix(START[3:]), atol=1e-9)


def test_a_quaternion_keeps_the_sign_of_the_one_before():
    c = pose_channel("xyz_quat", "absolute")
    flipped = np.concatenate([START[:3], -START[3:]])
    assert np.allclose(c.target(flipped, START), START)


def test_a_leash_keeps_the_target_near_the_measured_pose():
    c = pose_channel("xyz_yaw", "delta", leash=Leash(0.05, 0.3))
    target = START
    for _ in range(20):
        target = c.target(np.array([0.02, 0.0, 0.0, 0.1]), target, START)
    assert target[0] - START[0] == pytest.approx(0.05)
    assert c.distance(target, START)[1] == pytest.approx(0.3, abs=1e-6)


def test_pushing_against_the_box_does_not_wind_up():
    tool = ToolLimits(workspace=Box(min=(0.0, 0.0, 0.0), max=(0.5, 0.5, 0.5)), margin=0.0)
    c = pose_channel("xyz", "delta", tool=tool)
    target = START
    for _ in range(30):
        target = c.target(np.array([0.02, 0.0, 0.0]), target)
    assert target[0] == 0.5
    assert c.target(np.array([-0.02, 0.0, 0.0]), target)[0] == pytest.approx(0.48)


def test_a_twist_of_deltas_covers_the_delta_in_one_step():
    command = Command(channel="arm", kind="twist", topic="t", action=ActionMap(slice=(1, 5), mode="delta", layout="xyz_yaw"))
    c = Channel(command, 20.0)
    vector = c.target(np.array([9.0, 0.01, 0.0, -0.02, 0.1]), None)
    assert np.allclose(vector, [0.2, 0.0, -0.4, 0.0, 0.0, 2.0])
    assert np.allclose(c.executed_action(vector, None), [0.01, 0.0, -0.02, 0.1])
    assert np.array_equal(c.held(vector), np.zeros(6))


def test_grippers_are_never_interpolated():
    command = Command(
        channel="arm", kind="joint_group_position", topic="t", names=("a", "g"), action=ActionMap(slice=(0, 2), gripper=("g",))
    )
    half = Channel(command, 20.0).between(np.array([0.0, 0.0]), np.array([1.0, 1.0]), 0.5)
    assert half.tolist() == [0.5, 1.0]


def test_a_delta_without_a_reference_is_an_error():
    with pytest.raises(ValueError, match="last executed"):
        pose_channel("xyz", "delta").target(np.zeros(3), None)
