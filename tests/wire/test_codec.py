"""Records survive the wire exactly, and nothing but WireError comes out of a bad message."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robot_rl.types import RewardEvent, RewardKind
from robot_rl.wire import (
    EpisodeStatus,
    GuardEvent,
    GuardState,
    OperatorState,
    PolicyHealth,
    Status,
    StepReward,
    TaskState,
    WireError,
    decode,
    encode,
)

EXAMPLES = [
    StepReward("human", "01E", "01X", 3, 5, "success", 1.0, True, False, reason="pressed", confidence=0.1 + 0.2),
    EpisodeStatus("01E", "running", 4, 17, task='lift: it = "now"\n', weights_version=0, started_ns=10**18),
    GuardState("holding", "hold", True, 12, "abc", source="hold", rule="watchdog", counters={"velocity": 3, "finite": 0}),
    GuardEvent("velocity", "arm", 2, 1, 9, joint="j1", wanted=1e-300, sent=-0.0, limit=math.inf),
    OperatorState("joy", "anna", 3, True, True, False, age_ms=1.5),
    PolicyHealth("/r1/policy_node", "fine", "policy", obs_age_ms={"observation.state": 3.25}, frames_lost={"front": 0}),
    TaskState("tabletop/Lift", "pick it up", 1, 2, 3, True, True, False, 1.0, "done"),
]


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda r: type(r).__name__)
def test_every_record_comes_back_equal(record):
    assert decode(encode(record), type(record)) == record


@given(st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=40), st.integers(-(2**62), 2**62))
def test_numbers_and_texts_are_exact(number, text, integer):
    record = GuardEvent("r", "c", 1, integer, 2, joint=text, wanted=number)
    back = decode(encode(record), GuardEvent)
    assert back.joint == text
    assert back.first_ns == integer
    assert back.wanted == number or (math.isnan(number) and math.isnan(back.wanted or 0.0))


def test_absent_is_absent_and_zero_is_zero():
    keys = dict(encode(EpisodeStatus("", "idle", 0, 0)).values)
    assert "weights_version" not in keys
    assert dict(encode(EpisodeStatus("", "idle", 0, 0, weights_version=0)).values)["weights_version"] == "0"


def test_another_schema_is_refused_and_unknown_keys_are_not():
    status = encode(EXAMPLES[0])
    newer = dataclasses.replace(status, values=(*status.values, ("colour", "blue")))
    assert decode(newer, StepReward) == EXAMPLES[0]
    for schema in ("0", "2"):
        changed = tuple((k, schema if k == "schema" else v) for k, v in status.values)
        with pytest.raises(WireError, match=f"peer speaks schema {schema}"):
            decode(dataclasses.replace(status, values=changed), StepReward)


def test_an_invalid_reward_has_no_value():
    event = RewardEvent("e", 3, "vlm", float("nan"), RewardKind.POTENTIAL, valid=False, reason="timeout", event_id="x")
    back = decode(encode(StepReward.from_event(event, recorded=True)), StepReward).to_event()
    assert (back.valid, back.reason, math.isnan(back.value)) == (False, "timeout", True)
    status = encode(EXAMPLES[0])
    lied = tuple((k, "false" if k == "valid" else v) for k, v in status.values)
    with pytest.raises(WireError, match="finite if and only if valid"):
        decode(dataclasses.replace(status, values=lied), StepReward)


def test_mutated_messages_raise_wire_errors_only():
    rng = random.Random(7)
    junk = ["", "nan", "1e999", "-1", "true", "\x00", "9" * 30, "x" * 5000, "running", "1.5"]
    refused = 0
    for _ in range(3000):
        record = rng.choice(EXAMPLES)
        status = encode(record)
        values = [list(pair) for pair in status.values]
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(values))
            action = rng.randrange(4)
            if action == 0 and len(values) > 1:
                values.pop(i)
            elif action == 1:
                values[i][1] = rng.choice(junk)
            elif action == 2:
                values.append(list(rng.choice(values)))
            else:
                values[i][0] = rng.choice(junk)
        name = status.name if rng.random() < 0.8 else rng.choice(junk)
        try:
            decode(Status(name, status.message, tuple((k, v) for k, v in values)), type(record))
        except WireError:
            refused += 1
    assert refused > 1000
