"""``vlm_reward_node``: hosts a reward source that asks a vision-language model server.

The source does the asking; this node tells it where the server is and how hard it may be used. A source of that name that is
not installed refuses ``configure``, and the message says what is installed.
"""

from __future__ import annotations

from typing import Any

from robot_rl.rewards.source import RewardSource
from robot_rl.ros.base import run
from robot_rl.ros.graph_names import VLM_REWARD_NODE
from robot_rl.ros.reward_node import RewardNode

SETTINGS = ("endpoint", "model", "max_qps", "max_in_flight", "cache")


class VlmRewardNode(RewardNode):
    """See the module."""

    def __init__(self, **options: Any) -> None:
        super().__init__(VLM_REWARD_NODE, **options)

    def load(self) -> RewardSource:
        source = super().load()
        connect = getattr(source, "connect", None)
        if connect is None:
            raise ValueError(
                f"source={self.parameters['source']!r} ({type(source).__name__}) asks no model server; run it in reward_node, or "
                "choose one that has connect(endpoint, model, max_qps, max_in_flight, cache)"
            )
        connect(**{name: self.parameters[name] for name in SETTINGS})
        return source


def main(argv: list[str] | None = None) -> int:
    return run(VlmRewardNode, argv)


if __name__ == "__main__":
    raise SystemExit(main())
