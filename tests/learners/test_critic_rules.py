"""Expectile, conservative and calibrated critics equal their formulas; a critic may start from another run's."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipe_kit import FROZEN, gen, make, random_batch
from spine_kit import SmoothBase
from torch import Tensor

from robot_rl.learners.config import ConservativeConfig, OffPolicyConfig
from robot_rl.learners.critic_rules import copy_wider
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.reduce import reduce
from robot_rl.training.ingest import discounted_returns


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradient_of(loss: Tensor, network) -> Tensor:
    network.flat.zero_grad()
    loss.backward()
    return network.flat.grad.clone()


def critic_inputs(batch, actions: Tensor | None = None) -> Tensor:
    return torch.cat([batch.conditioning, (batch.action if actions is None else actions).flatten(1)], 1)


@pytest.mark.parametrize("algorithm", ["chunk_sac", "edit", "dsrl_na"])
@pytest.mark.parametrize("expectile", [0.7, 0.9])
def test_iql_equals_the_slow_reference(double, algorithm: str, expectile: float) -> None:
    learner = make(algorithm, offline_critic="iql", expectile=expectile, target_reduce="min", **FROZEN)
    batch = random_batch(learner.base)
    network = deepcopy(learner.value_rule.network)
    critic, target = deepcopy(learner.critic), deepcopy(learner.target)
    metrics = learner.update(batch, train_actor=False, offline=True)
    v = network(batch.conditioning)[0]
    q = reduce(target(critic_inputs(batch)), "min").detach()
    total = max(float(batch.weight.sum()), 1.0)
    loss = torch.zeros(())
    for j in range(len(v)):
        u = q[j] - v[j]
        loss = loss + batch.weight[j] * abs(expectile - float(u.detach() < 0)) * u**2 / total
    torch.testing.assert_close(metrics["value/loss"], loss.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(learner.value_rule.network.flat.grad, gradient_of(loss, network), atol=1e-9, rtol=1e-6)
    y = batch.reward + batch.discount * network(batch.next_conditioning)[0].detach()
    error = critic(critic_inputs(batch)) - y
    td = 0.5 * (batch.weight * error**2).sum() / total
    torch.testing.assert_close(metrics["critic/loss"], td.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(learner.critic.flat.grad, gradient_of(td, critic), atol=1e-9, rtol=1e-6)


def drawn_actions(learner, batch, n: int, state: Tensor) -> tuple[Tensor, Tensor | None]:
    """The learner's own draws in its own order: uniform, then the policy here, then the policy there; and log densities."""
    g = torch.Generator()
    g.set_state(state)
    b, dim = len(batch.reward), batch.action[0].numel()
    uniform = torch.rand(b, n, dim, generator=g) * 2 - 1
    base, head = learner.base, learner.head
    if learner.config.algorithm == "chunk_sac":
        parts, densities = [uniform], [torch.full((b, n), -dim * math.log(2))]
        for c in (batch.conditioning, batch.next_conditioning):
            mean, log_std = head.actor(c.repeat_interleave(n, 0))
            x = mean + log_std.exp() * torch.randn(mean.shape, generator=g)
            density = torch.distributions.Normal(mean, log_std.exp()).log_prob(x) - torch.log(1 - torch.tanh(x) ** 2)
            parts.append(torch.tanh(x).unflatten(0, (b, n)))
            densities.append(density.sum(-1).unflatten(0, (b, n)))
        return torch.cat(parts, 1).detach(), torch.cat(densities, 1).detach()
    parts = [uniform]
    for c in (batch.conditioning, batch.next_conditioning):  # residual_sac: head and base in turns
        columns = []
        for i in range(n):
            rows = base.sample(c, torch.randn(b, *base.spec.noise_shape, generator=g))[:, :2]
            if i % 2 == 0:
                mean, log_std = head.actor(torch.cat([c, rows.flatten(1)], 1))
                u = torch.tanh(mean + log_std.exp() * torch.randn(mean.shape, generator=g))
                rows = (rows + head.scale * u.unflatten(1, rows.shape[1:])).clamp(-1, 1)
            columns.append(rows.flatten(1))
        parts.append(torch.stack(columns, 1))
    return torch.cat(parts, 1).detach(), None


@pytest.mark.parametrize("algorithm", ["chunk_sac", "residual_sac"])
@pytest.mark.parametrize("loss", ["cql", "calql"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_conservative_terms_equal_the_slow_reference(double, algorithm: str, loss: str, temperature: float) -> None:
    """L = TD + alpha mean(D), half of it, per critic, with rows of weight 0 and returns that are not known."""
    conservative = ConservativeConfig(weight=3.0, temperature=temperature, samples=3)
    learner = make(algorithm, critic_loss=loss, conservative=conservative, target_reduce="mean", **FROZEN)
    batch = random_batch(learner.base)
    critic = deepcopy(learner.critic)
    seen: list[Tensor] = []
    next_input = learner.objective.next_input

    def spy(b, follow):
        out = next_input(b, follow)
        if not seen:
            seen.append(learner.generator.get_state())
        return out

    learner.objective.next_input = spy
    plain = make(algorithm, target_reduce="mean", **FROZEN)
    plain.update(batch)
    metrics = learner.update(batch)
    total = batch.weight.sum()
    n_critics, b = learner.critic.n_heads, len(batch.reward)
    samples, density = drawn_actions(learner, batch, 3, seen[0])
    q_data = critic(critic_inputs(batch))
    term, gaps, held = torch.zeros(()), torch.zeros(()), 0
    for i in range(n_critics):
        for j in range(b):
            values = []
            for k in range(9):
                q = critic(torch.cat([batch.conditioning[j], samples[j, k]])[None])[i, 0]
                if loss == "calql" and k >= 3 and batch.return_known[j] > 0 and q < batch.episode_return[j]:
                    q, held = batch.episode_return[j], held + 1
                values.append(q)
            if density is None:
                values.append(q_data[i, j])
                inner = torch.stack(values) / temperature
                d = temperature * (torch.logsumexp(inner, 0) - math.log(10)) - q_data[i, j]
            else:
                d = temperature * torch.logsumexp((torch.stack(values) - density[j]) / temperature, 0) - q_data[i, j]
            term = term + 3.0 * batch.weight[j] * d / total
            gaps = gaps + batch.weight[j] * d.detach() / total / n_critics
    torch.testing.assert_close(metrics["critic/gap"], gaps, atol=1e-5, rtol=0)
    expected = plain.critic.flat.grad + 0.5 * gradient_of(term, critic)
    torch.testing.assert_close(learner.critic.flat.grad, expected, atol=1e-8, rtol=1e-6)
    assert (held > 0) == (loss == "calql")
    torch.testing.assert_close(metrics["critic/calibrated"], torch.tensor(held / (n_critics * b * 9)), atol=1e-12, rtol=0)


def test_offline_phase_has_its_own_loss_and_reduction(double) -> None:
    batch = random_batch(SmoothBase())
    two_faced = make("chunk_sac", target_reduce="mean", offline_reduce="min", offline_critic="cql", **FROZEN)
    online, offline = make("chunk_sac", target_reduce="mean", **FROZEN), make("chunk_sac", target_reduce="min", **FROZEN)
    a, b = two_faced.update(batch), online.update(batch)
    assert torch.equal(a["critic/target"], b["critic/target"])
    assert "critic/gap" not in a
    again = make("chunk_sac", target_reduce="mean", offline_reduce="min", offline_critic="cql", **FROZEN)
    a, b = again.update(batch, offline=True), offline.update(batch)
    assert torch.equal(a["critic/target"], b["critic/target"])
    assert "critic/gap" in a


def test_returns_of_episodes_that_were_cut_off_go_on() -> None:
    """-1 a step for ever is -1 / (1 - gamma) from every step of a failure, never the truncated sum."""
    returns, _ = discounted_returns(np.full(5, -1.0, np.float32), 0.9, -1.0 / (1 - 0.9))
    np.testing.assert_allclose(returns, -10.0, rtol=1e-5)
    with pytest.raises(ValueError, match="failure_reward=-1"):
        OffPolicyConfig(failure_reward=-1.0, gamma=1.0)


def test_respect_a_wider_critic_starts_with_the_old_ones_values(double) -> None:
    """Q(s, a, more) = Q_pre(s, a) at the start, whatever the new inputs hold; and it learns from them afterwards."""
    old = CriticEnsemble(3, 5, (8, 8), layer_norm=True, generator=gen(1))
    new = CriticEnsemble(3, 9, (8, 8), layer_norm=True, generator=gen(2))
    copy_wider(new, old.state_dict())
    x = torch.randn(20, 5, generator=gen(3))
    wide = torch.cat([x, 100 * torch.randn(20, 4, generator=gen(4))], 1)
    torch.testing.assert_close(new.value(wide), old.value(x), atol=1e-12, rtol=0)
    new.loss_and_grad(wide, torch.ones(20))
    assert float(new.weight[0].grad[:, 5:].abs().min()) > 0
    with pytest.raises(ValueError, match=r"weight\.0 has shape"):
        copy_wider(old, new.state_dict())
    with pytest.raises(ValueError, match="no more inputs"):
        copy_wider(CriticEnsemble(2, 9, (8, 8), layer_norm=True), old.state_dict())


def test_respect_warm_start_reaches_the_target_too() -> None:
    first, second = make("residual_sac"), make("residual_sac", base=SmoothBase(seed=5))
    second.warm_start(first.state_dict()["critic"]["network"])
    batch = random_batch(first.base)
    assert torch.equal(first.value(batch), second.value(batch))
    assert torch.equal(second.target.flat.data, second.critic.flat.data)


def test_cql_lowers_what_was_not_recorded() -> None:
    """The point of the term: after training, recorded actions are worth more than uniform ones by more than without it."""
    gaps = {}
    for loss in ("td", "cql"):
        learner = make("chunk_sac", critic_loss=loss, critic_lr=1e-2, conservative=ConservativeConfig(samples=2), n_critics=2)
        batch = replace(random_batch(learner.base, 24), discount=torch.zeros(24), reward=torch.zeros(24), weight=torch.ones(24))
        for _ in range(30):
            learner.update(batch, train_actor=False)
        away = replace(batch, action=torch.rand(batch.action.shape, generator=gen(8)) * 2 - 1)
        gaps[loss] = float(learner.value(batch).mean() - learner.value(away).mean())
    assert gaps["cql"] > gaps["td"] + 0.3
