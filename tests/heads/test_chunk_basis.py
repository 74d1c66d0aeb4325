"""Which part of a chunk a head controls: unit variance everywhere, the modes' relations, and the transpose."""

from __future__ import annotations

import pytest
import torch

from robot_rl.heads.basis import ChunkBasis


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_rows_have_unit_norm_and_full_rank_is_a_rotation(rows: int) -> None:
    for basis in (
        ChunkBasis(rows, 3),
        ChunkBasis(rows, 3, "repeat"),
        *(ChunkBasis(rows, 3, "low_rank", k) for k in range(1, rows + 1)),
    ):
        torch.testing.assert_close(basis.matrix.norm(dim=1), torch.ones(rows))
        assert basis.width == basis.rank * 3
    rotation = ChunkBasis(rows, 3, "low_rank", rows).matrix.double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(rows, dtype=torch.float64), atol=1e-6, rtol=0)


def test_one_mode_is_one_vector_for_all_rows() -> None:
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    repeat, one = ChunkBasis(7, 3, "repeat").expand(z, None), ChunkBasis(7, 3, "low_rank", 1).expand(z, None)
    assert torch.equal(repeat, one)
    torch.testing.assert_close(repeat, z[:, None].expand(4, 7, 3))


def test_full_is_the_identity() -> None:
    z = torch.randn(4, 21, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ChunkBasis(7, 3).expand(z, None).flatten(1), z)


@pytest.mark.parametrize(("mode", "rank"), [("full", 1), ("repeat", 1), ("low_rank", 3), ("low_rank", 6)])
@pytest.mark.parametrize("partial", [False, True])
def test_pull_back_is_the_transpose_of_expand(mode, rank: int, partial: bool) -> None:
    kwargs = {"controlled_rows": 4, "controlled_dims": torch.tensor([True, False, True])} if partial else {}
    basis = ChunkBasis(6, 3, mode, rank, **kwargs)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(5, basis.width, generator=generator, dtype=torch.float64, requires_grad=True)
    rest = torch.randn(5, 6, 3, generator=generator, dtype=torch.float64)
    gradient = torch.randn(5, 6, 3, generator=generator, dtype=torch.float64)
    chunk = basis.expand(z, rest)
    (by_autograd,) = torch.autograd.grad(chunk, z, gradient)
    torch.testing.assert_close(basis.pull_back(gradient), by_autograd, atol=1e-12, rtol=0)
    if partial:
        assert torch.equal(chunk[:, 4:], rest[:, 4:])
        assert torch.equal(chunk[:, :, 1], rest[:, :, 1])


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="mode='half'"):
        ChunkBasis(4, 2, "half")  # type: ignore[arg-type]
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"rank={rank}"):
            ChunkBasis(4, 2, "low_rank", rank)
    with pytest.raises(ValueError, match="controls nothing"):
        ChunkBasis(4, 2, controlled_dims=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="prior noise"):
        ChunkBasis(4, 2, controlled_rows=2).expand(torch.zeros(1, 8), None)
