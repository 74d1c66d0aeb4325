"""The off-policy core: equal to slow references written from the formulas, exact on a chain, and it learns."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from spine_kit import STATE, SmoothBase, TwoModeBase, compact

from robot_rl.heads.config import LatentNoiseConfig, ResidualConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.residual import ResidualHead
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import ConservativeConfig, OffPolicyConfig
from robot_rl.learners.off_policy import OffPolicyLearner
from robot_rl.learners.reduce import reduce
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.windows import WindowConfig
from robot_rl.training.checkpoint import load_checkpoint, save_checkpoint
from robot_rl.training.ingest import discounted_returns, ingest
from robot_rl.types import Episode, EpisodeMeta, FeatureSpec

ALGORITHMS = ("dsrl_na", "dsrl_sac", "residual")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(algorithm: str = "dsrl_na", base=None, **config) -> OffPolicyLearner:
    """A learner with random (never zero) weights everywhere."""
    base = base or SmoothBase()
    if algorithm == "residual":
        head = ResidualHead(base, ResidualConfig(scale=0.8, gripper_scale=0.2, hidden=(16,)), generator=gen(1))
        head.actor.flat.data.add_(0.3 * torch.randn(head.actor.flat.data.shape, generator=gen(2)))
        head.scale = head.scale.to(torch.get_default_dtype())
    else:
        head = LatentNoiseHead(base, LatentNoiseConfig(hidden=(16,)), generator=gen(1))
        head.basis.matrix = head.basis.matrix.to(torch.get_default_dtype())
        head.actor.flat.data.add_(0.3 * torch.randn(head.actor.flat.data.shape, generator=gen(2)))
    defaults = {"algorithm": algorithm, "n_critics": 4, "hidden": (16, 16), "distill_every": 1}
    return OffPolicyLearner(base, head, OffPolicyConfig(**{**defaults, **config}))


def random_batch(base, size: int = 32, seed: int = 0) -> Batch:
    """Windows with truncation (discount gamma^m), termination (0) and rows that must not count."""
    g, spec = gen(seed), base.spec
    rows, dims = spec.n_action_steps, spec.action.dim
    m = torch.randint(1, rows + 1, (size,), generator=g)
    alive = (torch.rand(size, generator=g) > 0.3).to(torch.get_default_dtype())
    return Batch(
        conditioning=torch.randn(size, spec.conditioning_dim, generator=g),
        action=torch.rand(size, rows, dims, generator=g) * 2 - 1,
        reward=torch.randn(size, generator=g),
        discount=0.9**m * alive,
        next_conditioning=torch.randn(size, spec.conditioning_dim, generator=g),
        weight=(torch.rand(size, generator=g) > 0.2).to(torch.get_default_dtype()),
        noise=None if spec.noise_shape is None else torch.randn(size, *spec.noise_shape, generator=g),
        episode_return=torch.randn(size, generator=g),
    )


FROZEN = {"critic_lr": 0.0, "actor_lr": 0.0}
"""With these an update leaves the parameters alone, so its gradients belong to the parameters it started from."""


class Reference:
    """One update, slowly: autograd, one formula after the other, the learner's own random draws in the same order."""

    def __init__(self, learner: OffPolicyLearner) -> None:
        self.c, self.base = learner.config, learner.base
        self.head, self.critic, self.target = (deepcopy(x) for x in (learner.head, learner.critic, learner.target))
        self.alpha = self.c.initial_alpha
        self.generator = torch.Generator()
        self.generator.set_state(learner.generator.get_state())
        self.noise_critic = deepcopy(getattr(learner.objective, "noise_critic", None))
        for network in (self.head.actor, self.critic, self.noise_critic):
            if network is not None:
                network.flat.zero_grad()

    def noise(self, size: int) -> torch.Tensor:
        return torch.randn(size, *self.base.spec.noise_shape, generator=self.generator)

    def pick(self, c: torch.Tensor, follow_base: bool, smooth: bool):
        """(input of the critic beside the state, noise, log probability) of whoever acts in states c."""
        n = self.base.spec.n_action_steps
        if self.c.algorithm == "residual":
            rows = self.base.sample(c, self.noise(len(c)))[:, :n]
            if follow_base:
                return rows.flatten(1), None, torch.zeros(len(c))
            u = torch.tanh(self.head.actor(torch.cat([c, rows.flatten(1)], 1))[0])
            if smooth:
                jitter = torch.randn(u.shape, generator=self.generator) * self.head.config.exploration_std
                u = (u + jitter.clamp(-0.3, 0.3)).clamp(-1, 1)
            corrected = rows + self.head.scale * u.unflatten(1, rows.shape[1:])
            return corrected.clamp(-1, 1).flatten(1), None, torch.zeros(len(c))
        if follow_base:
            noise, log_prob = self.noise(len(c)), torch.zeros(len(c))
        else:
            u, log_prob = self.head.actor.rsample(c, self.generator)
            noise = self.head.config.noise_bound * u.unflatten(1, self.base.spec.noise_shape)
        if self.c.algorithm == "dsrl_sac":
            return noise.flatten(1), noise, log_prob
        return self.base.sample(c, noise, grad=True)[:, :n].flatten(1), noise, log_prob

    def target_value(self, b: Batch, follow_base: bool) -> torch.Tensor:
        with torch.no_grad():
            action, _, log_prob = self.pick(b.next_conditioning, follow_base, smooth=True)
            v = reduce(self.target(torch.cat([b.next_conditioning, action], 1)), self.c.target_reduce, self.generator)
            if self.c.entropy_backup:
                v = v - self.alpha * log_prob
            if self.c.value_max is not None:
                v = v.clamp(max=self.c.value_max)
            return b.reward + b.discount * v

    def critic_loss(self, b: Batch, y: torch.Tensor) -> torch.Tensor:
        taken = b.noise if self.c.algorithm == "dsrl_sac" else b.action
        q = self.critic(torch.cat([b.conditioning, taken.flatten(1)], 1))
        loss = torch.zeros(())
        for i in range(len(q)):
            loss = loss + 0.5 * sum(b.weight[j] * (q[i, j] - y[j]) ** 2 for j in range(len(y))) / max(
                float(b.weight.sum()), 1.0
            )
        return loss

    def actor_loss(self, b: Batch) -> torch.Tensor:
        c = b.conditioning
        action, noise, log_prob = self.pick(c, False, smooth=False)
        critic = self.critic
        if self.c.algorithm == "dsrl_na" and self.c.actor_gradient == "distilled":
            critic, action = self.noise_critic, noise.flatten(1)
        value = reduce(critic(torch.cat([c, action], 1)), self.c.actor_reduce, self.generator)
        loss = (-value if self.c.algorithm == "residual" else self.alpha * log_prob - value).mean()
        if self.c.kl_base:
            mean, log_std = self.head.actor(c)
            prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
            kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, log_std.exp()), prior).sum(-1).mean()
            loss = loss + self.c.kl_base * kl
        return loss

    def distillation_loss(self, b: Batch) -> torch.Tensor:
        c, n = b.conditioning, self.base.spec.n_action_steps
        noise = self.noise(len(c))
        share = int(self.c.distill_actor_share * len(c))
        if share:
            u, _ = self.head.actor.rsample(c[:share], self.generator)
            noise = torch.cat([self.head.config.noise_bound * u.detach().unflatten(1, noise.shape[1:]), noise[share:]])
        chunk = self.base.sample(c, noise)[:, :n].flatten(1)
        with torch.no_grad():
            q = self.critic(torch.cat([c, chunk], 1))
        w = self.noise_critic(torch.cat([c, noise.flatten(1)], 1))
        return sum(0.5 * ((w[i] - q[i]) ** 2).mean() for i in range(len(q)))  # head i distils head i


class BlackBox:
    """A base that gives chunks and no gradient."""

    def __init__(self, base) -> None:
        self.base, self.spec = base, base.spec

    def sample(self, conditioning: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.base.sample(conditioning, noise)


def test_the_actor_climbs_through_the_sampler_where_the_base_lets_it() -> None:
    base = make("dsrl_na").base
    box = BlackBox(base)
    assert make("dsrl_na", base=base, actor_gradient="auto").objective.noise_critic is None
    assert make("dsrl_na", base=box, actor_gradient="auto").objective.noise_critic is not None
    with pytest.raises(ValueError, match=r"actor_gradient='sampler'.*accepted are auto and distilled"):
        make("dsrl_na", base=box, actor_gradient="sampler")


CASES = [
    ("dsrl_na", {}),
    ("dsrl_na", {"entropy_backup": True, "target_reduce": "mean", "initial_alpha": 0.3, "distill_actor_share": 0.5}),
    ("dsrl_na", {"actor_gradient": "sampler", "actor_reduce": "min"}),
    ("dsrl_na", {"actor_gradient": "sampler", "kl_base": 0.7, "fixed_alpha": True, "initial_alpha": 0.0}),
    ("dsrl_sac", {}),
    ("dsrl_sac", {"entropy_backup": True, "target_reduce": "min", "actor_reduce": "min_pair", "initial_alpha": 0.2}),
    ("residual", {}),
    ("residual", {"target_reduce": "weighted_min_pair", "actor_reduce": "min", "value_max": 0.1}),
]


@pytest.mark.parametrize("follow_base", [False, True])
@pytest.mark.parametrize(("algorithm", "change"), CASES)
def test_equals_the_slow_reference(double, algorithm: str, change: dict, follow_base: bool) -> None:
    learner = make(algorithm, **FROZEN, **change)
    learner.target.flat.data.add_(0.1)  # the target is not the critic
    batch = random_batch(learner.base)
    slow = Reference(learner)
    metrics = learner.update(batch, train_actor=not follow_base)
    y = slow.target_value(batch, follow_base)
    loss = slow.critic_loss(batch, y)
    loss.backward()
    torch.testing.assert_close(metrics["critic/target"], y.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(metrics["critic/loss"], loss.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(learner.critic.flat.grad, slow.critic.flat.grad, atol=1e-8, rtol=1e-6)
    if not follow_base:
        gradient = torch.autograd.grad(slow.actor_loss(batch), list(slow.head.actor.parameters()))
        found = [p.grad for p in learner.head.actor.parameters()]
        for a, b in zip(found, gradient, strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)
        assert max(float(g.abs().max()) for g in gradient) > 1e-6
    if slow.noise_critic is not None:
        distilled = slow.distillation_loss(batch)
        distilled.backward()
        torch.testing.assert_close(metrics["distill/loss"], distilled.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(learner.objective.noise_critic.flat.grad, slow.noise_critic.flat.grad, atol=1e-8, rtol=1e-6)
    assert torch.equal(slow.generator.get_state(), learner.generator.get_state())  # not one draw more or less


def test_row_3_one_noise_scaling_for_queries_and_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acting, actor queries and the actor's share of distillation go through ``to_noise``; both errors are logged."""
    scaled: list[torch.Tensor] = []
    to_noise = LatentNoiseHead.to_noise

    def spy(self, u, prior=None):
        scaled.append(to_noise(self, u, prior))
        return scaled[-1]

    monkeypatch.setattr(LatentNoiseHead, "to_noise", spy)
    learner = make(distill_actor_share=0.5)
    seen: list[torch.Tensor] = []
    critic = learner.objective.noise_critic
    for name in ("input_grad", "loss_and_grad"):
        method = getattr(critic, name)
        monkeypatch.setattr(critic, name, lambda x, *a, _m=method, **k: (seen.append(x.clone()), _m(x, *a, **k))[1])
    metrics = learner.update(random_batch(learner.base))
    assert len(scaled) == 3  # target, actor query, distillation
    query, distilled = (x[:, learner.objective.features :] for x in seen)
    assert torch.equal(query, scaled[1].flatten(1))
    assert torch.equal(distilled[:16], scaled[2].flatten(1))
    assert float(query.abs().max()) <= 1.5 < float(distilled[16:].abs().max())  # the prior's share is not clipped
    assert {"distill/error_prior", "distill/error_actor"} <= metrics.keys()


@pytest.mark.parametrize("algorithm", ["dsrl_na", "residual"])
def test_row_9_acting_and_target_select_alike(algorithm: str) -> None:
    """Equal states and equal draws: the chunk that acts is the chunk that the target scores."""
    learner = make(algorithm)
    head, base = learner.head, learner.base
    if algorithm == "residual":  # the target smooths within a clip, so compare where exploration stays inside it
        head.config = replace(head.config, exploration_std=0.05)
    batch = random_batch(base)
    state = learner.generator.get_state()
    scored, log_prob = learner.objective.next_input(batch, False)
    learner.generator.set_state(state)
    noise = None
    if algorithm == "residual":
        noise = torch.randn(32, *base.spec.noise_shape, generator=learner.generator)
    exploration = torch.randn(32, head.exploration_dim, generator=learner.generator)
    acted = head.propose(batch.next_conditioning, base, noise, exploration, "explore")
    expected = acted.chunk[:, : base.spec.n_action_steps].flatten(1)
    torch.testing.assert_close(scored[:, base.spec.conditioning_dim :], expected, atol=1e-6, rtol=0)
    if algorithm == "dsrl_na":
        torch.testing.assert_close(log_prob, acted.log_prob, atol=1e-4, rtol=1e-5)


def test_row_10_what_is_scored_is_what_would_be_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base at its limit and a correction beyond it: the critic climbs at the clamped chunk, fits executed rows."""
    learner = make("residual", base=SmoothBase(gain=30.0))
    batch = random_batch(learner.base)
    scored: list[torch.Tensor] = []
    climb = learner.critic.input_grad
    monkeypatch.setattr(learner.critic, "input_grad", lambda x, *a, **k: (scored.append(x.clone()), climb(x, *a, **k))[1])
    head = deepcopy(learner.head)
    learner.update(batch)
    noise = learner.base.noises[-1]
    executed = head.propose(batch.conditioning, learner.base, noise, None, "eval").chunk[:, :2].flatten(1)
    torch.testing.assert_close(scored[0][:, 3:], executed)
    assert float(executed.abs().max()) == 1.0
    torch.testing.assert_close(learner.objective.critic_input(batch)[:, 3:], batch.action.flatten(1))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_row_8_rows_of_weight_zero_change_nothing(double, algorithm: str) -> None:
    """The critic's gradient divides by the valid rows: adding rows that do not count leaves it as it is."""
    learner = make(algorithm, **FROZEN, target_reduce="mean", n_critics=2)
    batch = random_batch(learner.base)
    x, y = learner.objective.critic_input(batch), torch.randn(32, generator=gen(9))
    learner.critic.loss_and_grad(x, y, batch.weight)
    before = learner.critic.flat.grad.clone()
    more = torch.cat([x, 100 * torch.randn(7, x.shape[1], generator=gen(8))])
    learner.critic.loss_and_grad(more, torch.cat([y, torch.full((7,), 1e6)]), torch.cat([batch.weight, torch.zeros(7)]))
    torch.testing.assert_close(learner.critic.flat.grad, before, atol=1e-12, rtol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_row_11_learner_resumes_bit_for_bit(algorithm: str, tmp_path) -> None:
    """Through a checkpoint on disk: weights, targets, every optimiser, temperature, generator, counters."""
    base = SmoothBase()
    batches = [random_batch(base, seed=s) for s in range(8)]
    config = {"distill_every": 3, "actor_every": 2, "entropy_backup": True}

    def train(learner: OffPolicyLearner, part: slice) -> OffPolicyLearner:
        for batch in batches[part]:
            learner.update(batch)
        return learner

    whole = train(make(algorithm, base, **config), slice(None))
    half = train(make(algorithm, base, **config), slice(4))
    path = save_checkpoint(tmp_path, "step", {"learner": half.state_dict()}, {})
    train(half, slice(4, None))  # a state is a copy: training on does not change it
    again = make(algorithm, base, **config, seed=77)
    kept = again.head.actor.flat.data
    again.load_state_dict(load_checkpoint(path)[0]["learner"])
    assert again.head.actor.flat.data is kept  # in place: whoever holds the head sees it
    train(again, slice(4, None))
    one, two, three = (flatten(x.state_dict()) for x in (whole, again, half))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) and torch.equal(one[k], three[k]) for k in one)
    needed = {"critic/optimizer", "target", "objective/actor_optimizer", "generator", "counters"}
    if algorithm != "residual":
        needed |= {"objective/temperature/log_alpha", "objective/temperature/exp_avg"}
    if algorithm == "dsrl_na":
        needed |= {"objective/noise_critic/optimizer", "objective/rounds"}
    assert all(any(k.startswith(n) for k in one) for n in needed)


def flatten(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    out = {}
    for k, v in tree.items():
        out |= flatten(v, f"{prefix}{k}/") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out


@pytest.mark.parametrize(
    ("algorithm", "change"), [("dsrl_na", {}), ("dsrl_na", {"actor_gradient": "sampler"}), ("residual", {})]
)
def test_row_15_the_base_stays_frozen(algorithm: str, change: dict) -> None:
    base = compact(width=16, depth=1, num_steps=2)
    identity = base.spec.base_hash
    learner = make(algorithm, base, n_critics=2, hidden=(8,), **change)
    batch = random_batch(base, 8)
    for _ in range(100):
        learner.update(batch)
    assert base._identity() == identity
    assert not base.training
    assert not any(m.training for m in base.modules())
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())


def test_row_2_every_field_of_the_configuration_is_read() -> None:
    read: set[str] = set()

    class Spy(OffPolicyConfig):
        def __getattribute__(self, name: str):
            read.add(name)
            return super().__getattribute__(name)

    for algorithm in ALGORITHMS:
        learner = make(algorithm)
        config = Spy(algorithm=algorithm, n_critics=2, hidden=(8,), value_max=1.0, critic_grad_clip=1.0)  # type: ignore[arg-type]
        read.clear() if algorithm == ALGORITHMS[0] else None  # what __post_init__ reads does not count
        learner = OffPolicyLearner(learner.base, learner.head, config)
        for _ in range(2):
            learner.update(random_batch(learner.base))
        if algorithm == "residual":
            learner.config = Spy(algorithm=algorithm, offline_critic="calql", conservative=ConservativeConfig(samples=1))  # type: ignore[arg-type]
            learner.update(random_batch(learner.base), offline=True)
    # The first four belong to the replay windows and their returns, the other two to the course of a run.
    elsewhere = {"gamma", "failure_reward", "takeover_reward", "task_reward", "offline_actor", "critic_init"}
    assert {f.name for f in fields(OffPolicyConfig)} - read <= elsewhere
    with pytest.raises(TypeError, match="gama"):
        OffPolicyConfig(gama=0.9)  # type: ignore[call-arg]


def test_wrong_pairs_and_missing_data_are_named() -> None:
    with pytest.raises(ValueError, match="algorithm='residual' trains a residual head; this one is latent_noise"):
        OffPolicyLearner(SmoothBase(), make().head, OffPolicyConfig(algorithm="residual"))
    sac = make("dsrl_sac")
    with pytest.raises(ValueError, match="stored noise"):
        sac.update(replace(random_batch(sac.base), noise=None))
    with pytest.raises(ValueError, match="episode_return"):
        sac.pretrain(replace(random_batch(sac.base), episode_return=None))
    for change, message in (({"gamma": 0}, "gamma=0"), ({"n_critics": 1}, "target_reduce"), ({"kl_base": 1.0}, "kl_base")):
        with pytest.raises(ValueError, match=message):
            OffPolicyConfig(**change)
    sac.critic.flat.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="critic parameters are not finite"):
        sac.check_finite()


# ---- what is learnt


def two_state_chain(terminated: bool, length: int = 12, episodes: int = 6):
    """s alternates between 0 and 1 whatever is done; leaving 0 pays 1. Executed by a base without noise."""
    base = SmoothBase(conditioning=2, horizon=2, n_action_steps=2, noise=False)
    out = []
    for i in range(episodes):
        states = np.eye(2, dtype=np.float32)[(np.arange(length + 1) + i) % 2]
        reward = ((np.arange(length) + i) % 2 == 0).astype(np.float32)
        chunk = base.unnormalize_action(base.sample(torch.from_numpy(states[:-1]), None)).numpy()
        ends = np.arange(length) == length - 1
        out.append(
            Episode.from_arrays(
                EpisodeMeta(f"e{i}"), {STATE: states}, chunk[:, 0], reward=reward, terminated=ends & terminated,
                truncated=ends & (not terminated),
            )
        )  # fmt: skip
    return base, out


@pytest.mark.parametrize("n", [1, 3])
def test_row_5_truncation_bootstraps_and_row_7_every_n_agrees(n: int) -> None:
    """A time limit is not an end: the learnt value is the infinite-horizon one within 2 %, for single steps and chunks."""
    gamma = 0.7
    base, played = two_state_chain(terminated=False)
    base.spec = replace(base.spec, n_action_steps=n, horizon=n)
    first = base.state_map[:, :3]  # the plan's later rows are what the base does in the states it will meet
    base.state_map = torch.cat([first if i % 2 == 0 else first.flip(0) for i in range(n)], 1)
    head = ResidualHead(base, ResidualConfig(scale=0.0, hidden=(4,)), generator=gen(0))
    config = OffPolicyConfig(
        algorithm="residual",
        n_critics=2,
        hidden=(24,),
        layer_norm=False,
        gamma=gamma,
        tau=0.2,
        critic_lr=1e-2,
        target_reduce="mean",
    )
    learner = OffPolicyLearner(base, head, config)
    extra = {"episode_return": FeatureSpec(()), "return_known": FeatureSpec(())}
    buffer = ReplayBuffer(
        1000, conditioning_dim=2, action_dim=3, window=WindowConfig(n, gamma), delta_mask=[False] * 3, extra=extra
    )
    for episode in played:
        ingest(buffer, episode, base)
    rng = np.random.default_rng(0)
    for _ in range(400):
        learner.update(Batch.from_windows(buffer.sample(32, rng)), train_actor=False)
    states = torch.eye(2)
    chunk = base.sample(states, None).flatten(1)
    found = learner.critic.value(torch.cat([states, chunk], 1)).mean(0)
    high = 1 / (1 - gamma**2)
    torch.testing.assert_close(found, torch.tensor([high, gamma * high]), rtol=0.02, atol=0)


def test_termination_does_not_bootstrap_and_pretraining_regresses_on_returns() -> None:
    """Row 32 too: a return with an unknown reward in it trains nothing."""
    learner = make("residual", critic_lr=1e-2, target_reduce="mean", hidden=(64,))
    batch = random_batch(learner.base, 16)
    batch = replace(batch, discount=torch.zeros(16), weight=torch.ones(16), return_known=(torch.arange(16) > 3).float())
    poisoned = replace(batch, episode_return=torch.where(torch.arange(16) > 3, batch.episode_return, 1e6))
    for _ in range(300):
        learner.pretrain(poisoned)
    q = learner.value(batch)
    torch.testing.assert_close(q[4:], batch.episode_return[4:], atol=0.1, rtol=0)
    assert float(q[:4].abs().max()) < 100
    assert not torch.equal(learner.target.flat.data, learner.critic.flat.data)
    learner.finish_pretraining()
    assert torch.equal(learner.target.flat.data, learner.critic.flat.data)
    assert (learner.updates, learner.actor_updates) == (0, 0)
    for _ in range(300):
        learner.update(batch, train_actor=False)
    torch.testing.assert_close(learner.value(batch), batch.reward, atol=0.1, rtol=0)


def test_row_32_returns_with_unknown_rewards_are_marked() -> None:
    returns, known = discounted_returns(np.array([1, np.nan, 2, 4], np.float32), 0.5)
    assert known.tolist() == [0, 0, 1, 1]
    assert returns[2:].tolist() == [4, 4]


def play(base, head, states: torch.Tensor, noise: torch.Tensor, exploration: torch.Tensor | None, mode: str):
    """One decision an episode: go to the side of the state's sign, and not too far. The base manages it in 45 %."""
    if mode == "base":
        chunk = base.sample(states, noise)
    else:
        proposal = head.propose(states, base, noise, exploration, mode)
        chunk, noise = proposal.chunk, proposal.noise
    right = (chunk[:, 0, 0] * states[:, 0] > 0) & (chunk[:, 0, 1] < 0.3 * np.tanh(1.2816))
    return chunk, noise, right.float()


@pytest.mark.parametrize("algorithm", ["dsrl_na", "dsrl_sac"])
def test_two_modes_from_45_percent_to_95(algorithm: str) -> None:
    """The main job in small: warm up on the base, then learn which noise makes it choose the right side."""
    base, g = TwoModeBase(), gen(5)
    head = LatentNoiseHead(base, LatentNoiseConfig(hidden=(32, 32)), generator=gen(1))
    config = OffPolicyConfig(
        algorithm=algorithm, n_critics=2, hidden=(32, 32), critic_lr=3e-3, actor_lr=3e-3, temperature_lr=3e-3,
        initial_alpha=0.1,
        distill_every=1, tau=0.02,
    )  # fmt: skip
    learner = OffPolicyLearner(base, head, config)

    def episodes(count: int, mode: str):
        states = torch.rand(count, 1, generator=g) * 2 - 1
        noise, exploration = torch.randn(count, 1, 2, generator=g), torch.randn(count, 2, generator=g)
        return states, *play(base, head, states, noise, exploration, mode)

    before = episodes(2000, "base")[3].mean()
    assert 0.42 < float(before) < 0.48
    data = episodes(600, "base")

    def batch() -> Batch:
        rows = torch.randint(0, len(data[0]), (64,), generator=g)
        s, a, w, r = (x[rows] for x in data)
        return Batch(s, a, r, torch.zeros(64), s, torch.ones(64), noise=w, episode_return=r)

    for _ in range(150):
        learner.pretrain(batch())
    learner.finish_pretraining()
    worst = 1.0
    for _ in range(24):
        for _ in range(20):
            learner.update(batch())
        new = episodes(100, "explore")  # 600 + 24 x 100 = 3000 decisions
        worst = min(worst, float(new[3].mean()))
        data = tuple(torch.cat(pair) for pair in zip(data, new, strict=True))
    assert float(episodes(2000, "eval")[3].mean()) >= 0.95
    assert worst >= 0.33  # 100 episodes: never below the base beyond chance
