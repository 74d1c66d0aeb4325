"""Results for LeRobot's own loader: adapters in the weights of a LeRobot policy, and heads distilled into them."""

from __future__ import annotations

import json

import lerobot_kit as kit
import numpy as np
import pytest
import torch
from run_kit import TINY, merged

from robot_rl import cli
from robot_rl.config import decode
from robot_rl.heads.advantage import AdvantageHead
from robot_rl.heads.chain import ChainHead
from robot_rl.heads.config import AdvantageConfig, ChainConfig, LatentNoiseConfig
from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.policies.config import AdapterConfig
from robot_rl.policies.loading import load_policy
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.weights import WeightChannel
from robot_rl.training import posttrain
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.evaluate import load_acting
from robot_rl.training.lerobot_export import DistilConfig, as_lerobot, distil, write_checkpoint

LORA = AdapterConfig("lora", rank=3)
NOISE = torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion")
    own = {"normalization_mapping": {"STATE": "MEAN_STD", "ENV": "MEAN_STD", "ACTION": "MEAN_STD"}}
    return {
        "cube": kit.diffusion(folder / "cube", prediction_type="sample"),
        "deviations": kit.diffusion(folder / "deviations", seed=1, **own),
    }


def seen(batch: int, seed: int = 1) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in kit.frames(2, batch, seed=seed).items()}


def shaken(head: FineTunedHead) -> FineTunedHead:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in head.denoiser.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator))
    return head


@pytest.mark.parametrize("which", ["cube", "deviations"])
@pytest.mark.parametrize("adapter", [AdapterConfig(), LORA])
def test_a_fine_tuned_lerobot_policy_starts_as_the_base_and_ends_as_lerobots(checkpoints, which, adapter, tmp_path):
    base = load_policy(checkpoints[which])
    head = FineTunedHead(base, adapter, generator=torch.Generator().manual_seed(1))
    conditioning = base.encode(seen(3))
    assert torch.equal(head.propose(conditioning, base, NOISE, None, "eval").chunk, base.sample(conditioning, NOISE))
    shaken(head)
    acting = ActingPolicy(base, head, "eval", 1)
    ours = head.propose(conditioning, base, NOISE, None, "eval").chunk
    assert not torch.allclose(ours, base.sample(conditioning, NOISE), atol=1e-3)
    policy, distilled = as_lerobot(acting, tmp_path, DistilConfig())
    assert distilled is None
    write_checkpoint(policy, tmp_path / "out")
    theirs = kit.lerobot_actions(tmp_path / "out", kit.frames(2, 3), 4, NOISE)  # by LeRobot's own loop, sampled as saved
    physical = base.unnormalize_action(ours)[:, :4].numpy()
    inside = (theirs > np.array(base.spec.action.low)) & (theirs < np.array(base.spec.action.high))
    assert inside.any()
    np.testing.assert_allclose(physical[inside], theirs[inside], atol=1e-4)
    assert load_policy(tmp_path / "out").spec.base_hash != base.spec.base_hash


@pytest.mark.parametrize("which", ["cube", "deviations"])
def test_its_own_loss_brings_it_to_what_it_is_shown(checkpoints, which):
    base = load_policy(checkpoints[which])
    head = FineTunedHead(base, LORA, generator=torch.Generator().manual_seed(1))
    head.denoiser.requires_grad_(True)
    conditioning = base.encode(seen(16))
    shown = torch.full((16, base.spec.horizon, 3), 0.4)
    before = (base.sample(conditioning, torch.zeros(16, 8, 3)) - shown).abs().mean()
    optimizer, generator = torch.optim.Adam(head.denoiser.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(150):
        loss = head.policy.denoising_loss(conditioning, shown, generator)
        assert loss.shape == shown.shape
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    after = (head.policy.sample(conditioning, torch.zeros(16, 8, 3)) - shown).abs().mean()
    assert float(after) < 0.8 * float(before)


@pytest.mark.slow
def test_a_head_is_distilled_into_the_policys_own_network(checkpoints, tmp_path):
    base = load_policy(checkpoints["cube"], options={"num_inference_steps": 2})
    head = LatentNoiseHead(base, LatentNoiseConfig(hidden=(16,)), generator=torch.Generator().manual_seed(1))
    acting = ActingPolicy(base, head, "eval", 1)
    with pytest.raises(ValueError, match="accepted are --distil STEPS"):
        as_lerobot(acting, tmp_path, DistilConfig())
    states = base.encode(seen(3000))
    policy, told = distil(acting, states, DistilConfig(steps=120, batch_size=128, lr=1e-3))
    assert told.states == 3000
    assert told.after < 0.9 * told.before  # a random network of a few thousand weights is no good pupil
    write_checkpoint(policy, tmp_path / "out")
    assert load_policy(tmp_path / "out").spec.num_steps == base.spec.num_steps


def test_heads_that_reach_into_the_sampler_say_that_they_need_a_compact_policy(checkpoints):
    base = load_policy(checkpoints["cube"])
    for make in (lambda: ChainHead(base, ChainConfig()), lambda: AdvantageHead(base, AdvantageConfig())):
        with pytest.raises(ValueError, match="accepted are compact"):
            make()
    with pytest.raises(ValueError, match=r"adapter\.kind='modulation' scales activations of a compact policy's denoiser"):
        FineTunedHead(base, AdapterConfig("modulation"))


def test_a_run_that_fine_tunes_a_lerobot_policy_becomes_one(tmp_path, capsys):
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    torch.manual_seed(0)
    config = DiffusionConfig(
        **kit.features(10, 8, 5), n_obs_steps=1, horizon=8, n_action_steps=8, drop_n_last_frames=0, down_dims=(16,), kernel_size=3, n_groups=4,
        diffusion_step_embed_dim=16, num_train_timesteps=20, prediction_type="sample", device="cpu",
    )  # fmt: skip
    source = kit.save(tmp_path / "checkpoint", DiffusionPolicy(config), kit.statistics(10, 8, 5))
    columns = {"observation.state": "observation.state[0:10]", "observation.environment_state": "observation.state[10:18]"}
    (source / "robot_rl.json").write_text(json.dumps({"features": columns, "num_inference_steps": 2}))
    quick = {
        "schedule": {"env_steps": 200}, "demos": {"episodes": 4}, "gate": {"n_min": 2, "n_max": 2, "reference_n_min": 2},
        "evaluation": {"reference_episodes": 2, "curve_episodes": 2, "final_episodes": 2}, "base": {"path": str(source)},
        "head": {"kind": "fine_tuned", "adapter": {"kind": "lora", "rank": 2}}, "learner": {"algorithm": "weighted_bc", "weights": "filtered"},
    }  # fmt: skip
    run = tmp_path / "run"
    shape = {k: v for k, v in TINY.items() if k not in ("learner", "head", "base", "mixture")}
    posttrain.run(decode(PostTrainConfig, merged(shape, {**quick, "run_dir": str(run)})))
    version = max(WeightChannel(run / "weights").versions())
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"acting": {"version": version, "mode": "eval"}}))
    capsys.readouterr()
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--format", "lerobot", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fused"] == "fine_tuned"
    mine, _ = load_acting(run, "policy", "cpu")
    theirs = load_policy(tmp_path / "out")
    rows, noise = torch.randn(4, theirs.spec.conditioning_dim), torch.randn(4, 8, 5)
    chunk = mine.head.propose(rows, mine.base, noise, None, "eval").chunk
    torch.testing.assert_close(theirs.sample(rows, noise), chunk, atol=1e-4, rtol=0)
    assert theirs.spec.action.kind[-1] == "gripper_continuous"  # what the run told the base travels along
