"""The strip, the rest prompt and the gate's curve: what the person feels reaches the observations it was about, from the seat only."""

from __future__ import annotations

import asyncio
import json
import time

import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install 'robot_rl[console]'")
pytest.importorskip("uvicorn", reason="pip install 'robot_rl[console]'")

from console_kit import Page, connect, live

from robot_rl.console.feedback import Feelings, Reading, place
from robot_rl.console.library import gate_curve
from robot_rl.console.messages import Feel, MessageError, parse
from robot_rl.console.rest import RestClock
from robot_rl.replay.store import EpisodeStore
from robot_rl.types import RewardKind

MS = 1_000_000


def test_a_reading_is_about_what_was_on_the_screen_two_steps_before():
    stamps = 10**18 + np.arange(20, dtype=np.int64) * 50 * MS
    at = lambda ms: Reading(10**18 + ms * MS, 5, 0.5)  # noqa: E731
    # 80 ms from the camera to the eye: at 480 ms the observation of 400 ms (step 8) is what was seen.
    assert place([at(480)], stamps) == {6: 0.5}
    assert place([at(479)], stamps) == {5: 0.5}
    assert place([at(90)], stamps) == {}  # about something before the first transition
    steady = [Reading(7, int(stamps[10]), -1.0)]  # a simulation in this process stamps with the steady clock
    assert place(steady, stamps) == {6: -1.0}
    with pytest.raises(ValueError, match="not of this machine's clock"):
        place([Reading(7, 8, 0.0)], stamps)


def test_readings_wait_for_their_episode_and_one_that_never_comes_is_forgotten(monkeypatch):
    written, there = [], set()

    def write(episode, readings, operator):
        if episode in there:
            written.append((episode, [r.value for r in readings], operator))
        return episode in there

    feelings = Feelings(write)
    feelings.add("a", 0.25, "ann")
    feelings.add("a", 0.5, "ann")
    feelings.add("b", -1.0, "ann")
    assert not Feelings(write).waiting("")
    assert feelings.waiting("a")  # b is over
    assert feelings.settle("a") == 0
    there.add("b")
    assert feelings.settle("a") == 1
    assert written == [("b", [-1.0], "ann")]
    now = time.monotonic()
    assert feelings.settle("") == 0
    monkeypatch.setattr("robot_rl.console.feedback.time.monotonic", lambda: now + 100.0)
    feelings.settle("")
    assert not feelings.waiting("")


@pytest.mark.parametrize("value", ["2", "-1.5", "true", '"1"', "null", "NaN"])
def test_only_a_number_from_minus_one_to_one_is_a_feeling(value):
    assert parse('{"type":"feel","value":-0.5}') == Feel(-0.5)
    with pytest.raises(MessageError):
        parse(f'{{"type":"feel","value":{value}}}')


def test_feelings_reach_the_store_from_the_seat_alone(tmp_path):
    async def work(url: str) -> None:
        async with connect(url) as a, connect(url) as b:
            ann, ben = Page(a), Page(b)
            assert (await ann.ask("take_seat", operator="ann"))["ok"]
            assert (await ann.ask("start_episode"))["ok"]
            await ann.until(lambda s: s["episode"]["state"] == "running" and s["episode"]["step"] >= 5, "it runs")
            for _ in range(10):
                await a.send(json.dumps({"type": "feel", "value": 0.75}))
                await b.send(json.dumps({"type": "feel", "value": -1.0}))
                await ben.hear(0.05)
            await ann.until(lambda s: s["episode"]["step"] >= 20, "it goes on")
            assert (await ann.ask("success"))["ok"]
            await ann.until(lambda s: s["episode"]["state"] != "running", "it is over")

    def found():
        with EpisodeStore.open(tmp_path / "store") as store:
            return [e for i in store.episode_ids() for e in store.rewards(i) if e.source == "feedback"]

    with live(tmp_path, skills=(0.0,), steps=4000) as console:
        asyncio.run(work(console.url))
        end = time.monotonic() + 30.0
        while not (events := found()) and time.monotonic() < end:
            time.sleep(0.1)
    assert events
    assert {(e.value, e.kind, e.model_id) for e in events} == {(0.75, RewardKind.DENSE, "human:ann")}
    assert console.office.feelings.lost == 0


def test_a_rest_is_due_after_half_an_hour_and_only_a_real_break_begins_anew():
    clock = RestClock()
    now = 0.0
    minutes = []
    for _ in range(31):
        minutes.append(clock.look("ann", now))
        now += 60.0
    assert minutes[29:] == [0, 30]
    assert clock.look("", now) == 0
    assert clock.look("ann", now + 60.0) >= 30  # a minute is no break
    assert clock.look("ann", now + 500.0) == 0
    clock.look("ann", now + 2300.0)
    assert clock.look("ben", now + 2310.0) == 0  # somebody else


def test_the_gates_curve_is_what_it_decided(tmp_path):
    assert gate_curve(tmp_path) == []
    line = {
        "env_steps": 900,
        "event": "rejected",
        "version": 2,
        "successes": 3,
        "n": 10,
        "lower": 0.1,
        "upper": float("nan"),
        "reference": 0.5,
    }
    (tmp_path / "gate.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in ({**line, "event": "candidate", "n": 0, "successes": 0}, line))
    )
    assert gate_curve(tmp_path) == [
        {"steps": 900, "version": 2, "event": "rejected", "n": 10, "rate": 0.3, "low": 0.1, "high": None, "reference": 0.5}
    ]
