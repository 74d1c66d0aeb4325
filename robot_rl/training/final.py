"""The end of a run: the final table on starts nobody has seen, videos of before and after, ``result.json``, the report."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl import __version__, seeding
from robot_rl.evaluation.report import write_report
from robot_rl.evaluation.results import EvaluationLine, load_lines, lowest_acting_minus_base, steps_to
from robot_rl.progress import Progress
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.bounds import wilson
from robot_rl.sim.rollout import EpisodePlan, Rollout
from robot_rl.training.acting_session import ActingSession, Counters
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.measuring import measure
from robot_rl.training.run_folder import RunFolder

FPS = 20


def finish(
    config: PostTrainConfig,
    folder: RunFolder,
    session: ActingSession,
    rollout: Rollout,
    progress: Progress,
    flag: InterruptFlag,
) -> dict[str, Any]:
    """Evaluate base and acting policy on the same ``final`` seeds, film some of them, and write result and report."""
    e, c = config.evaluation, session.counters
    began = time.monotonic()
    version, mode = session.acting
    policies = {"base": ActingPolicy(session.base, device=session.device), "policy": session.policy(version, mode)}
    seeds = seeding.FINAL.take(e.final_episodes)
    progress.start("final evaluation", 2 * len(seeds))
    outcomes = {who: _played(folder, c, who, p, seeds, rollout, progress, flag) for who, p in policies.items()}
    lines: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for who, played in outcomes.items():
        successes, n = sum(bool(o["success"]) for o in played), len(played)
        interval = wilson(successes, n)
        summary[who] = {"success": successes / n, "successes": successes, "n": n, "interval": [interval.low, interval.high]}
        c.evaluation_steps += sum(int(o["length"]) for o in played)
        lines += [{"who": who, **o} for o in played]
    folder.write_lines("episodes.jsonl", lines)  # type: ignore[arg-type]
    film(config, folder, policies, outcomes, rollout, progress)
    for who in outcomes:  # what they held is in the table now
        (folder.path / f"final_{who}.json").unlink(missing_ok=True)
    c.wall_seconds += time.monotonic() - began
    curve = load_lines(EvaluationLine, folder.path / "evaluations.jsonl")
    result = summary | {
        "task": rollout.spec.env_id,
        "env_steps": c.env_steps,
        "gate_steps": c.gate_steps,
        "evaluation_steps": c.evaluation_steps,
        "updates": session.updates,
        "learner": session.learner_summary(),
        **session.intervention_summary(),
        "wall_seconds": c.wall_seconds,
        "phase_seconds": c.seconds,
        "steps_to": steps_to((line.env_steps, line.rate) for line in curve if line.who in ("base", "acting")),
        "lowest_acting_minus_base": lowest_acting_minus_base(curve),
        "acting": {"version": version, "mode": mode},
        "ended": c.done,
        "config_hash": session.scalars.config_hash,
        "base_hash": session.base.spec.base_hash,
        "run_seed": config.seed,
        "seeds": {
            "final": [seeds[0], seeds[-1]],
            "evaluation": _range(seeding.EVALUATION.take(e.curve_episodes)),
            "gate": seeding.GATE.first,
        },
        "versions": versions(),
    }
    folder.write_json("result.json", result)
    path = write_report(folder.path)
    progress.log(f"report: {path}")
    return result


def _played(
    folder: RunFolder,
    counters: Counters,
    who: str,
    policy: ActingPolicy,
    seeds: list[int],
    rollout: Rollout,
    progress: Progress,
    flag: InterruptFlag,
) -> list[dict[str, Any]]:
    """One line an episode. They are kept, so that an interrupted final table does not begin again with its first half."""
    path = folder.path / f"final_{who}.json"
    asked = {"version": policy.version, "mode": policy.mode, "seeds": [seeds[0], seeds[-1]]}
    if path.exists() and (held := json.loads(path.read_text()))["asked"] == asked:
        progress.advance(len(seeds))
        counters.wall_seconds += held["seconds"]
        return held["episodes"]
    began = time.monotonic()
    found = [
        {"seed": o.plan.seed, "success": o.success, "length": o.length, "start": o.start, "end": o.end, "stage": o.stage}
        for o in measure(rollout, policy, seeds, progress=progress, should_stop=flag)
    ]
    folder.write_json(path.name, {"asked": asked, "episodes": found, "seconds": time.monotonic() - began})
    return json.loads(path.read_text())["episodes"]


def _range(seeds: list[int]) -> list[int]:
    return [seeds[0], seeds[-1]]


def versions() -> dict[str, str]:
    import mujoco
    import torch

    return {
        "robot_rl": __version__, "python": platform.python_version(), "torch": torch.__version__, "mujoco": mujoco.__version__,
        "numpy": np.__version__, "machine": platform.machine(),
    }  # fmt: skip


def film(
    config: PostTrainConfig,
    folder: RunFolder,
    policies: dict[str, ActingPolicy],
    outcomes: dict[str, list[dict[str, Any]]],
    rollout: Rollout,
    progress: Progress,
) -> None:
    """Videos of the same starts before and after, the starts that changed first. Rendering that fails is said, not hidden."""
    count = config.evaluation.videos
    if not count:
        return
    pairs = zip(outcomes["base"], outcomes["policy"], strict=True)
    changed = [b["seed"] for b, p in pairs if b["success"] != p["success"]]
    rest = [b["seed"] for b in outcomes["base"] if b["seed"] not in set(changed)]
    seeds = (changed + rest)[:count]
    folder.videos.mkdir(exist_ok=True)
    progress.start("videos", 2 * len(seeds))
    for who, policy in policies.items():
        for seed in seeds:
            try:
                (outcome,) = rollout.play([EpisodePlan(seed, ("evaluation", seed), policy)], film=config.evaluation.video_size)
            except Exception as error:  # any GL driver may fail in any way; the numbers above must survive it
                progress.log(f"videos are missing: rendering failed ({type(error).__name__}: {error}); see robot-rl doctor")
                return
            write_video(folder.videos / f"{who}_{seed}.mp4", outcome.frames)
            progress.advance(1)


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """H.264 in MP4, as every browser plays it."""
    import imageio_ffmpeg

    height, width = frames[0].shape[:2]
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=FPS,
        codec="libx264",
        quality=7,
        macro_block_size=2,
        output_params=["-movflags", "+faststart"],
    )
    writer.send(None)
    for frame in [*frames, *[frames[-1]] * (FPS // 2)]:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
