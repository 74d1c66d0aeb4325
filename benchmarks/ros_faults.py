"""Twelve faults on real DDS: what the guard, the policy and the session make of each, and how long a robot goes on moving.

``python benchmarks/ros_faults.py [--faults 1,5,9] [--times 20] [--seed 0] [--folder DIR]``: starts sessions as ``robot-rl up`` does,
injects each fault (section 10.3 of the ROS specification) at random instants of episodes in motion, and waits until the session goes
on by itself. Prints one JSON object: for each fault runs, time to hold (p50, p99, max; ms from the injection to the last command that
moves), commands above limits, committed episodes lost, sessions that needed a person, and what went wrong in words. What this
machine does not allow is named under ``weaker``, and never counted as passed. A run that went wrong while the host of a virtual machine
kept its processors from it for more than 100 ms of a second is listed under ``disturbed`` with its figures and injected again, five
times a fault at most. Exit code 1 when anything went wrong.

Network namespaces (fault 10) and a small disk (fault 9) need root or CAP_SYS_ADMIN; fault 12 needs a C compiler for the wall clock.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from steal import Stolen

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ros")]
DISTURBED_MS, MOST_DISTURBED = 100.0, 5
KINDS = ("main", "camera", "two", "wall", "simtime")


def quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"p50": float(np.median(values)), "p99": float(np.quantile(values, 0.99)), "max": max(values), "n": len(values)}


def summary(fault: Any, runs: list[Any], above: int, lost: list[str], checked: int) -> dict[str, Any]:
    variants: dict[str, dict[str, Any]] = {}
    for name in sorted({r.variant for r in runs}):
        of = [r for r in runs if r.variant == name]
        variants[name] = {
            "runs": len(of), "failed": sum(bool(r.problems) for r in of), "bar_ms": next((r.bar_ms for r in of if r.bar_ms), None),
            "time_to_hold_ms": quantiles([r.hold_ms for r in of if r.hold_ms is not None]),
            "recovered_s": quantiles([r.recovered_s for r in of if r.recovered_s is not None]),
            "figures": {k: quantiles([r.figures[k] for r in of if k in r.figures]) for k in sorted({k for r in of for k in r.figures})},
        }  # fmt: skip
    problems: dict[str, int] = defaultdict(int)
    for r in runs:
        for p in r.problems:
            problems[f"{r.variant}: {p}"] += 1
    return {
        "fault": fault.number, "what": fault.what, "runs": len(runs), "failed": sum(bool(r.problems) for r in runs),
        "time_to_hold_ms": quantiles([r.hold_ms for r in runs if r.hold_ms is not None]), "commands_above_limits": above,
        "commands_checked": checked, "committed_episodes_lost": len(lost), "needed_a_person": sum(r.person for r in runs),
        "weaker": sorted({r.weaker for r in runs if r.weaker}), "problems": dict(problems), "variants": variants,
    }  # fmt: skip


class Harness:
    """Faults one after the other, one session for as many of them as it survives."""

    def __init__(self, folder: Path, seed: int, verbose: bool, rate: float) -> None:
        self.folder, self.seed, self.verbose, self.rate = folder, seed, verbose, rate
        self.sessions = 0
        self.runs: dict[int, list[Any]] = defaultdict(list)
        self.above: dict[int, list[str]] = defaultdict(list)
        self.lost: dict[int, list[str]] = defaultdict(list)
        self.checked: dict[int, int] = defaultdict(int)
        self.skipped: dict[int, str] = {}
        self.disturbed: dict[int, list[Any]] = defaultdict(list)

    def session(self, kind: str, work: list[tuple[int, Any, int]]) -> None:
        """``work``: (fault, function, how many times) of this kind of session."""
        from fault_kit import Bench, Run
        from faults import NEEDS

        self.stolen = Stolen()
        left = [(number, inject, i) for number, inject, times in work for i in range(times)]
        failures = 0
        while left and failures < 5:
            self.sessions += 1
            bench = Bench(self.folder / f"{self.sessions}_{kind}", kind, self.seed + self.sessions, rate=self.rate)
            began = False
            try:
                bench.start()
                began = True
                broken = False
                while left and not broken:
                    number, inject, i = left[0]
                    if (reason := bench.weaker.get(NEEDS.get(number, ""))) and number != 10:
                        self.skipped[number] = reason
                        left = [w for w in left if w[0] != number]
                        continue
                    left.pop(0)
                    at, since = len(bench.lines), time.monotonic()
                    try:
                        run = inject(bench, i)
                    except Exception as error:
                        run = Run(f"run {i}", problems=[f"the harness gave up: {error!r}"], person=True)
                        self.say(traceback.format_exc())
                    stolen = self.stolen.worst_ms(since)
                    if stolen > 10.0:
                        run.figures["stolen_ms"] = stolen
                    disturbed = run.problems and stolen > DISTURBED_MS and len(self.disturbed[number]) < MOST_DISTURBED
                    (self.disturbed if disturbed else self.runs)[number].append(run)
                    if disturbed:
                        left.insert(0, (number, inject, i))
                    self.say(
                        f"fault {number} #{i} {run.variant}: hold {run.hold_ms} ms, on after {run.recovered_s} s {run.figures} {run.problems or ''}"
                    )
                    if run.problems and self.verbose:
                        self.say("\n".join(bench.lines[at:][-40:]))
                    broken = run.person
                    self.account(bench, number, last=broken or not left or left[0][0] != number)
            except Exception as error:
                failures += not began
                self.say(f"session {kind}: {error}\n{traceback.format_exc()}")
                if began and left:
                    self.runs[left[0][0]].append(Run("session", problems=[repr(error)], person=True))
            finally:
                bench.close()
        for number, _, _ in left:
            self.skipped.setdefault(number, f"no session of kind {kind} could be started")

    def account(self, bench: Any, number: int, *, last: bool) -> None:
        """After the last run of a fault: limits of every command since the session began to be judged, episodes that were lost."""
        if not last:
            return
        limits = bench.watch.check_limits()
        self.above[number] += limits.wrong
        self.checked[number] += limits.checked
        for box in bench.watch.commands.values():
            del box[:-1]
        for text in limits.wrong[:5]:
            self.say(f"fault {number}: above limits: {text}")
        lost = bench.lost_episodes()
        self.lost[number] += lost
        if lost:
            self.say(f"fault {number}: lost {lost[:5]}")

    def add(self, other: Harness) -> None:
        """What another process found."""
        self.sessions = other.sessions
        self.skipped |= other.skipped
        for number in other.runs:
            self.runs[number] += other.runs[number]
            self.above[number] += other.above[number]
            self.lost[number] += other.lost[number]
            self.checked[number] += other.checked[number]
            self.disturbed[number] += other.disturbed[number]

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run_kind(
    kind: str, work: list[tuple[int, int, int]], folder: Path, seed: int, verbose: bool, rate: float, before: int
) -> Harness:
    """All of one kind of session; ``work``: (fault, its part, how many times). In a process of its own: the middleware keeps what it
    knows of networks for as long as a process lives, and a session may change this process' network.
    """
    from faults import FAULTS

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: sessions end with whoever asked for them
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    harness = Harness(folder, seed, verbose, rate)
    harness.sessions = before
    harness.session(kind, [(number, FAULTS[number].parts[part][1], times) for number, part, times in work])
    return harness


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", default=",".join(map(str, range(1, 13))), help="numbers, separated by commas")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for sessions; a temporary one by default")
    parser.add_argument("--verbose", action="store_true", help="print what the nodes said around a failure")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="below 1: slow motion on a busy machine; shows what happens, measures nothing"
    )
    given = parser.parse_args()

    from fault_net import own_mounts

    mounts = own_mounts()  # before any thread exists
    from faults import FAULTS

    numbers = [int(n) for n in given.faults.replace(",", " ").split()]
    if unknown := [n for n in numbers if n not in FAULTS]:
        parser.error(f"--faults {unknown}: accepted are {', '.join(map(str, FAULTS))}")
    began, load = time.monotonic(), os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="ros_faults_") as temporary:
        harness = Harness(given.folder or Path(temporary), given.seed, given.verbose, given.rate)
        for kind in KINDS:
            work = []
            for number in numbers:
                parts = FAULTS[number].parts
                for place, (where, _) in enumerate(parts):
                    times = len(range(place, given.times, len(parts)))
                    if where == kind and times:
                        work.append((number, place, times))
            if work:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    harness.add(pool.submit(run_kind, kind, work, harness.folder, given.seed, given.verbose, given.rate, harness.sessions).result())  # fmt: skip
    results = []
    for number in numbers:
        found = summary(
            FAULTS[number], harness.runs[number], len(harness.above[number]), harness.lost[number], harness.checked[number]
        )
        found["disturbed"] = [
            {"variant": r.variant, "problems": r.problems, "stolen_ms": r.figures["stolen_ms"]}
            for r in harness.disturbed[number]
        ]
        if number in harness.skipped:
            found["not_injected"] = harness.skipped[number]
        results.append(found)
    print(json.dumps({
        "times": given.times, "seed": given.seed, "rate": given.rate, "minutes": round((time.monotonic() - began) / 60, 1), "sessions": harness.sessions,
        "cores": os.cpu_count(), "load_before": load[0], "load_after": os.getloadavg()[0], "kernel": platform.release(),
        "own_mounts": mounts or "yes", "faults": results,
    }))  # fmt: skip
    clean = all(
        not f["failed"] and not f["commands_above_limits"] and not f["committed_episodes_lost"] and "not_injected" not in f
        for f in results
    )
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
