"""Edit, best-of-N, whole-chunk and residual actors: equal to slow references, one selection rule, exact resume."""

from __future__ import annotations

import pytest
import torch
from recipe_kit import FROZEN, gen, make, random_batch
from reference_kit import Reference
from spine_kit import SmoothBase
from torch import Tensor

from robot_rl.learners.config import ConservativeConfig, OffPolicyConfig
from robot_rl.training.checkpoint import load_checkpoint, save_checkpoint

ALGORITHMS = ("edit", "best_of_n", "chunk_sac", "residual_sac")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


CASES = [
    ("edit", {}, {}),
    ("edit", {"entropy_backup": True, "actor_source": "base", "support_penalty": 0.3}, {"temperature": 0.2}),
    ("edit", {"normalize_q": True, "actor_reduce": "min"}, {"select_reduce": "lcb", "select_k": -1.0, "edits": 3}),
    ("edit", {"n_critics": 4}, {"select_reduce": "min_pair"}),
    ("best_of_n", {"target_reduce": "mean"}, {"select_reduce": "mean"}),
    ("best_of_n", {"n_critics": 4}, {"select_reduce": "min_pair"}),
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
