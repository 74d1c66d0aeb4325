"""How regularly commands come: the whole ROS graph as processes on real DDS, with cameras, slow inference and a learner beside it.

``python benchmarks/ros_rate.py [--hz 20 50 100] [--seconds 25] [--priority rt normal] [--inference auto|process|thread]``

For each rate and priority class it starts what ``robot-rl up sim_session`` starts (sim, guard, policy, reward, learner and monitor nodes;
the arm is simulated in real time on the wall clock), a driver process that publishes two 640x480 cameras at 30 Hz, and listens. The
base policy is a compact flow policy that sees both cameras, untrained, with as many sampling steps as make one decision take
``--inference-ms`` of computing on this machine when nothing else runs (calibrated at the start; no sleeping). The learner trains on what the
session records, at its shipped low priority.

Judged are the intervals between commands at the guard's output, the controller topic, by the time at which the guard's process handed each
one to DDS (the middleware's source timestamp). Beside them: the same for the policy's own output, the stamps in the messages, and arrival
at this process, which adds its own scheduling. Intervals between two episodes are none. ``stolen_by_host`` says how much processor time
the host of a virtual machine kept from it meanwhile: jitter above it is ours. Prints one JSON object; histograms for people go to
standard error.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from host_steal import Stolen

from robot_rl.ros.graph import NodeSpec, graph
from robot_rl.ros.starting import Supervisor

CAMERAS = ("front", "wrist")
SIZE = (480, 640)
CAMERA_HZ = 30.0
EDGES_MS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 40.0)
LIMITS_MS = {50.0: 4.0, 100.0: 5.0}
CONTROL_HZ = {20.0: 20.0, 50.0: 10.0, 100.0: 20.0}
PATIENCE_S = 420.0
PRIORITIES = {"rt": {"policy_node": 10, "guard_node": 20}, "normal": {"policy_node": 0, "guard_node": 0}}

ROBOT = """
extends: {base}
name: bench_arm
rates: {{control_hz: {control}, command_hz: {command}}}
commands:
  - channel: arm
    kind: pose
    topic: target_pose
    frame: base
    action: {{slice: [0, 4], mode: delta, layout: xyz_yaw, interpolate: linear, leash: {{linear: 0.06, angular: 0.5}}}}
  - channel: gripper
    kind: gripper_position
    topic: gripper_controller/commands
    names: [gripper_width]
    action: {{slice: [4, 5], mode: absolute, open: 0.08, closed: 0.0, interpolate: hold}}
"""
RECIPE = """
extends: {recipe}
threads: 1
env: {{id: tabletop/Lift}}
demos: {{prefill: false}}
schedule: {{warmup_steps: 60, return_updates: 10, warmup_updates: 10, batch_size: 64, updates_per_step: 8.0, demo_ratio: 0.0, demo_ratio_end: 0.0}}
learner_process: {{threads: 1}}
"""
PARAMETERS = """
/**/policy_node:
  ros__parameters:
    configure_timeout_s: 180.0
/**/monitor_node:
  ros__parameters:
    configure_timeout_s: 180.0
    silence_s: 30.0
/**/learner_node:
  ros__parameters:
    update_ratio: 64.0
    publish_period_s: 10.0
"""


# ---- what is run


def make_policy(folder: Path, wanted_ms: float) -> dict[str, Any]:
    """A base policy for the arm and both cameras whose decision takes ``wanted_ms`` here; how that was found."""
    import torch

    from robot_rl.policies.checkpoint import build_policy, save_policy
    from robot_rl.policies.config import CompactPolicyConfig
    from robot_rl.policies.normalizer import Normalizer
    from robot_rl.robots.description import load_robot
    from robot_rl.runtime.acting import ActingPolicy, DecisionRequest
    from robot_rl.sim.env import make_env

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = make_env("tabletop/Lift").spec
    features = dict(spec.observation_features) | {
        n: f for n, f in load_robot("sim_arm_cameras").features.items() if f.dtype == "uint8"
    }
    size = features["observation.state"].shape
    low, high = np.array(spec.action.low, np.float32) / 4, np.array(spec.action.high, np.float32) / 4
    mean = {"observation.state": np.zeros(size, np.float32)}
    normalizer = Normalizer(features, mean, {"observation.state": np.ones(size, np.float32)}, low, high)

    def build(steps: int) -> Any:
        return build_policy(
            CompactPolicyConfig(kind="flow", horizon=8, n_action_steps=8, width=256, depth=3, num_steps=steps),
            features, spec.action, normalizer,
        ).freeze()  # fmt: skip

    blank = {n: np.zeros((1, *f.shape), f.dtype) for n, f in features.items()}

    def cost_ms(policy: Any) -> float:
        acting, taken = ActingPolicy(policy), []
        for i in range(25):
            began = time.perf_counter()
            acting.decide([DecisionRequest(blank, ("calibration",), i, 0)])
            taken.append(time.perf_counter() - began)
        return float(np.median(taken[5:])) * 1e3

    if wanted_ms <= 0:
        steps = 2
    else:
        few, many = cost_ms(build(2)), cost_ms(build(42))
        steps = max(1, round(2 + (wanted_ms - few) * 40 / max(many - few, 1e-3)))
    policy = build(steps)
    save_policy(policy, folder / "base")
    return {"wanted_ms": wanted_ms, "sampling_steps": steps, "alone_p50_ms": round(cost_ms(policy), 2)}


def write_robot(folder: Path, command_hz: float, *, cameras: bool = True) -> Path:
    """The shipped simulated arm at another rate, moving in straight lines from row to row."""
    from robot_rl import paths

    base = os.path.relpath(paths.find("configs", "robots", "sim_arm_cameras.yaml" if cameras else "sim_arm.yaml"), folder)
    path = folder / f"bench_arm_{command_hz:g}.yaml"
    path.write_text(ROBOT.format(base=base, control=CONTROL_HZ.get(command_hz, 10.0), command=command_hz))
    return path


def write_recipe(folder: Path) -> tuple[Path, Path]:
    from robot_rl import paths

    recipe, parameters = folder / "recipe.yaml", folder / "parameters.yaml"
    # Never calls the base, so the policy's cost stays in its own process; and learns from every step: with inference as slow as
    # here the first row of a chunk never runs, and dsrl_sac, which starts at decisions alone, would find nothing to learn from.
    shipped = paths.find("configs", "recipes", "rlpd.yaml")
    recipe.write_text(RECIPE.format(recipe=os.path.relpath(shipped, folder)))
    parameters.write_text(PARAMETERS)
    return recipe, parameters


def with_params(specs: list[NodeSpec], changes: Mapping[str, Mapping[str, Any]]) -> list[NodeSpec]:
    return [replace(s, params={**s.params, **changes.get(s.executable, {})}) for s in specs]


@contextmanager
def own_domain() -> Iterator[int]:
    """A ROS domain that no test and no other benchmark on this machine uses."""
    for number in range(41, 100):
        with open(Path(tempfile.gettempdir()) / f"robot_rl_test_domain_{number}.lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            os.environ |= {"ROS_DOMAIN_ID": str(number), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
            yield number
            return
    raise SystemExit("no free ROS domain")


# ---- a camera driver (a process of its own)


def publish_cameras() -> int:
    from array import array

    import rclpy
    from rclpy.signals import SignalHandlerOptions
    from sensor_msgs.msg import Image

    from robot_rl.ros import qos
    from robot_rl.ros.conversion import to_stamp

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("camera_driver")
    publishers = [node.create_publisher(Image, f"/{c}/image_raw", qos.SENSOR) for c in CAMERAS]
    draw = np.random.default_rng(0)
    frames = []
    for _ in range(6):
        data = array("B")
        data.frombytes(draw.integers(0, 256, (*SIZE, 3), np.uint8).tobytes())
        message = Image(height=SIZE[0], width=SIZE[1], encoding="rgb8", step=SIZE[1] * 3, data=data)
        frames.append(message)
    deadline, sent = time.monotonic(), 0
    while not stop.wait(max(0.0, deadline - time.monotonic())):
        deadline = max(deadline + 1.0 / CAMERA_HZ, time.monotonic() - 1.0 / CAMERA_HZ)
        stamp = to_stamp(time.time_ns())
        for i, publisher in enumerate(publishers):
            message = frames[(sent + i) % len(frames)]
            message.header.stamp = stamp
            publisher.publish(message)
        sent += 1
    node.destroy_node()
    rclpy.try_shutdown()
    return 0


# ---- listening


@dataclass
class Heard:
    """One topic of commands: (stamp in the message, sent by the middleware, arrived here), nanoseconds."""

    stamp: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)


class Listener:
    """A node in this process that notes commands, episodes and diagnostics, in a thread of its own."""

    def __init__(self, rt: bool) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from geometry_msgs.msg import PoseStamped
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.signals import SignalHandlerOptions

        from robot_rl.ros import qos
        from robot_rl.ros.conversion import from_stamp, read_records
        from robot_rl.runtime.priority import set_fifo
        from robot_rl.wire import EpisodeStatus, GuardEvent, GuardState

        self.context = rclpy.Context()
        rclpy.init(context=self.context, signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node("listener", context=self.context)
        self.commands: dict[str, Heard] = {"policy": Heard(), "guard": Heard()}
        self.episodes: dict[str, list[tuple[str, int]]] = {}
        self.acting: dict[int, int] = {}  # version: when it began to act
        self.statuses: dict[str, dict[str, str]] = {}
        self.guard: list[Any] = []
        self.events: list[Any] = []
        deep = qos.profile("reliable", "volatile", 200)
        for name, topic in (("policy", "/action/arm"), ("guard", "/target_pose")):
            heard = self.commands[name]

            def take(message: Any, info: Any, heard: Heard = heard) -> None:
                now = time.time_ns()
                heard.stamp.append(from_stamp(message.header.stamp))
                heard.sent.append(info["source_timestamp"])
                heard.arrived.append(now)
                p = message.pose.position
                heard.vectors.append(np.array([p.x, p.y, p.z]))

            self.node.create_subscription(PoseStamped, topic, take, deep)

        def episode(message: Any) -> None:
            for s in read_records(message, EpisodeStatus):
                self.acting.setdefault(s.weights_version or 0, from_stamp(message.header.stamp))
                seen = self.episodes.setdefault(s.episode_id, [])
                if not seen or seen[-1][0] != s.state:
                    seen.append((s.state, from_stamp(message.header.stamp)))

        def diagnostics(message: Any) -> None:
            for s in message.status:
                self.statuses[s.name] = {kv.key: kv.value for kv in s.values} | {"message": s.message}

        self.node.create_subscription(
            DiagnosticArray, "/episode_status", episode, qos.profile("reliable", "transient_local", 50)
        )
        self.node.create_subscription(DiagnosticArray, "/diagnostics", diagnostics, qos.profile("reliable", "volatile", 50))
        self.node.create_subscription(
            DiagnosticArray, "/guard_node/state", lambda m: self.guard.extend(read_records(m, GuardState)), qos.STATE
        )
        self.node.create_subscription(
            DiagnosticArray, "/guard_node/events", lambda m: self.events.extend(read_records(m, GuardEvent)), qos.EVENT
        )
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        # Not the main thread: it starts processes, and these would inherit it.
        self.granted = "SCHED_FIFO 30" if rt and set_fifo(30, but=(os.getpid(),)) else "normal priority"

    def _spin(self) -> None:
        while not self._stop.is_set():
            self._executor.spin_once(timeout_sec=0.2)

    @property
    def running(self) -> bool:
        """An episode runs now."""
        return bool(self.episodes) and next(reversed(self.episodes.values()))[-1][0] == "running"

    def status(self, check: str) -> dict[str, str]:
        return next((v for k, v in self.statuses.items() if k.endswith(check)), {})

    def close(self) -> None:
        import rclpy

        self._stop.set()
        self._thread.join(2.0)
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def wait(condition: Any, supervisor: Supervisor, what: str, patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {patience_s:g} s")
        supervisor.look()
        time.sleep(0.05)


# ---- figures


def jitter(times_ns: list[int], period_s: float, borders_ns: list[int], since_ns: int, until_ns: int) -> dict[str, Any]:
    """Of the intervals between commands within [since, until]; one that an episode began in is none."""
    times = np.sort(np.array([t for t in times_ns if since_ns <= t <= until_ns], np.int64))
    if len(times) < 3:
        return {"commands": len(times)}
    borders = np.array(sorted(borders_ns), np.int64)
    crossed = np.searchsorted(borders, times[1:]) != np.searchsorted(borders, times[:-1])
    intervals = np.diff(times)[~crossed] / 1e6
    off = np.abs(intervals - period_s * 1e3)
    counts = np.histogram(off, [*EDGES_MS, np.inf])[0]
    return {
        "commands": len(times), "intervals": len(intervals), "between_episodes": int(crossed.sum()),
        "jitter_ms": {f"p{q:g}": round(float(np.percentile(off, q)), 3) for q in (50, 95, 99, 99.9)} | {"max": round(float(off.max()), 3)},
        "interval_ms": {"mean": round(float(intervals.mean()), 3), "min": round(float(intervals.min()), 3), "max": round(float(intervals.max()), 3)},
        "deadline_misses": int((intervals > 2e3 * period_s).sum()),
        "histogram": [
            [f"{a:g}-{b:g} ms" if np.isfinite(b) else f"{a:g} ms and more", int(n)]
            for a, b, n in zip(EDGES_MS, (*EDGES_MS[1:], np.inf), counts, strict=True)
        ],
    }  # fmt: skip


def draw(title: str, figures: Mapping[str, Any]) -> None:
    print(title, file=sys.stderr)
    rows = figures.get("histogram", [])
    most = max((n for _, n in rows), default=0) or 1
    for name, n in rows:
        print(f"  {name:>15} {n:6d} {'#' * round(50 * n / most)}", file=sys.stderr, flush=True)


def cpu_seconds(pid: int) -> float:
    """Of a process and its living descendants."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(words[1]), []).append(int(folder.name))
        used[int(folder.name)] = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    total, queue = 0.0, [pid]
    while queue:
        one = queue.pop()
        total += used.get(one, 0.0)
        queue += children.get(one, [])
    return total


# ---- one run


@contextmanager
def session(
    run: Path, specs: list[NodeSpec], *, cameras: bool, rt: bool
) -> Iterator[tuple[Supervisor, Listener, subprocess.Popen[bytes] | None]]:
    """The graph's processes, a camera driver and a listener, all ended afterwards. The log goes to ``log.txt`` in ``run``."""
    with own_domain(), open(run / "log.txt", "w") as log:
        os.environ |= dict(specs[0].env)

        def say(line: str) -> None:
            print(line, file=log, flush=True)

        driver = None
        supervisor = Supervisor(specs, say=say)
        try:
            supervisor.start()
            if cameras:
                driver = subprocess.Popen([sys.executable, __file__, "--publish-cameras"], start_new_session=True)
            listener = Listener(rt)
            try:
                yield supervisor, listener, driver
            finally:
                listener.close()
        finally:
            if driver is not None:
                driver.terminate()
                driver.wait()
            supervisor.stop()


def measure(run: Path, base: Path, hz: float, given: argparse.Namespace, priority: str) -> dict[str, Any]:
    from robot_rl.training.learner_status import read_status

    run.mkdir(parents=True)
    recipe, parameters = write_recipe(run)
    arguments = {
        "robot": str(write_robot(run, hz)), "policy": str(base), "run_dir": str(run), "operator": "none", "gate": "false",
        "http_port": "0", "use_sim_time": "false", "images": "off", "params_file": str(parameters),
        "max_episode_s": f"{given.episode_s:g}", "device": "cpu", "recipe": "" if given.no_learner else str(recipe),
    }  # fmt: skip
    priorities = {n: {"rt_priority": p} for n, p in PRIORITIES[priority].items()}
    specs = with_params(graph("sim_session").build(arguments), priorities)
    specs = with_params(specs, {n: {"executor": given.executor} for n in ("policy_node", "guard_node")})
    specs = with_params(specs, {"policy_node": {"inference": given.inference}})
    learner = run / "learner"
    with session(run, specs, cameras=not given.no_cameras, rt=priority == "rt") as (supervisor, listener, driver):
        wait(lambda: listener.running, supervisor, "an episode runs")
        if not given.no_learner:
            wait(lambda: (s := read_status(learner)) is not None and s.updates > 20, supervisor, "the learner learns")
        pids = {n.strip("/"): p.pid for n, p in supervisor.processes.items()} | ({"cameras": driver.pid} if driver else {})
        before, updates = {n: cpu_seconds(p) for n, p in pids.items()}, getattr(read_status(learner), "updates", 0)
        stolen, since, load_before = Stolen(), time.time_ns(), os.getloadavg()
        began = time.monotonic()
        end = began + given.seconds
        while time.monotonic() < end:
            supervisor.look()
            time.sleep(0.2)
        until = time.time_ns()
        took = (until - since) / 1e9
        used = {n: round(100 * (cpu_seconds(p) - before[n]) / took, 1) for n, p in pids.items()}
        learned = getattr(read_status(learner), "updates", 0) - updates
        restarts = {n: p.restarts for n, p in supervisor.processes.items() if p.restarts}
        host = stolen.report(began)
        time.sleep(0.5)
        return report(listener, hz, since, until) | {
            "priority": priority, "stolen_by_host": host, "load_average": {"before": load_before, "after": os.getloadavg()}, "cpu_percent": used,
            "learner": None if given.no_learner else {"updates": learned, "updates_per_s": round(learned / took, 1)},
            "restarts": restarts,
        }  # fmt: skip


def report(listener: Listener, hz: float, since: int, until: int) -> dict[str, Any]:
    period = 1.0 / hz
    borders = [at for seen in listener.episodes.values() for state, at in seen if state == "running"]
    policy, guard = listener.commands["policy"], listener.commands["guard"]
    asked = set(policy.stamp)
    # What the guard sent by itself (ramps and holds between episodes) is not a command that anybody was to send at this rate.
    answers = [i for i, stamp in enumerate(guard.stamp) if stamp in asked]
    loop, observations = listener.status("policy_node: policy"), listener.status("policy_node: observations")
    held = listener.status("guard_node: guard")
    judged = jitter([guard.sent[i] for i in answers], period, borders, since, until)
    limit = LIMITS_MS.get(hz)
    p99 = judged.get("jitter_ms", {}).get("p99")
    return {
        "command_hz": hz, "control_hz": CONTROL_HZ.get(hz, 10.0), "seconds": round((until - since) / 1e9, 1),
        "granted": {"policy_node": loop.get("priority"), "guard_node": held.get("priority"), "listener": listener.granted},
        "inference_ms": {"p50": loop.get("inference_p50_ms"), "p95": loop.get("inference_p95_ms")},
        "late_chunks": loop.get("chunk_late"), "decisions_this_episode": loop.get("replans"), "swaps": loop.get("swaps"),
        "episodes": sum(since <= b <= until for b in borders),
        "cameras_hz": {k.removesuffix(".hz"): float(v) for k, v in observations.items() if k.endswith("image_raw.hz")},
        "guard": {"hop_p99_ms": held.get("hop_p99_ms"), "tick_jitter_p99_ms": held.get("tick_jitter_p99_ms")},
        "guard_events": sorted({e.rule for e in listener.events}),
        "judged": "guard output, middleware source timestamp", "limit_p99_ms": limit,
        "within_limit": None if limit is None or p99 is None else p99 < limit,
        "at_guard_output": judged,
        "at_policy_output": jitter(policy.sent, period, borders, since, until),
        "stamps_of_policy": jitter(policy.stamp, period, borders, since, until),
        "arrival_here": jitter([guard.arrived[i] for i in answers], period, borders, since, until),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hz", type=float, nargs="+", default=[20.0, 50.0, 100.0])
    parser.add_argument("--seconds", type=float, default=25.0, help="of measurement, for each rate and class")
    parser.add_argument("--priority", nargs="+", choices=list(PRIORITIES), default=list(PRIORITIES))
    parser.add_argument("--inference", choices=("auto", "process", "thread"), default="auto", help="as policy_node's parameter")
    parser.add_argument("--executor", choices=("single", "events"), default="events", help="as the nodes' parameter")
    parser.add_argument("--inference-ms", type=float, default=30.0, help="0: two sampling steps")
    parser.add_argument("--episode-s", type=float, default=10.0)
    parser.add_argument("--no-learner", action="store_true")
    parser.add_argument("--no-cameras", action="store_true", help="(for looking for causes; the policy then never starts)")
    parser.add_argument("--keep", type=Path, help="folder for run folders and logs; default: a temporary one")
    parser.add_argument("--publish-cameras", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.publish_cameras:
        return publish_cameras()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that whoever ends us ends the graph, too
    with tempfile.TemporaryDirectory(prefix="robot_rl_rate_") as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        policy = make_policy(folder, given.inference_ms)
        runs = []
        for hz in given.hz:
            for priority in given.priority:
                name = f"{hz:g}_{priority}_{given.inference}_{int(time.time())}"
                try:
                    found = measure(folder / name, folder / "base", hz, given, priority)
                except TimeoutError as error:
                    tail = (folder / name / "log.txt").read_text().splitlines()[-15:]
                    found = {"command_hz": hz, "priority": priority, "error": str(error), "log": tail}
                runs.append(found | {"inference": given.inference, "executor": given.executor})
                draw(f"{hz:g} Hz, {priority}: |interval - period| at the guard's output", found.get("at_guard_output", {}))
    uname = os.uname()
    print(json.dumps({
        "benchmark": "ros_rate", "cpus": os.cpu_count(), "kernel": f"{uname.sysname} {uname.release}", "inference": policy,
        "cameras": {"topics": [f"{c}/image_raw" for c in CAMERAS], "size": SIZE, "hz": CAMERA_HZ, "source": "driver process, raw rgb8"},
        "runs": runs,
    }, indent=1))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
