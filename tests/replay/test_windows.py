"""The window rule, by table and against its vectorised twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_rl.replay.windows import EpisodeArrays, WindowConfig, decision_window_ok, window, window_table
from robot_rl.types import Source

NAN = float("nan")


def arrays(reward, *, terminated=False, source=None, final_known=True, **more) -> EpisodeArrays:
    length = len(reward)
    action = np.stack([np.arange(1, length + 1), -np.arange(1, length + 1)], 1).astype(np.float32)
    source = np.zeros(length, np.uint8) if source is None else np.asarray(source, np.uint8)
    return EpisodeArrays(
        action, np.asarray(reward, np.float32), source, terminated, np.array([False, True]), final_known, **more
    )


@pytest.mark.parametrize(
    ("reward", "terminated", "source", "known", "t", "expected"),
    [
        # reward, discount, next step, weight of windows of 3 with gamma 0.5 over 5 steps
        ([1, 2, 4, 8, 16], False, None, True, 0, (3.0, 0.125, 3, 1.0)),
        ([1, 2, 4, 8, 16], False, None, True, 2, (12.0, 0.125, 5, 1.0)),  # truncation bootstraps from the last observation
        ([1, 2, 4, 8, 16], True, None, True, 2, (12.0, 0.0, 5, 1.0)),  # termination does not
        ([1, 2, 4, 8, 16], True, None, True, 3, (16.0, 0.0, 5, 1.0)),  # early termination is exact and kept
        ([1, 2, 4, 8, 16], False, None, True, 3, (16.0, 0.25, 5, 0.0)),  # cut by truncation: dropped
        ([1, 2, 4, 8, 16], False, None, False, 2, (12.0, 0.125, 5, 0.0)),  # the last observation was never seen
        ([1, 2, 4, 8, 16], True, None, False, 2, (12.0, 0.0, 5, 1.0)),
        ([1, NAN, 4, 8, 16], False, None, True, 1, (NAN, 0.125, 4, 0.0)),
        ([1, NAN, 4, 8, 16], False, None, True, 2, (12.0, 0.125, 5, 1.0)),
        ([1, 2, 4, 8, 16], False, [0, 0, Source.HOLD, 0, 0], True, 0, (3.0, 0.125, 3, 0.0)),
        ([1, 2, 4, 8, 16], False, [Source.LATCHED, Source.BLEND, Source.SAFETY, 0, 0], True, 0, (3.0, 0.125, 3, 1.0)),
    ],
)
def test_rule(reward, terminated, source, known, t, expected):
    found = window(arrays(reward, terminated=terminated, source=source, final_known=known), t, 3, 0.5)
    np.testing.assert_equal((found.reward, found.discount, found.next_step, found.weight), expected)


def test_a_window_stops_where_the_mdp_ends_in_the_middle():
    """Reward 4 ends it: what leads there is exact and bootstraps from nothing, what comes after it begins anew."""
    episode = arrays([1, 2, 4, NAN, 16], ends=np.array([False, False, True, False, False]))
    found = [window(episode, t, 4, 0.5) for t in range(5)]
    assert [(w.reward, w.discount, w.next_step, w.weight) for w in found[:3]] == [
        (3.0, 0.0, 3, 1.0),
        (4.0, 0.0, 3, 1.0),
        (4.0, 0.0, 3, 1.0),
    ]
    assert [w.weight for w in found[3:]] == [0.0, 0.0]
    assert found[1].action.tolist() == [[2, -2], [3, -3], [3, 0], [3, 0]]


def test_padding_holds_absolute_zeroes_delta_and_prefers_the_proposal():
    chunk = np.full((1, 5, 2), 9.0, np.float32)
    starts, ids = np.array([False, False, False, True, False]), np.zeros(5, int)
    plain = window(arrays([0] * 5, terminated=True), 3, 4, 0.5)
    assert plain.action.tolist() == [[4, -4], [5, -5], [5, 0], [5, 0]]
    assert plain.mask.tolist() == [True, True, False, False]
    proposed = window(arrays([0] * 5, terminated=True, starts=starts, decision_id=ids, chunk=chunk), 3, 4, 0.5)
    assert proposed.action.tolist() == [[4, -4], [5, -5], [9, 9], [9, 9]]
    short = window(arrays([0] * 5, terminated=True, starts=starts, decision_id=ids, chunk=chunk[:, :3]), 3, 4, 0.5)
    assert short.action.tolist() == [[4, -4], [5, -5], [9, 9], [5, 0]]


def test_per_chunk_sum_reproduces_the_published_form():
    found = window(arrays([1, 2, 4, 8, 16]), 0, 3, 0.5, "per_chunk_sum")
    assert (found.reward, found.discount) == (7.0, 0.5)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_every_n_gives_the_value_of_the_closed_form(n: int):
    """Windows over a chain with reward 1 and gamma 0.9 bootstrapped with the true value give the true value."""
    length, gamma = 60, 0.9
    value = (1 - gamma ** (length - np.arange(length + 1))) / (1 - gamma)
    table = window_table(arrays(np.ones(length), terminated=True), WindowConfig(n, gamma))
    t = np.arange(length)
    np.testing.assert_allclose(table.reward + table.discount * value[t + table.rows], value[:-1], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    length=st.integers(1, 30),
    n=st.integers(1, 12),
    gamma=st.sampled_from([0.5, 0.97, 1.0]),
    mode=st.sampled_from(["per_step", "per_chunk_sum"]),
    stride=st.sampled_from(["any", "decision"]),
    terminated=st.booleans(),
    known=st.booleans(),
)
def test_vectorised_twin(data, length, n, gamma, mode, stride, terminated, known):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    reward = np.where(rng.random(length) < 0.1, np.nan, rng.normal(size=length)).astype(np.float32)
    source = np.where(rng.random(length) < 0.2, rng.integers(0, 6, length), 0)
    ids = np.maximum(np.cumsum(rng.random(length) < 0.3) - 1, -1)
    starts = np.concatenate([[ids[0] >= 0], np.diff(ids) > 0])
    ends = rng.random(length) < 0.1 if rng.random() < 0.5 else None
    episode = arrays(reward, terminated=terminated, source=source, final_known=known, decision_id=ids, starts=starts, ends=ends)
    table = window_table(episode, WindowConfig(n, gamma, stride, mode))
    for t in range(length):
        plain = window(episode, t, n, gamma, mode)
        assert table.rows[t] == plain.mask.sum() == plain.next_step - t
        np.testing.assert_allclose(table.reward[t], plain.reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(table.discount[t], plain.discount, rtol=1e-6)
        assert table.valid[t] == (plain.weight == 1.0 and (stride == "any" or decision_window_ok(episode, t, n)))


@pytest.mark.parametrize(
    ("field", "value"), [("n", 0), ("gamma", 0.0), ("gamma", 1.5), ("stride", "both"), ("discount_mode", "none")]
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=f"WindowConfig.{field}={value!r}"):
        WindowConfig(**{"n": 3, "gamma": 0.9, field: value})
