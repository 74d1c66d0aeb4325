"""The gate of a running session: which version acts, from recorded outcomes, overrides and restarts."""

from __future__ import annotations

import numpy as np
import pytest
from store_kit import new_store, write

from robot_rl.runtime.gate import GateConfig
from robot_rl.runtime.live_gate import LiveGate, OutcomeReader, Standing
from robot_rl.types import EpisodeMeta

CONFIG = GateConfig(reference_n_min=10, n_min=10, n_max=60)


def base_known(gate: LiveGate, successes: int = 5) -> None:
    for i in range(10):
        gate.record(f"b{i}", 0, i < successes)


def test_a_version_proves_itself_on_a_share_of_the_episodes(tmp_path):
    gate = LiveGate(CONFIG, tmp_path / "gate.json")
    gate.offer(1, "a" * 64)
    assert gate.standing == Standing(), "the base acts until it is known how good it is"
    base_known(gate)
    gate.offer(2, "b" * 64)
    standing = gate.standing
    assert (standing.promoted, standing.candidate, standing.state) == (0, 2, "probation")
    assert 0 < standing.share <= 0.2
    for i in range(40):
        gate.record(f"c{i}", 2, True)
        if gate.standing.promoted:
            break
    assert gate.standing.promoted == 2
    events = [gate.record(f"d{i}", 2, False) for i in range(60)]
    assert any(e.event == "rolled_back" for es in events for e in es)
    assert gate.standing.promoted == 0


def test_an_outcome_counts_once_also_after_a_restart(tmp_path):
    gate = LiveGate(CONFIG, tmp_path / "gate.json")
    base_known(gate, 4)
    gate.offer(1, "a" * 64)
    gate.record("c", 1, True)
    again = LiveGate(CONFIG, tmp_path / "gate.json")
    assert again.base == [4, 10]
    assert again.standing == gate.standing
    again.record("c", 1, True)
    assert again.gate.evidence(1) == (1, 1)


def test_without_a_gate_every_version_acts_and_a_person_overrules(tmp_path):
    gate = LiveGate(CONFIG, tmp_path / "gate.json", enabled=False)
    with pytest.raises(ValueError, match="acts already"):
        gate.rollback()
    with pytest.raises(ValueError, match="no version"):
        gate.promote()
    gate.offer(1, "a" * 64)
    assert gate.standing.promoted == 1
    assert gate.rollback() == 0
    gate.offer(2, "b" * 64)
    assert gate.standing.promoted == 0, "what a person rolled back to stays"
    assert gate.promote() == 2
    gate.offer(3, "c" * 64)
    assert gate.standing.promoted == 2
    assert gate.rollback() == 0


def test_outcomes_of_many_stores_as_they_become_known(tmp_path):
    rng = np.random.default_rng(0)
    reader = OutcomeReader([tmp_path / "a", tmp_path / "b"])
    assert reader.poll() == []
    with new_store(tmp_path / "a") as a, new_store(tmp_path / "b") as b:
        write(a, rng, 5, EpisodeMeta("a1", weights_version=3), success=True)
        write(b, rng, 6, EpisodeMeta("b1"))
        assert reader.poll() == [("a1", 3, True)]
        assert reader.poll() == []
        b.set_success("b1", False)
        assert reader.poll() == [("b1", 0, False)]
        assert (reader.episodes, reader.successes, reader.steps) == (2, 1, 11)
