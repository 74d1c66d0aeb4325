"""How many updates a second does post-training make? One DSRL-NA update as the quickstart does them, batch and all networks.

    python benchmarks/learner_dsrl.py --threads 1 --seconds 3 --rounds 5

The base is a compact diffusion policy (width 256, depth 3, 4 DDIM steps, chunks of 8 x 7, 26 state variables), the critics are 4
LayerNorm networks 2x256, the batch has 192 windows; an update is a critic step, every second time a step of the noise critic
(which asks the base for chunks), and a step of the actor. Our two code paths run in turns in one process; published DSRL
code has no CPU path to compare with. ``--profile`` prints where the time of the torch operations goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's robot_rl, installed or not
BATCH, STATE, ACTION, HORIZON = 192, 26, 7, 8


def make(algorithm_changes: dict[str, Any]) -> Callable[[], Any]:
    import torch

    from robot_rl.heads.config import LatentNoiseConfig
    from robot_rl.heads.latent_noise import LatentNoiseHead
    from robot_rl.learners.batch import Batch
    from robot_rl.learners.config import OffPolicyConfig
    from robot_rl.learners.off_policy import OffPolicyLearner
    from robot_rl.policies.checkpoint import build_policy
    from robot_rl.policies.config import CompactPolicyConfig
    from robot_rl.policies.normalizer import Normalizer
    from robot_rl.types import ActionSpec, FeatureSpec

    torch.manual_seed(0)
    name = "observation.state"
    features = {name: FeatureSpec((STATE,))}
    action = ActionSpec((-1.0,) * ACTION, (1.0,) * ACTION)
    unit = np.ones(ACTION, np.float32)
    normalizer = Normalizer(features, {name: np.zeros(STATE)}, {name: np.ones(STATE)}, -unit, unit)
    shape = CompactPolicyConfig(horizon=HORIZON, n_action_steps=HORIZON, width=256, depth=3, num_steps=4)
    base = build_policy(shape, features, action, normalizer).freeze()
    head = LatentNoiseHead(base, LatentNoiseConfig(hidden=(256, 256)), generator=torch.Generator().manual_seed(0))
    config = OffPolicyConfig(
        n_critics=4, hidden=(256, 256), tau=0.01, critic_lr=5e-4, actor_lr=5e-4, initial_alpha=0.01, value_min=0.0,
        value_max=1.0, **algorithm_changes,
    )  # fmt: skip
    learner = OffPolicyLearner(base, head, config)
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    batch = Batch(
        rows(STATE), rows(HORIZON, ACTION).tanh(), rows().gt(1.0).float(), torch.full((BATCH,), 0.9), rows(STATE),
        torch.ones(BATCH),
    )  # fmt: skip
    return lambda: learner.update(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="timed per path and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    a = parser.parse_args()
    import torch

    from robot_rl.nn import compiled

    torch.set_num_threads(a.threads)
    update = make({})
    paths: tuple[compiled.Path, ...] = ("compiled", "torch") if compiled.unavailable() is None else ("torch",)
    rates: dict[str, dict[str, list[float]]] = {p: {"updates_per_second": [], "updates_per_cpu_second": []} for p in paths}
    for path in paths:
        with compiled.use(path):
            start = time.perf_counter()
            update()
            print(f"{path}: first update after {time.perf_counter() - start:.2f} s", file=sys.stderr)
            if a.profile:
                with torch.profiler.profile() as profile:
                    for _ in range(20):
                        update()
                print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)
    for _ in range(a.rounds):
        for path in paths:
            with compiled.use(path):
                count, start, cpu = 0, time.perf_counter(), time.process_time()
                while (elapsed := time.perf_counter() - start) < a.seconds:
                    update()
                    count += 1
                rates[path]["updates_per_second"].append(count / elapsed)
                rates[path]["updates_per_cpu_second"].append(count / (time.process_time() - cpu))
    medians = {p: {k: round(statistics.median(v), 2) for k, v in r.items()} for p, r in rates.items()}
    report = {"benchmark": "learner_dsrl", "batch": BATCH, "threads": a.threads, "paths": medians}
    if len(paths) == 2:
        report["cpu_ratio"] = round(
            medians["compiled"]["updates_per_cpu_second"] / medians["torch"]["updates_per_cpu_second"], 2
        )
    else:
        report["compiled"] = f"absent: {compiled.unavailable()}"
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
