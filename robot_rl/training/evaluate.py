"""``robot-rl eval``: how often a policy succeeds, on starts that are the same for every policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from robot_rl import seeding
from robot_rl.config import load
from robot_rl.policies.loading import load_policy
from robot_rl.progress import Progress, Silent
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.weights import WeightChannel
from robot_rl.sim.rollout import Rollout
from robot_rl.sim.vector import make_vector
from robot_rl.training.build import build_head, pick_device
from robot_rl.training.config import EnvConfig, EvalConfig, PostTrainConfig
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.measuring import measure, success_interval
from robot_rl.training.run_folder import base_source, to_json


def load_acting(folder: Path, who: str, device: str, code: int | None = None) -> tuple[ActingPolicy, EnvConfig | None]:
    """The policy in a run folder (what its gate lets act, or its base), or a base policy (see ``policies/loading.py``).

    Raises:
        FileNotFoundError: neither kind of folder. ValueError: a run that has not finished, asked for its acting head.
    """
    if not (folder / "config.yaml").exists():
        try:
            return ActingPolicy(load_policy(folder, device), device=device), None
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"policy={str(folder)!r}: neither a run folder (config.yaml) nor a base policy: {error}"
            ) from error
    run = load(PostTrainConfig, folder / "config.yaml")
    base = load_policy(base_source(folder / "base", run.base), device)
    if who == "base":
        return ActingPolicy(base, device=device), run.env
    if not (folder / "result.json").exists():
        raise ValueError(f"policy={str(folder)!r}: the run has not finished; resume it, or evaluate its base with --who=base")
    acting = json.loads((folder / "result.json").read_text())["acting"]
    if acting["version"] == 0:
        return ActingPolicy(base, device=device), run.env
    if code is not None and run.head.kind != "distilled":
        raise ValueError(f"code={code}: the head of {str(folder)!r} is {run.head.kind} and reads no code; accepted is null")
    shape = run.head if code is None else replace(run.head, distilled=replace(run.head.distilled, code=code))
    head = build_head(base, shape, run.seed, run.learner).to(device)
    head.load_state_dict(WeightChannel(folder / "weights").load(acting["version"]))
    return ActingPolicy(base, head, acting["mode"], acting["version"], device=device), run.env


def run(config: EvalConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Play the episodes; returns success with interval, and the seeds.

    Raises:
        ValueError: no task is known for this policy, or more seeds than the range holds.
    """
    progress = progress or Silent()
    device = pick_device(config.device)
    policy, env = load_acting(config.policy, config.who, device, config.code)
    env = config.env or env
    if env is None:
        raise ValueError(f"env=null: {str(config.policy)!r} is a bare policy; accepted is a task, e.g. --env.id=tabletop/Lift")
    ranges = {"evaluation": seeding.EVALUATION, "final": seeding.FINAL}
    seeds = ranges[config.seeds].take(config.episodes, config.offset)
    with make_vector(env.id, env.num_envs, env.workers, **env.options) as vector, InterruptFlag() as flag:
        rollout = Rollout(vector, vector.spec)
        progress.start("evaluation", len(seeds))
        outcomes = measure(rollout, policy, seeds, progress=progress, should_stop=flag)
    successes, n, interval = success_interval(outcomes)
    lines = [
        {"seed": o.plan.seed, "success": o.success, "length": o.length, "start": o.start, "end": o.end, "stage": o.stage}
        for o in outcomes
    ]
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text("".join(json.dumps(to_json(line)) + "\n" for line in lines))
    return {
        "task": env.id, "policy": str(config.policy), "version": policy.version, "mode": policy.mode, "success": successes / n,
        "successes": successes, "n": n, "interval": [interval.low, interval.high], "method": "wilson 95 %",
        "seeds": [seeds[0], seeds[-1]], "mean_length": sum(o.length for o in outcomes) / n,
        "failed": [o.plan.seed for o in outcomes if not o.success],
    }  # fmt: skip
