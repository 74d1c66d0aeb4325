"""A policy from an ONNX file, for robot computers without torch: numpy and onnxruntime are all it needs.

Written by ``robot-rl export RUN OUT --format onnx``: ``policy.onnx`` holds base, head and statistics as one graph from physical
observations (and noise) to a physical chunk, ``policy.json`` says what goes in and comes out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.types import ActionSpec, FeatureSpec

FORMAT = "robot_rl.onnx_policy/1"
GRAPH, DESCRIPTION = "policy.onnx", "policy.json"
NOISE, CHUNK = "noise", "chunk"


class OnnxPolicy:
    """Observation stacks to chunks, both physical.

    Args:
        folder: what the export wrote.
        threads: of onnxruntime; 1 leaves the other cores to the control loop.

    Raises:
        FileNotFoundError: no such folder. ValueError: another format, or a graph that is not the one described.
        ImportError: onnxruntime is missing.
    """

    def __init__(self, folder: str | Path, *, threads: int = 1) -> None:
        path = Path(folder)
        self.description: dict[str, Any] = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        if self.description.get("format") != FORMAT:
            raise ValueError(f"{path / DESCRIPTION}: format {self.description.get('format')!r}; accepted is {FORMAT!r}")
        graph = (path / GRAPH).read_bytes()
        if hashlib.sha256(graph).hexdigest() != self.description["sha256"]:
            raise ValueError(f"{path / GRAPH} is not the graph that {DESCRIPTION} describes; export it again")
        try:
            import onnxruntime
        except ImportError:
            raise ImportError("an ONNX policy needs onnxruntime: pip install 'onnxruntime>=1.17'") from None
        self.features = {n: FeatureSpec.from_json(f) for n, f in self.description["features"].items()}
        self.action = ActionSpec.from_json(self.description["action"])
        self.n_obs_steps, self.n_action_steps = int(self.description["n_obs_steps"]), int(self.description["n_action_steps"])
        noise = self.description["noise_shape"]
        self.noise_shape: tuple[int, int] | None = None if noise is None else (int(noise[0]), int(noise[1]))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def chunk(self, observation: Mapping[str, np.ndarray], noise: np.ndarray | None = None) -> np.ndarray:
        """Each feature (B, n_obs, ...), noise (B, H_w, A_w) where :attr:`noise_shape` says so; returns (B, H, A) float32.

        Raises:
            ValueError: what is given does not fit; the message names it.
        """
        given: dict[str, np.ndarray] = {}
        for name, feature in self.features.items():
            value = observation.get(name)
            wanted = (self.n_obs_steps, *feature.shape)
            if value is None or value.shape[1:] != wanted:
                raise ValueError(
                    f"{name} is {'missing' if value is None else value.shape}; accepted is (B, {', '.join(map(str, wanted))})"
                )
            given[name] = np.ascontiguousarray(value, feature.dtype)
        if (noise is None) != (self.noise_shape is None) or (noise is not None and noise.shape[1:] != self.noise_shape):
            wanted_noise = "none" if self.noise_shape is None else f"(B, {self.noise_shape[0]}, {self.noise_shape[1]})"
            raise ValueError(f"noise is {'missing' if noise is None else noise.shape}; accepted is {wanted_noise}")
        if noise is not None:
            given[NOISE] = np.ascontiguousarray(noise, np.float32)
        return self._session.run([CHUNK], given)[0]
