"""Control steps per second of the shipped table-top tasks on one core, beside robosuite's Lift, and camera frames per second.

Prints one JSON object. Ours and robosuite (its own operational-space controller, 20 Hz control, 25 physics sub-steps) run in
turns in this one process; figures are medians over the rounds. On a machine that others use too, ``--clock cpu`` counts the
processor time of this process instead of wall time. robosuite is reported "absent" when it is not installed.

    python benchmarks/simulation_tabletop.py --rounds 5 --steps 400
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np  # noqa: E402

from robot_rl.sim.env import make_env, make_expert  # noqa: E402
from robot_rl.sim.tabletop import TASK_IDS  # noqa: E402
from robot_rl.sim.vector import make_vector  # noqa: E402

CLOCK = time.perf_counter


def one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def tabletop_steps(env_id: str, steps: int) -> Callable[[], float]:
    """Replays expert episodes (contacts, grasps and all); the expert's own time and resets are not counted."""
    env, recorded = make_env(env_id), []
    expert = make_expert(env)
    while sum(len(a) for _, a in recorded) < steps:
        seed = len(recorded)
        observation, _ = env.reset(seed=seed)
        expert.reset(env, np.random.default_rng(seed))
        actions, ended = [], False
        while not ended:
            actions.append(expert.act(observation))
            observation, _, terminated, truncated, _ = env.step(actions[-1])
            ended = terminated or truncated
        recorded.append((seed, actions))

    def run() -> float:
        spent, count = 0.0, 0
        for seed, actions in recorded:
            env.reset(seed=seed)
            started = CLOCK()
            for action in actions:
                env.step(action)
            spent += CLOCK() - started
            count += len(actions)
        return count / spent

    return run


def robosuite_steps(steps: int) -> Callable[[], float] | None:
    try:
        import robosuite
    except ImportError:
        return None
    import logging

    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    env = robosuite.make(
        "Lift", robots="Panda", has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False, control_freq=20,
        horizon=10**9, hard_reset=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    low, high = env.action_spec
    env.reset()
    for _ in range(5):
        env.step(np.zeros_like(low))  # compiles numba code
    count = max(20, steps // 4)

    def run() -> float:
        env.reset()
        actions = rng.uniform(low, high, (count, len(low))) * 0.5
        started = CLOCK()
        for action in actions:
            env.step(action)
        return count / (CLOCK() - started)

    return run


def camera_frames(env_id: str, frames: int) -> Callable[[], float] | None:
    try:
        env: Any = make_env(env_id, cameras=("front",), image_size=84)
        env.reset(seed=0)
    except Exception as error:  # no GL on this machine: the rest of the benchmark is still worth printing
        print(f"cameras skipped: {error}", file=sys.stderr)
        return None

    def run() -> float:
        started = CLOCK()
        for _ in range(frames):
            env._draw("front", 84, 84, fine=False)
        return frames / (CLOCK() - started)

    return run


def vector_steps(kind: str, n: int, steps: int) -> Callable[[], float]:
    vector = make_vector("tabletop/PegInsertion", n, kind, max_episode_steps=10**6)
    vector.reset_many({i: i for i in range(n)})
    actions = np.tile([0.0, 0.0, 0.0, 0.0, 0.08], (n, 1))

    def run() -> float:
        started = CLOCK()
        for _ in range(steps // n + 1):
            vector.step(actions)
        return n * (steps // n + 1) / (CLOCK() - started)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="control steps per round and task")
    parser.add_argument(
        "--vectors", action="store_true", help="also 8 environments in turns, threads and processes on all cores"
    )
    args = parser.parse_args()
    global CLOCK
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out: dict[str, Any] = {
        "benchmark": "simulation_tabletop",
        "clock": args.clock,
        "rounds": args.rounds,
        "cores_available": cores,
    }
    if args.vectors:
        runs = {kind: vector_steps(kind, 8, args.steps) for kind in ("serial", "threads", "processes")}
        rates: dict[str, list[float]] = {k: [] for k in runs}
        for _ in range(args.rounds):
            for kind, run in runs.items():
                rates[kind].append(run())
        out["vector_of_8_steps_per_second"] = {k: round(statistics.median(v), 1) for k, v in rates.items()}
    one_core()
    if args.clock == "cpu":
        CLOCK = time.process_time
    tasks: dict[str, Callable[[], float] | None] = {env_id: tabletop_steps(env_id, args.steps) for env_id in TASK_IDS}
    tasks["robosuite Lift"] = robosuite_steps(args.steps)
    tasks |= {f"frames {env_id}": camera_frames(env_id, max(50, args.steps // 4)) for env_id in TASK_IDS}
    results: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(args.rounds):
        for name, task in tasks.items():
            if task is not None:
                results[name].append(task())
    median = {name: round(statistics.median(v), 1) if v else None for name, v in results.items()}
    shown: dict[str, Any] = {name: "absent" if v is None else v for name, v in median.items()}
    peer = median["robosuite Lift"]
    out["steps_per_second"] = {n: shown[n] for n in (*TASK_IDS, "robosuite Lift")}
    out["times_robosuite_lift"] = {n: round((median[n] or 0.0) / peer, 2) if peer else "absent" for n in TASK_IDS}
    out["frames_per_second_84x84"] = {n: shown[f"frames {n}"] for n in TASK_IDS}
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
