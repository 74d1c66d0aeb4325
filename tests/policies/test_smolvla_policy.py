"""A tiny SmolVLA as a base policy: LeRobot's own chunks, noise with padded dimensions, and its prefix found again by features."""

from __future__ import annotations

import lerobot_kit as kit
import numpy as np
import pytest
import torch

from robot_rl.heads.config import LatentNoiseConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.policies.inpainting import inpaint, soft_mask
from robot_rl.policies.loading import load_policy
from robot_rl.policies.remote.server import PolicyServer

pytest.importorskip("transformers", reason="SmolVLA needs transformers: pip install 'robot_rl[vla]'")
CAMERAS = (kit.TOP, kit.WRIST)
TASK = {"task": "lift the block"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kit.smolvla(tmp_path_factory.mktemp("smolvla") / "checkpoint", cameras=CAMERAS)


@pytest.fixture
def base(folder):
    return load_policy(folder, options=TASK)


def seen(batch: int, seed: int = 1) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in kit.frames(1, batch, env=False, cameras=CAMERAS, seed=seed).items()}


def lerobots(folder, observation: dict[str, torch.Tensor], noise: torch.Tensor, task: str) -> np.ndarray:
    """(B, chunk, A) physical, by LeRobot's own call."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    policy = SmolVLAPolicy.from_pretrained(folder)
    pre, post = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    batch = {k: v[:, -1] for k, v in observation.items()}
    batch = {k: (v.float() / 255).permute(0, 3, 1, 2).contiguous() if v.dtype == torch.uint8 else v for k, v in batch.items()}
    ready = pre({**batch, "task": [task] * len(noise)})
    chunk = policy.predict_action_chunk({k: v for k, v in ready.items() if k.startswith("observation.")}, noise=noise)
    return post(chunk).numpy()


def test_smolvla_is_lerobots_own_chunk(folder, base):
    spec = base.spec
    assert (spec.noise_shape, spec.horizon, spec.n_action_steps, spec.num_steps) == ((6, 5), 6, 4, 4)
    observation, noise = seen(4), torch.randn(4, 6, 5)
    ours = base.unnormalize_action(base.sample(base.encode(observation), noise)).numpy()
    theirs = lerobots(folder, observation, noise, "lift the block")
    inside = (theirs > np.array(spec.action.low)) & (theirs < np.array(spec.action.high))
    assert inside.mean() > 0.5
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-5)


def test_the_instruction_and_every_noise_dimension_matter(folder, base):
    observation, noise = seen(3), torch.randn(3, 6, 5)
    conditioning = base.encode(observation)
    first = base.sample(conditioning, noise)
    assert torch.equal(first, base.sample(conditioning, noise))
    padded = noise.clone()
    padded[..., 3:] += 1.0  # the padded dimensions of a pretrained model steer it too
    assert not torch.equal(base.sample(conditioning, padded), first)
    other = load_policy(folder, options={"task": "open the drawer"})
    assert other.spec.base_hash != base.spec.base_hash
    assert not torch.equal(other.sample(other.encode(observation), noise), first)
    real = load_policy(folder, options=TASK | {"noise_dims": "real"})
    assert real.spec.noise_shape == (6, 3)
    still = torch.cat([noise[..., :3], torch.zeros(3, 6, 2)], dim=-1)
    assert torch.equal(real.sample(real.encode(observation), noise[..., :3]), base.sample(conditioning, still))


@pytest.mark.parametrize("mode", ["repeat", "full"])
def test_latent_noise_heads_fit_its_noise(base, mode):
    head = LatentNoiseHead(base, LatentNoiseConfig(noise_mode=mode))
    conditioning = base.encode(seen(2))
    proposal = head.propose(conditioning, base, torch.randn(2, 6, 5), torch.randn(2, head.exploration_dim), "explore")
    assert proposal.chunk.shape == (2, 6, 3)
    assert (proposal.noise[:, :1] == proposal.noise).all() == (mode == "repeat")


def test_conditioning_finds_its_prefix_however_it_was_carried(base):
    observation, noise = seen(6), torch.randn(6, 6, 5)
    conditioning = base.encode(observation)
    chunk = base.sample(conditioning, noise)
    stored = torch.from_numpy(conditioning.numpy().copy())  # as a replay buffer holds it
    order = torch.tensor([4, 0, 4, 2])
    torch.testing.assert_close(base.sample(stored[order], noise[order]), chunk[order], atol=1e-5, rtol=0)
    base.encode(seen(2, seed=2))
    mixed = base.encode(seen(2, seed=3))
    both = torch.cat([stored[:1], mixed[:1]])
    torch.testing.assert_close(base.sample(both, noise[:2])[:1], chunk[:1], atol=1e-5, rtol=0)
    blank = base.sample(torch.zeros(2, base.spec.conditioning_dim), noise[:2])  # a head proved before it acts
    assert torch.isfinite(blank).all()
    with pytest.raises(LookupError, match=r"1 of 2 conditioning rows belong to no observation.*input_cache_mb"):
        base.sample(torch.cat([stored[:1], stored[1:2] + 1]), noise[:2])


def test_a_forgotten_prefix_is_computed_again_from_its_observation(folder):
    base = load_policy(folder, options=TASK | {"prefix_cache_mb": 1})
    base._memory._limits = (1, 1 << 20)  # room for one prefix alone
    observation, noise = seen(3), torch.randn(3, 6, 5)
    conditioning = base.encode(observation)
    chunk = base.sample(conditioning, noise)
    base.encode(seen(3, seed=5))
    torch.testing.assert_close(base.sample(conditioning, noise), chunk, atol=1e-5, rtol=0)
    assert base._memory.recomputed == 3
    base._memory._limits = (1, 1)
    base.encode(seen(1, seed=6))
    with pytest.raises(LookupError, match="3 of 3"):
        base.sample(conditioning, noise)


def test_smolvla_behind_a_server(base):
    with PolicyServer(base, port=0) as server:
        remote = load_policy(f"remote:127.0.0.1:{server.address[1]}")
        observation, noise = seen(2), torch.randn(2, 6, 5)
        chunk = remote.sample(remote.encode(observation), noise)
        torch.testing.assert_close(chunk, base.sample(base.encode(observation), noise), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"noise_dims": "real"}])
def test_its_sampler_taken_apart_is_its_sampler_and_continues_running_rows(folder, options):
    base = load_policy(folder, options=TASK | options)
    observation, noise = seen(3), torch.randn(3, *base.spec.noise_shape)
    conditioning = base.encode(observation)
    own, known = base.sample(conditioning, noise), base.sample(conditioning, torch.randn(3, *base.spec.noise_shape))
    plain = inpaint(base.denoising(conditioning), noise, known, torch.zeros(3, 6))
    torch.testing.assert_close(plain, own, atol=1e-4, rtol=0)
    drawn = inpaint(base.denoising(conditioning), noise, known, soft_mask(2, 4, 6).expand(3, 6))
    torch.testing.assert_close(drawn[:, :2], known[:, :2], atol=1e-4, rtol=0)
    assert not torch.allclose(drawn[:, 2:], own[:, 2:], atol=1e-3)
