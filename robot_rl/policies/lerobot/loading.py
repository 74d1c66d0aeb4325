"""From a checkpoint folder to the adapter for its kind."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robot_rl.policies.lerobot import versions
from robot_rl.policies.lerobot.adapter import LeRobotPolicy
from robot_rl.policies.lerobot.options import read_options

ADAPTERS = {
    "diffusion": "robot_rl.policies.lerobot.diffusion:LeRobotDiffusion",
    "act": "robot_rl.policies.lerobot.act:LeRobotACT",
    "vqbet": "robot_rl.policies.lerobot.vqbet:LeRobotVQBeT",
    "smolvla": "robot_rl.policies.lerobot.smolvla:LeRobotSmolVLA",
}
_ELSEWHERE = "its stack does not load beside LeRobot 0.4; serve it with openpi and use remote:openpi:HOST:PORT"
REFUSED = {
    "pi0": _ELSEWHERE,
    "pi05": _ELSEWHERE,
    "pi0_fast": _ELSEWHERE,
    "tdmpc": "it plans with a learned model and keeps its plan between steps, which a stateless policy cannot",
    "sac": "it is an RL agent of LeRobot's own, not a policy to post-train",
}


def is_checkpoint(folder: Path) -> bool:
    return versions.policy_type(folder) is not None


def load_lerobot(folder: Path, device: str = "cpu", options: Mapping[str, Any] | None = None) -> LeRobotPolicy:
    """The base policy in a LeRobot checkpoint.

    Args:
        options: see :class:`robot_rl.policies.lerobot.options.LeRobotOptions`.

    Raises:
        ValueError, FileNotFoundError: it cannot be a base policy; the message says why. LeRobotMissing: a package is missing.
    """
    kind = versions.policy_type(folder)
    if kind not in ADAPTERS:
        why = REFUSED.get(str(kind), "there is no adapter for it")
        raise ValueError(
            f"{folder}: a LeRobot {kind!r} policy cannot be loaded as a base: {why}. Accepted are {', '.join(ADAPTERS)}"
        )
    module, name = ADAPTERS[kind].split(":")
    return getattr(importlib.import_module(module), name)(folder, read_options(folder, options), device)
