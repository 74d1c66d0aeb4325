"""robosuite's own control loop against the compiled one: control steps per second in turns, state differences, cameras.

    python benchmarks/simulation_robosuite.py [--steps 200] [--rounds 5] [--tasks Lift Can Square Door] [--cameras]

Prints one JSON object. Both sides run the same robosuite environment on the same actions from the same start; "physics" is
``mj_step`` alone on the same scene. ``difference_from_own`` is the largest absolute difference of any position (m, rad)
and any velocity over whole episodes of random and, where there is an operator, of scripted actions. "fast" is the
default, "approximate" the cheaper solver.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from typing import Any

import numpy as np


def actions_of(env: Any, seed: int, steps: int, kind: str) -> np.ndarray:
    """(steps, 7): correlated random actions, or what the scripted operator does."""
    from robot_rl.sim.env import make_expert

    rng = np.random.default_rng(seed)
    if kind == "random":
        rows, action = [], np.zeros(7)
        for _ in range(steps):
            action = np.clip(0.8 * action + 0.6 * rng.uniform(-1, 1, 7), -1, 1)
            rows.append(action)
        return np.array(rows)
    expert = make_expert(env, noise=0.1)
    observation, _ = env.reset(seed=seed)
    expert.reset(env, rng)
    rows = []
    for _ in range(steps):
        rows.append(expert.act(observation))
        observation, _, terminated, truncated, _ = env.step(rows[-1])
        if terminated or truncated:
            break
    return np.array(rows, np.float64)


def run(env: Any, seed: int, actions: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Seconds, positions and velocities of one episode."""
    env.reset(seed=seed)
    data = env.unwrapped.sim.data._data
    positions, velocities, spent = [], [], 0.0
    for action in actions:
        start = time.perf_counter()
        env.step(action)
        spent += time.perf_counter() - start
        positions.append(data.qpos.copy())
        velocities.append(data.qvel.copy())
    return spent, np.array(positions), np.array(velocities)


def task(name: str, steps: int, rounds: int, episodes: int) -> dict[str, Any]:
    import mujoco

    from robot_rl.sim.env import make_env

    options = {"success_terminates": False, "max_episode_steps": 10_000}
    own, fast, rough = (make_env(f"robosuite/{name}", fast=f, **options) for f in (False, True, "approximate"))
    for env in (fast, rough):
        run(env, 0, np.zeros((1, 7)))  # compiles, or loads what was compiled before
    times: dict[str, list[float]] = {"own": [], "fast": [], "approximate": [], "physics": []}
    difference: dict[str, dict[str, float]] = {}
    for i in range(rounds):
        actions = actions_of(fast, i, steps, "random")
        for key, env in (("own", own), ("fast", fast), ("approximate", rough)):
            times[key].append(run(env, i, actions)[0] / len(actions))
        core = fast.unwrapped.sim
        start = time.perf_counter()
        mujoco.mj_step(core.model._model, core.data._data, nstep=25 * steps)
        times["physics"].append((time.perf_counter() - start) / steps)
    for kind in ("random", "scripted"):
        for i in range(episodes):
            try:
                actions = actions_of(fast, i, fast_limit(name), kind)
            except ValueError:
                continue  # no operator for this task
            reference = run(own, i, actions)
            for key, env in (("fast", fast), ("approximate", rough)):
                _, positions, velocities = run(env, i, actions)
                record = difference.setdefault(f"{key}, {kind}", {"position": 0.0, "velocity": 0.0, "episodes": 0})
                record["position"] = max(record["position"], float(np.abs(reference[1] - positions).max()))
                record["velocity"] = max(record["velocity"], float(np.abs(reference[2] - velocities).max()))
                record["episodes"] += 1
    rate = {key: 1.0 / statistics.median(values) for key, values in times.items()}
    ratio = {
        key: statistics.median(o / f for o, f in zip(times["own"], times[key], strict=True)) for key in ("fast", "approximate")
    }
    return {"steps_per_second": rate, "times_own": ratio, "difference_from_own": difference}


def fast_limit(name: str) -> int:
    from robot_rl.sim.robosuite.env import SHIPPED

    return SHIPPED[name].max_episode_steps


def cameras(frames: int) -> dict[str, float]:
    """84x84 frames per second of robosuite's Lift, as robosuite makes them and with the expensive effects off."""
    from robot_rl.sim.env import make_env

    rates = {}
    for key, fast in (("robosuite_default", False), ("switched", True)):
        env = make_env("robosuite/Lift", render_fast=fast)
        env.reset(seed=0)
        env.render(width=84, height=84)
        times = []
        for _ in range(frames):
            start = time.perf_counter()
            env.render(width=84, height=84)
            times.append(time.perf_counter() - start)
        rates[key] = 1.0 / statistics.median(times)
        env.close()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="control steps timed a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=3, help="whole episodes compared, of each kind")
    parser.add_argument("--tasks", nargs="+", default=["Lift", "Can", "Square", "Door"])
    parser.add_argument("--cameras", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    os.environ.setdefault("MUJOCO_GL", "egl")
    result: dict[str, Any] = {"benchmark": "simulation_robosuite"}
    if importlib.util.find_spec("robosuite") is None:
        result["robosuite"] = "absent"
    else:
        result["tasks"] = {t: task(t, arguments.steps, arguments.rounds, arguments.episodes) for t in arguments.tasks}
        if arguments.cameras:
            result["camera_frames_per_second"] = cameras(15)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
