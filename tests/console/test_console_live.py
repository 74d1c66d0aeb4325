"""The console over real sockets, against a live simulated session: who may drive, what a loss does, what every request does."""

from __future__ import annotations

import asyncio
import json
import time

import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install 'robot_rl[console]'")
pytest.importorskip("uvicorn", reason="pip install 'robot_rl[console]'")

import websockets
from console_kit import ACTION, LIMITS, Page, connect, live

from robot_rl.replay.store import EpisodeStore

FORWARD = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def run(work):
    return asyncio.run(asyncio.wait_for(work, 90.0))


async def at_the_controls(page: Page, name: str = "ann") -> None:
    await page.until(lambda s: True, "a state")
    answer = await page.ask("take_seat", operator=name)
    assert answer["ok"], answer


async def drive_for(console, page: Page, steps: int) -> None:
    """Forward, for so many control steps under a person's control."""
    until, first = time.monotonic() + 60.0, None
    while first is None or console.session.ticks < first + steps:
        assert time.monotonic() < until, page.state
        await page.drive(FORWARD)
        await page.hear(0.02)
        if first is None and page.state["control"] == "human":
            first = console.session.ticks


def test_an_episode_by_hand_from_take_over_to_label(tmp_path):
    async def work(console):
        async with connect(console.url) as socket:
            page = Page(socket)
            await page.until(lambda s: True, "a state")
            assert not (await page.ask("start_episode"))["ok"], "nobody is in control yet"
            await at_the_controls(page)
            assert (await page.ask("start_episode"))["ok"]
            await page.until(lambda s: s["episode"]["state"] == "running", "an episode")
            await drive_for(console, page, 12)
            state = page.state
            assert state["seat"] == {"connection": page.connection, "operator": "ann", "driving": True}
            while page.state["control"] == "human":
                await page.drive([0.0] * 6, held=False)
                await page.hear(0.02)
            assert page.state["control"] in ("handback", "autonomous")
            assert (await page.ask("success"))["ok"]
            await page.until(
                lambda s: s["episode"]["state"] == "committed" and s["episode"]["outcome"] == "success", "the label"
            )
            return page.state["episode"]["id"]

    with live(tmp_path, skills=(0.0, 0.0)) as console:  # a policy that never arrives
        identity = run(work(console))
    with EpisodeStore.open(tmp_path / "store") as store:
        episode = store.read(identity)
        assert episode.meta.success is True
        human = episode.source == 1
        assert human.sum() > 5
        assert np.allclose(episode.action_human[human][:, 0], ACTION.high[0])
        assert episode.meta.extra["interventions"][0]["operator"] == "ann"


def test_a_lost_connection_stops_the_robot_and_nobody_goes_on_by_themselves(tmp_path):
    async def work(console):
        socket = await connect(console.url)
        page = Page(socket)
        await at_the_controls(page)
        await page.ask("start_episode")
        await page.until(lambda s: s["episode"]["state"] == "running", "an episode")
        await drive_for(console, page, 6)
        socket.transport.abort()  # the cable is pulled
        async with connect(console.url) as other:
            second = Page(other)
            await second.until(lambda s: s["seat"] is None, "the seat is free")
            await asyncio.sleep(0.3)
            before = len(console.session.commands), console.session.ticks
            while console.session.ticks < before[1] + 8:
                await asyncio.sleep(0.05)
            new = console.session.ticks - before[1]
            moved = np.abs([c[:4] for c in console.session.commands[-new:]]).max()
            assert moved == 0.0, "the robot holds"
            await second.hear(0.1)
            assert second.state["control"] == "human", "a loss is no hand-back: the policy does not go on"
            await at_the_controls(second, "ben")
            assert (await second.ask("hand_back"))["ok"]
            await second.until(lambda s: s["control"] in ("handback", "autonomous"), "a person hands back")

    with live(tmp_path, skills=(0.0,), steps=2000) as console:
        run(work(console))


def test_two_race_for_control_and_one_gets_it(tmp_path):
    async def work(console):
        async with connect(console.url) as a, connect(console.url) as b:
            first, second = Page(a), Page(b)
            await first.until(lambda s: True, "a state")
            await second.until(lambda s: True, "a state")
            for _ in range(20):
                answers = await asyncio.gather(first.ask("take_seat", operator="ann"), second.ask("take_seat", operator="ben"))
                assert sum(x["ok"] for x in answers) == 1
                loser, winner = (first, second) if answers[1]["ok"] else (second, first)
                assert not (await loser.ask("success"))["ok"]
                assert not (await loser.ask("leave_seat"))["ok"]
                await loser.hear(0.06)
                await loser.drive(FORWARD)
                await loser.hear(0.02)
                assert console.session._drive is None or not console.session._drive[0].held
                assert (await winner.ask("leave_seat"))["ok"]
            assert console.office.desk.counts.without_seat >= 60
            assert (await loser.ask("estop"))["ok"], "stopping is for everybody"
            await loser.until(lambda s: s["guard"] == "estop", "the stop")
            assert not (await loser.ask("reset_estop"))["ok"]

    with live(tmp_path) as console:
        run(work(console))


def test_replayed_late_and_foreign_messages_do_not_move(tmp_path):
    async def work(console):
        desk = console.office.desk
        async with connect(console.url) as a:
            page = Page(a)
            await at_the_controls(page)
            while console.session._drive is None:
                old = await page.drive(FORWARD)
                await page.hear(0.1)
            samples, late = console.session._drive, desk.counts.late
            assert samples[0].axes[0] == 1.0
            for _ in range(5):
                await page.socket.send(old)
            while desk.counts.replayed < 5:
                await page.hear(0.05)
            assert console.session._drive is samples, "nothing of it arrived"
            stale = page.tick
            await page.hear(0.6)
            await page.drive(FORWARD, echo=stale)  # what waited in a network buffer
            await page.drive(FORWARD, echo=time.monotonic_ns() + 10**9)
            while desk.counts.late < late + 2:
                await page.hear(0.05)
            assert desk.counts.late == late + 2
            assert console.session._drive is samples
            assert (await page.ask("hold", identity="one-and-only", on=True))["ok"]
            again = await page.ask("hold", identity="one-and-only", on=False)
            assert not again["ok"]
            assert "before" in again["text"]
            assert console.session._holding

    with live(tmp_path) as console:
        run(work(console))


def test_commands_leave_through_the_safety_filter(tmp_path):
    """Full deflection on every axis for a second: no command is beyond the filter's limits."""

    async def work(console):
        async with connect(console.url) as socket:
            page = Page(socket)
            await at_the_controls(page)
            await page.ask("start_episode")
            await page.until(lambda s: s["episode"]["state"] == "running", "an episode")
            began = console.session.ticks
            while console.session.ticks < began + 40:
                await page.drive([float(np.sign(np.sin(page.seq / 5)))] * 6, gripper=bool(page.seq % 3))
                await page.hear(0.02)
        commands = np.array(console.session.commands)
        assert np.abs(commands).max() > 0
        assert (np.abs(commands[:, :4]) <= np.array(LIMITS.velocity[:4]) / 20.0 + 1e-6).all()
        assert (commands[:, :4] <= np.array(ACTION.high[:4]) + 1e-6).all()

    with live(tmp_path, skills=(0.0,)) as console:
        run(work(console))


def test_ten_thousand_random_messages(tmp_path):
    rng = np.random.default_rng(0)
    words = [
        "drive",
        "ask",
        "seen",
        "tick",
        "",
        None,
        3,
        True,
        [],
        {},
        "take_seat",
        "estop",
        "__proto__",
        "success",
        "\ud800",
        "🤖" * 40,
    ]
    numbers = [0, 1, -1, 1e308, -1e308, 2**63, 2**70, 0.5, 1.0000001, -0.0, 10**400]

    def value(depth: int = 0):
        kind = rng.integers(0, 8 if depth < 3 else 4)
        if kind == 0:
            return words[int(rng.integers(len(words)))]
        if kind == 1:
            return numbers[int(rng.integers(len(numbers)))]
        if kind == 2:
            return bool(rng.integers(2))
        if kind == 3:
            return None
        if kind in (4, 5):
            return [value(depth + 1) for _ in range(int(rng.integers(0, 8)))]
        keys = ["type", "seq", "echo", "held", "axes", "gripper", "id", "name", "values", "on", "text", "x" * 50]
        return {keys[int(rng.integers(len(keys)))]: value(depth + 1) for _ in range(int(rng.integers(0, 6)))}

    def message(tick: int) -> str | bytes:
        kind = int(rng.integers(0, 6))
        if kind == 0:
            return rng.bytes(int(rng.integers(0, 300)))
        if kind == 1:
            return "".join(chr(int(c)) for c in rng.integers(1, 1000, int(rng.integers(0, 100))))
        if kind == 2:
            return json.dumps(value())
        drive = {"type": "drive", "seq": int(rng.integers(0, 10**6)), "echo": tick, "held": True, "axes": FORWARD}
        if kind == 3:
            drive[list(drive)[int(rng.integers(1, 5))]] = value()
        elif kind == 4:
            drive["axes"] = [float(rng.normal() * 10) for _ in range(int(rng.integers(4, 8)))]
        elif kind == 5:
            text = json.dumps(drive)
            return text[: int(rng.integers(len(text)))].replace("1.0", ["NaN", "Infinity", "1e999"][int(rng.integers(3))])
        return json.dumps(drive)

    async def work(console):
        sent = 0
        while sent < 10_000:
            try:
                async with connect(console.url) as socket:
                    page = Page(socket)
                    await page.until(lambda s: True, "a state")
                    if rng.random() < 0.5:
                        await page.ask("take_seat", operator="fuzz")
                    for _ in range(200):
                        await socket.send(message(page.tick))
                        sent += 1
                    await page.hear(0.02)
            except websockets.ConnectionClosed:
                continue
        async with connect(console.url) as socket:
            await socket.send("x" * 100_000)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await Page(socket).hear(5.0)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009, "too large"
        async with connect(console.url) as socket:
            page = Page(socket)
            await page.until(lambda s: s["seat"] is None, "the seat is free again")
            await at_the_controls(page)
            assert console.session.error is None
            assert console.office.problem == ""
            drive = console.session._drive
            assert drive is None or max(map(abs, drive[0].axes)) <= 1.0

    with live(tmp_path, skills=(0.0,), auto=True) as console:
        run(work(console))
        commands = np.array(console.session.commands)
        assert np.isfinite(commands).all()
        assert (np.abs(commands[:, :4]) <= np.array(ACTION.high[:4]) + 1e-6).all()
