"""Many calls as one: sweeps of updates and blocks of calls give the bits that one call after the other gives."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from robot_rl.learners.ensemble import CriticEnsemble, TDSteps
from robot_rl.learners.sac import SACConfig, SACLearner, Transitions
from robot_rl.nn import compiled, team
from robot_rl.nn.flat import FlatAdam

pytestmark = pytest.mark.skipif(compiled.unavailable() is not None, reason=f"no compiled passes: {compiled.unavailable()}")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    compiled.set_threads(1)


def steps(updates: int, batch: int, weighted: bool, dtype: torch.dtype, width: int = 9) -> TDSteps:
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    weight = (normal(updates, batch) > 0).to(dtype) if weighted else None
    shape = (updates, batch)
    return TDSteps(
        normal(*shape, width), normal(*shape, width), normal(*shape), normal(*shape).abs(), normal(*shape), -0.3, weight
    )


def one_after_the_other(critic, target, optimizer, data: TDSteps, how, generator):
    """The definition, by the ensemble's own single steps."""
    for u in range(len(data.reward)):
        value = target.reduced_value(data.next_x[u], how, generator)
        y = data.reward[u] + data.discount[u] * (value + data.bonus_scale * data.bonus[u])
        fit = critic.loss_and_grad(data.x[u], y, None if data.weight is None else data.weight[u])
        optimizer.step(target.flat, 0.02)
    return fit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("heads", "updates", "how", "hidden", "batch"),
    [
        (2, 1, "min", (32, 32), 40), (2, 4, "min_pair", (256, 256), 256), (10, 6, "min_pair", (64, 64), 256),
        (7, 5, "min_pair", (256, 24), 256), (5, 3, "min", (64, 64), 130), (3, 400, "min_pair", (16, 16), 8),
    ],
)  # fmt: skip
def test_a_sweep_is_its_updates_one_after_the_other(dtype, weighted, heads, updates, how, hidden, batch) -> None:
    data = steps(updates, batch, weighted, dtype)
    critic = CriticEnsemble(heads, 9, hidden, layer_norm=heads > 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = {}
    for threads in (0, 1, 2, 3):  # 0: the definition
        compiled.set_threads(max(threads, 1))
        net = deepcopy(critic)
        target, optimizer, generator = net.make_target(), FlatAdam(net.flat, 1e-2), torch.Generator().manual_seed(5)
        if threads:
            fit = net.td_updates(target, optimizer, 0.02, data, how, generator)
        else:
            fit = one_after_the_other(net, target, optimizer, data, how, generator)
        vectors = (net.flat.data, target.flat.data, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.step_count)
        found[threads] = [t.clone() for t in (*vectors, fit.q, fit.slope, fit.y, generator.get_state())]
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for ours, slow in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, slow, rtol=tolerance, atol=tolerance)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(found[threads], found[1], strict=True)), threads


def batches(config: SACConfig, call: int, rows: int = 256) -> list[Transitions]:
    g = torch.Generator().manual_seed(call)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=config.dtype)

    s, a = config.observation_dim, config.action_dim
    return [
        Transitions(normal(rows, s), normal(rows, a).tanh(), normal(rows), normal(rows).abs().clamp(max=0.99), normal(rows, s))
        for _ in range(config.utd)
    ]


@pytest.mark.parametrize("reduce", ["min", "min_pair", "mean"])
@pytest.mark.parametrize("utd", [1, 3])
def test_an_update_as_one_piece_is_the_update(reduce, utd) -> None:
    """Without a report nothing is read before the end, so all of it is one piece; with one it is a dozen calls."""
    config = SACConfig(6, 3, n_critics=3, hidden=(64, 64), utd=utd, actor_every=utd, target_reduce="min", actor_reduce=reduce)
    learners = {}
    for threads, report in ((1, True), (1, False), (2, True), (2, False), (3, False)):
        compiled.set_threads(threads)
        learner = SACLearner(config, seed=4)
        for call in range(4):
            metrics = learner.update(batches(config, call), report=report)
            assert bool(metrics) == report
        learners[threads, report] = learner.state_dict()
    first = learners.pop((1, True))
    for key, state in learners.items():
        different = [name for name, value in state.items() if not torch.equal(value, first[name])]
        assert not different, (key, different)


def test_paths_learn_the_same() -> None:
    config = SACConfig(6, 3, n_critics=4, hidden=(32, 32), utd=2, dtype=torch.float64)
    states = []
    for path in ("compiled", "torch"):
        with compiled.use(path):
            learner = SACLearner(config, seed=4)
            for call in range(3):
                learner.update(batches(config, call, 64), report=False)
            states.append(learner.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-9, atol=1e-9, msg=name)


def test_batches_must_be_alike() -> None:
    config = replace(SACConfig(6, 3, hidden=(16, 16)), utd=2)
    small, large = batches(config, 0, 8)[0], batches(config, 0, 16)[0]
    with pytest.raises(ValueError, match="differ in size"):
        SACLearner(config).update([small, large])


def test_more_calls_than_there_is_room_for() -> None:
    compiled.set_threads(2)
    results = []
    for grouped in (True, False):
        net = CriticEnsemble(2, 4, (8, 8), generator=torch.Generator().manual_seed(0))
        optimizer = FlatAdam(net.flat, 1e-3)
        net.flat.grad.fill_(1.0)
        with compiled.together(grouped):
            for _ in range(5000):
                optimizer.step()
        results.append(net.flat.data.clone())
    assert torch.equal(*results)


def test_too_many_tasks_in_one_go_are_refused() -> None:
    nothing = team.Task(compiled.program(torch.float32).adam, (0,) * 6 + (0.0,) * FlatAdam.NUMBERS + (0, 0), (), (0,))
    with pytest.raises(ValueError, match="5000 tasks"):
        team.in_order([nothing] * 5000, 1, (0, 5000), [(0, 0), (0, 0)])
    team.in_order([nothing] * 500, 1, (0, 500), [(0, 0), (0, 0)])  # and the helpers are free again


def test_blocks_do_not_nest_and_survive_an_error() -> None:
    compiled.set_threads(2)
    net = CriticEnsemble(2, 4, (8, 8))
    optimizer = FlatAdam(net.flat, 1e-3)
    net.flat.grad.fill_(1.0)

    def broken() -> None:
        with compiled.together(True):
            optimizer.step()
            raise KeyError("of the caller's")

    with pytest.raises(RuntimeError, match="inside"), compiled.together(True), compiled.together(True):
        pass
    with pytest.raises(KeyError):
        broken()
    before = net.flat.data.clone()  # what was asked for before the error was done
    with compiled.together(True):
        optimizer.step()
    assert not torch.equal(before, net.flat.data)
    assert float(optimizer.step_count) == 2
