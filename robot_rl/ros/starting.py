"""``robot-rl up <graph>``: starts the processes of a graph, restarts what dies, stops them in order. No rclpy, no launch here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import robot_rl
from robot_rl.ros.graph import SHIPPER, NodeSpec

LADDER = ((signal.SIGINT, 15.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))
"""How a process is asked to end, and how long each way may take (a learner needs time for its checkpoint)."""
STOP_RANK = {"policy_node": 0, "sim_node": 2, "guard_node": 3}
"""The policy goes first and the guard last; everything else in between."""
CRASH_WINDOW_S, CRASH_LIMIT = 60.0, 5
IMPORT_S = 15.0


def parameter_file(spec: NodeSpec, folder: Path) -> Path:
    """The node's own parameters as a file, which keeps their types; a bare text on a command line does not.

    The section has the node's full name, as launch_ros writes it: rcl applies sections in the order in which their names first
    appear, so ``/**`` here would lose against a ``/**/policy_node`` in a file before it.
    """
    import yaml

    path = folder / f"{spec.full_name.strip('/').replace('/', '.')}.yaml"
    values = {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in spec.params.items()}
    path.write_text(yaml.safe_dump({spec.full_name: {"ros__parameters": values}}, sort_keys=True))
    return path


def command(spec: NodeSpec, folder: Path) -> list[str]:
    """How one process is started without ``ros2``."""
    words = [sys.executable, "-m", spec.module]
    if spec.executable == SHIPPER:
        return [*words, *spec.arguments]
    words += ["--ros-args", "-r", f"__node:={spec.name}"]
    if spec.namespace:
        words += ["-r", f"__ns:=/{spec.namespace.strip('/')}"]
    for old, new in spec.remaps:
        words += ["-r", f"{old}:={new}"]
    for file in (*spec.param_files, parameter_file(spec, folder)):
        words += ["--params-file", str(file)]
    return [*words, "--log-level", spec.log_level]


def child_environment(spec: NodeSpec) -> dict[str, str]:
    """Ours, with the graph's, and this very package first."""
    env = {**os.environ, **spec.env}
    root = str(Path(robot_rl.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([root, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]))
    return env


@dataclass
class Process:
    """One running process of the graph."""

    spec: NodeSpec
    popen: subprocess.Popen[bytes]
    started: float
    restarts: int = 0
    crashes: deque[float] = field(default_factory=deque)
    restart_at: float = 0.0
    given_up: bool = False
    stopped: float = 0.0

    @property
    def too_young(self) -> bool:
        """Ended by our SIGINT while its interpreter was still importing, before it could say how it wants to end."""
        return self.popen.returncode == -signal.SIGINT and self.stopped - self.started < IMPORT_S

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def clear(self) -> None:
        """End what a dead process has left behind in its session, so that its successor is alone."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


class Supervisor:
    """Runs a list of :class:`NodeSpec`. Use as a context manager, call :meth:`look` often, or :meth:`run`.

    Args:
        say: gets every line of output with the node's name in front; standard output by default.
        folder: for the nodes' parameter files; a temporary one by default.
    """

    def __init__(
        self, specs: Sequence[NodeSpec], *, say: Callable[[str], None] | None = None, folder: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.specs = sorted(specs, key=lambda s: s.order)
        self._say = say or (lambda line: print(line, flush=True))
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="robot_rl_up_")
        self.folder = folder or Path(self._temporary.name)  # type: ignore[union-attr]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._env = dict(env or {})
        self.processes: dict[str, Process] = {}
        self._width = max((len(s.full_name) for s in self.specs), default=0)

    def start(self) -> None:
        """Start everything, in order; returns at once."""
        for spec in self.specs:
            self.processes[spec.full_name] = Process(spec, self._launch(spec), time.monotonic())

    def look(self) -> None:
        """Start again what died, after its delay; one that keeps dying stays down."""
        now = time.monotonic()
        for p in self.processes.values():
            if p.alive or p.given_up:
                continue
            if not p.restart_at:
                code = p.popen.returncode
                self._say(f"[{p.spec.full_name}] ended with {code}")
                p.crashes.append(now)
                while p.crashes and now - p.crashes[0] > CRASH_WINDOW_S:
                    p.crashes.popleft()
                if not p.spec.respawn or code == 78 or len(p.crashes) > CRASH_LIMIT:  # 78: wrong parameters stay wrong
                    p.given_up = True
                    self._say(f"[{p.spec.full_name}] stays down")
                    continue
                p.restart_at = now + p.spec.respawn_delay
                p.clear()
            elif now >= p.restart_at:
                p.popen, p.restart_at, p.restarts, p.started = self._launch(p.spec), 0.0, p.restarts + 1, now

    def run(self, stop: threading.Event, seconds: float = 0.0) -> None:
        """Look after everything until ``stop`` is set, ``seconds`` are over (0: never), or nothing is left."""
        until = time.monotonic() + seconds if seconds else float("inf")
        while not stop.wait(0.1) and time.monotonic() < until:
            self.look()
            if all(p.given_up for p in self.processes.values()):
                return

    def stop(self) -> dict[str, int]:
        """End everything, the policy first and the guard last; gives the exit code of each process."""
        for rank in sorted({self._rank(p) for p in self.processes.values()}):
            self._end([p for p in self.processes.values() if self._rank(p) == rank])
        codes = {name: 0 if p.too_young else p.popen.returncode for name, p in self.processes.items()}
        if self._temporary is not None:
            self._temporary.cleanup()
        return codes

    @staticmethod
    def _rank(p: Process) -> int:
        return STOP_RANK.get(p.spec.executable, 1)

    @staticmethod
    def _end(processes: list[Process]) -> None:
        for number, patience in LADDER:
            living = [p for p in processes if p.alive]
            for p in living:
                try:
                    p.stopped = p.stopped or time.monotonic()
                    if number == signal.SIGKILL:
                        os.killpg(p.pid, number)  # children of ours that hang go too
                    else:
                        p.popen.send_signal(number)
                except ProcessLookupError:
                    pass
            until = time.monotonic() + patience
            for p in living:
                try:
                    p.popen.wait(max(0.0, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue

    def __enter__(self) -> Supervisor:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _launch(self, spec: NodeSpec) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C in the terminal reaches it once, through us.
        popen = subprocess.Popen(
            command(spec, self.folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**child_environment(spec), **self._env}, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._pass_on, args=(spec.full_name, popen), daemon=True).start()
        return popen

    def _pass_on(self, name: str, popen: subprocess.Popen[bytes]) -> None:
        assert popen.stdout is not None
        for line in popen.stdout:
            self._say(f"[{name.ljust(self._width)}] {line.decode(errors='replace').rstrip()}")


def describe(specs: Sequence[NodeSpec]) -> list[dict[str, Any]]:
    """The processes as JSON values (``robot-rl up --print``)."""
    return [
        {
            "node": s.full_name, "executable": s.executable, "params": {k: list(v) if isinstance(v, tuple) else v for k, v in s.params.items()},
            "param_files": list(s.param_files), "remaps": [list(r) for r in s.remaps], "env": dict(s.env), "managed": s.managed,
            "respawn": s.respawn, "respawn_delay": s.respawn_delay, "order": s.order, "arguments": list(s.arguments),
        }
        for s in specs
    ]  # fmt: skip


def up(specs: Sequence[NodeSpec], *, seconds: float = 0.0, out: TextIO | None = None) -> int:
    """Run a graph until Ctrl-C; 0 only if every process ended cleanly."""
    event = threading.Event()
    before = {n: signal.signal(n, lambda *_: event.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    supervisor = Supervisor(specs, say=None if out is None else lambda line: print(line, file=out, flush=True))
    try:
        supervisor.start()
        supervisor.run(event, seconds)
        failed = [n for n, p in supervisor.processes.items() if p.given_up]
    finally:
        codes = supervisor.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    bad = {name: code for name, code in codes.items() if code != 0}
    if bad:
        print(json.dumps({"ended badly": bad}), file=sys.stderr, flush=True)
    return 1 if bad or failed else 0
