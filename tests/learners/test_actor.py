"""The squashed Gaussian actor against torch.distributions and autograd; the temperature against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as D

from robot_rl.nn.actor import GaussianTanhActor, Temperature, squashed_log_prob


def make(layer_norm: bool = False, activation: str = "relu", last_scale: float = 3.0) -> GaussianTanhActor:
    generator = torch.Generator().manual_seed(0)
    return GaussianTanhActor(
        6, 3, (16, 16), activation, layer_norm, last_scale=last_scale, generator=generator, dtype=torch.float64
    )


def features(batch: int = 12) -> torch.Tensor:
    return torch.randn(batch, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_log_prob_equals_torch_distributions() -> None:
    actor = make()
    u, log_prob = actor.rsample(features(), torch.Generator().manual_seed(2))
    mean, log_std = actor(features())
    reference = D.TransformedDistribution(D.Normal(mean, log_std.exp()), D.TanhTransform(cache_size=1))
    assert torch.allclose(log_prob, reference.log_prob(u).sum(-1), atol=1e-6)
    assert torch.allclose(actor.log_prob(features(), u), log_prob, atol=1e-6)
    assert torch.equal(actor.mean(features()), torch.tanh(mean))


def test_density_integrates_to_one_in_unit_space() -> None:
    actor = GaussianTanhActor(2, 1, (8,), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    with torch.no_grad():
        density = actor.log_prob(torch.ones(1, 2, dtype=torch.float64).expand(len(grid), 2), grid.unsqueeze(-1)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-4)


def test_tanh_correction_is_exact_and_finite() -> None:
    x = torch.tensor([[0.0], [0.5], [-2.0]], dtype=torch.float64)
    noise, log_std = torch.zeros_like(x), torch.zeros_like(x)  # only the constant and the correction are left
    expected = -0.5 * math.log(2 * math.pi) - torch.log1p(-torch.tanh(x).square())
    assert torch.allclose(squashed_log_prob(noise, log_std, x), expected[:, 0], atol=1e-12)
    x = torch.tensor([[-1e4], [-50.0], [50.0], [1e4]])
    far = squashed_log_prob(torch.zeros_like(x), torch.zeros_like(x), x)
    assert torch.isfinite(far).all()
    expected = -0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - torch.tensor([1e4, 50.0, 50.0, 1e4]))
    assert torch.allclose(far, expected)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_hand_written_gradient_equals_autograd(layer_norm, activation) -> None:
    actor = make(layer_norm, activation)
    with torch.no_grad():  # some log_stds beyond both limits
        actor.bias[-1][0, 0, 3], actor.bias[-1][0, 0, 4] = 2.5, -20.5
    du = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    dlog_prob = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    sample = actor.draw(features(), torch.Generator().manual_seed(2))
    assert 0 < sample.free.sum() < sample.free.numel()
    actor.backward_draw(sample, du, dlog_prob)
    fast = actor.flat.grad.clone()

    actor.flat.zero_grad()
    u, log_prob = actor.rsample(features(), torch.Generator().manual_seed(2))
    assert torch.allclose(u, sample.u, atol=1e-12)
    assert torch.allclose(log_prob, sample.log_prob, atol=1e-10)
    ((u * du).sum() + (log_prob * dlog_prob).sum()).backward()
    assert (fast - actor.flat.grad).abs().max() < 1e-10 * max(1.0, fast.abs().max().item())


def test_part_of_a_draw() -> None:
    actor = make(layer_norm=True)
    du, dlog_prob = torch.ones(5, 3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    sample = actor.draw(features(), torch.Generator().manual_seed(2))
    actor.backward_draw(sample, du, dlog_prob, rows=5)
    some = actor.flat.grad.clone()
    pad = torch.zeros(7, dtype=torch.float64)
    actor.backward_draw(sample, torch.cat((du, pad.unsqueeze(-1).expand(7, 3))), torch.cat((dlog_prob, pad)))
    assert torch.allclose(some, actor.flat.grad, atol=1e-12)


def test_small_last_layer_starts_near_the_prior() -> None:
    actor = make(last_scale=1e-2)
    mean, log_std = actor(features(200))
    assert mean.abs().max() < 0.05
    assert log_std.abs().max() < 0.05


def test_temperature_moves_entropy_towards_its_target() -> None:
    for log_prob, direction in ((2.0, 1), (-4.0, -1)):  # entropy below its target raises alpha, above lowers it
        t = Temperature(-1.0, lr=0.1)
        t.step(torch.full((8,), log_prob))
        assert (t.alpha.item() - 1.0) * direction > 0.05


def test_temperature_equals_autograd_with_adam() -> None:
    t = Temperature(-1.5, initial=0.3, lr=1e-2, dtype=torch.float64)
    log_alpha = torch.tensor(0.3, dtype=torch.float64).log().requires_grad_()
    adam = torch.optim.Adam([log_alpha], 1e-2)
    for step in range(20):
        log_prob = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        loss = -(log_alpha * (log_prob - 1.5)).mean()
        adam.zero_grad()
        loss.backward()
        assert torch.allclose(t.step(log_prob), loss, atol=1e-6)
        adam.step()
    assert t.alpha.item() == pytest.approx(log_alpha.exp().item(), rel=1e-6)


def test_floor_and_fixed() -> None:
    t = Temperature(0.0, initial=0.5, lr=1.0, floor=0.4)
    for _ in range(5):
        t.step(torch.full((4,), -3.0))
    assert t.alpha.item() == pytest.approx(0.4)
    fixed = Temperature(0.0, initial=0.2, fixed=True)
    fixed.step(torch.full((4,), -3.0))
    assert fixed.alpha.item() == pytest.approx(0.2)
    assert Temperature(0.0, initial=0.0, fixed=True).alpha.item() == 0.0
    with pytest.raises(ValueError, match="initial"):
        Temperature(0.0, initial=0.0)
    with pytest.raises(ValueError, match="floor"):
        Temperature(0.0, initial=0.1, floor=0.2)
