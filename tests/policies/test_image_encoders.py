"""Policies that see through a pretrained encoder: it stays as it was, and travels with them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robot_rl.policies.behaviour_cloning import clone
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.policies.config import BCConfig, CompactPolicyConfig
from robot_rl.policies.encoders import FrozenEncoder
from robot_rl.types import ActionSpec, Episode, EpisodeMeta, FeatureSpec

TOP = "observation.images.top"
FEATURES = {"observation.state": FeatureSpec((2,)), TOP: FeatureSpec((64, 64, 3), "uint8")}
ACTION = ActionSpec((-1, -1), (1, 1))
SHAPE = {"horizon": 2, "n_action_steps": 2, "width": 16, "depth": 1, "num_steps": 1, "train_steps": 4, "image_dim": 8}


def episodes(count: int = 1, length: int = 5) -> list[Episode]:
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        state = rng.normal(size=(length + 1, 2)).astype(np.float32)
        pictures = rng.integers(0, 256, (length + 1, 64, 64, 3), np.uint8)
        out.append(
            Episode.from_arrays(
                EpisodeMeta(f"e{i}"), {"observation.state": state, TOP: pictures}, rng.uniform(-1, 1, (length, 2))
            )
        )
    return out


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory) -> Path:
    """Random weights in the file format of pretrained ones."""
    from torchvision import models

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({k: v.half() for k, v in models.squeezenet1_0(weights=None).state_dict().items()}, path)
    return path


@pytest.mark.parametrize("pool", ["keypoints", "embeddings"])
def test_the_encoder_stays_and_travels_with_the_policy(tmp_path, squeezenet, pool):
    config = CompactPolicyConfig(**SHAPE, image_encoder="squeezenet", image_weights=str(squeezenet), image_pool=pool)
    policy = clone(episodes(), FEATURES, ACTION, BCConfig(config, steps=2, batch_size=3, warmup=1))
    from safetensors.torch import load_file

    wanted = load_file(squeezenet)
    encoder = policy.encoders["observation__images__top"]
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, wanted[f"features.{name}"].float()), name
    save_policy(policy, tmp_path / "policy")
    assert str(squeezenet) not in (tmp_path / "policy" / "policy.json").read_text()
    squeezenet_moved = squeezenet.rename(squeezenet.with_name("gone.safetensors"))
    try:
        again = load_policy(tmp_path / "policy")
    finally:
        squeezenet_moved.rename(squeezenet)
    seen = {n: torch.from_numpy(v[:3, None]) for n, v in episodes()[0].observations.items()}
    assert torch.equal(again.encode(seen), policy.encode(seen))
    assert again.spec.base_hash == policy.spec.base_hash
    assert again.encode(seen).shape == (3, 2 + 8)


def test_where_something_is_shows_in_the_features(squeezenet):
    for pool in ("keypoints", "embeddings"):
        torch.manual_seed(0)
        config = CompactPolicyConfig(**SHAPE, image_encoder="squeezenet", image_weights=str(squeezenet), image_pool=pool)
        encoder = FrozenEncoder(config, (64, 64, 3)).train()
        assert not encoder.backbone.training
        picture = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
        picture[0, 4:20, 4:20], picture[1, 40:56, 40:56] = 255, 255
        features = encoder(picture)
        assert (features[0] - features[1]).abs().max() > 1e-3
        features.sum().backward()
        assert all(p.grad is None for p in encoder.backbone.parameters())
        assert all(p.grad is not None for p in encoder.pool.parameters())


def test_weights_that_do_not_fit_are_refused(tmp_path, squeezenet):
    with pytest.raises(ValueError, match=r"tensors of a resnet18 are missing or of another shape, e.g. 0.weight"):
        FrozenEncoder(CompactPolicyConfig(**SHAPE, image_encoder="resnet18", image_weights=str(squeezenet)), (64, 64, 3))
    with pytest.raises(ValueError, match="image_encoder='small': accepted are squeezenet, resnet18"):
        CompactPolicyConfig(image_weights="x")
    with pytest.raises(ValueError, match="image_pool='embeddings' with image_encoder='small'"):
        CompactPolicyConfig(image_pool="embeddings")
    with pytest.raises(ValueError, match="too small to read"):
        FrozenEncoder(CompactPolicyConfig(**SHAPE, image_encoder="resnet18"), (32, 32, 3))


def test_a_real_pretrained_encoder_reads_real_pictures():
    data = Path(os.environ.get("ROBOT_RL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    weights = data / "squeezenet1_0_imagenet" / "model.safetensors"
    if not weights.is_file():
        pytest.skip(f"needs the recordings: {weights} is missing (set ROBOT_RL_DATA)")
    config = CompactPolicyConfig(**SHAPE, image_encoder="squeezenet", image_weights=str(weights), image_pool="embeddings")
    encoder = FrozenEncoder(config, (96, 96, 3))
    rng = np.random.default_rng(0)
    flat = torch.full((1, 96, 96, 3), 128, dtype=torch.uint8)
    busy = torch.from_numpy(rng.integers(0, 256, (1, 96, 96, 3), np.uint8))
    assert torch.isfinite(encoder(flat)).all()
    assert (encoder(flat) - encoder(busy)).abs().max() > 1e-2
