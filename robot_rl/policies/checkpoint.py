"""Compact policies on disk: ``policy.safetensors`` (weights and statistics) beside ``policy.json`` (how to build it)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from robot_rl.policies.compact import CompactPolicy
from robot_rl.policies.config import CompactPolicyConfig
from robot_rl.policies.diffusion import DiffusionPolicy
from robot_rl.policies.flow import FlowPolicy
from robot_rl.policies.normalizer import Normalizer
from robot_rl.types import ActionSpec, FeatureSpec

FORMAT = "robot_rl.compact_policy/1"
BEFORE = {"rotations": "quaternion"}
"""What policies are that do not say it, because they are older than the choice."""
KINDS: dict[str, type[CompactPolicy]] = {"diffusion": DiffusionPolicy, "flow": FlowPolicy}


def build_policy(
    config: CompactPolicyConfig, features: dict[str, FeatureSpec], action: ActionSpec, normalizer: Normalizer
) -> CompactPolicy:
    return KINDS[config.kind](config, features, action, normalizer)


def save_policy(policy: CompactPolicy, folder: Path, *, extra: dict[str, Any] | None = None) -> None:
    """Write a frozen policy; the JSON comes last, so a folder with one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, description = folder / "policy.safetensors", folder / "policy.json"
    save_file({k: v.contiguous() for k, v in policy.state_dict().items()}, f"{weights}.tmp")
    os.replace(f"{weights}.tmp", weights)
    content = {"format": FORMAT, **policy.describe(), "base_hash": policy.spec.base_hash, "stats_hash": policy.spec.stats_hash}
    Path(f"{description}.tmp").write_text(json.dumps({**content, "extra": extra or {}}, indent=2))
    os.replace(f"{description}.tmp", description)


def load_compact(folder: Path, device: str | torch.device = "cpu") -> CompactPolicy:
    """Load and verify a compact policy.

    Raises:
        FileNotFoundError: the folder holds no policy.
        ValueError: unknown format, or the weights are not those the description names.
    """
    description = folder / "policy.json"
    if not description.exists():
        raise FileNotFoundError(f"{folder} holds no policy: policy.json is missing")
    data = json.loads(description.read_text())
    if data.get("format") != FORMAT:
        raise ValueError(f"{description}: format {data.get('format')!r}; accepted is {FORMAT!r}")
    features = {n: FeatureSpec.from_json(f) for n, f in data["features"].items()}
    action = ActionSpec.from_json(data["action"])
    config = CompactPolicyConfig(**{**BEFORE, **data["config"]})
    policy = build_policy(config, features, action, Normalizer.blank(features, action, config.rotations))
    policy.load_state_dict(load_file(folder / "policy.safetensors"))
    policy.freeze()
    for name in ("stats_hash", "base_hash"):
        found = getattr(policy.spec, name)
        if found != data[name]:
            raise ValueError(
                f"{folder}: {name} is {found}, but policy.json says {data[name]}: weights and description do not belong together"
            )
    policy.to(device)
    return policy


from robot_rl.policies.loading import load_policy  # noqa: E402,F401  (any kind of base policy; it imports the above when asked)
