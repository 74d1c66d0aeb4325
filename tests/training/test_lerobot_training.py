"""The benchmark that makes a LeRobot base with LeRobot's own training code, in miniature."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_lerobots_own_training_makes_a_base_that_loads_by_path(tmp_path):
    pytest.importorskip("lerobot")
    pytest.importorskip("accelerate")
    small = ["--episodes=2", "--steps=2", "--batch-size=4", "--down-dims=16,32", "--evaluate=2", "--skill", "0.8", "1.0"]
    command = [sys.executable, str(ROOT / "benchmarks" / "lerobot_base.py"), f"--out={tmp_path / 'made'}", *small]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["against_select_action"] == {"bitwise_equal": True, "largest_difference": 0.0}
    assert told["base"]["n"] == 2
    from robot_rl.policies.loading import load_policy

    base = load_policy(tmp_path / "made" / "checkpoint")
    assert {n: f.shape for n, f in base.spec.observation_features.items()} == {"observation.state": (18,)}
    assert base.spec.action.kind[-1] == "gripper_continuous"
