"""What a policy server adds to a decision: robots at their own rate against one server, and the same decisions made locally.

Robots are processes of their own. A decision is what a robot with a latent-noise head asks: encode, then sample. Latency is measured
at the robot from the question to the chunk; ``added`` is what is beyond the local median. Local and served rounds take turns; figures
are medians over the rounds. Prints one JSON object.

    python benchmarks/policy_server.py                      # 8 robots at 20 Hz
    python benchmarks/policy_server.py --priority rt        # robot-rl serve --priority rt
    python benchmarks/policy_server.py --robots 16 --hz 10
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robot_rl.policies.checkpoint import build_policy, save_policy
from robot_rl.policies.compact import CompactPolicy
from robot_rl.policies.config import CompactPolicyConfig
from robot_rl.policies.loading import load_policy
from robot_rl.policies.normalizer import Normalizer
from robot_rl.policies.remote.client import RemotePolicy
from robot_rl.policies.remote.connecting import parse
from robot_rl.types import ActionSpec, FeatureSpec

STATE = "observation.state"


def make_policy() -> CompactPolicy:
    features, action = {STATE: FeatureSpec((18,))}, ActionSpec((-1,) * 5, (1,) * 5)
    normalizer = Normalizer(features, {STATE: np.zeros(18)}, {STATE: np.ones(18)}, np.array(action.low), np.array(action.high))
    torch.manual_seed(0)
    config = CompactPolicyConfig(kind="diffusion", horizon=8, n_action_steps=8, width=256, depth=3, num_steps=4)
    return build_policy(config, features, action, normalizer).freeze()


def robot(address: str, hz: float, seconds: float, number: int, line: Connection) -> None:
    """One robot: for every word that comes down the line a round, and its latencies in ms back."""
    torch.set_num_threads(1)
    policy = load_policy(address)
    rng = np.random.default_rng(number)
    period = 1.0 / hz
    line.send("ready")
    while line.recv() == "go":
        latencies, start = [], time.perf_counter() + rng.uniform(0, period)
        for i in range(int(seconds * hz)):
            due = start + i * period
            time.sleep(max(0.0, due - time.perf_counter()))
            observation = {STATE: torch.from_numpy(rng.normal(size=(1, 1, 18)).astype(np.float32))}
            noise = torch.from_numpy(rng.normal(size=(1, 8, 5)).astype(np.float32))
            began = time.perf_counter()
            policy.sample(policy.encode(observation), noise)
            latencies.append((time.perf_counter() - began) * 1e3)
        line.send(latencies)


class Fleet:
    """``robot-rl serve`` and its robots, which wait to be told when a round begins."""

    def __init__(self, policy: Path, robots: int, hz: float, seconds: float, priority: str) -> None:
        command = [
            sys.executable,
            "-m",
            "robot_rl.cli",
            "serve",
            str(policy),
            "--port=0",
            "--device=cpu",
            "--threads=1",
            f"--priority={priority}",
            "--json",
        ]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        told = json.loads(self.server.stdout.readline())
        address, self.priority = told["serving"], told["priority"]
        self.watch = RemotePolicy(*parse(address)[1:])
        robots_of = multiprocessing.get_context("forkserver")  # which imports torch once, not once a robot
        robots_of.set_forkserver_preload(["torch", "robot_rl.policies.checkpoint", "robot_rl.policies.remote.client"])
        self.lines, self.children = [], []
        for i in range(robots):
            mine, theirs = robots_of.Pipe()
            self.lines.append(mine)
            self.children.append(robots_of.Process(target=robot, args=(address, hz, seconds, i, theirs)))
            self.children[-1].start()
        assert [line.recv() for line in self.lines] == ["ready"] * robots

    def round(self) -> dict[str, Any]:
        before = self.watch.status()
        for line in self.lines:
            line.send("go")
        latencies = [x for line in self.lines for x in line.recv()]
        counts = self.watch.status()
        asked, calls = (counts[n] - before[n] for n in ("questions", "batches"))
        return {"ms": latencies, "asked": asked, "calls": calls, "largest_batch": counts["largest"]}

    def close(self) -> None:
        for line, child in zip(self.lines, self.children, strict=True):
            line.send("stop")
            child.join(20)
        self.watch.close()
        self.server.terminate()
        self.server.wait(20)


def stolen_ms() -> float:
    """Processor time that a virtual machine's host has kept for itself since it started, of all processors; 0 elsewhere."""
    try:
        return 1e3 * int(Path("/proc/stat").read_text().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


def local(policy: CompactPolicy, count: int) -> list[float]:
    rng, out = np.random.default_rng(0), []
    for _ in range(count):
        observation = {STATE: torch.from_numpy(rng.normal(size=(1, 1, 18)).astype(np.float32))}
        noise = torch.from_numpy(rng.normal(size=(1, 8, 5)).astype(np.float32))
        began = time.perf_counter()
        policy.sample(policy.encode(observation), noise)
        out.append((time.perf_counter() - began) * 1e3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robots", type=int, default=8)
    parser.add_argument("--hz", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--priority", choices=("normal", "rt"), default="normal", help="of the server, see robot-rl serve --help"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    policy = make_policy()
    local(policy, 50)
    rounds = []
    folder = tempfile.TemporaryDirectory()
    save_policy(policy, Path(folder.name) / "policy")
    fleet = Fleet(Path(folder.name) / "policy", given.robots, given.hz, given.seconds, given.priority)
    for _ in range(given.rounds):
        own = statistics.median(local(policy, 500))
        before = stolen_ms()
        found = fleet.round()
        stolen = (stolen_ms() - before) / given.seconds
        ms = np.array(found.pop("ms"))
        rounds.append(
            {
                "local_ms": own, "served_p50_ms": np.percentile(ms, 50), "served_p99_ms": np.percentile(ms, 99), "served_max_ms": ms.max(),
                "added_p50_ms": np.percentile(ms, 50) - own, "added_p99_ms": np.percentile(ms, 99) - own,
                "stolen_ms_a_second": stolen, "decisions": len(ms), **found,
            }
        )  # fmt: skip
    fleet.close()
    folder.cleanup()
    medians = {k: round(float(statistics.median(r[k] for r in rounds)), 3) for k in rounds[0]}
    print(
        json.dumps(
            {
                "robots": given.robots,
                "hz": given.hz,
                "rounds": given.rounds,
                "priority": fleet.priority,
                **medians,
                "added_p99_ms_each": [round(float(r["added_p99_ms"]), 2) for r in rounds],
            }
        )
    )


if __name__ == "__main__":
    main()
