"""A whole post-training run in seconds: tabletop/Lift, eight demonstrations, tiny networks."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from robot_rl.config import decode
from robot_rl.training.checkpoint import latest_checkpoint, load_checkpoint
from robot_rl.training.config import PostTrainConfig

TINY: dict[str, Any] = {
    "device": "cpu", "seed": 3,
    "env": {"id": "tabletop/Lift", "num_envs": 2, "options": {"max_episode_steps": 30}},
    "demos": {"episodes": 8, "skill": 0.7, "noise": 0.1},
    "base": {"bc": {
        "steps": 30, "batch_size": 32, "warmup": 5,
        "policy": {"horizon": 8, "n_action_steps": 8, "width": 32, "depth": 1, "num_steps": 2, "train_steps": 10},
    }},
    "head": {"latent_noise": {"hidden": [16, 16]}},
    "learner": {"n_critics": 2, "hidden": [16, 16]},
    "schedule": {
        "env_steps": 300, "round_episodes": 4, "warmup_steps": 1, "return_updates": 4, "warmup_updates": 4,
        "updates_per_step": 0.2, "batch_size": 16, "candidate_every": 100, "evaluate_every": 100, "checkpoint_every_s": 0.0,
    },
    "mixture": {"greedy": 0.5},
    "gate": {"n_min": 4, "n_max": 4, "reference_n_min": 4},
    "stop": {"episodes": 1000},
    "evaluation": {"reference_episodes": 4, "curve_episodes": 4, "final_episodes": 4, "videos": 0},
    "logging": {"every_updates": 8},
}  # fmt: skip


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for k, v in change.items():
        out[k] = merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
    return out


def tiny(run_dir: Path, **change: Any) -> PostTrainConfig:
    return decode(PostTrainConfig, merged(TINY, {**change, "run_dir": str(run_dir)}))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= flatten(v, f"{prefix}{k}/") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out


def learner_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """The final checkpoint's learner, flat."""
    path = latest_checkpoint(run_dir / "checkpoints")
    assert path is not None
    return flatten(load_checkpoint(path)[0]["learner"])


def lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """A log without what depends on the clock; nothing where a learner had nothing to log."""
    path = run_dir / name
    found = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if k != "wall_seconds"} for line in found]


def same_run(one: Path, two: Path) -> None:
    """Assert that two finished runs are one and the same, but for the time they took."""
    a, b = learner_tensors(one), learner_tensors(two)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    for name in ("metrics.jsonl", "evaluations.jsonl", "gate.jsonl", "episodes.jsonl"):
        assert lines(one, name) == lines(two, name), name
    results = [json.loads((p / "result.json").read_text()) for p in (one, two)]
    for key in ("base", "policy", "env_steps", "gate_steps", "updates", "acting", "ended", "config_hash", "base_hash"):
        assert results[0][key] == results[1][key], key


def benchmark(name: str) -> ModuleType:
    """A module of ``benchmarks/``, which is no package."""
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
