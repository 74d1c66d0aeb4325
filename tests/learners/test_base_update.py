"""EXPO's imitation beside the edit head, and returns over several decisions: equal to slow references, resumed exactly."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from episodes_kit import batch_with_clones, buffer_for, recorded
from recipe_kit import FROZEN, gen, make, random_batch, resumes_exactly
from reference_kit import Reference
from spine_kit import SmoothBase, compact

from robot_rl.learners.config import BaseUpdateConfig, OffPolicyConfig
from robot_rl.training.ingest import ingest
from robot_rl.types import Source, Stratum


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def cloning(algorithm: str = "edit", kind: str = "diffusion", rows: str = "all", **config):
    base = compact(kind).to(torch.get_default_dtype()).freeze()
    update = BaseUpdateConfig(rows, **{"lr": 1e-2, "ema": 0.1, **config.pop("update", {})})
    return make(algorithm, base, {"own_base": True}, base_update=update, **config)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("algorithm", ["edit", "best_of_n"])
def test_equals_the_slow_reference(double, algorithm: str, kind: str) -> None:
    learner = cloning(algorithm, kind, **FROZEN)
    for p in learner.head.own.denoiser.parameters():  # what acts is no longer the base
        p.data.add_(0.02 * torch.randn(p.shape, generator=gen(9)))
    batch, slow = batch_with_clones(learner.base), Reference(learner)
    slow.base = deepcopy(learner.head.own.policy)
    before, trained = deepcopy(learner.head.own.denoiser), deepcopy(learner.cloner.online.policy)
    metrics = learner.update(batch)
    y = slow.target_value(batch, False)  # candidates of the copy that acts, not of the frozen base
    torch.testing.assert_close(metrics["critic/target"], y.mean(), atol=1e-5, rtol=0)
    own = trained.denoising_loss(batch.clone.conditioning, batch.clone.action, slow.g)
    total, norm = torch.zeros(()), 0.0
    for i in range(12):
        for h in range(4):
            total, norm = total + batch.clone.weight[i, h] * own[i, h].mean(), norm + float(batch.clone.weight[i, h])
    torch.testing.assert_close(metrics["base/loss"], (total / norm).detach(), atol=1e-5, rtol=0)
    gradient = torch.autograd.grad(total / norm, list(trained.denoiser.parameters()))
    for p, expected in zip(learner.cloner.online.denoiser.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, expected, atol=1e-8, rtol=1e-6)
    moved = zip(
        before.parameters(), learner.cloner.online.denoiser.parameters(), learner.head.own.denoiser.parameters(), strict=True
    )
    for old, online, acting in moved:
        torch.testing.assert_close(acting, 0.9 * old + 0.1 * online, atol=1e-10, rtol=0)
    if algorithm == "edit":
        gradient = torch.autograd.grad(slow.actor_loss(batch), list(slow.head.actor.parameters()))
        for a, b in zip([p.grad for p in learner.head.actor.parameters()], gradient, strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)
    assert torch.equal(slow.g.get_state(), learner.generator.get_state())


def test_row_9_acting_and_targets_draw_from_one_copy_and_the_base_stays_frozen() -> None:
    """The released code acts with the average and backs up with the trained copy; here both read the head's own."""
    learner = cloning(actor_every=1)
    weights = [p.clone() for p in learner.base.denoiser.parameters()]
    fresh = learner.head.propose(torch.zeros(2, 4), learner.base, torch.zeros(2, 3, 4, 3), None, "eval")
    for seed in range(5):
        learner.update(batch_with_clones(learner.base, seed))
    assert all(torch.equal(a, b) for a, b in zip(weights, learner.base.denoiser.parameters(), strict=True))
    assert any(k.startswith("own.denoiser") for k in learner.head.state_dict())
    batch, state = random_batch(learner.base), learner.generator.get_state()
    scored, _ = learner.objective.next_input(batch, False)
    learner.generator.set_state(state)
    noise = torch.randn(12, 3, *learner.base.spec.noise_shape, generator=learner.generator)
    draws = torch.randn(12, learner.head.exploration_dim, generator=learner.generator)
    acted = learner.head.propose(batch.next_conditioning, learner.base, noise, draws, "explore")
    torch.testing.assert_close(scored[:, 4:], acted.chunk[:, :3].flatten(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(acted.chunk_base, learner.base.sample(batch.next_conditioning, acted.noise))
    now = learner.head.propose(torch.zeros(2, 4), learner.base, torch.zeros(2, 3, 4, 3), None, "eval")
    assert not torch.equal(fresh.info["q"], now.info["q"])


def test_row_16_a_fresh_copy_is_the_base_bit_for_bit() -> None:
    learner = cloning("best_of_n")
    noise, c = torch.randn(4, 4, 3, generator=gen(1)), torch.randn(4, 4, generator=gen(2))
    assert torch.equal(learner.head.sampler(learner.base).sample(c, noise), learner.base.sample(c, noise))


def test_row_11_resumes_bit_for_bit() -> None:
    def play(learner, seeds) -> None:
        for s in seeds:
            learner.update(batch_with_clones(learner.base, s))

    config = {"actor_every": 2, "update": {"cosine_steps": 5}}
    straight = resumes_exactly(lambda: cloning(**config), play)
    assert straight.cloner.steps == 3
    assert straight.cloner.learning_rate() == pytest.approx(1e-2 * 0.5 * (1 + np.cos(np.pi * 0.6)))


def test_row_2_what_does_not_fit_together_is_refused() -> None:
    for config in ({"algorithm": "residual"}, {"algorithm": "edit", "base_samples": 8}):
        with pytest.raises(ValueError, match=r"base_update\.rows='all'"):
            OffPolicyConfig(base_update=BaseUpdateConfig("all"), **config)
    with pytest.raises(ValueError, match=r"own_base=false with learner\.base_update\.rows='all'"):
        make("edit", compact(), base_update=BaseUpdateConfig("all"))
    with pytest.raises(ValueError, match="SmoothBase does not hand them out"):
        make("edit", SmoothBase(), {"own_base": True}, base_update=BaseUpdateConfig("all"))
    with pytest.raises(ValueError, match="n_step=3 with algorithm='dsrl_sac'"):
        OffPolicyConfig(algorithm="dsrl_sac", n_step=3)


@pytest.mark.parametrize(("rows", "weighs"), [("all", {"good", "bad", "demo", "failed demo"}), ("success", {"good", "demo"})])
def test_what_is_imitated(rows: str, weighs: set[str]) -> None:
    """Masked rows never are; failures are with ``all``, as published, and are not with ``success``."""
    learner = cloning(rows=rows)
    for name, kind in {
        "good": Stratum.ONLINE,
        "bad": Stratum.ONLINE,
        "demo": Stratum.DEMONSTRATION,
        "failed demo": Stratum.DEMONSTRATION,
        "held": Stratum.ONLINE,
    }.items():
        source = Source.HOLD if name == "held" else None
        buffer = buffer_for(learner.base, extra=True)
        ingest(buffer, recorded("ok", 6, 1, terminated=True, success=None), learner.base)
        success = {"good": True, "demo": None}.get(name, False)
        ingest(buffer, recorded(name, 9, 2, terminated=True, success=success, source=source), learner.base, stratum=kind)
        drawn, extra = buffer.sample_chunk_rows(64, np.random.default_rng(0), 4)
        from robot_rl.learners.cloning import clone_rows

        found = clone_rows(drawn, extra, learner.config.base_update, torch.device("cpu"))
        ours = torch.from_numpy(drawn.conditioning[:, 0]).norm(dim=1) > 0
        of_ok = {tuple(r) for r in np.round(buffer._ring["conditioning"][:6], 4).tolist()}
        mine = torch.tensor([tuple(r) not in of_ok for r in np.round(drawn.conditioning[:, 0], 4).tolist()]) & ours
        assert bool((found.weight[mine] > 0).any()) == (name in weighs)
        assert bool((found.weight.numpy() <= drawn.mask).all())


def test_sample_brings_rows_to_imitate_when_the_actor_moves() -> None:
    learner = cloning(actor_every=2)
    buffer, rng = buffer_for(learner.base), np.random.default_rng(0)
    ingest(buffer, recorded("a", 20, 1, terminated=True), learner.base)
    for _ in range(4):
        batch = learner.sample(buffer, rng, 8, None)
        assert (batch.clone is not None) == (learner.updates % 2 == 1)
        learner.update(batch)
    assert learner.cloner.steps == 2


@pytest.mark.parametrize("terminated", [True, False])
def test_returns_over_three_decisions(double, terminated: bool) -> None:
    """Every target of an episode against the sum written out; the critic reads one decision's rows; truncation drops cut windows."""
    base = SmoothBase(conditioning=4, horizon=3, n_action_steps=1)
    learner = make("residual", base, n_step=3, **FROZEN, gamma=0.9)
    buffer, episode = buffer_for(base, 3), recorded("a", 10, 3, terminated=terminated)
    ingest(buffer, episode, base)
    windows = buffer.sample(200, np.random.default_rng(1))
    assert set(windows.step.tolist()) == set(range(10 if terminated else 8))
    batch = learner.batch(windows)
    assert batch.action.shape == (200, 1, 3)
    batch = replace(
        batch,
        **{
            k: getattr(batch, k).double()
            for k in ("conditioning", "next_conditioning", "action", "reward", "discount", "weight")
        },
    )
    state = learner.generator.get_state()
    x, log_prob = learner.objective.next_input(batch, True)
    y = learner.td_target(batch, x, log_prob, 0.0, "mean")
    learner.generator.set_state(state)
    again, _ = learner.objective.next_input(batch, True)
    value = learner.target.value(again).mean(0)
    for i in range(200):
        t, m = int(windows.step[i]), min(3, 10 - int(windows.step[i]))
        expected = sum(0.9**k * float(episode.reward[t + k]) for k in range(m))
        if not (terminated and t + m == 10):
            expected += 0.9**m * float(value[i])
        assert float(y[i]) == pytest.approx(expected, abs=1e-5)
        norm = base.normalize_action(torch.from_numpy(episode.action[t : t + 1])).clamp(-1, 1)
        torch.testing.assert_close(batch.action[i], norm.double(), atol=1e-6, rtol=0)
