"""Which part of a chunk-shaped space a head controls: all of it, one vector repeated, or a few smooth modes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robot_rl.heads.config import BasisMode


class ChunkBasis(nn.Module):
    """Linear map from a head's output z (B, k*A) to a chunk (B, H, A): per action dimension, chunk = P z, P (H, k).

    Rows of P have unit norm, so z ~ N(0, I) keeps unit variance everywhere. ``full``: identity; ``repeat``: one vector
    for all rows; ``low_rank``: the first ``rank`` columns of the orthonormal DCT-II basis, rows rescaled.

    Args:
        controlled_rows: only the first so many rows are controlled; the others keep what they are given.
        controlled_dims: (A,) bool, likewise for action dimensions; all by default.
    """

    matrix: Tensor
    mask: Tensor

    def __init__(
        self,
        rows: int,
        dims: int,
        mode: BasisMode = "full",
        rank: int = 1,
        controlled_rows: int | None = None,
        controlled_dims: Tensor | None = None,
    ) -> None:
        super().__init__()
        k = {"full": rows, "repeat": 1, "low_rank": rank}.get(mode)
        if k is None:
            raise ValueError(f"basis mode={mode!r}: accepted are full, repeat, low_rank")
        if not 1 <= k <= rows:
            raise ValueError(f"rank={rank}: accepted are 1 to {rows} (the rows of the chunk)")
        if mode == "full":
            matrix = torch.eye(rows)
        else:
            i, j = torch.arange(rows)[:, None], torch.arange(k)[None, :]
            matrix = torch.cos(torch.pi * (i + 0.5) * j / rows)
            matrix[:, 1:] *= 2**0.5
            matrix = matrix / matrix.norm(dim=1, keepdim=True)
        mask = torch.ones(rows, dims, dtype=torch.bool)
        if controlled_rows is not None:
            mask[controlled_rows:] = False
        if controlled_dims is not None:
            mask &= controlled_dims.bool()
        if not mask.any():
            raise ValueError("the head controls nothing: controlled_rows or controlled_dims leave no entry")
        self.rows, self.dims, self.rank = rows, dims, k
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.covers_all = bool(mask.all())

    @property
    def width(self) -> int:
        """Width of the head's output."""
        return self.rank * self.dims

    def expand(self, z: Tensor, rest: Tensor | None) -> Tensor:
        """(B, k*A) to (B, H, A); uncontrolled entries come from ``rest`` (B, H, A).

        Raises:
            ValueError: some entries are uncontrolled and ``rest`` is None.
        """
        chunk = self.matrix.to(z.dtype) @ z.unflatten(1, (self.rank, self.dims))
        if self.covers_all:
            return chunk
        if rest is None:
            raise ValueError("this basis leaves entries uncontrolled: pass the prior noise that fills them")
        return torch.where(self.mask, chunk, rest)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The transpose of :meth:`expand`: dL/dchunk (B, H, A) to dL/dz (B, k*A)."""
        return (self.matrix.to(gradient.dtype).T @ (gradient * self.mask)).flatten(1)
