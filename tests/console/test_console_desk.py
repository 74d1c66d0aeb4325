"""The seat and the messages without a socket: never two in control, never an unlimited command, whatever comes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robot_rl.console.access import Access
from robot_rl.console.control import Desk, DeskConfig, Refused
from robot_rl.console.messages import COMMANDS, MAX_BYTES, Ask, Drive, MessageError, Seen, parse

S = 1_000_000_000
REST = (0.0,) * 6


def drive(**changes):
    return {"type": "drive", "seq": 1, "echo": 5, "held": True, "axes": [0, 0.5, -1, 0, 0, 1], **changes}


# ---- messages


def test_what_a_page_says_is_read():
    assert parse(json.dumps(drive())) == Drive(1, 5, True, (0.0, 0.5, -1.0, 0.0, 0.0, 1.0))
    assert parse(b'{"type":"seen","camera":"front","number":3}') == Seen("front", 3)
    assert parse(b'{"type":"seen","camera":"front","number":3,"took":7.5}') == Seen("front", 3, 7.5)
    ask = parse(json.dumps({"type": "ask", "id": "12345678", "name": "hold", "values": {"on": True}}))
    assert isinstance(ask, Ask)
    assert dict(ask.values) == {"on": True}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("", "no JSON"),
        ("[" * 5000, "no JSON"),
        ("[]", "accepted is a JSON object"),
        ('{"type":"seen","camera":"front","number":3,"took":-1}', "took: accepted are milliseconds"),
        ('{"type":"drive"}', "missing axes, echo, held, seq"),
        (json.dumps(drive(more=1)), "unknown keys more"),
        (json.dumps(drive(axes=[0, 0, 0, 0, 0, 1.01])), "axes.yaw"),
        (json.dumps(drive(axes=[True, 0, 0, 0, 0, 0])), "axes.x"),
        (json.dumps(drive(axes=[0] * 7)), "6 numbers"),
        (json.dumps(drive()).replace("0.5", "NaN"), "no JSON"),
        (json.dumps(drive()).replace("0.5", "1e999"), "axes.y"),
        (json.dumps(drive(held=1)), "held"),
        (json.dumps(drive(seq=-1)), "seq"),
        (json.dumps(drive(seq=1.0)), "seq"),
        (json.dumps({"type": "ask", "id": "12345678", "name": "format_disk"}), "accepted are take_seat"),
        (json.dumps({"type": "ask", "id": "short", "name": "estop"}), "id"),
        (json.dumps({"type": "ask", "id": "12345678", "name": "hold", "values": {}}), "missing on"),
        (json.dumps({"type": "ask", "id": "12345678", "name": "hold", "values": {"on": 1}}), "hold.on"),
        (json.dumps({"type": "ask", "id": "12345678", "name": "estop", "values": {"on": True}}), "unknown keys on"),
        (json.dumps({"type": "ask", "id": "12345678", "name": "note", "values": {"text": "\x00"}}), "printable"),
        (json.dumps({"type": "ask", "id": "12345678", "name": "note", "values": {"text": "\ud800"}}), "printable"),
        (json.dumps({"type": "ask", "id": "12345678", "name": "prefer", "values": {"pair": "x", "choice": "both"}}), "first, second"),
        ("x" * (MAX_BYTES + 1), "at most"),
    ],
)  # fmt: skip
def test_everything_else_is_refused_with_a_reason(data, what):
    with pytest.raises(MessageError, match=what):
        parse(data)


@given(st.one_of(st.binary(max_size=400), st.text(max_size=400), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=8) | st.dictionaries(st.sampled_from(["type", "seq", "echo", "held", "axes", "id", "name", "values"]), x),
).map(lambda v: json.dumps(v))))  # fmt: skip
def test_whatever_is_parsed_is_within_its_limits(data):
    try:
        found = parse(data)
    except MessageError:
        return
    if isinstance(found, Drive):
        assert max(map(abs, found.axes)) <= 1.0
        assert len(found.axes) == 6


# ---- the seat


def desk_with(*names: str, now: int = 0, **config):
    desk = Desk(DeskConfig(**config))
    return desk, [desk.join(n, now) for n in names]


def test_one_seat_kept_by_fresh_messages():
    desk, (a, b) = desk_with("a", "b")
    desk.take(a, "ann", 0)
    with pytest.raises(Refused, match="ann is in control"):
        desk.take(b, "ben", S)
    for i in range(1, 50):
        now = i * S // 10
        assert desk.drive(a, Drive(i, now, False, REST), now) is not None
    with pytest.raises(Refused):
        desk.take(b, "ben", 6 * S)
    assert desk.take(b, "ben", 8 * S).name == "ben", "whoever is silent for two seconds is gone"
    assert desk.drive(a, Drive(99, 8 * S, True, REST), 8 * S) is None
    assert desk.counts.lost == 1
    assert not desk.leave(a)
    assert desk.part(b)
    assert desk.seat is None


def test_a_watcher_may_stop_and_note_and_nothing_else():
    desk, (a, b) = desk_with("a", "b")
    desk.take(a, "ann", 0)
    for i, (name, spec) in enumerate(COMMANDS.items()):
        ask = Ask(f"request-{i}", name, {})
        if spec.who == "anyone":
            desk.allow(b, ask, 1)
        else:
            with pytest.raises(Refused, match="ann is in control"):
                desk.allow(b, ask, 1)
    assert {n for n, s in COMMANDS.items() if s.who == "anyone"} == {"take_seat", "estop", "note"}


def test_a_request_is_carried_out_once_whoever_repeats_it():
    desk, (a, b) = desk_with("a", "b")
    desk.allow(a, Ask("request-1", "estop", {}), 0)
    for connection in (a, b):
        with pytest.raises(Refused, match="before"):
            desk.allow(connection, Ask("request-1", "estop", {}), 1)


def test_late_and_future_commands_do_not_move():
    desk, (a,) = desk_with("a", round_trip_s=0.4)
    desk.take(a, "ann", S)
    assert desk.drive(a, Drive(1, S, True, REST), S) is not None
    assert desk.drive(a, Drive(2, S, True, REST), S + int(0.41 * S)) is None
    assert desk.drive(a, Drive(3, 3 * S, True, REST), 2 * S) is None
    assert desk.counts.late == 2


def test_a_flood_is_thinned_and_malformed_messages_end_a_connection():
    desk, (a,) = desk_with("a", rate=100.0, burst=20.0)
    assert sum(desk.admit(a, 0) for _ in range(1000)) == 20
    assert sum(desk.admit(a, S // 10) for _ in range(1000)) == 10
    assert [desk.malformed(a) for _ in range(50)].index(True) == 49


@given(st.integers(0, 2**32 - 1))
def test_random_pages_never_drive_two_at_once(seed):
    """Pages join, race, leave, replay and drive in any order: whoever gets through holds the seat, and only fresh numbers do."""
    rng = np.random.default_rng(seed)
    desk, now, pages, passed = Desk(), 0, [], []
    highest: dict[int, int] = {}
    for i in range(400):
        now += int(rng.integers(0, S // 3))
        if not pages or rng.random() < 0.05:
            pages.append(desk.join("x", now))
        page = pages[int(rng.integers(len(pages)))]
        what = rng.random()
        if what < 0.15:
            try:
                desk.take(page, "x", now)
            except Refused:
                assert desk.seat is not None
                assert desk.seat.connection != page
        elif what < 0.2:
            desk.leave(page)
        elif what < 0.25:
            pages.remove(page)
            desk.part(page)
        elif what < 0.3:
            desk.sweep(now)
        else:
            sent = Drive(int(rng.integers(0, i + 2)), now - int(rng.integers(-S // 5, S)), True, REST)
            holder = desk.seat
            if desk.drive(page, sent, now) is not None:
                assert holder is not None
                assert holder.connection == page
                assert sent.seq > highest.get(page, -1)
                assert 0 <= now - sent.echo <= 0.4 * S
                passed.append(page)
            highest[page] = max(highest.get(page, -1), sent.seq)


# ---- who is let in


def test_beyond_loopback_a_token_is_needed():
    with pytest.raises(ValueError, match="other machines"):
        Access("0.0.0.0")
    assert Access().lets_in({})


def test_only_its_own_pages_and_its_own_names():
    here = Access()
    for host in ("localhost:8780", "127.0.0.1:8780", "[::1]:8780"):
        assert here.own_page({"host": host, "origin": f"http://{host}"})
        assert here.own_page({"host": host})
    for headers in (
        {"host": "localhost:8780", "origin": "http://evil.example"},
        {"host": "localhost:8780", "origin": "null"},
        {"host": "localhost:8780", "origin": "http://localhost:9999"},
        {"host": "evil.example", "origin": "http://evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "[::1"},
        {},
    ):
        assert not here.own_page(headers), headers
    there = Access("0.0.0.0", "a-token-of-some-length", ("robot.lab",))
    assert there.own_page({"host": "192.168.1.7:8780", "origin": "http://192.168.1.7:8780"})
    assert there.own_page({"host": "robot.lab:8780"})
    assert not there.own_page({"host": "rebound.example:8780"})


def test_tokens():
    access = Access("0.0.0.0", "a-token-of-some-length")
    assert access.login("wrong") is None
    assert access.login("a-token-of-some-lengthX") is None
    assert access.login("\ud800") is None
    cookie = access.login("a-token-of-some-length")
    assert cookie
    assert access.lets_in({"robot_rl_console": cookie})
    assert not access.lets_in({"robot_rl_console": cookie[:-1]})
    assert access.lets_in({}, "Bearer a-token-of-some-length")
    assert not access.lets_in({}, "Bearer ")
    assert not access.lets_in({}, "Basic a-token-of-some-length")
