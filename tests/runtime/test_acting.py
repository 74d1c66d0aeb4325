"""Deciding: randomness belongs to (episode, decision) alone; the mixture has its share; stored noise is what acted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from spine_kit import STATE, SmoothBase, compact

from robot_rl.heads.config import ChunkPolicyConfig, LatentNoiseConfig, ResidualConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.one_step import OneStepHead
from robot_rl.heads.residual import ResidualHead
from robot_rl.runtime.acting import ActingPolicy, DecisionRequest
from robot_rl.runtime.chunk_scheduler import RunningChunk


def request(episode: int, index: int = 0, dim: int = 3, n_obs: int = 1) -> DecisionRequest:
    rows = np.random.default_rng(episode).normal(size=(n_obs, dim)).astype("f4")
    return DecisionRequest({STATE: rows}, ("evaluation", episode), index, 8 * index)


def latent(base) -> LatentNoiseHead:
    return LatentNoiseHead(base, LatentNoiseConfig(hidden=(16,)), generator=torch.Generator().manual_seed(0))


def policies(base) -> dict[str, ActingPolicy]:
    residual = ResidualHead(base, ResidualConfig(hidden=(16,)), generator=torch.Generator().manual_seed(0))
    return {
        "base": ActingPolicy(base),
        "zero_noise": ActingPolicy(base, mode="zero_noise"),
        "explore": ActingPolicy(base, latent(base), "explore", 3),
        "eval": ActingPolicy(base, latent(base), "eval", 3),
        "mixed": ActingPolicy(base, latent(base), "explore", 3, base_share=0.5),
        "residual": ActingPolicy(base, residual, "explore", 4, base_share=0.3),
    }


@pytest.mark.parametrize("kind", list(policies(SmoothBase())))
@pytest.mark.parametrize("compact_base", [False, True])
def test_row_25_a_decision_does_not_depend_on_who_else_asks(kind: str, compact_base: bool) -> None:
    """Interleaved or alone, in any order and batch: the same draws, and chunks as close as kernels allow."""
    base = compact(state=3) if compact_base else SmoothBase()
    policy = policies(base)[kind]
    asked = [request(e, i) for e in range(6) for i in range(2)]
    together = policy.decide(asked)
    backwards = policy.decide(asked[::-1])[::-1]
    for one, other, again in zip(together, [policy.decide([r])[0] for r in asked], backwards, strict=True):
        np.testing.assert_allclose(one.chunk, other.chunk, atol=1e-5)
        np.testing.assert_allclose(one.chunk, again.chunk, atol=1e-5)
        np.testing.assert_allclose(one.noise, other.noise, atol=1e-6)
        assert one.explored == other.explored == again.explored
        assert (one.step, one.weights_version) == (other.step, other.weights_version)
    assert [d.step for d in together] == [r.step for r in asked]


def test_two_policies_meet_equal_noise_on_equal_seeds() -> None:
    base = SmoothBase()
    asked = [request(e, i) for e in range(3) for i in range(3)]
    found = policies(base)
    a, b = found["base"].decide(asked), found["residual"].decide(asked)
    assert all(np.array_equal(x.noise, y.noise) for x, y in zip(a, b, strict=True))
    noises = np.stack([d.noise for d in a])
    assert len(np.unique(noises[:, 0, 0])) == 9  # every decision of every episode has its own
    assert not found["zero_noise"].decide(asked)[0].noise.any()


def test_mixture_share_and_what_is_stored() -> None:
    base = SmoothBase()
    asked = [request(e) for e in range(1500)]
    prior = [d.noise for d in ActingPolicy(base).decide(asked)]
    for share in (0.0, 0.3, 1.0):
        policy = ActingPolicy(base, latent(base), "explore", 5, base_share=share)
        decisions = policy.decide(asked)
        explored = np.array([d.explored for d in decisions])
        assert abs(explored.mean() - share) < 0.04
        for i in np.flatnonzero(explored)[:50]:
            assert np.array_equal(decisions[i].noise, prior[i])  # unbounded, the base's own
            assert np.isnan(decisions[i].log_prob)
            assert decisions[i].weights_version == 0
        for i in np.flatnonzero(~explored)[:50]:
            assert np.abs(decisions[i].noise).max() <= 1.5
            assert np.isfinite(decisions[i].log_prob)
            assert decisions[i].weights_version == 5
    assert not any(d.explored for d in ActingPolicy(base, latent(base), "eval", 5, base_share=0.7).decide(asked[:50]))


@pytest.mark.parametrize("kind", list(policies(SmoothBase())))
def test_row_4_stored_noise_gives_the_stored_chunk(kind: str) -> None:
    base = SmoothBase()
    asked = [request(e) for e in range(12)]
    decisions = policies(base)[kind].decide(asked)
    conditioning = base.encode({STATE: torch.from_numpy(np.stack([r.observation[STATE] for r in asked]))})
    chunk = base.unnormalize_action(base.sample(conditioning, torch.from_numpy(np.stack([d.noise for d in decisions]))))
    np.testing.assert_allclose(np.stack([d.chunk_base for d in decisions]), chunk, atol=1e-6)
    if kind != "residual":
        np.testing.assert_allclose(np.stack([d.chunk for d in decisions]), chunk, atol=1e-6)


@pytest.mark.parametrize("kind", ["base", "explore", "eval", "zero_noise"])
def test_row_4_the_base_is_called_once(kind: str) -> None:
    base = SmoothBase()
    policy = policies(base)[kind]
    base.calls = 0
    policy.decide([request(e) for e in range(5)])
    assert base.calls == 1


def test_a_base_without_noise_acts() -> None:
    base = SmoothBase(noise=False)
    head = ResidualHead(base, ResidualConfig(hidden=(16,)))
    for policy in (
        ActingPolicy(base),
        ActingPolicy(base, head, "explore", 1, base_share=0.5),
        ActingPolicy(base, head, "eval", 1),
    ):
        decisions = policy.decide([request(e) for e in range(4)])
        assert all(d.noise is None and d.chunk.shape == (3, 3) for d in decisions)


def test_a_head_mode_needs_a_head() -> None:
    with pytest.raises(ValueError, match="'eval' needs a head"):
        ActingPolicy(SmoothBase(), mode="eval")


@pytest.mark.parametrize("kind", list(policies(SmoothBase())))
def test_chunks_continue_those_that_run(kind: str) -> None:
    """Frozen rows are the running ones, for head and base; requests beside them that continue nothing get what they would get alone."""
    base = compact(state=3)
    policy = policies(base)[kind]
    assert policy.cannot_continue() == ""
    before = policy.decide([request(1)])[0]
    running = RunningChunk(before.chunk[1:], before.chunk_base[1:], 2)
    asked = [request(2, 1), replace(request(3, 1), running=running), request(4, 1)]
    plain = policy.decide([replace(r, running=None) for r in asked])
    decisions = policy.decide(asked)
    assert [d.continues for d in decisions] == [False, True, False]
    for i in (0, 2):
        np.testing.assert_allclose(decisions[i].chunk, plain[i].chunk, atol=1e-5)
    new = decisions[1]
    assert new.chunk[:2].tobytes() == before.chunk[1:3].tobytes()
    assert new.chunk_base[:2].tobytes() == before.chunk_base[1:3].tobytes()
    assert np.array_equal(new.noise, plain[1].noise)
    assert not np.allclose(new.chunk[2:], plain[1].chunk[2:], atol=1e-4), "what follows goes on from there"
    assert policy.decide(asked)[1].chunk.tobytes() == new.chunk.tobytes()


def test_what_cannot_continue_says_why() -> None:
    rows = np.zeros((2, 3), np.float32)
    asked = replace(request(1), running=RunningChunk(rows, rows, 1))
    with pytest.raises(ValueError, match=r"SmoothBase .* does not hand out its sampler"):
        ActingPolicy(SmoothBase()).decide([asked])
    base = compact(state=3)
    policy = ActingPolicy(base, OneStepHead(base, ChunkPolicyConfig(hidden=(16,))), "eval", 1)
    assert "a one_step head does not act through the base's sampler" in policy.cannot_continue()
    with pytest.raises(ValueError, match="one_step head"):
        policy.decide([asked])
