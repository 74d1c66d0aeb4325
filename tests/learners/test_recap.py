"""RECAP: value, advantages and labels by hand, guidance as its formula, the loss equal to a slow reference, exact resume."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from episodes_kit import recorded
from recipe_kit import gen, same_state, shaken
from spine_kit import compact

from robot_rl.heads.advantage import Advantage, AdvantageHead
from robot_rl.heads.config import AdvantageConfig
from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.learners.advantage_labels import AdvantageLabels
from robot_rl.learners.config import RecapConfig, WeightedBCConfig
from robot_rl.learners.facts import ADVANTAGE, columns
from robot_rl.learners.row_class import ROW_CLASS, RowClass
from robot_rl.learners.weighted_bc import CloneBatch, WeightedBCLearner
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.windows import WindowConfig
from robot_rl.training.ingest import ingest
from robot_rl.types import FeatureSpec, Source, Stratum

SMALL = {"failure_penalty": 20.0, "value_range": 40.0, "bins": 11, "hidden": (8,), "n_step": 3, "positive_share": 0.4}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(kind: str = "diffusion", guidance: float = 1.0, recap: dict | None = None, **config) -> WeightedBCLearner:
    base = compact(kind).to(torch.get_default_dtype()).freeze()
    settings = WeightedBCConfig(weights="recap", recap=RecapConfig(**{**SMALL, **(recap or {})}), **config)
    learner = WeightedBCLearner(base, AdvantageHead(base, AdvantageConfig(guidance)), settings)
    shaken(learner, 3, 0.02)
    shaken(learner.labels.network, 4)
    return learner


def filled(learner: WeightedBCLearner) -> ReplayBuffer:
    """A success, a failure at a time limit, an end that nobody knows, a demonstration, an episode that a person helped in, and a
    demonstration that failed."""
    spec = learner.base.spec
    extra = {"episode_return": FeatureSpec(()), "return_known": FeatureSpec(())} | columns(learner.config)
    buffer = ReplayBuffer(
        500, conditioning_dim=4, action_dim=3, window=WindowConfig(3, 0.99), delta_mask=spec.action.delta_mask, extra=extra
    )
    ends = [("good", True), ("bad", False), ("unknown", None), ("demo", None), ("helped", True), ("failed demo", False)]
    for i, (name, success) in enumerate(ends):
        e = recorded(name, 9 + i, i, terminated=success is True, success=success)
        if name == "helped":
            e.source[4:7] = int(Source.HUMAN)
        stratum = Stratum.DEMONSTRATION if name.endswith("demo") else None
        ingest(buffer, e, learner.base, learner=learner.config, stratum=stratum)
    return buffer


def slow_advantages(labels: AdvantageLabels, buffer: ReplayBuffer, number: int, success: bool | None) -> list[float]:
    """Step by step from the formulas."""
    states = torch.from_numpy(buffer.conditioning(number)).to(labels.judge.flat.data.dtype)
    length = len(states) - 1

    def v(t: int) -> float:
        p = torch.softmax(labels.judge(states[t : t + 1])[0, 0], 0).tolist()
        return sum(p[k] * (-1 + k / 10) for k in range(11))

    found = []
    for t in range(length):
        if t + 3 <= length - 1:
            found.append(-3 / 40 + v(t + 3) - v(t))
        elif success is None:
            found.append(float("nan"))
        else:
            rewards = [-1.0] * (length - 1 - t) + [0.0 if success else -20.0]
            found.append(max(sum(rewards) / 40, -1.0) - v(t))
    return found


def test_advantages_threshold_and_labels_by_hand(double) -> None:
    learner = make()
    labels, buffer = learner.labels, filled(learner)
    labels.refresh(buffer, 0)
    ends = {"good": True, "bad": False, "unknown": None, "demo": True, "helped": True, "failed demo": False}
    every = {}
    for number, success in enumerate(ends.values()):
        every[number] = np.array(slow_advantages(labels, buffer, number, success))
        np.testing.assert_allclose(labels.advantages(buffer, number), every[number], atol=1e-5)
    known = np.concatenate(list(every.values()))
    known = known[np.isfinite(known)]
    assert labels.threshold == pytest.approx(np.quantile(known, 0.6), abs=1e-6)
    assert (known > labels.threshold).mean() == pytest.approx(0.4, abs=0.05)
    for number, name in enumerate(ends):
        label, who = buffer.rows(ADVANTAGE, number), buffer.rows(ROW_CLASS, number)
        for t, a in enumerate(every[number]):
            expected = Advantage.UNSAID if np.isnan(a) else Advantage.POSITIVE if a > labels.threshold else Advantage.NEGATIVE
            if name == "demo" or who[t] == RowClass.INTERVENTION:
                expected = Advantage.POSITIVE  # forced, but not in a demonstration that failed
            assert label[t] == expected, (name, t)
    assert (buffer.rows(ADVANTAGE, 2)[-3:] == Advantage.UNSAID).all()


def test_value_loss_is_cross_entropy_to_the_returns_bin(double) -> None:
    labels = make().labels
    c = torch.randn(6, 4, generator=gen(1))
    left, outcome = torch.tensor([0.0, 5, 3, 39, 2, 100]), torch.tensor([1, 1, 0, 0, -1, 1])
    network = deepcopy(labels.network)
    found = labels.fit(c, left, outcome)["value/loss"]
    total, returns = torch.zeros(()), [0.0, -5 / 40, -23 / 40, -1.0, None, -1.0]
    for i, r in enumerate(returns):
        if r is not None:
            total = total - torch.log_softmax(network(c[i : i + 1])[0, 0], 0)[round((r + 1) * 10)] / 5
    torch.testing.assert_close(found, total.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_loss_equals_the_slow_reference(double, kind: str) -> None:
    learner = make(kind, lr=0.0, weight_decay=0.0, recap={"dropout": 0.4, "lr": 0.0})
    g, size = gen(5), 16
    b = CloneBatch(
        conditioning=torch.randn(size, 4, generator=g), action=torch.rand(size, 4, 3, generator=g) * 2 - 1,
        mask=(torch.rand(size, 4, generator=g) > 0.3).double(), row_class=torch.randint(0, 4, (size, 4), generator=g),
        succeeded=torch.ones(size), episode_return=torch.ones(size), return_known=torch.ones(size), shares=torch.ones(4),
        advantage=torch.randint(0, 3, (size,), generator=g), steps_left=torch.arange(size).double(),
        outcome=torch.randint(-1, 2, (size,), generator=g),
    )  # fmt: skip
    again = torch.Generator()
    again.set_state(learner.generator.get_state())
    online = deepcopy(learner.online)
    metrics = learner.update(b)
    lots = torch.rand(size, generator=again)
    told = [0 if lots[i] < 0.4 else int(b.advantage[i]) for i in range(size)]
    assert set(told) == {0, 1, 2}
    state = again.get_state()
    net, table = online.denoiser.net, online.denoiser.indicator
    policy = online.policy
    total, norm = torch.zeros(()), 0.0
    for i in range(size):  # the whole batch is denoised for each row, so that every row sees its own draws
        again.set_state(state)

        class Told(torch.nn.Module):
            condition, time = net.condition, net.time

            def __call__(self, x, condition, time, _i=i):
                return net(x, condition + table[told[_i]], time)

        policy.__dict__["_modules"]["denoiser"] = Told()
        loss = policy.denoising_loss(b.conditioning, b.action, again)[i].mean(-1)
        total, norm = total + (b.mask[i] * loss).sum(), norm + float(b.mask[i].sum())
    torch.testing.assert_close(metrics["bc/loss"], (total / norm).detach(), atol=1e-5, rtol=0)
    gradient = torch.autograd.grad(total / norm, [table, *net.parameters()])
    mine = [learner.online.denoiser.indicator, *learner.online.denoiser.net.parameters()]
    for p, expected in zip(mine, gradient, strict=True):
        torch.testing.assert_close(p.grad, expected, atol=1e-8, rtol=1e-6)
    assert torch.equal(again.get_state(), learner.generator.get_state())


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_row_16_fresh_is_the_base_and_guidance_is_its_formula(kind: str, guidance: float) -> None:
    base = compact(kind)
    head = AdvantageHead(base, AdvantageConfig(guidance))
    c, noise = torch.randn(5, 4, generator=gen(1)), torch.randn(5, 4, 3, generator=gen(2))
    assert torch.equal(head.propose(c, base, noise, None, "eval").chunk, base.sample(c, noise))
    head.denoiser.indicator.data.copy_(torch.randn(3, 32, generator=gen(3)))
    x, net, table = noise.flatten(1), head.denoiser.net, head.denoiser.indicator
    condition, times = head.policy.chain_inputs(c)
    nothing, positive = (net(x, condition + table[i], times[:1]) for i in (0, 2))
    found = head.denoiser(x, condition, times[:1])
    torch.testing.assert_close(found, nothing + guidance * (positive - nothing), atol=1e-5, rtol=1e-5)
    if guidance == 1.0:
        assert torch.equal(found, positive)
    with head.denoiser.told(torch.tensor([0, 1, 2, 1, 0])):
        told = head.denoiser(x, condition, times[:1])
    torch.testing.assert_close(told[1], net(x[1:2], condition[1:2] + table[1], times[:1])[0])
    assert head.denoiser.labels is None


def test_row_11_resumes_bit_for_bit_with_the_same_labels() -> None:
    def play(learner, buffer, rng, count: int) -> None:
        for i in range(count):
            if i == 1:  # an episode that comes between two judgements
                e = recorded(f"new{learner.updates}", 12, learner.updates, terminated=True, success=True)
                ingest(buffer, e, learner.base, learner=learner.config)
            learner.update(learner.sample(buffer, rng, 16))

    def begin():
        learner = make(recap={"relabel_every": 3})
        buffer, rng = filled(learner), np.random.default_rng(0)
        for _ in range(3):
            learner.pretrain(learner.sample(buffer, rng, 16))
        learner.finish_pretraining()
        return learner, buffer, rng

    straight, buffer, rng = begin()
    play(straight, buffer, rng, 5)
    play(straight, buffer, rng, 4)
    first, early, rng = begin()
    play(first, early, rng, 5)
    resumed, refilled = make(recap={"relabel_every": 3}), filled(first)
    e = recorded("new1", 12, 1, terminated=True, success=True)
    ingest(refilled, e, first.base, learner=first.config)
    resumed.load_state_dict(first.state_dict())
    play(resumed, refilled, rng, 4)
    same_state(straight, resumed)
    assert np.array_equal(buffer.column(ADVANTAGE), refilled.column(ADVANTAGE))


def test_what_does_not_fit_is_refused() -> None:
    base = compact()
    with pytest.raises(ValueError, match="advantage_conditioned head"):
        WeightedBCLearner(base, FineTunedHead(base), WeightedBCConfig(weights="recap"))
    with pytest.raises(ValueError, match="this one is advantage_conditioned"):
        WeightedBCLearner(base, AdvantageHead(base, AdvantageConfig()), WeightedBCConfig(weights="filtered"))


def test_asking_for_better_gives_better() -> None:
    """Half of all chunks say +0.6, half -0.6; those with +0.6 are told to be positive: asked for positive, it says +0.6."""
    learner = make(guidance=1.5, lr=3e-3, ema=0.9, recap={"dropout": 0.2})
    g = gen(8)
    for _ in range(300):
        good = torch.rand(64, generator=g) > 0.5
        action = torch.where(good, 0.6, -0.6)[:, None, None].expand(64, 4, 3)
        b = CloneBatch(
            torch.randn(64, 4, generator=g), action, torch.ones(64, 4), torch.ones(64, 4, dtype=torch.long), torch.ones(64),
            torch.ones(64), torch.ones(64), torch.ones(4), torch.where(good, 2, 1), torch.zeros(64), torch.ones(64),
        )  # fmt: skip
        learner.update(b)
    noise = torch.randn(200, 4, 3, generator=g)
    said = learner.head.propose(torch.randn(200, 4, generator=g), learner.base, noise, None, "eval").chunk
    assert float((said.mean((1, 2)) > 0.2).float().mean()) > 0.9
