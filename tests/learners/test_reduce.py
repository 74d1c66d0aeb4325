"""Reductions against enumeration and autograd."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from robot_rl.learners.config import REDUCTIONS
from robot_rl.learners.reduce import draw_pair, reduce, reduce_with_grad


def values(n: int = 6, batch: int = 8) -> torch.Tensor:
    return torch.randn(n, batch, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_closed_form_pair_minimum_equals_enumeration(n) -> None:
    q = values(n)
    pairs = torch.stack([torch.minimum(q[i], q[j]) for i, j in combinations(range(n), 2)])
    assert torch.allclose(reduce(q, "weighted_min_pair"), pairs.mean(0), atol=1e-12)


def test_random_pair_is_a_pair_and_every_pair_is_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    n, draws = 5, 4000
    seen = [tuple(sorted(draw_pair(n, generator).tolist())) for _ in range(draws)]
    assert all(i != j for i, j in seen)
    assert set(seen) == set(combinations(range(n), 2))
    expected = draws / 10
    chi_square = sum((seen.count(pair) - expected) ** 2 / expected for pair in set(seen))
    assert chi_square < 27.9  # 0.1 % quantile at 9 degrees of freedom


def test_one_pair_serves_the_whole_batch() -> None:
    q = values(4, 50)
    got = reduce(q, "min_pair", torch.Generator().manual_seed(1))
    i, j = draw_pair(4, torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(got, torch.minimum(q[i], q[j]))


def test_plain_reductions() -> None:
    q = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    assert reduce(q, "min").tolist() == [1, 0]
    assert reduce(q, "mean").tolist() == [2, 2]
    assert reduce(q, "lcb", k=0.5).tolist() == [1.5, 1.0]
    assert reduce(q[:1], "lcb").tolist() == [1, 4], "one head has no spread"


@pytest.mark.parametrize("how", REDUCTIONS)
def test_gradients_equal_autograd(how) -> None:
    q = values().requires_grad_()
    value = reduce(q, how, torch.Generator().manual_seed(3), k=0.7)
    (expected,) = torch.autograd.grad(value.sum(), q)
    fast, dq = reduce_with_grad(q.detach(), how, torch.Generator().manual_seed(3), k=0.7)
    assert torch.allclose(fast, value, atol=1e-12)
    assert (dq - expected).abs().max() < 1e-12


def test_equal_heads_have_finite_gradients() -> None:
    q = torch.ones(4, 3)
    for how in REDUCTIONS:
        value, dq = reduce_with_grad(q, how, torch.Generator().manual_seed(0))
        assert torch.allclose(value, torch.ones(3))
        assert torch.allclose(dq.sum(0), torch.ones(3))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"how='median': accepted are min_pair"):
        reduce(values(), "median")  # type: ignore[arg-type]
    for how in ("min_pair", "weighted_min_pair"):
        with pytest.raises(ValueError, match="at least 2 critic heads"):
            reduce(values(1), how)
