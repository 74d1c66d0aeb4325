"""Guidance of the base's sampler: formulas against slow references in double precision, bounds, and what a model may not write."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from spine_kit import ARM, SmoothBase, compact, observations

from robot_rl.heads.costs import ChunkCosts
from robot_rl.heads.expressions import Expression
from robot_rl.heads.guidance import GuidedHead, ScoreCorrectedHead, corrected, systematic_resample
from robot_rl.heads.guidance_config import (
    CostConfig,
    GuidanceConfig,
    PathConfig,
    ReferenceConfig,
    ScoreCorrectionConfig,
    terms_from_json,
)
from robot_rl.heads.reference_denoise import ReferenceHead, denoise_reference
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.policies.base import prior_noise
from robot_rl.types import ActionSpec

KINDS = ("diffusion", "flow")
MOVES = ActionSpec((-0.1,) * 3 + (0.0,), (0.1,) * 3 + (1.0,), names=("dx", "dy", "dz", "grip"),
                   kind=("continuous",) * 3 + ("gripper_continuous",), mode=("delta",) * 3 + ("absolute",))  # fmt: skip
PATH = PathConfig(("dx", "dy", "dz"), ("state_0", "state_1", "state_2"))
TERMS = {
    "reach": {"target": [0.3, "state_1 + 0.1", 0.2]}, "avoid_sphere": {"centre": ["state_0", "state_1", "state_2"], "radius": 0.4},
    "keep_out_plane": {"point": [0.0, 0.0, 9.0], "normal": [0.0, 1.0, 2.0]}, "align_axis": {"axis": [1.0, 0.5, 0.0]},
    "speed_limit": {"limit": 0.01}, "stay_near_reference": {},
}  # fmt: skip


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(kind: str, **config):
    policy = compact(kind, action=MOVES, **config).double()
    for p in policy.denoiser.output.parameters():
        p.data.mul_(2.0)  # so that some entries are clamped
    return policy.freeze()


def inputs(policy, batch: int = 5, kind=torch.float64):
    c = policy.encode({n: v.to(kind) for n, v in observations(policy, batch).items()}).to(kind)
    return c, torch.randn(batch, policy.config.horizon, 4, generator=gen(1), dtype=kind)


def smooth(weight: float = 5.0) -> tuple[CostConfig, ...]:
    """sum over the executed rows of (dx - 0.02)^2 + (dy + dz)^2, and a pull on the gripper that may move it."""
    return (
        CostConfig("expression", weight, expression="(dx - 0.02)**2 + (dy + dz)**2"),
        CostConfig("expression", 1.0, expression="sum((grip - 0.9)**2)", gripper=True),
    )


# ---- the sampler


def slow_guided(policy, c, w, config: GuidanceConfig) -> torch.Tensor:
    """One chunk, from the formulas: schedule, clean estimates, a Jacobian by differences, hand-written slopes of the costs."""
    cfg = policy.config
    n, steps = cfg.n_action_steps, cfg.num_steps

    def net(x, t):
        d = policy.denoiser
        return d(x[None], d.condition(c[None]), d.time(torch.tensor([t], dtype=x.dtype)))[0]

    if cfg.kind == "diffusion":
        bar = [math.cos((t / cfg.train_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(cfg.train_steps + 1)]
        alpha, product = [], 1.0
        for t in range(cfg.train_steps):
            product *= 1 - min(1 - bar[t + 1] / bar[t], 0.999)
            alpha.append(product)
        times = [round(cfg.train_steps - i * cfg.train_steps / steps) - 1 for i in range(steps)]
        at = [alpha[t] for t in times] + [1.0]
        level = [math.sqrt(1 - a) for a in at]

        def clean(i, x):
            if i == steps:
                return x
            return math.sqrt(at[i]) * x - level[i] * net(x, (times[i] + 1) / cfg.train_steps)

        def step(i, x):
            x0 = clean(i, x).clamp(-1, 1)
            noise = (x - math.sqrt(at[i]) * x0) / level[i]
            return math.sqrt(at[i + 1]) * x0 + level[i + 1] * noise
    else:
        level = [1 - i / steps for i in range(steps + 1)]

        def clean(i, x):
            return x if i == steps else x + level[i] * net(x, i / steps)

        def step(i, x):
            return x + net(x, i / steps) / steps

    def slope(chunk):
        low, high = (torch.tensor(v, dtype=chunk.dtype) for v in (MOVES.low, MOVES.high))
        a = low + (chunk.unflatten(0, (-1, 4)) + 1) / 2 * (high - low)
        g = torch.zeros_like(a)
        g[:n, 0] = -5 * 2 * (a[:n, 0] - 0.02)
        g[:n, 1] = g[:n, 2] = -5 * 2 * (a[:n, 1] + a[:n, 2])
        g[:n, 3] = -2 * (a[:n, 3] - 0.9)
        return (g * (high - low) / 2).flatten()

    def unguided(x):
        for i in range(steps):
            x = step(i, x)
        return x.clamp(-1, 1)

    x = w.flatten()
    for i in range(steps):
        x = step(i, x)
        for _ in range(config.inner_steps if i >= config.from_step else 0):
            g = slope(clean(i + 1, x).clamp(-1, 1))
            if config.through == "denoiser":
                jacobian = torch.stack([
                    (clean(i + 1, x + d) - clean(i + 1, x - d)) / 2e-5 for d in 1e-5 * torch.eye(len(x), dtype=x.dtype)
                ])  # fmt: skip
                g = jacobian @ g
            g = g / max(1.0, float(g.norm()) / config.gradient_max)
            x = x + config.strength * (level[i + 1] if config.schedule == "noise" else 1.0) * g
    own = unguided(w.flatten())
    x = x.clamp(-1, 1)
    return x.clamp(own - config.max_displacement, own + config.max_displacement).unflatten(0, w.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", ["denoiser", "identity"])
def test_guided_sampling_is_its_formula(kind: str, through: str) -> None:
    policy = double(kind)
    c, w = inputs(policy)
    for schedule, inner, first, cap in (("constant", 1, 0, 2.0), ("noise", 2, 1, 0.15)):
        config = GuidanceConfig(
            costs=smooth(), strength=0.8, schedule=schedule, inner_steps=inner, from_step=first, through=through,
            gradient_max=0.7, max_displacement=cap,
        )  # fmt: skip
        head = GuidedHead(policy, config).double()
        chunk = head.propose(c, policy, w, None, "eval").chunk
        slow = torch.stack([slow_guided(policy, c[i], w[i], config) for i in range(len(c))])
        torch.testing.assert_close(chunk, slow, atol=1e-5, rtol=0)
        assert float((chunk - policy.sample(c, w)).abs().max()) > 0.05, "it does steer"


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_the_base_bit_for_bit_and_grippers_need_to_be_named(kind: str) -> None:
    policy = compact(kind, action=MOVES)
    c, w = inputs(policy, 8, torch.float32)
    none = GuidedHead(policy, GuidanceConfig(costs=smooth(), strength=0.0))
    assert torch.equal(none.propose(c, policy, w, None, "explore").chunk, policy.sample(c, w))
    before = policy.spec.base_hash
    pull = CostConfig("expression", 100.0, expression="sum((grip - 0.9)**2) + 0 * dx")
    held, free = (
        GuidedHead(policy, GuidanceConfig(costs=(CostConfig("expression", 100.0, expression=pull.expression, gripper=g),),
                                          strength=1.0, through="identity")) for g in (False, True)
    )  # fmt: skip
    own = policy.sample(c, w)
    assert torch.equal(held.propose(c, policy, w, None, "eval").chunk, own)
    moved = free.propose(c, policy, w, None, "eval").chunk
    assert float((moved - own)[..., 3].abs().max()) > 0.05
    assert policy.freeze().spec.base_hash == before
    assert all(p.grad is None for p in policy.parameters()), "the base gets no gradient"


@pytest.mark.parametrize("kind", KINDS)
def test_an_obstacle_cost_raises_the_clearance(kind: str) -> None:
    policy = compact(kind, action=MOVES)
    c, w = inputs(policy, 64, torch.float32)
    sphere = CostConfig("avoid_sphere", 1000.0, {"centre": ["state_0", "state_1", "state_2"], "radius": 0.2})
    head = GuidedHead(policy, GuidanceConfig(costs=(sphere,), path=PATH, strength=0.5, inner_steps=2, max_displacement=2.0))
    proposal = head.propose(c, policy, w, None, "eval")

    def clearance(chunk):
        scene = head._costs.scene(c, chunk, chunk)
        return (scene.path[:, 1:] - scene.path[:, :1]).norm(dim=-1).amin(1)

    assert float((clearance(proposal.chunk) - clearance(proposal.chunk_base)).mean()) > 0.01
    assert (
        proposal.info["reward"] >= head.reward_and_slope(c, proposal.chunk_base, proposal.chunk_base)[0] - 1e-6
    ).float().mean() > 0.9


def test_the_displacement_is_capped() -> None:
    policy = compact("flow", action=MOVES)
    c, w = inputs(policy, 16, torch.float32)
    head = GuidedHead(policy, GuidanceConfig(costs=smooth(1000.0), strength=5.0, gradient_max=5.0, max_displacement=0.07))
    proposal = head.propose(c, policy, w, None, "eval")
    assert 0.06 < float(proposal.info["displacement"].max()) <= 0.07 + 1e-6


# ---- costs


@pytest.mark.parametrize("term", sorted(TERMS))
def test_every_term_has_the_slope_of_its_value(term: str) -> None:
    """Central differences in double precision, at chunks where the cost is active."""
    policy = double("flow")
    c, _ = inputs(policy)
    chunk = torch.rand(5, 4, 4, generator=gen(3), dtype=torch.float64) * 1.6 - 0.8
    costs = ChunkCosts(policy, (CostConfig(term, 3.0, TERMS[term]),), PATH)
    reference = torch.zeros_like(chunk)
    leaf = chunk.clone().requires_grad_(True)
    reward = costs.reward(c, leaf, reference)
    assert float(reward.detach().max()) < 0.0, "costs are active"
    (slope,) = torch.autograd.grad(reward.sum(), leaf)
    for row, dim in ((0, 0), (1, 2), (2, 1), (3, 0), (1, 3)):
        d = torch.zeros_like(chunk)
        d[:, row, dim] = 1e-6
        with torch.no_grad():
            difference = (costs.reward(c, chunk + d, reference) - costs.reward(c, chunk - d, reference)) / 2e-6
        inactive = row >= 3 or dim == 3  # rows that do not run, and the gripper, which no term here names
        torch.testing.assert_close(
            slope[:, row, dim], torch.zeros(5).double() if inactive else difference, atol=1e-5, rtol=1e-5
        )


def test_paths_are_in_metres_from_where_the_tool_is() -> None:
    policy = double("diffusion")
    observation = {n: v.double() for n, v in observations(policy, 3).items()}
    c = policy.encode(observation).double()
    seen = policy.vector_observation(c)["observation.state"]
    torch.testing.assert_close(seen, observation["observation.state"][:, -1], atol=1e-6, rtol=0)
    chunk = torch.full((3, 4, 4), 0.5, dtype=torch.float64)
    scene = ChunkCosts(policy, (CostConfig("reach", 1.0, TERMS["reach"]),), PATH).scene(c, chunk, chunk)
    torch.testing.assert_close(scene.path[:, 3], seen[:, :3] + 3 * 0.05, atol=1e-6, rtol=0)  # three rows run, 0.05 m each


def ring_cost(action, observation):
    assert set(observation) == {"observation.state"}
    return (action[..., 0] ** 2).sum(1)


def not_a_cost(action, observation):
    return action.sum()


def test_a_python_function_is_a_cost() -> None:
    policy = compact("flow", action=MOVES)
    c, w = inputs(policy, 4, torch.float32)
    here = __name__ if __name__ != "__main__" else "test_guidance"
    import sys

    sys.modules.setdefault(here, sys.modules[ring_cost.__module__])
    head = GuidedHead(policy, GuidanceConfig(costs=(CostConfig("python", 50.0, function=f"{here}:ring_cost"),), strength=0.5))
    proposal = head.propose(c, policy, w, None, "eval")
    physical = [policy.unnormalize_action(x)[:, :3, 0].square().sum(1).mean() for x in (proposal.chunk, proposal.chunk_base)]
    assert physical[0] < physical[1]
    with pytest.raises(ValueError, match="can be imported"):
        GuidedHead(policy, GuidanceConfig(costs=(CostConfig("python", function="no.such.module:cost"),)))
    wrong = GuidedHead(policy, GuidanceConfig(costs=(CostConfig("python", function=f"{here}:not_a_cost"),)))
    with pytest.raises(ValueError, match="one cost a batch entry"):
        wrong.propose(c, policy, w, None, "eval")


def test_expressions_are_arithmetic_and_nothing_else() -> None:
    a, b = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0]])
    values = {"a": a, "b": b}
    for text, expected in (
        ("a * b + 1", [[4.0, 7.0, 13.0]]), ("last(cumsum(a)) - max(a)", [[3.0]]), ("sum(relu(a - 1.5))", [[3.0]]),
        ("norm(3, 4) + 0 * b", [[5.0]]), ("mean(diff(a)**2)", [[2.5]]), ("-first(a) / 2", [[-0.5]]),
    ):  # fmt: skip
        torch.testing.assert_close(Expression(text, {"a", "b"})(values), torch.tensor(expected))
    for text, why in (
        ("__import__('os')", "unknown function"), ("a.real", "Attribute is not accepted"), ("(lambda: 1)()", "is not accepted"),
        ("c + 1", "unknown name 'c'"), ("a ** b", "exponent"), ("[a for a in b]", "is not accepted"), ("a +", "no arithmetic"),
        ("'text'", "is not accepted"), ("a if b else 1", "is not accepted"), ("norm(a, axis=1)", "is not accepted"), ("1" * 3000, "characters"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            Expression(text, {"a", "b"})


def test_a_model_may_name_registry_terms_and_nothing_that_runs(tmp_path) -> None:
    good = [{"term": "reach", "weight": 2, "options": {"target": [0.1, 0.2, 0.3]}}, {"term": "stay_near_reference"}]
    file = tmp_path / "terms.json"
    file.write_text(json.dumps(good))
    assert [c.term for c in GuidanceConfig(terms_file=file).all_costs] == ["reach", "stay_near_reference"]
    for bad, why in (
        ([{"term": "explode"}], "term='explode'; accepted are reach"), ([{"term": "expression", "expression": "1"}], "unknown keys"),
        ([{"term": "python"}], "term='python'"), ([{"term": "reach", "options": {"target": ["a", 0, 0]}}], "accepted are numbers"),
        ([{"term": "speed_limit", "options": {"limit": 1}, "weight": 1e9}], "at most 1000"), ({"term": "reach"}, "JSON list"),
        ([{"term": "reach", "options": {"goal": 1}}], "accepted are \\['target'\\]"), ([{"term": "reach", "weight": "2"}], "weight='2'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            terms_from_json(json.dumps(bad))


def test_what_does_not_fit_is_refused_by_name() -> None:
    policy = compact("flow", action=MOVES)
    with pytest.raises(ValueError, match="nothing guides"):
        GuidedHead(policy, GuidanceConfig())
    with pytest.raises(ValueError, match=r"path.action and path.observation must say so"):
        GuidedHead(policy, GuidanceConfig(costs=(CostConfig("reach", options=TERMS["reach"]),)))
    with pytest.raises(ValueError, match="unknown name 'delta_q'"):
        GuidedHead(policy, GuidanceConfig(costs=(CostConfig("expression", expression="delta_q"),)))
    with pytest.raises(ValueError, match="does not hand it out"):
        GuidedHead(SmoothBase(), GuidanceConfig(costs=smooth()))
    with pytest.raises(ValueError, match=r"path.observation: 'elbow'"):
        ChunkCosts(policy, (), PathConfig(("dx", "dy", "dz"), ("elbow", "state_1", "state_2")))


# ---- learnt values and particles


def guided_by_value(policy, **config) -> GuidedHead:
    width = policy.spec.conditioning_dim + policy.spec.n_action_steps * policy.spec.action.dim
    critic = CriticEnsemble(3, width, (16,), generator=gen(9), dtype=torch.float64)
    return GuidedHead(policy, GuidanceConfig(value_weight=2.0, strength=0.5, **config), critic).double()


def test_the_slope_of_the_value_is_the_critics() -> None:
    policy = double("flow")
    c, _ = inputs(policy)
    chunk = torch.rand(5, 4, 4, generator=gen(3), dtype=torch.float64) * 1.6 - 0.8
    for how in ("min", "weighted_min_pair", "lcb"):
        head = guided_by_value(policy, value_reduce=how)
        value, slope = head.reward_and_slope(c, chunk, chunk)
        x = torch.cat([c, chunk[:, :3].flatten(1)], -1)
        q = torch.stack([head.critic(x)[i] for i in range(3)])
        plain = {"min": q.amin(0), "lcb": q.mean(0) - q.std(0, correction=0)}
        if how in plain:
            torch.testing.assert_close(value, 2.0 * plain[how], atol=1e-9, rtol=0)
        for row, dim in ((0, 0), (2, 3), (3, 1)):
            d = torch.zeros_like(chunk)
            d[:, row, dim] = 1e-6
            up, down = (head.reward_and_slope(c, x, x)[0] for x in (chunk + d, chunk - d))
            torch.testing.assert_close(slope[:, row, dim], (up - down) / 2e-6, atol=1e-5, rtol=1e-5)


def test_targets_of_value_guidance_are_what_acts() -> None:
    """Row 9: one rule; row 10: what the critic scores is the clamped chunk that runs."""
    from recipe_kit import random_batch

    from robot_rl.learners.config import OffPolicyConfig
    from robot_rl.learners.off_policy import OffPolicyLearner

    policy = compact("diffusion", action=MOVES)
    settings = OffPolicyConfig(algorithm="guided", n_critics=3, hidden=(16,))
    width = policy.spec.conditioning_dim + 3 * 4
    critic = CriticEnsemble(3, width, (16,), layer_norm=True, generator=gen(9))
    head = GuidedHead(policy, GuidanceConfig(value_weight=1.0, strength=0.5, particles=2), critic)
    learner = OffPolicyLearner(policy, head, settings)
    assert learner.target is head.critic, "acting ranks with the target network"
    batch = random_batch(policy)
    state = learner.generator.get_state()
    x, _ = learner.objective.next_input(batch, False)
    learner.generator.set_state(state)
    noise = torch.randn(12, 2, 4, 4, generator=learner.generator)
    acted = head.propose(batch.next_conditioning, policy, noise, None, "eval").chunk
    assert torch.equal(x, torch.cat([batch.next_conditioning, acted[:, :3].flatten(1)], -1))
    assert float(acted.abs().max()) <= 1.0
    learner.generator.set_state(state)
    y = batch.reward + batch.discount * learner.target.reduced_value(x, "min", None)
    learner.config = type(settings)(**{**vars(settings), "target_reduce": "min"})
    learner.generator.set_state(state)
    torch.testing.assert_close(learner.td_target(batch, x, torch.zeros(12), 0.0), y, atol=1e-6, rtol=0)
    before = learner.critic.flat.data.clone()
    learner.update(batch)
    assert not torch.equal(before, learner.critic.flat.data)


def test_the_best_particle_acts_and_resampling_is_systematic() -> None:
    policy = double("flow")
    c, _ = inputs(policy)
    w = torch.randn(5, 6, 4, 4, generator=gen(2), dtype=torch.float64)
    head = GuidedHead(policy, GuidanceConfig(costs=smooth(), strength=0.5, particles=6)).double()
    proposal = head.propose(c, policy, w, None, "eval")
    single = GuidedHead(policy, GuidanceConfig(costs=smooth(), strength=0.5)).double()
    each = [single.propose(c, policy, w[:, j], None, "eval") for j in range(6)]
    rewards = torch.stack([p.info["reward"] for p in each], 1)
    assert torch.equal(proposal.candidate_index, rewards.argmax(1))
    for i, j in enumerate(rewards.argmax(1).tolist()):
        torch.testing.assert_close(proposal.chunk[i], each[j].chunk[i], atol=1e-9, rtol=0)
        assert torch.equal(proposal.noise[i], w[i, j])
    share = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64)
    counts = torch.bincount(systematic_resample(share.log().expand(1, 4))[0], minlength=4)
    assert ((counts - 4 * share[0]).abs() <= 1).all()
    assert int(counts[3]) == 0
    even = GuidedHead(policy, GuidanceConfig(
        costs=smooth(), strength=0.5, particles=6, resample_every=2, resample_temperature=1e6)).double()  # fmt: skip
    torch.testing.assert_close(even.propose(c, policy, w, None, "eval").chunk, proposal.chunk, atol=1e-9, rtol=0)
    sharp = GuidedHead(policy, GuidanceConfig(
        costs=smooth(), strength=0.5, particles=6, resample_every=1, resample_temperature=1e-3)).double()  # fmt: skip
    found = sharp.propose(c, policy, w, None, "eval")
    torch.testing.assert_close(found.chunk_base, policy.sample(c, found.noise), atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="resample_every=2 with particles=1"):
        GuidanceConfig(resample_every=2)


# ---- CDSA


class Ideal(torch.nn.Module):
    """The exact denoiser of finitely many chunks: E[v | x] under an even mixture of Gaussians around them."""

    def __init__(self, points: torch.Tensor, kind: str) -> None:
        super().__init__()
        self.points, self.kind = points, kind

    def condition(self, c):
        return c

    def time(self, t):
        return t

    def forward(self, x, condition, t):
        if self.kind == "flow":
            root, sigma = float(t), 1 - float(t)
        else:
            root, sigma = self.root_sigma(float(t))
        weight = (-(x[:, None] - root * self.points).square().sum(-1) / (2 * sigma**2)).softmax(-1)
        x0 = weight @ self.points
        noise = (x - root * x0) / sigma
        return x0 - noise if self.kind == "flow" else root * noise - sigma * x0


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_that_of_the_data_and_the_filter_climbs_it(kind: str) -> None:
    policy = compact(kind, action=ActionSpec((-1.0, -1.0), (1.0, 1.0)), horizon=1, n_action_steps=1, train_steps=100).double()
    angle = torch.arange(200, dtype=torch.float64) / 200 * 2 * math.pi
    points = 0.6 * torch.stack([angle.cos(), angle.sin()], -1)
    ideal = Ideal(points, kind)
    policy.denoiser = ideal
    ideal.root_sigma = lambda t: (policy._alpha[round(t * 100) - 1].sqrt(), (1 - policy._alpha[round(t * 100) - 1]).sqrt())
    c = torch.zeros(40, policy.conditioning_dim, dtype=torch.float64)
    a = torch.rand(40, 1, 2, generator=gen(4), dtype=torch.float64) * 2 - 1
    level = 0.2
    root, sigma = (1 - level, level) if kind == "flow" else (float(x) for x in ideal.root_sigma(level))
    leaf = a.flatten(1).clone().requires_grad_(True)
    log_p = torch.logsumexp(-(leaf[:, None] - root * points).square().sum(-1) / (2 * sigma**2), 1)
    (exact,) = torch.autograd.grad(log_p.sum(), leaf)
    torch.testing.assert_close(policy.score(a.flatten(1), c, level), exact, atol=1e-5, rtol=1e-5)

    def off(x):
        return (x.flatten(1).norm(dim=1) - root * 0.6).abs()

    config = ScoreCorrectionConfig(steps=4, rate=0.3 * sigma**2, level=level)
    filtered = corrected(policy, c, a, config)
    assert float(off(filtered).mean()) < 0.4 * float(off(a).mean())
    plain = a
    for _ in range(4):
        plain = (plain + config.rate * policy.score(plain.flatten(1), c, level).unflatten(1, (1, 2))).clamp(-1, 1)
    torch.testing.assert_close(filtered, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_of_no_strength_is_the_identity_and_grippers_stay(kind: str) -> None:
    from robot_rl.heads.config import LatentNoiseConfig
    from robot_rl.heads.latent_noise import LatentNoiseHead

    policy = compact(kind, action=MOVES)
    c, w = inputs(policy, 8, torch.float32)
    inner = LatentNoiseHead(policy, LatentNoiseConfig(hidden=(8,)), generator=gen(1))
    drawn = torch.randn(8, inner.exploration_dim, generator=gen(3))
    for config in (ScoreCorrectionConfig(rate=0.0), ScoreCorrectionConfig(steps=0)):
        head = ScoreCorrectedHead(policy, config, inner)
        assert torch.equal(
            head.propose(c, policy, w, drawn, "explore").chunk, inner.propose(c, policy, w, drawn, "explore").chunk
        )
        alone = ScoreCorrectedHead(policy, config)
        assert torch.equal(alone.propose(c, policy, w, None, "eval").chunk, policy.sample(c, w))
    moved = ScoreCorrectedHead(policy, ScoreCorrectionConfig(rate=0.05)).propose(c, policy, w, None, "eval")
    change = moved.chunk - moved.chunk_base
    assert float(change[..., :3].abs().max()) > 1e-3
    assert torch.equal(moved.chunk[..., 3], moved.chunk_base[..., 3])


# ---- references


@pytest.mark.parametrize("kind", KINDS)
def test_denoising_a_reference_is_its_formula_and_monotone_in_strength(kind: str) -> None:
    policy = double(kind, num_steps=8)
    c, w = inputs(policy, 64)
    reference = torch.rand(64, 4, 4, generator=gen(5), dtype=torch.float64) * 2 - 1
    distances = []
    for i in range(9):
        out = denoise_reference(policy, c, reference, w, 1 - i / 8)
        distances.append(float((out - reference).square().mean().sqrt()))
        x = reference.flatten(1)
        if i < 8:
            if kind == "flow":
                x = (1 - i / 8) * w.flatten(1) + i / 8 * x
            else:
                a = float(policy._alpha[round(20 - i * 20 / 8) - 1])
                x = math.sqrt(a) * x + math.sqrt(1 - a) * w.flatten(1)
            condition, times = policy.chain_inputs(c)
            for j in range(i, 8):
                x = policy.chain_step(j, x, condition, times)
            x = x.clamp(-1, 1)
        torch.testing.assert_close(out.flatten(1), x, atol=1e-5, rtol=0)
    assert distances[8] == 0.0
    assert all(later < earlier + 1e-9 for earlier, later in pairwise(distances)), distances
    if kind == "flow":  # starts at pure noise
        torch.testing.assert_close(denoise_reference(policy, c, reference, w, 1.0), policy.sample(c, w), atol=1e-9, rtol=0)


def test_the_reference_is_what_followed_the_nearest_recorded_state() -> None:
    policy = compact("diffusion")
    library = torch.randn(30, policy.spec.conditioning_dim, generator=gen(1))
    chunks = torch.rand(30, 4, 3, generator=gen(2)) * 2 - 1
    head = ReferenceHead(policy, ReferenceConfig(strength=0.0), library, chunks)
    c = library[[3, 17]] + 0.01
    proposal = head.propose(c, policy, prior_noise(policy, 2, gen(3)), None, "explore")
    assert torch.equal(proposal.chunk, chunks[[3, 17]])
    published = ReferenceHead(policy, ReferenceConfig(strength=0.0), library * 0, chunks * 0)
    published.load_state_dict(head.state_dict())
    assert torch.equal(published.nearest(c), chunks[[3, 17]]), "references travel with the head"
    with pytest.raises(ValueError, match="at least one chunk"):
        ReferenceHead(policy, ReferenceConfig(), library[:0], chunks[:0])
    assert np.isfinite(ARM.low).all()
