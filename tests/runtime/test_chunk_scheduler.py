"""Which row runs when: absolute steps, late chunks by the measured step, blending that never averages a gripper."""

from __future__ import annotations

import numpy as np
import pytest
from spine_kit import ARM

from robot_rl.runtime.chunk_scheduler import ChunkScheduler


def chunk(value: float, rows: int = 6) -> np.ndarray:
    """Row i is value + i / 100 in every dimension."""
    return np.repeat(value + np.arange(rows)[:, None] / 100, 3, 1).astype(np.float32)


def push(scheduler: ChunkScheduler, step: int, now: int, value: float, identity: int = 0, version: int = 1) -> bool:
    return scheduler.push(step, now, chunk(value), chunk(value + 50), identity, version)


def test_rows_belong_to_absolute_steps() -> None:
    scheduler = ChunkScheduler(ARM, 4)
    assert scheduler.row(0) is None
    assert scheduler.wants_chunk(0)
    assert push(scheduler, 10, 10, 1.0, identity=7, version=3)
    assert scheduler.row(9) is None
    for i in range(4):
        row = scheduler.row(10 + i)
        assert (row.decision_id, row.chunk_row, row.version, row.chunk_started) == (7, i, 3, i == 0)
        np.testing.assert_allclose(row.command, 1.0 + i / 100)
        np.testing.assert_allclose(row.base, 51.0 + i / 100)
        assert scheduler.rows_left(10 + i) == 4 - i
    assert scheduler.row(14) is None  # rows beyond n_action_steps never run
    assert scheduler.wants_chunk(14)


@pytest.mark.parametrize("late", range(6))
def test_a_late_chunk_loses_the_rows_whose_step_has_passed(late: int) -> None:
    scheduler = ChunkScheduler(ARM, 4)
    accepted = push(scheduler, 10, 10 + late, 1.0)
    assert accepted == (late < 4)
    assert scheduler.late_chunks == (late >= 4)
    if accepted:
        row = scheduler.row(10 + late)
        assert (row.chunk_row, row.chunk_started) == (late, True)
        assert scheduler.rows_left(10 + late) == 4 - late
    else:
        assert scheduler.row(10 + late) is None


def test_a_chunk_too_late_leaves_the_running_one() -> None:
    scheduler = ChunkScheduler(ARM, 4, blend_steps=2)
    push(scheduler, 4, 4, 1.0, identity=1)
    assert not push(scheduler, 0, 4, 9.0, identity=2)
    assert scheduler.row(5).decision_id == 1


def test_the_next_chunk_is_asked_for_early_enough() -> None:
    scheduler = ChunkScheduler(ARM, 4, replan_margin=2)
    push(scheduler, 0, 0, 1.0)
    assert [scheduler.wants_chunk(t) for t in range(5)] == [False, False, True, True, True]
    scheduler.clear()
    assert scheduler.row(0) is None
    assert scheduler.wants_chunk(0)


def test_overlap_is_blended_linearly_and_grippers_take_the_newest_value() -> None:
    scheduler = ChunkScheduler(ARM, 6, blend_steps=3)
    push(scheduler, 0, 0, 0.0, identity=1)
    for t in range(2):
        scheduler.row(t)
    push(scheduler, 2, 2, 10.0, identity=2)
    for t, weight in ((2, 0.25), (3, 0.5), (4, 0.75), (5, 1.0)):
        row = scheduler.row(t)
        new, old = 10.0 + (t - 2) / 100, t / 100
        np.testing.assert_allclose(row.command[:2], weight * new + (1 - weight) * old, rtol=1e-5)
        assert row.command[2] == np.float32(new)
        assert row.decision_id == 2
        np.testing.assert_allclose(row.base, new + 50)


def test_blending_ends_with_the_old_chunk() -> None:
    scheduler = ChunkScheduler(ARM, 3, blend_steps=9)
    push(scheduler, 0, 0, 0.0)
    push(scheduler, 2, 2, 10.0)
    assert scheduler.row(2).command[0] < 10
    np.testing.assert_allclose(scheduler.row(3).command, 10.01)


def test_without_blending_the_switch_is_hard() -> None:
    scheduler = ChunkScheduler(ARM, 6)
    push(scheduler, 0, 0, 0.0)
    push(scheduler, 2, 2, 10.0)
    np.testing.assert_array_equal(scheduler.row(2).command, chunk(10.0)[0])


def test_a_late_chunk_is_blended_in_from_its_arrival_on() -> None:
    scheduler = ChunkScheduler(ARM, 6, blend_steps=2)
    push(scheduler, 0, 0, 0.0)
    push(scheduler, 1, 3, 10.0)
    for t, weight in ((3, 1 / 3), (4, 2 / 3), (5, 1.0)):
        new, old = 10.0 + (t - 1) / 100, t / 100
        np.testing.assert_allclose(scheduler.row(t).command[:2], weight * new + (1 - weight) * old, rtol=1e-5)


def test_what_runs_is_handed_on_and_what_continues_it_is_not_blended() -> None:
    """All rows of the running chunk from the step on, also those that may not run; frozen ones only as far as any can run."""
    scheduler = ChunkScheduler(ARM, 4, blend_steps=3)
    assert scheduler.running(0, 2) is None
    push(scheduler, 10, 10, 1.0)
    running = scheduler.running(12, 1)
    np.testing.assert_array_equal(running.rows, chunk(1.0)[2:])
    np.testing.assert_array_equal(running.base, chunk(51.0)[2:])
    assert (running.frozen, scheduler.running(12, 9).frozen) == (1, 2)
    assert scheduler.running(14, 1) is None, "a chunk that has run is over, whatever rows it has left"
    assert scheduler.push(12, 13, chunk(9.0), chunk(59.0), 2, 1, continues=True)
    np.testing.assert_array_equal(scheduler.row(13).command, chunk(9.0)[1])


@pytest.mark.parametrize("change", [{"n_action_steps": 0}, {"replan_margin": -1}, {"blend_steps": -1}])
def test_bad_settings_are_named(change: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        ChunkScheduler(ARM, **{"n_action_steps": 4, **change})
