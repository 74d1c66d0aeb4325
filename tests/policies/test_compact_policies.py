"""Compact policies: a deterministic map from noise to chunk, equal to the slow loops it replaces, with an identity."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from spine_kit import ARM, IMAGE, STATE, compact, observations

from robot_rl.policies.base import prior_noise
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.policies.config import CompactPolicyConfig
from robot_rl.policies.normalizer import OBSERVATION_CLIP, Normalizer
from robot_rl.types import Episode, EpisodeMeta, FeatureSpec

KINDS = ("diffusion", "flow")


def draw(policy, batch: int, seed: int = 1) -> torch.Tensor:
    return prior_noise(policy, batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_row_13_same_noise_same_bits(kind: str, images: bool) -> None:
    """Whatever the global generator and the mode before freezing: equal observation and noise give equal bits."""
    policy = compact(kind, images=images)
    seen, noise = observations(policy, 6), draw(policy, 6)
    torch.manual_seed(1)
    first = policy.sample(policy.encode(seen), noise)
    before = torch.get_rng_state()
    policy.train()
    policy.freeze()
    second = policy.sample(policy.encode(seen), noise)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert first.shape == (6, 4, 3)
    assert float(first.abs().max()) <= 1.0
    assert not torch.equal(first, policy.sample(policy.encode(seen), draw(policy, 6, seed=2)))


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_row_14_rows_of_a_batch_do_not_touch_each_other(kind: str, images: bool) -> None:
    policy = compact(kind, images=images)
    seen, noise = observations(policy, 64), draw(policy, 64)
    whole = policy.sample(policy.encode(seen), noise)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = policy.sample(policy.encode({k: v[order] for k, v in seen.items()}), noise[order])
    assert torch.equal(shuffled, whole[order])
    for i in range(0, 64, 9):
        one = policy.sample(policy.encode({k: v[i : i + 1] for k, v in seen.items()}), noise[i : i + 1])
        torch.testing.assert_close(one, whole[i : i + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("train_steps", "num_steps"), [(20, 4), (100, 5), (100, 8), (100, 100), (100, 6), (50, 1), (7, 3)])
def test_ddim_equals_the_loop_of_diffusers(train_steps: int, num_steps: int) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    policy = compact("diffusion", train_steps=train_steps, num_steps=num_steps)
    conditioning, noise = policy.encode(observations(policy, 5)), draw(policy, 5)
    scheduler = DDIMScheduler(
        num_train_timesteps=train_steps, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", set_alpha_to_one=True,
        prediction_type="v_prediction", clip_sample=True, clip_sample_range=1.0,
    )  # fmt: skip
    scheduler.set_timesteps(num_steps)
    x = noise.flatten(1)
    with torch.no_grad():
        condition = policy.denoiser.condition(conditioning)
        for k in scheduler.timesteps:
            time = policy.denoiser.time((k.float()[None] + 1) / train_steps)
            v = policy.denoiser(x, condition, time)
            x = scheduler.step(v, int(k), x, eta=0.0, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(policy.sample(conditioning, noise).flatten(1), x.clamp(-1, 1), atol=1e-5, rtol=0)


def test_flow_equals_the_plain_euler_loop() -> None:
    policy = compact("flow", num_steps=7)
    conditioning, noise = policy.encode(observations(policy, 5)), draw(policy, 5)
    x = noise.flatten(1)
    with torch.no_grad():
        for i in range(7):
            t = torch.full((5,), i / 7)
            x = x + policy.denoiser(x, policy.denoiser.condition(conditioning), policy.denoiser.time(t)) * (1 / 7)
    torch.testing.assert_close(policy.sample(conditioning, noise).flatten(1), x.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_sampling_agree_on_the_objective(kind: str) -> None:
    """A network that always predicts what the loss asks for at one chunk is sampled back to that chunk from any noise."""
    policy = compact(kind, num_steps=4)
    chunk = torch.linspace(-0.8, 0.8, 12)

    class Oracle(torch.nn.Module):
        def condition(self, c):
            return c

        def time(self, t):
            return t

        def forward(self, x, condition, time):
            t = time[:, None]
            if kind == "flow":  # x = (1 - t) noise + t chunk, velocity = chunk - noise
                return chunk - (x - t * chunk) / (1 - t)
            alpha = policy._alpha[(time * policy.config.train_steps - 1).round().long()][:, None]
            noise = (x - alpha.sqrt() * chunk) / (1 - alpha).sqrt()
            return alpha.sqrt() * noise - (1 - alpha).sqrt() * chunk

    policy.denoiser = Oracle()
    sampled = policy.sample(torch.zeros(9, 4), draw(policy, 9))
    torch.testing.assert_close(sampled.flatten(1), chunk.expand(9, 12), atol=2e-5, rtol=0)
    loss = policy.denoising_loss(torch.zeros(9, 4), chunk.view(1, 4, 3).expand(9, 4, 3), torch.Generator().manual_seed(0))
    assert float(loss.max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_flows_from_the_chunk_to_the_noise_when_asked(kind: str) -> None:
    policy = compact(kind).double()
    conditioning = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    noise = (0.1 * draw(policy, 2)).double().requires_grad_(True)
    if kind == "diffusion":  # keep clear of the clamp, where finite differences are one-sided
        policy.denoiser.output.weight.data.mul_(0.05)
        policy.denoiser.output.bias.data.mul_(0.05)
    assert torch.autograd.gradcheck(lambda w: policy.sample(conditioning, w, grad=True), (noise,), atol=1e-5)
    assert not policy.sample(conditioning, noise).requires_grad
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_round_trip(kind: str, images: bool, tmp_path) -> None:
    policy = compact(kind, images=images, n_obs_steps=2)
    save_policy(policy, tmp_path / "base", extra={"note": 1})
    again = load_policy(tmp_path / "base")
    assert again.spec == policy.spec
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    seen, noise = observations(policy, 3), draw(policy, 3)
    assert torch.equal(policy.sample(policy.encode(seen), noise), again.sample(again.encode(seen), noise))


@pytest.mark.parametrize("name", ["denoiser.output.bias", "normalizer.action_high"])
def test_row_24_tampered_weights_or_statistics_are_refused(name: str, tmp_path) -> None:
    policy = compact()
    save_policy(policy, tmp_path)
    weights = load_file(tmp_path / "policy.safetensors")
    weights[name] = weights[name] + 1e-6
    save_file(weights, tmp_path / "policy.safetensors")
    with pytest.raises(ValueError, match="stats_hash" if "normalizer" in name else "base_hash"):
        load_policy(tmp_path)


def test_a_description_that_does_not_fit_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"policy\.json is missing"):
        load_policy(tmp_path)
    save_policy(compact(), tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps(description | {"format": "other/9"}))
    with pytest.raises(ValueError, match="other/9"):
        load_policy(tmp_path)
    changed = description | {"config": description["config"] | {"num_steps": 2}}  # another sampler is another policy
    (tmp_path / "policy.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="base_hash"):
        load_policy(tmp_path)


def test_identity_covers_weights_sampler_steps_and_statistics() -> None:
    hashes = [
        compact().spec.base_hash, compact(seed=1).spec.base_hash, compact("flow").spec.base_hash,
        compact(num_steps=5).spec.base_hash, compact(n_action_steps=2).spec.base_hash,
    ]  # fmt: skip
    assert len(set(hashes)) == len(hashes)
    assert compact().spec.base_hash == hashes[0]
    policy = compact()
    policy.train()
    policy._spec = None
    with pytest.raises(RuntimeError, match="freeze"):
        _ = policy.spec


def test_frames_are_stacked_oldest_first_and_missing_features_are_named() -> None:
    policy = compact(n_obs_steps=3, state=2)
    seen = observations(policy, 2)
    encoded = policy.encode(seen)
    mean, std = (getattr(policy.normalizer, f"observation__state__{x}") for x in ("mean", "std"))
    frames = [((seen[STATE][:, i] - mean) / std).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP) for i in range(3)]
    torch.testing.assert_close(encoded, torch.cat(frames, 1), atol=0, rtol=0)
    assert policy.spec.conditioning_dim == encoded.shape[1] == 6
    with pytest.raises(KeyError, match=STATE):
        policy.encode({})


def test_images_are_seen_where_they_are() -> None:
    """A bright spot that moves changes the conditioning; the state's part stays."""
    policy = compact(images=True, n_obs_steps=2)
    seen = observations(policy, 1)
    seen[IMAGE].zero_()
    seen[IMAGE][:, 1, 4:8, 4:8] = 255
    moved = {**seen, IMAGE: seen[IMAGE].clone()}
    moved[IMAGE][:, 1] = moved[IMAGE][:, 1].roll(16, dims=1)
    a, b = policy.encode(seen).unflatten(1, (2, -1)), policy.encode(moved).unflatten(1, (2, -1))
    assert a.shape == (1, 2, 4 + 8)
    assert torch.equal(a[:, 0], b[:, 0])
    assert torch.equal(a[:, 1, :4], b[:, 1, :4])
    assert float((a[:, 1, 4:] - b[:, 1, 4:]).abs().max()) > 1e-3


# ---- statistics


def episodes(rng: np.random.Generator, count: int = 3) -> list[Episode]:
    out = []
    for i in range(count):
        length = int(rng.integers(4, 9))
        action = rng.normal(size=(length, 3)) * 3  # beyond the limits: the robot would have clipped it
        action[:, 2] = 0.25  # a dimension that never moves
        state = rng.normal(2.0, 3.0, (length + 1, 2))
        state[:, 1] = 7.0
        meta = EpisodeMeta(f"e{i}")
        out.append(Episode.from_arrays(meta, {STATE: state.astype("f4")}, action, terminated=np.arange(length) == length - 1))
    return out


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), quantile=st.sampled_from([0.0, 0.05]))
def test_normaliser_round_trip(seed: int, quantile: float) -> None:
    rng = np.random.default_rng(seed)
    played = episodes(rng)
    normalizer = Normalizer.fit(played, {STATE: FeatureSpec((2,))}, ARM, action_quantile=quantile)
    executed = np.clip(np.concatenate([e.action for e in played]), ARM.low, ARM.high).astype("f4")
    unit = normalizer.action(torch.from_numpy(executed))
    np.testing.assert_allclose(normalizer.unaction(unit).numpy(), executed, atol=1e-5)
    if quantile == 0.0:
        assert float(unit.abs().max()) <= 1.0 + 1e-5
        np.testing.assert_allclose(unit[:, :2].numpy().max(0), 1.0, atol=1e-5)
    np.testing.assert_allclose(unit[:, 2].numpy(), 0.0, atol=1e-5)  # what never moves sits in the middle
    seen = torch.from_numpy(np.concatenate([e.observations[STATE] for e in played]))
    scaled = normalizer.observation(STATE, seen)
    assert abs(float(scaled[:, 0].mean())) < 1e-4
    assert abs(float(scaled[:, 0].std(correction=0)) - 1) < 1e-3
    assert float(scaled[:, 1].abs().max()) < 1e-3  # not blown up
    assert float(normalizer.observation(STATE, seen + 1e6).max()) == OBSERVATION_CLIP
    assert torch.equal(seen, torch.from_numpy(np.concatenate([e.observations[STATE] for e in played])))  # input untouched


def test_statistics_hash_follows_the_numbers() -> None:
    rng = np.random.default_rng(0)
    played = episodes(rng)
    features = {STATE: FeatureSpec((2,))}
    one, two = Normalizer.fit(played, features, ARM), Normalizer.fit(played, features, ARM)
    assert one.stats_hash() == two.stats_hash()
    two.action_high[0] += 1e-6
    assert one.stats_hash() != two.stats_hash()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"horizon": 0}, "horizon=0"), ({"n_action_steps": 9}, "n_action_steps=9"), ({"num_steps": 101}, "num_steps=101")],
)
def test_bad_shapes_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompactPolicyConfig(**change)
