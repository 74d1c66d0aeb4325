"""The entry points of ``ros2 run robot_rl NODE``: they say what to do where ROS is missing, before a node's module imports it."""

from __future__ import annotations

import importlib
import importlib.util
import sys

EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h


def _run(node: str) -> int:
    if importlib.util.find_spec("rclpy") is None:
        print(
            f"{node} needs ROS 2, and rclpy is not installed for {sys.executable}: pip install 'robot_rl[ros]' (Linux x86-64), or "
            "source a ROS 2 Jazzy installation with that release's Python",
            file=sys.stderr,
        )
        return EXIT_UNAVAILABLE
    return int(importlib.import_module(f"robot_rl.ros.{node}").main())


def policy_node() -> int:
    return _run("policy_node")


def guard_node() -> int:
    return _run("guard_node")


def sim_node() -> int:
    return _run("sim_node")


def learner_node() -> int:
    return _run("learner_node")


def reward_node() -> int:
    return _run("reward_node")


def vlm_reward_node() -> int:
    return _run("vlm_reward_node")


def intervention_node() -> int:
    return _run("intervention_node")


def console_node() -> int:
    return _run("console_node")


def monitor_node() -> int:
    return _run("monitor_node")
