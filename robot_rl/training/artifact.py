"""``robot-rl export RUN OUT``: what a finished run has made, as a folder that needs nothing beside it.

=========== ========================================================================================================
``policy``  base, the acting head's one version, the run's configuration and result, and a model card. It is laid out as a
            run folder, so everything that takes one takes it: ``robot-rl eval``, ``policy_node``, a next run's ``base.path``
``lerobot`` a checkpoint that LeRobot's own loader reads: of a LeRobot diffusion policy, adapters worked into its weights, other heads
            distilled into them (see :mod:`robot_rl.training.lerobot_export`); of other LeRobot policies where the base itself acts
``openvla`` a checkpoint as OpenVLA's are published, with what a token head learned worked into its language model
``onnx``    one graph for robot computers without torch; compact bases only
=========== ========================================================================================================
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from robot_rl.config import load, to_yaml
from robot_rl.heads.token import TokenHead
from robot_rl.policies.lerobot.adapter import LeRobotPolicy
from robot_rl.policies.loading import VISION, load_policy, placed, read_reference, write_reference
from robot_rl.policies.openvla.network import replace_weights
from robot_rl.policies.openvla.policy import OpenVLAPolicy
from robot_rl.policies.seeing import blind
from robot_rl.replay.files import replace_json
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.weights import WeightChannel
from robot_rl.training.config import BaseConfig, PostTrainConfig
from robot_rl.training.evaluate import load_acting
from robot_rl.training.lerobot_export import DistilConfig, as_lerobot, write_checkpoint
from robot_rl.training.onnx_export import export_onnx
from robot_rl.training.run_folder import base_source

FORMATS = {
    "policy": "self-contained robot_rl policy: base, head, statistics, model card with its evaluation",
    "lerobot": "checkpoint for LeRobot's own loader, where the result is a LeRobot policy or can be distilled into one",
    "openvla": "checkpoint as OpenVLA's are published, where a token head was trained",
    "onnx": "one graph for robot computers without torch (compact bases)",
}
MANIFEST = "artifact.json"


def export_run(run: Path, out: Path, kind: str = "policy", distil: int = 0) -> dict[str, Any]:
    """Write one artifact; returns its manifest.

    Args:
        distil: with ``lerobot``, gradient steps in which a head that LeRobot has no class for is distilled; 0 refuses such heads.

    Raises:
        FileExistsError: ``out`` is there already. ValueError: the run has not finished, or cannot be expressed as ``kind``.
    """
    if kind not in FORMATS:
        raise ValueError(f"format={kind!r}: accepted are {', '.join(FORMATS)}")
    if distil and kind != "lerobot":
        raise ValueError(f"distil={distil} with format={kind}: accepted is 0, or format=lerobot")
    if out.exists():
        raise FileExistsError(f"{out} is there already; an export never overwrites")
    acting, _ = load_acting(run, "policy", "cpu")
    config = load(PostTrainConfig, run / "config.yaml")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    making = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    making.mkdir()
    try:
        told: dict[str, Any] = {}
        if kind == "lerobot":
            told = _lerobot(run, making, acting, config, result, distil)
        else:
            {"policy": _policy, "onnx": _onnx, "openvla": _openvla}[kind](run, making, acting, config, result)
        manifest = {
            "format": f"robot_rl.artifact/1 {kind}", "task": result["task"], "base_hash": acting.base.spec.base_hash,
            "stats_hash": acting.base.spec.stats_hash, "config_hash": result["config_hash"], "acting": result["acting"],
            "policy": result["policy"], "base": result["base"], **told, "files": _hashes(making),
        }  # fmt: skip
        (making / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        making.rename(out)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return manifest


def verify_artifact(folder: Path) -> list[str]:
    """Files that are missing or are not those that were exported; empty when all is well."""
    wanted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    found = _hashes(folder)
    return sorted(n for n in wanted if found.get(n) != wanted[n])


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _policy(run: Path, out: Path, acting: ActingPolicy, config: PostTrainConfig, result: dict[str, Any]) -> None:
    _copy_base(run, out / "base", acting, config)
    if acting.head is not None:
        version = acting.version
        shutil.copytree(
            WeightChannel(run / "weights").path(version), out / "weights" / WeightChannel(run / "weights").path(version).name
        )
    alone = replace(config, run_dir=Path("."), base=BaseConfig(None, bc=config.base.bc))
    (out / "config.yaml").write_text(to_yaml(alone), encoding="utf-8")
    replace_json(out / "result.json", result, sync=False)
    (out / "README.md").write_text(model_card(acting, config, result), encoding="utf-8")


def _copy_base(run: Path, out: Path, acting: ActingPolicy, config: PostTrainConfig) -> None:
    """The base with everything that it needs; a plain compact policy as it is, everything else behind a reference."""
    base, checkpoint = blind(acting.base), out / "checkpoint"
    if isinstance(base, LeRobotPolicy | OpenVLAPolicy):
        _copy_checkpoint(base, checkpoint)
    elif base is acting.base:
        _copy_compact(base_source(run / "base", config.base), out)
        return
    else:
        _copy_compact(base_source(run / "base", config.base), checkpoint)
    options = dict(read_reference(run / "base").get("options", config.base.options))
    vision = options.get(VISION)
    if vision and vision["encoder"].get("weights"):
        weights = Path(vision["encoder"]["weights"])
        own = f"encoder/{weights.name}"
        (out / own).parent.mkdir(parents=True)
        shutil.copytree(weights, out / own) if weights.is_dir() else shutil.copyfile(weights, out / own)
        options[VISION] = {**vision, "encoder": {**vision["encoder"], "weights": own}}
    write_reference(load_policy(checkpoint, "cpu", placed(options, out)), out, checkpoint, options)
    # What was exported moves as a whole: nothing in it may point to where it was made.
    replace_json(out / "policy.json", {**read_reference(out), "absolute": "", "options": options}, sync=False)


def _copy_compact(source: Path, out: Path) -> None:
    held, folder = read_reference(source), source
    if held.get("path"):  # a compact policy elsewhere
        near = folder / str(held["path"])
        folder = near if near.exists() else Path(str(held["absolute"]))
    if not (folder / "policy.safetensors").exists():
        raise ValueError(f"base={str(source)!r} is served by another computer; accepted is a base whose files are here")
    out.mkdir(parents=True)
    for name in ("policy.json", "policy.safetensors"):
        shutil.copyfile(folder / name, out / name)


def _copy_checkpoint(base: LeRobotPolicy | OpenVLAPolicy, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in base.folder.iterdir():
        if file.is_file():
            shutil.copyfile(file, out / file.name)


def _lerobot(
    run: Path, out: Path, acting: ActingPolicy, config: PostTrainConfig, result: dict[str, Any], steps: int
) -> dict[str, Any]:
    if not isinstance(acting.base, LeRobotPolicy):
        raise ValueError(
            f"format=lerobot: the base is a {type(acting.base).__name__}, no LeRobot policy; accepted is format=policy"
        )
    card = model_card(acting, config, result)
    if acting.head is None:
        _copy_checkpoint(acting.base, out)
        out.joinpath("README.md").write_text(card, encoding="utf-8")
        return {}
    policy, distilled = as_lerobot(acting, run / "store", DistilConfig(steps))
    write_checkpoint(policy, out)
    if distilled is None:
        out.joinpath("README.md").write_text(card, encoding="utf-8")
        return {"fused": acting.head.KIND}
    note = (
        f"\n## Distilled\n\nThe figures above are those of the {acting.head.KIND} head in front of its base. This checkpoint imitates both in one "
        f"network ({distilled.steps} steps on {distilled.states} recorded observations; mean difference of its chunks from theirs "
        f"{distilled.after:.3f}, of the base's {distilled.before:.3f}, normalised). Measure it itself with `robot-rl eval`.\n"
    )
    out.joinpath("README.md").write_text(card + note, encoding="utf-8")
    return {"distilled": vars(distilled)}


def _openvla(run: Path, out: Path, acting: ActingPolicy, config: PostTrainConfig, result: dict[str, Any]) -> None:
    if not isinstance(acting.base, OpenVLAPolicy) or not isinstance(acting.head, TokenHead):
        what = "no head" if acting.head is None else f"a {acting.head.KIND} head"
        raise ValueError(
            f"format=openvla: {what} acts on a {type(acting.base).__name__}; accepted is a token head on an OpenVLA checkpoint"
        )
    _copy_checkpoint(acting.base, out)
    replace_weights(out, {f"language_model.{n}": v for n, v in acting.head.merged().items()})
    out.joinpath("README.md").write_text(model_card(acting, config, result), encoding="utf-8")


def _onnx(run: Path, out: Path, acting: ActingPolicy, config: PostTrainConfig, result: dict[str, Any]) -> None:
    export_onnx(acting, out, {"task": result["task"], "evaluation": result["policy"]})
    out.joinpath("README.md").write_text(model_card(acting, config, result), encoding="utf-8")


def model_card(acting: ActingPolicy, config: PostTrainConfig, result: dict[str, Any]) -> str:
    """What it is, what it was measured to do, and what it reads and commands. Markdown with the front matter of model hubs."""
    spec = acting.base.spec

    def line(who: str) -> str:
        r = result[who]
        return f"| {who} | {r['success']:.1%} | {r['interval'][0]:.1%} to {r['interval'][1]:.1%} | {r['n']} |"

    head = (
        "none (the base acts)" if acting.head is None else f"{acting.head.KIND}, version {acting.version}, {acting.mode} mode"
    )
    features = "\n".join(f"- `{n}`: {f.dtype} {list(f.shape)}" for n, f in spec.observation_features.items())
    action = "\n".join(
        f"- `{n}`: {lo:.4g} to {hi:.4g}, {k}, {m}"
        for n, lo, hi, k, m in zip(
            spec.action.names, spec.action.low, spec.action.high, spec.action.kind, spec.action.mode, strict=True
        )
    )
    return f"""---
library_name: robot_rl
tags: [robotics, reinforcement-learning, post-training]
---

# {result["task"]}

| | |
| --- | --- |
| base | {type(acting.base).__name__}, {spec.sampler}, {spec.num_steps} steps, `{spec.base_hash}` |
| head | {head} |
| trained by | {config.learner.algorithm}, {result["env_steps"]} environment steps, run seed {result["run_seed"]} |
| configuration | `{result["config_hash"]}` (`config.yaml`) |

## Evaluation

Held-out starts, never played in training; Wilson intervals, 95 %.

| who | success | interval | episodes |
| --- | --- | --- | --- |
{line("base")}
{line("policy")}

## Reads ({spec.n_obs_steps} frame{"s" * (spec.n_obs_steps > 1)})

{features}

## Commands ({spec.horizon} rows a chunk, {spec.n_action_steps} executed)

{action}
"""
