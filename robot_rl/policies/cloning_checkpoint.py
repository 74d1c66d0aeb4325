"""A cloning on its way, on disk, so that the same call goes on where an interrupted one stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from robot_rl.policies.config import BCConfig

_RANDOM, _STATES = "random state", ("exp_avg", "exp_avg_sq", "step")


class CloningCheckpoint:
    """Networks, AdamW's moments and the random state of a cloning; what it goes on to is, to the bit, what it would have become.

    Args:
        file: where it is kept (safetensors); :meth:`remove` when the policy itself is saved.
        config: of the cloning. ``data`` are the tensors that it learns from: a file of another configuration or data is not taken up.
        every_s: seconds between two of them.
    """

    def __init__(self, file: Path, config: BCConfig, data: dict[str, Tensor], every_s: float = 20.0) -> None:
        digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True, default=str).encode())
        for name, rows in sorted(data.items()):
            digest.update(name.encode())
            digest.update(rows.numpy().tobytes())
        self.file, self.every_s, self._identity = file, every_s, digest.hexdigest()[:16]
        self._saved = time.monotonic()

    def restore(
        self, policy: nn.Module, average: nn.Module, optimizer: torch.optim.AdamW, generator: torch.Generator, device: str
    ) -> int:
        """Steps done; 0 without a file, or with one of another cloning."""
        if not self.file.is_file():
            return 0
        with safe_open(self.file, "pt", device=device) as found:
            told = found.metadata() or {}
            if told.get("cloning") != self._identity:
                return 0
            tensors = {n: found.get_tensor(n) for n in found.keys()}  # noqa: SIM118  (it is no mapping)
        for name, network in (("policy", policy), ("average", average)):
            network.load_state_dict({n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")})
        for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
            moments = {s: tensors[f"{s} {i}"] for s in _STATES if f"{s} {i}" in tensors}
            if moments:
                optimizer.state[parameter] = moments
        generator.set_state(tensors[_RANDOM].cpu())
        return int(told["step"])

    def due(self) -> bool:
        return time.monotonic() - self._saved >= self.every_s

    def save(
        self, step: int, policy: nn.Module, average: nn.Module, optimizer: torch.optim.AdamW, generator: torch.Generator
    ) -> None:
        """After ``step`` steps; the file is the old one or the new one, whenever the process ends."""
        tensors = {_RANDOM: generator.get_state()}
        for name, network in (("policy", policy), ("average", average)):
            tensors |= {f"{name}.{n}": t.detach().contiguous() for n, t in network.state_dict().items()}
        for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
            tensors |= {f"{s} {i}": t for s, t in optimizer.state.get(parameter, {}).items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_name(f".{self.file.name}.draft")
        save_file(tensors, draft, {"cloning": self._identity, "step": str(step)})
        os.replace(draft, self.file)
        self._saved = time.monotonic()

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
