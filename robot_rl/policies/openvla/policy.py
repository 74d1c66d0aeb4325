"""An OpenVLA checkpoint as a base policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robot_rl.policies.base import PolicySpec
from robot_rl.policies.openvla.network import CONFIG_FILE, OpenVLANetwork, read_config, weight_files
from robot_rl.policies.openvla.options import OpenVLAOptions
from robot_rl.policies.openvla.tokens import quantile
from robot_rl.policies.pictures import PictureTransform
from robot_rl.policies.prefix_memory import Prefix, PrefixMemory
from robot_rl.types import ActionSpec, FeatureSpec

_PROMPT = "prompt"


class OpenVLAPolicy:
    """A :class:`robot_rl.policies.base.BasePolicy` that writes its chunk as words, dimension by dimension and row by row.

    Heads read the last word's hidden state and the mean over all, and behind them, with ``decoding=greedy``, the chunk itself, so that a
    learner that asks for it at a recorded observation pays nothing. With ``decoding=sample`` noise of the chunk's shape chooses the words:
    each is the quantile Phi(noise) of its distribution, the bins in their order, so that noise 0 writes the medians.

    Args:
        folder: the checkpoint as published (safetensors).

    Raises:
        TransformersMissing: transformers is not installed. FileNotFoundError, ValueError: the message says what would be accepted.
    """

    def __init__(self, folder: Path, options: OpenVLAOptions, device: str = "cpu") -> None:
        self.folder, self.options, self.device = folder, options, str(device)
        config = read_config(folder) or {}
        self.network = (
            OpenVLANetwork(folder, options.task, getattr(torch, options.dtype)).to(device).eval().requires_grad_(False)
        )
        key, statistics = _statistics(folder, config, options.unnorm_key)
        mask = torch.tensor(statistics.get("mask") or [True] * len(statistics["q01"]))
        low, high = (torch.tensor(statistics[n], dtype=torch.float32) for n in ("q01", "q99"))
        self.low = torch.where(mask, low, torch.full_like(low, -1.0)).to(device)
        self.high = torch.where(mask, high, torch.full_like(high, 1.0)).to(device)
        self._action = options.action_spec() or ActionSpec(tuple(self.low.tolist()), tuple(self.high.tolist()))
        if self._action.dim != len(self.low):
            raise ValueError(f"base.options.action has {self._action.dim} dimensions; {folder} writes {len(self.low)} ({key})")
        self.count = options.horizon * self._action.dim
        side = self.network.size
        self._cut = None if options.picture is None else PictureTransform.from_json(options.camera, options.picture)
        if self._cut is not None and self._cut.output != (side, side):
            raise ValueError(f"base.options.picture: it becomes {self._cut.output}; the checkpoint reads {(side, side)}")
        height, width = (side, side) if self._cut is None else self._cut.size
        self._camera = FeatureSpec((height, width, 3), "uint8")
        self.memory = PrefixMemory(
            self._embed, options.prompt_cache_mb << 20, options.input_cache_mb << 20, self.device
        )  # of what a head that trains the model reads again
        self._zeros = self._embed({options.camera: torch.zeros(1, 1, height, width, 3, dtype=torch.uint8, device=device)})
        self.notes = (f"instruction {options.task!r}", f"action statistics of {key!r}", f"decoding {options.decoding}")
        self.spec = self._make_spec()

    # ---- the contract

    @torch.no_grad()
    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        """The picture (B, 1, H, W, 3) uint8 to (B, C). Raises KeyError where it is missing."""
        if self.options.camera not in observation:
            raise KeyError(f"observation lacks {self.options.camera}; it has {sorted(observation)}")
        seen = {self.options.camera: observation[self.options.camera]}
        prefix = self._embed(seen)
        found = self.network.read(prefix.tensors[_PROMPT])
        rows = self.network.features(found)
        if self.spec.noise_shape is None:
            written = self.network.write(found, self.count, _likeliest)
            rows = torch.cat([rows, self.values(written).flatten(1)], dim=-1)
        self.memory.add(rows, prefix, seen)
        return rows

    @torch.no_grad()
    def sample(self, conditioning: Tensor, noise: Tensor | None, *, grad: bool = False) -> Tensor:
        """(B, C), with ``decoding=sample`` noise (B, H, A), to (B, H, A) in (-1, 1).

        Raises:
            ValueError: noise that is missing or too much. NotImplementedError: a gradient, which words do not have.
        """
        if grad:
            raise NotImplementedError("words have no gradient: use an algorithm that only calls the sampler")
        if (noise is None) != (self.spec.noise_shape is None):
            wanted = (
                "none (decoding=greedy)"
                if self.spec.noise_shape is None
                else f"(B, {self.options.horizon}, {self._action.dim})"
            )
            raise ValueError(f"noise is {'missing' if noise is None else tuple(noise.shape)}; accepted is {wanted}")
        if noise is None:
            return conditioning[:, -self.count :].unflatten(1, (self.options.horizon, self._action.dim))
        return self.values(self.draw(self.prompts(conditioning), noise.flatten(1), self.options.temperature))

    def normalize_action(self, action: Tensor) -> Tensor:
        return 2.0 * (action - self.low.to(action)) / (self.high - self.low).clamp(min=1e-6).to(action) - 1.0

    def unnormalize_action(self, action: Tensor) -> Tensor:
        return 0.5 * (action + 1.0) * (self.high - self.low).to(action) + self.low.to(action)

    # ---- words, for heads that write their own

    def prompts(self, conditioning: Tensor) -> Tensor:
        """(B, T, D) the embedded observations and instruction that these rows (B, C) were made of; zeros stand for an empty one.

        Raises:
            LookupError: rows of observations that were forgotten.
        """
        if not conditioning.any():
            return self._zeros.tensors[_PROMPT].expand(len(conditioning), -1, -1)
        return self.memory.find(conditioning).tensors[_PROMPT]

    def values(self, written: Tensor) -> Tensor:
        """(B, H * A) bins to the chunk (B, H, A)."""
        return self.network.bins.value(written).unflatten(1, (self.options.horizon, self._action.dim))

    def greedy(self, prompt: Tensor, language: Any = None) -> Tensor:
        """(B, H * A) the likeliest bins, one after the other."""
        return self.network.write(self.network.read(prompt, language), self.count, _likeliest, language)

    def draw(self, prompt: Tensor, normal: Tensor, temperature: float, language: Any = None) -> Tensor:
        """(B, H * A) bins at the quantiles Phi of ``normal`` (B, H * A)."""
        chosen = lambda place, log_prob: quantile((log_prob / temperature).log_softmax(-1), normal[:, place])  # noqa: E731
        return self.network.write(self.network.read(prompt, language), self.count, chosen, language)

    # ---- identity

    @torch.no_grad()
    def _embed(self, observation: Mapping[str, Tensor]) -> Prefix:
        picture = observation[self.options.camera][:, -1]
        return Prefix({_PROMPT: self.network.prompt(picture if self._cut is None else self._cut(picture))})

    def _make_spec(self) -> PolicySpec:
        sampled = self.options.decoding == "sample"
        shape = (self.options.horizon, self._action.dim)
        digest = hashlib.sha256(json.dumps(self.options.identity(), sort_keys=True, default=dict).encode())
        digest.update(json.dumps(self._action.to_json(), sort_keys=True).encode())
        for file in weight_files(self.folder):
            digest.update(file.name.encode())
            with open(file, "rb") as opened:
                while block := opened.read(1 << 22):
                    digest.update(block)
        statistics = hashlib.sha256(torch.stack([self.low, self.high]).cpu().numpy().tobytes()).hexdigest()[:12]
        return PolicySpec(
            observation_features={self.options.camera: self._camera}, action=self._action, horizon=shape[0], n_action_steps=shape[0],
            n_obs_steps=1, noise_shape=shape if sampled else None,
            conditioning_dim=2 * self.network.width + (0 if sampled else self.count),
            sampler="words drawn" if sampled else "words, the likeliest", num_steps=self.count, stats_hash=statistics,
            base_hash=digest.hexdigest()[:16],
        )  # fmt: skip


def _likeliest(_place: int, log_prob: Tensor) -> Tensor:
    return log_prob.argmax(-1)


def _statistics(folder: Path, config: Mapping[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    known = config.get("norm_stats") or {}
    if not key and len(known) == 1:
        key = next(iter(known))
    if key not in known:
        raise ValueError(
            f"{folder}: base.options.unnorm_key={key!r}; accepted are {', '.join(sorted(known)) or 'none: norm_stats is empty'} "
            f"({CONFIG_FILE})"
        )
    return key, known[key]["action"]
