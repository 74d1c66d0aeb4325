"""docs/ros.md says what the code declares."""

from __future__ import annotations

from pathlib import Path

from robot_rl.ros import reference
from robot_rl.ros.graph_names import ALL_NODES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ros.md"


def test_the_page_is_what_the_tables_say():
    assert PAGE.read_text(encoding="utf-8") == reference.text(), "python -m robot_rl.ros.reference > docs/ros.md"


def test_everything_is_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    for node in ALL_NODES.values():
        assert f"### {node.name}\n" in page
        for parameter in node.parameters:
            assert f"| `{parameter.name}` | {parameter.type_name} |" in page
        for topic in (*node.publishes, *node.subscribes):
            assert f"`{topic.name}`" in page
        for service in node.services:
            assert f"`{service.name}`" in page
