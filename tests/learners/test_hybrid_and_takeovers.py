"""HIL-SERL's gripper critic and RLIF's reward: equal to slow references, and what they read of recorded episodes by hand."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipe_kit import FROZEN, gen, make, random_batch, resumes_exactly, shaken
from reference_kit import Reference
from spine_kit import ARM, STATE, SmoothBase

from robot_rl.heads.hybrid import gripper_table, nearest_choice
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import GripperConfig, OffPolicyConfig
from robot_rl.learners.facts import GRIPPER, gripper_facts, own_reward, takeovers
from robot_rl.learners.reduce import reduce
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.windows import WindowConfig
from robot_rl.training.ingest import ingest
from robot_rl.types import ActionSpec, Episode, EpisodeMeta, FeatureSpec, RewardEvent, Source, Stratum

P, H, L, B, HOLD, S = Source.POLICY, Source.HUMAN, Source.LATCHED, Source.BLEND, Source.HOLD, Source.SAFETY
RETURNS = {"episode_return": FeatureSpec(()), "return_known": FeatureSpec(())}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def with_gripper(base, seed: int = 0) -> Batch:
    g, kind = gen(seed + 50), torch.get_default_dtype()
    return replace(
        random_batch(base, seed=seed), gripper_choice=torch.randint(0, 3, (12,), generator=g),
        gripper_steady=(torch.rand(12, generator=g) > 0.3).to(kind), gripper_change=torch.rand(12, generator=g).round(),
    )  # fmt: skip


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("change", [{}, {"entropy_backup": True, "initial_alpha": 0.3, "bc_weight": 0.4}])
def test_equals_the_slow_reference(double, change: dict, follow: bool) -> None:
    learner = make("hybrid_sac", **FROZEN, gripper=GripperConfig(lr=0.0, penalty=-0.5), **change)
    shaken(learner.objective.gripper_target, 8)
    b, slow = with_gripper(learner.base), Reference(learner)
    network, target = deepcopy(learner.head.gripper), deepcopy(learner.objective.gripper_target)
    arm, finger = [0, 1], 2
    metrics = learner.update(b, train_actor=not follow)
    # the arm: its critic never sees the gripper
    if follow:
        rows = slow.candidates(b.next_conditioning, None, 1)[:, 0]
        a, log_prob = rows[..., arm], torch.zeros(12)
        best = [int(np.abs(float(r[0, finger]) - np.array([-1.0, 0.0, 1.0])).argmin()) for r in rows]
    else:
        x, log_prob = slow.gaussian(b.next_conditioning, slow.randn(12, 4))
        a = torch.tanh(x).unflatten(1, (2, 2))
        best = network(b.next_conditioning)[0].argmax(-1).tolist()
    with torch.no_grad():
        v = reduce(slow.target(torch.cat([b.next_conditioning, a.flatten(1)], 1)), "min_pair", slow.g)
        y = b.reward + b.discount * (v - (slow.alpha * log_prob if slow.c.entropy_backup else 0.0))
    q = slow.critic(torch.cat([b.conditioning, b.action[..., arm].flatten(1)], 1))
    loss = sum(0.5 * (b.weight * (q[i] - y) ** 2).sum() / b.weight.sum() for i in range(4))
    torch.testing.assert_close(metrics["critic/target"], y.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(metrics["critic/loss"], loss.detach(), atol=1e-5, rtol=0)
    # the gripper: chosen by the online network, valued by the target
    total, norm = torch.zeros(()), 0.0
    for i in range(12):
        y_g = (
            b.reward[i]
            - 0.5 * b.gripper_change[i]
            + b.discount[i] * target(b.next_conditioning[i : i + 1])[0, 0, best[i]].detach()
        )
        w = float(b.weight[i] * b.gripper_steady[i])
        total = total + w * 0.5 * (network(b.conditioning[i : i + 1])[0, 0, int(b.gripper_choice[i])] - y_g) ** 2
        norm += w
    torch.testing.assert_close(metrics["gripper/loss"], (total / norm).detach(), atol=1e-5, rtol=0)
    gradient = torch.autograd.grad(total / norm, list(network.parameters()))
    for p, expected in zip(learner.head.gripper.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, expected, atol=1e-8, rtol=1e-6)
    if not follow:
        x, log_prob = slow.gaussian(b.conditioning, slow.randn(12, 4))
        value = slow.critic(torch.cat([b.conditioning, torch.tanh(x)], 1)).mean(0)
        actor = (slow.alpha * log_prob - value).mean()
        if slow.c.bc_weight:
            mean, log_std = slow.head.actor(b.conditioning)
            recorded = slow.density(torch.atanh(b.action[..., arm].flatten(1).clamp(-0.999, 0.999)), mean, log_std.exp())
            actor = actor - slow.c.bc_weight * (b.weight * recorded).sum() / b.weight.sum()
        for p, expected in zip(
            learner.head.actor.parameters(), torch.autograd.grad(actor, list(slow.head.actor.parameters())), strict=True
        ):
            torch.testing.assert_close(p.grad, expected, atol=1e-8, rtol=1e-6)
    assert torch.equal(slow.g.get_state(), learner.generator.get_state())


def test_row_18_the_penalty_is_absent_from_the_arms_reward() -> None:
    cheap, dear = (make("hybrid_sac", gripper=GripperConfig(penalty=p)) for p in (0.0, -3.0))
    found = [learner.update(with_gripper(learner.base)) for learner in (cheap, dear)]
    assert float(found[0]["critic/target"]) == float(found[1]["critic/target"])
    assert float(found[0]["gripper/target"]) > float(found[1]["gripper/target"])


def test_the_arm_is_the_actors_and_the_gripper_a_choice_in_every_mode() -> None:
    learner = make("hybrid_sac", shape={"gripper_epsilon": 0.5})
    head, c = learner.head, torch.randn(64, 3, generator=gen(1))
    noise, draws = torch.randn(64, 3, 3, generator=gen(2)), torch.randn(64, head.exploration_dim, generator=gen(3))
    explored, calm = (head.propose(c, learner.base, noise, d, m) for d, m in ((draws, "explore"), (None, "eval")))
    best = head.table[head.choose(c)][:, 0]
    assert torch.equal(calm.chunk[:, 0, 2], best)
    assert torch.equal(calm.chunk[:, 1, 2], best)  # one choice for all rows that run
    assert torch.equal(calm.chunk[:, 2], calm.chunk_base[:, 2])  # rows beyond them are the base's
    assert set(explored.chunk[:, 0, 2].tolist()) <= {-1.0, 0.0, 1.0}
    assert 0.1 < float((explored.chunk[:, 0, 2] != best).float().mean()) < 0.6
    assert torch.equal(head.choice_of(calm.chunk), head.choose(c))
    with pytest.raises(ValueError, match="needs an arm and a gripper"):
        make("hybrid_sac", SmoothBase(action=ActionSpec((-1.0,) * 2, (1.0,) * 2)))


def test_choices_of_two_grippers_number_all_combinations() -> None:
    table = gripper_table((-1.0, 0.0, 1.0), 2)
    assert table.shape == (9, 2)
    assert nearest_choice(table, (-1.0, 0.0, 1.0)).tolist() == list(range(9))
    assert nearest_choice(np.array([[0.4, -0.6]], np.float32), (-1.0, 0.0, 1.0)).tolist() == [3]


def test_gripper_facts_by_hand() -> None:
    """0 keeps the gripper as it is: closing after it is no change, and a window in which only 0 follows is steady."""
    command = np.array([0.0, 1.0, 0.0, 1.0, -1.0, 0.1, 0.9], np.float32)[:, None]
    found = gripper_facts(command, (-1.0, 0.0, 1.0), WindowConfig(3, 0.5), stays=np.array([True]))
    assert found["gripper_choice"].tolist() == [1, 2, 1, 2, 0, 1, 2]
    changed = [0, 0, 0, 0, 1, 0, 1]  # the state before the first command is not known
    assert found["gripper_change"].tolist() == [sum(0.5**i * changed[t + i] for i in range(min(3, 7 - t))) for t in range(7)]
    assert found["gripper_steady"].tolist() == [0, 1, 0, 0, 0, 0, 1]
    two = gripper_facts(
        command[1:], (-1.0, 1.0), WindowConfig(2, 0.5), stays=np.array([True])
    )  # without a 0 every command is one
    assert two["gripper_choice"].tolist() == [1, 0, 1, 0, 1, 1]
    width = gripper_facts(
        command, (-1.0, 0.0, 1.0), WindowConfig(1, 0.5), stays=np.array([False])
    )  # half open is a state of its own
    assert width["gripper_change"].tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_a_gripper_that_is_told_a_width_is_never_told_to_stay() -> None:
    """0 would be half open there."""
    spec = {"low": (-1.0, 0.0), "high": (1.0, 0.08), "kind": ("continuous", "gripper_continuous")}
    width, change = (ActionSpec(**spec, mode=("delta", mode)) for mode in ("absolute", "delta"))
    assert GripperConfig().told(width) == (-1.0, 1.0)
    assert GripperConfig().told(change) == (-1.0, 0.0, 1.0)
    assert GripperConfig(values=(-1.0, 0.5)).told(width) == (-1.0, 0.5)
    with pytest.raises(ValueError, match="accepted are none"):
        GripperConfig(values=(1.0,))


def test_row_11_resumes_bit_for_bit() -> None:
    def play(learner, seeds) -> None:
        for s in seeds:
            learner.update(with_gripper(learner.base, s), train_actor=s > 0)

    resumes_exactly(lambda: make("hybrid_sac", n_critics=2), play)


def episode(name: str, sources: list[Source], stratum: Stratum = Stratum.ONLINE) -> Episode:
    n, rng = len(sources), np.random.default_rng(1)
    low, high = np.array(ARM.low), np.array(ARM.high)
    return Episode.from_arrays(
        EpisodeMeta(name, stratum=stratum), {STATE: rng.normal(size=(n + 1, 3)).astype(np.float32)},
        low + rng.uniform(size=(n, 3)) * (high - low), source=np.array(sources), reward=np.ones(n, np.float32),
        terminated=np.arange(n) == n - 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sources", "at"),
    [([P, P, H, H, P, P, H], [1, 5]), ([H, H, P], []), ([P, H, L, H, B, P, P, H], [0, 6]), ([P, P, HOLD, H], [1]),
     ([P, S, H], [1]), ([P, B, P], [])],
)  # fmt: skip
def test_row_20_the_takeover_penalty_lands_on_the_step_before_once(sources: list[Source], at: list[int]) -> None:
    e = episode("e", sources)
    assert takeovers(e).tolist() == at
    config = OffPolicyConfig(algorithm="chunk_sac", takeover_reward=-1.0, task_reward=False)
    own = own_reward(e, config)
    assert np.flatnonzero(np.nan_to_num(own.component)).tolist() == at
    assert np.nansum(own.component) == -len(at)
    assert np.isnan(own.component).tolist() == [s in (H, L, B) for s in sources], "nobody can take over from themselves"
    beside = own_reward(e, replace(config, task_reward=True))
    assert beside.component.sum() == -len(at)
    unwatched = own_reward(replace(e, meta=replace(e.meta, extra={"watched": False})), config)
    assert np.isnan(unwatched.component).all(), "where nobody looks, no takeover means nothing"
    assert own_reward(e, config, Stratum.DEMONSTRATION).component.sum() == 0
    assert own_reward(e, OffPolicyConfig()).component is None


@pytest.mark.parametrize("task", [True, False])
def test_rows_19_and_21_takeovers_in_the_buffer(task: bool) -> None:
    """Every human step stays, in both pools and as executed, the last one too; late task rewards add up, or are left out.

    Without the task's rewards what a person drove is kept and not drawn: there is no reward to learn from.
    """
    base = SmoothBase(n_action_steps=1)
    buffer = ReplayBuffer(
        100, conditioning_dim=3, action_dim=3, window=WindowConfig(1, 0.9), delta_mask=ARM.delta_mask, extra=RETURNS
    )
    config = OffPolicyConfig(algorithm="chunk_sac", takeover_reward=-1.0, task_reward=task)
    sources = [P, P, H, H, P, H]
    e = episode("e", sources)
    before = e.reward.copy()
    ingest(buffer, e, base, learner=config)
    assert np.array_equal(e.reward, before)  # the recorded reward is never touched
    counts = {Stratum.ONLINE: 6, Stratum.INTERVENTION: 3} if task else {Stratum.ONLINE: 3}
    assert {s: n for s, n in buffer.starts().items() if n} == counts
    takeover = np.array([0, -1, 0, 0, -1, 0], np.float32)
    drawn = range(6) if task else (0, 1, 4)

    def rewards() -> list[float]:
        windows = buffer.sample(200, np.random.default_rng(0), {Stratum.ONLINE: 1.0})
        assert set(windows.step.tolist()) == set(drawn)
        return [float(windows.reward[windows.step == t][0]) for t in drawn]

    assert rewards() == (takeover + (1.0 if task else 0.0))[list(drawn)].tolist()
    buffer.update_reward(RewardEvent("e", 2, "judge", 5.0, event_id="1"))  # about the very transition of the takeover
    assert rewards()[1] == (4.0 if task else -1.0)
    if not task:
        return
    windows = buffer.sample(50, np.random.default_rng(0), {Stratum.INTERVENTION: 1.0})
    assert set(windows.step.tolist()) == {2, 3, 5}
    for w in range(50):
        executed = base.normalize_action(torch.from_numpy(e.action[windows.step[w]])).clamp(-1, 1).numpy()
        np.testing.assert_allclose(windows.action[w, 0], executed, atol=1e-6)
    assert float(windows.discount[windows.step == 5][0]) == 0.0


def test_a_chunk_that_a_person_cut_off_is_worth_the_takeover() -> None:
    """Rows that follow a takeover are unknown where nothing else is learned from: windows stop at it, whichever step they begin at."""
    config = OffPolicyConfig(algorithm="chunk_sac", takeover_reward=-1.0, task_reward=False)
    buffer = ReplayBuffer(
        100, conditioning_dim=3, action_dim=3, window=WindowConfig(4, 0.5), delta_mask=ARM.delta_mask, extra=RETURNS
    )
    ingest(buffer, episode("e", [P, P, P, P, P, P, H, H, H, P, P, P, P]), SmoothBase(n_action_steps=4), learner=config)
    windows = buffer.sample(400, np.random.default_rng(0))
    found = {int(s): (float(r), float(d)) for s, r, d in zip(windows.step, windows.reward, windows.discount, strict=True)}
    assert {t: found[t] for t in range(6)} == {
        0: (0.0, 0.5**4), 1: (0.0, 0.5**4), 2: (-(0.5**3), 0.0), 3: (-(0.5**2), 0.0), 4: (-0.5, 0.0), 5: (-1.0, 0.0),
    }  # fmt: skip
    assert not {6, 7, 8} & set(found)
    returns = {int(s): (float(r), float(k)) for s, r, k in zip(windows.step, *map(windows.extra.get, RETURNS), strict=True)}
    assert {t: returns[t] for t in range(6)} == {t: (-(0.5 ** (5 - t)), 1.0) for t in range(6)}


def test_without_task_reward_unknown_rewards_are_no_obstacle() -> None:
    base, config = SmoothBase(), OffPolicyConfig(algorithm="hybrid_sac", takeover_reward=-1.0, task_reward=False)
    e = episode("e", [P, P, P, P])
    e.reward[:] = np.nan
    extra = RETURNS | GRIPPER
    buffer = ReplayBuffer(
        50, conditioning_dim=3, action_dim=3, window=WindowConfig(2, 0.9), delta_mask=ARM.delta_mask, extra=extra
    )
    ingest(buffer, e, base, learner=config)
    windows = buffer.sample(50, np.random.default_rng(0))
    assert set(windows.step.tolist()) == {0, 1, 2, 3}
    assert set(windows.extra["return_known"].tolist()) == {1.0}
    with pytest.raises(ValueError, match="nothing to learn from"):
        OffPolicyConfig(task_reward=False)


def test_a_gripper_learns_when_to_close_and_not_to_flutter() -> None:
    """Closing pays where the state says so; nothing else matters but the price of changing."""
    learner = make("hybrid_sac", SmoothBase(conditioning=1), gamma=0.9, tau=0.05, gripper=GripperConfig(lr=3e-3, hidden=(16,)))
    g = gen(3)
    for _ in range(400):
        s = torch.rand(64, 1, generator=g) * 2 - 1
        choice = torch.randint(0, 3, (64,), generator=g)
        reward = ((s[:, 0] > 0) == (choice == 0)).float() * (choice != 1).float()
        batch = Batch(s, torch.zeros(64, 2, 3), reward, torch.zeros(64), s, torch.ones(64))
        batch = replace(batch, gripper_choice=choice, gripper_steady=torch.ones(64), gripper_change=(choice != 1).float())
        learner.objective._fit_gripper(batch)
    s = torch.tensor([[-0.6], [0.6]])
    assert learner.head.choose(s).tolist() == [2, 0]
