"""The compiled path against the torch path: same values, same gradients, the same bits with any number of threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from robot_rl.nn import compiled
from robot_rl.nn.actor import GaussianTanhActor
from robot_rl.nn.flat import FlatAdam, polyak_
from robot_rl.nn.mlp import StackedMLP, matmul_precision

needs_kernels = pytest.mark.skipif(
    compiled.unavailable() is not None, reason=f"no compiled path here: {compiled.unavailable()}"
)


@dataclass(frozen=True)
class Case:
    n: int
    in_dim: int
    out_dim: int
    hidden: tuple[int, ...]
    batch: int


# Every edge of the kernels: rows that fill no tile, panels that fill no vector, dot products longer than a block, one
# network, more networks than threads, a number of them that no number of threads divides.
CASES = [
    Case(10, 39, 1, (256, 256, 256), 64),
    Case(1, 32, 14, (256, 256), 50),
    Case(3, 300, 1, (520, 8), 70),
    Case(5, 7, 3, (24, 16, 40), 25),
    Case(2, 1, 1, (8,), 1),
    Case(4, 11, 17, (48,), 101),
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make(case: Case, layer_norm: bool, dtype: torch.dtype) -> StackedMLP:
    generator = torch.Generator().manual_seed(3)
    net = StackedMLP(case.n, case.in_dim, case.out_dim, case.hidden, layer_norm=layer_norm, generator=generator, dtype=dtype)
    with torch.no_grad():  # gains of exactly one would hide a missing gain
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(dtype))
    return net


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def passes(net: StackedMLP, x: Tensor, dy: Tensor, columns: slice | bool, rows: int | None = None) -> list[Tensor]:
    """Output, gradient of all parameters, gradient of the input."""
    tape = net.tape(x.shape[-2])
    net.flat.grad.fill_(7.0)
    y = net.run(x, tape).clone()
    dx = net.backward(tape, dy, inputs=columns, rows=rows)
    assert dx is not None
    return [y, *(p.grad.clone() for p in net.parameters()), dx.clone()]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


@needs_kernels
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_paths_agree(case: Case, dtype: torch.dtype, layer_norm: bool) -> None:
    net = make(case, layer_norm, dtype)
    assert compiled.path("cpu", dtype) == "compiled"
    shared = draw(case.batch, case.in_dim, dtype=dtype)
    dy = draw(case.n, case.batch, case.out_dim, seed=1, dtype=dtype)
    for x in (shared, torch.stack([shared + i for i in range(case.n)]), draw(case.in_dim, case.batch, dtype=dtype).T):
        found = passes(net, x, dy, True)
        with compiled.use("torch"):
            expected = passes(net, x, dy, True)
        close(found, expected, TOLERANCE[dtype])
    part = slice(case.in_dim // 2, None)
    rows = max(1, case.batch // 2)
    found = passes(net, shared, dy[:, :rows], part, rows)
    with compiled.use("torch"):
        expected = passes(net, shared, dy[:, :rows], part, rows)
    close(found, expected, TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if c.out_dim == 1])
def test_regression_paths_agree(case: Case, per_head: bool, layer_norm: bool) -> None:
    net = make(case, layer_norm, torch.float32)
    x, y = draw(case.batch, case.in_dim), draw(*((case.n, case.batch) if per_head else (case.batch,)), seed=2)
    weight = draw(case.batch, seed=3).abs()

    def fit() -> list[Tensor]:
        tape = net.tape(case.batch)
        net.flat.grad.fill_(7.0)
        return [t.clone() for t in net.regress(x, tape, y, weight)] + [p.grad.clone() for p in net.parameters()]

    found = fit()
    with compiled.use("torch"):
        expected = fit()
    close(found, expected, 3e-5)


@needs_kernels
@pytest.mark.parametrize("case", CASES[:4])
def test_threads_do_not_change_a_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "WORTH_A_THREAD", 1.0)  # threads even for networks too small to deserve them
    net = make(case, True, torch.float32)
    x, dy = draw(case.batch, case.in_dim), draw(case.n, case.batch, case.out_dim, seed=1)
    results = []
    for threads in (1, 2, 3, 4):
        monkeypatch.setattr(compiled, "_threads", threads)  # not torch's: what ran before may have called set_threads
        assert compiled.threads() == threads
        results.append(passes(net, x, dy, True))
        if case.out_dim == 1:
            net.regress(x, net.tape(case.batch), dy[0, :, 0], torch.ones(case.batch))
            results[-1].append(net.flat.grad.clone())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_some_networks_alone() -> None:
    net = make(CASES[0], True, torch.float32)
    x, members = draw(64, 39), torch.tensor([7, 2])
    whole = net.run(x, net.tape(64)).clone()
    some = net.run(x, net.tape(64, 2), members)
    assert torch.equal(some, whole[members])
    spread = torch.tensor([7, 0, 2, 0])[::2]  # the same indices, not side by side in memory
    assert torch.equal(net.run(x, net.tape(64, 2), spread), whole[members])
    with pytest.raises(ValueError, match="indices below 10"):
        net.run(x, net.tape(64, 2), torch.tensor([0, 10]))


@needs_kernels
def test_a_moved_network_gets_new_addresses() -> None:
    """One tape outlives the vectors it was planned for."""
    net = make(CASES[1], True, torch.float32)
    x, tape = draw(50, 32), net.tape(50)
    before = net.run(x, tape).clone()
    net.flat.gather_()
    net.flat.data.mul_(0.5)
    with compiled.use("torch"):
        expected = net.run(x, net.tape(50)).clone()
    after = net.run(x, tape)
    assert not torch.equal(before, after)
    assert torch.allclose(after, expected, atol=1e-5)


@needs_kernels
def test_nothing_hides_a_nan() -> None:
    net = make(CASES[1], True, torch.float32)
    x = draw(50, 32)
    x[3, 5] = torch.nan
    y = net.run(x, net.tape(50))
    assert bool(torch.isnan(y[0, 3]).all())
    assert int(torch.isnan(y).sum()) == y.shape[-1], "other rows are untouched"


@needs_kernels
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_and_its_follower_equal_torch(weight_decay: float) -> None:
    ours, theirs = make(CASES[3], True, torch.float32), make(CASES[3], True, torch.float32)
    targets = [make(CASES[3], True, torch.float32).flat for _ in range(2)]
    for target in targets:
        target.data.mul_(0.5)
    adams = [FlatAdam(net.flat, 1e-2, weight_decay=weight_decay) for net in (ours, theirs)]
    for step in range(30):
        for net in (ours, theirs):
            net.flat.grad.copy_(draw(len(net.flat.grad), seed=step))
        adams[0].step(targets[0], 0.05)
        with compiled.use("torch"):
            adams[1].step()
            polyak_(targets[1], theirs.flat, 0.05)
    assert (ours.flat.data - theirs.flat.data).abs().max() < 1e-6
    assert (targets[0].data - targets[1].data).abs().max() < 1e-6
    with pytest.raises(ValueError, match="differ in layout"):
        adams[0].step(make(CASES[4], True, torch.float32).flat, 0.1)


@needs_kernels
def test_two_threads_run_two_networks_at_once() -> None:
    nets = [make(CASES[1], True, torch.float32) for _ in range(2)]
    inputs = [draw(50, 32, seed=i) for i in range(2)]
    alone = [net.run(x, net.tape(50)).clone() for net, x in zip(nets, inputs, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        tape = nets[i].tape(50)
        for _ in range(50):
            if not torch.equal(nets[i].run(inputs[i], tape), alone[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_actor_draws_alike_on_both_paths() -> None:
    actor = GaussianTanhActor(6, 3, (16, 16), layer_norm=True, generator=torch.Generator().manual_seed(0))
    found = actor.draw(draw(12, 6), torch.Generator().manual_seed(2))
    with compiled.use("torch"):
        expected = actor.draw(draw(12, 6), torch.Generator().manual_seed(2))
    assert torch.equal(found.noise, expected.noise)
    assert torch.allclose(found.u, expected.u, atol=1e-6)
    assert torch.allclose(found.log_prob, expected.log_prob, atol=1e-5)


def test_the_choice_of_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.path("cuda", torch.float32) == "torch"
    assert compiled.path("cpu", torch.float16) == "torch"
    with matmul_precision("medium"):
        assert compiled.path("cpu", torch.float32) == "torch"
    net = StackedMLP(1, 3, 1, (12,))  # 12 is no multiple of 8
    assert not compiled.fits(net, draw(2, 3))
    assert not compiled.fits(StackedMLP(1, 3, 1, (16,), activation="tanh"), draw(2, 3))
    compiled.unavailable.cache_clear()
    monkeypatch.setenv(compiled.SWITCH, "torch")
    assert compiled.path("cpu", torch.float32) == "torch"
    assert compiled.unavailable() == "ROBOT_RL_KERNELS=torch"
    compiled.unavailable.cache_clear()
    monkeypatch.setenv(compiled.SWITCH, "fast")
    with pytest.raises(ValueError, match="accepted are auto, compiled, torch"):
        compiled.path("cpu", torch.float32)
    monkeypatch.delenv(compiled.SWITCH)
    compiled.unavailable.cache_clear()


@needs_kernels
def test_wrong_shapes_are_refused() -> None:
    """The kernels believe what they are told: everything is checked before."""
    net = make(CASES[0], True, torch.float32)
    tape = net.tape(64)
    with pytest.raises(ValueError, match="does not fit a tape"):
        net.run(draw(64, 38), tape)
    net.run(draw(64, 39), tape)
    with pytest.raises(ValueError, match="dy"):
        net.backward(tape, draw(10, 63, 1))
    with pytest.raises(ValueError, match="neighbouring"):
        net.backward(tape, draw(10, 64, 1), inputs=slice(0, 8, 2))
    with pytest.raises(ValueError, match="do not fit"):
        net.regress(draw(64, 39), tape, draw(63), draw(64))


@needs_kernels
@pytest.mark.parametrize("patience", [0, 20_000_000], ids=["helpers sleep after each call", "helpers stay awake"])
def test_helpers_asleep_or_awake_do_the_same(patience: int) -> None:
    """In a process of its own: helpers outlive the test, and a child after fork needs new ones."""
    code = f"""
import os, time, torch
from robot_rl.nn import compiled, team
from robot_rl.nn.mlp import StackedMLP
team.PATIENCE = {patience}
compiled.WORTH_A_THREAD = 1.0
net = StackedMLP(5, 39, 1, (64, 64), generator=torch.Generator().manual_seed(0))
x, tape = torch.randn(101, 39, generator=torch.Generator().manual_seed(1)), net.tape(101)
compiled.set_threads(1)
expected = net.run(x, tape).clone()
for threads in (3, 2, 3):
    compiled.set_threads(threads)
    assert torch.get_num_threads() == 1
    for i in range(300):
        tape.outputs[-1].zero_()
        assert torch.equal(net.run(x, tape), expected), (threads, i)
        if i % 100 == 0:
            time.sleep(0.01)
assert len(team._team.helpers) == 2
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(net.run(x, net.tape(101)), expected) and len(team._team.helpers) == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_threads_are_at_least_one() -> None:
    with pytest.raises(ValueError, match=r"set_threads\(0\)"):
        compiled.set_threads(0)
