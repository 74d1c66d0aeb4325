"""policy_node with ``inference: process`` on a real graph: cameras in the child, commands from the parent, kill -9 of the child."""

from __future__ import annotations

import os
import signal
import time
from array import array
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from graph_kit import running
from lifecycle_msgs.msg import Transition
from sensor_msgs.msg import Image
from std_msgs.msg import Header
from test_robot_nodes import Driver, spec, topic

from robot_rl.replay.store import EpisodeStore
from robot_rl.robots import pictures as of_cameras
from robot_rl.ros import qos
from robot_rl.ros.conversion import to_stamp
from robot_rl.wire import EpisodeStatus, GuardState

CAMERAS = ("front/image_raw", "wrist/image_raw")


def children(pid: int) -> list[int]:
    out = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) == pid and words[0] != "Z":
            out.append(int(folder.name))
    return out


def test_cameras_and_inference_live_in_a_child_and_come_back_after_kill_9(tmp_path):
    from policy_kit import write_run

    run = write_run(tmp_path / "run", robot="sim_arm_cameras")
    state = tmp_path / "guard.json"
    specs = [
        spec("sim_node", 0, env="tabletop/Lift", robot="sim_arm_cameras", realtime_factor=0.25, images="off"),
        spec("guard_node", 0, robot="sim_arm_cameras", rearm="auto", state_file=str(state), rt_priority=0, hold_to_stop_s=1.0),
        spec(
            "policy_node", 1, robot="sim_arm_cameras", policy=str(run), run_dir=str(run), inference="process", episode_mode="auto",
            reset_service="sim_node/reset", max_episode_s=600.0, warmup_forwards=1, configure_timeout_s=600.0, rt_priority=0,
        ),
    ]  # fmt: skip
    with running(specs) as (supervisor, probe, _):
        drive = Driver(probe)
        commands = probe.listen(PoseStamped, topic("action/arm"), qos.COMMAND)
        beats = probe.listen(Header, topic("policy_node/heartbeat"), qos.LATEST)
        probe.listen(DiagnosticArray, topic("episode_status"), qos.STATE)
        probe.listen(DiagnosticArray, topic("guard_node/state"), qos.STATE)
        probe.listen(DiagnosticArray, "/diagnostics", qos.DIAG)
        cameras = [probe.node.create_publisher(Image, topic(c), qos.SENSOR) for c in CAMERAS]
        frames = np.random.default_rng(0).integers(0, 256, (2, 480, 640, 3), np.uint8)
        pictures = [Image(height=480, width=640, encoding="rgb8", step=1920, data=array("B", f.tobytes())) for f in frames]
        shown = [0.0]

        def film() -> None:
            if time.monotonic() - shown[0] < 0.05:
                return
            shown[0] = time.monotonic()
            stamp = to_stamp(time.time_ns())
            for camera, picture in zip(cameras, pictures, strict=True):
                picture.header.stamp = stamp
                camera.publish(picture)

        def until(condition, what):
            return probe.until(condition, what, 180.0, film)

        assert drive.lifecycle(Transition.TRANSITION_CONFIGURE)
        assert drive.lifecycle(Transition.TRANSITION_ACTIVATE)
        until(lambda: beats and beats[-1].frame_id == "policy", "the policy drives")
        node = supervisor.processes[topic("policy_node")]
        [child] = children(node.pid)
        for camera in CAMERAS:  # 640x480 pictures never pass the process that commands
            assert [i.node_name for i in probe.node.get_subscriptions_info_by_topic(topic(camera))] == [
                "policy_node_perception"
            ]

        moving = len(commands)
        until(lambda: len(commands) > moving + 40, "commands")
        os.kill(child, signal.SIGKILL)
        until(lambda: beats[-1].frame_id == "hold", "the policy says that it holds")
        held = len(commands)
        until(lambda: len(commands) > held + 3, "a hold is no silence: commands go on")
        [successor] = until(lambda: [c for c in children(node.pid) if c != child], "another child")
        until(lambda: beats[-1].frame_id == "policy", "the policy drives again")
        moving = len(commands)
        until(lambda: len(commands) > moving + 40, "commands")
        assert children(node.pid) == [successor]
        assert node.restarts == 0
        assert probe.records(topic("guard_node/state"), GuardState)[-1].armed

        episode = probe.records(topic("episode_status"), EpisodeStatus)[-1].episode_id
        assert drive.set_bool("policy_node/end_episode", True)[0]
        ended = lambda: {s.episode_id for s in probe.records(topic("episode_status"), EpisodeStatus) if s.state == "committed"}  # noqa: E731
        until(lambda: episode in ended(), "the episode is committed")
        with EpisodeStore.open(run / "store") as store:
            recorded = store.read(episode)
        small = np.asarray(recorded.observations["observation.images.front"][5])
        assert small.shape == (84, 84, 3)
        assert np.array_equal(small, of_cameras.shown(frames[0], None, (84, 84)))
    assert not [c for c in (child, successor) if Path(f"/proc/{c}").exists()]
