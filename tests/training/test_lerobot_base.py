"""A LeRobot checkpoint as the base of a whole run: trained on, resumed, evaluated, and found again by what comes after."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run_kit import lines, tiny

from robot_rl.policies.loading import load_policy
from robot_rl.sim.env import make_env
from robot_rl.training import posttrain
from robot_rl.training.config import EnvConfig, EvalConfig
from robot_rl.training.evaluate import run as run_evaluation

pytest.importorskip("lerobot")
sys.path.append(str(Path(__file__).parents[1] / "policies"))
import lerobot_kit as kit

SPLIT = {kit.STATE: "observation.state[0:10]", kit.ENV: "observation.state[10:18]"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    torch.manual_seed(0)
    config = DiffusionConfig(
        **kit.features(10, 8, 5), n_obs_steps=2, horizon=8, n_action_steps=4, down_dims=(8, 16), diffusion_step_embed_dim=8,
        kernel_size=3, n_groups=4, num_train_timesteps=20, device="cpu",
    )  # fmt: skip
    stats = kit.statistics(10, 8, 5)
    stats["action"] = {k: (v * 0.01).astype(np.float32) for k, v in stats["action"].items()}
    return kit.save(tmp_path_factory.mktemp("base") / "checkpoint", DiffusionPolicy(config), stats)


CHANGE = {
    "head": {"latent_noise": {"hidden": [16, 16]}}, "schedule": {"env_steps": 120},
    "evaluation": {"reference_episodes": 2, "curve_episodes": 2, "final_episodes": 2, "videos": 0}, "demos": {"episodes": 2},
    "gate": {"n_min": 2, "n_max": 2, "reference_n_min": 2},
}  # fmt: skip


@pytest.mark.parametrize(("head", "algorithm"), [("latent_noise", "dsrl_na"), ("residual", "residual")])
def test_a_checkpoint_is_post_trained_by_path(tmp_path, checkpoint, head, algorithm):
    base = {"path": str(checkpoint), "options": {"num_inference_steps": 2, "features": SPLIT}}
    change = CHANGE | {"base": base, "head": {"kind": head}, "learner": {"algorithm": algorithm}}
    result = posttrain.run(tiny(tmp_path / "run", **change))
    assert result["env_steps"] >= 120
    found = load_policy(tmp_path / "run" / "base")
    env = make_env("tabletop/Lift")
    assert found.spec.action == env.spec.action  # the task says which dimension grips, the checkpoint cannot
    env.close()
    assert found.spec.num_steps == 2
    assert json.loads((tmp_path / "run" / "result.json").read_text())["base_hash"] == found.spec.base_hash
    other = CHANGE | {"base": base | {"options": base["options"] | {"num_inference_steps": 1}}, "head": {"kind": head}}
    with pytest.raises(ValueError, match="Accepted is the one that the run began with"):
        posttrain.run(tiny(tmp_path / "run", **other, learner={"algorithm": algorithm}))
    again = run_evaluation(
        EvalConfig(policy=tmp_path / "run", who="base", episodes=2, env=EnvConfig("tabletop/Lift", num_envs=2))
    )
    bare = run_evaluation(EvalConfig(policy=tmp_path / "run" / "base", episodes=2, env=EnvConfig("tabletop/Lift", num_envs=2)))
    assert again["mean_length"] == bare["mean_length"]
    assert any(line["who"] == "base" for line in lines(tmp_path / "run", "evaluations.jsonl"))


def test_a_checkpoint_that_does_not_fit_the_task_is_refused_before_anything_starts(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"the policy reads observation\.state \(10,\); tabletop/Lift has"):
        posttrain.run(tiny(tmp_path / "run", **(CHANGE | {"base": {"path": str(checkpoint)}})))
    with pytest.raises(ValueError, match="only a base that is loaded has options"):
        tiny(tmp_path / "other", base={"options": {"num_inference_steps": 2}})
