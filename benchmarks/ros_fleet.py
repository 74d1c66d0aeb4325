"""A fleet on one machine: N simulated robots and one learner, as ``robot-rl up fleet`` starts them.

``python benchmarks/ros_fleet.py [--robots 4] [--seconds 120] [--versions 10]``: first one robot, then N, for the same time. Prints one
JSON object: from the publication of a version to the moment each robot's diagnostics say that it acts (``swap_at: chunk``; bar 2 s),
episodes a minute against N times one robot (bar 90 %), and how busy the processors were. Where the throughput falls short, a
saturated machine (``cpu_busy`` near 1) is the reason, or there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ros")]
START_S = 400.0
BAR_S = 2.0
PARAMETERS = """
/**:
  ros__parameters: {diagnostics_hz: 10.0}
/**/policy_node:
  ros__parameters: {configure_timeout_s: 300.0, warmup_forwards: 1}
/**/monitor_node:
  ros__parameters: {configure_timeout_s: 300.0, silence_s: 30.0}
"""
RECIPE = """
extends: {quickstart}
demos: {{prefill: false}}
threads: 1
schedule: {{warmup_steps: 10000000}}
learner_process: {{threads: 1}}
"""
"""The learner follows the stores and learns nothing: versions are published by the benchmark, at instants that it knows."""


class Fleet:
    """One running fleet, watched."""

    def __init__(self, folder: Path, robots: int, episode_s: float) -> None:
        from policy_kit import write_run

        from robot_rl.paths import find_config
        from robot_rl.ros.graph import graph

        folder.mkdir(parents=True)
        self.folder, self.names = folder, [f"robot_{i}" for i in range(robots)]
        self.policy = write_run(folder / "base") / "base"
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE.format(quickstart=find_config("quickstart")))
        (folder / "parameters.yaml").write_text(PARAMETERS)
        given = {
            "policy": str(self.policy), "run_dir": str(folder / "run"), "recipe": str(self.recipe), "gate": "false", "http_port": "0",
            "env": "tabletop/Lift", "robots": ",".join(self.names), "max_episode_s": f"{episode_s:g}", "swap_at": "chunk",
            "params_file": str(folder / "parameters.yaml"),
        }  # fmt: skip
        self.specs = graph("fleet").build(given)
        self.lines: list[str] = []
        self.stack = ExitStack()

    def __enter__(self) -> Fleet:
        import fault_watch
        from fault_kit import Processes
        from graph_kit import own_domain

        self.supervisor = Processes(self.specs, lambda line: self.lines.append(line), {})
        self.stack.callback(self.supervisor.stop)
        self.stack.enter_context(own_domain())
        self.watches = {name: fault_watch.Watch("sim_arm", name) for name in self.names}
        for watch in self.watches.values():
            self.stack.callback(watch.close)
        self.supervisor.start()
        end = time.monotonic() + START_S
        moved: set[str] = set()  # not all at once: between episodes a robot stands still
        while not (len(moved) == len(self.watches) and self.learner_is_up()):
            moved |= {name for name, watch in self.watches.items() if watch.moving()}
            if time.monotonic() > end:
                print("\n".join(self.lines[-80:]), file=sys.stderr)
                self.stack.close()
                raise RuntimeError(
                    f"within {START_S:.0f} s only {sorted(moved)} moved; the learner is up: {self.learner_is_up()}"
                )
            time.sleep(0.2)
        return self

    def learner_is_up(self) -> bool:
        """Whether its node has said where it serves weights: before that nobody can hear of a version."""
        return any("learner_node" in line and "endpoint" in line for line in self.lines)

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def version(self, name: str) -> int:
        return int(self.watches[name].figure("policy_node: weights", "version") or 0)

    def publish(self, seed: int) -> int:
        """A version of the head, slightly another one each time."""
        from fault_data import head

        from robot_rl.runtime.weights import WeightChannel

        tensors, base = head(self.policy, self.recipe, seed)
        channel = WeightChannel(self.folder / "run" / "weights")
        parent = channel.latest() or 0
        return channel.publish(tensors, parent=parent, base_hash=base.spec.base_hash, stats_hash=base.spec.stats_hash).version

    def acting_after(self, version: int, since: float, patience_s: float = 30.0) -> dict[str, float | None]:
        """Seconds until each robot says that the version acts (read ten times a second)."""
        found: dict[str, float | None] = dict.fromkeys(self.names)
        while time.monotonic() - since < patience_s and None in found.values():
            for name in self.names:
                if found[name] is None and self.version(name) >= version:
                    found[name] = round(time.monotonic() - since, 3)
            time.sleep(0.01)
        return found

    def episodes(self) -> int:
        return sum(len(w.committed) for w in self.watches.values())


def busy() -> tuple[float, float]:
    """(seconds busy, seconds in all) of all processors since boot."""
    words = [int(w) for w in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return float(sum(words) - words[3] - words[4]), float(sum(words))


def measure(folder: Path, robots: int, seconds: float, versions: int, episode_s: float) -> dict[str, Any]:
    with Fleet(folder, robots, episode_s) as fleet:
        time.sleep(3.0)
        delays: list[float] = []
        missing = 0
        for seed in range(versions):
            began = time.monotonic()
            version = fleet.publish(seed)
            published = time.monotonic()
            after = fleet.acting_after(version, published)
            delays += [d for d in after.values() if d is not None]
            missing += sum(d is None for d in after.values())
            print(
                f"{robots} robots, version {version} ({published - began:.2f} s to write): acts after {after}", file=sys.stderr
            )
            time.sleep(1.0)
        before, cpu, since = fleet.episodes(), busy(), time.monotonic()
        time.sleep(seconds)
        took, now = time.monotonic() - since, busy()
        done = fleet.episodes() - before
        gaps = {
            n: round(w.longest_gap_s(time.time_ns() - int(seconds * 1e9), time.time_ns()), 3) for n, w in fleet.watches.items()
        }
        restarts = {n: p.restarts for n, p in fleet.supervisor.processes.items() if p.restarts}
        above = sum(len(w.check_limits().wrong) for w in fleet.watches.values())
    return {
        "robots": robots, "episodes": done, "episodes_per_minute": 60.0 * done / took, "cpu_busy": (now[0] - cpu[0]) / (now[1] - cpu[1]),
        "acts_after_s": _quantiles(delays), "robots_that_missed_a_version": missing, "longest_gap_s": gaps, "restarts": restarts,
        "commands_above_limits": above,
    }  # fmt: skip


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"p50": float(np.median(values)), "p99": float(np.quantile(values, 0.99)), "max": max(values), "n": len(values)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--robots", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--versions", type=int, default=10)
    parser.add_argument("--episode-s", type=float, default=5.0)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ros_fleet_") as folder:
        one = measure(Path(folder) / "one", 1, given.seconds, given.versions, given.episode_s)
        many = measure(Path(folder) / "many", given.robots, given.seconds, given.versions, given.episode_s)
    share = many["episodes_per_minute"] / (given.robots * one["episodes_per_minute"]) if one["episodes"] else 0.0
    acts = many["acts_after_s"]
    print(json.dumps({
        "one": one, "many": many, "throughput_of_n_times_one": share, "bars": {"acts_after_s": BAR_S, "throughput": 0.9},
        "acts_in_time": acts is not None and acts["max"] <= BAR_S and not many["robots_that_missed_a_version"],
        "throughput_met": share >= 0.9, "cpu_saturated": many["cpu_busy"] >= 0.95, "cores": os.cpu_count(), "load_before": load,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
