"""A small untrained policy with a head, as a run folder, and versions of the head to publish."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_run(folder: Path, robot: str = "sim_arm") -> Path:
    """``base/`` with a policy for the simulated arm (and its cameras) and ``config.yaml`` with a latent-noise head."""
    from robot_rl.policies.checkpoint import build_policy, save_policy
    from robot_rl.policies.config import CompactPolicyConfig
    from robot_rl.policies.normalizer import Normalizer
    from robot_rl.robots.description import load_robot
    from robot_rl.sim.env import make_env

    spec = make_env("tabletop/Lift").spec
    features = dict(spec.observation_features) | {n: f for n, f in load_robot(robot).features.items() if f.dtype == "uint8"}
    size = features["observation.state"].shape
    low, high = np.array(spec.action.low, np.float32) / 4, np.array(spec.action.high, np.float32) / 4
    normalizer = Normalizer(
        features, {"observation.state": np.zeros(size, np.float32)}, {"observation.state": np.ones(size, np.float32)}, low, high
    )
    config = CompactPolicyConfig(kind="flow", horizon=8, n_action_steps=8, width=32, depth=1, num_steps=2)
    policy = build_policy(config, features, spec.action, normalizer)
    policy.freeze()
    save_policy(policy, folder / "base")
    (folder / "config.yaml").write_text("head: {kind: latent_noise, latent_noise: {hidden: [16, 16]}}\n")
    return folder


def publish(folder: Path, *, seed: int, torn: bool = False) -> None:
    """A new version of the head; ``torn`` breaks its bytes after the manifest was written."""
    import torch

    from robot_rl.config import load
    from robot_rl.policies.checkpoint import load_policy
    from robot_rl.runtime.weights import WEIGHTS, WeightChannel
    from robot_rl.training.build import build_head
    from robot_rl.training.config import PostTrainConfig

    base = load_policy(folder / "base")
    config = load(PostTrainConfig, folder / "config.yaml")
    head = build_head(base, config.head, seed)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    channel = WeightChannel(folder / "weights")
    manifest = channel.publish(head.state_dict(), parent=0, base_hash=base.spec.base_hash, stats_hash=base.spec.stats_hash)
    if torn:
        file = channel.path(manifest.version) / WEIGHTS
        data = bytearray(file.read_bytes())
        data[-3] ^= 0xFF
        file.write_bytes(data)
