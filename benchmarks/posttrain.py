"""Post-training runs over several seeds as one JSON table: base, result, steps to 50, 75 and 90 %, the lowest point, wall time.

    python benchmarks/posttrain.py --config configs/adroit_door.yaml --seeds 0 1 2 --runs runs/adroit [--key.path=value ...]

Runs that have finished are only read, unfinished ones resume, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from robot_rl.evaluation.results import read_jsonl
from robot_rl.evaluation.statistics import hierarchical_bootstrap


def run_one(config: str, seed: int, folder: Path, threads: int, rest: list[str]) -> dict[str, Any]:
    """One run in a process of its own (its log beside the run folder); returns its result, or why there is none."""
    result = folder / "result.json"
    if not result.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "robot_rl.cli",
            "train",
            "--config",
            config,
            f"--run_dir={folder}",
            f"--seed={seed}",
            *rest,
        ]
        with folder.with_suffix(".log").open("ab") as log:
            code = subprocess.run(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
            ).returncode
        if code != 0:
            return {"seed": seed, "failed": f"exit code {code}; see {folder.with_suffix('.log')}"}
    data = json.loads(result.read_text())
    keys = ("base", "policy", "env_steps", "gate_steps", "evaluation_steps", "updates", "wall_seconds", "steps_to")
    return {"seed": seed, **{k: data[k] for k in keys}, "lowest_acting_minus_base": data["lowest_acting_minus_base"]}


def outcomes(folder: Path, who: str) -> list[bool]:
    return [bool(line["success"]) for line in read_jsonl(folder / "episodes.jsonl") if line["who"] == who]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    arguments, rest = parser.parse_known_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.parallel)
    folders = {seed: arguments.runs / f"seed{seed}" for seed in arguments.seeds}
    with ThreadPoolExecutor(arguments.parallel) as pool:
        rows = list(pool.map(lambda seed: run_one(arguments.config, seed, folders[seed], threads, rest), arguments.seeds))
    done = [row["seed"] for row in rows if "failed" not in row]
    table: dict[str, Any] = {"benchmark": "posttrain", "config": arguments.config, "runs": rows}
    for who in ("base", "policy"):
        if done:
            by_seed = {seed: outcomes(folders[seed], who) for seed in done}
            interval = hierarchical_bootstrap(by_seed)
            played = [o for group in by_seed.values() for o in group]
            table[who] = {"success": sum(played) / len(played), "n": len(played), "interval": [interval.low, interval.high]}
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
