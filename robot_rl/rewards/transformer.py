"""A small causal transformer: what sees a position sees nothing after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-norm attention and a feed-forward net of four times the width."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width}: accepted are multiples of heads={heads}")
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._qkv(x)
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))

    def weights(self, x: Tensor) -> Tensor:
        """(B, T, T) attention, mean over heads; row t sums to 1 over 0..t."""
        q, k, _ = self._qkv(x)
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1).mean(1)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class CausalTransformer(nn.Module):
    """(B, T, width) to (B, T, width)."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def last_attention(self, x: Tensor) -> Tensor:
        """(B, T) what the last position attends to, mean over heads and layers; each row sums to 1."""
        rows = []
        for block in self.blocks:
            assert isinstance(block, Block)
            rows.append(block.weights(x)[:, -1])
            x = block(x)
        return torch.stack(rows).mean(0)
