"""Best of N and edits: how candidates are weighed, what a fresh head does, what is stored of a decision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from spine_kit import ARM, STATE, SmoothBase, compact, observations

from robot_rl.heads.best_of_n import BestOfNHead, choice_logits, divergence, pick, score, tilt
from robot_rl.heads.chunk_policy import ChunkPolicyHead
from robot_rl.heads.config import ChunkPolicyConfig, CorrectionConfig, EditConfig, SelectionConfig
from robot_rl.heads.edit import EditHead
from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.heads.residual import GaussianResidualHead
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.policies.base import prior_noise
from robot_rl.runtime.acting import ActingPolicy, DecisionRequest


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def critic(base, heads: int = 3) -> CriticEnsemble:
    return CriticEnsemble(
        heads, base.spec.conditioning_dim + base.spec.n_action_steps * base.spec.action.dim, (8,), generator=gen(9)
    )


def edit(base, **config) -> EditHead:
    return EditHead(base, EditConfig(**{"hidden": (8,), "candidates": 4, "edits": 2, **config}), critic(base), generator=gen(1))


def request(episode: int, index: int = 0) -> DecisionRequest:
    return DecisionRequest({STATE: np.random.default_rng(episode).normal(size=(1, 3)).astype("f4")}, ("t", episode), index, 0)


# ---- the choice


def test_eta_runs_from_the_best_to_an_even_draw() -> None:
    q = torch.tensor([[0.1, 0.5, 0.4]], dtype=torch.float64)
    cold, hot = (choice_logits(q, SelectionConfig(temperature=t)).softmax(-1) for t in (1e-4, 1e4))
    torch.testing.assert_close(cold, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(hot, torch.full((1, 3), 1 / 3, dtype=torch.float64), atol=1e-4, rtol=0)
    lots = torch.randn(20000, 3, generator=gen(1), dtype=torch.float64)
    chosen = pick(q.expand(20000, 3), SelectionConfig(temperature=0.2), lots)
    share = torch.bincount(chosen, minlength=3) / 20000
    torch.testing.assert_close(share.double(), (q[0] / 0.2).softmax(-1), atol=0.015, rtol=0)
    assert int(pick(q, SelectionConfig(temperature=0.2), None)) == 1  # eval takes the best


def test_bernoulli_risk_is_the_closed_form() -> None:
    p, eta = torch.tensor([[0.0, 0.2, 0.7, 1.0]], dtype=torch.float64), 0.3
    direct = eta * torch.log(1 - p + p * math.exp(1 / eta))  # eta log E exp(Z / eta), Z ~ Bernoulli(p)
    torch.testing.assert_close(eta * tilt(p, eta, "bernoulli"), direct, atol=1e-12, rtol=0)
    sampled = torch.tensor([0.0, 1.0], dtype=torch.float64)
    z = eta * torch.logsumexp(sampled / eta + torch.log(torch.tensor([0.3, 0.7], dtype=torch.float64)), 0)
    torch.testing.assert_close(direct[0, 2], z, atol=1e-12, rtol=0)


def test_the_kl_budget_is_kept_and_used_up() -> None:
    q = torch.randn(50, 8, generator=gen(2), dtype=torch.float64)
    for budget in (0.05, 0.5, 1.5):
        logits = choice_logits(q, SelectionConfig(kl_budget=budget))
        spent = divergence(logits)
        assert float(spent.max()) <= budget + 1e-9
        torch.testing.assert_close(spent, torch.full_like(spent, budget), atol=1e-3, rtol=0)
        p = logits.softmax(-1)
        torch.testing.assert_close(spent, math.log(8) + (p * p.log()).sum(-1), atol=1e-9, rtol=0)
    free = choice_logits(q, SelectionConfig(temperature=2.0, kl_budget=1.9))
    torch.testing.assert_close(free.softmax(-1), (q / 2.0).softmax(-1))  # within the budget nothing is raised
    with pytest.raises(ValueError, match="risk='bernoulli'"):
        SelectionConfig(risk="bernoulli")


def test_optimism_prefers_the_arm_that_critics_disagree_about() -> None:
    class Table:
        def reduced_value(self, x, how, generator=None, *, k=1.0):
            q = torch.stack([x[:, -1] * 0 + 1.0 - x[:, -1], x[:, -1] * 0 + 1.0 + x[:, -1]])  # mean 1, std = the action
            from robot_rl.learners.reduce import reduce

            return reduce(q, how, k=k)

    candidates = torch.tensor([0.1, 0.9, 0.5]).reshape(1, 3, 1, 1)
    optimistic = score(Table(), torch.zeros(1, 2), candidates, SelectionConfig(select_reduce="lcb", select_k=-1.0))
    cautious = score(Table(), torch.zeros(1, 2), candidates, SelectionConfig(select_reduce="lcb", select_k=1.0))
    assert (int(optimistic.argmax()), int(cautious.argmax())) == (1, 0)


def test_scoring_many_at_once_or_one_by_one_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from robot_rl.heads import best_of_n

    base, c, rows = SmoothBase(), torch.randn(6, 3, generator=gen(1)), torch.randn(6, 4, 2, 3, generator=gen(2))
    at_once = score(critic(base), c, rows, SelectionConfig())
    noise = torch.randn(6, 4, 3, 3, generator=gen(3))
    sampled = best_of_n.base_candidates(base, c, noise, 4)
    monkeypatch.setattr(best_of_n, "AT_ONCE", 3)
    torch.testing.assert_close(score(critic(base), c, rows, SelectionConfig()), at_once, atol=1e-6, rtol=0)
    torch.testing.assert_close(best_of_n.base_candidates(base, c, noise, 4), sampled, atol=1e-6, rtol=0)


def test_a_pair_of_critics_ranks_alone_and_acting_ranks_by_its_expectation() -> None:
    base, c, rows = SmoothBase(), torch.randn(6, 3, generator=gen(1)), torch.randn(6, 4, 2, 3, generator=gen(2))
    scorer = critic(base)
    values = scorer.value(torch.cat([c.unsqueeze(1).expand(6, 4, 3), rows.flatten(2)], -1).flatten(0, 1)).unflatten(1, (6, 4))
    drawn, expected = SelectionConfig(select_reduce="min_pair"), SelectionConfig()
    pair = torch.tensor([0, 1])
    torch.testing.assert_close(score(scorer, c, rows, drawn, pair=pair), values[pair].amin(0), atol=1e-6, rtol=0)
    assert torch.equal(score(scorer, c, rows, drawn), score(scorer, c, rows, expected))


# ---- heads


def test_best_of_n_runs_one_of_the_bases_own_chunks() -> None:
    base = SmoothBase()
    head = BestOfNHead(base, SelectionConfig(candidates=5), critic(base))
    c, noise = torch.randn(7, 3, generator=gen(1)), torch.randn(7, 5, 3, 3, generator=gen(2))
    proposal = head.propose(c, base, noise, None, "eval")
    for i in range(7):
        own = [base.sample(c[i : i + 1], noise[i, j][None])[0] for j in range(5)]
        j = int(proposal.candidate_index[i])
        torch.testing.assert_close(proposal.chunk[i], own[j], atol=1e-6, rtol=0)
        assert torch.equal(proposal.noise[i], noise[i, j])
        best = max(range(5), key=lambda k: float(score(head.critic, c[i : i + 1], own[k][None, None, :2], head.config)))
        assert j == best
    assert torch.equal(proposal.chunk, proposal.chunk_base)
    with pytest.raises(ValueError, match="takes noise"):
        BestOfNHead(SmoothBase(noise=False), SelectionConfig(), critic(base))


def test_row_16_corrections_and_fine_tuning_start_as_the_base_bit_for_bit() -> None:
    for kind in ("diffusion", "flow"):
        base = compact(kind)
        c, noise = base.encode(observations(base, 16)), prior_noise(base, 16, gen(1))
        for head in (GaussianResidualHead(base, CorrectionConfig(hidden=(8,)), generator=gen(1)), FineTunedHead(base)):
            for mode in ("eval", "explore") if head.KIND == "fine_tuned" else ("eval",):
                assert torch.equal(head.propose(c, base, noise, None, mode).chunk, base.sample(c, noise))
        head = FineTunedHead(base)
        before = base.spec.base_hash
        with torch.no_grad():
            head.denoiser.input.weight.add_(1.0)
        assert not torch.equal(head.propose(c, base, noise, None, "eval").chunk, base.sample(c, noise))
        assert base.freeze().spec.base_hash == before
    with pytest.raises(ValueError, match="does not hand them out"):
        FineTunedHead(SmoothBase())


def test_an_untrained_edit_changes_nothing_in_eval_and_little_in_explore() -> None:
    base = SmoothBase()
    head = edit(base, scale=0.05)
    c, noise = torch.randn(9, 3, generator=gen(1)), torch.randn(9, 4, 3, 3, generator=gen(2))
    calm = head.propose(c, base, noise, None, "eval")
    torch.testing.assert_close(calm.chunk, calm.chunk_base, atol=0, rtol=0)
    stirred = head.propose(c, base, noise, torch.randn(9, head.exploration_dim, generator=gen(3)), "explore")
    moved = (stirred.chunk - stirred.chunk_base).abs()
    assert 0 < float(moved.max()) <= 0.05 + 1e-6
    gripper = torch.from_numpy(ARM.gripper_mask)
    assert float(moved[..., gripper].max()) == 0.0  # row 18
    assert float(moved[:, 2:].max()) == 0.0  # rows that do not run
    edited = stirred.candidate_index >= 4
    assert torch.equal(torch.isfinite(stirred.log_prob), edited)


def test_an_edit_head_works_on_a_base_without_noise() -> None:
    base = SmoothBase(noise=False)
    head = edit(base)
    proposal = head.propose(torch.randn(4, 3, generator=gen(1)), base, None, torch.randn(4, head.exploration_dim), "explore")
    assert head.prior_draws == head.edits == 1
    assert set(proposal.candidate_index.tolist()) <= {0, 1}
    with pytest.raises(ValueError, match="edits=9"):
        EditConfig(edits=9)


# ---- acting


@pytest.mark.parametrize("kind", ["edit", "best", "sampled", "chunk"])
def test_decisions_belong_to_their_episode_and_say_what_was_chosen(kind: str) -> None:
    base = SmoothBase()
    head = {
        "edit": lambda: edit(base),
        "best": lambda: BestOfNHead(base, SelectionConfig(candidates=4), critic(base)),
        "sampled": lambda: BestOfNHead(base, SelectionConfig(candidates=4, temperature=0.3), critic(base)),
        "chunk": lambda: ChunkPolicyHead(base, ChunkPolicyConfig(hidden=(8,)), generator=gen(1)),
    }[kind]()
    policy = ActingPolicy(base, head, "explore", 2, base_share=0.4)
    asked = [request(e, i) for e in range(5) for i in range(3)]
    together, backwards = policy.decide(asked), policy.decide(asked[::-1])[::-1]
    plain = ActingPolicy(base).decide(asked)
    for one, again, own in zip(together, backwards, plain, strict=True):
        np.testing.assert_allclose(one.chunk, again.chunk, atol=1e-5)
        assert (one.candidate_index, one.explored) == (again.candidate_index, again.explored)
        assert one.noise.shape == (3, 3)
        if one.explored:
            np.testing.assert_allclose(one.chunk, own.chunk, atol=1e-6)
            assert (one.candidate_index, one.weights_version) == (-1, 0)
        elif kind != "chunk":
            assert one.candidate_index >= 0
            assert (one.candidate_index % 4 == 0) == np.array_equal(one.noise, own.noise)
    assert {d.explored for d in together} == {True, False}
    explore, evaluate = (ActingPolicy(base, head, m, 2).decide(asked) for m in ("explore", "eval"))
    if kind == "best":  # nothing is drawn but the candidates, and both modes meet the same ones
        assert all(np.array_equal(a.chunk, b.chunk) for a, b in zip(explore, evaluate, strict=True))


def test_handover_the_base_makes_the_first_decisions_bit_for_bit() -> None:
    base = SmoothBase()
    head = edit(base, scale=0.9)
    asked = [request(e, i) for e in range(12) for i in range(4)]
    plain = ActingPolicy(base).decide(asked)
    fixed = ActingPolicy(base, head, "explore", 2, handover=2).decide(asked)
    for r, a, b in zip(asked, plain, fixed, strict=True):
        assert b.explored == (r.index < 2)
        if r.index < 2:
            assert np.array_equal(a.chunk, b.chunk)
    drawn = ActingPolicy(base, head, "explore", 2, handover=2, handover_random=True).decide(asked)
    counts = [sum(d.explored for d in drawn[4 * e : 4 * e + 4]) for e in range(12)]
    assert set(counts) == {0, 1, 2}
    assert not any(d.explored for d in ActingPolicy(base, head, "eval", 2, handover=2).decide(asked))


def test_a_disturbed_base_stays_in_its_bounds_and_leaves_the_gripper() -> None:
    base = SmoothBase()
    asked = [request(e) for e in range(40)]
    plain, disturbed = (ActingPolicy(base, perturbation=p).decide(asked) for p in (0.0, 0.2))
    low, high = np.array(ARM.low), np.array(ARM.high)
    gaps = np.stack([(b.chunk - a.chunk) / (high - low) * 2 for a, b in zip(plain, disturbed, strict=True)])
    assert 0.15 < np.abs(gaps).max() <= 0.2 + 1e-5
    assert np.abs(gaps[..., ARM.gripper_mask]).max() == 0.0
    assert all(np.array_equal(a.chunk, b.chunk_base) for a, b in zip(plain, disturbed, strict=True))
