"""Chunks that continue a running one: the sampler itself where nothing is known, the published rule where something is, and what
the rule is for, on a distribution whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from spine_kit import SmoothBase, compact, observations

from robot_rl.policies.base import prior_noise
from robot_rl.policies.inpainting import STRONGEST, ContinuingPolicy, Denoising, inpaint, soft_mask, why_not

KINDS = ("diffusion", "flow")


def asked(policy, batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return policy.encode(observations(policy, batch, seed)), prior_noise(policy, batch, generator)


def test_the_mask_is_that_of_the_paper() -> None:
    weight = soft_mask(2, 5, 8)
    c = [(5 - i) / (5 - 2 + 1) for i in (2, 3, 4)]
    expected = [1.0, 1.0, *(x * (math.exp(x) - 1) / (math.e - 1) for x in c), 0.0, 0.0, 0.0]
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    assert soft_mask(8, 8, 8).tolist() == [1.0] * 8
    assert float(soft_mask(0, 1, 4)[0]) == pytest.approx(0.5 * math.expm1(0.5) / math.expm1(1.0))
    assert soft_mask(0, 0, 4).tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_known_row_it_is_the_sampler(kind: str) -> None:
    policy = compact(kind, num_steps=5)
    conditioning, noise = asked(policy, 6)
    known = torch.full((6, 4, 3), 0.7)
    drawn = inpaint(policy.denoising(conditioning), noise, known, torch.zeros(6, 4))
    torch.testing.assert_close(drawn, policy.sample(conditioning, noise), atol=1e-6, rtol=1e-5)
    assert not drawn.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_rows_are_exact_and_candidates_stay_with_their_decision(kind: str) -> None:
    policy = compact(kind)
    conditioning, noise = asked(policy, 3)
    known = torch.rand((3, 4, 3), generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8
    weight = torch.stack([soft_mask(2, 4, 4), soft_mask(0, 0, 4), soft_mask(1, 2, 4)])
    base = ContinuingPolicy(policy, known, weight)
    drawn = base.sample(conditioning, noise)
    torch.testing.assert_close(drawn[0, :2], known[0, :2], atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn[2, :1], known[2, :1], atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn[1], policy.sample(conditioning, noise)[1], atol=1e-5, rtol=0)
    assert torch.equal(drawn, base.sample(conditioning, noise))
    several = base.sample(conditioning.repeat_interleave(2, dim=0), noise.repeat_interleave(2, dim=0))
    torch.testing.assert_close(several[::2], drawn, atol=1e-5, rtol=0)
    torch.testing.assert_close(several[1::2], drawn, atol=1e-5, rtol=0)


def test_the_rule_equals_its_formula_in_full_jacobians() -> None:
    """Flow, float64: velocity plus min(beta, (1 - t) / (t r^2)) (Y - A) W dA/dx as in the paper, then the known rows by their weight."""
    policy = compact("flow", num_steps=5).double()
    conditioning, noise = (x.double() for x in asked(policy, 1))
    known, weight = torch.full((1, 4, 3), 0.3, dtype=torch.float64), soft_mask(1, 3, 4).double()[None]
    condition, times = policy.chain_inputs(conditioning)
    w, y, x, n = weight[0].repeat_interleave(3), known.flatten(), noise.flatten(), 5
    for i in range(n):
        t = i / n

        def velocity(z: torch.Tensor, i: int = i) -> torch.Tensor:
            return policy.denoiser(z[None], condition, times[i : i + 1])[0]

        def estimate(z: torch.Tensor, t: float = t, velocity=velocity) -> torch.Tensor:
            return z + (1 - t) * velocity(z)

        jacobian = torch.autograd.functional.jacobian(estimate, x)
        d2 = 0.5**2
        r2 = (1 - t) ** 2 * d2 / (t**2 * d2 + (1 - t) ** 2)  # the paper's with d = 1
        strength = STRONGEST / d2 if t == 0 else min(STRONGEST / d2, (1 - t) / (t * r2))
        v = velocity(x) + strength * ((y - estimate(x)) * w) @ jacobian
        clean = x + (1 - t) * v
        clean = clean + w * (y - clean)
        x = x + (clean - x) / (1 - t) / n
    drawn = inpaint(policy.denoising(conditioning), noise, known, weight)
    torch.testing.assert_close(drawn.flatten(), x.clamp(-1, 1), atol=1e-10, rtol=0)


def test_rows_to_come_go_on_from_those_that_run() -> None:
    """Correlated Gaussian rows, exact denoiser: given the first two rows, the others must lie near their conditional mean."""
    rows, steps = 6, 8
    i = torch.arange(rows, dtype=torch.float64)
    covariance = 0.25 * torch.exp(-0.5 * ((i[:, None] - i) / 2.0) ** 2) + 1e-6 * torch.eye(rows, dtype=torch.float64)

    def clean(k: int, x: torch.Tensor) -> torch.Tensor:
        a, s = k / steps, 1 - k / steps
        return a * covariance @ torch.linalg.solve(a * a * covariance + s * s * torch.eye(rows), x)

    sampler = Denoising(
        levels=[(k / steps, 1 - k / steps) for k in range(steps)], clean=clean,
        advance=lambda k, x, estimate: x + (estimate - x) / (steps - k), deviation=0.5, finish=lambda x: x, own=lambda c: c,
    )  # fmt: skip
    noise = torch.randn((400, rows, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = inpaint(sampler, noise, torch.zeros_like(noise), torch.zeros((400, rows)))
    known = torch.full((400, rows, 1), 0.5, dtype=torch.float64)
    drawn = inpaint(sampler, noise, known, soft_mask(2, 2, rows).double().expand(400, rows))
    expected = covariance[2:, :2] @ torch.linalg.solve(covariance[:2, :2], torch.full((2,), 0.5, dtype=torch.float64))
    found = drawn[:, 2:, 0].mean(0)
    assert torch.allclose(drawn[:, :2], known[:, :2])
    torch.testing.assert_close(found, expected, atol=0.07, rtol=0)  # 0.39, 0.25, 0.12, 0.05; without a pull they are zero
    jump = (drawn[:, 2, 0] - 0.5).abs().mean()
    assert jump < 0.5 * (plain[:, 2, 0] - 0.5).abs().mean()


def test_a_base_without_a_sampler_is_refused_with_the_reason() -> None:
    base = SmoothBase()
    assert "does not hand out its sampler" in why_not(base)
    with pytest.raises(ValueError, match=r"SmoothBase \(sampler smooth\) does not hand out"):
        ContinuingPolicy(base, torch.zeros(1, 3, 3), torch.zeros(1, 3))
    policy = compact()
    assert why_not(policy) == ""
    with pytest.raises(ValueError, match="grad=True"):
        ContinuingPolicy(policy, torch.zeros(1, 4, 3), torch.zeros(1, 4)).sample(
            torch.zeros(1, 4), torch.zeros(1, 4, 3), grad=True
        )
