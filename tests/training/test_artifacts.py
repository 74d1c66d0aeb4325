"""What a finished run has made, as a folder that needs nothing beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run_kit import tiny
from spine_kit import compact, observations

from robot_rl import cli
from robot_rl.heads.config import LatentNoiseConfig, ResidualConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.residual import ResidualHead
from robot_rl.policies.onnx_policy import OnnxPolicy
from robot_rl.runtime.acting import ActingPolicy, DecisionRequest
from robot_rl.runtime.weights import WeightChannel
from robot_rl.training import posttrain
from robot_rl.training.artifact import export_run, verify_artifact
from robot_rl.training.evaluate import load_acting
from robot_rl.training.onnx_export import export_onnx

QUICK = {
    "schedule": {"env_steps": 60}, "demos": {"episodes": 4}, "gate": {"n_min": 2, "n_max": 2, "reference_n_min": 2},
    "evaluation": {"reference_episodes": 2, "curve_episodes": 2, "final_episodes": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run whose gate let version 1 act (as a file says: whether it deserved to is not tested here)."""
    run = tmp_path_factory.mktemp("runs") / "run"
    posttrain.run(tiny(run, **QUICK))
    version = max(WeightChannel(run / "weights").versions())
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"acting": {"version": version, "mode": "eval"}}))
    return run


def decided(policy: ActingPolicy, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spec = policy.base.spec
    observation = {
        n: rng.normal(size=(spec.n_obs_steps, *f.shape)).astype(f.dtype) for n, f in spec.observation_features.items()
    }
    return policy.decide([DecisionRequest(observation, ("test", seed), 0, 0)])[0].chunk


def test_an_exported_policy_acts_like_the_run_without_the_run(finished, tmp_path, capsys):
    out = tmp_path / "exported" / "lift"
    assert cli.main(["export", str(finished), str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["acting"]["version"] >= 1
    mine, env = load_acting(finished, "policy", "cpu")
    alone = shutil.move(out, tmp_path / "carried")
    theirs, again = load_acting(Path(alone), "policy", "cpu")
    assert env == again
    np.testing.assert_array_equal(decided(mine), decided(theirs))
    assert len(WeightChannel(Path(alone) / "weights").versions()) == 1
    card = (Path(alone) / "README.md").read_text()
    assert "| policy |" in card
    assert mine.base.spec.base_hash in card
    assert verify_artifact(Path(alone)) == []
    with open(Path(alone) / "base" / "policy.safetensors", "r+b") as file:
        file.seek(200)
        file.write(b"xxxx")
    assert verify_artifact(Path(alone)) == ["base/policy.safetensors"]


def test_exports_that_cannot_be_are_refused_and_leave_nothing(finished, tmp_path):
    with pytest.raises(ValueError, match="format=lerobot: the base is a DiffusionPolicy, no LeRobot policy"):
        export_run(finished, tmp_path / "out", "lerobot")
    with pytest.raises(ValueError, match="accepted are policy, lerobot, openvla, onnx"):
        export_run(finished, tmp_path / "out", "gguf")
    with pytest.raises(ValueError, match="accepted is a token head on an OpenVLA checkpoint"):
        export_run(finished, tmp_path / "out", "openvla")
    with pytest.raises(ValueError, match="distil=5 with format=policy: accepted is 0"):
        export_run(finished, tmp_path / "out", "policy", distil=5)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="never overwrites"):
        export_run(finished, tmp_path / "there")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished, unfinished)
    (unfinished / "result.json").unlink()
    with pytest.raises(ValueError, match="has not finished"):
        export_run(unfinished, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there", "unfinished"]
    assert cli.main(["export", str(finished), str(tmp_path / "out"), "--option", "fps=3"]) == 2


WITHOUT_TORCH = """
import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "lerobot", "diffusers", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, No())
import numpy as np
from robot_rl.policies.onnx_policy import OnnxPolicy
policy = OnnxPolicy(sys.argv[1])
given = np.load(sys.argv[2])
noise = given["noise"] if policy.noise_shape else None
np.save(sys.argv[3], policy.chunk({n: given[n] for n in policy.features}, noise))
"""


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("which", ["base", "latent_noise", "residual"])
def test_onnx_does_what_the_policy_does_without_torch(tmp_path, kind, which):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    base = compact(kind, images=which == "base", n_obs_steps=2, rotations="matrix" if which == "residual" else "quaternion")
    generator = torch.Generator().manual_seed(0)
    heads = {
        "base": lambda: None,
        "latent_noise": lambda: LatentNoiseHead(
            base, LatentNoiseConfig(hidden=(16,), executed_rows_only=True), generator=generator
        ),
        "residual": lambda: ResidualHead(base, ResidualConfig(hidden=(16,)), generator=generator),
    }
    head = heads[which]()
    if head is not None:
        with torch.no_grad():
            for p in head.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    policy = ActingPolicy(base, head, "base" if head is None else "eval", 3)
    told = export_onnx(policy, tmp_path / "onnx")
    assert told["largest_difference"] < 1e-4
    seen, noise = observations(base, 5), torch.randn(5, *base.spec.noise_shape)
    np.savez(tmp_path / "given.npz", noise=noise.numpy(), **{n: v.numpy() for n, v in seen.items()})
    command = [
        sys.executable,
        "-c",
        WITHOUT_TORCH,
        str(tmp_path / "onnx"),
        str(tmp_path / "given.npz"),
        str(tmp_path / "out.npy"),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    conditioning = base.encode(seen)
    chunk = base.sample(conditioning, noise) if head is None else head.propose(conditioning, base, noise, None, "eval").chunk
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), base.unnormalize_action(chunk).numpy(), atol=2e-4)


def test_onnx_refuses_what_is_no_graph(tmp_path):
    pytest.importorskip("onnx")
    base = compact()
    head = LatentNoiseHead(base, LatentNoiseConfig(hidden=(16,)))
    with pytest.raises(ValueError, match="a graph draws no random numbers"):
        export_onnx(ActingPolicy(base, head, "explore", 1), tmp_path / "a")
    told = export_onnx(ActingPolicy(base, head, "eval", 1), tmp_path / "b")
    assert told["noise_shape"] is None  # in eval mode the head decides all of it
    policy = OnnxPolicy(tmp_path / "b")
    with pytest.raises(ValueError, match=r"observation.state is \(2, 9\); accepted is \(B, 1, 4\)"):
        policy.chunk({"observation.state": np.zeros((2, 9), np.float32)})
    with open(tmp_path / "b" / "policy.onnx", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="is not the graph that"):
        OnnxPolicy(tmp_path / "b")
