"""A policy's description on the wire, which token both ends agree on, and what clients' waits may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robot_rl import tokens
from robot_rl.policies.base import BasePolicy, PolicySpec
from robot_rl.types import ActionSpec, FeatureSpec

TOKEN_VARIABLE = "ROBOT_RL_POLICY_TOKEN"


def spec_to_json(spec: PolicySpec) -> dict[str, Any]:
    return {
        "features": {n: f.to_json() for n, f in spec.observation_features.items()}, "action": spec.action.to_json(),
        "horizon": spec.horizon, "n_action_steps": spec.n_action_steps, "n_obs_steps": spec.n_obs_steps,
        "noise_shape": None if spec.noise_shape is None else list(spec.noise_shape), "conditioning_dim": spec.conditioning_dim,
        "sampler": spec.sampler, "num_steps": spec.num_steps, "stats_hash": spec.stats_hash, "base_hash": spec.base_hash,
    }  # fmt: skip


def spec_from_json(data: dict[str, Any]) -> PolicySpec:
    noise = data["noise_shape"]
    return PolicySpec(
        observation_features={n: FeatureSpec.from_json(f) for n, f in data["features"].items()},
        action=ActionSpec.from_json(data["action"]), horizon=int(data["horizon"]), n_action_steps=int(data["n_action_steps"]),
        n_obs_steps=int(data["n_obs_steps"]), noise_shape=None if noise is None else (int(noise[0]), int(noise[1])),
        conditioning_dim=int(data["conditioning_dim"]), sampler=str(data["sampler"]), num_steps=int(data["num_steps"]),
        stats_hash=str(data["stats_hash"]), base_hash=str(data["base_hash"]),
    )  # fmt: skip


@dataclass(frozen=True)
class ActionMap:
    """Physical = ``offset`` + ``scale`` * unit, (A,) each: small enough that a robot need not ask for it."""

    offset: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, base: BasePolicy, device: str) -> ActionMap:
        """Raises ValueError where a policy's actions are not normalised one dimension at a time by a straight line."""
        dim = base.spec.action.dim
        ends = torch.stack([torch.full((dim,), v) for v in (-1.0, 1.0)]).to(device)
        low, high = base.unnormalize_action(ends).double().cpu().numpy()
        found = cls((low + high) / 2, (high - low) / 2)
        unit = torch.rand((64, dim), generator=torch.Generator().manual_seed(0)) * 2 - 1
        physical = base.unnormalize_action(unit.to(device)).double().cpu().numpy()
        if not np.allclose(
            physical, found.offset + found.scale * unit.numpy(), rtol=1e-5, atol=1e-5 * np.abs(found.scale).max()
        ):
            raise ValueError("this policy's actions are not normalised by a straight line a dimension; it cannot be served")
        return found


def read_token(token_file: str | Path | None = None) -> str | None:
    """The policy server's token, see :func:`robot_rl.tokens.read_token`."""
    return tokens.read_token(TOKEN_VARIABLE, token_file)


def check_seconds(**waits: object) -> None:
    """Raises ValueError for an option that is no time to wait."""
    for name, value in waits.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{name}={value!r}: accepted are seconds > 0")
