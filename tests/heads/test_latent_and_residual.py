"""Latent-noise and residual heads: bounds that reach the sampler, a base that is left alone, exact gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spine_kit import ARM, SmoothBase, compact, observations

from robot_rl.heads.config import LatentNoiseConfig, ResidualConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.residual import ResidualHead
from robot_rl.policies.base import prior_noise


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latent(base, seed: int = 0, **config) -> LatentNoiseHead:
    return LatentNoiseHead(base, LatentNoiseConfig(**{"hidden": (16, 16), **config}), generator=gen(seed))


def residual(base, seed: int = 0, **config) -> ResidualHead:
    return ResidualHead(base, ResidualConfig(**{"hidden": (16, 16), **config}), generator=gen(seed))


# ---- latent noise


@pytest.mark.parametrize("bound", [0.5, 1.5, 2.5])
@pytest.mark.parametrize("mode", ["full", "repeat", "low_rank"])
def test_row_1_the_noise_bound_reaches_the_sampler(bound: float, mode) -> None:
    """What the base is given is bound * P u, for this bound; with one row at a time it comes within a hair of the bound."""
    base = SmoothBase()
    head = latent(base, noise_bound=bound, noise_mode=mode, rank=2)
    conditioning = torch.randn(1000, 3, generator=gen(1))
    exploration = torch.randn(1000, head.exploration_dim, generator=gen(2))
    proposal = head.propose(conditioning, base, None, exploration, "explore")
    (given,) = base.noises
    mean, log_std = head.actor(conditioning)
    u = torch.tanh(mean + log_std.exp() * exploration)
    torch.testing.assert_close(given, bound * head.basis.expand(u, None))
    assert torch.equal(given, proposal.noise)
    if mode != "low_rank":  # a row of two modes mixes two entries of u
        torch.testing.assert_close(given.abs().max(), bound * u.abs().max())
        assert 0.95 * bound < float(given.abs().max()) <= bound


def test_eval_is_the_squashed_mean_and_reads_no_randomness() -> None:
    base = SmoothBase()
    head = latent(base)
    conditioning = torch.randn(8, 3, generator=gen(1))
    one = head.propose(conditioning, base, None, None, "eval")
    two = head.propose(conditioning, base, torch.randn(8, 3, 3, generator=gen(5)), torch.full((8, 9), torch.nan), "eval")
    assert torch.equal(one.chunk, two.chunk)
    torch.testing.assert_close(one.noise.flatten(1), 1.5 * head.actor.mean(conditioning))
    with pytest.raises(ValueError, match="exploration draws"):
        head.propose(conditioning, base, None, None, "explore")


def test_a_fresh_head_has_nearly_the_spread_of_the_prior() -> None:
    """Mean about 0 and standard deviation 1 before squashing; a variance of .39 after."""
    base = SmoothBase()
    head = latent(base, noise_bound=1.0)
    conditioning = torch.randn(4000, 3, generator=gen(1))
    noise = head.propose(conditioning, base, None, torch.randn(4000, 9, generator=gen(2)), "explore").noise
    assert abs(float(noise.mean())) < 0.02
    assert 0.36 < float(noise.var()) < 0.43


def test_rows_beyond_the_executed_ones_stay_with_the_prior() -> None:
    base = SmoothBase()
    head = latent(base, executed_rows_only=True)
    conditioning, prior = torch.randn(6, 3, generator=gen(1)), torch.randn(6, 3, 3, generator=gen(2))
    noise = head.propose(conditioning, base, prior, torch.randn(6, 9, generator=gen(3)), "explore").noise
    assert torch.equal(noise[:, 2:], prior[:, 2:])
    assert not (noise[:, :2] == prior[:, :2]).any()


def test_log_probability_is_that_of_unit_space() -> None:
    """The bound does not enter the density, so a target entropy means the same at every bound."""
    base = SmoothBase()
    conditioning, exploration = torch.randn(5, 3, generator=gen(1)), torch.randn(5, 9, generator=gen(2))
    narrow, wide = (latent(base, noise_bound=b).propose(conditioning, base, None, exploration, "explore") for b in (0.5, 2.5))
    assert torch.equal(narrow.log_prob, wide.log_prob)
    u = narrow.noise.flatten(1) / 0.5
    torch.testing.assert_close(narrow.log_prob, latent(base).actor.log_prob(conditioning, u), atol=1e-3, rtol=1e-4)


def test_a_base_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes noise.*residual head"):
        latent(SmoothBase(noise=False))
    with pytest.raises(ValueError, match="noise_bound=0"):
        LatentNoiseConfig(noise_bound=0)
    with pytest.raises(ValueError, match="no noise"):
        prior_noise(SmoothBase(noise=False), 1, gen())


@pytest.mark.parametrize(("mode", "rank", "rows_only"), [("full", 1, False), ("repeat", 1, False), ("low_rank", 2, True)])
def test_noise_gradient_to_u_equals_autograd(mode, rank: int, rows_only: bool) -> None:
    base = SmoothBase()
    head = latent(base, noise_mode=mode, rank=rank, executed_rows_only=rows_only).double()
    u = torch.rand(6, head.basis.width, generator=gen(1), dtype=torch.float64).mul(2).sub(1).requires_grad_(True)
    prior, gradient = (torch.randn(6, 3, 3, generator=gen(s), dtype=torch.float64) for s in (2, 3))
    (expected,) = torch.autograd.grad(head.to_noise(u, prior), u, gradient)
    torch.testing.assert_close(head.noise_gradient_to_u(gradient), expected, atol=1e-12, rtol=0)


# ---- residual


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_row_16_a_fresh_residual_is_the_base_bit_for_bit(kind: str) -> None:
    base = compact(kind)
    head = residual(base)
    conditioning, noise = base.encode(observations(base, 16)), prior_noise(base, 16, gen(1))
    proposal = head.propose(conditioning, base, noise, None, "eval")
    assert torch.equal(proposal.chunk, base.sample(conditioning, noise))
    assert torch.equal(proposal.chunk, proposal.chunk_base)
    assert torch.isnan(proposal.log_prob).all()
    without = SmoothBase(noise=False)
    state = torch.randn(4, 3, generator=gen(1))
    assert torch.equal(residual(without).propose(state, without, None, None, "eval").chunk, without.sample(state, None))


def trained(base, seed: int = 3, **config) -> ResidualHead:
    """A residual whose last layer is no longer zero."""
    head = residual(base, **config)
    with torch.no_grad():
        head.actor.flat.data.add_(torch.randn(head.actor.flat.data.shape, generator=gen(seed)).to(head.actor.flat.data.dtype))
    return head


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0, 3),
    gain=st.floats(0, 20),
    mode=st.sampled_from(["full", "repeat", "low_rank"]),
)
def test_row_17_the_clamp_comes_after_the_combination(seed: int, scale: float, gain: float, mode) -> None:
    base = SmoothBase(seed=seed % 7, gain=gain)  # a large gain puts the base at its limits
    head = trained(base, seed, scale=scale, gripper_scale=scale / 2, mode=mode, rank=2)
    conditioning = torch.randn(5, 3, generator=gen(seed))
    noise, exploration = (
        torch.randn(5, 3, 3, generator=gen(seed + 1)),
        torch.randn(5, head.exploration_dim, generator=gen(seed + 2)),
    )
    proposal = head.propose(conditioning, base, noise, exploration, "explore")
    rows = proposal.chunk_base[:, :2]
    u = (head.unit_action(conditioning, rows) + head.config.exploration_std * exploration).clamp(-1, 1)
    per_dim = torch.tensor([scale, scale, scale / 2])
    correction = (head.basis.matrix @ u.unflatten(1, (head.basis.rank, 3))) * per_dim
    torch.testing.assert_close(proposal.chunk[:, :2], (rows + correction).clamp(-1, 1))
    assert float(proposal.chunk.abs().max()) <= 1.0
    assert torch.equal(proposal.chunk[:, 2:], proposal.chunk_base[:, 2:])  # rows that are not executed are the base's


def test_row_18_a_gripper_of_scale_zero_is_the_bases() -> None:
    base = SmoothBase(gain=5.0)
    head = trained(base, scale=0.9)
    conditioning, noise = torch.randn(50, 3, generator=gen(1)), torch.randn(50, 3, 3, generator=gen(2))
    for mode in ("explore", "eval"):
        proposal = head.propose(conditioning, base, noise, torch.randn(50, head.exploration_dim, generator=gen(3)), mode)
        gripper = torch.from_numpy(ARM.gripper_mask)
        assert torch.equal(proposal.chunk[..., gripper], proposal.chunk_base[..., gripper])
        assert not torch.equal(proposal.chunk[:, :2, ~gripper], proposal.chunk_base[:, :2, ~gripper])


@pytest.mark.parametrize("mode", ["full", "repeat", "low_rank"])
def test_combine_gradient_to_u_equals_autograd(mode) -> None:
    base = SmoothBase()
    head = trained(base, scale=0.8, gripper_scale=0.3, mode=mode, rank=2).double()
    head.scale = head.scale.double()
    rows = torch.rand(40, 2, 3, generator=gen(1), dtype=torch.float64) * 2 - 1
    rows[:10] = rows[:10].sign()  # a base that stands at its limits
    u = torch.rand(40, head.basis.width, generator=gen(2), dtype=torch.float64) * 2 - 1
    u[:5] = 0  # and a fresh residual on it: still correctable
    u.requires_grad_(True)
    gradient = torch.randn(40, 2, 3, generator=gen(3), dtype=torch.float64)
    (expected,) = torch.autograd.grad(head.combine(rows, u), u, gradient)
    torch.testing.assert_close(head.combine_gradient_to_u(rows, u.detach(), gradient), expected, atol=1e-12, rtol=0)
    assert (expected[:5].abs().sum(1) > 0).all()
    held = (rows + head.scale * head.basis.expand(u.detach(), None)).abs() > 1
    assert held.any()


@pytest.mark.parametrize("name", ["scale", "gripper_scale", "exploration_std"])
def test_negative_scales_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1"):
        ResidualConfig(**{name: -1})
