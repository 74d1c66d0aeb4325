"""The critic ensemble against N separate networks and against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.reduce import draw_pair, reduce
from robot_rl.nn.flat import polyak_
from robot_rl.nn.mlp import StackedMLP

KINDS = [(activation, layer_norm) for activation in ("relu", "tanh") for layer_norm in (False, True)]


def make(activation="relu", layer_norm=True, n=5, d=11, hidden=(32, 24, 16), dtype=torch.float64) -> CriticEnsemble:
    generator = torch.Generator().manual_seed(3)
    critic = CriticEnsemble(n, d, hidden, activation, layer_norm, generator=generator, dtype=dtype)
    with torch.no_grad():  # gains of exactly one would hide a missing gain
        for p in critic.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(dtype))
    return critic


def separate(critic: CriticEnsemble, i: int) -> nn.Sequential:
    """Head ``i`` rebuilt from torch's own modules."""
    modules: list[nn.Module] = []
    for j, (weight, bias) in enumerate(zip(critic.weight, critic.bias, strict=True)):
        linear = nn.Linear(weight.shape[1], weight.shape[2], dtype=weight.dtype)
        linear.weight.data.copy_(weight.data[i].T)
        linear.bias.data.copy_(bias.data[i, 0])
        modules.append(linear)
        if j == len(critic.hidden):
            break
        if critic.layer_norm:
            norm = nn.LayerNorm(weight.shape[2], dtype=weight.dtype)
            norm.weight.data.copy_(critic.gain[j].data[i, 0])
            norm.bias.data.copy_(critic.shift[j].data[i, 0])
            modules.append(norm)
        modules.append(nn.ReLU() if critic.activation == "relu" else nn.Tanh())
    return nn.Sequential(*modules)


def rows(critic: CriticEnsemble, batch: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(batch, critic.in_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        critic.flat.data.dtype
    )


@pytest.mark.parametrize(("activation", "layer_norm"), KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_equals_separate_networks(activation, layer_norm, dtype, tolerance) -> None:
    critic = make(activation, layer_norm, dtype=dtype)
    x = rows(critic)
    expected = torch.stack([separate(critic, i)(x).squeeze(-1) for i in range(5)])
    assert (critic(x) - expected).abs().max() < tolerance
    assert (critic.value(x) - expected).abs().max() < tolerance
    own = torch.stack([x + i for i in range(5)])  # every head its own input
    expected = torch.stack([separate(critic, i)(own[i]).squeeze(-1) for i in range(5)])
    assert (critic(own) - expected).abs().max() < 5 * tolerance
    assert (critic.value(own) - expected).abs().max() < 5 * tolerance


@pytest.mark.parametrize(("activation", "layer_norm"), KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_regression_gradient_equals_autograd(activation, layer_norm, weighted) -> None:
    critic = make(activation, layer_norm)
    x, y = rows(critic), rows(critic, seed=1)[:, 0]
    weight = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).round() if weighted else None
    fast = critic.loss_and_grad(x, y, weight)
    grad = critic.flat.grad.clone()

    critic.flat.zero_grad()
    square = (critic(x) - y) ** 2
    loss = 0.5 * (square.mean(1) if weight is None else (square * weight).sum(1) / weight.sum().clamp_min(1)).sum()
    loss.backward()
    assert critic.flat.is_flat()
    assert torch.allclose(fast.loss, loss, atol=1e-12)
    assert (grad - critic.flat.grad).abs().max() < 1e-10
    assert grad.abs().max() > 0.01


@pytest.mark.parametrize(("activation", "layer_norm"), KINDS)
def test_input_gradient_equals_autograd(activation, layer_norm) -> None:
    critic = make(activation, layer_norm)
    x = rows(critic).requires_grad_()
    dq = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    (expected,) = torch.autograd.grad((critic(x) * dq).sum(), x)
    critic.flat.grad.fill_(7.0)
    q, dx = critic.input_grad(x.detach(), dq)
    assert torch.allclose(q, critic(x), atol=1e-12)
    assert (dx - expected).abs().max() < 1e-10
    assert (critic.input_grad(x.detach(), lambda q: dq, slice(8, None))[1] - expected[:, 8:]).abs().max() < 1e-10
    per_head = critic.input_grad(x.detach().expand(5, 20, 11), dq)[1]
    assert (per_head.sum(0) - expected).abs().max() < 1e-10
    assert (critic.flat.grad == 7.0).all(), "an input gradient must leave the parameters' gradient alone"


@pytest.mark.parametrize("how", ["min_pair", "weighted_min_pair", "min", "mean", "lcb"])
def test_reduced_values_and_their_input_gradients(how) -> None:
    critic = make()
    x = rows(critic).requires_grad_()
    reference = reduce(critic(x), how, torch.Generator().manual_seed(5), k=0.5)
    (slope,) = torch.autograd.grad(reference.sum(), x)
    value = critic.reduced_value(x.detach(), how, torch.Generator().manual_seed(5), k=0.5)
    assert torch.allclose(value, reference, atol=1e-12)
    value, dx = critic.reduced_input_grad(x.detach(), how, torch.Generator().manual_seed(5), k=0.5)
    assert torch.allclose(value, reference, atol=1e-12)
    assert (dx - slope).abs().max() < 1e-10


def test_only_asked_heads_are_evaluated() -> None:
    critic = make()
    heads = draw_pair(5, torch.Generator().manual_seed(0))
    assert torch.allclose(critic.value(rows(critic), heads), critic(rows(critic))[heads], atol=1e-12)


def test_loss_is_a_mean_of_squares_not_the_square_of_a_mean() -> None:
    """Two heads, two rows, by hand: one head is right, the other off by +3 and -1."""
    critic = make(n=2)
    x = rows(critic, 2)
    q = critic.value(x)
    y = torch.stack((q[0], q[1] - torch.tensor([3.0, -1.0], dtype=torch.float64)))
    assert critic.loss_and_grad(x, y).loss.item() == pytest.approx(0.5 * (0 + (9 + 1) / 2))
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert critic.loss_and_grad(x, y, weight).loss.item() == pytest.approx(0.5 * 9)
    assert critic.loss_and_grad(x, y, 0 * weight).loss.item() == 0  # an all-invalid batch is a no-op, not NaN
    assert (critic.flat.grad == 0).all()


def test_gradient_is_overwritten_and_tapes_do_not_mix() -> None:
    critic = make()
    x, y = rows(critic), rows(critic, seed=1)[:, 0]
    critic.loss_and_grad(x, y)
    first = critic.flat.grad.clone()
    kept = critic.value(x)
    snapshot = kept.clone()
    critic.value(rows(critic, seed=9))
    critic.input_grad(rows(critic, seed=9), torch.ones(5, 20, dtype=torch.float64))
    critic.loss_and_grad(x, y)
    assert torch.equal(first, critic.flat.grad)
    assert torch.equal(kept, snapshot), "a returned value must not change under the caller"


def test_rows_of_a_tape() -> None:
    """One pass over two batches, a gradient from the first alone."""
    net = StackedMLP(2, 5, 3, (8, 8), layer_norm=True, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dy = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tape = net.tape(10)
    net.run(x, tape)
    net.backward(tape, dy, rows=6)
    fast = net.flat.grad.clone()
    net.flat.zero_grad()
    (net(x[:6]) * dy).sum().backward()
    assert (fast - net.flat.grad).abs().max() < 1e-10


def test_target_follows_and_state_is_loaded_in_place() -> None:
    critic = make()
    critic.value(rows(critic))
    target = critic.make_target()
    assert torch.equal(target.flat.data, critic.flat.data)
    assert not any(p.requires_grad for p in target.parameters())
    critic.flat.data.add_(1.0)
    polyak_(target.flat, critic.flat, 0.25)
    assert torch.allclose(critic.flat.data - target.flat.data, torch.full_like(target.flat.data, 0.75))
    assert torch.allclose(target.value(rows(critic)), target(rows(critic)), atol=1e-12)  # its fast path follows its own copy

    pointer = target.weight[0].data_ptr()
    target.load_state_dict(critic.state_dict())
    assert target.weight[0].data_ptr() == pointer
    assert target.flat.is_flat()
    assert torch.equal(target.value(rows(critic)), critic.value(rows(critic)))


def test_changing_precision_keeps_it_flat() -> None:
    critic = make(dtype=torch.float32)
    critic.value(rows(critic))
    critic.double()
    assert critic.flat.is_flat()
    assert critic.value(rows(critic)).dtype == torch.float64
    critic.loss_and_grad(rows(critic), rows(critic)[:, 0])


def test_same_seed_same_network_in_every_precision() -> None:
    a = CriticEnsemble(3, 4, (8,), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b = CriticEnsemble(3, 4, (8,), generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    assert torch.equal(a.flat.data.float(), b.flat.data)
    assert not torch.equal(a.weight[0][0], a.weight[0][1]), "heads must start different"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation": "gelu"}, "accepted are relu, tanh"),
        ({"hidden": ()}, "at least one hidden"),
        ({"n_heads": 0}, "sizes >= 1"),
    ],
)
def test_bad_shapes_are_refused(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        CriticEnsemble(**({"n_heads": 2, "in_dim": 3} | kwargs))


def test_wrong_batch_for_a_tape_is_refused() -> None:
    critic = make()
    with pytest.raises(ValueError, match="does not fit a tape"):
        critic.run(rows(critic, 7), critic.tape(8))
