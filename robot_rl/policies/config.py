"""What a compact base policy and its cloning can be told. Reading a configuration costs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class CompactPolicyConfig:
    """Shape of a compact policy.

    Attributes:
        kind: ``diffusion`` (DDIM, eta 0) or ``flow`` (Euler ODE).
        horizon: rows of a predicted chunk; ``n_action_steps`` of them are executed.
        n_obs_steps: stacked observations.
        width, depth: of the denoiser MLP.
        num_steps: sampling steps (DDIM or Euler).
        train_steps: diffusion timesteps in training.
        rotations: what the networks see of a vector's quaternions (four names in a row that end in qx, qy, qz, qw): ``quaternion``,
            as they were recorded; ``matrix``, two columns of the rotation matrix, which do not jump where a recording changes
            a quaternion's sign (robosuite's relative orientations do).
        image_dim: features per camera.
        image_encoder: ``small`` is trained with the policy; ``squeezenet`` and ``resnet18`` (torchvision's) stay as they were
            pretrained, and only what reads their feature map is trained.
        image_weights: safetensors file of a pretrained encoder; read when a policy is cloned, and part of its checkpoint from then on.
        image_pool: what reads the feature map: ``keypoints`` (where each feature is, soft-argmax) or ``embeddings`` (spatial
            learned embeddings, which also keep how strong it is there).
    """

    kind: Literal["diffusion", "flow"] = "diffusion"
    horizon: int = 8
    n_action_steps: int = 8
    n_obs_steps: int = 1
    width: int = 256
    depth: int = 3
    num_steps: int = 5
    train_steps: int = 100
    rotations: Literal["quaternion", "matrix"] = "matrix"
    image_dim: int = 64
    image_encoder: Literal["small", "squeezenet", "resnet18"] = "small"
    image_weights: str = ""
    image_pool: Literal["keypoints", "embeddings"] = "keypoints"

    def __post_init__(self) -> None:
        if self.image_weights and self.image_encoder == "small":
            raise ValueError(
                f"image_weights={self.image_weights!r} with image_encoder='small': accepted are squeezenet, resnet18"
            )
        if self.image_pool != "keypoints" and self.image_encoder == "small":
            raise ValueError(
                f"image_pool={self.image_pool!r} with image_encoder='small', which has its own: accepted is keypoints"
            )
        for name in ("horizon", "n_action_steps", "n_obs_steps", "width", "depth", "num_steps", "train_steps", "image_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are integers >= 1")
        if self.n_action_steps > self.horizon:
            raise ValueError(f"n_action_steps={self.n_action_steps}: accepted are 1 to horizon ({self.horizon})")
        if self.kind == "diffusion" and self.num_steps > self.train_steps:
            raise ValueError(f"num_steps={self.num_steps}: accepted are 1 to train_steps ({self.train_steps})")


@dataclass(frozen=True)
class BCConfig:
    """How a base policy is cloned.

    Attributes:
        steps: gradient steps; ``batch_size`` chunks each.
        learning_rate, weight_decay: AdamW, cosine decay after ``warmup`` steps.
        ema: decay of the averaged weights that become the policy (with the usual warm-up of the decay itself).
        observation_noise: standard deviation added to normalised vector observations, against drift off the data.
        action_quantile: see :meth:`robot_rl.policies.normalizer.Normalizer.fit`.
        random_shift: pictures are moved by up to so many pixels in training (4 is usual for 84x84).
    """

    policy: CompactPolicyConfig = field(default_factory=CompactPolicyConfig)
    steps: int = 5000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 100
    ema: float = 0.995
    observation_noise: float = 0.0
    action_quantile: float = 0.0
    random_shift: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are integers >= 1")
        if self.random_shift < 0:
            raise ValueError(f"random_shift={self.random_shift}: accepted are integers >= 0")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema={self.ema}: accepted are 0 <= ema < 1")


@dataclass(frozen=True)
class AdapterConfig:
    """What of a copied denoiser is trained.

    Attributes:
        kind: ``none``: all of it. ``lora``: low-rank corrections of every linear layer. ``modulation``: scales of the feed-forward
            activations, one entry of a pool a task (L2M).
        rank, alpha: of ``lora``; the correction is scaled by alpha / rank.
        backend: of ``lora``: ``builtin`` needs nothing, ``peft`` builds the same layers with that library (extra ``vla``).
        entries, entry: of ``modulation``: size of the pool, and the entry that this run trains and acts with. None chooses by state
            the entry whose key is nearest; then nothing is trained (``learner.algorithm: fixed``).
        init: of ``modulation``: folder of a finished run whose pool this one goes on with; its other entries never change.
    """

    kind: Literal["none", "lora", "modulation"] = "none"
    rank: int = 8
    alpha: float = 16.0
    backend: Literal["builtin", "peft"] = "builtin"
    entries: int = 8
    entry: int | None = 0
    init: Path | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank={self.rank}, alpha={self.alpha}: accepted are rank >= 1, alpha > 0")
        if self.entries < 1 or (self.entry is not None and not 0 <= self.entry < self.entries):
            raise ValueError(
                f"entry={self.entry} of entries={self.entries}: accepted are null, or 0 to {max(self.entries - 1, 0)}"
            )
        if self.init is not None and self.kind != "modulation":
            raise ValueError(
                f"init={str(self.init)!r} with kind={self.kind!r}: only a modulation's pool is continued; accepted is null"
            )
