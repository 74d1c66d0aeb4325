"""Replies as models write them, and what must come of each."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robot_rl.rewards.vlm.parsing import parse
from robot_rl.rewards.vlm.questions import claim, delta, done, pair, rubric, shuffled_progress, trend

P = np.zeros((8, 8, 3), np.uint8)
PAIR, DONE, DELTA = pair("to go", [P], [P]), done("to go", [P]), delta("to go", P, P)
RUBRIC, TREND, CLAIM = rubric("to go", [P]), trend("to go", [P]), claim("to go", [P])
FRAMES = shuffled_progress("to go", P, [P, P])
OK = '{"analysis": "a", "label": 1}'


def frames(*rows: tuple[object, object]) -> str:
    return json.dumps({"frames": [{"i": i, "seen": "x", "progress": p} for i, p in rows]})


CORPUS = [
    # question, text, rung, reason
    (PAIR, OK, "json", ""),
    (PAIR, f"  \n{OK}\n", "json", ""),
    (PAIR, '{"analysis": "", "label": 0}', "json", ""),
    (PAIR, '{"analysis": "both", "label": -1}', "json", ""),
    (PAIR, f"```json\n{OK}\n```", "fenced", ""),
    (PAIR, f"```\n{OK}\n```", "fenced", ""),
    (PAIR, f"Sure!\r\n```JSON\r\n{OK}\r\n```\r\nDone.", "fenced", ""),
    (PAIR, f"```json\n{OK}\n```\n```json\n" + OK.replace("1", "0") + "\n```", "fenced", ""),
    (PAIR, f"I think: {OK}", "embedded", ""),
    (PAIR, f"{OK} and so on {OK.replace('1', '0')}", "embedded", ""),
    (PAIR, 'x {"analysis": "a } in \\"text\\" {", "label": 1} y', "embedded", ""),
    (PAIR, "Image 2 is closer, so the label is 1", "word", ""),
    (PAIR, "label: -1", "word", ""),
    (PAIR, "0", "word", ""),
    (PAIR, "first I said 0\nbut now 1", "word", ""),
    (PAIR, "The answer is 2", "", "parse"),
    (PAIR, "progress is 1.5", "", "parse"),
    (PAIR, "100 % sure", "", "parse"),
    (PAIR, "1%", "", "parse"),
    (PAIR, "v1", "", "parse"),
    (PAIR, "I cannot tell.", "", "parse"),
    (PAIR, "", "", "parse"),
    (PAIR, '{"analysis": "a", "label": 1', "", "parse"),
    (PAIR, '{"analysis": "a", "lab', "", "parse"),
    (PAIR, '```json\n{"analysis": "1"', "", "parse"),
    (PAIR, "[1", "", "parse"),
    (PAIR, '{"analysis": "a", "label": 2}', "json", "schema"),
    (PAIR, '{"analysis": "a", "label": "1"}', "json", "schema"),
    (PAIR, '{"analysis": "a", "label": true}', "json", "schema"),
    (PAIR, '{"analysis": "a", "label": 1.0}', "json", "schema"),
    (PAIR, '{"analysis": "a", "label": null}', "json", "schema"),
    (PAIR, '{"label": 1}', "json", "schema"),
    (PAIR, '{"analysis": "a"}', "json", "schema"),
    (PAIR, '{"analysis": 3, "label": 1}', "json", "schema"),
    (PAIR, '{"analysis": "a", "label": 1, "sure": true}', "json", "schema"),
    (PAIR, f"[{OK}]", "json", "schema"),
    (PAIR, '{"result": ' + OK + "}", "json", "schema"),
    (PAIR, '{"analysis": "a", "label": 0, "label": 1}', "", "parse"),
    (PAIR, '{"analysis": "a", "label": NaN}', "", "parse"),
    (PAIR, "{'analysis': 'a', 'label': 1}", "", "parse"),
    (PAIR, OK.replace("}", ",}"), "", "parse"),
    (FRAMES, frames((2, 10), (3, 90)), "json", ""),
    (FRAMES, frames((3, 90), (2, 10)), "json", ""),
    (FRAMES, frames((2, 10.5), (3, 0)), "json", ""),
    (FRAMES, frames((2, 10)), "json", "count_mismatch"),
    (FRAMES, frames((2, 10), (2, 90)), "json", "count_mismatch"),
    (FRAMES, frames((1, 10), (2, 90)), "json", "count_mismatch"),
    (FRAMES, frames((2, 10), (3, 90), (4, 95)), "json", "count_mismatch"),
    (FRAMES, frames(), "json", "count_mismatch"),
    (FRAMES, frames((2, 10), (3, 101)), "json", "schema"),
    (FRAMES, frames((2, -1), (3, 50)), "json", "schema"),
    (FRAMES, frames((2, "10"), (3, 50)), "json", "schema"),
    (FRAMES, frames((2.5, 10), (3, 50)), "json", "schema"),
    (FRAMES, "10 and 90", "", "parse"),
    (DONE, '{"success": true, "confidence": 0.9}', "json", ""),
    (DONE, '{"success": "true", "confidence": 0.9}', "json", "schema"),
    (DONE, '{"success": 1, "confidence": 0.9}', "json", "schema"),
    (DONE, '{"success": true, "confidence": 90}', "json", "schema"),
    (DONE, "true", "", "parse"),
    (DELTA, '{"analysis": "", "delta": -99}', "json", ""),
    (DELTA, '{"analysis": "", "delta": -100}', "json", "schema"),
    (DELTA, '{"analysis": "", "delta": 1e999}', "json", "schema"),
    (RUBRIC, '{"analysis": "", "score": 5}', "json", ""),
    (RUBRIC, '{"analysis": "", "score": 0}', "json", "schema"),
    (RUBRIC, "5", "", "parse"),
    (TREND, '{"analysis": "", "trend": "unclear"}', "json", ""),
    (TREND, '{"analysis": "", "trend": "up"}', "json", "schema"),
    (CLAIM, "True", "word", ""),
    (CLAIM, "I say False.", "word", ""),
    (CLAIM, "Untrue", "", "parse"),
]


@pytest.mark.parametrize(("question", "text", "rung", "reason"), CORPUS)
def test_corpus(question, text, rung, reason):
    value, why, how = parse(question, text)
    assert (how, why) == (rung, reason)
    assert (value is None) == bool(why)


def test_a_reply_that_was_cut_off_is_invalid_even_when_it_fits():
    assert parse(PAIR, OK, "length") == (None, "parse", "")


def test_deep_nesting_is_refused_quietly():
    assert parse(PAIR, "[" * 50_000)[1] == "parse"
    assert parse(PAIR, "[" * 5_000 + "]" * 5_000)[1] in ("parse", "schema")
