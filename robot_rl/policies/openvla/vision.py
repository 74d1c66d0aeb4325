"""OpenVLA's eyes: one or two frozen vision transformers (DINOv2, SigLIP) over the same picture, named as timm names their weights.

The features are the second-to-last block's, patches only, of both side by side; a small network maps them to the language model's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 16
"""Of every vision transformer that OpenVLA was published with (ViT-L and SoViT-400m)."""


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))  # timm's gamma, under the name that OpenVLA's checkpoints have

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width), _MLP(width, hidden)
        self.ls1: nn.Module = _Scale(width) if scaled else nn.Identity()
        self.ls2: nn.Module = _Scale(width) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _Patches(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Shaped by its weights (timm's names), of which only what its features need is kept.

    Raises:
        ValueError: weights that are no such transformer's.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        try:
            width, _, patch, _ = weights["patch_embed.proj.weight"].shape
            hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        except (KeyError, ValueError) as error:
            raise ValueError(f"the vision transformer's weights lack {error}") from None
        depth = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks."))
        if depth < 2 or width % HEADS:
            raise ValueError(
                f"a vision transformer of {depth} blocks of width {width}: accepted are 2 or more, of a multiple of {HEADS}"
            )
        self.patch_embed = _Patches(width, patch)
        self.pos_embed = nn.Parameter(torch.zeros_like(weights["pos_embed"]))
        for name in ("cls_token", "reg_token"):
            if name in weights:
                self.register_parameter(name, nn.Parameter(torch.zeros_like(weights[name])))
        self.prefix = [n for n in ("cls_token", "reg_token") if n in weights]
        self.blocks = nn.ModuleList(_Block(width, hidden, "blocks.0.ls1.scale_factor" in weights) for _ in range(depth - 1))
        wanted = self.state_dict()
        wrong = [n for n, v in wanted.items() if n not in weights or weights[n].shape != v.shape]
        if wrong:
            raise ValueError(
                f"the vision transformer's weights lack {wrong[0]}, or have another shape of it ({len(wrong)} in all)"
            )
        self.load_state_dict({n: weights[n] for n in wanted})
        self.width, self.patches = width, self.pos_embed.shape[1]
        self.first = sum(weights[n].shape[1] for n in self.prefix)
        if self.prefix and self.patches == round(self.patches**0.5) ** 2 + 1:
            raise ValueError(
                "its class token has a position of its own; accepted are transformers whose positions are the patches'"
            )

    def forward(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W), normalised, to (B, patches, width)."""
        x = self.patch_embed(picture) + self.pos_embed
        x = torch.cat([*(getattr(self, n).expand(len(x), -1, -1) for n in self.prefix), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.first :]


class Eyes(nn.Module):
    """Pictures to features: every transformer reads the same pixels, normalised its own way.

    Args:
        weights: those of each transformer. means, stds: three numbers for each.
    """

    def __init__(
        self, weights: Sequence[Mapping[str, Tensor]], means: Sequence[Sequence[float]], stds: Sequence[Sequence[float]]
    ) -> None:
        super().__init__()
        if not len(weights) == len(means) == len(stds):
            raise ValueError(
                f"{len(weights)} vision transformers, {len(means)} means and {len(stds)} deviations of their pictures"
            )
        self.transformers = nn.ModuleList(VisionTransformer(w) for w in weights)
        self.register_buffer("_mean", torch.tensor(means)[:, :, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(stds)[:, :, None, None], persistent=False)
        self.width = sum(t.width for t in self.transformers)

    _mean: Tensor
    _std: Tensor

    def forward(self, picture: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, patches, width)."""
        x = picture.permute(0, 3, 1, 2).to(self._mean.dtype) / 255.0
        seen = [t((x - m) / s) for t, m, s in zip(self.transformers, self._mean, self._std, strict=True)]
        return torch.cat(seen, dim=-1)


class Projector(nn.Module):
    """Features to the language model's width: two layers, or three where two transformers are fused."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in ("fc1", "fc2", "fc3"):
            if f"{name}.weight" in weights:
                out, into = weights[f"{name}.weight"].shape
                self.add_module(name, nn.Linear(into, out))
        self.load_state_dict(dict(weights))

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.children())
        for layer in layers[:-1]:
            x = F.gelu(layer(x))
        return layers[-1](x)
