"""The SAC learner against a slow reference in plain torch, exact resume, freedom from host syncs, and learning."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from robot_rl.learners.reduce import reduce
from robot_rl.learners.sac import SACConfig, SACLearner, Transitions
from robot_rl.nn.actor import squashed_log_prob

SMALL = SACConfig(5, 2, n_critics=4, hidden=(16, 16), utd=2, actor_every=1, dtype=torch.float64, actor_last_scale=1.0)


def batch(config: SACConfig, seed: int, size: int = 32, weighted: bool = False) -> Transitions:
    g = torch.Generator().manual_seed(seed)
    s, a, r, s2 = (torch.randn(size, d, generator=g, dtype=config.dtype) for d in (5, 2, 1, 5))
    discount = 0.99 * (torch.rand(size, generator=g, dtype=config.dtype) > 0.1)
    weight = (torch.rand(size, generator=g, dtype=config.dtype) > 0.3).to(config.dtype) if weighted else None
    return Transitions(s, a.tanh(), r[:, 0], discount, s2, weight)


def batches(config: SACConfig, call: int, weighted: bool = False) -> list[Transitions]:
    return [batch(config, 1000 * call + i, weighted=weighted) for i in range(config.utd)]


class Reference:
    """SAC as one would write it on a blackboard: modules, autograd, torch.optim.Adam, loops."""

    def __init__(self, learner: SACLearner) -> None:
        self.c = learner.config
        self.actor, self.critic, self.target = (deepcopy(m) for m in (learner.actor, learner.critic, learner.target))
        self.log_alpha = learner.temperature.log_alpha.detach().clone().requires_grad_()
        self.target_entropy = learner.temperature.target_entropy
        self.generators = {}
        for role, g in learner.generators.items():
            self.generators[role] = torch.Generator().manual_seed(0)
            self.generators[role].set_state(g.get_state())
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), self.c.actor_lr)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), self.c.critic_lr)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], self.c.alpha_lr)
        self.updates = 0

    def update(self, data: list[Transitions]) -> dict[str, torch.Tensor]:
        """One draw serves all updates between two of the actor's; its first rows are the actor's own."""
        c, found = self.c, {}
        while data:
            group, data = data[: (n := c.actor_every - self.updates % c.actor_every)], data[n:]
            sizes = [len(b.reward) for b in group]
            own = sizes[-1] if (self.updates + len(group)) % c.actor_every == 0 else 0
            noise = torch.randn(own + sum(sizes), c.action_dim, generator=self.generators["actor"], dtype=c.dtype)
            mine, *theirs = noise.split([own, *sizes])
            alpha = self.log_alpha.exp().detach()
            for b, e in zip(group, theirs, strict=True):
                found = self.update_critic(b, e, alpha)
            if own:
                found |= self.update_actor(group[-1], mine, alpha)
        return found

    def draw(self, observation: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.actor(observation)
        x = mean + log_std.exp() * noise
        return torch.tanh(x), squashed_log_prob(noise, log_std, x)

    def update_critic(self, b: Transitions, noise: torch.Tensor, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        c = self.c
        with torch.no_grad():
            u2, logp2 = self.draw(b.next_observation, noise)
            q2 = self.target(torch.cat((b.next_observation, u2), -1))
            v2 = reduce(q2, c.target_reduce, self.generators["reduce"], k=c.lcb_k)
            y = b.reward + b.discount * (v2 - alpha * logp2 if c.entropy_backup else v2)
        q = self.critic(torch.cat((b.observation, b.action), -1))
        weight = torch.ones_like(y) if b.weight is None else b.weight
        critic_loss = sum(0.5 * (weight * (q_i - y) ** 2).sum() / weight.sum() for q_i in q)
        self.critic_adam.zero_grad()
        critic_loss.backward()
        self.critic_adam.step()
        with torch.no_grad():
            for t, p in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                t.copy_((1 - c.tau) * t + c.tau * p)
        self.updates += 1
        return {"critic_loss": critic_loss.detach(), "target": y.mean()}

    def update_actor(self, b: Transitions, noise: torch.Tensor, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        c = self.c
        u, logp = self.draw(b.observation, noise)
        q_pi = reduce(self.critic(torch.cat((b.observation, u), -1)), c.actor_reduce, self.generators["reduce"], k=c.lcb_k)
        actor_loss = (alpha * logp - q_pi).mean()
        self.actor_adam.zero_grad()
        actor_loss.backward()
        self.actor_adam.step()
        alpha_loss = -(self.log_alpha * (logp.detach() + self.target_entropy)).mean()
        self.alpha_adam.zero_grad()
        alpha_loss.backward()
        if not c.fixed_alpha:
            self.alpha_adam.step()
        return {"actor_loss": actor_loss.detach(), "alpha": alpha}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"actor_every": 2, "critic_layer_norm": False, "actor_layer_norm": True},
        {"n_critics": 2, "target_reduce": "min", "actor_reduce": "min", "activation": "tanh"},
        {"target_reduce": "weighted_min_pair", "actor_reduce": "lcb", "lcb_k": 0.5, "entropy_backup": False},
        {"target_reduce": "mean", "actor_reduce": "min_pair", "fixed_alpha": True, "initial_alpha": 0.1},
    ],
    ids=lambda change: ",".join(change) or "default",
)
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_slow_reference(change, weighted) -> None:
    config = replace(SMALL, **change)
    learner = SACLearner(config, seed=1)
    reference = Reference(learner)
    for call in range(5):
        data = batches(config, call, weighted)
        metrics = learner.update(data)
        slow = reference.update(data)
        for name, value in slow.items():
            assert metrics[name].item() == pytest.approx(value.item(), abs=1e-5, rel=1e-5), name
    for ours, theirs in (
        (learner.actor, reference.actor),
        (learner.critic, reference.critic),
        (learner.target, reference.target),
    ):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (a - b).abs().max() < 1e-5, name
    assert learner.temperature.log_alpha.item() == pytest.approx(reference.log_alpha.item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_is_bitwise(dtype) -> None:
    """2k calls equal k calls, a save into fresh objects of another seed, and k more: bit for bit, acting included."""
    config = replace(SMALL, dtype=dtype, actor_every=3)  # a save between two actor updates
    straight = SACLearner(config, seed=1)
    for call in range(4):
        straight.update(batches(config, call))
    saved = {k: v.clone() for k, v in straight.state_dict().items()}
    resumed = SACLearner(config, seed=99)
    pointer = resumed.critic.weight[0].data_ptr()
    resumed.load_state_dict(saved)
    assert resumed.critic.weight[0].data_ptr() == pointer
    for call in range(4, 8):
        a, b = straight.update(batches(config, call)), resumed.update(batches(config, call))
        assert all(torch.equal(a[k], b[k]) for k in a)
    final, other = straight.state_dict(), resumed.state_dict()
    assert [k for k in final if not torch.equal(final[k], other[k])] == []
    s = torch.zeros(3, 5, dtype=dtype)
    assert torch.equal(straight.act(s), resumed.act(s))
    assert int(final["counter.critic_updates"]) == 16
    assert int(final["counter.actor_updates"]) == 5


def test_state_of_another_configuration_is_refused() -> None:
    state = SACLearner(SMALL).state_dict()
    with pytest.raises(ValueError, match="does not fit this configuration"):
        SACLearner(replace(SMALL, hidden=(16, 8))).load_state_dict(state)
    del state["temperature.log_alpha"]
    with pytest.raises(ValueError, match=r"temperature\.log_alpha"):
        SACLearner(SMALL).load_state_dict(state)


class NoHostSync(TorchDispatchMode):
    """Fails on operations that make a GPU's host wait: reading a scalar, or shapes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["min_pair", "weighted_min_pair", "min", "mean", "lcb"])
def test_update_never_waits_for_the_device(how) -> None:
    config = replace(SMALL, target_reduce=how, actor_reduce=how, max_grad_norm=1.0, alpha_floor=0.1)
    learner = SACLearner(config)
    data = batches(config, 0, weighted=True)
    with NoHostSync():
        learner.update(data)


def test_rows_with_weight_zero_do_not_matter() -> None:
    a, b = SACLearner(SMALL, seed=1), SACLearner(SMALL, seed=1)
    data = batches(SMALL, 0, weighted=True)
    other = [replace(d, reward=torch.where(d.weight == 0, d.reward + 100, d.reward)) for d in data]
    a.critic_optimizer.lr = b.critic_optimizer.lr = 1e-2
    a.update(data)
    b.update(other)
    assert torch.equal(a.critic.flat.data, b.critic.flat.data)


def test_one_role_drawing_more_does_not_shift_another() -> None:
    a, b = SACLearner(SMALL, seed=1), SACLearner(SMALL, seed=1)
    for _ in range(7):
        a.act(torch.zeros(3, 5, dtype=torch.float64))
    a.update(batches(SMALL, 0))
    b.update(batches(SMALL, 0))
    assert torch.equal(a.critic.flat.data, b.critic.flat.data)
    assert torch.equal(a.actor.flat.data, b.actor.flat.data)


def test_wrong_number_of_batches_and_bad_config_are_named() -> None:
    learner = SACLearner(SMALL)
    with pytest.raises(ValueError, match=r"got 1 batches; config\.utd=2"):
        learner.update(batches(SMALL, 0)[:1])
    with pytest.raises(ValueError, match=r"SACConfig\.tau=0"):
        replace(SMALL, tau=0)
    with pytest.raises(ValueError, match=r"SACConfig\.target_reduce='min_pair' needs at least 2"):
        replace(SMALL, n_critics=1)
    with pytest.raises(ValueError, match=r"SACConfig\.actor_reduce='max'"):
        replace(SMALL, actor_reduce="max")  # type: ignore[arg-type]


def test_learns_to_reach_a_point() -> None:
    """A point mass with velocity control, goals anywhere in the unit square; return is minus the distance at every step."""
    config = SACConfig(
        4, 2, n_critics=4, hidden=(48, 48), utd=4, actor_every=2, actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3, tau=0.02
    )
    learner = SACLearner(config, seed=0)
    rng = np.random.default_rng(0)
    n, horizon, gamma = 16, 20, 0.9

    def episodes(explore: bool) -> tuple[list[tuple[np.ndarray, ...]], float]:
        x, goal = rng.uniform(-1, 1, (n, 2)), rng.uniform(-1, 1, (n, 2))
        rows, total = [], 0.0
        for _ in range(horizon):
            s = np.concatenate((x, goal - x), 1)
            a = learner.act(torch.as_tensor(s, dtype=torch.float32), explore).numpy()
            x = np.clip(x + 0.25 * a, -1.5, 1.5)
            r = -np.linalg.norm(goal - x, axis=1)
            rows.append((s, a, r, np.concatenate((x, goal - x), 1)))
            total += r.mean() / horizon
        return rows, total

    before = np.mean([episodes(explore=False)[1] for _ in range(4)])
    memory: list[tuple[np.ndarray, ...]] = []
    for _ in range(12):
        memory += episodes(explore=True)[0]
        s, a, r, s2 = (torch.as_tensor(np.concatenate(part), dtype=torch.float32) for part in zip(*memory, strict=True))
        for _ in range(20):
            data = []
            for _ in range(config.utd):
                i = torch.as_tensor(rng.integers(0, len(s), 128))
                data.append(Transitions(s[i], a[i], r[i], torch.full((128,), gamma), s2[i]))
            learner.update(data)
    after = np.mean([episodes(explore=False)[1] for _ in range(4)])
    assert before < -0.6
    assert after > -0.25  # an optimal policy scores about -0.2: it starts up to 2 away and moves 0.25 a step
