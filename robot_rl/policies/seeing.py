"""Eyes of their own for heads: what a frozen encoder makes of the pictures, behind the base's own conditioning.

Heads and critics read what :meth:`BasePolicy.encode` gives. A base that sees nothing (a policy of joint angles), that hands out no
features (ACT, a policy server), or whose features say little about the task is put behind a pretrained image encoder here: DINO,
SigLIP, CLIP or a ResNet from this machine's disk, SqueezeNet, or the small one that needs no weights. The base itself goes on reading
its own part, so its chunks stay what they were, bit for bit; everything that stores, ships or hosts a base finds the encoder in the
base's options (``base.options.vision``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from robot_rl.config import ConfigError, decode
from robot_rl.policies.base import BasePolicy, PolicySpec, differentiable
from robot_rl.policies.inpainting import Denoiser, Denoising
from robot_rl.policies.loading import VISION
from robot_rl.types import OBSERVATION_IMAGES, FeatureSpec
from robot_rl.vision.encoders import EncoderConfig, build_encoder, pooled


@dataclass(frozen=True)
class SeeingConfig:
    """``base.options.vision``.

    Attributes:
        encoder: which one, and the square it sees.
        cameras: ``observation.images.<camera>`` to the (height, width, 3) of its recorded pictures.
        grid: cells a side that feature maps are averaged over; 1 tells what is there, more also tells where.
    """

    cameras: dict[str, list[int]]
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    grid: int = 2

    def __post_init__(self) -> None:
        if not self.cameras:
            raise ValueError(f"cameras is empty: accepted are names like {OBSERVATION_IMAGES}front with [height, width, 3]")
        for name, shape in self.cameras.items():
            if not name.startswith(OBSERVATION_IMAGES) or len(shape) != 3 or min(shape) < 1 or shape[2] != 3:
                raise ValueError(
                    f"cameras={{{name!r}: {shape}}}: accepted are names like {OBSERVATION_IMAGES}front with [height, width, 3]"
                )
        if not 1 <= self.grid <= 16:
            raise ValueError(f"grid={self.grid}: accepted are 1 to 16")


def read_vision(given: Mapping[str, Any]) -> SeeingConfig:
    """From options.

    Raises:
        ValueError: what is wrong, and what would be accepted.
    """
    try:
        return decode(SeeingConfig, given)
    except ConfigError as error:
        raise ValueError(f"base.options.{VISION}: {error}") from error


class SeeingPolicy:
    """A base policy whose conditioning ends in an encoder's features of the newest pictures.

    Features of a camera have zero mean and unit deviation, because encoders differ a hundredfold in scale.

    Raises:
        ValueError: the base reads a camera in another size.
    """

    def __init__(self, base: BasePolicy, config: SeeingConfig, device: str | torch.device = "cpu") -> None:
        self.base, self.config = base, config
        self.encoder = build_encoder(config.encoder).to(device)
        self._own = base.spec.conditioning_dim
        self._width = self.encoder.channels * config.grid**2
        features = dict(base.spec.observation_features)
        for name, shape in config.cameras.items():
            seen = features.setdefault(name, FeatureSpec(tuple(shape), "uint8"))
            if tuple(seen.shape) != tuple(shape):
                raise ValueError(f"base.options.{VISION}.cameras: {name} is {shape}; the base reads {list(seen.shape)}")
        look = {**asdict(config), "encoder": self.encoder.model_id}
        identity = hashlib.sha256(f"{base.spec.base_hash} {json.dumps(look, sort_keys=True)}".encode()).hexdigest()[:16]
        self.spec: PolicySpec = replace(
            base.spec,
            observation_features=features,
            conditioning_dim=self._own + self._width * len(config.cameras),
            base_hash=identity,
        )

    @property
    def differentiable(self) -> bool:
        return differentiable(self.base)

    @property
    def notes(self) -> tuple[str, ...]:
        mine = f"heads also read {self._width} numbers a camera of {self.encoder.model_id}: {', '.join(self.config.cameras)}"
        return (*getattr(self.base, "notes", ()), mine)

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Raises KeyError naming what is missing."""
        missing = [n for n in self.spec.observation_features if n not in observation]
        if missing:
            raise KeyError(f"observation lacks {missing}; it has {sorted(observation)}")
        own = self.base.encode({n: observation[n] for n in self.base.spec.observation_features})
        seen = [pooled(self.encoder.maps(observation[n][:, -1]), self.config.grid) for n in self.config.cameras]
        return torch.cat([own, *(functional.layer_norm(s, s.shape[1:]).to(own) for s in seen)], dim=-1)

    def _read(self, conditioning: Tensor) -> Tensor:
        return conditioning[..., : self._own].contiguous()

    def sample(self, conditioning: Tensor, noise: Tensor, **options: Any) -> Tensor:
        return self.base.sample(self._read(conditioning), noise, **options)

    def normalize_action(self, action: Tensor) -> Tensor:
        return self.base.normalize_action(action)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        return self.base.unnormalize_action(action)


class SeeingDenoiser(SeeingPolicy):
    """Of a base that hands out its sampler."""

    def denoising(self, conditioning: Tensor) -> Denoising:
        assert isinstance(self.base, Denoiser)
        return self.base.denoising(self._read(conditioning))


def seeing(base: BasePolicy, config: SeeingConfig, device: str | torch.device = "cpu") -> SeeingPolicy:
    return (SeeingDenoiser if isinstance(base, Denoiser) else SeeingPolicy)(base, config, device)


def blind(base: BasePolicy) -> BasePolicy:
    """The policy behind an encoder; the policy itself where there is none."""
    return base.base if isinstance(base, SeeingPolicy) else base
