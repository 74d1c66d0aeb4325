"""Distillation of several heads into one, and the one-step student of the base."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from recipe_kit import gen, make, random_batch, shaken
from spine_kit import SmoothBase, compact
from torch.distributions import Normal, kl_divergence

from robot_rl.heads.config import CorrectionConfig, DistilledConfig, LatentNoiseConfig, ResidualConfig
from robot_rl.heads.distilled import CodedBase, DistilledHead
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.residual import GaussianResidualHead, ResidualHead
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import DistillConfig, OffPolicyConfig, StudentConfig
from robot_rl.learners.distill import DistillBatch, DistillLearner, Teacher, gaussian_kl
from robot_rl.learners.one_step import StudentBase
from robot_rl.policies.base import prior_noise

HEADS = {
    "latent_noise": (LatentNoiseHead, LatentNoiseConfig(hidden=(16,))),
    "gaussian_residual": (GaussianResidualHead, CorrectionConfig(scale=0.5, hidden=(16,))),
    "residual": (ResidualHead, ResidualConfig(scale=0.5, hidden=(16,))),
}


def distiller(kind: str, base=None, teachers: int = 2, **config) -> DistillLearner:
    base = base or SmoothBase()
    cls, shape = HEADS[kind]
    found = []
    for i in range(teachers):
        head = cls(base, shape, generator=gen(i))
        shaken(head.actor, 10 + i, 0.5)
        found.append(Teacher(head, i, torch.randn(50, base.spec.conditioning_dim, generator=gen(20 + i))))
    student = DistilledHead(DistilledConfig(student=kind, slots=4, code=1), cls(CodedBase(base, 4), shape, generator=gen(7)))
    shaken(student.student.actor, 8, 0.2)
    return DistillLearner(base, student, DistillConfig(teachers=(), **config), found)


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("kind", sorted(HEADS))
def test_the_loss_is_the_plain_divergence_state_by_state(kind: str) -> None:
    learner = distiller(kind)
    batch = learner.sample(None, np.random.default_rng(0), 12)
    state = learner.generator.get_state()
    fast = learner.per_state(batch)
    learner.generator.set_state(state)
    base = learner.base
    noise = torch.randn(12, *base.spec.noise_shape, generator=learner.generator)
    slow = []
    for i in range(12):
        t = int(batch.teacher[i])
        c = batch.conditioning[i : i + 1]
        code = torch.zeros(1, 4)
        code[0, t] = 1.0
        coded, rows = torch.cat([c, code], 1), base.sample(c, noise[i : i + 1])[:, :2]
        own, student = learner.teachers[t].head, learner.head.student
        if kind == "residual":
            d = (own.unit_action(c, rows) - student.unit_action(coded, rows)) ** 2
        else:
            inputs = (c, coded) if kind == "latent_noise" else (torch.cat([x, rows.flatten(1)], 1) for x in (c, coded))
            p, q = (Normal(m, s.exp()) for m, s in (h.actor(x) for h, x in zip((own, student), inputs, strict=True)))
            d = kl_divergence(p, q)
        slow.append(d.mean())
    torch.testing.assert_close(fast, torch.stack(slow), atol=1e-5, rtol=0)
    learner.generator.set_state(state)
    metrics = learner.update(batch)
    for t in range(2):
        torch.testing.assert_close(
            metrics[f"distill/loss_{t}"], torch.stack(slow)[batch.teacher == t].mean().detach(), atol=1e-5, rtol=0
        )


def test_the_divergence_of_equals_is_zero() -> None:
    mean, log_std = torch.randn(3, 4, generator=gen()), torch.randn(3, 4, generator=gen(1))
    torch.testing.assert_close(gaussian_kl(mean, log_std, mean, log_std), torch.zeros(3, 4), atol=1e-6, rtol=0)


def test_two_linear_teachers_become_one_conditioned_student() -> None:
    """Specification 9: less than a hundredth of a nat a dimension for each teacher, who pull apart."""
    base = SmoothBase()
    cls, shape = LatentNoiseHead, LatentNoiseConfig(hidden=(64,), layer_norm=False)
    teachers = []
    for i, sign in enumerate((1.0, -1.0)):
        head = cls(base, LatentNoiseConfig(hidden=(2,), layer_norm=False), generator=gen(i))
        with (
            torch.no_grad()
        ):  # mean = sign * s_0 / 2 in every dimension, through relu(s_0) and relu(-s_0); standard deviation 1
            head.actor.flat.data.zero_()
            head.actor.weight[0][0, 0] = torch.tensor([1.0, -1.0])
            head.actor.weight[1][0, :, :9] = torch.tensor([[0.5 * sign], [-0.5 * sign]])
        teachers.append(Teacher(head, i, torch.randn(400, 3, generator=gen(5 + i))))
    student = DistilledHead(DistilledConfig(slots=2), cls(CodedBase(base, 2), shape, generator=gen(9)))
    learner = DistillLearner(base, student, DistillConfig(lr=3e-3), teachers)
    rng = np.random.default_rng(0)
    for _ in range(600):
        metrics = learner.update(learner.sample(None, rng, 128))
    assert max(float(metrics["distill/loss_0"]), float(metrics["distill/loss_1"])) < 1e-2
    one, two = (DistilledHead(DistilledConfig(slots=2, code=c), student.student) for c in (0, 1))
    c, w = torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1, 3, 3)
    gap = one.propose(c, base, w, None, "eval").noise - two.propose(c, base, w, None, "eval").noise
    assert float(gap.abs().max()) > 1.0, "the code decides"


def test_a_distiller_resumes_exactly_and_refuses_what_does_not_fit() -> None:
    a, b = distiller("gaussian_residual"), distiller("gaussian_residual")
    rng = np.random.default_rng(0)
    batches = [a.sample(None, rng, 8) for _ in range(4)]
    for batch in batches[:2]:
        a.update(batch)
    b.load_state_dict(a.state_dict())
    for batch in batches[2:]:
        a.update(batch)
        b.update(batch)
    assert torch.equal(a.student.actor.flat.data, b.student.actor.flat.data)
    assert a.updates == b.updates == 4
    base = SmoothBase()
    student = DistilledHead(
        DistilledConfig(slots=2), LatentNoiseHead(CodedBase(base, 2), LatentNoiseConfig(hidden=(8,)), generator=gen())
    )
    wide = LatentNoiseHead(base, LatentNoiseConfig(noise_bound=2.5, hidden=(8,)), generator=gen())
    states = torch.zeros(1, 3)
    for teachers, why in (
        ([], "at least one finished run"), ([Teacher(wide, 0, states)], "noise_bound=2.5"),
        ([Teacher(ResidualHead(base, ResidualConfig(hidden=(8,)), generator=gen()), 0, states)], "residual head"),
        ([Teacher(LatentNoiseHead(base, LatentNoiseConfig(hidden=(8,)), generator=gen()), 5, states)], "slots=2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            DistillLearner(base, student, DistillConfig(), teachers)
    assert isinstance(batches[0], DistillBatch)


# ---- the one-step student


def test_the_student_learns_the_bases_map_and_takes_over_only_then() -> None:
    base = compact("flow", horizon=2, n_action_steps=2)
    student = StudentBase(base, StudentConfig(hidden=(64, 64), lr=3e-3, tolerance=0.06), gen(1), 2, torch.device("cpu"))
    c = torch.randn(256, base.spec.conditioning_dim, generator=gen(3))
    w = prior_noise(base, 256, gen(4))
    assert torch.equal(student.sample(c, w), base.sample(c, w)), "until it is good enough the base answers"
    assert not student.trusted
    before = base.spec.base_hash
    states = torch.randn(4096, base.spec.conditioning_dim, generator=gen(5))
    g = gen(6)
    for _ in range(1200):
        student.learn(states[torch.randint(4096, (128,), generator=g)])
    assert student.trusted
    found = student.sample(c, w)
    error = float((found - base.sample(c, w)).abs().mean())
    assert error < 0.08
    assert abs(float(student.error) - error) < 0.03, "the error that is reported is that on unseen states and draws"
    assert not torch.equal(found, base.sample(c, w))
    leaf = w.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(student.sample(c, leaf, grad=True).sum(), leaf)
    assert float(slope.abs().max()) > 0
    assert not student.sample(c, w).requires_grad
    assert base.freeze().spec.base_hash == before
    with pytest.raises(ValueError, match="one step already"):
        StudentBase(SmoothBase(noise=False), StudentConfig(), gen(1), 2, torch.device("cpu"))


def test_targets_ask_the_student_and_acting_asks_the_base() -> None:
    base = SmoothBase()
    student = StudentConfig(hidden=(16,), tolerance=1e9)
    learner = make("dsrl_na", base, student=student)
    assert learner.student is not None
    learner.student.trusted = True
    batch = random_batch(base)
    calls = base.calls
    state = learner.generator.get_state()
    x, _ = learner.objective.next_input(batch, False)
    assert base.calls == calls, "the base is not asked"
    learner.generator.set_state(state)
    _, noise = learner.objective.draw(batch.next_conditioning)
    expected = learner.student.predicted(batch.next_conditioning, noise).clamp(-1, 1)[:, :2].flatten(1)
    torch.testing.assert_close(x[:, 3:], expected.detach(), atol=1e-6, rtol=0)
    drawn = torch.zeros(12, learner.head.exploration_dim)
    acted = learner.head.propose(batch.conditioning, base, batch.noise, drawn, "explore")
    assert torch.equal(acted.chunk, base.sample(batch.conditioning, acted.noise))
    assert {"student/error", "student/used"} <= set(learner.update(batch))
    with pytest.raises(ValueError, match=r"student=.* with algorithm='dsrl_sac'"):
        OffPolicyConfig(algorithm="dsrl_sac", student=student)


def test_a_learner_with_a_student_resumes_exactly_and_the_rest_starts_as_without_one() -> None:
    student = StudentConfig(hidden=(16,))
    plain, one, two = make("dsrl_na"), make("dsrl_na", student=student), make("dsrl_na", student=student)
    assert torch.equal(plain.critic.flat.data, one.critic.flat.data)
    for seed in range(3):
        one.update(random_batch(one.base, seed=seed))
    two.load_state_dict(one.state_dict())
    for learner in (one, two):
        learner.update(random_batch(learner.base, seed=9))
    assert torch.equal(one.student.network.flat.data, two.student.network.flat.data)
    assert torch.equal(one.critic.flat.data, two.critic.flat.data)
    assert torch.equal(one.student.error, two.student.error)


def test_distillation_reads_what_was_drawn_before() -> None:
    """The noise critic's regression on cached draws is the one on the same draws made anew, and asks the base for nothing."""
    base = SmoothBase()
    learner = make("dsrl_na", base)
    batch = random_batch(base, 8)
    noise = torch.randn(8, 5, 3, 3, generator=gen(1))
    rows = base.sample(batch.conditioning.repeat_interleave(5, 0), noise.flatten(0, 1))[:, :2].unflatten(0, (8, 5))
    cached = replace(batch, base_noise=noise, base_rows=rows)
    calls, state = base.calls, learner.generator.get_state()
    metrics = learner.objective._distill(cached, learner.critic)
    assert base.calls == calls
    learner.generator.set_state(state)
    which = torch.randint(5, (8,), generator=learner.generator)
    each = torch.arange(8)
    other = make("dsrl_na", base)
    x = torch.cat([batch.conditioning, rows[each, which].flatten(1)], -1)
    w = torch.cat([batch.conditioning, noise[each, which].flatten(1)], -1)
    gap = other.objective.noise_critic.value(w) - other.critic.value(x)
    torch.testing.assert_close(metrics["distill/error_prior"], gap.abs().mean(), atol=1e-5, rtol=0)


def test_learning_through_the_student_is_not_worse_on_the_true_base() -> None:
    """One decision, reward for nearness to a chunk the base can make: actors that climb through the base and through its student."""
    base = SmoothBase(conditioning=2, horizon=2, n_action_steps=2, gain=0.7)
    wanted = base.sample(torch.zeros(1, 2), torch.full((1, 2, 3), 0.8))
    reached = {}
    for name, student in (("base", None), ("student", StudentConfig(hidden=(64, 64), lr=2e-3, tolerance=0.05, updates=2))):
        learner = make(
            "dsrl_na", base, actor_gradient="sampler", n_critics=2, hidden=(64, 64), student=student, initial_alpha=0.001,
            fixed_alpha=True, critic_lr=1e-3, actor_lr=1e-3, tau=0.05,
        )  # fmt: skip
        g = gen(11)

        def reward(chunk: torch.Tensor) -> torch.Tensor:
            return 1 - (chunk - wanted).square().mean((1, 2))

        for _ in range(700):
            c = 0.3 * torch.randn(64, 2, generator=g)
            prior, drawn = torch.randn(64, 2, 3, generator=g), torch.randn(64, learner.head.exploration_dim, generator=g)
            chunk = learner.head.propose(c, base, prior, drawn, "explore").chunk
            chunk[:32] = base.sample(c[:32], prior[:32])
            one = torch.ones(64)
            learner.update(Batch(c, chunk, reward(chunk), 0 * one, c, one))
        c = 0.3 * torch.randn(256, 2, generator=gen(12))
        prior = torch.randn(256, 2, 3, generator=gen(13))
        reached[name] = float(reward(learner.head.propose(c, base, prior, None, "eval").chunk).mean())
        if learner.student is not None:
            assert learner.student.trusted
            assert float(learner.student.error) < 0.05
    plain = float(reward(base.sample(c, prior)).mean())
    assert reached["base"] > plain + 0.1
    assert reached["student"] > reached["base"] - 0.03
