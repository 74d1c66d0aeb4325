"""What trainable sources share: a bounded fit, its report, and model folders whose hash is the model's identity."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WEIGHTS, SETTINGS = "model.safetensors", "model.json"


@dataclass(frozen=True)
class FitBudget:
    """When to stop: after so many gradient steps or so many seconds, whichever comes first."""

    steps: int = 1500
    seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.seconds <= 0:
            raise ValueError(f"FitBudget(steps={self.steps}, seconds={self.seconds}): accepted are positive numbers")


@dataclass
class FitReport:
    """What a fit did; ``metrics`` are of the validation episodes."""

    steps: int = 0
    seconds: float = 0.0
    loss: float = float("nan")
    stopped: str = "steps"  # or seconds, plateau, accuracy
    metrics: dict[str, float] = field(default_factory=dict)


class Clock:
    """Counts the steps of one fit against its budget."""

    def __init__(self, budget: FitBudget) -> None:
        self.budget, self.began, self.steps = budget, time.monotonic(), 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def goes_on(self) -> bool:
        """Whether another step may be taken; counts it."""
        if self.steps >= self.budget.steps or self.seconds >= self.budget.seconds:
            return False
        self.steps += 1
        return True

    def report(self, loss: float, **metrics: float) -> FitReport:
        by_time = self.steps < self.budget.steps
        return FitReport(self.steps, self.seconds, loss, "seconds" if by_time else "steps", metrics)


def save_model(folder: str | os.PathLike[str], kind: str, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Write weights and settings, each by atomic rename; gives the model's identity ``kind@sha256[:12]``."""
    from safetensors.torch import save

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    weights = save({k: v.detach().cpu().contiguous() for k, v in state.items()})
    identity = f"{kind}@{_identity(kind, weights, settings)}"
    text = json.dumps({"kind": kind, "model_id": identity, "settings": dict(settings)}, indent=2).encode()
    for name, data in ((WEIGHTS, weights), (SETTINGS, text)):
        with tempfile.NamedTemporaryFile(dir=path, prefix=f".{name}.", delete=False) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path / name)
    return identity


def load_model(folder: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Weights, settings and identity of a model folder.

    Raises:
        FileNotFoundError: no model there.
        ValueError: of another kind, or weights and settings do not belong together.
    """
    from safetensors.torch import load

    path = Path(folder).expanduser()
    if not (path / SETTINGS).is_file() or not (path / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"model={str(folder)!r}: no {SETTINGS} and {WEIGHTS} there; `robot-rl reward train` writes them"
        )
    data = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    if data["kind"] != kind:
        raise ValueError(f"model={str(folder)!r} is a {data['kind']!r}: accepted here is {kind!r}")
    weights = (path / WEIGHTS).read_bytes()
    if data["model_id"] != f"{kind}@{_identity(kind, weights, data['settings'])}":
        raise ValueError(f"model={str(folder)!r}: {WEIGHTS} and {SETTINGS} do not belong together (changed or half-copied?)")
    return load(weights), data["settings"], data["model_id"]


def _identity(kind: str, weights: bytes, settings: Mapping[str, Any]) -> str:
    text = json.dumps([kind, dict(settings)], sort_keys=True).encode()
    return hashlib.sha256(text + weights).hexdigest()[:12]


class Whitening(nn.Module):
    """Principal directions scaled to unit variance, fitted once on training features."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("directions", torch.zeros(inputs, outputs))
        self.mean: Tensor
        self.directions: Tensor

    @torch.no_grad()
    def fit(self, features: np.ndarray) -> None:
        """(N, inputs) training features. Directions beyond their rank stay zero."""
        x = np.asarray(features, np.float64)
        mean = x.mean(0)
        centred = x - mean
        kept = self.directions.shape[1]
        if len(x) < x.shape[1]:  # the small side of the matrix has the same spectrum
            values, vectors = np.linalg.eigh(centred @ centred.T)
            values, vectors = values[::-1][:kept], vectors[:, ::-1][:, :kept]
            directions = centred.T @ vectors / np.sqrt(np.maximum(values, 1e-12))
        else:
            values, vectors = np.linalg.eigh(centred.T @ centred)
            values, directions = values[::-1][:kept], vectors[:, ::-1][:, :kept]
        deviation = np.sqrt(np.maximum(values, 0.0) / max(len(x) - 1, 1))
        good = deviation > 1e-5 * max(float(deviation.max(initial=0.0)), 1e-12)
        # The sign of a direction is arbitrary; fixing it makes the same data give the same model.
        sign = np.sign(directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])])
        scaled = np.where(good, sign / np.where(good, deviation, 1.0), 0.0) * directions
        self.mean.copy_(torch.from_numpy(mean))
        self.directions.zero_()
        self.directions[:, : scaled.shape[1]] = torch.from_numpy(scaled)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.directions
