"""Base, head and statistics of a compact policy as one ONNX graph."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_rl.policies.compact import CompactPolicy
from robot_rl.policies.onnx_policy import CHUNK, DESCRIPTION, FORMAT, GRAPH, NOISE, OnnxPolicy
from robot_rl.runtime.acting import ActingPolicy

HEADS = ("latent_noise", "residual", "gaussian_residual", "fine_tuned")
OPSET = 17
TOLERANCE = 1e-4
"""Largest difference, in units of the normalised action, between the graph and the policy it was made of."""


class _Graph(nn.Module):
    """Physical observations (and noise) to a physical chunk, as the acting policy decides in ``eval`` mode."""

    def __init__(self, policy: ActingPolicy, names: list[str], noise: bool) -> None:
        super().__init__()
        self.base, self.head = policy.base, policy.head
        self.names, self.noise = names, noise
        self.modules_ = nn.ModuleList([m for m in (policy.base, policy.head) if isinstance(m, nn.Module)])

    def forward(self, *inputs: Tensor) -> Tensor:
        conditioning = self.base.encode(dict(zip(self.names, inputs, strict=False)))
        noise = inputs[-1] if self.noise else None
        if self.head is None:
            chunk = self.base.sample(conditioning, noise)
        else:
            chunk = self.head.propose(conditioning, self.base, noise, None, "eval").chunk
        return self.base.unnormalize_action(chunk)


def export_onnx(policy: ActingPolicy, out: Path, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write ``policy.onnx`` and ``policy.json`` into ``out``, and check them against the policy on random observations.

    Raises:
        ValueError: a base or head that cannot be one graph, or a graph that does not do what the policy does.
        ImportError: onnx or onnxruntime is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}: pip install 'onnx>=1.16' 'onnxruntime>=1.17'") from None
    base, head = policy.base, policy.head
    if not isinstance(base, CompactPolicy):
        raise ValueError(f"format=onnx with a {type(base).__name__} as base: accepted are compact diffusion and flow policies")
    if head is not None and head.KIND not in HEADS:
        raise ValueError(f"format=onnx with a {head.KIND} head: accepted are {', '.join(HEADS)}, or the base alone")
    if policy.mode == "explore":
        raise ValueError(
            "format=onnx with mode explore: a graph draws no random numbers; accepted is a head that acts in eval mode"
        )
    spec = base.spec
    names = list(spec.observation_features)
    graph = _Graph(policy, names, noise=True).eval()
    inputs = _example(base, 2)[0]
    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every shape that Python looks at; the check below is what counts
        level = logging.getLogger("torch.onnx").level
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            graph, tuple(inputs), str(out / GRAPH), input_names=[*names, NOISE], output_names=[CHUNK], opset_version=OPSET,
            dynamic_axes={n: {0: "batch"} for n in (*names, NOISE, CHUNK)}, dynamo=False, do_constant_folding=False,
        )  # fmt: skip
        logging.getLogger("torch.onnx").setLevel(level)
    used = _used_inputs(out / GRAPH)
    description = {
        "format": FORMAT, "features": {n: f.to_json() for n, f in spec.observation_features.items()}, "action": spec.action.to_json(),
        "horizon": spec.horizon, "n_action_steps": spec.n_action_steps, "n_obs_steps": spec.n_obs_steps,
        "noise_shape": list(spec.noise_shape) if NOISE in used and spec.noise_shape is not None else None,
        "base_hash": spec.base_hash, "stats_hash": spec.stats_hash, "head": None if head is None else head.KIND,
        "version": policy.version, "mode": policy.mode, "opset": OPSET,
        "sha256": hashlib.sha256((out / GRAPH).read_bytes()).hexdigest(), **(extra or {}),
    }  # fmt: skip
    (out / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")
    description["largest_difference"] = _check(base, graph, OnnxPolicy(out))
    (out / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")
    return description


def _used_inputs(file: Path) -> set[str]:
    import onnx

    return {i.name for i in onnx.load(str(file)).graph.input}


def _example(base: CompactPolicy, batch: int, seed: int = 0) -> tuple[list[Tensor], dict[str, np.ndarray], np.ndarray]:
    """Observations around what the policy was trained on, as tensors with noise last, and as arrays."""
    rng = np.random.default_rng(seed)
    n, observation = base.spec.n_obs_steps, {}
    for name, feature in base.spec.observation_features.items():
        shape = (batch, n, *feature.shape)
        if feature.dtype == "uint8":
            observation[name] = rng.integers(0, 256, shape).astype(np.uint8)
            continue
        seen = torch.from_numpy(rng.normal(size=(batch, n, base.normalizer.width(name)))).to(base.normalizer.action_low)
        observation[name] = base.normalizer.unobservation(name, seen).cpu().numpy()
    assert base.spec.noise_shape is not None
    noise = rng.normal(size=(batch, *base.spec.noise_shape)).astype(np.float32)
    return [*(torch.from_numpy(v) for v in observation.values()), torch.from_numpy(noise)], observation, noise


@torch.no_grad()
def _check(base: CompactPolicy, graph: _Graph, written: OnnxPolicy) -> float:
    """Largest normalised difference over batches of 1 and 64; more than :data:`TOLERANCE` raises ValueError."""
    worst = 0.0
    for batch in (1, 64):
        inputs, observation, noise = _example(base, batch, seed=batch)
        wanted = base.normalize_action(graph(*inputs))
        try:
            found = torch.from_numpy(written.chunk(observation, None if written.noise_shape is None else noise))
        except Exception as error:  # onnxruntime has its own, which are no subclasses of anything but this
            raise ValueError(f"the ONNX graph does not run for {batch} observations at once: {error}") from error
        worst = max(worst, float((base.normalize_action(found) - wanted).abs().max()))
    if not worst <= TOLERANCE:
        raise ValueError(
            f"the ONNX graph differs from the policy by {worst:.2g} of the normalised action; accepted is {TOLERANCE:g}"
        )
    return worst
