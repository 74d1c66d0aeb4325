"""A tiny OpenVLA through a whole run: it plays from pictures, learns from its own words, is gated, resumes, and is exported."""

from __future__ import annotations

import json
from pathlib import Path

import openvla_kit as kit
import pytest
import torch
from run_kit import TINY, merged

from robot_rl import cli
from robot_rl.config import load
from robot_rl.policies.loading import load_policy
from robot_rl.runtime.weights import WeightChannel
from robot_rl.training import posttrain
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.evaluate import load_acting

pytest.importorskip("transformers", reason="OpenVLA needs transformers: pip install 'robot_rl[vla]'")
CONFIGS = Path(__file__).parents[2] / "configs"


def config(run: Path, checkpoint: Path) -> PostTrainConfig:
    """``configs/openvla.yaml`` as it is, with a tiny checkpoint and few, short episodes."""
    keep = ("device", "seed", "gate", "stop", "evaluation", "logging")
    small = merged({k: TINY[k] for k in keep}, {
        "env": {"num_envs": 2, "options": {"max_episode_steps": 8, "image_size": kit.SIDE}},
        "demos": {"episodes": 1, "prefill": False}, "base": {"path": str(checkpoint), "options": {"task": kit.TASK}},
        "head": {"token": {"rank": 2}},
        "learner": {"advantage": "gae", "value_hidden": [8]},  # leave-one-out has nothing to say where every episode fails
        "schedule": {"env_steps": 60, "round_episodes": 4, "group_size": 2, "candidate_every": 32, "evaluate_every": 60},
        "gate": {"n_min": 2, "n_max": 2, "reference_n_min": 2},
        "evaluation": {"reference_episodes": 2, "curve_episodes": 2, "final_episodes": 2}, "run_dir": str(run),
    })  # fmt: skip
    return load(PostTrainConfig, CONFIGS / "openvla.yaml", _flat(small))


def _flat(tree: dict, prefix: str = "--") -> list[str]:
    out = []
    for k, v in tree.items():
        out += (
            _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else [f"{prefix}{k}={v if isinstance(v, str) else json.dumps(v)}"]
        )
    return out


def test_a_token_policy_learns_from_its_own_words_and_is_exported(tmp_path, capsys):
    checkpoint = kit.openvla(tmp_path / "checkpoint", dim=5)
    posttrain.run(config(tmp_path / "run", checkpoint))
    run = tmp_path / "run"
    assert (run / "result.json").exists()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("round/decisions" in m for m in metrics)
    version = max(WeightChannel(run / "weights").versions())
    factors = WeightChannel(run / "weights").load(version)
    assert all(n.startswith("factors.") for n in factors)
    with pytest.MonkeyPatch.context() as patch:  # whether a round of failures teaches anything is chance: say what was learned
        learned = {n: torch.full_like(v, 0.05) if n.endswith(".b") else v for n, v in factors.items()}
        patch.setattr(WeightChannel, "load", lambda self, v: learned)
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | {"acting": {"version": version, "mode": "eval"}}))
        capsys.readouterr()
        assert cli.main(["export", str(run), str(tmp_path / "out"), "--format", "openvla", "--json"]) == 0
        mine, _ = load_acting(run, "policy", "cpu")
        told = {"camera": "observation.images.front", "task": kit.TASK, "action": mine.base.spec.action.to_json()}
        theirs = load_policy(tmp_path / "out", options=told)
        observation = kit.seen(4)
        chunk = mine.head.propose(mine.base.encode(observation), mine.base, None, None, "eval").chunk
        assert torch.equal(theirs.sample(theirs.encode(observation), None), chunk)
        assert not torch.equal(chunk, mine.base.sample(mine.base.encode(observation), None))
