"""Frozen image encoders, chosen by configuration.

An image encoder turns (N, H, W, 3) uint8 RGB into feature maps (N, C, h, w); what reads them decides how they are pooled.
Two need nothing but torch: ``small_conv`` (fixed random filters, no weights to fetch) and ``squeezenet`` (ImageNet weights
from a safetensors file). ``timm``, ``open_clip`` and ``transformers`` load models whose weights are on this machine's disk;
nothing is ever fetched.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Kind = Literal["small_conv", "squeezenet", "timm", "open_clip", "transformers"]
Fit = Literal["crop", "squash"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENCODE_FRAMES = 32


@dataclass(frozen=True)
class EncoderConfig:
    """Which image encoder, and what it sees.

    Attributes:
        kind: ``small_conv`` needs no weights.
        weights: file (``squeezenet``: safetensors) or folder (``transformers``, ``timm`` and ``open_clip``: their checkpoint).
        model: architecture name for ``timm`` and ``open_clip``.
        size: side of the square the encoder sees, in pixels.
        fit: ``crop`` keeps the aspect ratio and cuts the longer side's ends; ``squash`` keeps the whole picture.
        layer: ``squeezenet``: how many modules of ``features`` run (7 keeps the most place, 13 is all of it).
        seed: of the random filters of ``small_conv``.
    """

    kind: Kind = "small_conv"
    weights: str = ""
    model: str = ""
    size: int = 128
    fit: Fit = "squash"
    layer: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"encoder.kind={self.kind!r}: accepted are {', '.join(get_args(Kind))}")
        if self.fit not in get_args(Fit):
            raise ValueError(f"encoder.fit={self.fit!r}: accepted are {', '.join(get_args(Fit))}")
        if not 32 <= self.size <= 1024:
            raise ValueError(f"encoder.size={self.size}: accepted are 32 to 1024 pixels")
        if not 3 <= self.layer <= 13:
            raise ValueError(f"encoder.layer={self.layer}: accepted are 3 to 13")
        if self.kind != "small_conv":
            if not self.weights:
                raise ValueError(f"encoder.weights is empty: {self.kind} needs weights on disk (small_conv needs none)")
            if not Path(self.weights).expanduser().exists():
                raise ValueError(f"encoder.weights={self.weights!r}: no such file or folder")


class ImageEncoder(Protocol):
    """Frozen; ``model_id`` names weights and preprocessing, so that two different encoders never share a label."""

    model_id: str
    channels: int

    def maps(self, images: np.ndarray | Tensor) -> Tensor:
        """(N, H, W, 3) uint8 to (N, C, h, w) float32, without gradient, on the encoder's device."""


def build_encoder(config: EncoderConfig) -> TorchEncoder:
    """The encoder a configuration names. Raises ValueError or ImportError saying what is missing."""
    if config.kind == "small_conv":
        return TorchEncoder(config, SmallConv(config.seed), f"small_conv.{config.seed}")
    if config.kind == "squeezenet":
        return TorchEncoder(config, *_squeezenet(config))
    return TorchEncoder(config, *_pretrained(config))


class TorchEncoder:
    """A torch network behind :class:`ImageEncoder`."""

    def __init__(self, config: EncoderConfig, network: nn.Module, weights_id: str, statistics: Any = None) -> None:
        self.config = config
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        mean, std = statistics or (IMAGENET_MEAN, IMAGENET_STD)
        self._mean = torch.tensor(mean).view(1, 3, 1, 1) * 255.0
        self._scale = 1.0 / (torch.tensor(std).view(1, 3, 1, 1) * 255.0)
        self.model_id = f"{weights_id}/{config.size}{config.fit[0]}" + (
            f"/{config.layer}" if config.kind == "squeezenet" else ""
        )
        with torch.no_grad():
            self.channels = int(self.network(torch.zeros(1, 3, config.size, config.size)).shape[1])

    def to(self, device: str | torch.device) -> TorchEncoder:
        """The same encoder there; weights move, nothing is copied."""
        self.network.to(device)
        self._mean, self._scale = self._mean.to(device), self._scale.to(device)
        return self

    @torch.no_grad()  # inference tensors could not be trained on
    def maps(self, images: np.ndarray | Tensor) -> Tensor:
        parts = [self._some(images[i : i + ENCODE_FRAMES]) for i in range(0, len(images), ENCODE_FRAMES)]
        return torch.cat(parts) if parts else torch.zeros(0, self.channels, 1, 1, device=self._mean.device)

    def _some(self, images: np.ndarray | Tensor) -> Tensor:
        pixels = fitted(images, self.config.size, self.config.fit).to(self._mean.device)
        pixels = ((pixels - self._mean) * self._scale).contiguous(memory_format=torch.channels_last)
        return self.network(pixels).float()


def fitted(images: np.ndarray | Tensor, size: int, fit: Fit) -> Tensor:
    """(N, 3, size, size) float32 in 0..255: resized with antialiasing, cropped to a square first for ``crop``.

    Raises:
        ValueError: not (N, H, W, 3) uint8.
    """
    if not isinstance(images, Tensor):
        images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype not in (np.uint8, torch.uint8):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: accepted are uint8 (N, H, W, 3) RGB")
    if fit == "crop":
        height, width = images.shape[1:3]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        images = images[:, top : top + side, left : left + side]
    pixels = (images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))).permute(0, 3, 1, 2)
    height, width = pixels.shape[2:]
    if (height, width) == (size, size):
        return pixels.float()
    if height % size == 0 and width % size == 0:  # whole factors: an average of blocks is the same picture for less
        return functional.avg_pool2d(pixels.float(), (height // size, width // size))
    return functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True).float()


def pooled(maps: Tensor, grid: int) -> Tensor:
    """(N, C, h, w) to (N, C * grid * grid): means over a grid of cells; ``grid`` 1 is the mean over the picture."""
    return functional.adaptive_avg_pool2d(maps, grid).flatten(1)


class SmallConv(nn.Module):
    """Four strided convolutions with fixed random filters: colour, edges and place, without any weights to fetch.

    Random features of this kind keep distances between pictures well enough for a trained head on top; they know no objects.
    """

    def __init__(self, seed: int = 0, channels: tuple[int, ...] = (16, 32, 48, 64)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        before = 3
        for after in channels:
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
            bound = (2.0 / (before * 9)) ** 0.5
            conv.weight.data = torch.randn(conv.weight.shape, generator=generator) * bound
            conv.bias.data = torch.randn(conv.bias.shape, generator=generator) * 0.1
            layers += [conv, nn.ReLU(inplace=True)]
            before = after
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Fire(nn.Module):
    """Squeeze and expand (SqueezeNet, arXiv 1602.07360)."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu_()
        return torch.cat([self.expand1x1(x).relu_(), self.expand3x3(x).relu_()], 1)


def squeezenet_features() -> nn.Sequential:
    """The convolutional part of SqueezeNet 1.0, with torchvision's parameter names."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return nn.Sequential(
        nn.Conv2d(3, 96, 7, 2), nn.ReLU(inplace=True), pool(), Fire(96, 16, 64), Fire(128, 16, 64), Fire(128, 32, 128), pool(),
        Fire(256, 32, 128), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), pool(), Fire(512, 64, 256),
    )  # fmt: skip


def _squeezenet(config: EncoderConfig) -> tuple[nn.Module, str]:
    from safetensors.torch import load_file

    path = Path(config.weights).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    prefix = "features."
    stored = {k.removeprefix(prefix): v.float() for k, v in load_file(path).items() if k.startswith(prefix)}
    network = squeezenet_features()
    try:
        network.load_state_dict(stored)
    except RuntimeError as error:
        raise ValueError(
            f"encoder.weights={config.weights!r}: these are no weights of torchvision's squeezenet1_0: {error}"
        ) from error
    return network[: config.layer], f"squeezenet1_0@{file_hash(path)}"


def need(package: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"encoder.kind={kind!r} needs the package {package}: python -m pip install {package}") from error


class _Maps(nn.Module):
    """Feature maps of another library's model, which is a part of this one: what is done to it (eval, device) is done to the model.

    Args:
        read: model and pixels to maps (N, C, h, w), or with ``grid`` to a vision transformer's tokens (N, T, C), of which the last
            ``grid * grid`` are the patches.
    """

    def __init__(self, model: nn.Module, read: Callable[[Any, Tensor], Tensor], grid: int = 0) -> None:
        super().__init__()
        self.model, self.read, self.grid = model, read, grid

    def forward(self, x: Tensor) -> Tensor:
        found = self.read(self.model, x)
        if not self.grid:
            return found
        patches = found[:, found.shape[1] - self.grid * self.grid :]
        return patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def _pretrained(config: EncoderConfig) -> tuple[nn.Module, str, Any]:
    """Models of other libraries, from their files on this disk."""
    path = Path(config.weights).expanduser()
    digest = file_hash(path)
    if config.kind == "transformers":
        transformers = need("transformers", config.kind)
        model = transformers.AutoModel.from_pretrained(str(path), local_files_only=True)
        vision = getattr(model, "vision_model", model)
        processor = transformers.AutoImageProcessor.from_pretrained(str(path), local_files_only=True)
        patch = int(getattr(vision.config, "patch_size", 0))
        maps = _Maps(vision, lambda m, x: m(pixel_values=x).last_hidden_state, config.size // patch if patch else 0)
        return maps, f"{path.name}@{digest}", (tuple(processor.image_mean), tuple(processor.image_std))
    if not config.model:
        raise ValueError(f"encoder.model is empty: {config.kind} needs the architecture's name")
    if config.kind == "timm":
        timm = need("timm", config.kind)
        sized = {"img_size": config.size} if "vit" in config.model else {}
        model = timm.create_model(config.model, pretrained=False, checkpoint_path=str(path), **sized)
        grid = config.size // model.patch_embed.patch_size[0] if hasattr(model, "patch_embed") else 0
        data = model.pretrained_cfg
        return (
            _Maps(model, lambda m, x: m.forward_features(x), grid),
            f"{config.model}@{digest}",
            (data["mean"], data["std"]),
        )
    open_clip = need("open_clip", config.kind)
    visual = open_clip.create_model(config.model, pretrained=str(path), force_image_size=config.size).visual
    maps = _Maps(visual, lambda m, x: m(x)[:, :, None, None])
    return maps, f"{config.model}@{digest}", (visual.image_mean, visual.image_std)


def file_hash(path: Path) -> str:
    """sha256[:12] of a file, or of a folder's weight files in order of name."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin", ".pt"))
    if not files:
        raise ValueError(f"{path}: no weights there")
    for file in files:
        with open(file, "rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()[:12]
