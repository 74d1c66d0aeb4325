"""What clients of other people's policy servers share.

Such a server tells neither shapes nor limits, draws its noise itself and hands out no features. So the user says what it reads and
makes, and it is a base for residual and edit heads: a chunk is asked for once an observation and travels in the conditioning behind
the vectors that heads read.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from robot_rl.policies.base import PolicySpec
from robot_rl.policies.checkpoint_options import CheckpointOptions
from robot_rl.policies.remote.errors import PolicyUnavailable
from robot_rl.policies.remote.words import check_seconds
from robot_rl.types import ActionSpec, FeatureSpec


@dataclass(frozen=True, kw_only=True)
class ServedOptions(CheckpointOptions):
    """What no such protocol tells.

    Attributes:
        observation: the server's key to the recorded feature.
        features: recorded feature to its shape; (H, W, 3) are pictures.
        action: low, high, names, kind, mode of the executed action.
        horizon, n_action_steps: rows of a chunk, and how many run before it is asked again.
        timeout_s, connect_s: longest waits for an answer, and for a connection.
    """

    observation: Mapping[str, str]
    features: Mapping[str, Any]
    action: Mapping[str, Any]
    horizon: int
    n_action_steps: int
    timeout_s: float = 5.0
    connect_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("observation", "features", "action"):
            if not isinstance(getattr(self, name), Mapping) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted is a mapping that is not empty")
        for name in ("horizon", "n_action_steps"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are whole numbers")
        if not 1 <= self.n_action_steps <= self.horizon:
            raise ValueError(f"n_action_steps={self.n_action_steps}: accepted are 1 to horizon ({self.horizon})")
        unknown = [n for n in self.observation.values() if n not in self.features]
        if unknown:
            raise ValueError(f"observation: {unknown} are not in features, which are {sorted(self.features)}")
        for name, shape in self.features.items():
            sizes = shape if isinstance(shape, (list, tuple)) else ()
            if len(sizes) not in (1, 3) or not all(type(n) is int and n > 0 for n in sizes):
                raise ValueError(
                    f"features.{name}={shape!r}: accepted are [numbers] and, for a picture, [height, width, channels]"
                )
        check_seconds(timeout_s=self.timeout_s, connect_s=self.connect_s)


Options = TypeVar("Options", bound=ServedOptions)


def read_served(kind: type[Options], server: str, given: Mapping[str, Any]) -> Options:
    """The data class ``kind`` of what the user gave. Raises ValueError for what is missing or unknown."""
    known = [f.name for f in fields(kind)]
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    for name in given:
        if name not in known:
            raise ValueError(f"base.options: unknown option {name!r} for {server}; accepted are {', '.join(known)}")
    if missing := [n for n in needed if n not in given]:
        raise ValueError(
            f"base.options: {server}'s server does not tell {', '.join(missing)}; accepted are options with {', '.join(needed)}"
        )
    return kind(**given)


class ServedChunks:
    """A base whose chunks someone else's server makes, one observation at a time.

    A subclass asks (:meth:`_ask`) and calls :meth:`_describe` once it knows what identifies the policy that is served.
    """

    server: ClassVar[str]
    options: ServedOptions
    spec: PolicySpec

    def __init__(self, options: ServedOptions, where: str, device: str) -> None:
        self.options, self.device, self._where = options, device, where
        self._lock = threading.Lock()
        action = options.action_spec()
        assert action is not None  # a needed option
        self._action: ActionSpec = action
        low, high = torch.tensor(self._action.low), torch.tensor(self._action.high)
        self._offset, self._scale = (low + high) / 2, (high - low) / 2
        self._features = {n: FeatureSpec(tuple(s), "uint8" if len(s) == 3 else "float32") for n, s in options.features.items()}
        self._vectors = [n for n, f in self._features.items() if f.dtype != "uint8"]
        self._width = sum(self._features[n].shape[0] for n in self._vectors)

    def _describe(self, identity: list[Any], noise: tuple[int, int] | None = None) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        chunk = 0 if noise else self.options.horizon * self._action.dim
        self.spec = PolicySpec(
            observation_features=self._features, action=self._action, horizon=self.options.horizon,
            n_action_steps=self.options.n_action_steps, n_obs_steps=1, noise_shape=noise, conditioning_dim=self._width + chunk,
            sampler=self.server.lower(), num_steps=1, stats_hash=digest[:12], base_hash=digest[:16],
        )  # fmt: skip
        self.notes = (
            f"served by {self.server} at {self._where}; its weights are not known here, only what it says of itself",
            "heads read the vector features; pictures are for the policy alone",
        )

    # ---- the contract

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Vectors (B, n_obs, dim) and pictures (B, n_obs, H, W, 3) uint8, of which the newest count; returns (B, C)."""
        now, vectors = self._now(observation)
        return torch.cat([vectors, self._chunks(now, [None] * len(vectors)).flatten(1)], dim=-1).to(self.device)

    def sample(self, conditioning: Tensor, noise: Tensor | None, *, grad: bool = False) -> Tensor:
        """(B, C) to the chunk (B, H, A) in [-1, 1] that it holds."""
        if grad:
            raise NotImplementedError("no gradient comes over a network: use an algorithm that only calls the sampler")
        return conditioning[:, self._width :].unflatten(1, (self.spec.horizon, self._action.dim))

    def normalize_action(self, action: Tensor) -> Tensor:
        return (action - self._offset.to(action.device)) / self._scale.to(action.device)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        return self._offset.to(action.device) + self._scale.to(action.device) * action

    # ---- the server

    def _ask(self, observation: Mapping[str, Tensor], noise: np.ndarray | None) -> np.ndarray:
        """Physical actions for one observation (features without batch and time)."""
        raise NotImplementedError

    def _now(self, observation: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The newest frame of every feature, and the vectors that heads read, (B, width)."""
        missing = [n for n in self._features if n not in observation]
        if missing:
            raise KeyError(f"observation lacks {missing}; it has {sorted(observation)}")
        now = {n: observation[n][:, -1].cpu() for n in self._features}
        vectors = [now[n].float() for n in self._vectors]
        return now, torch.cat(vectors, dim=-1) if vectors else torch.zeros(len(next(iter(now.values()))), 0)

    def _chunks(self, observation: Mapping[str, Tensor], noise: list[np.ndarray | None]) -> Tensor:
        """(B, H, A) in the unit cube."""
        h, a, out = self.spec.horizon, self._action.dim, []
        for i, w in enumerate(noise):
            actions = self._ask({n: v[i] for n, v in observation.items()}, w)
            if actions.ndim != 2 or actions.shape[0] < h or actions.shape[1] < a or not np.isfinite(actions[:h, :a]).all():
                raise self._unavailable(f"actions of shape {actions.shape}; needed are finite ({h}, {a})")
            out.append(torch.from_numpy(actions[:h, :a].copy()))
        return self.normalize_action(torch.stack(out)).clamp(-1.0, 1.0)

    def _unavailable(self, why: object) -> PolicyUnavailable:
        return PolicyUnavailable(f"{self.server} server {self._where}: {why}")
