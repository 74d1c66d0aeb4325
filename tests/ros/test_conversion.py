"""Messages to values and back, and observations made of topics."""

from __future__ import annotations

import time
from array import array
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")

from rclpy.executors import SingleThreadedExecutor
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import Image, JointState

from robot_rl.replay.importers import mcap_messages
from robot_rl.robots.description import ActionMap, Command, load_robot
from robot_rl.robots.pictures import shown
from robot_rl.ros import conversion, qos
from robot_rl.ros.commands import Hop, MissingMessagePackage, controller_type, read_controller, sink_for
from robot_rl.ros.synchroniser import Synchroniser
from robot_rl.wire import GuardState, StepReward, WireError

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_records_survive_dds_serialisation():
    records = [
        StepReward("human", "e", f"id{i}", i, 5, "success", float(np.nextafter(1, i)), True, False, confidence=0.1)
        for i in range(256)
    ]
    message = conversion.records_message(records, 123_456_789_012)
    back = deserialize_message(serialize_message(message), type(message))
    assert conversion.from_stamp(back.header.stamp) == 123_456_789_012
    assert conversion.read_records(back, StepReward) == records
    assert conversion.read_records(back, GuardState) == []
    back.status.append(back.status[0])
    with pytest.raises(WireError, match="257 statuses"):
        conversion.read_records(back, StepReward)


def test_joints_are_matched_by_name():
    read = conversion.JointReader(["b", "a"])
    assert read(conversion.joint_state(["a", "b", "c"], 0, [1.0, 2.0, 3.0])).tolist() == [2.0, 1.0]
    assert read(conversion.joint_state(["c", "b", "a"], 0, [3.0, 2.0, 1.0])).tolist() == [2.0, 1.0]
    with pytest.raises(WireError, match="joint 'a' is not in the message"):
        read(conversion.joint_state(["b"], 0, [1.0]))
    with pytest.raises(WireError, match="values for"):
        read(JointState(name=["a", "b"], position=[1.0]))


def test_pictures_come_back_and_row_padding_is_respected():
    assert np.array_equal(conversion.read_image(conversion.image_message(PICTURE, 0, "f")), PICTURE)
    padded = np.zeros((48, 64 * 3 + 7), np.uint8)
    padded[:, : 64 * 3] = PICTURE[..., ::-1].reshape(48, -1)
    message = Image(height=48, width=64, encoding="bgr8", step=64 * 3 + 7, data=array("B", padded.tobytes()))
    assert np.array_equal(conversion.read_image(message), PICTURE)
    depth = np.arange(48 * 64, dtype="<u2").reshape(48, 64)
    message = Image(height=48, width=64, encoding="16UC1", step=128, data=array("B", depth.tobytes()))
    assert conversion.read_image(message)[47, 63, 0] == 3071 * 255 // 5000


@pytest.mark.parametrize(
    "wrong",
    [{"encoding": "yuv422"}, {"height": 480}, {"step": 5}, {"height": 10**9, "width": 10**9}, {"width": 0}],
    ids=lambda w: str(w),
)
def test_impossible_pictures_are_refused(wrong):
    message = conversion.image_message(PICTURE, 0, "f")
    for key, value in wrong.items():
        setattr(message, key, value)
    with pytest.raises(WireError):
        conversion.read_image(message)


def test_jpeg_is_nearly_the_picture_and_garbage_is_refused():
    smooth = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], 48, 0).repeat(3, 2)
    message = conversion.compressed_message(smooth, 0, "f")
    assert np.abs(conversion.read_compressed(message, (48, 64)).astype(int) - smooth).mean() < 2
    with pytest.raises(WireError, match="accepted is 640x480"):
        conversion.read_compressed(message, (480, 640))
    message.data = array("B", b"\xff\xd8" + bytes(1000))
    with pytest.raises(WireError):
        conversion.read_compressed(message, (48, 64))


@pytest.mark.parametrize("name", ["sim_arm", "sim_arm_joints", "ur", "so101", "unitree_joint_state", "franka_crisp"])
def test_commands_survive_the_hop_and_the_controllers_see_them(node, name):
    robot = load_robot(name)
    rng = np.random.default_rng(1)
    for command in robot.commands:
        hop = Hop(command, robot)
        vector = rng.uniform(0.0, 0.04, {"pose": 7, "twist": 6}.get(command.kind, len(command.names)))
        if command.kind == "pose":
            vector[3:] /= np.linalg.norm(vector[3:])
        back, stamp = hop.read(hop.message(vector, 12_345))
        assert np.array_equal(back, vector)
        assert stamp == 12_345
        heard: list[object] = []
        subscription = node.create_subscription(controller_type(command), command.topic, heard.append, qos.COMMAND)
        sink = sink_for(node, command, robot)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        until = time.monotonic() + 20
        while not heard and time.monotonic() < until:
            sink.send(vector, 12_345)
            executor.spin_once(timeout_sec=0.05)
        assert np.allclose(read_controller(command, robot)(heard[0]), vector)
        if controller_type(command).__name__ == "JointTrajectory":
            assert all(p.time_from_start.sec + p.time_from_start.nanosec > 0 for p in heard[0].points)
        executor.remove_node(node)
        sink.close()
        node.destroy_subscription(subscription)


def test_a_frame_that_is_not_the_robots_is_refused():
    robot = load_robot("sim_arm")
    hop = Hop(robot.commands[0], robot)
    message = hop.message(np.array([0.0, 0, 0, 0, 0, 0, 1]), 1)
    message.header.frame_id = "camera"
    with pytest.raises(WireError, match="accepted is 'base'"):
        hop.read(message)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e12])
def test_numbers_that_nobody_commands_are_refused_where_no_guard_looks(bad):
    robot = load_robot("sim_arm")
    arm, gripper = (Hop(c, robot) for c in robot.commands)
    good = np.array([0.1, 0, 0.2, 0, 0, 0, 1])
    vector, stamp = arm.read_plausible(arm.message(good, 5))
    assert np.array_equal(vector, good)
    assert stamp == 5
    with pytest.raises(WireError, match="accepted are numbers up to 1000"):
        arm.read_plausible(arm.message(np.array([bad, 0, 0, 0, 0, 0, 1]), 1))
    with pytest.raises(WireError, match="accepted are numbers up to 1000"):
        gripper.read_plausible(gripper.message(np.array([bad]), 1))
    with pytest.raises(WireError, match="quaternions of length 1"):
        arm.read_plausible(arm.message(np.zeros(7), 1))


def test_a_gripper_action_without_its_package_names_the_remedy(node):
    pytest.importorskip("rclpy")
    try:
        import control_msgs  # noqa: F401
    except ImportError:
        action = ActionMap(slice=(0, 1), open=0.04, closed=0.0)
        command = Command(channel="gripper", kind="gripper_action", topic="g", names=("f",), action=action)
        with pytest.raises(MissingMessagePackage, match="ros-jazzy-control-msgs"):
            sink_for(node, command, load_robot("sim_arm"))


class Feed:
    """Messages straight into a synchroniser's streams, at times of the test's choosing."""

    def __init__(self, node, robot) -> None:
        self.now = 100_000_000_000
        self.sync = Synchroniser(node, robot, lambda: self.now)

    def give(self, topic: str, message, stamp: int, arrived: int | None = None) -> None:
        message.header.stamp = conversion.to_stamp(stamp)
        self.sync.streams[topic].add(message, stamp if arrived is None else arrived, self.now if arrived is None else arrived)


@pytest.fixture
def feed(node):
    robot = load_robot("ur")
    made = Feed(node, robot)
    yield made
    made.sync.close()


MS = 1_000_000


def fill(feed: Feed, skew: int = 0) -> None:
    t = feed.now
    arm = feed.sync.robot.joints
    for k in range(5):
        feed.give("joint_states", conversion.joint_state(arm, 0, [float(k)] * 6), t - 40 * MS + 10 * MS * k)
        feed.give("gripper/joint_states", conversion.joint_state(["finger_joint"], 0, [k / 10]), t - 40 * MS + 10 * MS * k)
    picture = np.zeros((480, 640, 3), np.uint8)
    feed.give("front/image_raw", conversion.image_message(picture, 0, "f"), t - 20 * MS)
    feed.give("wrist/image_raw/compressed", conversion.compressed_message(picture, 0, "w"), t - 20 * MS + skew)


def test_states_are_those_of_the_pictures_moment(feed):
    assert feed.sync.snapshot().observation is None
    fill(feed, skew=5 * MS)
    snapshot = feed.sync.snapshot()
    assert not snapshot.problems
    assert snapshot.skew_ns == 5 * MS
    assert snapshot.observation is not None
    assert snapshot.observation["observation.state"].tolist() == pytest.approx([2.0] * 6 + [0.2])
    assert snapshot.observation["observation.images.front"].shape == (224, 224, 3)
    assert snapshot.stamp_ns == feed.now - 20 * MS


def test_a_bag_and_the_node_show_the_policy_the_same_pixels(node):
    """What training reads of a bag is, to the bit, what the node reads of the topics that it recorded."""
    robot = load_robot("ur")
    front = replace(robot.observations["observation.images.front"], crop=(0, 80, 480, 480))
    robot = replace(robot, observations={**robot.observations, "observation.images.front": front})
    feed = Feed(node, robot)
    fill(feed)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 480, 640, 3), dtype=np.uint8)
    messages = {
        "front": conversion.image_message(pictures[0], 0, "f"), "wrist": conversion.compressed_message(pictures[1], 0, "w"),
    }  # fmt: skip
    feed.give("front/image_raw", messages["front"], feed.now - 10 * MS)
    feed.give("wrist/image_raw/compressed", messages["wrist"], feed.now - 10 * MS)
    seen = feed.sync.snapshot().observation
    feed.sync.close()
    assert seen is not None
    for camera, message in messages.items():
        name = f"observation.images.{camera}"
        source = robot.observations[name]
        read = deserialize_message(serialize_message(message), type(message))
        np.testing.assert_array_equal(seen[name], shown(mcap_messages.picture(read), source.crop, source.shown_size))
    cut = pictures[0][:, 80:560]
    assert abs(seen["observation.images.front"].mean() - cut.mean()) < 0.5
    left = shown(np.tile(np.arange(640) < 80, (480, 1))[..., None].repeat(3, 2).astype(np.uint8) * 255, front.crop, (224, 224))
    assert not left.any(), "nothing of what was cut off is seen"


def test_pictures_too_far_apart_are_no_set(feed):
    fill(feed, skew=19 * MS)
    assert "no set of pictures within 16.7 ms" in " ".join(feed.sync.snapshot().problems)


def test_each_stale_source_is_named(feed):
    fill(feed)
    feed.now += 60 * MS
    problems = " ".join(feed.sync.snapshot().problems)
    assert "joint_states is 60 ms old (accepted 50 ms)" in problems
    assert "front" not in problems
    feed.now += 60 * MS
    assert "front/image_raw" in " ".join(feed.sync.snapshot().problems)


def test_a_frozen_camera_is_found(feed):
    fill(feed)
    picture = np.zeros((480, 640, 3), np.uint8)
    feed.sync.snapshot()
    for _ in range(40):
        feed.now += 33 * MS
        fill(feed)
        feed.give("front/image_raw", conversion.image_message(picture, 0, "f"), feed.now - 20 * MS)
        problems = feed.sync.snapshot().problems
    assert "front/image_raw is frozen" in " ".join(problems)


def test_a_driver_that_repeats_its_last_message_grows_old(feed):
    """Neither at once nor when its stamp is so old that it would pass for another clock's."""
    fill(feed)
    message = conversion.joint_state(feed.sync.robot.joints, 0, [0.5] * 6)
    stamp = feed.now
    feed.now += 10 * MS
    feed.give("joint_states", message, stamp + 5 * MS)
    stream = feed.sync.streams["joint_states"]
    count, arrived = stream.count, feed.now
    for _ in range(100):
        feed.now += 10 * MS
        feed.sync.streams["joint_states"].add(message, feed.now, feed.now)
    assert stream.count == count
    assert stream.repeats == 100
    assert stream.age_ns(feed.now) == feed.now - arrived
    assert any("joint_states" in problem for problem in feed.sync.snapshot().problems)
    for _ in range(3):  # a driver that never stamps is judged by reception
        feed.now += 10 * MS
        feed.give("joint_states", message, 0, feed.now)
    assert stream.age_ns(feed.now) == 0


def test_a_driver_on_another_clock_is_joined_by_reception(feed):
    fill(feed)
    message = conversion.joint_state(feed.sync.robot.joints, 0, [9.0] * 6)
    message.header.stamp = conversion.to_stamp(5)
    feed.sync.streams["joint_states"].add(message, feed.now, feed.now)
    stream = feed.sync.streams["joint_states"]
    assert stream.clock_off_ns < -500 * MS
    assert stream.newest is not None
    assert stream.newest.stamp_ns == feed.now
