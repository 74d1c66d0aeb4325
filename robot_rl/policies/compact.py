"""What the compact diffusion and flow policies share: observation encoding, normalisation, chunks, identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robot_rl.policies.base import PolicySpec
from robot_rl.policies.config import CompactPolicyConfig
from robot_rl.policies.encoders import image_encoder
from robot_rl.policies.inpainting import Denoising
from robot_rl.policies.networks import Denoiser
from robot_rl.policies.normalizer import Normalizer
from robot_rl.types import ActionSpec, FeatureSpec


def _told(config: CompactPolicyConfig) -> dict[str, Any]:
    """What a policy's description says of its configuration: where pretrained weights once lay is not part of it, nor are keys that
    policies did not have before and that leave them as they were."""
    found = asdict(config)
    later = {"image_weights"}
    if config.image_encoder == "small":
        later |= {"image_encoder", "image_pool"}
    if config.rotations == "quaternion":
        later |= {"rotations"}
    return {k: v for k, v in found.items() if k not in later}


class CompactPolicy(nn.Module):
    """Base class; a subclass says how a chunk is denoised (:meth:`sample`) and trained (:meth:`denoising_loss`)."""

    SAMPLER: ClassVar[str]
    differentiable: ClassVar[bool] = True

    def __init__(
        self, config: CompactPolicyConfig, features: Mapping[str, FeatureSpec], action: ActionSpec, normalizer: Normalizer
    ) -> None:
        super().__init__()
        self.config, self.features, self.action = config, dict(features), action
        self.normalizer = normalizer
        self.encoders = nn.ModuleDict(
            {n.replace(".", "__"): image_encoder(config, features[n].shape) for n in normalizer.image_features}
        )
        vector = sum(normalizer.width(n) for n in normalizer.vector_features)
        self.conditioning_dim = config.n_obs_steps * (vector + config.image_dim * len(self.encoders))
        self.denoiser = Denoiser(config.horizon * action.dim, self.conditioning_dim, config.width, config.depth)
        self._spec: PolicySpec | None = None

    @property
    def spec(self) -> PolicySpec:
        """The identity hash covers weights, so it is computed when first asked for after :meth:`freeze`."""
        if self._spec is None:
            if self.training:
                raise RuntimeError("a policy in training has no identity yet: call freeze() first")
            self._spec = PolicySpec(
                observation_features=self.features,
                action=self.action,
                horizon=self.config.horizon,
                n_action_steps=self.config.n_action_steps,
                n_obs_steps=self.config.n_obs_steps,
                noise_shape=(self.config.horizon, self.action.dim),
                conditioning_dim=self.conditioning_dim,
                sampler=self.SAMPLER,
                num_steps=self.config.num_steps,
                stats_hash=self.normalizer.stats_hash(),
                base_hash=self._identity(),
            )
        return self._spec

    def _identity(self) -> str:
        digest = hashlib.sha256(repr(sorted(self.describe().items())).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """JSON-able construction arguments; with the weights they are the whole policy."""
        return {
            "config": _told(self.config),
            "features": {n: f.to_json() for n, f in self.features.items()},
            "action": self.action.to_json(),
        }

    def freeze(self) -> CompactPolicy:
        """Eval mode, no gradients: from here on it is a base policy."""
        self.eval().requires_grad_(False)
        self._spec = None
        return self

    def with_denoiser(self, denoiser: nn.Module) -> CompactPolicy:
        """This policy with another denoiser, everything else shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.__dict__["_modules"] = {**self._modules, "denoiser": denoiser}
        return other

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Each vector feature (B, n_obs, dim), each image (B, n_obs, H, W, 3) uint8; returns (B, C).

        Raises:
            KeyError: a feature is missing.
        """
        missing = [n for n in self.features if n not in observation]
        if missing:
            raise KeyError(f"observation lacks {missing}; it has {sorted(observation)}")
        parts = [self.normalizer.observation(n, observation[n].float()) for n in self.normalizer.vector_features]
        for name in self.normalizer.image_features:
            image = observation[name]
            encoded = self.encoders[name.replace(".", "__")](image.flatten(0, 1))
            parts.append(encoded.unflatten(0, image.shape[:2]))
        return torch.cat(parts, dim=-1).flatten(1)

    def normalize_action(self, action: Tensor) -> Tensor:
        return self.normalizer.action(action)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        return self.normalizer.unaction(action)

    def sample(self, conditioning: Tensor, noise: Tensor, *, grad: bool = False) -> Tensor:
        """(B, C), (B, H, A) -> (B, H, A) in [-1, 1]; ``grad=True`` keeps the graph from noise to chunk."""
        with torch.set_grad_enabled(grad):
            return self._denoise(conditioning, noise.flatten(1)).unflatten(1, noise.shape[1:])

    def _denoise(self, conditioning: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def chain_inputs(self, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """What every :meth:`chain_step` needs: the conditioning's embedding (B, width), and the times' (num_steps, width)."""
        raise NotImplementedError

    def chain_step(self, i: int, x: Tensor, condition: Tensor, times: Tensor) -> Tensor:
        """Sampling step ``i`` (0 is the noisiest) from x (B, H*A) to the next; all of them, then a clamp, are :meth:`sample`."""
        raise NotImplementedError

    def clean_estimate(self, i: int, x: Tensor, condition: Tensor, times: Tensor) -> Tensor:
        """The clean chunk (B, H*A), not clamped, that the network sees in the state x before sampling step ``i``."""
        raise NotImplementedError

    def noised(self, i: int, chunk: Tensor, noise: Tensor) -> Tensor:
        """The chain's state before step ``i`` for a clean chunk, both (B, H*A); after the last step it is the chunk itself."""
        raise NotImplementedError

    def chain_advance(self, i: int, x: Tensor, clean: Tensor) -> Tensor:
        """Sampling step ``i`` where ``clean`` (B, H*A) is the estimate of the finished chunk; with the network's own, :meth:`chain_step`."""
        raise NotImplementedError

    def level(self, i: int) -> tuple[float, float]:
        """(a, s) of the state before step ``i``: a chunk + s noise."""
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        return float(self.noised(i, one, zero)), float(self.noised(i, zero, one))

    def denoising(self, conditioning: Tensor) -> Denoising:
        """The sampler taken apart, for in-painting."""
        condition, times = self.chain_inputs(conditioning)
        shape = (self.config.horizon, self.action.dim)
        return Denoising(
            levels=[self.level(i) for i in range(self.config.num_steps)],
            clean=lambda i, x: self.clean_estimate(i, x.flatten(1), condition, times).unflatten(1, shape),
            advance=lambda i, x, clean: self.chain_advance(i, x.flatten(1), clean.flatten(1)).unflatten(1, shape),
            finish=lambda x: x.clamp(-1.0, 1.0),
            own=lambda chunk: chunk,
        )  # fmt: skip

    def score(self, chunk: Tensor, conditioning: Tensor, level: float) -> Tensor:
        """Gradient of log p(chunk | s) as the policy's own denoiser sees it at the noise ``level`` in (0, 1], both (B, H*A)."""
        raise NotImplementedError

    def vector_observation(self, conditioning: Tensor) -> dict[str, Tensor]:
        """(B, C) back to the newest frame's vector features in physical units (clipped at 5 standard deviations); no images."""
        frames = conditioning.unflatten(1, (self.config.n_obs_steps, -1))[:, -1]
        out, at = {}, 0
        for name in self.normalizer.vector_features:
            width = self.normalizer.width(name)
            out[name] = self.normalizer.unobservation(name, frames[:, at : at + width])
            at += width
        return out

    def denoising_loss(self, conditioning: Tensor, chunk: Tensor, generator: torch.Generator) -> Tensor:
        """Per-element loss (B, H, A) of the behaviour-cloning objective on normalised chunks."""
        raise NotImplementedError
