"""Weighted behaviour cloning: weights and losses equal their formulas row by row, and training on them resumes exactly."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipe_kit import gen, shaken
from spine_kit import ARM, STATE, SmoothBase, compact
from torch import Tensor

from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.learners.batch import EPISODE_RETURN, RETURN_KNOWN, Batch
from robot_rl.learners.config import WeightedBCConfig
from robot_rl.learners.part_configs import RowAdvantageConfig
from robot_rl.learners.row_class import FACTS, ROW_CLASS, SUCCEEDED, RowClass, step_facts
from robot_rl.learners.weighted_bc import CloneBatch, WeightedBCLearner, class_shares, class_weights
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.windows import WindowConfig
from robot_rl.training.checkpoint import load_checkpoint, save_checkpoint
from robot_rl.training.ingest import ingest
from robot_rl.types import Episode, EpisodeMeta, FeatureSpec, Source, Stratum

WEIGHTINGS = ("uniform", "filtered", "hg_dagger", "iwr", "sirius", "awr", "iql", "iw_sft")
D, R, I, P = RowClass  # noqa: E741


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(weights: str, kind: str = "diffusion", **config) -> WeightedBCLearner:
    base = compact(kind).to(torch.get_default_dtype()).freeze()
    learner = WeightedBCLearner(
        base, FineTunedHead(base), WeightedBCConfig(weights=weights, **{"value_hidden": (8,), **config})
    )
    shaken(learner, 3, 0.02)  # the policy is no longer the base
    if learner.value is not None:
        shaken(learner.value, 4)
    if learner.judge is not None:
        for seed, network in enumerate((learner.judge.critic, learner.judge.target, learner.judge.value.network), 4):
            shaken(network, seed)
    return learner


def transitions(learner: WeightedBCLearner, size: int = 10, seed: int = 1) -> Batch:
    g, c, rows = gen(seed), learner.base.conditioning_dim, learner.base.spec.n_action_steps
    return Batch(
        conditioning=torch.randn(size, c, generator=g), action=torch.rand(size, rows, 3, generator=g) * 2 - 1,
        reward=torch.rand(size, generator=g), discount=torch.full((size,), 0.9), next_conditioning=torch.randn(size, c, generator=g),
        weight=torch.ones(size),
    )  # fmt: skip


def batch(learner: WeightedBCLearner, size: int = 10, seed: int = 0) -> CloneBatch:
    """Chunks with masked rows, rows of every class, failures and successes, returns partly unknown."""
    g, c = gen(seed), learner.base.config
    return CloneBatch(
        conditioning=torch.randn(size, learner.base.conditioning_dim, generator=g),
        action=torch.rand(size, c.horizon, 3, generator=g) * 2 - 1,
        mask=(torch.rand(size, c.horizon, generator=g) > 0.3).to(torch.get_default_dtype()),
        row_class=torch.randint(0, 4, (size, c.horizon), generator=g),
        succeeded=(torch.rand(size, generator=g) > 0.5).to(torch.get_default_dtype()),
        episode_return=torch.rand(size, generator=g),
        return_known=(torch.rand(size, generator=g) > 0.2).to(torch.get_default_dtype()),
        shares=torch.tensor([0.3, 0.5, 0.15, 0.05]),
        windows=None if learner.judge is None else transitions(learner, size, seed + 100),
    )


def slow_weight(learner: WeightedBCLearner, b: CloneBatch, i: int, h: int, ratio: Tensor, v: Tensor) -> float:
    """One row's weight, straight from the table of the specification."""
    kind, name = RowClass(int(b.row_class[i, h])), learner.config.weights
    good = float(b.succeeded[i])
    if name == "filtered":
        return good
    if name == "hg_dagger":
        return {D: 1.0, R: 0.0, I: 1.0, P: 0.0}[kind]
    if name == "iwr":  # n of N rows are human
        return (1 - 0.15) / 0.15 if kind is I else 1.0
    if name == "sirius":
        return {D: 1.0, R: (1 - 0.5 - 0.3 - 0.002) / 0.5, I: 0.5 / 0.15, P: 0.002 / 0.05}[kind]
    if name == "awr":
        return min(math.exp(3.0 * float(b.episode_return[i] - v[i])), 100.0) * float(b.return_known[i])
    if name == "iql":
        judge, rows = learner.judge, learner.base.spec.n_action_steps
        q = judge.target(torch.cat([b.conditioning[i], b.action[i, :rows].flatten()])[None]).min()
        return min(math.exp(3.0 * float((q - judge.value.network(b.conditioning[i : i + 1]).squeeze()).detach())), 100.0)
    if name == "iw_sft":
        return good * float(ratio[i])
    return 1.0


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("weights", WEIGHTINGS)
def test_equals_the_slow_reference(double, weights: str, kind: str) -> None:
    learner = make(weights, kind, lr=0.0, weight_decay=0.0, iw_draws=3, value_lr=0.0)
    b = batch(learner)
    g = torch.Generator()
    g.set_state(learner.generator.get_state())
    size, horizon = b.mask.shape
    ratio = torch.ones(size)
    if weights == "iw_sft":
        three = [x.repeat_interleave(3, 0) for x in (b.conditioning, b.action)]
        again = torch.Generator()
        again.set_state(g.get_state())
        own = learner.online.policy.denoising_loss(*three, g).detach()
        base = learner.base.denoising_loss(*three, again)
        for i in range(size):
            count = max(float(b.mask[i].sum()), 1.0)
            gaps = [
                sum(float((base - own)[3 * i + k, h].mean()) for h in range(horizon) if b.mask[i, h]) / count for k in range(3)
            ]
            ratio[i] = min(math.exp(sum(gaps) / 3), 16.0)
        assert float((ratio - 1).abs().max()) > 1e-4
    v = torch.zeros(size) if learner.value is None else learner.value(b.conditioning)[0].detach()
    online = deepcopy(learner.online.denoiser)
    metrics = learner.update(b)
    own = learner.online.policy.denoising_loss(b.conditioning, b.action, g)
    total, norm = torch.zeros(()), 0.0
    for i in range(size):
        for h in range(horizon):
            w = slow_weight(learner, b, i, h, ratio, v) * float(b.mask[i, h])
            total, norm = total + w * own[i, h].mean(), norm + w
    loss = total / norm
    torch.testing.assert_close(metrics["bc/loss"], loss.detach(), atol=1e-5, rtol=0)
    gradient = torch.autograd.grad(loss, list(learner.online.denoiser.parameters()))
    for p, expected in zip(learner.online.denoiser.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, expected, atol=1e-8, rtol=1e-6)
    assert torch.equal(g.get_state(), learner.generator.get_state())
    assert all(torch.equal(a, b) for a, b in zip(online.parameters(), learner.online.denoiser.parameters(), strict=True))
    if learner.value is not None:
        fitted = 0.5 * (b.return_known * (v - b.episode_return) ** 2).sum() / b.return_known.sum()
        torch.testing.assert_close(metrics["value/loss"], fitted, atol=1e-5, rtol=0)


def test_iw_sft_is_one_at_the_reference_and_clipped_away_from_it() -> None:
    base = compact()
    learner = WeightedBCLearner(base, FineTunedHead(base), WeightedBCConfig(weights="iw_sft", iw_temperature=1000.0))
    b = batch(learner)
    assert torch.equal(learner.likelihood_ratio(b), torch.ones(10))
    shaken(learner, 3, 0.3)
    ratio = learner.likelihood_ratio(b)
    assert float(ratio.max()) <= 16.0
    assert float(ratio.min()) >= 0.0
    assert not ratio.requires_grad


def test_masses_of_classes_that_are_absent_go_to_the_roll_outs() -> None:
    config = WeightedBCConfig(weights="sirius")
    for present in ([0.4, 0.6, 0.0, 0.0], [0.2, 0.5, 0.2, 0.1], [0.0, 0.7, 0.3, 0.0]):
        shares = torch.tensor(present, dtype=torch.float64)
        mass = shares * class_weights(config, shares)
        torch.testing.assert_close(mass.sum(), torch.tensor(1.0, dtype=torch.float64))
        assert float(mass[D]) == pytest.approx(present[0])
        assert float(mass[I]) == pytest.approx(0.5 if present[2] else 0.0)
    iwr = torch.tensor([0.5, 0.25, 0.2, 0.05], dtype=torch.float64)
    weighed = iwr * class_weights(WeightedBCConfig(weights="iwr"), iwr)
    assert float(weighed[I]) == pytest.approx(float(weighed.sum() - weighed[I]))


def test_nothing_to_imitate_leaves_the_policy_alone() -> None:
    learner = make("filtered", weight_decay=0.0)
    b = batch(learner)
    b = replace(b, succeeded=torch.zeros(10), row_class=torch.full_like(b.row_class, int(R)))
    before = learner.flat.data.clone()
    metrics = learner.update(b)
    assert torch.equal(learner.flat.data, before)
    assert float(metrics["bc/loss"]) == 0.0


def test_iql_tells_the_better_of_two_things_done_in_one_state() -> None:
    """Everywhere one of two chunks was played, whichever came; one of them is rewarded. Returns alone are as good for both."""
    learner = make("iql", value_hidden=(32, 32), value_lr=3e-3, iql=RowAdvantageConfig(tau=0.05))
    spec = learner.base.spec
    good = torch.arange(64) % 2 == 0
    action = torch.where(good[:, None, None], 0.5, -0.5).expand(64, spec.horizon, 3).contiguous()
    state = torch.zeros(64, spec.conditioning_dim)
    windows = Batch(state, action[:, : spec.n_action_steps], good.float(), torch.full((64,), 0.5), state, torch.ones(64))
    for _ in range(400):
        learner.judge.fit(windows)
    clones = replace(batch(learner, 64), conditioning=state, action=action)
    weight = learner.row_weights(clones)[:, 0]
    assert float(weight[good].min()) > 4 * float(weight[~good].max())


@pytest.mark.parametrize("weights", ["awr", "iql", "iw_sft"])
def test_row_11_resumes_bit_for_bit(weights: str, tmp_path) -> None:
    straight, first, resumed = (make(weights, lr=1e-2) for _ in range(3))
    for b in [batch(straight, seed=s) for s in range(6)]:
        straight.update(b)
    for b in [batch(first, seed=s) for s in range(3)]:
        first.update(b)
    save_checkpoint(tmp_path, "here", {"learner": first.state_dict()}, {})
    resumed.load_state_dict(load_checkpoint(tmp_path / "here")[0]["learner"])
    for b in [batch(resumed, seed=s) for s in range(3, 6)]:
        resumed.update(b)
    for part in ("head", "online"):
        pairs = zip(getattr(straight, part).parameters(), getattr(resumed, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), part
    if straight.judge is not None:
        for part in ("critic", "target"):
            a, b = (getattr(learner.judge, part).state_dict() for learner in (straight, resumed))
            assert all(torch.equal(a[name], b[name]) for name in a), part
    assert not torch.equal(straight.head.denoiser.input.weight, straight.online.denoiser.input.weight)
    assert torch.equal(straight.generator.get_state(), resumed.generator.get_state())


# ---- who made a step


def episode(length: int, human: slice | None = None, *, success: bool = False, name: str = "e", base=None) -> Episode:
    source = np.full(length, int(Source.POLICY), np.uint8)
    if human is not None:
        source[human] = int(Source.HUMAN)
    rng = np.random.default_rng(length)
    end = np.zeros(length, bool)
    end[-1] = True
    return Episode.from_arrays(
        EpisodeMeta(name, success=success), {STATE: rng.normal(size=(length + 1, 4)).astype("f4")},
        rng.uniform(ARM.low, ARM.high, (length, 3)), source=source, reward=end * float(success), terminated=end & success,
        truncated=end & (not success),
    )  # fmt: skip


def test_pre_intervention_is_the_fifteen_steps_before_each_takeover() -> None:
    facts = step_facts(episode(60, slice(20, 30)))[ROW_CLASS]
    assert facts[:5].tolist() == [int(R)] * 5
    assert facts[5:20].tolist() == [int(P)] * 15
    assert facts[20:30].tolist() == [int(I)] * 10
    assert facts[30:].tolist() == [int(R)] * 30
    early = step_facts(episode(20, slice(3, 8)))[ROW_CLASS]
    assert early[:3].tolist() == [int(P)] * 3
    demo = step_facts(episode(20, slice(0, 20)), Stratum.DEMONSTRATION)
    assert set(demo[ROW_CLASS].tolist()) == {int(D)}


@pytest.mark.parametrize(("success", "stratum", "counts"), [
    (True, Stratum.ONLINE, 1.0), (False, Stratum.ONLINE, 0.0), (None, Stratum.ONLINE, 0.0),
    (True, Stratum.DEMONSTRATION, 1.0), (False, Stratum.DEMONSTRATION, 0.0), (None, Stratum.DEMONSTRATION, 1.0),
])  # fmt: skip
def test_a_demonstration_that_failed_is_filtered_out(success: bool | None, stratum: Stratum, counts: float) -> None:
    """One that does not say how it ended is taken at its word that it shows the task."""
    recorded = episode(6, success=bool(success))
    recorded.meta.success = success
    assert set(step_facts(recorded, stratum)[SUCCEEDED].tolist()) == {counts}


def test_sampling_carries_classes_and_their_shares_over_everything_held() -> None:
    base = compact()
    extra = {EPISODE_RETURN: FeatureSpec(()), RETURN_KNOWN: FeatureSpec(()), **FACTS}
    buffer = ReplayBuffer(
        500, conditioning_dim=4, action_dim=3, window=WindowConfig(3, 0.9), delta_mask=ARM.delta_mask, extra=extra,
        chunk_horizon=4,
    )  # fmt: skip
    ingest(buffer, episode(40, success=True, name="demo"), base, stratum=Stratum.DEMONSTRATION)
    ingest(buffer, episode(60, slice(20, 30), name="helped"), base)
    learner = make("sirius")
    drawn = learner.sample(buffer, np.random.default_rng(0), 200)
    torch.testing.assert_close(drawn.shares, torch.tensor([0.4, 0.35, 0.1, 0.15]))
    assert np.allclose(class_shares(buffer.column(ROW_CLASS)), [0.4, 0.35, 0.1, 0.15])
    assert set(drawn.row_class.unique().tolist()) == {0, 1, 2, 3}
    assert torch.equal((drawn.row_class[:, 0] == int(D)).float(), drawn.succeeded)
    again = learner.sample(buffer, np.random.default_rng(0), 200)
    assert torch.equal(again.action, drawn.action)
    buffer.remove("helped")
    assert learner.sample(buffer, np.random.default_rng(0), 10).shares.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_clumsy_policy_cloned_on_its_successes_succeeds_more() -> None:
    """The whole idea, small: keep what worked, and the next samples work more often."""
    base = compact(width=32, depth=1, horizon=1, n_action_steps=1, state=1)
    learner = WeightedBCLearner(base, FineTunedHead(base), WeightedBCConfig(lr=3e-3, ema=0.9))
    g = gen(1)
    c, noise = torch.randn(400, 1, generator=g), torch.randn(400, 1, 3, generator=g)

    def good(chunk: Tensor) -> Tensor:
        return (chunk[:, 0, 0] > 0.2).float()

    played = base.sample(c, noise)
    worked = good(played)
    rows = torch.ones(400, 1)
    data = CloneBatch(
        c, played, rows, torch.full((400, 1), int(R)), worked, worked, torch.ones(400), torch.tensor([0.0, 1.0, 0.0, 0.0])
    )
    for _ in range(120):
        keep = torch.randint(0, 400, (64,), generator=g)
        learner.update(
            replace(data, **{n: getattr(data, n)[keep] for n in ("conditioning", "action", "mask", "row_class", "succeeded")})
        )
    after = good(learner.head.propose(c, base, torch.randn(400, 1, 3, generator=g), None, "eval").chunk)
    assert 0.1 < float(worked.mean()) < 0.8
    assert float(after.mean()) > float(worked.mean()) + 0.15


def test_other_heads_are_refused() -> None:
    from recipe_kit import make_head

    from robot_rl.learners.config import OffPolicyConfig

    base = SmoothBase()
    with pytest.raises(ValueError, match="trains a fine_tuned head; this one is edit"):
        WeightedBCLearner(base, make_head("edit", base, OffPolicyConfig()), WeightedBCConfig())
