"""What happens to a camera's picture before a policy sees it: one crop and one resize, exact to the bit everywhere.

The transform belongs to the policy, so training, evaluation and a robot's node run this very code on the pictures as they were
recorded or received. It is exact by construction rather than by luck: interpolation weights are whole numbers of 1/256 that add up
to one along each axis, so every sum on the way is a whole number below 2^24, which a double holds exactly in whatever order a
matrix product adds. Batch size, thread count and device cannot change a pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

UNIT = 256
"""Interpolation weights are multiples of one over this."""


@dataclass(frozen=True)
class PictureTransform:
    """One camera's way from what it delivers to what the policy reads.

    Attributes:
        size: (height, width) of the camera's pictures.
        crop: (top, left, height, width) that is kept; all of it by default.
        resize: (height, width) afterwards; as cropped by default. Shrinking averages over what falls on a pixel (a triangle
            filter as wide as the reduction), enlarging interpolates linearly.
    """

    size: tuple[int, int]
    crop: tuple[int, int, int, int] | None = None
    resize: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, length in (("size", 2), ("crop", 4), ("resize", 2)):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Sequence) or len(value) != length or not all(isinstance(v, int) for v in value):
                raise ValueError(f"{name}={value!r}: accepted are {length} integers")
            object.__setattr__(self, name, tuple(value))
        height, width = self.size
        top, left, tall, wide = self.crop or (0, 0, height, width)
        if min(height, width, tall, wide, *(self.resize or (1, 1))) < 1 or min(top, left) < 0:
            raise ValueError(
                f"size={self.size}, crop={self.crop}, resize={self.resize}: accepted are sides >= 1, crops from 0 on"
            )
        if top + tall > height or left + wide > width:
            raise ValueError(f"crop={self.crop}: accepted is (top, left, height, width) inside {height}x{width}")
        object.__setattr__(self, "crop", (top, left, tall, wide))
        object.__setattr__(self, "resize", self.resize or (tall, wide))
        object.__setattr__(self, "_weights", {})

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> PictureTransform:
        """Raises ValueError that names the camera."""
        known = ("size", "crop", "resize")
        if not isinstance(data, Mapping) or "size" not in data or any(k not in known for k in data):
            raise ValueError(f"cameras.{name}={data!r}: accepted are size (needed), crop, resize")
        try:
            values: dict[str, Any] = {k: None if v is None else tuple(v) for k, v in data.items()}
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"cameras.{name}: {error}") from None

    @property
    def output(self) -> tuple[int, int]:
        assert self.resize is not None
        return self.resize

    def __call__(self, picture: Tensor) -> Tensor:
        """(..., H, W, C) uint8 to (..., h, w, C) uint8.

        Raises:
            ValueError: the pictures have another size.
        """
        if picture.shape[-3:-1] != self.size or picture.dtype != torch.uint8:
            found = tuple(picture.shape[-3:-1])
            raise ValueError(f"pictures are {picture.dtype} of {found}; this camera's are uint8 of {self.size}")
        assert self.crop is not None
        top, left, tall, wide = self.crop
        cut = picture[..., top : top + tall, left : left + wide, :]
        if self.output == (tall, wide):
            return cut
        rows, columns = (self._matrix(i, picture.device) for i in (0, 1))
        value = cut.movedim(-1, -3).double()  # products of float32 may be told to round to fewer bits (TF32, bfloat16)
        summed = rows @ value @ columns.mT
        half = UNIT * UNIT // 2
        return ((summed + half) / (UNIT * UNIT)).floor().clamp(0, 255).to(torch.uint8).movedim(-3, -1)

    def _matrix(self, axis: int, device: torch.device) -> Tensor:
        cache: dict[tuple[int, str], Tensor] = self._weights  # type: ignore[attr-defined]
        key = (axis, str(device))
        if key not in cache:
            assert self.crop is not None
            cache[key] = torch.from_numpy(interpolation(self.crop[2 + axis], self.output[axis])).to(device, torch.float64)
        return cache[key]


def interpolation(before: int, after: int) -> np.ndarray:
    """(after, before) weights as whole numbers that add up to :data:`UNIT` in every row."""
    scale = before / after
    reach = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale - 0.5
    exact = np.maximum(0.0, 1.0 - np.abs(np.arange(before)[None, :] - np.clip(centre, 0, before - 1)[:, None]) / reach)
    exact *= UNIT / exact.sum(1, keepdims=True)
    whole = np.floor(exact)
    for row, (w, e) in enumerate(
        zip(whole, exact, strict=True)
    ):  # what rounding took goes to the largest remainders, leftmost first
        short = int(UNIT - w.sum())
        whole[row, np.argsort(-(e - w), kind="stable")[:short]] += 1
    return whole


def random_shift(picture: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Each picture of (B, ..., H, W, C) uint8 moved by up to ``pad`` pixels either way, its border repeated (Yarats et al. 2021).

    Frames of one stack move together: the shift says nothing about motion.
    """
    if pad == 0:
        return picture
    b, height, width = len(picture), picture.shape[-3], picture.shape[-2]
    moves = torch.randint(-pad, pad + 1, (2, b), generator=generator, device=generator.device).to(picture.device)
    rows = (torch.arange(height, device=picture.device) + moves[0][:, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=picture.device) + moves[1][:, None]).clamp(0, width - 1)
    flat = picture.reshape(b, -1, height, width, picture.shape[-1])
    index = torch.arange(b, device=picture.device)[:, None, None]
    moved = flat.movedim(1, 3)[index, rows[:, :, None], columns[:, None, :]]
    return moved.movedim(3, 1).reshape(picture.shape)
