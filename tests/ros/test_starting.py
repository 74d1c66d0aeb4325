"""`robot-rl up`: restarts what dies, gives up on what keeps dying, stops in order, and says how it ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from robot_rl.ros import starting
from robot_rl.ros.graph import NodeSpec
from robot_rl.ros.starting import Supervisor

LIVE = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (print('bye', flush=True), sys.exit(0))); print('up', flush=True); time.sleep(600)"
DIE = "import sys; sys.exit(3)"
REFUSE = "import sys; print('rate: accepted is 1 to 2'); sys.exit(78)"
DEAF = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)]; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def scripts(monkeypatch):
    """Processes run a piece of Python instead of a node."""
    monkeypatch.setattr(starting, "command", lambda spec, folder: [sys.executable, "-c", spec.params["script"]])


def spec(name: str, script: str, executable: str = "reward_node", **more) -> NodeSpec:
    return NodeSpec(executable, name, params={"script": script}, respawn=more.pop("respawn", True), respawn_delay=0.05, **more)


def until(condition, supervisor=None, patience_s=60.0):
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end
        if supervisor is not None:
            supervisor.look()
        time.sleep(0.02)


def test_what_dies_is_started_again_and_what_keeps_dying_stays_down(scripts, monkeypatch):
    monkeypatch.setattr(starting, "CRASH_LIMIT", 2)
    lines = []
    supervisor = Supervisor(
        [spec("a", LIVE), spec("b", DIE), spec("c", REFUSE), spec("d", DIE, respawn=False)], say=lines.append
    )
    supervisor.start()
    p = supervisor.processes
    until(lambda: any("up" in line for line in lines))
    os.kill(p["/a"].pid, signal.SIGKILL)
    until(lambda: p["/a"].restarts == 1 and p["/b"].given_up and p["/c"].given_up and p["/d"].given_up, supervisor)
    assert p["/b"].restarts == 2
    assert p["/c"].restarts == 0, "wrong parameters stay wrong"
    assert p["/d"].restarts == 0
    until(lambda: sum("up" in line for line in lines) == 2)
    assert any("rate: accepted is 1 to 2" in line for line in lines)
    codes = supervisor.stop()
    assert (codes["/a"], codes["/b"], codes["/c"]) == (0, 3, 78)


def test_the_policy_stops_first_and_the_guard_last(scripts):
    lines = []
    order = ["guard_node", "sim_node", "learner_node", "policy_node"]
    with Supervisor([spec(n, LIVE, n, order=i) for i, n in enumerate(order)], say=lines.append):
        until(lambda: sum("up" in line for line in lines) == 4)
    said = [line.split("]")[0].strip("[/ ") for line in lines if line.endswith("bye")]
    assert said == ["policy_node", "learner_node", "sim_node", "guard_node"]


def test_a_process_that_does_not_listen_is_killed(scripts, monkeypatch):
    monkeypatch.setattr(starting, "LADDER", ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGKILL, 5.0)))
    lines = []
    supervisor = Supervisor([spec("a", DEAF)], say=lines.append)
    supervisor.start()
    until(lambda: any("up" in line for line in lines))
    assert supervisor.stop() == {"/a": -signal.SIGKILL}


def test_run_ends_when_asked_and_when_nothing_is_left(scripts):
    stop = threading.Event()
    with Supervisor([spec("a", LIVE)], say=lambda _: None) as supervisor:
        supervisor.run(stop, seconds=0.3)
        assert supervisor.processes["/a"].alive
    with Supervisor([spec("a", DIE, respawn=False)], say=lambda _: None) as supervisor:
        supervisor.run(stop)
        assert supervisor.processes["/a"].given_up
