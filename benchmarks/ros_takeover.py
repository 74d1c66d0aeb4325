"""A person takes over, hands back, and loses the link, on real DDS: how soon they drive, whether anything jumps, how soon the arm holds.

``python benchmarks/ros_takeover.py [--takeovers 500] [--cuts 200] [--minutes 60] [--seed 0] [--folder DIR]``

Starts the simulated table-top arm at 20 Hz as ``robot-rl up sim_session`` does (simulator, guard, policy, learner, reward, intervention
and monitor nodes as processes, real time) and plays a gamepad's driver. At random instants of an episode in motion the button is held and the
sticks are moved a random way; the request counts from the message that says so to the first command at the controller that is one of the person's
(``operator/action/arm``, to a tenth of a millimetre), by the middleware's source timestamps. After a random time the person lets go, or
the link is cut: the gamepad falls silent, or ``intervention_node`` is stopped (SIGSTOP), or killed (``kill -9``). From the cut on the arm
must be at rest within 200 ms, and stay at rest until the person takes over once more, whatever is still held down meanwhile.

Every command at the controllers is judged against the robot description's limits. Prints one JSON object. With ``--folder`` what was
found so far is kept there, and the next call goes on to the counts that are asked for; ``--minutes`` ends a call. What the host of a
virtual machine took within the second of a violation is beside it; nothing is left out of the figures for it. Exit code 1 with violations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from host_steal import Stolen

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ros")]
TAKEOVER_MS, HOLD_MS = 100.0, 200.0
EPISODE_S = 120.0
TAIL_S, KILL_TAIL_S = 5.0, 14.0
SAME_M = 1e-4
CUTS = ("silence", "stop", "kill")
SHARES = (0.5, 0.44, 0.06)
"""Of the cuts; a killed node takes seconds to come back."""
MIDDLE, REACH = np.array([0.0, 0.0, 0.15]), np.array([0.10, 0.14, 0.07])
"""People drive towards some place in here, so that no motion ends at the workspace's edge."""
PATIENCE_S = 5.0
SET_INTERVENTION = "policy_node/set_intervention"
RECENT = 300
"""Messages that are looked through for the last seconds."""
AT_REST = "cut while at rest"


@dataclass
class Record:
    """One take-over and how it ended. Times in milliseconds.

    Attributes:
        executed_ms: from the request to the first command of the person at the controller; None where there was none.
        end: ``released``, or how the link was cut.
        rest_ms: from the cut to the last command that moved.
        again_ms: as ``executed_ms``, of taking over once more after a cut.
        back_s: seconds until a killed node was back and heard the gamepad.
        stalled: the cut stalled the session, too: the guard held, and the take-over after it is no part of this episode.
        largest_mm: the largest step between two commands from the take-over to after the hand-back.
        stolen_ms: the most that the host took within any second of it.
        context: of one with problems, what guard and episodes said meanwhile, in milliseconds from the request.
    """

    index: int
    executed_ms: float | None = None
    end: str = "released"
    rest_ms: float | None = None
    again_ms: float | None = None
    back_s: float | None = None
    stalled: bool = False
    largest_mm: float = 0.0
    stolen_ms: float = 0.0
    context: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = {f"p{q}": round(float(np.percentile(values, q)), 1) for q in (50, 95, 99)}
    return {"n": len(values), **found, "max": round(max(values), 1)}


class Drill:
    """One session, one take-over after the other."""

    def __init__(self, bench: Any, pad: Any, seed: tuple[int, int]) -> None:
        from diagnostic_msgs.msg import DiagnosticArray
        from fault_watch import _profile, _vector
        from geometry_msgs.msg import PoseStamped

        from robot_rl.ros.conversion import read_records
        from robot_rl.wire import GuardEvent, OperatorState

        self.bench, self.watch, self.pad = bench, bench.watch, pad
        self.rng = np.random.default_rng(seed)
        self.stolen = Stolen()
        self.wishes: list[Any] = []
        self.devices: list[Any] = []
        self.jumps: list[Any] = []
        self.watch.listen(PoseStamped, "operator/action/arm", self.wishes.append, _vector, _profile())
        # Volatile topics, unlike those that the watch itself keeps records of.
        self.watch.listen(
            DiagnosticArray, "operator/state", self.devices.append, lambda m: read_records(m, OperatorState), _profile()
        )
        self.watch.listen(
            DiagnosticArray, "guard_node/events", self._on_events, lambda m: read_records(m, GuardEvent), _profile()
        )

    def _on_events(self, seen: Any) -> None:
        self.jumps += [e for e in seen.value if e.rule in ("step_jump", "start_jump")]

    # ---- the person

    def press(self) -> int:
        """Take over, and drive somewhere."""
        at = self.watch.arm[-1].value[:3]
        way = MIDDLE + self.rng.uniform(-REACH, REACH) - at
        way *= self.rng.uniform(0.4, 1.0) / max(float(np.abs(way).max()), 1e-3)
        return self.pad.drive(*(float(v) for v in way), gripper=bool(self.rng.random() < 0.2))

    def executed(self, since_ns: int) -> Any | None:
        """The first command at the controller that the person asked for after the given time."""
        wishes = [w for w in list(self.wishes) if w.sent_ns > since_ns]
        for command in [c for c in self.watch.arm[-RECENT:] if c.sent_ns > since_ns]:
            if any(
                np.abs(w.value[:3] - command.value[:3]).max() < SAME_M and w.sent_ns <= command.sent_ns + 1_000_000
                for w in wishes
            ):
                return command
        return None

    def take(self, record: Record, what: str) -> tuple[int, float | None]:
        """Press, and wait until the person drives: when it was pressed, and how long it took."""
        t0 = self.press()
        first = self.watch.until(lambda: self.executed(t0), PATIENCE_S, 0.01)
        if first is None:
            record.problems.append(f"{what}: no command of the person within {PATIENCE_S:.0f} s")
            return t0, None
        took = round((first.sent_ns - t0) / 1e6, 1)
        if took > TAKEOVER_MS:
            record.problems.append(f"{what}: after {took} ms")
        return t0, took

    def ready(self, tail_s: float) -> None:
        """Wait for an instant of an episode in motion that has some seconds left. Raises RuntimeError when there is none any more."""
        end = time.monotonic() + 120.0
        while time.monotonic() < end:
            if not self.watch.until(self.watch.moving, PATIENCE_S):
                continue
            episode = self.watch.episode()
            if episode is not None and (time.time_ns() - (episode.started_ns or 0)) / 1e9 < EPISODE_S - tail_s:
                time.sleep(self.rng.uniform(0.0, 0.25))
                return
            time.sleep(0.1)
        raise RuntimeError("the robot does not move any more")

    # ---- one of them

    def one(self, index: int, cut: str) -> Record:
        record, began = Record(index), time.monotonic()
        self.ready(KILL_TAIL_S if cut == "kill" else TAIL_S)
        del self.wishes[:], self.devices[:-1]
        pressed, record.executed_ms = self.take(record, "take-over")
        if record.executed_ms is not None:
            time.sleep(self.rng.uniform(0.05, 0.4))
            if cut:
                record.end = cut
                self._cut(record, cut)
        released = self.pad.release()
        # Until the blend is over and the policy has the robot, or the episode is over.
        if not self.watch.until(lambda: self._autonomous(released), PATIENCE_S):
            record.problems.append("the robot was not handed back")
            self.bench.set_bool(SET_INTERVENTION, False)
        self._steps(record, pressed)
        record.stolen_ms = round(self.stolen.worst_ms(began), 1)
        if record.problems:
            record.context = self._context(pressed)
        return record

    def _autonomous(self, since_ns: int) -> bool:
        beats = [h for h in self.watch.heartbeats[-20:] if h.sent_ns > since_ns + 50_000_000]
        return bool(beats) and beats[-1].value in ("policy", "idle", "inactive")

    def _heard(self, since_ns: int) -> bool:
        """A device has been heard by a node that speaks after the given time."""
        last = self.devices[-1] if self.devices else None
        return last is not None and last.sent_ns > since_ns and any((s.age_ms or 0.0) >= 0.0 for s in last.value)

    def _in_session(self, since_ns: int) -> bool:
        """Whether the same episode runs as before, and the guard lets commands through."""
        episode = self.watch.episode()
        ended = any(s.sent_ns > since_ns and s.value.state != "running" for s in self.watch.episodes[-RECENT:])
        return episode is not None and episode.state == "running" and not ended and self.watch.level() in ("ok", "clamp")

    def _cut(self, record: Record, cut: str) -> None:
        from fault_net import send

        node = self.bench.pid("intervention_node") if cut != "silence" else 0
        t0 = self.pad.silence(True) if cut == "silence" else send(node, signal.SIGSTOP if cut == "stop" else signal.SIGKILL)
        moved = [m for m in self.watch.moves(t0 - 250_000_000, t0)]
        time.sleep(self.rng.uniform(0.35, 0.65))
        if cut == "silence":
            self.pad.silence(False)  # the button is still down: that is no new wish
        elif cut == "stop":
            send(node, signal.SIGCONT)
        else:
            if self.watch.until(lambda: self._heard(t0 + 300_000_000), 60.0):
                record.back_s = round((time.time_ns() - t0) / 1e9, 1)
            else:
                record.problems.append("intervention_node did not come back and hear the gamepad within a minute")
        time.sleep(1.0 if cut == "kill" else 0.15)  # a node that has just started has to find the others first
        released = self.pad.release()
        time.sleep(self.rng.uniform(0.1, 0.2))
        moves = self.watch.moves(t0, time.time_ns())
        record.rest_ms = round((moves[-1].sent_ns - t0) / 1e6, 1) if moves else 0.0
        if not moved:  # somebody was starved, and the arm at rest before: that shows nothing
            record.end = AT_REST
        if record.rest_ms > HOLD_MS:
            what = "the robot went on by itself" if moves and moves[-1].sent_ns > released else "moved"
            record.problems.append(f"{cut}: {what} until {record.rest_ms} ms after the cut")
        if not self._in_session(t0):  # a stopped process can stall others for a second: the guard holds, and the episode ends
            record.stalled = True
            return
        _, record.again_ms = self.take(record, f"take-over after {cut}")
        time.sleep(self.rng.uniform(0.05, 0.2))

    def _context(self, since_ns: int) -> list[str]:
        said = [(s.sent_ns, f"guard {s.value.level} {s.value.rule or ''}") for s in self.watch.guards[-RECENT:]]
        said += [(s.sent_ns, f"episode {s.value.state} {s.value.end_reason or ''}") for s in self.watch.episodes[-RECENT:]]
        arm = [s for s in self.watch.arm[-1000:] if s.sent_ns > since_ns - 200_000_000]
        steps = [(b.sent_ns, float(np.linalg.norm(b.value[:3] - a.value[:3]))) for a, b in itertools.pairwise(arm)]
        said += [(at, f"step {1e3 * far:.1f} mm") for at, far in steps[:60]]
        spoken = [(d.sent_ns, f"devices {[(s.engaged, s.takeover, s.age_ms) for s in d.value]}") for d in self.devices]
        said += [b for a, b in itertools.pairwise(spoken) if a[1].split(", ")[:2] != b[1].split(", ")[:2]]
        said += [(b.sent_ns, b.value) for a, b in itertools.pairwise(self.watch.heartbeats[-RECENT:]) if a.value != b.value]
        return [f"{(at - since_ns) / 1e6:.0f} {what.strip()}" for at, what in sorted(said) if at > since_ns - 1_000_000_000]

    def _steps(self, record: Record, since_ns: int) -> None:
        arm = [c for c in self.watch.arm[-2000:] if c.sent_ns > since_ns - 100_000_000]
        same = [(a, b) for a, b in itertools.pairwise(arm) if b.sent_ns - a.sent_ns < 200_000_000]
        record.largest_mm = round(
            max((float(np.linalg.norm(b.value[:3] - a.value[:3])) for a, b in same), default=0.0) * 1e3, 2
        )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(records: list[dict[str, Any]], sessions: list[dict[str, Any]]) -> dict[str, Any]:
    taken = [r["executed_ms"] for r in records if r["executed_ms"] is not None]
    again = [r["again_ms"] for r in records if r["again_ms"] is not None]
    rests = {c: [r["rest_ms"] for r in records if r["end"] == c and r["rest_ms"] is not None] for c in CUTS}
    over = sum(t > TAKEOVER_MS for t in taken)
    return {
        "takeovers": len(records), "released": sum(r["end"] == "released" for r in records), "cuts": sum(map(len, rests.values())),
        "cut_while_at_rest": sum(r["end"] == AT_REST for r in records),
        "request_to_first_command_ms": quantiles(taken), "above_100_ms": over,
        "the_same_after_a_cut_ms": quantiles(again),
        "cut_to_rest_ms": quantiles([v for values in rests.values() for v in values]),
        "cut_to_rest_ms_by_cause": {c: quantiles(v) for c, v in rests.items() if v},
        "killed_node_back_s": quantiles([r["back_s"] for r in records if r["back_s"] is not None]),
        "cut_that_stalled_the_session": {c: sum(r["stalled"] and r["end"] == c for r in records) for c in CUTS},
        "largest_step_mm": quantiles([r["largest_mm"] for r in records]),
        "commands_checked": sum(s["checked"] for s in sessions), "commands_above_limits": [w for s in sessions for w in s["wrong"]],
        "guard_jump_events": sum(s["jump_events"] for s in sessions),
        "limit_step_mm": sessions[-1]["limit_step_mm"] if sessions else None,
        "violations": [
            {k: r[k] for k in ("index", "end", "stalled", "problems", "stolen_ms", "context")} for r in records if r["problems"]
        ],
        "kinds_of_violation": dict(Counter(p.split(":")[0] for r in records for p in r["problems"])),
        "stolen_ms": quantiles([r["stolen_ms"] for r in records]),
        "sessions": [{k: v for k, v in s.items() if k != "wrong"} for s in sessions],
    }  # fmt: skip


def drill(folder: Path, kept: Path, given: argparse.Namespace) -> None:
    """Sessions until there are as many as asked for, or time is up."""
    from fault_kit import Bench
    from pad_kit import Pad

    until, failures = time.monotonic() + 60.0 * given.minutes, 0
    while failures < 5:
        done, number = read(kept / "records.jsonl"), len(read(kept / "sessions.jsonl"))
        cuts = sum(r["end"] in CUTS for r in done)
        if (len(done) >= given.takeovers and cuts >= given.cuts) or time.monotonic() > until:
            return
        bench = Bench(folder / f"session_{number}", "plain", given.seed + number, episode_s=EPISODE_S)
        began, load = time.monotonic(), os.getloadavg()[0]
        try:
            bench.start()
            started = time.monotonic() - began
            with Pad(bench.watch) as pad:
                run = Drill(bench, pad, (given.seed, number))
                index = len(done)
                try:
                    while (index < given.takeovers or cuts < given.cuts) and time.monotonic() < until:
                        left, open_ = max(1, given.takeovers - index), given.cuts - cuts
                        shares = np.array([s if c in given.kinds else 0.0 for c, s in zip(CUTS, SHARES, strict=True)])
                        cut = str(run.rng.choice(CUTS, p=shares / shares.sum())) if run.rng.random() < open_ / left else ""
                        record = run.one(index, cut)
                        cuts += record.end in CUTS
                        index += 1
                        with open(kept / "records.jsonl", "a") as file:
                            file.write(json.dumps(asdict(record)) + "\n")
                        if record.problems or given.verbose:
                            print(time.strftime("%H:%M:%S"), record, file=sys.stderr, flush=True)
                finally:
                    limits = bench.watch.check_limits()
                    tool = bench.watch.robot.limits.tool
                    with open(kept / "sessions.jsonl", "a") as file:
                        file.write(json.dumps({
                            "checked": limits.checked, "wrong": limits.wrong, "jump_events": len(run.jumps), "load_before": load,
                            "load_after": os.getloadavg()[0], "start_s": round(started, 1), "minutes": round((time.monotonic() - began) / 60, 2),
                            "limit_step_mm": round(1e3 * tool.linear_speed / bench.watch.robot.rates.command_hz, 1),
                            "takeovers": index - len(done),
                        }) + "\n")  # fmt: skip
        except RuntimeError as error:
            failures += 1
            print(f"session {number}: {error}\n" + "\n".join(bench.lines[-40:]), file=sys.stderr, flush=True)
        finally:
            bench.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--takeovers", type=int, default=500)
    parser.add_argument("--cuts", type=int, default=200, help="how many of them end in a cut link")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for sessions and what was found; a temporary one by default")
    parser.add_argument("--kinds", nargs="+", choices=CUTS, default=list(CUTS), help="of cuts, for looking for causes")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    if not 0 <= given.cuts <= given.takeovers:
        parser.error(f"--cuts {given.cuts}: accepted are 0 to {given.takeovers}, the number of take-overs")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that whoever ends us ends the graph, too
    with tempfile.TemporaryDirectory(prefix="ros_takeover_") as temporary:
        kept = (given.folder or Path(temporary)).resolve()
        kept.mkdir(parents=True, exist_ok=True)
        drill(Path(temporary), kept, given)
        found = summary(read(kept / "records.jsonl"), read(kept / "sessions.jsonl"))
    whole = found["takeovers"] >= given.takeovers and found["cuts"] >= given.cuts
    print(json.dumps({
        "benchmark": "ros_takeover", "asked": {"takeovers": given.takeovers, "cuts": given.cuts}, "seed": given.seed, "whole": whole,
        "control_hz": 20.0, "bars_ms": {"takeover_p99": TAKEOVER_MS, "cut_to_rest": HOLD_MS}, "cores": os.cpu_count(),
        "kernel": platform.release(), **found,
    }, indent=1))  # fmt: skip
    p99 = (found["request_to_first_command_ms"] or {}).get("p99", float("inf"))
    held = not [r for r in found["violations"] if any(": after " not in p for p in r["problems"])]
    return 0 if whole and p99 < TAKEOVER_MS and held and not found["commands_above_limits"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
