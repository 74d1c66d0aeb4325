"""The operator's page on a real graph: a simulated robot is driven from a websocket through device, arbiter, filter and guard."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")
pytest.importorskip("starlette", reason="pip install 'robot_rl[console]'")
pytest.importorskip("uvicorn", reason="pip install 'robot_rl[console]'")

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from graph_kit import running
from sensor_msgs.msg import CompressedImage, Image, Joy

from robot_rl.console.frames import unpack
from robot_rl.replay.store import EpisodeStore
from robot_rl.replay.ulid import new_ulid
from robot_rl.ros import qos
from robot_rl.ros.conversion import compressed_message, image_message, records_message
from robot_rl.ros.graph import NodeSpec, graph
from robot_rl.wire import EpisodeStatus, GuardState, InterventionState, OperatorState, StepReward, WeightsNotice

sys.path.append(str(Path(__file__).resolve().parents[1] / "console"))
from console_kit import Page, connect

FORWARD = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
GIVEN = {
    "robot": "sim_arm", "env": "tabletop/Lift", "operator": "joy", "console": "true", "console_port": "0", "use_sim_time": "true",
}  # fmt: skip


def address_of(probe, lines, look) -> str:
    found = re.compile(r"the operator's page is at (\S+)")
    return probe.until(lambda: [m[1] for x in lines if (m := found.search(x))], "the page's address", also=look)[0]


def test_the_node_shows_what_the_graph_says(tmp_path):
    """Alone on a graph: pictures, states and rewards reach the page; a service that is not there is named."""
    params = {
        "robot": "sim_arm",
        "run_dir": str(tmp_path),
        "http_port": 0,
        "cameras": ["side/image_raw", "top/image_raw/compressed"],
    }
    node = NodeSpec("console_node", "console_node", "t2", params)
    with running([node]) as (supervisor, probe, lines):
        url = address_of(probe, lines, supervisor.look)
        side = probe.node.create_publisher(Image, "/t2/side/image_raw", qos.SENSOR)
        top = probe.node.create_publisher(CompressedImage, "/t2/top/image_raw/compressed", qos.SENSOR)
        topics = {n: probe.node.create_publisher(DiagnosticArray, f"/t2/{n}", p) for n, p in (
            ("episode_status", qos.STATE), ("guard_node/state", qos.STATE), ("reward/events", qos.EVENT), ("weights", qos.STATE))}  # fmt: skip
        joys = probe.listen(Joy, "/t2/console/joy", qos.LATEST)
        probe.until(lambda: all(t.get_subscription_count() for t in (side, top, *topics.values())), "the node listens")
        picture = np.full((48, 64, 3), (200, 30, 30), np.uint8)

        def say() -> None:
            now = time.time_ns()
            side.publish(image_message(picture, now, "side"))
            top.publish(compressed_message(picture, now - 10**12, "top"))  # a camera on another clock
            for name, record in (
                ("episode_status", EpisodeStatus("e1", "running", 3, 7, task="lift", weights_version=2)),
                ("guard_node/state", GuardState("fine", "clamp", True, now, "hash")),
                ("reward/events", StepReward("progress", "e1", new_ulid(), 5, now, "potential", 0.5, True, False)),
                (
                    "weights",
                    WeightsNotice("promoted", 2, 1, "file:///x", "a" * 64, "b" * 64, 3, "", "", "", 10, now, "promoted"),
                ),
            ):
                topics[name].publish(records_message([record], now))
            probe.spin(0.05)

        async def work() -> None:
            import websockets

            async with connect(url) as socket, websockets.connect(url.replace("http", "ws") + "/ws/frames", origin=url) as film:
                page, seen = Page(socket), {}
                until = time.monotonic() + 60.0
                while (
                    set(seen) != {"side", "top"} or page.state.get("episode", {}).get("step") != 7 or not page.state["traces"]
                ):
                    assert time.monotonic() < until, (seen, page.state)
                    say()
                    await page.hear(0.02)
                    with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                        frame = unpack(await asyncio.wait_for(film.recv(), 0.02))
                        seen[frame.camera] = frame
                        await film.send(json.dumps({"type": "seen", "camera": frame.camera, "number": frame.number}))
                for frame in seen.values():
                    assert abs(time.time_ns() - frame.stamp_ns) < 60e9
                    assert frame.jpeg[:2] == b"\xff\xd8"
                state = page.state
                assert (state["guard"], state["armed"], state["weights"]["acting"], state["weights"]["promoted"]) == (
                    "clamp",
                    True,
                    2,
                    2,
                )
                assert state["traces"]["progress"][0] == [5, 0.5]
                assert state["cameras"] == ["side", "top"]
                assert (await page.ask("take_seat", operator="ann"))["ok"]
                answer = await page.ask("estop")
                assert not answer["ok"]
                assert "guard_node/estop is not there" in answer["text"]
                probe.until(lambda: [j for j in joys if j.buttons[8]], "the stop's other way")
                await page.hear(0.1)
                await page.drive([0.5, -0.25, 0, 0, 0, 1.0], gripper=True)
                sent = probe.until(lambda: [j for j in joys if j.buttons[5]], "the page's device")[0]
                assert list(sent.axes) == [0.5, -0.25, 0.0, 0.0, 0.0, 1.0]
                assert sent.buttons[2] == 1

        asyncio.run(asyncio.wait_for(work(), 120.0))


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
        url = address_of(probe, lines, look)

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
    assert "estop" in (tmp_path / "run" / "console" / "notes.jsonl").read_text()
