"""Microseconds per call of the safety filter on a 7-dimensional action, for growing sets of rules. Prints one JSON object."""

from __future__ import annotations

import json
import statistics
import time

import numpy as np

from robot_rl.runtime.safety import SafetyConfig, SafetyFilter
from robot_rl.types import ActionSpec

CALLS, ROUNDS = 2000, 7


def main() -> None:
    spec = ActionSpec((-1.0,) * 7, (1.0,) * 7, kind=("continuous",) * 6 + ("gripper_continuous",))
    limits = {"velocity": [2.0] * 6 + [float("inf")], "acceleration": [40.0] * 6 + [float("inf")]}
    cases = {
        "finite, position, staleness": SafetyConfig(max_observation_age_s=0.2),
        "and velocity, step jump": SafetyConfig(max_observation_age_s=0.2, velocity=limits["velocity"]),
        "and acceleration, jerk, chunk rate": SafetyConfig(
            max_observation_age_s=0.2, jerk=[2000.0] * 6 + [float("inf")], chunk_rate=[4.0] * 7, **limits
        ),
    }
    t = np.arange(CALLS)[:, None] / 50.0
    smooth = (0.3 * np.sin(t * np.linspace(0.3, 0.8, 7)) * np.minimum(1, t / 4) ** 3).astype(np.float32)
    wild = np.random.default_rng(0).uniform(-1, 1, smooth.shape).astype(np.float32)
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, config in cases.items():
            for stream, commands in (("legal", smooth), ("random", wild)):
                checker = SafetyFilter(config, spec, 50.0)
                checker.reset(0, np.zeros(7))
                started = time.perf_counter()
                for k, command in enumerate(commands):
                    checker.filter(command, now_ns=k * 20_000_000, observation_stamp_ns=k * 20_000_000)
                times.setdefault(f"{name}; {stream} commands", []).append((time.perf_counter() - started) / CALLS * 1e6)
    print(
        json.dumps({"unit": "us per call, median", "dim": 7, **{k: round(statistics.median(v), 2) for k, v in times.items()}})
    )


if __name__ == "__main__":
    main()
