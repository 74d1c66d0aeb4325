"""policy_node whose base policy lives behind a server: the server dies, the robot holds; it comes back, the robot goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from graph_kit import Probe, running
from lifecycle_msgs.msg import Transition
from policy_kit import publish, write_run
from std_msgs.msg import Header
from test_robot_nodes import SPACE, Driver, spec, topic

from robot_rl.ros import qos
from robot_rl.wire import EpisodeStatus, GuardState


def serve(run: Path, port: int = 0) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "robot_rl.cli", "serve", str(run), "--port", str(port), "--device", "cpu", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, int(json.loads(server.stdout.readline())["serving"].rpartition(":")[2])


def health(probe: Probe) -> str:
    """What policy_node last said of its policy, where that is an error."""
    said = [s for m in probe.heard["/diagnostics"] for s in m.status if s.name == f"/{SPACE}/policy_node: policy"]
    return said[-1].message if said and said[-1].level == b"\x02" else ""


@pytest.mark.slow
def test_a_dead_policy_server_makes_the_robot_hold_and_go_on_when_it_is_back(tmp_path):
    run = write_run(tmp_path / "run")
    publish(run, seed=1)
    server, port = serve(run)
    specs = [
        spec("sim_node", 0, env="tabletop/Lift", robot="sim_arm", realtime_factor=0.25, images="off"),
        spec("guard_node", 0, robot="sim_arm", rearm="auto", state_file=str(tmp_path / "guard.json"), rt_priority=0),
        spec(
            "policy_node", 1, robot="sim_arm", policy=f"remote:127.0.0.1:{port}", head=str(run), run_dir=str(run), episode_mode="auto",
            reset_service="sim_node/reset", max_episode_s=600.0, warmup_forwards=1, configure_timeout_s=600.0, rt_priority=0,
        ),
    ]  # fmt: skip
    try:
        with running(specs) as (supervisor, probe, _):
            drive = Driver(probe)
            commands = probe.listen(PoseStamped, topic("action/arm"), qos.COMMAND)
            beats = probe.listen(Header, topic("policy_node/heartbeat"), qos.LATEST)
            probe.listen(DiagnosticArray, topic("episode_status"), qos.STATE)
            probe.listen(DiagnosticArray, topic("guard_node/state"), qos.STATE)
            probe.listen(DiagnosticArray, "/diagnostics", qos.DIAG)

            def until(condition, what):
                return probe.until(condition, what, 180.0)

            def commanded(more: int, what: str) -> None:
                before = len(commands)
                until(lambda: len(commands) > before + more, what)

            def acting() -> int:
                return probe.records(topic("episode_status"), EpisodeStatus)[-1].weights_version

            assert drive.lifecycle(Transition.TRANSITION_CONFIGURE)
            assert drive.lifecycle(Transition.TRANSITION_ACTIVATE)
            until(lambda: beats and beats[-1].frame_id == "policy", "the served policy drives")
            assert acting() == 1
            commanded(20, "commands")
            for _ in range(2):
                os.kill(server.pid, signal.SIGKILL)
                server.wait()
                until(lambda: beats[-1].frame_id == "hold", "the policy says that it holds")
                commanded(5, "a hold is no silence: commands go on")
                until(lambda: "policy server 127.0.0.1" in health(probe), "diagnostics say why")
                publish(run, seed=2)  # a version that cannot be proved now
                server, _ = serve(run, port)
                until(lambda: beats[-1].frame_id == "policy", "the served policy drives again")
                commanded(20, "commands")
            node = supervisor.processes[topic("policy_node")]
            assert node.restarts == 0
            assert probe.records(topic("guard_node/state"), GuardState)[-1].armed
            assert drive.set_bool("policy_node/end_episode", True)[0]
            until(lambda: acting() == 3, "the version that was published while the server was away acts in the next episode")
    finally:
        server.kill()
        server.wait()
