"""Flat parameters and their optimiser against torch's per-tensor ones."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from robot_rl.nn.flat import FlatAdam, FlatParameters, polyak_


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def backward(module: nn.Module, step: int) -> None:
    x = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    module(x.to(next(module.parameters()).dtype)).square().sum().backward()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_adam_equals_torch(fused, weight_decay, max_norm) -> None:
    ours, theirs = net(), net()
    flat = FlatParameters(ours)
    adam = FlatAdam(flat, 1e-2, weight_decay=weight_decay, max_grad_norm=max_norm)
    adam.fused = adam.fused and fused
    reference = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=weight_decay)
    for step in range(50):
        flat.zero_grad()
        reference.zero_grad()
        backward(ours, step)
        backward(theirs, step)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        adam.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6 * b.abs().max()  # both count steps in float32
    assert flat.is_flat()


def test_clip_returns_the_norm_and_leaves_small_gradients() -> None:
    flat = FlatParameters(net())
    flat.grad.fill_(1.0)
    norm = flat.clip_grad_norm_(1e9)
    assert norm.item() == pytest.approx(flat.grad.numel() ** 0.5)
    assert (flat.grad == 1.0).all()
    flat.clip_grad_norm_(2.0)
    assert flat.grad.norm().item() == pytest.approx(2.0, rel=1e-5)


def test_polyak_equals_the_loop() -> None:
    online, target, slow = net(0), net(1), net(1)
    polyak_(FlatParameters(target), FlatParameters(online), 0.005)
    for s, o, t in zip(slow.parameters(), online.parameters(), target.parameters(), strict=True):
        assert torch.allclose(t, 0.995 * s + 0.005 * o, atol=1e-15)
    with pytest.raises(ValueError, match="differ in layout"):
        polyak_(FlatParameters(target), FlatParameters(nn.Linear(2, 2)), 0.1)


def test_resume_is_bitwise() -> None:
    def run(module, flat, adam, steps) -> None:
        for step in steps:
            flat.zero_grad()
            backward(module, step)
            adam.step()

    straight = net(dtype=torch.float32)
    flat = FlatParameters(straight)
    adam = FlatAdam(flat)
    run(straight, flat, adam, range(10))
    saved = ({k: v.clone() for k, v in straight.state_dict().items()}, adam.state_dict())
    run(straight, flat, adam, range(10, 20))

    resumed = net(seed=5, dtype=torch.float32)
    flat2 = FlatParameters(resumed)
    adam2 = FlatAdam(flat2)
    resumed.load_state_dict(saved[0])
    adam2.load_state_dict(saved[1])
    run(resumed, flat2, adam2, range(10, 20))
    assert torch.equal(flat.data, flat2.data)
    assert torch.equal(adam.exp_avg_sq, adam2.exp_avg_sq)


def test_views_are_watched() -> None:
    module = net()
    flat = FlatParameters(module)
    assert flat.is_flat()
    module.zero_grad(set_to_none=True)
    assert not flat.is_flat()
    flat.gather_()
    assert flat.is_flat()
    before = [p.clone() for p in module.parameters()]
    module.float()
    flat.gather_()
    assert flat.data.dtype == torch.float32
    assert all(torch.allclose(a.float(), b) for a, b in zip(before, module.parameters(), strict=True))


def test_deep_copy_is_flat_and_independent() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.flat = FlatParameters(self)

    a = Owner()
    b = deepcopy(a)
    assert b.flat.is_flat()
    assert b.flat.parameters[0] is b.net[0].weight
    b.flat.data.zero_()
    assert (b.net[0].weight == 0).all()
    assert (a.net[0].weight != 0).any()


def test_bad_input_is_named() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        FlatParameters(frozen)
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="share dtype and device"):
        FlatParameters(mixed)
    flat = FlatParameters(net())
    with pytest.raises(ValueError, match="lr=-1"):
        FlatAdam(flat, lr=-1)
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        FlatAdam(flat, max_grad_norm=0)
    adam = FlatAdam(flat)
    with pytest.raises(ValueError, match="expected"):
        adam.load_state_dict({"exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match="'exp_avg' has shape"):
        adam.load_state_dict(adam.state_dict() | {"exp_avg": torch.zeros(1)})


def test_moved_module_needs_a_new_optimiser() -> None:
    module = net()
    flat = FlatParameters(module)
    adam = FlatAdam(flat)
    module.float()
    flat.gather_()
    with pytest.raises(RuntimeError, match="make a new FlatAdam"):
        adam.step()
