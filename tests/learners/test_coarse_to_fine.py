"""CQN and CQN-AS: zooming by hand, the loss equal to a slow reference, one network that chooses, exact resume, and a bowl's bottom."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from recipe_kit import gen, random_batch, resumes_exactly, shaken
from spine_kit import SmoothBase

from robot_rl.heads.coarse_to_fine import CoarseToFineHead
from robot_rl.heads.config import CoarseToFineConfig
from robot_rl.learners.batch import Batch
from robot_rl.learners.coarse_to_fine import CoarseToFineLearner, project
from robot_rl.learners.config import CoarseToFineLearnerConfig
from robot_rl.types import ActionSpec

SHAPE = {"levels": 2, "bins": 3, "atoms": 7, "hidden": 8}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(base=None, shape: dict | None = None, **config) -> CoarseToFineLearner:
    base = base or SmoothBase()
    head = CoarseToFineHead(base, CoarseToFineConfig(**{**SHAPE, **(shape or {})}), generator=gen(1))
    head = head.to(torch.get_default_dtype())
    learner = CoarseToFineLearner(base, head, CoarseToFineLearnerConfig(**config))
    shaken(learner, 3, 0.5)
    learner.average.data.add_(0.5 * torch.randn(learner.average.data.shape, generator=gen(4)).to(learner.average.data))
    return learner


def batch_with_strata(base, seed: int = 0) -> Batch:
    return replace(random_batch(base, seed=seed), stratum=torch.tensor([0, 1, 2, 1] * 3))


def test_projection_by_hand(double) -> None:
    support = torch.linspace(-1, 1, 5)
    p = torch.tensor([[[0.0, 0, 0, 1, 0]], [[0.5, 0, 0, 0, 0.5]], [[0.2, 0.2, 0.2, 0.2, 0.2]]])
    found = project(p, torch.tensor([0.1, 0.0, 5.0]), torch.tensor([0.8, 0.5, 0.9]), support)
    torch.testing.assert_close(found[0, 0], torch.tensor([0, 0, 0, 1.0, 0]))  # 0.1 + 0.8 * 0.5 is an atom
    torch.testing.assert_close(found[1, 0], torch.tensor([0, 0.5, 0, 0.5, 0]))
    torch.testing.assert_close(found[2, 0], torch.tensor([0, 0, 0, 0, 1.0]))  # beyond the last atom
    between = project(p[:1], torch.tensor([0.2]), torch.tensor([0.0]), support)
    torch.testing.assert_close(between[0, 0], torch.tensor([0, 0, 0.6, 0.4, 0]))


def test_intervals_by_hand() -> None:
    head = CoarseToFineHead(SmoothBase(), CoarseToFineConfig(levels=2, bins=5), generator=gen(1))
    centres, bins = head.encode(torch.tensor([[-1.0, 0.0, 0.99, 1.0, 0.27, -0.61]]))
    assert bins[0].tolist() == [[0, 2, 4, 4, 3, 0]]
    assert bins[1].tolist() == [[0, 2, 4, 4, 0, 4]]
    torch.testing.assert_close(centres[1][0], torch.tensor([-0.8, 0.0, 0.8, 0.8, 0.4, -0.8]))
    rounded = head.rounded(torch.tensor([[-1.0, 0.0, 0.99, 1.0, 0.27, -0.61]]))
    torch.testing.assert_close(rounded[0], torch.tensor([-0.96, 0.0, 0.96, 0.96, 0.24, -0.64]))
    assert torch.equal(head.rounded(rounded), rounded)


@pytest.mark.parametrize("sequence", [False, True])
def test_acting_and_targets_zoom_with_one_network(sequence: bool) -> None:
    """Row 9: the released code acts with the target network and backs up at what the trained one would do."""
    learner = make(shape={"sequence": sequence})
    head, c = learner.head, torch.randn(6, 3, generator=gen(1))
    entries = head.zoom(c)
    for i in range(6):  # one state at a time, one entry's interval after the other
        low, high = [-1.0] * 6, [1.0] * 6
        for level in range(2):
            centre = torch.tensor([[(a + b) / 2 for a, b in zip(low, high, strict=True)]])
            p = torch.softmax(head.network(c[i : i + 1], centre, level)[0], -1)
            for d in range(6):
                q = [sum(float(p[d, k, z]) * (-2 + 4 * z / 6) for z in range(7)) for k in range(3)]
                step = (high[d] - low[d]) / 3
                low[d] += step * q.index(max(q))
                high[d] = low[d] + step
        torch.testing.assert_close(
            entries[i], torch.tensor([(a + b) / 2 for a, b in zip(low, high, strict=True)]), atol=1e-6, rtol=0
        )
    noise = torch.randn(6, 3, 3, generator=gen(2))
    assert torch.equal(head.propose(c, learner.base, noise, None, "eval").chunk[:, :2].flatten(1), entries)
    asked: list[torch.Tensor] = []
    distributions = learner.distributions
    learner.distributions = lambda network, states, e: (asked.append(e), distributions(network, states, e))[1]
    learner.target(
        replace(batch_with_strata(learner.base), next_conditioning=c, reward=torch.zeros(6), discount=torch.ones(6)), False
    )
    assert torch.equal(asked[0], entries)
    drawn = head.propose(c, learner.base, noise, torch.randn(6, 6, generator=gen(3)), "explore").chunk[:, :2].flatten(1)
    assert torch.equal(head.rounded(drawn), drawn)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("follow", "config"), [(False, {}), (True, {"dominance": False}), (False, {"bc_weight": 0.0})])
def test_loss_equals_the_slow_reference(double, sequence: bool, follow: bool, config: dict) -> None:
    learner = make(shape={"sequence": sequence}, lr=0.0, weight_decay=0.0, margin=0.3, critic_weight=0.7, **config)
    b, head, c = batch_with_strata(learner.base), learner.head, learner.config
    g = torch.Generator()
    g.set_state(learner.generator.get_state())
    online, acting = deepcopy(learner.online), deepcopy(head.network)
    metrics = learner.update(b, train_actor=not follow)
    noise = torch.randn(12, 3, 3, generator=g) if follow else None
    z = [-2 + 4 * k / 6 for k in range(7)]
    td, norm, cloned = torch.zeros(()), 0.0, torch.zeros(())
    for i in range(12):
        following = learner.base.sample(b.next_conditioning[i : i + 1], noise[i : i + 1])[:, :2].flatten(1) if follow else None
        if following is None:
            following = head.zoom(b.next_conditioning[i : i + 1], acting)
        entropy, behind = torch.zeros(()), torch.zeros(())
        there, here = head.encode(following), head.encode(b.action[i].flatten()[None])
        for level in range(2):
            p_next = acting(b.next_conditioning[i : i + 1], there[0][level], level)[0].softmax(-1).detach()
            p_here = online(b.conditioning[i : i + 1], here[0][level], level)[0].softmax(-1)
            for d in range(6):
                m = [0.0] * 7
                for k in range(7):
                    value = min(max(float(b.reward[i] + b.discount[i] * z[k]), -2.0), 2.0)
                    at = (value + 2) / (4 / 6)
                    lower = min(int(at), 5)
                    mass = float(p_next[d, int(there[1][level][0, d]), k])
                    m[lower] += mass * (1 - (at - lower))
                    m[lower + 1] += mass * (at - lower)
                taken = p_here[d, int(here[1][level][0, d])]
                entropy = entropy - sum(m[k] * taken[k].log() for k in range(7)) / 12
                q = p_here[d] @ torch.tensor(z)
                q_taken = (taken * torch.tensor(z)).sum()
                for other in range(3):
                    behind = behind + (0.3 - (q_taken - q[other])).clamp(min=0) / 36
                    if c.dominance:
                        behind = behind + (taken.cumsum(0) - p_here[d, other].cumsum(0)).clamp(min=0).sum() / 36
        td, norm = td + b.weight[i] * entropy, norm + float(b.weight[i])
        cloned = cloned + (behind / 6 if int(b.stratum[i]) == 1 else 0.0)
    torch.testing.assert_close(metrics["critic/loss"], (td / norm).detach(), atol=1e-5, rtol=0)
    loss = 0.7 * td / norm
    if c.bc_weight:
        torch.testing.assert_close(metrics["critic/margin"], cloned.detach(), atol=1e-5, rtol=0)
        loss = loss + cloned
    gradient = torch.autograd.grad(loss, list(online.parameters()), allow_unused=True)
    for p, expected in zip(learner.online.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if expected is None else expected, atol=1e-8, rtol=1e-5)
    assert torch.equal(g.get_state(), learner.generator.get_state())


def test_a_batch_without_demonstrations_is_no_division_by_zero() -> None:
    learner = make()
    found = learner.update(replace(batch_with_strata(learner.base), stratum=torch.zeros(12)))
    assert float(found["critic/margin"]) == 0.0
    learner.check_finite()


@pytest.mark.parametrize("sequence", [False, True])
def test_row_11_resumes_bit_for_bit(sequence: bool) -> None:
    def play(learner, seeds) -> None:
        for s in seeds:
            b = batch_with_strata(learner.base, s)
            if s == 0:
                learner.pretrain(b)
                learner.finish_pretraining()
            learner.update(b, train_actor=s > 1)

    resumes_exactly(lambda: make(shape={"sequence": sequence}), play)


@pytest.mark.slow
def test_it_finds_the_bottom_of_a_bowl() -> None:
    """One entry, three levels of five bins: what it does lies within one part in 125 of the range of the best (and one bin more)."""
    base = SmoothBase(conditioning=1, horizon=1, n_action_steps=1, action=ActionSpec((-1.0,), (1.0,)))
    head = CoarseToFineHead(base, CoarseToFineConfig(hidden=64, value_min=-1.0, value_max=1.0), generator=gen(1))
    learner = CoarseToFineLearner(
        base, head, CoarseToFineLearnerConfig(lr=3e-3, weight_decay=0.0, critic_weight=1.0, bc_weight=0.0, tau=0.1)
    )
    g = gen(5)
    for _ in range(500):
        a = torch.rand(256, 1, 1, generator=g) * 2 - 1
        a[:128] = (learner.head.zoom(torch.zeros(128, 1)) + 0.2 * torch.randn(128, 1, generator=g)).clamp(-1, 1)[:, None]
        reward = 1 - (a[:, 0, 0] - 0.37).abs()
        learner.update(Batch(torch.zeros(256, 1), a, reward, torch.zeros(256), torch.zeros(256, 1), torch.ones(256)))
    assert abs(float(learner.head.zoom(torch.zeros(1, 1))) - 0.37) <= 2 * 2 / 125
