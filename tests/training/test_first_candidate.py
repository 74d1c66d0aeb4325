"""When the first candidate is put on probation: at once where a fresh head is something new, after it has learned where it is the base."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_kit import TINY, lines, merged

from robot_rl.config import decode
from robot_rl.policies.config import AdapterConfig
from robot_rl.policies.loading import load_policy
from robot_rl.runtime.weights import WeightChannel
from robot_rl.training import posttrain
from robot_rl.training.build import build_head
from robot_rl.training.config import HeadConfig, PostTrainConfig

KINDS = {
    "latent_noise": ({}, False),
    "residual": ({"algorithm": "residual"}, True),
    "gaussian_residual": ({"algorithm": "residual_sac"}, True),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_head_that_is_the_base_still_is_no_candidate(kind: str, tmp_path: Path) -> None:
    learner, like_base = KINDS[kind]
    small = {"latent_noise": {"hidden": [16, 16]}, "residual": {"hidden": [8]}, "gaussian_residual": {"hidden": [8]}}
    change = {"head": {"kind": kind, **small}, "learner": learner, "schedule": {"env_steps": 240}, "run_dir": str(tmp_path)}
    config = decode(PostTrainConfig, merged(TINY, change))
    assert config.head.starts_as_base == like_base
    posttrain.run(config)
    first = lines(tmp_path, "gate.jsonl")[0]
    assert (first["event"], first["version"]) == ("candidate", 1)
    fresh = build_head(load_policy(tmp_path / "base"), config.head, config.seed, config.learner).state_dict()
    published = WeightChannel(tmp_path / "weights").load(1)
    same = all((fresh[name] == published[name]).all() for name in fresh)
    assert same != like_base


def test_a_pool_that_was_trained_before_is_something_new() -> None:
    assert HeadConfig(kind="fine_tuned").starts_as_base
    pool = AdapterConfig(kind="modulation", entries=2, entry=1, init=Path("runs/before"))
    assert not HeadConfig(kind="fine_tuned", adapter=pool).starts_as_base
