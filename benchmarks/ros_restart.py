"""How long a node that was killed and started again is unheard, and by whom. Small processes on real DDS, nothing of robot_rl's nodes.

``python benchmarks/ros_restart.py [--kills 30] [--peers 6] [--transport shipped|builtin|udp|mixed] [--announce 3] [--seed 0]``

A "victim" publishes 50 times a second, reliable and volatile with a depth of 1 as ``operator/state`` does, and listens to every peer; the peers
listen to it, best effort, and publish 20 times a second. The victim is killed (``kill -9``) at a random instant and started again after a pause.
For each peer the time counts from the moment the new process has made its node until the peer hears its first message, and until it hears the
peer's. Prints one JSON object: quantiles in both directions, and every pair that did not hear each other within ``--patience`` seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ros")]
PROFILE = ROOT / "configs" / "ros" / "fastdds_shm.xml"
UDP = """<?xml version="1.0" encoding="UTF-8"?>
<dds xmlns="http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles"><profiles>
<transport_descriptors><transport_descriptor><transport_id>udp</transport_id><type>UDPv4</type></transport_descriptor></transport_descriptors>
<participant profile_name="udp_only" is_default_profile="true"><rtps><useBuiltinTransports>false</useBuiltinTransports>
<userTransports><transport_id>udp</transport_id></userTransports></rtps></participant></profiles></dds>
"""


SAID = "<builtin><discovery_config><leaseAnnouncement><sec>{}</sec></leaseAnnouncement></discovery_config></builtin>"


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def work(role: str, index: int, peers: int) -> None:
    """One process: a peer, or the victim (every line it prints says when it heard whom for the first time)."""
    import rclpy
    from rclpy.experimental import EventsExecutor
    from std_msgs.msg import String

    from robot_rl.ros import qos

    rclpy.init()
    node = rclpy.create_node(f"{role}_{index}")
    me = str(os.getpid())
    heard: set[str] = set()

    def first(message: String, whom: str = "") -> None:
        if (key := whom or message.data) not in heard:
            heard.add(key)
            say(role=role, me=index, heard=key, at=time.time_ns())

    mine = node.create_publisher(String, f"{role}_{index}", qos.COMMAND)
    if role == "victim":
        for i in range(peers):
            node.create_subscription(String, f"peer_{i}", lambda m, i=i: first(m, f"peer_{i}"), qos.LATEST)
    else:
        node.create_subscription(String, "victim_0", first, qos.LATEST)
    node.create_timer(0.02 if role == "victim" else 0.05, lambda: mine.publish(String(data=me)))
    say(role=role, me=index, up=me, at=time.time_ns())
    executor = EventsExecutor()
    executor.add_node(node)
    while True:
        executor.spin_once(timeout_sec=0.1)


def environment(transport: str, announce_s: int, folder: Path) -> dict[str, str]:
    """Of a process: ours, with a profile of Fast DDS."""
    if transport == "builtin":
        return dict(os.environ)
    text = UDP if transport == "udp" else PROFILE.read_text(encoding="utf-8")
    if announce_s:
        text = re.sub(r"<builtin>.*?</builtin>|(?=</rtps>)", SAID.format(announce_s), text, count=1, flags=re.S)
    file = folder / f"{transport}.xml"
    file.write_text(text)
    return {**os.environ, "FASTDDS_DEFAULT_PROFILES_FILE": str(file), "FASTRTPS_DEFAULT_PROFILES_FILE": str(file)}


class Bench:
    """The processes, and what they said."""

    def __init__(self, given: argparse.Namespace, envs: dict[str, dict[str, str]]) -> None:
        self.given, self.envs = given, envs
        self.news = threading.Condition()
        self.said: list[dict[str, Any]] = []
        self.running: list[subprocess.Popen[str]] = []

    def start(self, role: str, index: int = 0) -> subprocess.Popen[str]:
        words = [sys.executable, __file__, "--role", role, "--index", str(index), "--peers", str(self.given.peers)]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=self.envs[role])
        threading.Thread(target=self._read, args=(child,), daemon=True).start()
        self.running.append(child)
        return child

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            with self.news:
                self.said.append(json.loads(line))
                self.news.notify_all()

    def until(self, condition: Any, patience_s: float) -> Any:
        with self.news:
            self.news.wait_for(condition, patience_s)
            return condition()

    def meet(self, victim: subprocess.Popen[str], since: int) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds until each peer heard this victim, and until it heard each peer."""
        me, n = str(victim.pid), self.given.peers
        self.until(lambda: [s for s in self.said if s.get("up") == me], 30.0)

        def pairs() -> tuple[dict[str, int], dict[str, int]]:
            there = {f"peer_{s['me']}": s["at"] for s in self.said if s.get("heard") == me}
            here = {s["heard"]: s["at"] for s in self.said if s["role"] == "victim" and "heard" in s and s["at"] > since}
            return there, here

        self.until(lambda: all(len(p) == n for p in pairs()), self.given.patience)
        up = next((s["at"] for s in self.said if s.get("up") == me), since)
        there, here = pairs()
        return {k: (v - up) / 1e9 for k, v in there.items()}, {k: (v - up) / 1e9 for k, v in here.items()}

    def close(self) -> None:
        for child in self.running:
            child.kill()
        for child in self.running:
            child.wait()


def quantiles(values: list[float]) -> dict[str, float]:
    return (
        {k: round(float(np.quantile(values, q)), 2) for k, q in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))} if values else {}
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--peers", type=int, default=6)
    parser.add_argument(
        "--transport", choices=("shipped", "builtin", "udp", "mixed"), default="shipped", help="mixed: the victim has UDP alone"
    )
    parser.add_argument(
        "--announce", type=int, default=0, help="seconds between announcements of a process; 0: as the profile has it"
    )
    parser.add_argument(
        "--pause",
        type=float,
        default=2.0,
        help="seconds from the kill to the next start; a node of the graph needs as long for its imports",
    )
    parser.add_argument("--patience", type=float, default=25.0, help="seconds that two may take to hear each other")
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--role", choices=("peer", "victim"), help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        work(given.role, given.index, given.peers)
        return 0
    import tempfile

    from graph_kit import own_domain

    rng, until = np.random.default_rng(given.seed), time.monotonic() + given.seconds
    rounds, late = [], []
    there_all: list[float] = []
    here_all: list[float] = []
    with own_domain(), tempfile.TemporaryDirectory() as folder:
        kinds = {"mixed": ("udp", "shipped")}.get(given.transport, (given.transport, given.transport))
        envs = {r: environment(k, given.announce, Path(folder)) for r, k in zip(("victim", "peer"), kinds, strict=True)}
        bench = Bench(given, envs)
        try:
            for i in range(given.peers):
                bench.start("peer", i)
            victim = bench.start("victim")
            first = bench.meet(victim, 0)
            for number in range(given.kills):
                if time.monotonic() > until:
                    break
                time.sleep(rng.uniform(0.2, 1.0))
                since = time.time_ns()
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                time.sleep(given.pause)
                victim = bench.start("victim")
                there, here = bench.meet(victim, since)
                there_all += there.values()
                here_all += here.values()
                missing = {
                    "unheard_by": sorted({f"peer_{i}" for i in range(given.peers)} - set(there)),
                    "deaf_to": sorted({f"peer_{i}" for i in range(given.peers)} - set(here)),
                }
                if any(missing.values()):
                    late.append({"kill": number, **missing})
                rounds.append(max([*there.values(), *here.values()], default=float("nan")))
                print(number, f"{rounds[-1]:.2f}", missing if any(missing.values()) else "", file=sys.stderr, flush=True)
        finally:
            bench.close()
    print(json.dumps({
        "benchmark": "ros_restart", "transport": given.transport, "announce_s": given.announce or None, "kills": len(rounds), "peers": given.peers, "pause_s": given.pause,
        "first_meeting_s": round(max([*first[0].values(), *first[1].values()], default=float("nan")), 2),
        "heard_by_a_peer_s": quantiles(there_all), "hears_a_peer_s": quantiles(here_all),
        "patience_s": given.patience, "never_heard": late, "load": os.getloadavg()[0], "cores": os.cpu_count(),
    }, indent=1))  # fmt: skip
    return 1 if late else 0


if __name__ == "__main__":
    raise SystemExit(main())
