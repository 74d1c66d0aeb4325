"""What a policy server adds to a decision: robots at their own rate against one server, and the same decisions made locally.

Robots are processes of their own. A decision is what a robot with a latent-noise head asks: encode, then sample. Latency is measured
at the robot from the question to the chunk; ``added`` is what is beyond the local median. Local and served rounds take turns; figures
are medians over the rounds. Prints one JSON object.

    python benchmarks/policy_server.py                      # 8 robots at 20 Hz
    python benchmarks/policy_server.py --robots 16 --hz 10
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
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


def robot(address: str, hz: float, seconds: float, number: int) -> None:
    """One robot: for every line on standard input a round, and its latencies in ms on standard output."""
    torch.set_num_threads(1)
    policy = load_policy(address)
    rng = np.random.default_rng(number)
    period = 1.0 / hz
    print("ready", flush=True)
    for _ in sys.stdin:
        latencies, start = [], time.perf_counter() + rng.uniform(0, period)
        for i in range(int(seconds * hz)):
            due = start + i * period
            time.sleep(max(0.0, due - time.perf_counter()))
            observation = {STATE: torch.from_numpy(rng.normal(size=(1, 1, 18)).astype(np.float32))}
            noise = torch.from_numpy(rng.normal(size=(1, 8, 5)).astype(np.float32))
            began = time.perf_counter()
            policy.sample(policy.encode(observation), noise)
            latencies.append((time.perf_counter() - began) * 1e3)
        print(json.dumps(latencies), flush=True)


class Fleet:
    """``robot-rl serve`` and its robots, which wait to be told when a round begins."""

    def __init__(self, policy: Path, robots: int, hz: float, seconds: float) -> None:
        command = [
            sys.executable,
            "-m",
            "robot_rl.cli",
            "serve",
            str(policy),
            "--port=0",
            "--device=cpu",
            "--threads=1",
            "--json",
        ]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        address = json.loads(self.server.stdout.readline())["serving"]
        self.watch = RemotePolicy(*parse(address)[1:])
        command = [sys.executable, __file__, "--robot", address, "--hz", str(hz), "--seconds", str(seconds)]
        self.children = [
            subprocess.Popen([*command, "--number", str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for i in range(robots)
        ]
        self._answers()

    def _answers(self) -> list[str]:
        answers = []
        for child in self.children:
            assert child.stdout is not None
            answers.append(child.stdout.readline())
        return answers

    def round(self) -> dict[str, Any]:
        before = self.watch.status()
        for child in self.children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        latencies = [x for answer in self._answers() for x in json.loads(answer)]
        counts = self.watch.status()
        asked, calls = (counts[n] - before[n] for n in ("questions", "batches"))
        return {"ms": latencies, "asked": asked, "calls": calls, "largest_batch": counts["largest"]}

    def close(self) -> None:
        for child in self.children:
            assert child.stdin is not None
            child.stdin.close()
            child.wait(20)
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
    parser.add_argument("--robot", default="", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.robot:
        return robot(given.robot, given.hz, given.seconds, given.number)
    torch.set_num_threads(1)
    policy = make_policy()
    local(policy, 50)
    rounds = []
    folder = tempfile.TemporaryDirectory()
    save_policy(policy, Path(folder.name) / "policy")
    fleet = Fleet(Path(folder.name) / "policy", given.robots, given.hz, given.seconds)
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
                **medians,
                "added_p99_ms_each": [round(float(r["added_p99_ms"]), 2) for r in rounds],
            }
        )
    )


if __name__ == "__main__":
    main()
