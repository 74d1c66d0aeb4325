"""The operator's page on a real graph: a simulated robot is driven from a websocket through device, arbiter, filter and guard."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")
pytest.importorskip("starlette", reason="pip install 'robot_rl[console]'")
pytest.importorskip("uvicorn", reason="pip install 'robot_rl[console]'")

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from graph_kit import running

from robot_rl.replay.store import EpisodeStore
from robot_rl.ros import qos
from robot_rl.ros.graph import graph
from robot_rl.wire import EpisodeStatus, InterventionState, OperatorState

sys.path.append(str(Path(__file__).resolve().parents[1] / "console"))
from console_kit import Page, connect

FORWARD = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
GIVEN = {
    "robot": "sim_arm_cameras", "env": "tabletop/Lift", "operator": "joy", "console": "true", "console_port": "0", "images": "jpeg",
    "use_sim_time": "true",
}  # fmt: skip


@pytest.mark.slow
def test_a_person_drives_a_simulated_robot_from_the_page(tmp_path):
    specs = graph("teleop_session").build({**GIVEN, "run_dir": str(tmp_path / "run")})
    assert {s.executable for s in specs} >= {"console_node", "intervention_node", "guard_node", "policy_node", "sim_node"}
    people = next(s for s in specs if s.executable == "intervention_node")
    assert people.params["devices"] == ["joy", "console"]
    with running(specs) as (supervisor, probe, lines):
        look = supervisor.look
        for topic in ("episode_status", "policy_node/intervention_state"):
            probe.listen(DiagnosticArray, f"/{topic}", qos.STATE)
        probe.listen(DiagnosticArray, "/operator/state", qos.LATEST)
        poses = probe.listen(PoseStamped, "/executed/arm", qos.COMMAND)
        address = re.compile(r"the operator's page is at (\S+)")
        url = probe.until(lambda: [m[1] for x in lines if (m := address.search(x))], "the page's address", also=look)[0]

        def states() -> list[str]:
            return [s.state for s in probe.records("/episode_status", EpisodeStatus)]

        probe.until(lambda: states()[-1] == "running", "an episode", 120.0, look)

        async def drive(page: Page, condition, what: str, axes=FORWARD, held: bool = True) -> None:
            until = time.monotonic() + 60.0
            while not condition():
                assert time.monotonic() < until, (what, lines[-20:])
                await page.drive(axes, held=held)
                await page.hear(0.02)
                probe.executor.spin_once(timeout_sec=0.0)

        async def work() -> None:
            socket = await connect(url)
            page = Page(socket)
            await page.until(lambda s: s["episode"]["state"] == "running", "the page sees the episode")
            assert page.state["cameras"] == ["front", "wrist"]
            assert (await page.ask("take_seat", operator="ann"))["ok"]
            heard = lambda: [s.state for s in probe.records("/policy_node/intervention_state", InterventionState)][-1:]  # noqa: E731
            await drive(page, lambda: heard() == ["human"], "a person drives")
            taken = [s for s in probe.records("/operator/state", OperatorState) if s.takeover]
            assert {(s.device, s.operator_id) for s in taken} == {("console", "ann")}
            height = poses[-1].pose.position.z
            await drive(page, lambda: poses[-1].pose.position.z > height + 0.01, "the arm goes up")
            await page.until(lambda s: s["control"] == "human", "the page says who drives")

            socket.transport.abort()  # a loss is no hand-back
            second = Page(await connect(url))
            await second.until(lambda s: s["seat"] is None, "the seat is free")
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                probe.executor.spin_once(timeout_sec=0.02)
            assert heard() == ["human"], "nobody goes on by themselves"
            resting = poses[-1].pose.position.z
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                probe.executor.spin_once(timeout_sec=0.02)
            assert poses[-1].pose.position.z == pytest.approx(resting, abs=1e-4), "the robot holds"

            assert (await second.ask("take_seat", operator="ben"))["ok"]
            assert (await second.ask("hand_back"))["ok"]
            await drive(second, lambda: heard() in (["handback"], ["autonomous"]), "handed back", [0.0] * 6, held=False)
            assert (await second.ask("success"))["ok"]
            await second.until(lambda s: s["episode"]["outcome"] == "success" or s["episode"]["index"] > 1, "the label")
            assert (await second.ask("estop"))["ok"]
            await second.until(lambda s: s["guard"] == "estop" and s["control"] == "estop", "the stop")

        asyncio.run(asyncio.wait_for(work(), 240.0))
        probe.until(lambda: "committed" in states(), "the episode is committed", also=look)
        assert {n: p.restarts for n, p in supervisor.processes.items() if p.restarts} == {}
    with EpisodeStore.open(tmp_path / "run" / "store") as store:
        episode = store.read(store.episode_ids()[0])
    assert episode.meta.success is True
    assert (episode.source == 1).sum() > 3
    assert (tmp_path / "run" / "console" / "clips").exists()
