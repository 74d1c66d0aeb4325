"""Weight swaps while the arm moves: the whole graph on real DDS, a new version of the head every few chunks, nothing missed, no jump.

``python benchmarks/ros_swaps.py [--swaps 1000] [--hz 50] [--every-s 0.12] [--priority rt]``

Publishes versions of a head through the weight channel and announces each with a ``WeightsNotice`` on ``weights``, as the learner does, while
``policy_node`` with ``swap_at: chunk`` drives the simulated arm (real time, wall clock). The next version is published when the last
one acts, so that each of them is really swapped in. Counted: swaps that the node took, commands that came more than a period late in the
``--window-s`` after a swap and in all other time, and the largest distance between two consecutive commands at the guard's output
against the velocity limit times the period. Motion with swaps and motion without any take turns of ``--turn-s``. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from host_steal import Stolen
from ros_rate import CONTROL_HZ, PRIORITIES, Listener, draw, jitter, session, wait, with_params, write_robot

from robot_rl.ros.graph import graph

HEAD = "head: {kind: latent_noise, latent_noise: {hidden: [256, 256]}}\n"
PARAMETERS = """
/**/policy_node:
  ros__parameters:
    configure_timeout_s: 180.0
    swap_at: chunk
    replan_margin: 6
/**/monitor_node:
  ros__parameters:
    configure_timeout_s: 180.0
    silence_s: 30.0
"""


def write_run(folder: Path) -> None:
    """A base policy for the arm (state only) and a head to publish versions of."""
    import torch

    from robot_rl.policies.checkpoint import build_policy, save_policy
    from robot_rl.policies.config import CompactPolicyConfig
    from robot_rl.policies.normalizer import Normalizer
    from robot_rl.sim.env import make_env

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = make_env("tabletop/Lift").spec
    features = dict(spec.observation_features)
    size = features["observation.state"].shape
    low, high = np.array(spec.action.low, np.float32) / 2, np.array(spec.action.high, np.float32) / 2
    mean = {"observation.state": np.zeros(size, np.float32)}
    normalizer = Normalizer(features, mean, {"observation.state": np.ones(size, np.float32)}, low, high)
    config = CompactPolicyConfig(kind="flow", horizon=8, n_action_steps=8, width=256, depth=3, num_steps=4)
    save_policy(build_policy(config, features, spec.action, normalizer).freeze(), folder / "base")
    (folder / "config.yaml").write_text(HEAD)
    (folder / "parameters.yaml").write_text(PARAMETERS)


@dataclass
class Publisher:
    """Publishes random versions of the head and announces them."""

    run: Path
    listener: Listener
    versions: int = 0
    announced_ns: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        from diagnostic_msgs.msg import DiagnosticArray

        from robot_rl.config import load
        from robot_rl.policies.checkpoint import load_policy
        from robot_rl.ros import qos
        from robot_rl.runtime.weights import WeightChannel
        from robot_rl.training.build import build_head
        from robot_rl.training.config import PostTrainConfig

        self.spec = (base := load_policy(self.run / "base")).spec
        config = load(PostTrainConfig, self.run / "config.yaml")
        self.tensors = {n: t.clone() for n, t in build_head(base, config.head, 0, config.learner).state_dict().items()}
        self.channel = WeightChannel(self.run / "weights")
        self.topic = self.listener.node.create_publisher(DiagnosticArray, "/weights", qos.STATE)

    def publish(self) -> int:
        """Another version, promoted."""
        import hashlib

        import torch

        from robot_rl.ros.conversion import records_message
        from robot_rl.runtime.weights import MANIFEST
        from robot_rl.wire import WeightsNotice

        g = torch.Generator().manual_seed(self.versions)
        moved = {
            n: t + 0.05 * torch.randn(t.shape, generator=g) if t.is_floating_point() else t for n, t in self.tensors.items()
        }
        m = self.channel.publish(moved, parent=self.versions, base_hash=self.spec.base_hash, stats_hash=self.spec.stats_hash)
        self.versions = m.version
        if m.version % 50 == 0:
            self.channel.prune(10)
        data = (self.channel.path(m.version) / MANIFEST).read_bytes()
        notice = WeightsNotice(
            "promoted", m.version, m.parent, self.channel.path(m.version).as_uri(), hashlib.sha256(data).hexdigest(), m.sha256, m.size,
            m.base_hash, m.stats_hash, m.config_hash, 0, time.time_ns(), "promoted", None,
        )  # fmt: skip
        self.topic.publish(records_message([notice], time.time_ns()))
        self.announced_ns.append(time.time_ns())
        return m.version


def figures(
    listener: Listener, hz: float, windows: list[tuple[int, int]], swaps_ns: list[int], window_s: float
) -> dict[str, Any]:
    """Late commands within windows of time (ns), near swaps and away from them, and the largest step."""
    from robot_rl.robots.description import load_robot

    period = 1.0 / hz
    edges = [at for window in windows for at in window]
    episodes = [at for seen in listener.episodes.values() for state, at in seen if state == "running"]
    borders = sorted(episodes + edges)
    asked, guard = set(listener.commands["policy"].stamp), listener.commands["guard"]
    inside = lambda t: any(since <= t <= until for since, until in windows)  # noqa: E731
    rows = sorted((guard.sent[i], i) for i, s in enumerate(guard.stamp) if s in asked and inside(guard.sent[i]))
    sent = np.array([t for t, _ in rows], np.int64)
    places = np.array([guard.vectors[i] for _, i in rows])
    at = np.array(borders, np.int64)
    same = np.searchsorted(at, sent[1:]) == np.searchsorted(at, sent[:-1])
    swaps = np.array(sorted(swaps_ns), np.int64)
    after = np.searchsorted(swaps, sent[1:], side="right") - 1
    near = (
        (after >= 0) & (sent[1:] - swaps[np.maximum(after, 0)] <= window_s * 1e9) if len(swaps) else np.zeros(len(same), bool)
    )
    interval = np.diff(sent) / 1e9
    step = np.linalg.norm(np.diff(places, axis=0), axis=1)
    began = np.array(sorted(episodes), np.int64)
    begun = np.searchsorted(began, sent[1:], side="right") - 1
    missed = [
        {
            "interval_ms": round(float(interval[i]) * 1e3, 1),
            "after_swap_ms": round(float(sent[i + 1] - swaps[after[i]]) / 1e6, 1) if after[i] >= 0 else None,
            "into_episode_s": round(float(sent[i + 1] - began[begun[i]]) / 1e9, 2) if begun[i] >= 0 else None,
        }
        for i in np.flatnonzero(same & (interval > 2 * period))
    ]
    tool = load_robot("sim_arm_cameras").limits.tool
    limit = tool.linear_speed * period if tool is not None else float("nan")

    def part(chosen: np.ndarray) -> dict[str, Any]:
        if not chosen.any():
            return {"intervals": 0}
        return {
            "intervals": int(chosen.sum()), "deadline_misses": int((interval[chosen] > 2 * period).sum()),
            "late_by_half_a_period": int((interval[chosen] > 1.5 * period).sum()),
            "interval_max_ms": round(float(interval[chosen].max()) * 1e3, 3),
            "largest_step_mm": round(float(step[chosen].max()) * 1e3, 3),
        }  # fmt: skip

    return {
        "seconds": round(sum(until - since for since, until in windows) / 1e9, 1), "episodes": sum(inside(b) for b in episodes),
        "near_swaps": part(same & near), "elsewhere": part(same & ~near), "limit_step_mm": round(limit * 1e3, 3),
        "missed": missed, "moved_m": round(float(step[same].sum()), 3), "at_guard_output": jitter(list(sent), period, borders, edges[0], edges[-1]),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--hz", type=float, default=50.0)
    parser.add_argument("--every-s", type=float, default=0.0, help="pause before the next version; 0: as soon as one acts")
    parser.add_argument(
        "--window-s", type=float, default=0.2, help="after a swap: deadlines missed in it count as caused by it"
    )
    parser.add_argument(
        "--turn-s", type=float, default=20.0, help="motion without swaps and motion with them take turns of this length"
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="give up after")
    parser.add_argument("--priority", choices=list(PRIORITIES), default="rt")
    parser.add_argument("--inference", choices=("auto", "process", "thread"), default="auto")
    parser.add_argument("--keep", type=Path, help="folder of the run and its log; default: a temporary one")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that whoever ends us ends the graph, too
    with tempfile.TemporaryDirectory(prefix="robot_rl_swaps_") as temporary:
        run = (given.keep or Path(temporary)).resolve()
        run.mkdir(parents=True, exist_ok=True)
        write_run(run)
        result = measure(run, given)
    print(json.dumps({"benchmark": "ros_swaps", "cpus": os.cpu_count()} | result, indent=1))
    return 0


def swap(publisher: Publisher, supervisor: Any, swaps_ns: list[int], latency: list[float], give_up: float) -> None:
    """Publish a version and wait until it acts; notes when it did, and after how many seconds."""
    acting = publisher.listener.acting
    version, began = publisher.publish(), time.monotonic()
    while version not in acting and time.monotonic() < give_up:
        supervisor.look()
        time.sleep(0.002)
    if version in acting:
        swaps_ns.append(acting[version])
        latency.append(time.monotonic() - began)


def measure(run: Path, given: argparse.Namespace) -> dict[str, Any]:
    robot = write_robot(run, given.hz, cameras=False)
    arguments = {
        "robot": str(robot), "policy": str(run), "head": str(run), "run_dir": str(run), "operator": "none", "rewards": "none",
        "use_sim_time": "false", "images": "off", "params_file": str(run / "parameters.yaml"), "max_episode_s": "20",
        "device": "cpu", "swap_at": "chunk",
    }  # fmt: skip
    priorities = {n: {"rt_priority": p} for n, p in PRIORITIES[given.priority].items()}
    specs = with_params(graph("sim_session").build(arguments), priorities)
    specs = with_params(specs, {"policy_node": {"inference": given.inference}})
    with session(run, specs, cameras=False, rt=given.priority == "rt") as (supervisor, listener, _):
        wait(lambda: listener.running, supervisor, "an episode runs")
        publisher = Publisher(run, listener)
        wait(lambda: publisher.topic.get_subscription_count() >= 1, supervisor, "policy_node listens to weights")
        time.sleep(1.0)
        stolen, began_s, give_up = Stolen(), time.monotonic(), time.monotonic() + 60.0 * given.minutes
        windows: dict[str, list[tuple[int, int]]] = {"with": [], "without": []}
        latency: list[float] = []
        swaps_ns: list[int] = []
        while len(swaps_ns) < given.swaps and time.monotonic() < give_up:
            for kind in ("without", "with"):
                since, end = time.time_ns(), min(time.monotonic() + given.turn_s, give_up)
                while time.monotonic() < end and len(swaps_ns) < given.swaps:
                    if kind == "with":
                        swap(publisher, supervisor, swaps_ns, latency, give_up)
                    else:
                        supervisor.look()
                    time.sleep(given.every_s if kind == "with" else 0.1)
                windows[kind].append((since, time.time_ns()))
                time.sleep(given.window_s)  # what a swap causes belongs to neither
        time.sleep(1.5)
        weights, loop = listener.status("policy_node: weights"), listener.status("policy_node: policy")
        found, without = (figures(listener, given.hz, windows[k], swaps_ns, given.window_s) for k in ("with", "without"))
        draw("|interval - period| at the guard's output, with swaps", found["at_guard_output"])
        jumps = [e for e in listener.events if e.rule in ("step_jump", "start_jump")]
        return {
            "command_hz": given.hz, "control_hz": CONTROL_HZ.get(given.hz, 10.0), "priority": given.priority,
            "granted": {"policy_node": loop.get("priority"), "guard_node": listener.status("guard_node: guard").get("priority"),
                        "listener": listener.granted},
            "inference": given.inference, "window_s": given.window_s, "published": publisher.versions, "swaps": len(swaps_ns),
            "swaps_counted_by_policy_node": weights.get("swaps"), "refused": weights.get("refused"),
            "published_to_acting_ms": {f"p{q}": round(1e3 * float(np.percentile(latency, q)), 1) for q in (50, 95, 100)} if latency else None,
            "with_swaps": found, "without_swaps": without,
            "guard_jump_events": sum(e.count for e in jumps), "guard_rules": sorted({e.rule for e in listener.events}),
            "stolen_by_host": stolen.report(began_s), "load_average": os.getloadavg(), "restarts": {n: p.restarts for n, p in supervisor.processes.items() if p.restarts},
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
