"""Heads that write a token policy's words: the base when fresh, and better at what was rewarded after a round."""

from __future__ import annotations

import openvla_kit as kit
import pytest
import torch
from spine_kit import SmoothBase

from robot_rl.heads.config import TokenConfig
from robot_rl.heads.token import TokenHead
from robot_rl.learners.config import OnPolicyConfig
from robot_rl.learners.on_policy import OnPolicyLearner, RoundEpisode
from robot_rl.policies.loading import load_policy

pytest.importorskip("transformers", reason="OpenVLA needs transformers: pip install 'robot_rl[vla]'")
CONFIG = TokenConfig(rank=4, alpha=8.0, temperature=1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kit.openvla(tmp_path_factory.mktemp("openvla") / "checkpoint")


@pytest.fixture(params=["greedy", "sample"])
def base(folder, request):
    return load_policy(folder, options=kit.OPTIONS | {"decoding": request.param})


def head_of(base, seed=0) -> TokenHead:
    return TokenHead(base, CONFIG, generator=torch.Generator().manual_seed(seed))


def noise_for(base, batch):
    return None if base.spec.noise_shape is None else torch.randn(batch, *base.spec.noise_shape)


def episode(base, decisions: int, seed: int, success: float, group: int = 0) -> RoundEpisode:
    generator = torch.Generator().manual_seed(seed)
    states = base.encode(kit.seen(decisions + 1, seed=seed))
    return RoundEpisode(
        conditioning=states[:-1], next_conditioning=states[1:], noise=torch.zeros(decisions, 0),
        exploration=torch.randn(decisions, 3, generator=generator), reward=torch.zeros(decisions), steps=torch.ones(decisions, dtype=torch.long),
        discount=torch.full((decisions,), 0.99), success=success, group=group,
    )  # fmt: skip


def test_a_fresh_head_is_the_base(base):
    conditioning, noise = base.encode(kit.seen(3)), noise_for(base, 3)
    head = head_of(base)
    proposal = head.propose(conditioning, base, noise, None, "eval")
    assert torch.equal(proposal.chunk, proposal.chunk_base)
    explored = head.propose(conditioning, base, noise, torch.randn(3, head.exploration_dim), "explore")
    assert not torch.equal(explored.chunk, explored.chunk_base)
    assert all(n.startswith("factors.") for n in head.state_dict())
    proved = head.propose(torch.zeros(1, base.spec.conditioning_dim), base, noise_for(base, 1), torch.zeros(1, 3), "explore")
    assert torch.isfinite(proved.chunk).all()  # a version is proved on a row of zeros before it acts


def test_the_divergence_starts_at_nothing_and_the_words_are_those_that_were_played(base):
    learner = OnPolicyLearner(base, head_of(base), OnPolicyConfig(advantage="rloo"))
    played = episode(base, 4, seed=7, success=1.0)
    written = learner.stochastic.trace(played)
    chunk = learner.head.propose(played.conditioning, base, noise_for(base, 4), played.exploration, "explore").chunk
    assert torch.equal(base.values(written), chunk)
    log_prob, divergence = learner.stochastic.log_prob(played.conditioning, written)
    assert log_prob.shape == (4, 3)
    assert float(divergence.detach().abs().max()) < 1e-5


@pytest.mark.parametrize("advantage", ["rloo", "gae"])
def test_what_succeeded_becomes_likelier(base, advantage):
    config = OnPolicyConfig(
        advantage=advantage, lr=3e-3, epochs=4, denoise_gamma=1.0, kl_base=0.0, value_hidden=(8,), target_kl=10.0
    )
    learner = OnPolicyLearner(base, head_of(base), config)
    good, bad = episode(base, 6, seed=1, success=1.0), episode(base, 6, seed=2, success=0.0)
    good.reward[:] = 1.0
    bad.reward[:] = -1.0
    traces = [learner.stochastic.trace(e) for e in (good, bad)]

    def likelihood() -> list[float]:
        pairs = zip((good, bad), traces, strict=True)
        return [float(learner.stochastic.log_prob(e.conditioning, t)[0].sum().detach()) for e, t in pairs]

    before = likelihood()
    metrics = learner.learn([good, bad], batch_size=12)
    after = likelihood()
    assert learner.actor_updates > 0
    assert float(metrics["actor/kl"]) >= 0
    assert after[0] - before[0] > after[1] - before[1]
    assert after[0] > before[0]
    proposal = learner.head.propose(good.conditioning, base, noise_for(base, 6), None, "eval")
    assert torch.equal(proposal.chunk_base, base.sample(good.conditioning, proposal.noise))  # the base stays as it was
    resumed = OnPolicyLearner(base, head_of(base, seed=5), config)
    resumed.load_state_dict(learner.state_dict())
    assert torch.equal(resumed.head.propose(good.conditioning, base, proposal.noise, None, "eval").chunk, proposal.chunk)


def test_factors_merge_into_the_language_model(base):
    head = head_of(base)
    torch.manual_seed(0)
    for factor in head.factors.values():
        torch.nn.init.normal_(factor.b, std=0.05)
    conditioning = base.encode(kit.seen(3))
    prompt, written = base.prompts(conditioning), torch.zeros(3, 3, dtype=torch.long)
    wanted = base.network.log_probs(prompt, written, head.language)
    assert not torch.allclose(wanted, base.network.log_probs(prompt, written), atol=1e-3)
    merged = head.merged()
    assert len(merged) == 14  # seven layers in each of two blocks
    before = base.network.language.state_dict()
    assert all(n in before for n in merged)
    base.network.language.load_state_dict({**before, **merged})
    torch.testing.assert_close(base.network.log_probs(prompt, written), wanted, atol=1e-4, rtol=1e-4)


def test_other_bases_are_refused():
    with pytest.raises(ValueError, match="accepted are OpenVLA checkpoints"):
        TokenHead(SmoothBase(), CONFIG)
