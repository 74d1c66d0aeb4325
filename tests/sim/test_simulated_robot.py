"""The simulated robot behaves like the task it stands for, through a robot's commands."""

from __future__ import annotations

import numpy as np
import pytest

from robot_rl.robots.channels import channels_of
from robot_rl.robots.description import load_robot
from robot_rl.sim.env import make_env, make_expert
from robot_rl.sim.robot import make_robot


def test_deltas_through_pose_commands_are_the_tasks_own_physics():
    """Policy deltas integrated into poses, sent to the robot, end bit for bit where ``env.step`` ends."""
    description = load_robot("sim_arm")
    robot = make_robot("tabletop/Lift", description)
    arm, gripper = channels_of(description)
    env = make_env("tabletop/Lift")
    for seed in (3, 8):
        observation, _ = env.reset(seed=seed)
        expert = make_expert(env)
        expert.reset(env, np.random.default_rng(seed))
        robot.reset(seed)
        reference, done, success = robot.tool_pose(), False, False
        while not done:
            action = expert.act(observation)
            observation, _, terminated, truncated, info = env.step(action)
            done, success = terminated or truncated, bool(info["success"])
            reference = arm.target(action, reference, robot.tool_pose())
            robot.command("arm", reference)
            robot.command("gripper", gripper.target(action, None))
            while not robot.advance():
                pass
        assert np.allclose(robot.env.data.qpos, env.data.qpos, atol=1e-9)
        assert robot.truth.success == success
        assert np.allclose(list(robot.estimate().values()), observation["observation.state"], atol=1e-6)


def test_joint_commands_move_the_joints_and_the_gripper():
    robot = make_robot("tabletop/Lift", load_robot("sim_arm_joints"))
    names = [f"joint{i}" for i in range(1, 8)]
    start = np.array([robot.joints()[n][0] for n in names])
    robot.command("arm", start + np.array([0.1, 0, 0, 0, 0, 0, 0.2]))
    robot.command("gripper", np.array([0.02]))
    for _ in range(100):
        robot.advance()
    joints = robot.joints()
    assert joints["joint1"][0] == pytest.approx(start[0] + 0.1, abs=0.01)
    assert joints["joint7"][0] == pytest.approx(start[6] + 0.2, abs=0.01)
    assert joints["gripper_width"][0] == pytest.approx(0.02, abs=0.003)


def test_a_description_for_another_robot_is_refused():
    with pytest.raises(ValueError, match="shoulder_pan"):
        make_robot("tabletop/Lift", load_robot("so101"))


def test_a_picture_shows_the_instant_it_was_taken_at_as_observations_do():
    cameras = {"front": (84, 84), "wrist": (84, 84)}
    robot = make_robot("tabletop/Lift", load_robot("sim_arm"))
    filmed = make_env("tabletop/Lift", cameras=["front", "wrist"], image_size=(84, 84))
    robot.reset(3)
    observation, _ = filmed.reset(seed=3)
    draw = robot.see(cameras)
    for _ in range(20):
        robot.advance()
    robot.command("arm", np.array([0.1, 0.1, 0.2, 0, 0, 0, 1.0]))
    for _ in range(20):
        robot.advance()
    for camera in cameras:
        assert np.array_equal(draw(camera), observation[f"observation.images.{camera}"])
    assert not np.array_equal(robot.see(cameras)("front"), observation["observation.images.front"])
    robot.close()
    filmed.close()
