"""On-policy learning: advantages by hand, losses equal to slow references, one time grid, and chances that it raises."""

from __future__ import annotations

import math

import pytest
import torch
from on_policy_kit import episode, make
from recipe_kit import gen
from spine_kit import SmoothBase, TwoModeBase, compact
from torch import Tensor

from robot_rl.heads.chain import ChainHead
from robot_rl.heads.config import ChainConfig, LatentNoiseConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.learners.config import OnPolicyConfig
from robot_rl.learners.on_policy import OnPolicyLearner, RoundEpisode, gae, rloo
from robot_rl.training.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- advantages


def test_gae_by_hand_with_termination_and_truncation(double) -> None:
    """Three decisions of 2, 2 and 1 steps; at a time limit the true last observation is worth something, at an end nothing."""
    gamma, lam = 0.9, 0.8
    reward, steps = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([2, 2, 1])
    value, following = torch.tensor([0.5, 0.2, 0.4]), torch.tensor([0.2, 0.4, 0.7])
    for alive in (1.0, 0.0):
        discount = torch.tensor([0.81, 0.81, 0.9 * alive])
        d0, d1, d2 = 1 + 0.81 * 0.2 - 0.5, 0.81 * 0.4 - 0.2, 2 + 0.9 * alive * 0.7 - 0.4
        expected = torch.tensor([d0 + 0.81 * lam * (d1 + 0.81 * lam * d2), d1 + 0.81 * lam * d2, d2])
        torch.testing.assert_close(gae(reward, discount, steps, value, following, gamma, lam), expected)


def test_row_27_groups_sum_to_zero_and_constant_groups_are_dropped() -> None:
    success = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    found = rloo(success, [1, 1, 1, 2, 2, 3, 3, 4])
    assert sum(found[:3]) == pytest.approx(0.0)
    for i in range(3):
        others = [success[j] for j in range(3) if j != i]
        assert found[i] == pytest.approx(success[i] - sum(others) / 2)
    assert found[3:] == [None] * 5  # all ended alike, or nobody to compare with


# ---- likelihoods and the loss


@pytest.mark.parametrize("sampler", ["diffusion", "flow"])
@pytest.mark.parametrize("trained", [0, 2])
def test_row_26_a_chain_is_the_sampler_and_its_ratio_is_one(sampler: str, trained: int) -> None:
    """Without noise the chain ends where the sampler does, bit for bit; recomputed with unchanged weights its ratio is 1."""
    learner = make("chain", sampler, trained)
    head, base = ChainHead(learner.base, learner.head.config), learner.base
    e = episode(learner, 6, 1, terminated=True)
    calm = head.propose(e.conditioning, base, e.noise, None, "eval")
    assert torch.equal(calm.chunk, base.sample(e.conditioning, e.noise))
    stirred = learner.head.propose(e.conditioning, base, e.noise, e.exploration, "explore")
    trace = learner.stochastic.trace(e)
    assert torch.equal(trace[:, -1].clamp(-1, 1).unflatten(1, (4, 3)), stirred.chunk)
    assert trace.shape == (6, (trained or 4) + 1, 12)
    old = learner.stochastic.log_prob(e.conditioning, trace)[0]
    new = learner.stochastic.log_prob(e.conditioning[2:4], trace[2:4])[0]
    torch.testing.assert_close((new - old[2:4]).exp(), torch.ones(2, trained or 4), atol=1e-5, rtol=0)


def slow_loss(learner: OnPolicyLearner, e: RoundEpisode, trace: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Decision by decision and step by step, from the formulas."""
    c, total = learner.config, torch.zeros(())
    b, steps = old.shape
    for i in range(b):
        for k in range(steps):
            if learner.head.KIND == "chain":
                policy, std = learner.head.policy, learner.head.config.std
                first = learner.head.steps - steps
                mean = policy.chain_step(first + k, trace[i, k][None], *policy.chain_inputs(e.conditioning[i][None]))[0]
                entry = torch.distributions.Normal(mean, std).log_prob(trace[i, k + 1]).clamp(-5, 2)
                log_prob = entry.reshape(4, 3)[:3].mean()  # three of four rows run
                reference = learner.base
                anchor = reference.chain_step(first + k, trace[i, k][None], *reference.chain_inputs(e.conditioning[i][None]))[0]
                kl = torch.distributions.kl_divergence(
                    torch.distributions.Normal(mean, std), torch.distributions.Normal(anchor.detach(), std)
                ).sum()
            else:
                mean, log_std = (x[0] for x in learner.head.actor(e.conditioning[i][None]))
                normal = torch.distributions.Normal(mean, log_std.exp())
                log_prob = normal.log_prob(trace[i, 1]).sum()
                prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
                kl = torch.distributions.kl_divergence(normal, prior).sum()
            ratio = (log_prob - old[i, k]).exp()
            a = advantage[i] * c.denoise_gamma ** (steps - k - 1)
            t = k / (steps - 1) if steps > 1 else 1.0
            eps = c.clip_start + (c.clip - c.clip_start) * (math.exp(3 * t) - 1) / (math.exp(3) - 1)
            total = total - torch.minimum(ratio * a, ratio.clamp(1 - eps, 1 + eps) * a) / (b * steps) + c.kl_base * kl / b
    return total


@pytest.mark.parametrize(("kind", "sampler", "trained"), [("chain", "diffusion", 0), ("chain", "flow", 3), ("noise", "", 0)])
def test_loss_equals_the_slow_reference(double, kind: str, sampler: str, trained: int) -> None:
    learner = make(kind, sampler, trained, clip=0.05, clip_start=0.01, kl_base=0.03, denoise_gamma=0.9)
    e = episode(learner, 7, 2, terminated=False)
    trace = learner.stochastic.trace(e).to(torch.get_default_dtype())
    with torch.no_grad():
        old = learner.stochastic.log_prob(e.conditioning, trace)[0]
    old = old + 0.05 * torch.randn(old.shape, generator=gen(4))  # ratios on both sides of the clip
    advantage = torch.randn(7, generator=gen(5))
    loss, metrics = learner.loss(e.conditioning, trace, old, advantage)
    expected = slow_loss(learner, e, trace, old, advantage)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    assert 0 < float(metrics["actor/clipped"]) < 1
    parameters = list(learner.stochastic.flat.parameters)
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


def test_the_clip_grows_and_late_steps_count_most(double) -> None:
    """eps_0 = c0 and eps_last = c1; the clean end of the chain has the whole advantage."""
    learner = make("chain", clip=0.01, clip_start=0.001, kl_base=0.0, denoise_gamma=0.5)
    e = episode(learner, 1, 2, terminated=True)
    trace = learner.stochastic.trace(e).to(torch.get_default_dtype())
    with torch.no_grad():
        old = learner.stochastic.log_prob(e.conditioning, trace)[0] - 1.0  # far beyond every clip, upwards
    loss, _ = learner.loss(e.conditioning, trace, old, torch.ones(1))
    eps = [0.001 + 0.009 * (math.exp(3 * k / 3) - 1) / (math.exp(3) - 1) for k in range(4)]
    assert (eps[0], eps[3]) == (0.001, pytest.approx(0.01))
    expected = -sum(0.5 ** (3 - k) * (1 + eps[k]) for k in range(4)) / 4
    assert float(loss) == pytest.approx(expected)


# ---- rounds


def test_value_warms_up_alone_and_a_round_that_teaches_nothing_changes_nothing() -> None:
    learner = make("noise", critic_warmup_rounds=1, epochs=2, kl_base=0.0)
    before, value = learner.stochastic.flat.data.clone(), learner.value.flat.data.clone()
    played = [episode(learner, 5, s, terminated=bool(s % 2)) for s in range(3)]
    learner.learn(played, 4)
    assert torch.equal(learner.stochastic.flat.data, before)
    assert not torch.equal(learner.value.flat.data, value)
    learner.learn(played, 4)
    assert not torch.equal(learner.stochastic.flat.data, before)
    leave_one_out = make("noise", advantage="rloo")
    before = leave_one_out.stochastic.flat.data.clone()
    failed = [episode(leave_one_out, 5, s, terminated=False, group=s // 2) for s in range(4)]
    assert float(leave_one_out.learn(failed, 4)["round/decisions"]) == 0.0
    assert torch.equal(leave_one_out.stochastic.flat.data, before)


@pytest.mark.parametrize("kind", ["chain", "noise"])
def test_row_11_resumes_bit_for_bit(kind: str, tmp_path) -> None:
    straight, first, resumed = (make(kind, epochs=2) for _ in range(3))

    def rounds(learner, numbers):
        for r in numbers:
            learner.learn([episode(learner, 4, 10 * r + s, terminated=True) for s in range(2)], 3)

    rounds(straight, range(4))
    rounds(first, range(2))
    save_checkpoint(tmp_path, "here", {"learner": first.state_dict()}, {})
    resumed.load_state_dict(load_checkpoint(tmp_path / "here")[0]["learner"])
    rounds(resumed, range(2, 4))
    for a, b in zip(straight.head.parameters(), resumed.head.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(straight.value.parameters(), resumed.value.parameters(), strict=True))
    assert (straight.updates, straight.actor_updates) == (resumed.updates, resumed.actor_updates)


def test_a_target_divergence_stops_the_steps() -> None:
    learner = make("noise", epochs=50, target_kl=1e-4, lr=1e-2, kl_base=0.0)
    learner.learn([episode(learner, 8, 1, terminated=True)], 8)
    assert 1 <= learner.actor_updates < 50
    assert learner.updates == 50  # the value function goes on


@pytest.mark.parametrize("advantage", ["rloo", "gae"])
def test_two_modes_from_the_base_to_the_right_one(advantage: str) -> None:
    """One decision an episode, groups of eight from one state: which side is right depends on the state."""
    base, g = TwoModeBase(), gen(5)
    head = LatentNoiseHead(base, LatentNoiseConfig(hidden=(32, 32)), generator=gen(1))
    config = OnPolicyConfig(
        advantage=advantage, lr=1e-2, value_lr=1e-2, value_hidden=(32,), kl_base=0.0, epochs=4, target_kl=0.2
    )
    learner = OnPolicyLearner(base, head, config)

    def play(count: int) -> tuple[list[RoundEpisode], Tensor]:
        s = (torch.rand(count, 1, generator=g) * 2 - 1).repeat_interleave(8, 0)
        draws = torch.randn(len(s), 2, generator=g)
        chunk = head.propose(s, base, torch.zeros(len(s), 1, 2), draws, "explore").chunk
        right = (chunk[:, 0, 0] * s[:, 0] > 0).float()
        ones = torch.ones(1)
        return [
            RoundEpisode(s[i : i + 1], s[i : i + 1], torch.zeros(1, 1, 2), draws[i : i + 1], right[i] * ones,
                         torch.ones(1, dtype=torch.long), 0 * ones, float(right[i]), i // 8)
            for i in range(len(s))
        ], right  # fmt: skip

    before = float(play(100)[1].mean())
    for _ in range(20):
        learner.learn(play(16)[0], 128)
    assert before < 0.6
    assert float(play(100)[1].mean()) >= 0.9


def test_other_heads_are_refused_and_so_are_odd_numbers() -> None:
    from robot_rl.heads.config import ResidualConfig
    from robot_rl.heads.residual import ResidualHead

    with pytest.raises(ValueError, match="trains a chain, latent_noise or token head; this one is residual"):
        OnPolicyLearner(SmoothBase(), ResidualHead(SmoothBase(), ResidualConfig(hidden=(4,))), OnPolicyConfig())
    with pytest.raises(ValueError, match="trained_steps=9"):
        ChainHead(compact(), ChainConfig(trained_steps=9))
    with pytest.raises(ValueError, match=r"clip_start=0\.3"):
        OnPolicyConfig(clip_start=0.3)
    learner = make("noise")
    learner.stochastic.flat.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower lr"):
        learner.check_finite()
