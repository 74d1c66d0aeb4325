"""A candidate does not take over because it has played more gate episodes than the head that acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_kit import lines, tiny

from robot_rl.runtime.gate import GateEvent, PromotionGate
from robot_rl.training import posttrain

# Whatever there is may act, and a challenger plays on until it is better.
GATE = {"n_min": 2, "n_max": 8, "margin": 0.99, "min_gain": 0.05}


def _evidence(gate: PromotionGate, version: int, mode: str) -> tuple[int, int]:
    """Episodes of the candidate with the one that is recorded now, and of the head that acts."""
    return gate.evidence(version, mode)[1] + 1, gate.evidence(gate.acting, gate.acting_mode)[1]


def test_the_acting_head_plays_whatever_starts_its_challenger_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    challenged: list[tuple[int, int]] = []
    record = PromotionGate.record

    def watched(self: PromotionGate, version: int, success: bool, **told: Any) -> list[GateEvent]:
        if self.acting:
            challenged.append(_evidence(self, version, told["mode"]))
        return record(self, version, success, **told)

    monkeypatch.setattr(PromotionGate, "record", watched)
    posttrain.run(tiny(tmp_path, gate=GATE, schedule={"candidate_every": 50}))
    assert max(n for n, _ in challenged) > GATE["n_min"]
    assert all(acting >= candidate for candidate, acting in challenged)


def test_promoting_at_the_threshold_asks_no_more_of_the_acting_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[int] = []
    monkeypatch.setattr(PromotionGate, "record_acting", lambda self, success, version=None: played.append(version))
    posttrain.run(tiny(tmp_path, gate=GATE | {"min_gain": None}, schedule={"candidate_every": 50}))
    assert [line["event"] for line in lines(tmp_path, "gate.jsonl")].count("promoted") > 1  # somebody acted and was challenged
    assert played == []
