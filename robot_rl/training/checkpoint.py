"""Checkpoints of a run: tensors in safetensors, everything else in JSON, a folder that exists completely or not at all.

No pickle: a checkpoint may come from another machine.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FORMAT = "robot_rl.checkpoint/1"
SEPARATOR = "/"


def _flatten(tree: dict[str, Any], prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if SEPARATOR in key:
            raise ValueError(f"checkpoint key {key!r}: accepted are names without {SEPARATOR!r}")
        path = f"{prefix}{SEPARATOR}{key}" if prefix else key
        if isinstance(value, dict):
            inner_tensors, inner_values = _flatten(value, path)
            tensors |= inner_tensors
            values |= inner_values or ({path: {}} if not inner_tensors else {})
        elif isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
        else:
            values[path] = value
    return tensors, values


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(SEPARATOR)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(folder: Path, name: str, tensors: dict[str, Any], state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write ``folder/name`` and make it the latest; older ones than the last ``keep`` go once the new one is valid.

    Args:
        tensors: nested dictionaries of tensors (other leaves must be JSON values).
        state: a JSON value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{name}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    flat, values = _flatten(tensors)
    save_file(flat, draft / "tensors.safetensors")
    (draft / "state.json").write_text(json.dumps({"format": FORMAT, "values": values, "state": state}))
    for file in [*draft.iterdir(), draft]:
        _sync(file)
    final = folder / name
    if final.exists():  # the same step again (an interrupt right after a periodic save): the newer content wins
        old = folder / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(draft, final)
    _sync(folder)
    pointer = folder / ".latest.tmp"
    pointer.write_text(name)
    _sync(pointer)
    os.replace(pointer, folder / "latest")
    _sync(folder)
    complete = sorted(
        (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.stat().st_mtime_ns
    )
    for stale in [
        *[p for p in complete if p != final][: max(0, len(complete) - keep)],
        *folder.glob(".*.old"),
        *folder.glob(".*.tmp"),
    ]:
        shutil.rmtree(stale, ignore_errors=True)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None.

    A kill between renaming a folder and moving the pointer leaves a valid newer folder behind the pointer; the pointer
    wins, because the logs were cut to fit it.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    if path.exists():
        return path
    old = folder / f".{path.name}.old"
    return old if old.exists() else None


def load_checkpoint(path: Path) -> tuple[dict[str, Any], Any]:
    """(tensors, state) as they were given to :func:`save_checkpoint`.

    Raises:
        ValueError: not a checkpoint of this format.
    """
    data = json.loads((path / "state.json").read_text())
    if data.get("format") != FORMAT:
        raise ValueError(f"{path}: format {data.get('format')!r}; accepted is {FORMAT!r}")
    return _nest({**load_file(path / "tensors.safetensors"), **data["values"]}), data["state"]
