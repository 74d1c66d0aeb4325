"""One-step students, densities of the data, optimistic labels, rarity, guided noise, falling optimism, KL: all against slow references."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from episodes_kit import batch_with_clones, recorded
from recipe_kit import FROZEN, gen, make, random_batch, resumes_exactly, shaken
from spine_kit import SmoothBase, compact
from torch import Tensor

from robot_rl.heads.config import GuidedNoiseConfig
from robot_rl.heads.guided_noise import GuidedNoise
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import BaseUpdateConfig, NoveltyConfig, OffPolicyConfig, OptimismConfig, SupportConfig
from robot_rl.learners.facts import columns
from robot_rl.learners.optimism import rarity
from robot_rl.learners.reduce import reduce
from robot_rl.learners.support import Support
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.windows import WindowConfig
from robot_rl.training.ingest import ingest
from robot_rl.types import FeatureSpec, Stratum

VAE = {"hidden": (8,), "updates": 0, "decay_updates": 10}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def watched(learner) -> torch.Generator:
    g = torch.Generator()
    g.set_state(learner.generator.get_state())
    return g


def grads(network) -> list[Tensor]:
    return [p.grad.clone() for p in network.parameters()]


def same(found: list[Tensor], loss: Tensor, parameters: list[Tensor]) -> None:
    for a, b in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


# ---- one step


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("change", [{}, {"normalize_q": True, "target_reduce": "mean", "distill_weight": 3.0}])
def test_one_step_equals_the_slow_reference(double, change: dict[str, Any], follow: bool) -> None:
    base = compact("flow").double().freeze()
    learner = make("one_step", base, **FROZEN, base_update=BaseUpdateConfig("all", lr=0.0), **change)
    for p in learner.cloner.online.denoiser.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=gen(9)))  # the teacher is no longer the base
    b, g = batch_with_clones(base), watched(learner)
    teacher, actor, critic = deepcopy(learner.cloner.online.policy), deepcopy(learner.head.actor), deepcopy(learner.critic)
    metrics = learner.update(b, train_actor=not follow)

    def f(c: Tensor, w: Tensor) -> Tensor:
        return actor(torch.cat([c, w.flatten(1)], 1))[0]

    w = torch.randn(12, 4, 3, generator=g)
    a = base.sample(b.next_conditioning, w)[:, :3].flatten(1) if follow else f(b.next_conditioning, w).clamp(-1, 1)
    with torch.no_grad():
        v = reduce(learner_target(learner)(torch.cat([b.next_conditioning, a], 1)), learner.config.target_reduce, g)
    y = b.reward + b.discount * v
    torch.testing.assert_close(metrics["critic/target"], y.mean(), atol=1e-5, rtol=0)
    if not follow:
        teacher.denoising_loss(b.clone.conditioning, b.clone.action, g)  # the base's own step comes first
    w = torch.randn(12, 4, 3, generator=g)
    raw = f(b.conditioning, w)
    wanted = teacher.sample(b.conditioning, w)[:, :3].flatten(1)
    loss = learner.config.distill_weight * sum(((raw[i] - wanted[i]) ** 2).mean() for i in range(12)) / 12
    torch.testing.assert_close(metrics["distill/loss"], ((raw - wanted) ** 2).mean().detach(), atol=1e-5, rtol=0)
    if not follow:
        q = critic(torch.cat([b.conditioning, raw.clamp(-1, 1)], 1)).mean(0)
        loss = loss - q.mean() / (float(q.detach().abs().mean()) if learner.config.normalize_q else 1.0)
    same(grads(learner.head.actor), loss, list(actor.parameters()))
    assert torch.equal(g.get_state(), learner.generator.get_state())


def learner_target(learner) -> Any:
    """The target as it was before the update moved it (the critic stands still, so it moved by tau towards it)."""
    before = deepcopy(learner.target)
    tau = learner.config.tau
    before.flat.data.copy_((learner.target.flat.data - tau * learner.critic.flat.data) / (1 - tau))
    return before


def test_a_student_becomes_its_teacher_before_it_is_released() -> None:
    learner = make("one_step", shape={"hidden": (64, 64)}, actor_lr=3e-3)
    losses = [float(learner.update(random_batch(learner.base, 64, s), train_actor=False)["distill/loss"]) for s in range(400)]
    assert learner.actor_updates == 0
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    noise, c = torch.randn(64, 3, 3, generator=gen(1)), torch.randn(64, 3, generator=gen(2))
    said = learner.head.propose(c, learner.base, noise, None, "explore")
    assert float((said.chunk[:, :2] - said.chunk_base[:, :2]).abs().mean()) < 0.3
    assert torch.equal(said.chunk[:, 2], said.chunk_base[:, 2])  # rows that do not run are the base's
    assert torch.equal(said.chunk, learner.head.propose(c, learner.base, noise, None, "eval").chunk)


def test_a_calibrated_critic_takes_a_one_step_policys_actions() -> None:
    learner = make("one_step", offline_critic="calql")
    metrics = learner.update(random_batch(learner.base), offline=True)
    assert math.isfinite(float(metrics["critic/gap"]))


# ---- densities


def slow_elbo(vae, s: Tensor, a: Tensor, e: Tensor) -> Tensor:
    m, log_std = vae.encoder(torch.cat([s, a])[None])[0, 0].chunk(2)
    std = log_std.clamp(-4, 15).exp()
    decoded = torch.tanh(vae.decoder(torch.cat([s, m + std * e])[None])[0, 0])
    prior = torch.distributions.Normal(torch.zeros_like(m), torch.ones_like(m))
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(m, std), prior).mean()
    return ((decoded - a) ** 2).mean() + 0.5 * kl


@pytest.mark.parametrize("algorithm", ["residual", "chunk_sac", "residual_sac", "one_step"])
def test_spot_penalty_equals_the_slow_reference(double, algorithm: str) -> None:
    config = {"support_penalty": 0.7, "support": SupportConfig("vae", **VAE), "normalize_q": True}
    learner = make(algorithm, **FROZEN, **config)
    plain = make(algorithm, **FROZEN, normalize_q=True)
    b, g = random_batch(learner.base), None
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    negative_elbo = learner.support.vae.negative_elbo
    learner.support.vae.negative_elbo = lambda s, a, e: (seen.append((s, a, e)), negative_elbo(s, a, e))[1]
    found = learner.update(b)
    plain.update(b)
    (s, a, e), leaf = seen[0], seen[0][1].detach().clone().requires_grad_(True)
    loss = sum(slow_elbo(learner.support.vae, s[i], leaf[i], e[i]) for i in range(12)) / 12
    torch.testing.assert_close(found["support/penalty"], loss.detach(), atol=1e-5, rtol=0)
    assert learner.support.strength == pytest.approx(0.7 * 0.9)  # one of ten updates has passed
    (slope,) = torch.autograd.grad(0.7 * 0.9 * loss, leaf)
    assert g is None
    # what the penalty adds to the actor's gradient is the chain rule along rows(actor): linear, so the difference is enough
    head, rows = deepcopy(learner.head), a.detach().unflatten(1, (2, 3))
    added = [p - q for p, q in zip(grads(learner.head.actor), grads(plain.head.actor), strict=True)]
    assert max(float(x.abs().max()) for x in added) > 1e-8
    if algorithm == "one_step":
        again = torch.Generator()
        again.manual_seed(learner.config.seed + 1)
        torch.randn(12, 3, 3, generator=again)
        torch.randint(4, (1,), generator=again), torch.randint(1, 4, (1,), generator=again)
        raw = head.actor(head.features(b.conditioning, torch.randn(12, 3, 3, generator=again)))[0]
        torch.testing.assert_close(raw.clamp(-1, 1).unflatten(1, (2, 3)), rows)
        same(added, (raw.clamp(-1, 1) * slope).sum(), list(head.actor.parameters()))


def test_the_density_comes_first_and_knows_the_data() -> None:
    """No actor step while it is fitted; then recorded chunks are likelier than others."""
    support = SupportConfig("vae", hidden=(32,), updates=300, lr=3e-3)
    learner = make("residual", SmoothBase(conditioning=1), support_penalty=1.0, support=support)
    before = learner.head.actor.flat.data.clone()
    g = gen(4)
    for _ in range(300):
        s = torch.rand(32, 1, generator=g) * 2 - 1
        a = (0.5 * s)[:, None, :].expand(32, 2, 3) + 0.02 * torch.randn(32, 2, 3, generator=g)
        learner.update(Batch(s, a, torch.zeros(32), torch.zeros(32), s, torch.ones(32)))
    assert torch.equal(before, learner.head.actor.flat.data)
    assert (learner.support.fitting, learner.actor_updates) == (False, 0)
    s = torch.rand(200, 1, generator=g) * 2 - 1
    recorded_rows, e = (0.5 * s)[:, None, :].expand(200, 2, 3).flatten(1), torch.zeros(200, 12)
    vae = learner.support.vae
    with torch.no_grad():
        likely, unlikely = (float(vae.negative_elbo(s, rows, e).mean()) for rows in (recorded_rows, -recorded_rows - 0.3))
    assert likely < 0.5 * unlikely
    learner.update(Batch(s, recorded_rows.unflatten(1, (2, 3)), torch.zeros(200), torch.zeros(200), s, torch.ones(200)))
    assert learner.actor_updates == 1


def test_the_weight_falls_online_to_its_floor() -> None:
    support = Support(3, 6, SupportConfig("vae", **VAE), 2.0, gen(1), torch.device("cpu"))
    assert support.strength == 2.0
    support.online = 5
    assert support.strength == 1.0
    support.online = 100
    assert support.strength == pytest.approx(0.4)
    assert Support(3, 6, SupportConfig("vae", hidden=(8,)), 2.0, gen(1), torch.device("cpu")).strength == 2.0


# ---- optimistic labels


def optimistic(**config) -> Any:
    settings = OptimismConfig(
        **{"strata": ("prior",), "hidden": (16,), "features": 5, "every": 2, "lr": 0.0, "bonus": 0.7, **config}
    )
    return make("chunk_sac", **FROZEN, optimism=settings)


def half_labelled(base, seed: int = 0) -> Batch:
    b = random_batch(base, seed=seed)
    return replace(b, unlabelled=(torch.rand(12, generator=gen(seed + 9)) > 0.5).to(b.reward))


def test_optimistic_labels_equal_the_slow_reference(double) -> None:
    learner = optimistic()
    o = learner.optimism
    for i, net in enumerate((o.reward, o.end, o.predictor)):
        shaken(net, i + 20)
    b = half_labelled(learner.base)
    x = learner.objective.critic_input(b)
    nets = {k: deepcopy(v) for k, v in o.trained.items()}
    new, metrics = o.labelled(b, x)
    w = b.weight * (1 - b.unlabelled)
    r_hat, logit = nets["reward"](x)[0, :, 0], nets["end"](x)[0, :, 0]
    gap = ((nets["predictor"](x)[0] - o.random(x)[0]) ** 2).mean(-1)
    for i in range(12):
        guessed = bool(b.unlabelled[i])
        r = float(r_hat[i] + 0.7 * gap[i]) if guessed else float(b.reward[i])
        d = float(b.discount[i]) * (1 - 1 / (1 + math.exp(-float(logit[i])))) if guessed else float(b.discount[i])
        assert float(new.reward[i]) == pytest.approx(r, abs=1e-5)
        assert float(new.discount[i]) == pytest.approx(d, abs=1e-5)
    assert torch.equal(new.weight, b.weight)
    ended = (b.discount == 0).double()
    losses = {
        "reward": (w * (r_hat - b.reward) ** 2).sum() / w.sum(),
        "end": -(w * (ended * torch.log(torch.sigmoid(logit)) + (1 - ended) * torch.log(1 - torch.sigmoid(logit)))).sum()
        / w.sum(),
        "predictor": (w * gap).sum() / w.sum(),
    }
    for name, key in (("reward", "reward_loss"), ("end", "end_loss"), ("predictor", "novelty_loss")):
        torch.testing.assert_close(metrics[f"optimism/{key}"], losses[name].detach(), atol=1e-5, rtol=0)
        same(grads(o.trained[name]), losses[name], list(nets[name].parameters()))
    assert "optimism/novelty_loss" not in o.labelled(b, x)[1]  # the predictor moves every second update


def test_unlabelled_windows_wait_for_the_models_and_labels_reach_the_target(double) -> None:
    learner = optimistic(start_updates=1)
    b = half_labelled(learner.base)
    x = learner.objective.critic_input(b)
    assert torch.equal(learner.optimism.labelled(b, x)[0].weight, b.weight * (1 - b.unlabelled))
    new, _ = learner.optimism.labelled(b, x)
    assert torch.equal(new.weight, b.weight)
    state = learner.generator.get_state()
    found = learner.update(b)["critic/target"]
    learner.generator.set_state(state)
    following, log_prob = learner.objective.next_input(new, False)
    learner.target.flat.data.copy_(learner_target(learner).flat.data)
    torch.testing.assert_close(found, learner.td_target(new, following, log_prob, 1.0).mean(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="column 'unlabelled'"):
        learner.update(random_batch(learner.base))


def test_the_bonus_is_greater_where_nothing_was_practised_and_fades() -> None:
    learner = make("chunk_sac", optimism=OptimismConfig(("prior",), hidden=(32,), features=16, every=1, lr=3e-3))
    base = learner.base
    practised = [replace(random_batch(base, 64, s), unlabelled=torch.zeros(64)) for s in range(40)]
    far = random_batch(base, 64, 99)
    far = replace(far, conditioning=far.conditioning * 4 + 5)
    inputs = [learner.objective.critic_input(b) for b in (practised[0], far)]
    before = [float(learner.optimism.bonus(x).mean()) for x in inputs]
    for b in practised * 3:
        learner.optimism.labelled(b, learner.objective.critic_input(b))
    near, unseen = (float(learner.optimism.bonus(x).mean()) for x in inputs)
    assert near < 0.2 * before[0]
    assert unseen > 3 * near
    for _ in range(200):  # ... and once practised there too, it fades there
        learner.optimism.labelled(replace(far, unlabelled=torch.zeros(64)), inputs[1])
    assert float(learner.optimism.bonus(inputs[1]).mean()) < 0.5 * unseen


def test_prior_logs_enter_without_their_rewards_and_ends() -> None:
    base = SmoothBase(conditioning=4, n_action_steps=3)
    config = OffPolicyConfig(algorithm="chunk_sac", optimism=OptimismConfig(("prior",)))
    extra = {"episode_return": FeatureSpec(()), "return_known": FeatureSpec(())} | columns(config)
    buffer = ReplayBuffer(
        200, conditioning_dim=4, action_dim=3, window=WindowConfig(3, 0.9), delta_mask=base.spec.action.delta_mask, extra=extra
    )
    prior = recorded("prior", 9, 1, terminated=True)
    prior.reward[:] = np.nan
    ingest(buffer, prior, base, stratum=Stratum.PRIOR, learner=config)
    ingest(buffer, recorded("own", 9, 2, terminated=True), base, learner=config)
    w = buffer.sample(300, np.random.default_rng(0))
    of_prior = w.extra["unlabelled"] > 0
    assert 0.2 < of_prior.mean() < 0.8
    assert (w.reward[of_prior] == 0).all()
    assert (w.discount[of_prior] > 0).all()  # how it ended is the model's to say
    assert (w.extra["return_known"][of_prior] == 0).all()
    assert set(w.step[~of_prior].tolist()) == set(range(9))


# ---- rarity


def test_rarity_equals_the_slow_reference_and_fades(double) -> None:
    learner = make("chunk_sac", **FROZEN, novelty=NoveltyConfig(0.5, 3, 2.0, updates=4))
    b = random_batch(learner.base)
    q = learner.target.value(learner.objective.critic_input(b)).amin(0)
    z = torch.cat([b.conditioning / b.conditioning.std(0, correction=0), 2.0 * q[:, None] / q.std(correction=0)], 1)
    expected = []
    for i in range(12):
        distance = sorted(float((z[i] - z[j]).norm()) for j in range(12) if j != i)[:3]
        expected.append(math.tanh(math.log(1 + sum(distance) / 3)))
    found = rarity(b.conditioning, q, 3, 2.0)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    reward = b.reward.clone()
    bonuses = [float(learner.update(b)["novelty/bonus"]) for _ in range(6)]
    assert bonuses[0] == pytest.approx(0.5 * float(np.mean(expected)), abs=1e-5)
    assert bonuses[4:] == [0.0, 0.0]
    assert torch.equal(reward, b.reward)  # nothing of it is kept


def test_rarity_is_larger_where_data_are_sparse_and_bounded() -> None:
    crowd, lone = 0.05 * torch.randn(60, 2, generator=gen(1)), 3.0 + torch.randn(4, 2, generator=gen(2))
    found = rarity(torch.cat([crowd, lone]), torch.zeros(64), 5, 1.0)
    assert float(found[60:].min()) > float(found[:60].max())
    assert 0.0 <= float(found.min()) <= float(found.max()) < 1.0


# ---- guided noise


GUIDED = {"guided": GuidedNoiseConfig(on=True, hidden=(16,)), "gripper_scale": 0.0}


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("mean", ["learned", "zero"])
def test_guided_noise_likelihood_equals_torch(double, covariance: str, mean: str) -> None:
    model = GuidedNoise(3, 4, GuidedNoiseConfig(True, mean, covariance, (8,)), gen(1))
    shaken(model.network, 2)
    x, gap, normals = (torch.randn(6, n, generator=gen(n)) for n in (3, 4, 5))
    m, root = model(x)
    normal = torch.distributions.MultivariateNormal(m, scale_tril=root)
    torch.testing.assert_close(model.negative_log_likelihood(x, gap), -normal.log_prob(gap), atol=1e-8, rtol=0)
    drawn = model.draw(x, normals[:, :4])
    torch.testing.assert_close(drawn, m + torch.stack([root[i] @ normals[i, :4] for i in range(6)]))
    assert (float(m.abs().max()) == 0.0) == (mean == "zero")
    assert (float(root.tril(-1).abs().max()) > 0) == (covariance == "full")


def test_guided_noise_is_fitted_to_demonstrations_alone(double) -> None:
    learner = make("residual", shape=GUIDED, **FROZEN)
    b = replace(random_batch(learner.base), stratum=torch.tensor([0, 1] * 6))
    g, model, head = watched(learner), deepcopy(learner.head.noise_model), deepcopy(learner.head)
    metrics = learner.update(b, train_actor=False)
    torch.randn(12, 3, 3, generator=g)  # the target's
    learner_pair = torch.randint(4, (1,), generator=g), torch.randint(1, 4, (1,), generator=g)
    assert len(learner_pair) == 2
    rows = learner.base.sample(b.conditioning, torch.randn(12, 3, 3, generator=g))[:, :2]
    total, norm = torch.zeros(()), 0.0
    for i in range(12):
        if i % 2 == 0 or not b.weight[i]:
            continue
        wanted = ((b.action[i] - rows[i]) / 0.8).clamp(-1, 1)
        wanted[:, 2] = 0.0  # the gripper is the base's
        u = head.unit_action(b.conditioning[i : i + 1], rows[i : i + 1])[0].unflatten(0, (2, 3)).detach().clone()
        u[:, 2] = 0.0
        features = torch.cat([b.conditioning[i], rows[i].flatten()])[None]
        total = total + model.negative_log_likelihood(features, (wanted - u).flatten()[None])[0]
        norm += 1
    torch.testing.assert_close(metrics["guided/loss"], (total / norm).detach(), atol=1e-5, rtol=0)
    same(grads(learner.head.noise_model), total / norm, list(model.parameters()))
    assert torch.equal(g.get_state(), learner.generator.get_state())


def test_guided_noise_finds_the_gap_and_leaves_evaluation_alone() -> None:
    model = GuidedNoise(1, 2, GuidedNoiseConfig(True, "learned", "full", (32,)), gen(1))
    from robot_rl.nn.flat import FlatAdam

    optimizer, g = FlatAdam(model.network.flat, 3e-3), gen(2)
    root = torch.tensor([[0.4, 0.0], [0.3, 0.2]])
    for _ in range(800):
        x = torch.rand(128, 1, generator=g) * 2 - 1
        gap = torch.cat([x, -x], 1) * 0.5 + torch.randn(128, 2, generator=g) @ root.T
        model.network.flat.zero_grad()
        model.negative_log_likelihood(x, gap).mean().backward()
        optimizer.step()
    m, found = (t.detach() for t in model(torch.tensor([[0.6]])))
    torch.testing.assert_close(found[0] @ found[0].T, root @ root.T, atol=0.03, rtol=0)
    torch.testing.assert_close(m[0], torch.tensor([0.3, -0.3]), atol=0.08, rtol=0)
    learner = make("residual", shape=GUIDED, guided_updates=2)
    head, c, noise = learner.head, torch.randn(5, 3, generator=g), torch.randn(5, 3, 3, generator=g)
    shaken(head.noise_model.network, 3)
    draws = torch.randn(5, head.exploration_dim, generator=g)
    guided = head.propose(c, learner.base, noise, draws, "explore").chunk
    calm = head.propose(c, learner.base, noise, None, "eval").chunk
    assert not torch.equal(guided, calm)
    for s in range(2):
        learner.update(replace(random_batch(learner.base, seed=s), stratum=torch.ones(12)))
    assert float(head.guided_share) == 0.0  # annealed away: what is left is the residual's own exploration
    plain = make("residual", shape={"gripper_scale": 0.0}).head
    plain.actor.load_state_dict(head.actor.state_dict())
    assert torch.equal(
        head.propose(c, learner.base, noise, draws, "explore").chunk,
        plain.propose(c, learner.base, noise, draws[:, :-1], "explore").chunk,
    )


# ---- falling optimism, divergence from the base


def test_optimism_falls_online_only_and_is_published() -> None:
    shape = {"select_reduce": "lcb", "select_k": -1.0}
    learner = make("edit", shape=shape, select_k_updates=4)
    for s in range(2):
        learner.update(random_batch(learner.base, seed=s), offline=True)
    assert float(learner.head.lean) == -1.0
    for s in range(3):
        learner.update(random_batch(learner.base, seed=s))
    assert float(learner.head.state_dict()["lean"]) == pytest.approx(-0.25)
    other = make("edit", shape=shape, select_k_updates=4)
    other.load_state_dict(learner.state_dict())
    for one in (learner, other):
        one.update(random_batch(one.base, seed=5))
    assert (float(learner.head.lean), float(other.head.lean)) == (0.0, 0.0)
    assert make("edit").head.lean is None


def test_ucb_picks_the_arm_of_higher_spread_when_means_tie() -> None:
    from robot_rl.heads.best_of_n import score
    from robot_rl.heads.config import SelectionConfig

    class Two:
        def reduced_value(self, x, how, generator=None, *, k=1.0):
            q = torch.stack([x[:, 0] * 0 + 1 + x[:, 1], x[:, 0] * 0 + 1 - x[:, 1]])  # spread is the action itself
            return reduce(q, how, k=k)

    candidates = torch.tensor([0.1, 0.5, 0.3]).reshape(1, 3, 1, 1)
    config = SelectionConfig(select_reduce="lcb", select_k=-1.0)
    scores = [score(Two(), torch.zeros(1, 1), candidates, config, k) for k in (None, torch.tensor(-0.5), torch.tensor(0.0))]
    assert int(scores[0].argmax()) == 1
    assert scores[1].tolist()[0] == pytest.approx([1.05, 1.25, 1.15])
    assert float(scores[2].std()) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("algorithm", ["dsrl_na", "dsrl_sac"])
def test_the_price_of_leaving_the_base_is_part_of_the_return(double, algorithm: str) -> None:
    off = {"fixed_alpha": True, "initial_alpha": 0.0}
    plain, priced = (make(algorithm, **FROZEN, **off, kl_base=0.3, kl_demos=40, kl_backup=k) for k in (False, True))
    for learner in (plain, priced):
        learner.head.basis.matrix = learner.head.basis.matrix.double()
        learner.know_demonstrations(10)
    b = random_batch(plain.base)
    mean, log_std = priced.head.actor(b.next_conditioning)
    normal = torch.distributions.Normal(mean, log_std.exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(torch.zeros_like(mean), 1.0)).sum(-1)
    found = [learner.update(b)["critic/target"] for learner in (plain, priced)]
    torch.testing.assert_close(found[0] - found[1], (b.discount * 0.3 * 0.25 * kl).mean().detach(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="never reads them"):
        OffPolicyConfig(kl_backup=True)


# ---- resume


RESUMED = {
    "one_step": {"base_update": BaseUpdateConfig("all"), "actor_every": 2},
    "residual": {"support_penalty": 1.0, "support": SupportConfig("vae", hidden=(8,), updates=2), "guided_updates": 10},
    "chunk_sac": {"optimism": OptimismConfig(("prior",), hidden=(8,), features=4), "novelty": NoveltyConfig(0.1)},
}


@pytest.mark.parametrize("algorithm", RESUMED)
def test_row_11_resumes_bit_for_bit(algorithm: str) -> None:
    shape = {"residual": GUIDED}.get(algorithm, {})

    def begin():
        return make(algorithm, compact("flow"), shape=shape, n_critics=2, **RESUMED[algorithm])

    def play(learner, seeds) -> None:
        for s in seeds:
            b = batch_with_clones(learner.base, s)
            learner.update(replace(b, unlabelled=(torch.rand(12, generator=gen(s)) > 0.5).float(), stratum=torch.ones(12)))

    resumes_exactly(begin, play)


def test_row_2_what_nobody_reads_is_refused() -> None:
    from robot_rl.config import ConfigError, decode
    from robot_rl.learners.config import RecapConfig, WeightedBCConfig
    from robot_rl.training.config import PostTrainConfig

    for algorithm, change in [
        ("dsrl_na", {"support": SupportConfig("vae"), "support_penalty": 1.0}), ("edit", {"distill_weight": 1.0}),
        ("chunk_sac", {"smoothing_clip": 0.5}), ("residual", {"select_k_updates": 5}), ("edit", {"guided_updates": 5}),
        ("chunk_sac", {"kl_base": 0.1, "fixed_alpha": True, "initial_alpha": 0.0}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="never reads it"):
            OffPolicyConfig(algorithm=algorithm, **change)
    with pytest.raises(ValueError, match="never reads it"):
        OffPolicyConfig(algorithm="residual", support=SupportConfig("vae"))
    with pytest.raises(ValueError, match="never reads it"):
        WeightedBCConfig(recap=RecapConfig(bins=3))
    for head, learner, match in [
        ({"kind": "edit"}, {"algorithm": "edit", "select_k_updates": 5}, "select_reduce"),
        ({"kind": "residual"}, {"algorithm": "residual", "guided_updates": 5}, "guided.on"),
        ({"kind": "edit", "edit": {"own_base": True}}, {"algorithm": "edit"}, "own_base=true"),
        ({"kind": "chunk_policy"}, {"algorithm": "hybrid_sac"}, "accepted is chunk_sac"),
        ({"kind": "fine_tuned"}, {"algorithm": "cqn"}, "accepted is weighted_bc"),
    ]:
        with pytest.raises((ValueError, ConfigError), match=match):
            decode(PostTrainConfig, {"head": head, "learner": learner})
