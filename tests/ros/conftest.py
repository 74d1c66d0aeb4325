"""Tests on real rclpy and real DDS; they skip with a reason where ROS is not installed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ros() -> None:
    """Skips without rclpy; wheels come with ``pip install 'robot_rl[ros]'``."""
    pytest.importorskip(
        "rclpy", reason="rclpy is not installed here: pip install 'robot_rl[ros]' (Linux x86_64) or source ROS 2 Jazzy"
    )


@pytest.fixture
def node(ros: None) -> Iterator[object]:
    """A plain node of this process in a domain of its own, with ``listen`` and a clock, for what needs no second process."""
    import rclpy
    from graph_kit import own_domain
    from rclpy.signals import SignalHandlerOptions

    from robot_rl.ros.base import PlainNode
    from robot_rl.ros.names import NodeTable

    with own_domain():
        rclpy.init(domain_id=int(os.environ["ROS_DOMAIN_ID"]), signal_handler_options=SignalHandlerOptions.NO)
        made = PlainNode(NodeTable("test_node", "a node of a test", lifecycle=False))
        try:
            yield made
        finally:
            made.destroy_node()
            rclpy.try_shutdown()
