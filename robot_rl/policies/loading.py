"""A base policy from whatever the user points at.

==================================  =========================================================================================
a folder with ``policy.json``       our compact policy, or a reference to a base that lies elsewhere (``base/`` of a run folder)
a folder with LeRobot's             a LeRobot checkpoint: Diffusion, ACT, VQ-BeT, SmolVLA
``config.json``
a folder with OpenVLA's             an OpenVLA checkpoint, as published for transformers
``config.json``
``remote:HOST:PORT``                a policy server of our own (``robot-rl serve``)
``remote:openpi:HOST:PORT``         openpi's websocket server
``remote:lerobot:HOST:PORT``        LeRobot's asynchronous inference server
==================================  =========================================================================================

Any of them with ``options["vision"]``: the same policy, whose heads also see with a frozen encoder (:mod:`robot_rl.policies.seeing`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from robot_rl.policies.base import BasePolicy

REFERENCE = "robot_rl.base_reference/1"
REMOTE = "remote:"
VISION = "vision"


def load_policy(source: str | Path, device: str | torch.device = "cpu", options: Mapping[str, Any] | None = None) -> BasePolicy:
    """Load and verify a base policy.

    Args:
        source: see the table above.
        options: of a kind that has some; a compact policy has none but ``vision``, which every kind has.

    Raises:
        FileNotFoundError: nothing there that is a policy.
        ValueError: it cannot be used; the message names what is wrong and what would be accepted.
    """
    folder = Path(source)
    data = read_reference(folder)
    if data.get("format") == REFERENCE:
        return _follow(folder, data, device, options)
    if (options or {}).get(VISION):
        from robot_rl.policies.seeing import read_vision, seeing

        told = placed(options or {})
        config = read_vision(told.pop(VISION))
        return seeing(load_policy(source, device, told), config, device)
    if str(source).startswith(REMOTE):
        from robot_rl.policies.remote.connecting import connect

        return connect(str(source), str(device), options)
    if data:
        if options:
            raise ValueError(f"base.options={dict(options)!r}: {folder} is a compact policy, which has none; accepted is {{}}")
        from robot_rl.policies.checkpoint import load_compact

        return load_compact(folder, device)
    from robot_rl.policies.lerobot.loading import is_checkpoint, load_lerobot

    if is_checkpoint(folder):
        return load_lerobot(folder, str(device), options)
    if is_checkpoint(folder / "pretrained_model"):  # what lerobot-train writes for every checkpoint
        return load_lerobot(folder / "pretrained_model", str(device), options)
    from robot_rl.policies.openvla.network import read_config

    if read_config(folder) is not None:
        from robot_rl.policies.openvla.options import read_options
        from robot_rl.policies.openvla.policy import OpenVLAPolicy

        return OpenVLAPolicy(folder, read_options(folder, options), str(device))
    raise FileNotFoundError(
        f"{folder} holds no policy: policy.json is missing (a compact policy), and so is the config.json of a LeRobot or OpenVLA checkpoint"
    )


def write_reference(base: BasePolicy, folder: Path, source: str | Path, options: Mapping[str, Any]) -> None:
    """Leave in a run folder where its base lies, how it is loaded, and which one it is.

    Raises:
        ValueError: the folder holds, or refers to, another base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "policy.json"
    before = read_reference(folder).get("base_hash")
    if before not in (None, base.spec.base_hash):
        raise ValueError(
            f"{folder} belongs to base {before}, and {source} is now {base.spec.base_hash}: another checkpoint, or loaded with other "
            "options. Accepted is the one that the run began with"
        )
    options = placed(options)  # whoever follows the reference stands elsewhere
    where = str(source) if str(source).startswith(REMOTE) else os.path.relpath(source, folder)
    content = {
        "format": REFERENCE, "path": where, "absolute": str(Path(source).absolute()) if where != str(source) else "",
        "options": dict(options), "base_hash": base.spec.base_hash, "stats_hash": base.spec.stats_hash,
    }  # fmt: skip
    Path(f"{file}.tmp").write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(f"{file}.tmp", file)


def _follow(folder: Path, data: Mapping[str, Any], device: str | torch.device, options: Mapping[str, Any] | None) -> BasePolicy:
    source = str(data["path"])
    if not source.startswith(REMOTE):
        near = folder / source  # a run folder and its base may have moved together
        source = str(near if near.exists() else data["absolute"])
    base = load_policy(source, device, placed({**data["options"], **(options or {})}, folder))
    if base.spec.base_hash != data["base_hash"]:
        raise ValueError(
            f"{folder}: it refers to base {data['base_hash']}, and {source} is now {base.spec.base_hash}: another checkpoint, or "
            "loaded with other options. Accepted is the one that the run began with"
        )
    return base


def placed(options: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Options in which the weights of ``vision`` have an absolute path; those beside a reference in ``folder`` come first."""
    vision: Mapping[str, Any] = options.get(VISION) or {}
    weights = str((vision.get("encoder") or {}).get("weights") or "")
    if not weights:
        return dict(options)
    near = None if folder is None else folder / weights
    found = near if near is not None and near.exists() else Path(weights).expanduser()
    return {**options, VISION: {**vision, "encoder": {**vision["encoder"], "weights": str(found.absolute())}}}


def read_reference(folder: Path) -> dict[str, Any]:
    """What ``policy.json`` of a folder says; nothing where there is none."""
    file = folder / "policy.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
