"""Image encoders of compact policies: one that is trained with them, and pretrained ones that stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robot_rl.policies.config import CompactPolicyConfig
from robot_rl.policies.networks import ImageEncoder

CHANNELS = {"squeezenet": 512, "resnet18": 512}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what torchvision's classification weights were trained with


def image_encoder(config: CompactPolicyConfig, shape: tuple[int, ...]) -> nn.Module:
    """(B, H, W, 3) uint8 to (B, ``image_dim``).

    Raises:
        ValueError: pretrained weights that are missing or do not fit. FileNotFoundError: no such file.
    """
    if config.image_encoder == "small":
        return ImageEncoder(config.image_dim)
    return FrozenEncoder(config, shape)


class FrozenEncoder(nn.Module):
    """A pretrained backbone's feature map, read by keypoints or by spatial learned embeddings (Luo et al. 2024, SERL).

    Only what reads the map is trained. The backbone's weights are part of the policy's own checkpoint, so a robot needs no other file.
    """

    def __init__(self, config: CompactPolicyConfig, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = _backbone(config.image_encoder).requires_grad_(False).eval()
        if config.image_weights:
            _load(self.backbone, config.image_encoder, Path(config.image_weights))
        with torch.no_grad():
            channels, height, width = self.backbone(torch.zeros(1, 3, *shape[:2])).shape[1:]
        if min(height, width) < 2:
            raise ValueError(
                f"{config.image_encoder} makes {height}x{width} features of {shape[0]}x{shape[1]} pictures: too small to read"
            )
        self.register_buffer("_mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(_STD)[:, None, None], persistent=False)
        self.pool: nn.Module = (
            _Keypoints(channels) if config.image_pool == "keypoints" else _Embeddings(channels, height, width)
        )
        self.output = nn.Sequential(nn.Linear(self.pool.width, config.image_dim), nn.LayerNorm(config.image_dim), nn.Tanh())

    def train(self, mode: bool = True) -> FrozenEncoder:
        super().train(mode)
        self.backbone.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> FrozenEncoder:
        super().requires_grad_(requires_grad)
        self.backbone.requires_grad_(False)
        return self

    def forward(self, image: Tensor) -> Tensor:
        x = (image.permute(0, 3, 1, 2).float() / 255.0 - self._mean) / self._std
        with torch.no_grad():
            features = self.backbone(x)
        return self.output(self.pool(features))


class _Keypoints(nn.Module):
    """Where on the map each of ``keypoints`` mixtures of features is, (B, 2 * keypoints) in [-1, 1]."""

    def __init__(self, channels: int, keypoints: int = 32) -> None:
        super().__init__()
        self.width = 2 * keypoints
        self.mix = nn.Conv2d(channels, keypoints, 1)

    def forward(self, features: Tensor) -> Tensor:
        mixed = self.mix(features)
        h, w = mixed.shape[-2:]
        attention = mixed.flatten(2).softmax(-1).unflatten(2, (h, w))
        ys, xs = (torch.linspace(-1.0, 1.0, n, device=mixed.device, dtype=mixed.dtype) for n in (h, w))
        return torch.cat([(attention.sum(3) * ys).sum(-1), (attention.sum(2) * xs).sum(-1)], dim=-1)


class _Embeddings(nn.Module):
    """Sum over the map of every feature, weighted by ``count`` learned patterns each: (B, channels * count)."""

    def __init__(self, channels: int, height: int, width: int, count: int = 8) -> None:
        super().__init__()
        self.width = channels * count
        self.patterns = nn.Parameter(torch.randn(channels, height, width, count) * (height * width) ** -0.5)

    def forward(self, features: Tensor) -> Tensor:
        return torch.einsum("bchw,chwk->bck", features, self.patterns).flatten(1)


def _backbone(kind: str) -> nn.Module:
    try:
        from torchvision import models
    except ImportError:
        raise ImportError(f"image_encoder={kind!r} needs torchvision: pip install torchvision") from None
    if kind == "squeezenet":
        return models.squeezenet1_0(weights=None).features
    whole = models.resnet18(weights=None)
    return nn.Sequential(*list(whole.children())[:-2])


def _load(backbone: nn.Module, kind: str, path: Path) -> None:
    """Take what the backbone needs out of a file with torchvision's names; fp16 files are cast."""
    from safetensors.torch import load_file

    from robot_rl.paths import find_recording

    found = load_file(path if path.is_file() else find_recording(path))
    if kind == "squeezenet":
        mine = {k.removeprefix("features."): v for k, v in found.items() if k.startswith("features.")}
    else:
        order = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        mine = {f"{order.index(k.split('.')[0])}.{k.split('.', 1)[1]}": v for k, v in found.items() if k.split(".")[0] in order}
    wanted: dict[str, Any] = backbone.state_dict()
    wrong = [k for k in wanted if not k.endswith("num_batches_tracked") and (k not in mine or mine[k].shape != wanted[k].shape)]
    if wrong:
        raise ValueError(
            f"image_weights={str(path)!r}: {len(wrong)} tensors of a {kind} are missing or of another shape, e.g. {wrong[0]}"
        )
    backbone.load_state_dict({k: mine[k].to(wanted[k].dtype) if k in mine else v for k, v in wanted.items()})
