"""policy_node with a tiny SmolVLA and a head on it: a camera, an instruction, padded noise; it drives, and takes new versions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")
pytest.importorskip("transformers", reason="SmolVLA needs transformers: pip install 'robot_rl[vla]'")
pytest.importorskip("lerobot")

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from graph_kit import running
from lifecycle_msgs.msg import Transition
from policy_kit import publish
from std_msgs.msg import Header
from test_robot_nodes import Driver, spec, topic

from robot_rl.replay.store import EpisodeStore
from robot_rl.ros import qos
from robot_rl.wire import EpisodeStatus

sys.path.append(str(Path(__file__).parents[1] / "policies"))
CAMERA, TASK = "observation.images.front", "lift the block"


def run_folder(folder: Path) -> Path:
    """A run on a tiny SmolVLA drawn at random, whose statistics are the simulated arm's."""
    import lerobot_kit as kit
    import numpy as np
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from robot_rl.policies.loading import load_policy, write_reference
    from robot_rl.sim.env import make_env

    env = make_env("tabletop/Lift").spec
    checkpoint = folder / "checkpoint"
    vlm = kit.tiny_vlm(folder / "vlm", TASK)
    config = SmolVLAConfig(
        **kit.features(env.observation_features["observation.state"].shape[0], None, 5, (CAMERA,), 32), chunk_size=8, n_action_steps=8,
        max_state_dim=18, max_action_dim=8, resize_imgs_with_padding=(32, 32), num_steps=2, num_vlm_layers=2, vlm_model_name=str(vlm),
        load_vlm_weights=False, tokenizer_max_length=8, pad_language_to="max_length", device="cpu",
    )  # fmt: skip
    stats = kit.statistics(18, 3, 5, (CAMERA,))
    stats["action"] = {k: (v * 0.005).astype(np.float32) for k, v in stats["action"].items()}
    kit.save(checkpoint, SmolVLAPolicy(config), stats)
    options = {"task": TASK, "action": env.action.to_json()}
    (checkpoint / "robot_rl.json").write_text(json.dumps(options))
    write_reference(load_policy(checkpoint), folder / "base", checkpoint, options)
    (folder / "config.yaml").write_text("head: {kind: latent_noise, latent_noise: {hidden: [16, 16]}}\n")
    (folder / "robot.yaml").write_text(
        "extends: robots/sim_arm.yaml\nname: sim_arm_front\nobservations:\n"
        f"  {CAMERA}:\n    {{topic: front/image_raw, type: sensor_msgs/msg/Image, size: [480, 640], resize: [32, 32],\n"
        "     camera_info: front/camera_info, hz: 30, max_age_s: 2.0}\n"
        "sync: {anchor: state, tolerance_s: 0.0167, state: newest, frozen_check: false}\n"
    )
    return folder


@pytest.mark.slow
def test_a_tiny_smolvla_drives_and_takes_a_new_version(tmp_path):
    run = run_folder(tmp_path / "run")
    publish(run, seed=1)
    robot = str(run / "robot.yaml")
    specs = [
        spec("sim_node", 0, env="tabletop/Lift", robot=robot, realtime_factor=0.2, images="raw"),
        spec("guard_node", 0, robot=robot, rearm="auto", state_file=str(tmp_path / "guard.json"), rt_priority=0, hold_to_stop_s=5.0),
        spec(
            "policy_node", 1, robot=robot, policy=str(run), head=str(run), run_dir=str(run), episode_mode="auto",
            reset_service="sim_node/reset", max_episode_s=600.0, warmup_forwards=1, configure_timeout_s=600.0, rt_priority=0, task=TASK,
        ),
    ]  # fmt: skip
    with running(specs) as (_, probe, _lines):
        drive = Driver(probe)
        commands = probe.listen(PoseStamped, topic("action/arm"), qos.COMMAND)
        beats = probe.listen(Header, topic("policy_node/heartbeat"), qos.LATEST)
        probe.listen(DiagnosticArray, topic("episode_status"), qos.STATE)

        def status() -> EpisodeStatus:
            return probe.records(topic("episode_status"), EpisodeStatus)[-1]

        def until(condition, what):
            return probe.until(condition, what, 240.0)

        assert drive.lifecycle(Transition.TRANSITION_CONFIGURE)
        assert drive.lifecycle(Transition.TRANSITION_ACTIVATE)
        until(lambda: beats and beats[-1].frame_id == "policy", "the policy drives")
        assert status().weights_version == 1
        first = status().episode_id
        until(lambda: len(commands) > 40, "commands")
        publish(run, seed=2)
        assert drive.set_bool("policy_node/end_episode", False)[0]
        until(lambda: status().weights_version == 2 and status().episode_id != first, "the next version acts")
        before = len(commands)
        until(lambda: len(commands) > before + 20, "commands of the next episode")
    with EpisodeStore.open(run / "store", mode="r") as store:
        episode = store.read(first)
    assert episode.meta.task == TASK
    assert episode.observations[CAMERA].shape[1:] == (32, 32, 3)
    assert episode.decisions[0].noise.shape == (8, 8)  # padded dimensions included
