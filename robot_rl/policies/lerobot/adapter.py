"""What all LeRobot adapters share: loading, observations through the checkpoint's own pre-processor, actions, identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from robot_rl.policies.base import PolicySpec
from robot_rl.policies.lerobot import versions
from robot_rl.policies.lerobot.actions import ActionSpace, processor_hash
from robot_rl.policies.lerobot.options import LeRobotOptions
from robot_rl.policies.pictures import PictureTransform
from robot_rl.types import FeatureSpec

PICTURE_ROWS = 64
"""Observations with pictures that are encoded at once."""


class LeRobotPolicy:
    """A LeRobot checkpoint as a :class:`robot_rl.policies.base.BasePolicy`: stateless, batched, deterministic in its noise.

    LeRobot's own queues are not used; the frames of an observation stack and the rows of a chunk are the runtime's business.

    Args:
        folder: what ``save_pretrained`` wrote, with its two processor files.
        device: where it runs.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be used; the message says what would be accepted.
    """

    TYPE: ClassVar[str]
    SAMPLER: ClassVar[str]

    def __init__(self, folder: Path, options: LeRobotOptions, device: str = "cpu") -> None:
        self.folder, self.options, self.device = folder, options, str(device)
        self.config = versions.read_config(folder, self.device)
        self._prepare()
        self.policy = versions.build(folder, self.config)
        self.pre, self.post = versions.processors(folder, self.config, self.device)
        dim = int(self.config.action_feature.shape[0])
        given = options.action_spec()
        if given is not None and given.dim != dim:
            raise ValueError(f"action has {given.dim} dimensions; {folder} was trained with {dim}")
        self.actions = ActionSpace(self.pre, self.post, dim, given, self.device)
        self._action = given or self.actions.default_spec()
        self._read = self._read_features()
        self._built()
        self.spec = self._make_spec()

    # ---- what a kind of policy fills in

    def _prepare(self) -> None:
        """Change ``self.config`` before the network is built."""

    def _built(self) -> None:
        """Change ``self.policy`` once it is there."""

    def _shape(self) -> tuple[int, int, tuple[int, int] | None, int, int]:
        """(horizon, n_action_steps, noise_shape, conditioning_dim, num_steps)."""
        raise NotImplementedError

    def _encode(self, batch: dict[str, Any]) -> Tensor:
        """Pre-processed batch, vectors (B, n_obs, dim) and pictures (B, n_obs, 3, H, W), to (B, C)."""
        raise NotImplementedError

    def _sample(self, conditioning: Tensor, noise: Tensor | None, grad: bool) -> Tensor:
        """To a chunk (B, H, A) in the unit cube."""
        raise NotImplementedError

    # ---- the contract

    @torch.no_grad()
    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Each vector feature (B, n_obs, dim), each picture (B, n_obs, H, W, 3) uint8; returns (B, C).

        Raises:
            KeyError: a feature is missing.
        """
        return torch.cat([self._encode_rows(rows) for rows in self._pieces(observation)])

    def _encode_rows(self, observation: Mapping[str, Tensor]) -> Tensor:
        return self._encode(self.preprocess(observation))

    def _pieces(self, observation: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Pictures as floats take four times their room, and a whole episode of them comes at once when it is learned from."""
        missing = [n for n in self._read.recorded if n not in observation]
        if missing:
            raise KeyError(f"observation lacks {missing}; it has {sorted(observation)}")
        read = {n: observation[n] for n in self._read.recorded}
        rows = len(next(iter(read.values())))
        at_once = PICTURE_ROWS if any(f.dtype == "uint8" for f in self._read.recorded.values()) else rows
        for first in range(0, rows, at_once):
            yield {n: v[first : first + at_once] for n, v in read.items()}

    def sample(self, conditioning: Tensor, noise: Tensor | None, *, grad: bool = False) -> Tensor:
        """(B, C) and the noise, (B, H_w, A_w) or None for a policy that takes none, to (B, H, A) in [-1, 1]."""
        if (noise is None) != (self.spec.noise_shape is None):
            wanted = "none" if self.spec.noise_shape is None else f"(B, {self.spec.noise_shape[0]}, {self.spec.noise_shape[1]})"
            raise ValueError(
                f"{self.TYPE}: noise is {'missing' if noise is None else tuple(noise.shape)}; accepted is {wanted}"
            )
        with torch.set_grad_enabled(grad):
            return self._sample(conditioning, noise, grad)

    def normalize_action(self, action: Tensor) -> Tensor:
        return self.actions.normalize(action)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        return self.actions.unnormalize(action)

    # ---- observations

    def preprocess(self, observation: Mapping[str, Tensor]) -> dict[str, Any]:
        """What LeRobot's pre-processor makes of a batch of observation stacks; pictures become (B, n_obs, 3, H, W) in [0, 1] first."""
        batch: dict[str, Any] = {}
        rows = 0
        for name, source in self._read.sources.items():
            value = observation[source.name][..., source.start : source.stop].float()
            batch[name], rows = value, len(value)
        for name in self._read.plain:
            value = observation[name]
            rows = len(value)
            if value.dtype == torch.uint8:
                if name in self._cameras:
                    value = self._cameras[name](value)
                value = (value.float() / 255.0).movedim(-1, -3).contiguous()
            batch[name] = value.float()
        batch["task"] = [self.options.task] * rows
        return self.pre(batch)

    def _read_features(self) -> _Reading:
        renamed: dict[str, str] = {}
        for step in self.pre.steps:
            if versions.step_name(step) == "rename_observations_processor":
                renamed |= {policy: recorded for recorded, policy in step.rename_map.items()}
        sources, plain, recorded = {}, [], dict[str, FeatureSpec]()
        self._cameras = {n: PictureTransform.from_json(n, data) for n, data in self.options.cameras.items()}
        given = self.options.sources()
        for policy_name, feature in self.config.input_features.items():
            name = renamed.get(policy_name, policy_name)
            if (source := given.pop(name, None)) is not None:
                if source.stop - source.start != feature.shape[0] or versions.feature_kind(feature) == "VISUAL":
                    raise ValueError(
                        f"features.{name}: columns {source.start}:{source.stop}; the policy reads {tuple(feature.shape)}"
                    )
                sources[name] = source
                width = max(source.stop, recorded[source.name].shape[0] if source.name in recorded else 0)
                recorded[source.name] = FeatureSpec((width,))
            elif versions.feature_kind(feature) == "VISUAL":
                channels, height, width = feature.shape
                plain.append(name)
                if (transform := self._cameras.get(name)) is not None:
                    if transform.output != (height, width):
                        raise ValueError(f"cameras.{name}: it becomes {transform.output}; the policy reads {(height, width)}")
                    height, width = transform.size
                recorded[name] = FeatureSpec((height, width, channels), "uint8")
            else:
                plain.append(name)
                recorded[name] = FeatureSpec(tuple(feature.shape))
        if unknown := sorted(set(self._cameras) - set(plain)):
            raise ValueError(f"cameras: {unknown} are not read by this policy; it reads {sorted(plain)}")
        if given:
            raise ValueError(
                f"features: {sorted(given)} are not read by this policy; it reads {sorted(self.config.input_features)}"
            )
        return _Reading(sources, plain, recorded)

    # ---- identity

    def _make_spec(self) -> PolicySpec:
        horizon, n_action_steps, noise_shape, conditioning_dim, num_steps = self._shape()
        return PolicySpec(
            observation_features=self._read.recorded, action=self._action, horizon=horizon, n_action_steps=n_action_steps,
            n_obs_steps=int(self.config.n_obs_steps), noise_shape=noise_shape, conditioning_dim=conditioning_dim,
            sampler=self.SAMPLER, num_steps=num_steps, stats_hash=processor_hash((self.pre, self.post), self.actions),
            base_hash=self._identity(num_steps),
        )  # fmt: skip

    def _identity(self, num_steps: int) -> str:
        """Of the files a checkpoint is made of, and of how it is sampled."""
        digest = hashlib.sha256()
        identity = {**self.options.identity(), "num_inference_steps": num_steps, "sampler": self.SAMPLER}
        identity["action"] = self._action.to_json()  # names and limits reach heads: a gripper is corrected or not by its kind
        digest.update(json.dumps(identity, sort_keys=True, default=dict).encode())
        files = [versions.CONFIG_FILE, *sorted(f.name for f in self.folder.glob("policy_*processor*")), versions.WEIGHTS_FILE]
        for name in files:
            digest.update(name.encode())
            with open(self.folder / name, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()[:16]


class _Reading:
    """Which recorded features are read, and what is made of them."""

    def __init__(self, sources: dict[str, Any], plain: list[str], recorded: dict[str, FeatureSpec]) -> None:
        self.sources, self.plain, self.recorded = sources, plain, recorded


class DeterministicPolicy(LeRobotPolicy):
    """A policy that maps an observation to one chunk: the chunk travels in the conditioning, behind the features.

    ``sample`` only reads it back, so a learner that asks for the base's chunk at a recorded observation pays nothing for it.
    """

    features: int

    def _features_and_chunk(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(B, F) for heads and critics, (B, H, A) in the policy's own space."""
        raise NotImplementedError

    def _rows(self) -> tuple[int, int]:
        """(horizon, n_action_steps)."""
        raise NotImplementedError

    def _built(self) -> None:
        blank = {
            n: torch.zeros((1, self.config.n_obs_steps, *f.shape), dtype=torch.uint8 if f.dtype == "uint8" else torch.float32)
            for n, f in self._read.recorded.items()
        }
        with torch.no_grad():
            self.features = self._features_and_chunk(self.preprocess({n: v.to(self.device) for n, v in blank.items()}))[
                0
            ].shape[1]

    def _shape(self) -> tuple[int, int, tuple[int, int] | None, int, int]:
        horizon, n = self._rows()
        return horizon, n, None, self.features + horizon * self._action.dim, 1

    def _encode(self, batch: dict[str, Any]) -> Tensor:
        features, chunk = self._features_and_chunk(batch)
        return torch.cat([features.float(), self.actions.own_to_unit(chunk.float()).flatten(1)], dim=-1)

    def _sample(self, conditioning: Tensor, noise: Tensor | None, grad: bool) -> Tensor:
        return conditioning[:, self.features :].unflatten(1, (self.spec.horizon, self._action.dim))
