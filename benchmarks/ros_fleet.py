"""A fleet on one machine: N simulated robots and one learner, as ``robot-rl up fleet`` starts them.

``python benchmarks/ros_fleet.py [--robots 4] [--seconds 120] [--versions 10]``: first one robot, then N, for the same time. Prints one
JSON object: from the publication of a version to the moment from which it acts on each robot (``swap_at: chunk``; bar 2 s; the stamp in
the robot's ``episode_status``), whole episodes a minute against N times one robot (bar 90 %), and how busy the processors were. Where the
throughput falls short, a saturated machine (``cpu_busy`` near 1) is the reason, or there is none. The observer is small, because it
runs on the same processors: it hears episode states and the arm's commands, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from host_steal import Stolen

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ros")]
START_S = 400.0
BAR_S = 2.0
PAUSE_S = 0.2
WHOLE = ("timeout", "task")
"""Ends of episodes that ran their course; one that the guard or a stale sensor cut short does not count."""
PARAMETERS = """
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


@dataclass
class Robot:
    """What was heard of one robot. Times are of the wall clock, ns, and of the sender."""

    episode_state: str = ""
    acting: dict[int, int] = field(default_factory=dict)  # version: since when
    ends: dict[str, str] = field(default_factory=dict)  # recorded episode: why it ended
    sent: list[int] = field(default_factory=list)
    where: list[tuple[float, float, float]] = field(default_factory=list)

    def moved(self) -> bool:
        return self.episode_state == "running" and len(set(self.where[-10:])) > 3

    def longest_gap_s(self, since_ns: int) -> float:
        return float(np.diff([t for t in self.sent if t >= since_ns]).max(initial=0)) / 1e9

    def steps_above(self, metres: float) -> int:
        """Commands farther from the one before than the tool may go in a period; not the first after a pause."""
        n = min(len(self.where), len(self.sent))  # both grow meanwhile
        far = np.linalg.norm(np.diff(np.array(self.where[:n]).reshape(n, 3), axis=0), axis=1) > metres
        return int((far & (np.diff(self.sent[:n]) < PAUSE_S * 1e9)).sum())


class Observer:
    """One node for the whole fleet, in a thread of its own."""

    def __init__(self, names: Sequence[str]) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from geometry_msgs.msg import PoseStamped
        from rclpy.experimental import EventsExecutor
        from rclpy.signals import SignalHandlerOptions

        from robot_rl.ros import qos

        self.context = rclpy.Context()
        rclpy.init(context=self.context, signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node("fleet_observer", context=self.context)
        self.robots = {name: Robot() for name in names}
        for name, robot in self.robots.items():
            self.node.create_subscription(
                DiagnosticArray,
                f"/{name}/episode_status",
                partial(self._status, robot),
                qos.profile("reliable", "transient_local", 50),
            )
            self.node.create_subscription(
                PoseStamped, f"/{name}/target_pose", partial(self._command, robot), qos.profile("reliable", "volatile", 500)
            )
        self._executor = EventsExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    @staticmethod
    def _status(robot: Robot, message: Any) -> None:
        from robot_rl.ros.conversion import from_stamp, read_records
        from robot_rl.wire import EpisodeStatus

        for status in read_records(message, EpisodeStatus):
            robot.episode_state = status.state
            robot.acting.setdefault(status.weights_version or 0, from_stamp(message.header.stamp))
            if status.state == "committed":
                robot.ends[status.episode_id] = status.end_reason or ""

    @staticmethod
    def _command(robot: Robot, message: Any) -> None:
        from robot_rl.ros.conversion import from_stamp

        robot.sent.append(from_stamp(message.header.stamp))
        p = message.pose.position
        robot.where.append((p.x, p.y, p.z))

    def _spin(self) -> None:
        while not self._stop.is_set():
            self._executor.spin_once(timeout_sec=0.1)

    def close(self) -> None:
        import rclpy

        self._stop.set()
        self._thread.join(2.0)
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


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
        from fault_kit import Processes
        from graph_kit import own_domain

        self.supervisor = Processes(self.specs, lambda line: self.lines.append(line), {})
        self.stack.callback(self.supervisor.stop)
        self.stack.enter_context(own_domain())
        observer = Observer(self.names)
        self.stack.callback(observer.close)
        self.robots = observer.robots
        self.supervisor.start()
        end = time.monotonic() + START_S
        moved: set[str] = set()  # not all at once: between episodes a robot stands still
        while not (len(moved) == len(self.robots) and self.learner_is_up()):
            moved |= {name for name, robot in self.robots.items() if robot.moved()}
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

    def publish(self, seed: int) -> int:
        """A version of the head, slightly another one each time."""
        from fault_data import head

        from robot_rl.runtime.weights import WeightChannel

        tensors, base = head(self.policy, self.recipe, seed)
        channel = WeightChannel(self.folder / "run" / "weights")
        parent = channel.latest() or 0
        return channel.publish(tensors, parent=parent, base_hash=base.spec.base_hash, stats_hash=base.spec.stats_hash).version

    def acting_after(self, version: int, since_ns: int, patience_s: float = 30.0) -> dict[str, float | None]:
        """Seconds until the version acts on each robot."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end and not all(version in r.acting for r in self.robots.values()):
            time.sleep(0.05)
        return {
            n: round((r.acting[version] - since_ns) / 1e9, 3) if version in r.acting else None for n, r in self.robots.items()
        }

    def episodes(self) -> Counter[str]:
        """Recorded episodes by what ended them."""
        return Counter(end for r in self.robots.values() for end in r.ends.values())


def busy() -> tuple[float, float]:
    """(seconds busy, seconds in all) of all processors since boot."""
    words = [int(w) for w in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return float(sum(words) - words[3] - words[4]), float(sum(words))


def measure(folder: Path, robots: int, seconds: float, versions: int, episode_s: float) -> dict[str, Any]:
    from robot_rl.robots.description import load_robot

    with Fleet(folder, robots, episode_s) as fleet:
        time.sleep(3.0)
        stolen, since_start = Stolen(), time.monotonic()
        delays: list[float] = []
        missing = 0
        for seed in range(versions):
            began = time.monotonic()
            version = fleet.publish(seed)
            published, published_ns = time.monotonic(), time.time_ns()
            after = fleet.acting_after(version, published_ns)
            delays += [d for d in after.values() if d is not None]
            missing += sum(d is None for d in after.values())
            print(
                f"{robots} robots, version {version} ({published - began:.2f} s to write): acts after {after}", file=sys.stderr
            )
            time.sleep(1.0)
        before, cpu, since = fleet.episodes(), busy(), time.monotonic()
        time.sleep(seconds)
        took, now = time.monotonic() - since, busy()
        ends = fleet.episodes() - before
        done = sum(n for end, n in ends.items() if end in WHOLE)
        gaps = {n: round(r.longest_gap_s(time.time_ns() - int(seconds * 1e9)), 3) for n, r in fleet.robots.items()}
        restarts = {n: p.restarts for n, p in fleet.supervisor.processes.items() if p.restarts}
        description = load_robot("sim_arm")
        assert description.limits.tool is not None
        step = 1.001 * description.limits.tool.linear_speed / description.rates.command_hz
        above = sum(r.steps_above(step) for r in fleet.robots.values())
    return {
        "robots": robots, "episodes": done, "ended_by": dict(ends), "episodes_per_minute": 60.0 * done / took, "cpu_busy": (now[0] - cpu[0]) / (now[1] - cpu[1]),
        "acts_after_s": _quantiles(delays), "robots_that_missed_a_version": missing, "longest_gap_s": gaps, "restarts": restarts,
        "commands_above_limits": above, "stolen_by_host": stolen.report(since_start),
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
