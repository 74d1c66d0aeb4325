"""``ros2 run robot_rl NODE`` where there is no ROS: what to install, not a traceback."""

from __future__ import annotations

import importlib.util

import pytest

from robot_rl.ros import executables
from robot_rl.ros.graph_names import ALL_NODES


@pytest.mark.parametrize("node", sorted(ALL_NODES))
def test_every_node_says_what_is_missing(node, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "rclpy" else find(name, *more))
    assert getattr(executables, node)() == executables.EXIT_UNAVAILABLE
    said = capsys.readouterr().err
    assert said.startswith(f"{node} needs ROS 2")
    assert "pip install 'robot_rl[ros]'" in said
