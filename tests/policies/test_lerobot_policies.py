"""LeRobot checkpoints as base policies: the same actions as LeRobot's own loop, and the contract that heads rely on."""

from __future__ import annotations

import json
from pathlib import Path

import lerobot_kit as kit
import numpy as np
import pytest
import torch

from robot_rl.heads.config import LatentNoiseConfig, ResidualConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.residual import ResidualHead
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.inpainting import inpaint, soft_mask
from robot_rl.policies.loading import load_policy, write_reference
from robot_rl.policies.pictures import PictureTransform
from robot_rl.policies.remote.server import PolicyServer
from robot_rl.types import ActionSpec

pytest.importorskip("lerobot")
CAMERAS = {"vectors": (), "two cameras": (kit.TOP, kit.WRIST)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("lerobot")
    return {
        **{("diffusion", n): kit.diffusion(root / f"diffusion {n}", cameras=c) for n, c in CAMERAS.items()},
        ("act", "two cameras"): kit.act(root / "act", cameras=(kit.TOP, kit.WRIST)),
        ("act", "vectors"): kit.act(root / "act vectors", cameras=()),
        ("vqbet", "one camera"): kit.vqbet(root / "vqbet"),
    }


def tensors(seen: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in seen.items()}


@pytest.mark.parametrize("which", ["vectors", "two cameras"])
def test_diffusion_is_lerobots_own_action_bit_for_bit(saved, which):
    folder, cameras = saved["diffusion", which], CAMERAS[which]
    base = load_policy(folder)
    assert isinstance(base, BasePolicy)
    assert (base.spec.sampler, base.spec.num_steps) == ("ddim", 8)
    assert (base.spec.horizon, base.spec.n_action_steps, base.spec.noise_shape) == (7, 4, (8, 3))
    seen = kit.frames(2, 5, env=not cameras, cameras=cameras)
    noise = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(3))
    conditioning = base.encode(tensors(seen))
    assert conditioning.shape == (5, base.spec.conditioning_dim)
    chunk = base.sample(conditioning, noise)
    assert chunk.shape == (5, 7, 3)
    assert chunk.abs().max() <= 1
    ours = base.unnormalize_action(chunk)[:, :4].numpy()
    theirs = kit.lerobot_actions(folder, seen, 4, noise, noise_scheduler_type="DDIM", num_inference_steps=8)
    np.testing.assert_array_equal(ours, theirs)


def test_same_noise_same_bits_and_no_hidden_state(saved):
    base = load_policy(saved["diffusion", "two cameras"])
    seen = tensors(kit.frames(2, 6, env=False, cameras=CAMERAS["two cameras"]))
    noise = torch.randn(6, 8, 3)
    first = base.sample(base.encode(seen), noise)
    base.encode({k: v.flip(0) for k, v in seen.items()})  # other robots in between
    torch.manual_seed(9)
    state = torch.get_rng_state()
    again = base.sample(base.encode(seen), noise)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    order = torch.randperm(6)
    moved = base.sample(base.encode({k: v[order] for k, v in seen.items()}), noise[order])
    torch.testing.assert_close(
        moved, first[order], atol=1e-5, rtol=0
    )  # on some processors a row's last bits depend on its place
    alone = base.sample(base.encode({k: v[:1] for k, v in seen.items()}), noise[:1])
    torch.testing.assert_close(alone, first[:1], atol=1e-5, rtol=0)
    assert not torch.equal(base.sample(base.encode(seen), noise + 0.5), first)


def test_its_sampler_taken_apart_is_its_sampler_and_continues_running_rows(saved):
    base = load_policy(saved["diffusion", "vectors"])
    noise, conditioning = torch.randn(3, 8, 3), base.encode(tensors(kit.frames(2, 3)))
    own = base.sample(conditioning, noise)
    known = base.sample(conditioning, torch.randn(3, 8, 3))
    plain = inpaint(base.denoising(conditioning), noise, known, torch.zeros(3, 7))
    torch.testing.assert_close(plain, own, atol=1e-4, rtol=0)
    drawn = inpaint(base.denoising(conditioning), noise, known, soft_mask(2, 4, 7).expand(3, 7))
    torch.testing.assert_close(drawn[:, :2], known[:, :2], atol=1e-4, rtol=0)
    assert not torch.allclose(drawn[:, 2:], own[:, 2:], atol=1e-3)


def test_gradient_reaches_the_noise(saved):
    base = load_policy(saved["diffusion", "vectors"])
    noise = torch.randn(2, 8, 3, requires_grad=True)
    conditioning = base.encode(tensors(kit.frames(2, 2)))
    base.sample(conditioning, noise, grad=True).sum().backward()
    assert noise.grad.abs().max() > 0
    assert not base.sample(conditioning, noise).requires_grad


@pytest.mark.parametrize("which", ["vectors", "two cameras"])
def test_act_is_lerobots_own_action(saved, which):
    folder, cameras = saved["act", which], CAMERAS[which]
    base = load_policy(folder)
    assert base.spec.noise_shape is None
    seen = kit.frames(1, 3, env=not cameras, cameras=cameras)
    chunk = base.sample(base.encode(tensors(seen)), None)
    assert chunk.shape == (3, 6, 3)
    ours = base.unnormalize_action(chunk)[:, :4].numpy()
    theirs = kit.lerobot_actions(folder, seen, 4, None)
    inside = (theirs > np.array(base.spec.action.low)) & (theirs < np.array(base.spec.action.high))
    assert inside.mean() > 0.5
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=2e-6)
    assert np.abs(ours).max() <= 1.3 * max(np.abs(base.spec.action.low).max(), np.abs(base.spec.action.high).max())
    assert torch.equal(base.encode(tensors(seen)), base.encode(tensors(seen)))


def test_act_with_temporal_ensembling_is_refused_with_a_way_out(tmp_path):
    folder = kit.act(tmp_path / "act", cameras=(), temporal_ensemble_coeff=0.01, n_action_steps=1)
    with pytest.raises(ValueError, match=r"temporal_ensemble_coeff=0\.01.*accepted is temporal_ensemble=off"):
        load_policy(folder)
    assert load_policy(folder, options={"temporal_ensemble": "off"}).spec.n_action_steps == 6


def test_vqbet_takes_the_most_likely_code_and_leaves_the_random_state_alone(saved):
    folder = saved["vqbet", "one camera"]
    base = load_policy(folder)
    seen = kit.frames(3, 4, env=False, cameras=(kit.TOP,))
    state = torch.get_rng_state()
    chunk = base.sample(base.encode(tensors(seen)), None)
    assert torch.equal(state, torch.get_rng_state())
    theirs = kit.lerobot_actions(folder, seen, 4, None, bet_softmax_temperature=1e-30)
    inside = np.abs(chunk.numpy()) < 1
    assert inside.mean() > 0.3
    np.testing.assert_array_equal(base.unnormalize_action(chunk).numpy()[inside], theirs[inside])


@pytest.mark.parametrize("which", [("act", "vectors"), ("vqbet", "one camera")])
def test_latent_noise_on_a_policy_without_noise_is_refused_and_a_residual_starts_as_the_base(saved, which):
    base = load_policy(saved[which])
    with pytest.raises(ValueError, match=r"latent-noise head needs a policy that takes noise.*use a residual head"):
        LatentNoiseHead(base, LatentNoiseConfig())
    cameras = () if which[0] == "act" else (kit.TOP,)
    conditioning = base.encode(tensors(kit.frames(base.spec.n_obs_steps, 4, env=not cameras, cameras=cameras)))
    head = ResidualHead(base, ResidualConfig())
    assert torch.equal(head.propose(conditioning, base, None, None, "eval").chunk, base.sample(conditioning, None))


@pytest.mark.parametrize("which", [("diffusion", "vectors"), ("act", "vectors")])
def test_actions_go_to_the_unit_cube_and_back(saved, which):
    base = load_policy(saved[which])
    rng = np.random.default_rng(0)
    physical = torch.from_numpy(rng.uniform(base.spec.action.low, base.spec.action.high, (7, 5, 3)).astype(np.float32))
    unit = base.normalize_action(physical)
    assert unit.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(base.unnormalize_action(unit), physical, atol=1e-5, rtol=0)


def test_ddim_steps_and_what_identifies_a_base(saved, tmp_path):
    folder = saved["diffusion", "vectors"]
    plain = load_policy(folder)
    assert load_policy(folder).spec.base_hash == plain.spec.base_hash
    quick = load_policy(folder, options={"num_inference_steps": 2})
    assert quick.spec.num_steps == 2
    assert quick.spec.base_hash != plain.spec.base_hash
    assert quick.spec.stats_hash == plain.spec.stats_hash
    with pytest.raises(ValueError, match="num_inference_steps=21: accepted are 1 to 20"):
        load_policy(folder, options={"num_inference_steps": 21})
    other = kit.save(tmp_path / "other", plain.policy, kit.statistics(seed=5))
    assert load_policy(other).spec.stats_hash != plain.spec.stats_hash
    kept = kit.diffusion(tmp_path / "ddim", noise_scheduler_type="DDIM", num_inference_steps=3)
    assert load_policy(kept).spec.num_steps == 3


def test_features_may_be_columns_of_a_recorded_one(saved):
    folder = saved["diffusion", "vectors"]
    options = {"features": {kit.STATE: "observation.state[0:4]", kit.ENV: "observation.state[4:7]"}}
    split, plain = load_policy(folder, options=options), load_policy(folder)
    assert {n: f.shape for n, f in split.spec.observation_features.items()} == {kit.STATE: (7,)}
    seen = tensors(kit.frames(2, 3))
    whole = {kit.STATE: torch.cat([seen[kit.STATE], seen[kit.ENV]], dim=-1)}
    assert torch.equal(split.encode(whole), plain.encode(seen))
    with pytest.raises(ValueError, match=r"observation.environment_state: columns 4:6; the policy reads \(3,\)"):
        load_policy(folder, options={"features": {kit.ENV: "observation.state[4:6]"}})
    with pytest.raises(ValueError, match=r"accepted is e.g. observation.state\[0:10\]"):
        load_policy(folder, options={"features": {kit.ENV: "observation.state[4:]"}})
    with pytest.raises(KeyError, match="lacks"):
        plain.encode({kit.STATE: seen[kit.STATE]})


def test_options_beside_the_checkpoint_and_a_reference_in_a_run_folder(tmp_path):
    folder = kit.diffusion(tmp_path / "policy")
    action = ActionSpec((-1, -1, 0), (1, 1, 1), kind=("continuous", "continuous", "gripper_continuous"))
    (folder / "robot_rl.json").write_text(json.dumps({"num_inference_steps": 5, "action": action.to_json()}))
    base = load_policy(folder)
    assert base.spec.num_steps == 5
    assert base.spec.action == action
    assert load_policy(folder, options={"num_inference_steps": 4}).spec.num_steps == 4
    with pytest.raises(ValueError, match=r"base.options: unknown option 'steps'; accepted are num_inference_steps"):
        load_policy(folder, options={"steps": 4})
    run = tmp_path / "run"
    write_reference(base, run / "base", folder, {"num_inference_steps": 5})
    assert load_policy(run / "base").spec == base.spec
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    run.rename(moved / "run")
    assert load_policy(moved / "run" / "base").spec.base_hash == base.spec.base_hash  # by its absolute path
    (folder / "robot_rl.json").unlink()
    with pytest.raises(ValueError, match="Accepted is the one that the run began with"):
        load_policy(moved / "run" / "base")


def test_what_cannot_be_a_base_is_refused_with_a_reason(tmp_path, saved):
    def edited(name: str, **changes: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in saved["diffusion", "vectors"].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    with pytest.raises(ValueError, match=r"'pi0' policy cannot.*remote:openpi:HOST:PORT"):
        load_policy(edited("pi0", type="pi0"))
    with pytest.raises(ValueError, match=r"there is no adapter for it. Accepted are diffusion, act, vqbet, smolvla"):
        load_policy(edited("other", type="other"))
    (edited("old") / "policy_preprocessor.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"saved before LeRobot 0.4"):
        load_policy(tmp_path / "old")
    with pytest.raises(ValueError, match=r"weights and config.json do not fit"):
        load_policy(edited("shape", down_dims=[16, 64]))
    (edited("bare") / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors"):
        load_policy(tmp_path / "bare")
    foreign = edited("foreign") / "policy_preprocessor.json"
    pipeline = json.loads(foreign.read_text())
    pipeline["steps"].append({"class": "os.system", "config": {}})
    foreign.write_text(json.dumps(pipeline))
    with pytest.raises(ValueError, match=r"os\.system.*accepted are LeRobot's registered steps"):
        load_policy(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match="holds no policy"):
        load_policy(tmp_path)


def test_a_checkpoint_behind_a_server_and_pictures_cut_to_its_size(saved):
    folder = saved["diffusion", "two cameras"]
    cameras = {kit.TOP: {"size": [48, 60], "crop": [4, 6, 40, 40], "resize": [32, 32]}}
    base = load_policy(folder, options={"cameras": cameras})
    assert base.spec.observation_features[kit.TOP].shape == (48, 60, 3)
    assert base.spec.observation_features[kit.WRIST].shape == (32, 32, 3)
    seen = tensors(kit.frames(2, 3, env=False, cameras=CAMERAS["two cameras"]))
    seen[kit.TOP] = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (3, 2, 48, 60, 3), np.uint8))
    noise = torch.randn(3, 8, 3)
    chunk = base.sample(base.encode(seen), noise)
    small = PictureTransform((48, 60), (4, 6, 40, 40), (32, 32))(seen[kit.TOP])
    plain = load_policy(folder)
    assert torch.equal(chunk, plain.sample(plain.encode(seen | {kit.TOP: small}), noise))
    with PolicyServer(base, port=0) as server:
        remote = load_policy(f"remote:127.0.0.1:{server.address[1]}")
        assert torch.equal(remote.sample(remote.encode(seen), noise), chunk)
        physical = remote.unnormalize_action(chunk)
        torch.testing.assert_close(physical, base.unnormalize_action(chunk), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"cameras.observation.images.top: it becomes \(40, 40\); the policy reads \(32, 32\)"):
        load_policy(folder, options={"cameras": {kit.TOP: {"size": [48, 60], "crop": [4, 6, 40, 40]}}})
    with pytest.raises(ValueError, match="are not read by this policy"):
        load_policy(folder, options={"cameras": {"observation.images.side": {"size": [48, 60]}}})


def test_many_pictures_are_encoded_in_pieces(saved, monkeypatch):
    base = load_policy(saved["diffusion", "two cameras"])
    seen = tensors(kit.frames(2, 7, env=False, cameras=CAMERAS["two cameras"]))
    whole = base.encode(seen)
    monkeypatch.setattr("robot_rl.policies.lerobot.adapter.PICTURE_ROWS", 3)
    torch.testing.assert_close(base.encode(seen), whole, atol=1e-5, rtol=0)
