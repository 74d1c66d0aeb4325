"""DPOK, VARD and polychromic groups: advantages by hand, losses equal to slow references, exact resume."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from on_policy_kit import episode, make
from recipe_kit import gen, resumes_exactly, shaken

from robot_rl.learners.config import OnPolicyConfig
from robot_rl.learners.on_policy import diversity, polychromic, returns

DPOK = {"advantage": "return", "objective": "reinforce", "epochs": 1}
VARD = {"advantage": "return", "objective": "value_gradient", "target_kl": 1e6}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("terminated", [True, False])
def test_returns_by_hand(double, terminated: bool) -> None:
    e = episode(make("noise"), 4, 1, terminated=terminated)
    found = returns(e)
    for t in range(4):
        expected, factor = 0.0, 1.0
        for k in range(t, 4):
            expected += factor * float(e.reward[k])
            factor *= float(e.discount[k])
        assert float(found[t]) == pytest.approx(expected, abs=1e-9)


def log_density(learner, e, trace, i: int, k: int) -> torch.Tensor:
    if learner.head.KIND != "chain":
        mean, log_std = (x[0] for x in learner.head.actor(e.conditioning[i][None]))
        return torch.distributions.Normal(mean, log_std.exp()).log_prob(trace[i, 1]).sum()
    policy, first = learner.head.policy, learner.head.steps - learner.head.trained
    mean = policy.chain_step(first + k, trace[i, k][None], *policy.chain_inputs(e.conditioning[i][None]))[0]
    entry = torch.distributions.Normal(mean, learner.head.config.std).log_prob(trace[i, k + 1]).clamp(-5, 2)
    return entry.reshape(4, 3)[:3].mean()


def base_divergence(learner, e, trace, i: int) -> torch.Tensor:
    if learner.head.KIND != "chain":
        mean, log_std = (x[0] for x in learner.head.actor(e.conditioning[i][None]))
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        return torch.distributions.kl_divergence(torch.distributions.Normal(mean, log_std.exp()), prior).sum()
    total, first = torch.zeros(()), learner.head.steps - learner.head.trained
    for k in range(learner.head.trained):
        own, base = (
            p.chain_step(first + k, trace[i, k][None], *p.chain_inputs(e.conditioning[i][None]))[0]
            for p in (learner.head.policy, learner.base)
        )
        std = learner.head.config.std
        normals = torch.distributions.Normal(own, std), torch.distributions.Normal(base.detach(), std)
        total = total + torch.distributions.kl_divergence(*normals).sum()
    return total


@pytest.mark.parametrize(("kind", "sampler", "trained"), [("chain", "diffusion", 0), ("chain", "flow", 2), ("noise", "", 0)])
def test_dpok_equals_the_slow_reference(double, kind: str, sampler: str, trained: int) -> None:
    learner = make(kind, sampler, trained, kl_base=0.03, **DPOK)
    e = episode(learner, 6, 2, terminated=True)
    trace = learner.stochastic.trace(e).to(torch.get_default_dtype())
    kept, advantage, target = learner.advantages([e])
    assert (kept, target) == ([0], None)
    assert torch.equal(learner.shaped(advantage), returns(e))
    loss, _ = learner.loss(e.conditioning, trace, learner.remembered(e.conditioning, trace), advantage)
    steps = trace.shape[1] - 1
    slow = torch.zeros(())
    for i in range(6):
        slow = slow - advantage[i] * sum(log_density(learner, e, trace, i, k) for k in range(steps)) / 6
        slow = slow + 0.03 * base_divergence(learner, e, trace, i) / 6
    torch.testing.assert_close(loss, slow, atol=1e-5, rtol=0)
    network = learner.head.denoiser if kind == "chain" else learner.head.actor
    mine, theirs = (torch.autograd.grad(x, list(network.parameters()), allow_unused=True) for x in (loss, slow))
    for a, b in zip(mine, theirs, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("sampler", "trained"), [("diffusion", 0), ("flow", 2)])
def test_vard_equals_the_slow_reference(double, sampler: str, trained: int) -> None:
    learner = make("chain", sampler, trained, kl_base=0.02, value_lr=0.0, **VARD)
    shaken(learner.chain_value.network, 7)
    e = episode(learner, 5, 3, terminated=False)
    trace = learner.stochastic.trace(e)
    steps, std = trace.shape[1] - 1, learner.head.config.std
    noise = learner.remembered(e.conditioning, trace)
    drawn = e.exploration.reshape(5, steps, -1) * std
    torch.testing.assert_close(noise, drawn, atol=1e-10, rtol=0)  # what the steps really drew
    v, earned = deepcopy(learner.chain_value.network), returns(e)

    def value(i: int, x: torch.Tensor, t: float) -> torch.Tensor:
        return v(torch.cat([e.conditioning[i], x, torch.tensor([t])])[None])[0, 0]

    fit = sum(0.5 * (value(i, trace[i, k], k / steps) - earned[i]) ** 2 for i in range(5) for k in range(steps + 1))
    found = learner.chain_value.fit(e.conditioning, trace, earned)["value/loss"]
    torch.testing.assert_close(found, (fit / (5 * (steps + 1))).detach(), atol=1e-5, rtol=0)
    for p in learner.head.denoiser.parameters():  # a later epoch: the policy has moved, the draws have not
        p.data.add_(0.01 * torch.randn(p.shape, generator=gen(8)))
    loss, metrics = learner.loss(e.conditioning, trace, noise, earned)
    slow, first = torch.zeros(()), learner.head.steps - steps
    for i in range(5):
        for k in range(steps):
            policy = learner.head.policy
            mean = policy.chain_step(first + k, trace[i, k][None], *policy.chain_inputs(e.conditioning[i][None]))[0]
            slow = slow - value(i, mean + drawn[i, k], (k + 1) / steps) / (5 * steps)
        slow = slow + 0.02 * base_divergence(learner, e, trace, i) / 5
    torch.testing.assert_close(loss, slow, atol=1e-5, rtol=0)
    for a, b in zip(*(torch.autograd.grad(x, list(learner.head.denoiser.parameters())) for x in (loss, slow)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    assert float(metrics["actor/kl"]) > 0


def test_vards_gradient_raises_what_is_earned_within_its_budget() -> None:
    """Reward is the first entry of the chunk: the chain learns to raise it, and stops once the divergence is spent."""

    def play(learner, seed: int):
        e = episode(learner, 64, seed, terminated=True)
        chunk = learner.head.chain(e.conditioning, learner.base, e.noise, e.exploration)[:, -1]
        return replace(e, reward=chunk[:, 0], discount=torch.zeros(64)), float(chunk[:, 0].mean())

    learner = make("chain", "flow", lr=3e-3, value_lr=3e-3, epochs=4, kl_base=0.0, **VARD)
    rewards = []
    for r in range(20):
        e, mean = play(learner, r)
        rewards.append(mean)
        learner.learn([e], 32)
    assert rewards[-1] > rewards[0] + 0.1
    spent = learner.loss(
        e.conditioning, learner.stochastic.trace(e), learner.remembered(e.conditioning, learner.stochastic.trace(e)), e.reward
    )
    tight = make("chain", "flow", lr=1e-3, value_lr=3e-3, epochs=4, kl_base=0.0, **{**VARD, "target_kl": 1e-3})
    weights = tight.stochastic.flat.data.clone()
    tight.learn([play(tight, 0)[0]], 32)
    assert torch.equal(weights, tight.stochastic.flat.data)  # this policy starts beyond the budget
    assert float(spent[1]["actor/kl"]) > 1e-3


def test_polychromic_by_hand(double) -> None:
    """All sets written out: an advantage rewards success that comes by another way than the group's others."""
    learner = make("noise")
    paths = [torch.zeros(3, 3), torch.zeros(2, 3), torch.ones(4, 3), torch.randn(3, 3, generator=gen(1))]
    success = [1.0, 1.0, 1.0, 0.0]
    episodes = [
        replace(episode(learner, len(p), i, terminated=True, success=success[i], group=5), conditioning=p)
        for i, p in enumerate(paths)
    ]
    same_start = [replace(e, group=6, success=0.0) for e in episodes[:3]]
    found = polychromic(episodes + same_start, 2, 0.5)
    assert found[4:] == [None] * 3  # nobody succeeded: sets score alike and teach nothing
    scores = {}
    for i, j in combinations(range(4), 2):
        n = min(len(paths[i]), len(paths[j]))
        gap = float((paths[i][:n] - paths[j][:n]).square().mean().sqrt())
        scores[i, j] = (success[i] + success[j]) / 2 * (1 - float(torch.exp(torch.tensor(-gap / 0.5))))
    mean = sum(scores.values()) / 6
    for i in range(4):
        own = [f - mean for pair, f in scores.items() if i in pair]
        assert found[i] == pytest.approx(sum(own) / 3, abs=1e-6)
    assert sum(found[:4]) == pytest.approx(0.0, abs=1e-9)  # row 27
    assert found[2] > found[0]  # it got there another way
    assert diversity(paths[:1], 1.0) == 0.0
    assert polychromic(episodes, 5, 1.0) == [None] * 4


def test_both_goals_stay_where_success_alone_would_keep_one() -> None:
    """Two ways to succeed, five of six episodes go left: success alone pays both alike, sets pay the rare one more."""
    learner = make("noise")
    sides = [-1.0] * 5 + [1.0]
    episodes = [
        replace(episode(learner, 3, i, terminated=True, success=1.0), conditioning=torch.full((3, 3), s))
        for i, s in enumerate(sides)
    ]
    from robot_rl.learners.on_policy import rloo

    assert rloo([1.0] * 6, [0] * 6) == [None] * 6
    found = polychromic(episodes, 3, 1.0)
    assert found[5] > 0 > found[0]


@pytest.mark.parametrize("config", [DPOK, VARD, {"advantage": "polychromic", "set_size": 2}])
def test_row_11_resumes_bit_for_bit(config: dict) -> None:
    def rounds(learner, numbers) -> None:
        for r in numbers:
            learner.learn(
                [episode(learner, 5, 10 * r + i, terminated=True, success=float(i % 2), group=r) for i in range(4)], 8
            )

    straight = resumes_exactly(lambda: make("chain", lr=1e-3, **config), rounds, 4)
    assert straight.actor_updates > 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="epochs=10 with objective='reinforce'"):
        OnPolicyConfig(objective="reinforce")
    with pytest.raises(ValueError, match="advantage='gae' with objective='value_gradient'"):
        OnPolicyConfig(objective="value_gradient")
    with pytest.raises(ValueError, match="never reads them"):
        OnPolicyConfig(set_size=3)
    with pytest.raises(ValueError, match="this head is latent_noise"):
        make("noise", **VARD)
