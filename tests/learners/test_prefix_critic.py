"""A critic of beginnings: causal, its targets those of the chain written out, cut windows teach, calibrated, resumed exactly."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from episodes_kit import buffer_for, recorded
from recipe_kit import FROZEN, gen, make, random_batch, resumes_exactly
from spine_kit import SmoothBase

from robot_rl.learners.config import ConservativeConfig, OffPolicyConfig, PrefixConfig
from robot_rl.learners.prefix_critic import Prefixes
from robot_rl.learners.reduce import reduce
from robot_rl.training.ingest import ingest
from robot_rl.types import Source

SHAPE = PrefixConfig(width=8, layers=2, heads=2)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prefix(algorithm: str = "one_step", base=None, **config):
    learner = make(algorithm, base, critic="prefix", prefix=SHAPE, **{"n_critics": 2, "target_reduce": "min", **config})
    return learner


def with_prefixes(base, seed: int = 0):
    g, n = gen(seed + 70), base.spec.n_action_steps
    b = random_batch(base, seed=seed)
    kind = b.reward.dtype
    alive = (torch.rand(12, n, generator=g) > 0.2).to(kind)
    return replace(b, prefixes=Prefixes(
        torch.randn(12, n, generator=g), 0.9 ** torch.arange(1, n + 1).to(kind) * alive,
        torch.randn(12, n, base.spec.conditioning_dim, generator=g), (torch.rand(12, n, generator=g) > 0.3).to(kind),
    ))  # fmt: skip


def test_later_rows_do_not_change_the_value_of_earlier_beginnings() -> None:
    critic = prefix(base=SmoothBase(horizon=4, n_action_steps=4)).critic
    x = torch.randn(5, 3 + 12, generator=gen(1))
    other = x.clone()
    other[:, 3 + 6 :] = torch.randn(5, 6, generator=gen(2))  # the last two rows
    a, b = critic.prefixes(x), critic.prefixes(other)
    torch.testing.assert_close(a[..., :2], b[..., :2])
    assert float((a[..., 2:] - b[..., 2:]).detach().abs().min()) > 0
    assert torch.equal(critic.value(x), a[..., -1])


@pytest.mark.parametrize(("terminated", "final"), [(True, True), (False, True), (False, False)])
def test_targets_of_every_beginning_on_a_recorded_episode(double, terminated: bool, final: bool) -> None:
    """Against the sums written out; a held row, a missing reward, and an end that nobody saw each invalidate what contains them."""
    base = SmoothBase(conditioning=4, horizon=3, n_action_steps=3)
    learner, buffer = prefix(base=base, **FROZEN), buffer_for(base)
    e = recorded("a", 11, 3, terminated=terminated)
    e.source[4], e.reward[8] = int(Source.HOLD), np.nan
    e.meta.recovered = not final
    ingest(buffer, e, base)
    windows, rows = buffer.sample_prefixes(300, np.random.default_rng(1))
    assert set(windows.step.tolist()) == set(range(11))
    for i in range(300):
        t = int(windows.step[i])
        for j in range(1, 4):
            inside = range(t, t + j)
            ok = t + j <= 11 and 4 not in inside and 8 not in inside
            ok = ok and (t + j < 11 or terminated or final)
            assert bool(rows.weight[i, j - 1]) == ok, (t, j)
            if not ok:
                continue
            assert float(rows.reward[i, j - 1]) == pytest.approx(
                sum(0.9**k * float(e.reward[t + k]) for k in range(j)), abs=1e-5
            )
            assert float(rows.discount[i, j - 1]) == pytest.approx(0.0 if terminated and t + j == 11 else 0.9**j)
            np.testing.assert_array_equal(rows.next_conditioning[i, j - 1], buffer.conditioning(0)[t + j])
        full = t + 3 <= 11 or terminated
        assert bool(windows.weight[i]) == (
            full and not {4, 8} & set(range(t, min(t + 3, 11))) and (t + 3 < 11 or terminated or final)
        )
    assert rows.weight[(windows.step == 10)][:, 0].all() == (terminated or final)
    batch = learner.sample(buffer, np.random.default_rng(2), 16, None)
    assert math.isfinite(float(learner.update(replace(batch, **{
        k: getattr(batch, k).double() for k in ("conditioning", "next_conditioning", "action", "reward", "discount", "weight")
    }, prefixes=Prefixes(*(p.double() for p in batch.prefixes))))["critic/loss"]))  # fmt: skip


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("algorithm", ["one_step", "residual"])
def test_loss_equals_the_slow_reference(double, algorithm: str, follow: bool) -> None:
    learner = prefix(algorithm, **FROZEN)
    b, g = with_prefixes(learner.base), torch.Generator()
    g.set_state(learner.generator.get_state())
    critic, target, head, n = deepcopy(learner.critic), deepcopy(learner.target), deepcopy(learner.head), 2
    metrics = learner.update(b, train_actor=not follow)
    c = b.prefixes.next_conditioning.flatten(0, 1)
    noise = torch.randn(24, 3, 3, generator=g)
    rows = learner.base.sample(c, noise)[:, :n]
    if not follow and algorithm == "one_step":
        rows = head.actor(torch.cat([c, noise.flatten(1)], 1))[0].clamp(-1, 1).unflatten(1, (n, 3))
    elif not follow:
        u = torch.tanh(head.actor(torch.cat([c, rows.flatten(1)], 1))[0])
        jitter = (torch.randn(u.shape, generator=g) * head.config.exploration_std).clamp(-0.3, 0.3)
        rows = head.combine(rows, (u + jitter).clamp(-1, 1))
    with torch.no_grad():
        v = target(torch.cat([c, rows.flatten(1)], 1)).amin(0).view(12, n)
    total, valid = torch.zeros(()), max(float(b.prefixes.weight.sum()), 1.0)
    for i in range(12):
        for j in range(n):
            y = b.prefixes.reward[i, j] + b.prefixes.discount[i, j] * v[i, j]
            cut = torch.cat([b.conditioning[i], b.action[i].flatten()])[None]
            for network in critic.networks:
                q = network(cut[:, :3], cut[:, 3:].unflatten(1, (2, 3))[:, :n])[0, j]
                total = total + 0.5 * b.prefixes.weight[i, j] * (q - y) ** 2 / valid
    torch.testing.assert_close(metrics["critic/loss"], total.detach(), atol=1e-5, rtol=0)
    gradient = torch.autograd.grad(total, list(critic.parameters()))
    for p, expected in zip(learner.critic.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, expected, atol=1e-8, rtol=1e-6)
    if not follow:  # the actor climbs the whole chunk's value
        noise = torch.randn(12, 3, 3, generator=g)
        base_rows = learner.base.sample(b.conditioning, noise)[:, :n]
        if algorithm == "one_step":
            raw = head.actor(torch.cat([b.conditioning, noise.flatten(1)], 1))[0]
            a, distance = raw.clamp(-1, 1), 100.0 * ((raw - base_rows.flatten(1)) ** 2).mean()
        else:
            u = torch.tanh(head.actor(torch.cat([b.conditioning, base_rows.flatten(1)], 1))[0])
            a, distance = head.combine(base_rows, u).flatten(1), 0.0
        loss = distance - reduce(critic(torch.cat([b.conditioning, a], 1)), "mean").mean()
        for p, expected in zip(
            learner.head.actor.parameters(), torch.autograd.grad(loss, list(head.actor.parameters())), strict=True
        ):
            torch.testing.assert_close(p.grad, expected, atol=1e-8, rtol=1e-6)
    elif algorithm == "one_step":
        torch.randn(12, 3, 3, generator=g)  # the student is taught all the same
    assert torch.equal(g.get_state(), learner.generator.get_state())


@pytest.mark.parametrize("rule", ["cql", "calql"])
def test_the_conservative_term_is_that_of_chunk_critics(double, rule: str) -> None:
    """Every gap by hand, from the very actions that were drawn."""
    settings = ConservativeConfig(weight=3.0, samples=2, temperature=0.7)
    plain = prefix(**FROZEN)
    learner = prefix(**FROZEN, critic_loss=rule, conservative=settings)
    b = with_prefixes(learner.base)
    plain.update(b)
    state = learner.generator.get_state()
    from robot_rl.learners import prefix_critic

    drawn: list[torch.Tensor] = []
    actions = prefix_critic._actions
    prefix_critic._actions = lambda *a: (drawn.append(actions(*a)), drawn[-1])[1]
    try:
        metrics = learner.update(b)
    finally:
        prefix_critic._actions = actions
    samples, density, from_policy = drawn[0]
    assert density is None
    assert state is not None
    critic, total, gaps = deepcopy(learner.critic), torch.zeros(()), torch.zeros(())
    for network in range(2):
        for i in range(12):

            def q(a, _n=network, _i=i):
                return critic(torch.cat([b.conditioning[_i], a])[None])[_n, 0]

            values = []
            for j in range(6):
                value = q(samples[i, j])
                if rule == "calql" and from_policy[j] and b.return_known[i]:
                    value = torch.maximum(value, b.episode_return[i])
                values.append(value)
            data = q(b.action[i].flatten())
            gap = 0.7 * torch.logsumexp(torch.stack([*values, data]) / 0.7, 0) - 0.7 * math.log(7) - data
            gaps = gaps + b.weight[i] * gap / b.weight.sum() / 2
            total = total + 0.5 * 3.0 * b.weight[i] * gap / b.weight.sum()
    torch.testing.assert_close(metrics["critic/gap"], gaps.detach(), atol=1e-5, rtol=0)
    added = torch.autograd.grad(total, list(critic.parameters()), allow_unused=True)
    for p, q, expected in zip(learner.critic.parameters(), plain.critic.parameters(), added, strict=True):
        torch.testing.assert_close(p.grad - q.grad, torch.zeros_like(p) if expected is None else expected, atol=1e-8, rtol=1e-6)


def test_cut_windows_train_only_the_beginnings_that_ran() -> None:
    learner = prefix(critic_lr=1e-2)
    b = with_prefixes(learner.base)
    only_first = replace(b, weight=torch.zeros(12), prefixes=b.prefixes._replace(weight=torch.tensor([1.0, 0.0]).expand(12, 2)))
    nonsense = only_first.prefixes._replace(reward=torch.stack([b.prefixes.reward[:, 0], torch.full((12,), 1e6)], 1))
    one, two = prefix(critic_lr=1e-2), prefix(critic_lr=1e-2)
    one.update(only_first, train_actor=False)
    two.update(replace(only_first, prefixes=nonsense), train_actor=False)
    assert torch.equal(one.critic.flat.data, two.critic.flat.data)
    assert not torch.equal(one.critic.flat.data, learner.critic.flat.data)


def test_row_11_resumes_bit_for_bit() -> None:
    def play(learner, seeds) -> None:
        for s in seeds:
            learner.update(with_prefixes(learner.base, s), offline=s % 2 == 0)

    config = {"offline_critic": "calql", "actor_every": 2}
    resumes_exactly(lambda: prefix(**config), play)


def test_what_does_not_fit_is_refused() -> None:
    for change in (
        {"algorithm": "edit"},
        {"algorithm": "residual", "n_step": 2},
        {"algorithm": "residual", "critic_loss": "iql"},
    ):
        with pytest.raises(ValueError, match="critic='prefix'"):
            OffPolicyConfig(critic="prefix", **change)
    with pytest.raises(ValueError, match="never reads it"):
        OffPolicyConfig(prefix=PrefixConfig(width=4))
    with pytest.raises(ValueError, match="width a multiple of heads"):
        PrefixConfig(width=6, heads=4)
    with pytest.raises(ValueError, match="this batch has none"):
        prefix().update(random_batch(SmoothBase()))
