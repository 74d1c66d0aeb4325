"""Adapters: they start as the base, equal their formulas, merge, and leave alone what they must not touch."""

from __future__ import annotations

import pytest
import torch
from spine_kit import SmoothBase, compact, observations
from torch.nn import functional as F

from robot_rl.heads.chain import ChainHead
from robot_rl.heads.config import ChainConfig
from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.learners.config import WeightedBCConfig
from robot_rl.learners.weighted_bc import CloneBatch, WeightedBCLearner
from robot_rl.policies.base import prior_noise
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.policies.config import AdapterConfig

KINDS = ("diffusion", "flow")
LORA, POOL = AdapterConfig("lora", rank=3, alpha=6.0), AdapterConfig("modulation", entries=3, entry=1)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(head: FineTunedHead, seed: int = 1, amount: float = 0.2) -> FineTunedHead:
    with torch.no_grad():
        for p in head.denoiser.parameters():
            p.add_(amount * torch.randn(p.shape, generator=gen(seed)).to(p))
    return head


def drawn(base, batch: int = 6):
    c = base.encode({n: v.to(base.normalizer.action_low.dtype) for n, v in observations(base, batch).items()})
    c = c.to(base.normalizer.action_low.dtype)
    return c, prior_noise(base, batch, gen(2)).to(c.dtype)


def batch_of(base, size: int = 16) -> CloneBatch:
    c, _ = drawn(base, size)
    h, a = base.config.horizon, base.action.dim
    one = torch.ones(size)
    return CloneBatch(c, torch.rand(size, h, a, generator=gen(4)) * 2 - 1, torch.ones(size, h), torch.zeros(size, h).long(), one, one,
                      one, torch.tensor([0.25] * 4))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [LORA, POOL], ids=["lora", "modulation"])
def test_row_16_a_fresh_adapter_is_the_base_bit_for_bit_and_publishes_only_itself(kind: str, adapter: AdapterConfig) -> None:
    base = compact(kind)
    c, w = drawn(base)
    before = base.spec.base_hash
    for head in (FineTunedHead(base, adapter, generator=gen()), ChainHead(base, ChainConfig(), adapter, generator=gen())):
        assert torch.equal(head.propose(c, base, w, None, "eval").chunk, base.sample(c, w))
        published = sum(v.numel() for v in head.state_dict().values())
        assert published < 0.5 * sum(p.numel() for p in base.denoiser.parameters())
        shaken(head)
        assert float((head.propose(c, base, w, None, "eval").chunk - base.sample(c, w)).abs().max()) > 1e-3
        copy = type(head)(base, *((ChainConfig(),) if isinstance(head, ChainHead) else ()), adapter)
        copy.load_state_dict(head.state_dict())
        assert torch.equal(copy.propose(c, base, w, None, "eval").chunk, head.propose(c, base, w, None, "eval").chunk)
        assert base.freeze().spec.base_hash == before, "the base's own weights are shared, not moved"
    with pytest.raises(ValueError, match="does not hand them out"):
        FineTunedHead(SmoothBase(), adapter)


def slow_denoiser(head: FineTunedHead, base, x, c, t):
    """The denoiser with the adapter's formula written out, layer by layer."""
    d, config = base.denoiser, head.adapter

    def linear(name, value):
        layer = d.get_submodule(name)
        weight = layer.weight
        if config.kind == "lora":
            part = head.denoiser[name.replace(".", "_")]
            weight = weight + config.alpha / config.rank * part.b @ part.a
        return value @ weight.T + layer.bias

    def two(name, value):
        return linear(f"{name}.2", F.silu(linear(f"{name}.0", value)))

    from robot_rl.policies.networks import time_features

    scale = 1 + head.denoiser.change if config.kind == "modulation" else torch.ones(len(d.layers) + 1, d.output.in_features)
    shift = two("conditioning", c) + two("time_embedding", time_features(t, d.time_dim))
    h = linear("input", x) + shift
    for i, norm in enumerate(d.norms):
        h = h + linear(f"layers.{i}", F.silu(norm(h) + shift) * scale[i])
    return linear("output", F.silu(d.output_norm(h)) * scale[-1])


@pytest.mark.parametrize("adapter", [LORA, POOL], ids=["lora", "modulation"])
def test_adapted_denoisers_are_their_formulas_and_merge(adapter: AdapterConfig, tmp_path) -> None:
    base = compact("flow").double().freeze()
    head = shaken(FineTunedHead(base, adapter, generator=gen()))
    c, w = drawn(base)
    d = head.policy.denoiser
    t = torch.full((1,), 0.3, dtype=torch.float64)
    fast = d(w.flatten(1), d.condition(c), d.time(t))
    torch.testing.assert_close(fast, slow_denoiser(head, base, w.flatten(1), c, t), atol=1e-5, rtol=0)
    merged = head.merged()
    torch.testing.assert_close(merged.sample(c, w), head.policy.sample(c, w), atol=1e-5, rtol=0)
    assert set(merged.state_dict()) == set(base.state_dict())
    assert merged.spec.base_hash != base.spec.base_hash


def test_a_merged_policy_is_a_base_of_its_own(tmp_path) -> None:
    base = compact("diffusion")
    head = shaken(FineTunedHead(base, LORA, generator=gen()))
    save_policy(head.merged(), tmp_path / "merged")
    c, w = drawn(base)
    loaded = load_policy(tmp_path / "merged")
    torch.testing.assert_close(loaded.sample(c, w), head.policy.sample(c, w), atol=1e-5, rtol=0)


def test_peft_builds_the_same_layers(tmp_path) -> None:
    from dataclasses import replace

    base = compact("diffusion")
    with_peft = replace(LORA, backend="peft")
    try:
        import peft  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'robot_rl\[vla\]'"):
            FineTunedHead(base, with_peft, generator=gen())
        pytest.skip("peft is not installed (extra vla)")
    before = torch.random.get_rng_state()
    ours, theirs = FineTunedHead(base, LORA, generator=gen()), FineTunedHead(base, with_peft, generator=gen())
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator is left alone"
    c, w = drawn(base)
    assert torch.equal(theirs.propose(c, base, w, None, "eval").chunk, base.sample(c, w))
    with torch.no_grad():
        for name, part in ours.denoiser.items():
            part.b.normal_(generator=gen(len(name)))
            theirs.denoiser[name]["a"].weight.copy_(part.a)
            theirs.denoiser[name]["b"].weight.copy_(part.b)
    one, two = (h.propose(c, base, w, None, "eval").chunk for h in (ours, theirs))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.merged().sample(c, w), two, atol=1e-5, rtol=0)
    learner = WeightedBCLearner(base, theirs, WeightedBCConfig(weights="uniform", lr=1e-2, ema=0.0))
    learner.update(batch_of(base))
    assert not torch.equal(theirs.propose(c, base, w, None, "eval").chunk, two)


@pytest.mark.parametrize("adapter", [LORA, POOL], ids=["lora", "modulation"])
def test_cloning_through_an_adapter_learns_and_resumes(adapter: AdapterConfig) -> None:
    base = compact("flow")
    batch = batch_of(base)

    def fresh() -> WeightedBCLearner:
        return WeightedBCLearner(
            base, FineTunedHead(base, adapter, generator=gen()), WeightedBCConfig(weights="uniform", lr=3e-3, ema=0.5)
        )

    learner, before = fresh(), base.spec.base_hash

    def loss(policy) -> float:
        with torch.no_grad():
            return float(policy.denoising_loss(batch.conditioning, batch.action, gen(7)).mean())

    start = loss(base)
    for _ in range(60):
        learner.update(batch)
    assert loss(learner.head.policy) < 0.98 * start
    assert base.freeze().spec.base_hash == before
    straight, resumed = fresh(), fresh()
    for _ in range(3):
        straight.update(batch)
    resumed.load_state_dict(straight.state_dict())
    for each in (straight, resumed):
        each.update(batch)
    a, b = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(a["head"][k], b["head"][k]) for k in a["head"])
    assert torch.equal(straight.flat.data, resumed.flat.data)


def test_training_task_b_leaves_task_a_bitwise_as_it_was() -> None:
    """L2M: weight decay and momentum included, whatever happens to the entry of B."""
    base = compact("diffusion")
    config = WeightedBCConfig(weights="uniform", lr=1e-2, weight_decay=0.1, ema=0.5)
    c, w = drawn(base)
    first = FineTunedHead(base, AdapterConfig("modulation", entries=3, entry=0), generator=gen())
    learner = WeightedBCLearner(base, first, config)
    for _ in range(5):
        learner.update(batch_of(base))
    chunk_a = first.propose(c, base, w, None, "eval").chunk
    second = FineTunedHead(base, AdapterConfig("modulation", entries=3, entry=2), generator=gen())
    second.denoiser.adopt(first.denoiser)
    assert torch.equal(second.propose(c, base, w, None, "eval").chunk, base.sample(c, w)), "a new entry starts as the base"
    learner = WeightedBCLearner(base, second, config)
    for _ in range(5):
        learner.update(batch_of(base))
    assert not torch.equal(second.propose(c, base, w, None, "eval").chunk, base.sample(c, w))
    back = FineTunedHead(base, AdapterConfig("modulation", entries=3, entry=0), generator=gen())
    back.denoiser.adopt(second.denoiser)
    assert torch.equal(back.propose(c, base, w, None, "eval").chunk, chunk_a)
    with pytest.raises(ValueError, match=r"accepted are equal shapes"):
        FineTunedHead(base, AdapterConfig("modulation", entries=2)).denoiser.adopt(first.denoiser)


def test_the_entry_whose_key_is_nearest_acts() -> None:
    base = compact("flow")
    pool = FineTunedHead(base, AdapterConfig("modulation", entries=3, entry=None))
    with pytest.raises(ValueError, match="no entry of the pool was ever trained"):
        pool.propose(*drawn(base)[:1], base, drawn(base)[1], None, "eval")
    tasks = torch.randn(2, base.conditioning_dim, generator=gen(1))
    for entry in (0, 2):
        one = FineTunedHead(base, AdapterConfig("modulation", entries=3, entry=entry))
        one.denoiser.adopt(pool.denoiser)
        shaken(one, entry)
        states = tasks[entry // 2] + 0.1 * torch.randn(50, base.conditioning_dim, generator=gen(entry))
        one.adapted.saw(states[:20])
        one.adapted.saw(states[20:])
        torch.testing.assert_close(one.denoiser.keys[entry], F.normalize(states, dim=-1).mean(0), atol=1e-6, rtol=0)
        pool.denoiser.adopt(one.denoiser)
    assert pool.denoiser.choose(torch.cat([tasks, 3 * tasks])).tolist() == [0, 2, 0, 2]
    w = prior_noise(base, 2, gen(3))
    both = pool.propose(tasks, base, w, None, "eval").chunk
    for i, entry in enumerate((0, 2)):
        alone = FineTunedHead(base, AdapterConfig("modulation", entries=3, entry=entry))
        alone.denoiser.adopt(pool.denoiser)
        torch.testing.assert_close(both[i], alone.propose(tasks, base, w, None, "eval").chunk[i], atol=1e-6, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"rank": 0}, {"entry": 8}, {"kind": "lora", "init": "runs/x"}):
        with pytest.raises(ValueError, match="accepted"):
            AdapterConfig(**bad)
