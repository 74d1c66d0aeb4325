"""From configuration to objects."""

from __future__ import annotations

import torch

from robot_rl import seeding
from robot_rl.heads.base import Head
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.residual import ResidualHead
from robot_rl.policies.base import BasePolicy
from robot_rl.training.config import HeadConfig


def build_head(base: BasePolicy, config: HeadConfig, seed: int) -> Head:
    """A fresh head; the same seed gives the same parameters."""
    generator = torch.Generator().manual_seed(seeding.key("head", seed))
    if config.kind == "latent_noise":
        return LatentNoiseHead(base, config.latent_noise, generator=generator)
    return ResidualHead(base, config.residual, generator=generator)


def pick_device(name: str) -> str:
    """``auto`` is CUDA where there is one. Raises ValueError for a device that torch does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: torch sees no CUDA device here; accepted are cpu, auto")
    if not name.startswith(("cpu", "cuda")):
        raise ValueError(f"device={name!r}: accepted are auto, cpu, cuda, cuda:<n>")
    return name
