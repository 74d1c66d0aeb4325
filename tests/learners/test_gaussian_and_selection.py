"""Edit, best-of-N, whole-chunk and residual actors: equal to slow references, one selection rule, exact resume."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from recipe_kit import FROZEN, gen, make, random_batch
from spine_kit import SmoothBase
from torch import Tensor

from robot_rl.learners.config import ConservativeConfig, OffPolicyConfig
from robot_rl.learners.reduce import reduce
from robot_rl.training.checkpoint import load_checkpoint, save_checkpoint

ALGORITHMS = ("edit", "best_of_n", "chunk_sac", "residual_sac")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Reference:
    """One update from the formulas, sample by sample where it chooses; the learner's random draws in the same order."""

    def __init__(self, learner) -> None:
        self.c, self.base, self.n = learner.config, learner.base, learner.base.spec.n_action_steps
        self.head, self.critic, self.target = (deepcopy(x) for x in (learner.head, learner.critic, learner.target))
        self.alpha, self.g = learner.config.initial_alpha, torch.Generator()
        self.g.set_state(learner.generator.get_state())
        self.critic.flat.zero_grad()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g)

    def q(self, critic, s: Tensor, a: Tensor) -> Tensor:
        """(N,) values of one state and chunk, each critic by itself."""
        return critic(torch.cat([s, a.flatten()])[None])[:, 0]

    def correct(self, rows: Tensor, x: Tensor) -> Tensor:
        u = torch.tanh(x).unflatten(-1, rows.shape[-2:])
        return (rows + self.head.scale * u).clamp(-1, 1)

    def density(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        normal = torch.distributions.Normal(mean, std)
        return (normal.log_prob(x) - torch.log(1 - torch.tanh(x) ** 2)).sum(-1)

    def gaussian(self, features: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.head.actor(features)
        x = mean + log_std.exp() * draw
        return x, self.density(x, mean, log_std.exp())

    def candidates(self, c: Tensor, cached: Tensor | None, k: int) -> Tensor:
        b, spec = len(c), self.base.spec
        if cached is not None:
            keep = torch.rand(cached.shape[:2], generator=self.g).argsort(1, descending=True)[:, :k]
            return torch.stack([cached[i, keep[i]] for i in range(b)])
        noise = self.randn(b, *((k,) if k > 1 else ()), *spec.noise_shape).reshape(b, k, *spec.noise_shape)
        return torch.stack(
            [torch.cat([self.base.sample(c[i : i + 1], noise[i, j][None]) for j in range(k)]) for i in range(b)]
        )[:, :, : self.n]

    def choose(self, c: Tensor, rows: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """The selection rule: every candidate scored by the target network alone."""
        h, chosen, density = self.head.config, [], []
        edits = getattr(self.head, "edits", 0)
        width = rows[0, 0].numel()
        for i in range(len(c)):
            options = list(rows[i])
            logs = [torch.zeros(()) for _ in options]
            for j in range(edits):
                x, log_prob = self.gaussian(
                    torch.cat([c[i], rows[i, j].flatten()])[None], draws[i, j * width : (j + 1) * width][None]
                )
                options.append(self.correct(rows[i, j], x[0]))
                logs.append(log_prob[0])
            scores = torch.stack(
                [reduce(self.q(self.target, c[i], o)[:, None], h.select_reduce, k=h.select_k)[0] for o in options]
            )
            if h.temperature > 0:
                lots = draws[i, edits * width :]
                uniform = torch.distributions.Normal(0.0, 1.0).cdf(lots)
                scores = scores / h.temperature - torch.log(-torch.log(uniform))
            best = int(scores.argmax())
            chosen.append(options[best])
            density.append(logs[best])
        return torch.stack(chosen), torch.stack(density)

    def act(self, c: Tensor, cached: Tensor | None, follow_base: bool) -> tuple[Tensor, Tensor]:
        kind, zeros = self.c.algorithm, torch.zeros(len(c))
        if follow_base:
            return self.candidates(c, cached, 1)[:, 0], zeros
        if kind == "chunk_sac":
            x, log_prob = self.gaussian(c, self.randn(len(c), self.head.exploration_dim))
            return torch.tanh(x).unflatten(1, (self.n, -1)), log_prob
        if kind == "residual_sac":
            rows = self.candidates(c, None, 1)[:, 0]
            x, log_prob = self.gaussian(torch.cat([c, rows.flatten(1)], 1), self.randn(len(c), self.head.exploration_dim))
            return self.correct(rows, x), log_prob
        rows = self.candidates(c, cached, self.head.config.candidates)
        draws = self.randn(len(c), self.head.exploration_dim) if self.head.exploration_dim else None
        return self.choose(c, rows, draws)

    @torch.no_grad()
    def target_value(self, b, follow_base: bool) -> Tensor:
        a, log_prob = self.act(b.next_conditioning, b.next_base_rows, follow_base or self.c.backup == "base")
        q = self.target(torch.cat([b.next_conditioning, a.flatten(1)], 1))
        v = reduce(q, self.c.target_reduce, self.g)
        if self.c.entropy_backup:
            v = v - self.alpha * log_prob
        return b.reward + b.discount * v

    def critic_loss(self, b, y: Tensor) -> Tensor:
        q = self.critic(torch.cat([b.conditioning, b.action.flatten(1)], 1))
        valid = max(float(b.weight.sum()), 1.0)
        return sum(0.5 * sum(b.weight[j] * (q[i, j] - y[j]) ** 2 for j in range(len(y))) / valid for i in range(len(q)))

    def actor_loss(self, b) -> Tensor:
        c = b.conditioning
        if self.c.algorithm == "edit":
            rows = b.action if self.c.actor_source == "replay" else self.candidates(c, b.base_rows, 1)[:, 0]
            draw = self.randn(len(c), self.head.basis.width)
            x, log_prob = self.gaussian(torch.cat([c, rows.flatten(1)], 1), draw)
            a = self.correct(rows, x)
        elif self.c.algorithm == "residual_sac":
            rows = self.candidates(c, None, 1)[:, 0]
            x, log_prob = self.gaussian(torch.cat([c, rows.flatten(1)], 1), self.randn(len(c), self.head.exploration_dim))
            a = self.correct(rows, x)
        else:
            x, log_prob = self.gaussian(c, self.randn(len(c), self.head.exploration_dim))
            a = torch.tanh(x).unflatten(1, (self.n, -1))
        value = reduce(self.critic(torch.cat([c, a.flatten(1)], 1)), self.c.actor_reduce, self.g)
        gain = 1.0 / float(value.detach().abs().mean()) if self.c.normalize_q else 1.0
        loss = (self.alpha * log_prob - gain * value).mean()
        loss = loss + self.c.support_penalty * 0.5 * (torch.tanh(x) ** 2).sum(1).mean()
        if self.c.bc_weight:
            mean, log_std = self.head.actor(c)
            recorded = self.density(torch.atanh(b.action.flatten(1).clamp(-0.999, 0.999)), mean, log_std.exp())
            loss = loss - self.c.bc_weight * (b.weight * recorded).sum() / b.weight.sum()
        return loss


CASES = [
    ("edit", {}, {}),
    ("edit", {"entropy_backup": True, "actor_source": "base", "support_penalty": 0.3}, {"temperature": 0.2}),
    ("edit", {"normalize_q": True, "actor_reduce": "min"}, {"select_reduce": "lcb", "select_k": -1.0, "edits": 3}),
    ("best_of_n", {"target_reduce": "mean"}, {"select_reduce": "mean"}),
    ("best_of_n", {"backup": "base"}, {"candidates": 4}),
    ("best_of_n", {}, {"temperature": 0.5, "select_reduce": "min"}),
    ("chunk_sac", {"entropy_backup": True, "initial_alpha": 0.3}, {}),
    ("chunk_sac", {"bc_weight": 0.4, "normalize_q": True}, {}),
    ("residual_sac", {"entropy_backup": True, "target_reduce": "min", "actor_reduce": "min"}, {}),
]


@pytest.mark.parametrize("phase", ["online", "cached", "follow_base"])
@pytest.mark.parametrize(("algorithm", "change", "shape"), CASES)
def test_equals_the_slow_reference(double, algorithm: str, change: dict, shape: dict, phase: str) -> None:
    learner = make(algorithm, shape=shape, **FROZEN, **change)
    batch = random_batch(learner.base, samples=5 if phase == "cached" and algorithm in ("edit", "best_of_n") else 0)
    slow, follow = Reference(learner), phase == "follow_base"
    before = learner.target.flat.data.clone()
    metrics = learner.update(batch, train_actor=not follow)
    assert not torch.equal(learner.target.flat.data, before)  # it follows the critic after the update
    y = slow.target_value(batch, follow)
    loss = slow.critic_loss(batch, y)
    loss.backward()
    torch.testing.assert_close(metrics["critic/target"], y.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(metrics["critic/loss"], loss.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(learner.critic.flat.grad, slow.critic.flat.grad, atol=1e-8, rtol=1e-6)
    if not follow and algorithm != "best_of_n":
        gradient = torch.autograd.grad(slow.actor_loss(batch), list(slow.head.actor.parameters()))
        for a, b in zip([p.grad for p in learner.head.actor.parameters()], gradient, strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)
        assert max(float(g.abs().max()) for g in gradient) > 1e-6
    assert torch.equal(slow.g.get_state(), learner.generator.get_state())  # not one draw more or less


@pytest.mark.parametrize("algorithm", ["edit", "best_of_n"])
def test_row_9_acting_and_target_choose_with_one_network_and_one_rule(algorithm: str) -> None:
    """What is published contains the target network, and equal draws give the equal choice in episodes and in targets."""
    learner = make(algorithm)
    assert learner.head.critic is learner.target
    assert any(k.startswith("critic.") for k in learner.head.state_dict())
    batch, state = random_batch(learner.base), learner.generator.get_state()
    scored, _ = learner.objective.next_input(batch, False)
    learner.generator.set_state(state)
    noise = torch.randn(12, 3, *learner.base.spec.noise_shape, generator=learner.generator)
    width = learner.head.exploration_dim
    exploration = torch.randn(12, width, generator=learner.generator) if width else None
    acted = learner.head.propose(batch.next_conditioning, learner.base, noise, exploration, "explore")
    torch.testing.assert_close(scored[:, 3:], acted.chunk[:, :2].flatten(1), atol=1e-6, rtol=0)
    other = make(algorithm).head
    other.load_state_dict(learner.head.state_dict())
    again = other.propose(batch.next_conditioning, learner.base, noise, exploration, "explore")
    assert torch.equal(again.candidate_index, acted.candidate_index)


def test_row_10_edits_are_clamped_before_they_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make("edit", base=SmoothBase(gain=30.0))
    seen: list[Tensor] = []
    value = learner.target.reduced_value
    monkeypatch.setattr(learner.target, "reduced_value", lambda x, *a, **k: (seen.append(x.clone()), value(x, *a, **k))[1])
    noise = torch.randn(8, 3, 3, 3, generator=gen(1))
    draws = torch.randn(8, learner.head.exploration_dim, generator=gen(2))
    proposal = learner.head.propose(torch.randn(8, 3, generator=gen(3)), learner.base, noise, draws, "explore")
    scored = seen[0].unflatten(0, (8, 5))[torch.arange(8), proposal.candidate_index][:, 3:]
    assert torch.equal(scored, proposal.chunk[:, :2].flatten(1))
    assert float(seen[0][:, 3:].abs().max()) == 1.0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_row_11_learner_resumes_bit_for_bit(algorithm: str, tmp_path) -> None:
    config = {"critic_loss": "calql", "offline_critic": "iql"} if algorithm == "chunk_sac" else {"offline_critic": "cql"}
    config["conservative"] = ConservativeConfig(samples=2)
    base = SmoothBase()
    batches = [random_batch(base, seed=s) for s in range(6)]

    def train(learner, some):
        for i, b in enumerate(some):
            learner.update(b, offline=i % 2 == 0, train_actor=i > 0)

    straight, first, resumed = (make(algorithm, base, n_critics=2, **config) for _ in range(3))
    train(straight, batches[:3])
    train(straight, batches[3:])
    train(first, batches[:3])
    save_checkpoint(tmp_path, "here", {"learner": first.state_dict()}, {})
    resumed.load_state_dict(load_checkpoint(tmp_path / "here")[0]["learner"])
    assert getattr(resumed.head, "critic", resumed.target) is resumed.target
    train(resumed, batches[3:])
    a, b = flat(straight.state_dict()), flat(resumed.state_dict())
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def flat(tree: dict, prefix: str = "") -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for k, v in tree.items():
        out |= flat(v, f"{prefix}{k}/") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out


def test_target_entropy_per_dimension_of_the_actor() -> None:
    assert make("edit", target_entropy_per_dim=-0.5).objective.temperature.target_entropy == -3.0  # 2 rows of 3
    assert make("chunk_sac", target_entropy=1.0, target_entropy_per_dim=-1.0).objective.temperature.target_entropy == -5.0


@pytest.mark.parametrize(
    ("algorithm", "key", "value"),
    [("best_of_n", "entropy_backup", True), ("dsrl_na", "bc_weight", 0.1), ("residual", "base_samples", 8),
     ("chunk_sac", "actor_source", "base"), ("best_of_n", "target_entropy_per_dim", -0.5)],
)  # fmt: skip
def test_row_2_keys_that_an_algorithm_never_reads_are_refused(algorithm: str, key: str, value) -> None:
    with pytest.raises(ValueError, match=f"{key}=.*never reads it"):
        OffPolicyConfig(algorithm=algorithm, **{key: value})


def test_an_edit_removes_the_bias_of_its_base() -> None:
    """A base that is off by 0.3, an edit of at most 0.4: best of N cannot help, the edit can."""
    from robot_rl.types import ActionSpec

    class Biased(SmoothBase):
        def sample(self, conditioning, noise, *, grad=False):
            shape = (len(conditioning), 1, 1)
            return (conditioning[:, :1, None] * 0.5 + 0.3 + 0.02 * noise[:, :1, :1]).expand(shape)

    base = Biased(conditioning=1, horizon=1, n_action_steps=1, action=ActionSpec((-1.0,), (1.0,)))
    learner = make(
        "edit", base, shape={"scale": 0.4, "hidden": (32,)}, n_critics=2, hidden=(32, 32), critic_lr=3e-3, actor_lr=3e-3,
        initial_alpha=0.01, temperature_lr=0.0,
    )  # fmt: skip
    learner.head.actor.flat.data.zero_()
    g = gen(7)

    def play(count: int):
        s = torch.rand(count, 1, generator=g) * 2 - 1
        noise = torch.randn(count, 3, 1, 1, generator=g)
        draws = torch.randn(count, learner.head.exploration_dim, generator=g)
        a = learner.head.propose(s, base, noise, draws, "explore").chunk
        return s, a, 1 - 4 * (a[:, 0, 0] - 0.5 * s[:, 0]) ** 2

    from robot_rl.learners.batch import Batch

    data = play(300)
    for _ in range(15):
        for _ in range(20):
            rows = torch.randint(0, len(data[0]), (64,), generator=g)
            s, a, r = (x[rows] for x in data)
            learner.update(Batch(s, a, r, torch.zeros(64), s, torch.ones(64)))
        data = tuple(torch.cat(pair) for pair in zip(data, play(50), strict=True))
    s = torch.rand(500, 1, generator=g) * 2 - 1
    noise = torch.randn(500, 3, 1, 1, generator=g)
    acted = learner.head.propose(s, base, noise, None, "eval").chunk[:, 0, 0]
    own = base.sample(s, noise[:, 0])[:, 0, 0]
    achieved, before = (float((1 - 4 * (a - 0.5 * s[:, 0]) ** 2).mean()) for a in (acted, own))
    assert before < 0.7
    assert achieved >= 0.95
