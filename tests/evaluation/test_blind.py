"""The blind comparison: random, balanced, hidden, and an interval that covers as often as it says."""

from __future__ import annotations

import json
from math import comb

import numpy as np
import pytest

from robot_rl.evaluation.blind import ARMS, BlindTest, assign
from robot_rl.evaluation.exact import exact_difference
from robot_rl.evaluation.statistics import newcombe_difference


def play(test: BlindTest, rates: dict[str, float], rng: np.random.Generator) -> BlindTest:
    while not test.complete:
        test.record(bool(rng.random() < rates[test.arm]))
    return test


@pytest.mark.parametrize("per_arm", [1, 2, 3, 7, 20])
def test_the_order_is_balanced_all_the_way_and_random(per_arm):
    rng = np.random.default_rng(per_arm)
    firsts, orders = 0, set()
    for _ in range(400):
        order = assign(per_arm, rng)
        assert order.count("old") == order.count("new") == per_arm
        lead = np.cumsum([1 if a == "new" else -1 for a in order])
        assert np.abs(lead).max() <= 2, "never more than half a block apart"
        firsts += order[0] == "new"
        orders.add(order)
    assert 140 < firsts < 260
    assert len(orders) >= min(200, comb(2 * per_arm, per_arm) // 2 + 1)


def test_every_place_in_the_order_is_a_fair_coin():
    rng = np.random.default_rng(0)
    new = np.mean([[a == "new" for a in assign(10, rng)] for _ in range(4000)], axis=0)
    assert np.abs(new - 0.5).max() < 4 * 0.5 / np.sqrt(4000)


def test_the_next_arm_cannot_be_guessed_too_well():
    """Whoever remembers everything and knows the block sizes bets on the arm that is behind: still wrong often enough."""
    rng = np.random.default_rng(1)
    right = total = 0
    for _ in range(500):
        order, lead = assign(20, rng), 0
        for arm in order:
            guess = "old" if lead > 0 else "new" if lead < 0 else ARMS[int(rng.integers(2))]
            right, total, lead = right + (guess == arm), total + 1, lead + (1 if arm == "new" else -1)
    assert right / total < 0.80, "that is the price of balance, and only for somebody who is told the outcomes' arms"


def test_nothing_is_told_before_the_end():
    test = BlindTest.begin(4, np.random.default_rng(3))
    shown = []
    while not test.complete:
        with pytest.raises(ValueError, match="after the last one"):
            test.result()
        shown.append(json.dumps(test.view()))
        test.record(True)
    assert not any(word in text for text in shown for word in ("old", "new", test.salt))
    other = BlindTest(tuple(reversed(test.order)), test.salt)
    assert set(json.loads(shown[0])) == set(json.loads(json.dumps(other.view()))), "the keys do not depend on the order"
    assert test.commitment == json.loads(shown[0])["commitment"], "the order that is told is the one that was fixed"
    assert other.commitment != test.commitment or other.order == test.order
    with pytest.raises(ValueError, match="all 8 episodes"):
        test.record(True)
    with pytest.raises(ValueError, match="all 8 episodes"):
        _ = test.arm


def test_discarded_and_undone_episodes_are_played_again_by_the_same_arm():
    test = BlindTest.begin(2, np.random.default_rng(0))
    arm = test.arm
    test.discard()
    assert test.arm == arm
    test.record(True)
    following = test.arm
    test.record(False)
    assert test.undo()
    assert test.arm == following
    assert (test.played, test.discarded) == (1, 1)
    again = BlindTest.from_json(json.loads(json.dumps(test.to_json())))
    assert again == test
    with pytest.raises(ValueError, match="no blind comparison"):
        BlindTest.from_json({**test.to_json(), "order": ["old", "old"]})


def test_the_result_counts_each_arm_by_itself():
    rng = np.random.default_rng(5)
    test = BlindTest.begin(20, rng)
    while not test.complete:
        test.record(test.arm == "new" or test.played % 4 == 0)
    found = test.result()
    old = sum(i % 4 == 0 for i, a in enumerate(test.order) if a == "old")
    assert (found.new.successes, found.new.n, found.old.successes, found.old.n) == (20, 20, old, 20)
    assert found.interval == exact_difference(20, 20, old, 20)
    assert found.verdict == "The new policy is better."
    assert found.to_json()["difference"] == pytest.approx(1.0 - old / 20)


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.3, 0.8), (0.9, 0.95), (0.05, 0.05), (0.6, 0.9), (1.0, 1.0)])
def test_the_interval_covers_known_rates_by_simulation(rates):
    """Whole comparisons, order and all, with known success rates: at least 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(7)
    runs, held, wrong = 1000, 0, 0
    for _ in range(runs):
        found = play(BlindTest.begin(10, rng), {"old": rates[0], "new": rates[1]}, rng).result()
        truth = rates[1] - rates[0]
        held += found.interval.low <= truth <= found.interval.high
        wrong += (found.interval.low > 0 and truth <= 0) or (found.interval.high < 0 and truth >= 0)
    noise = 3.0 * np.sqrt(0.05 * 0.95 / runs)
    assert held / runs >= 0.95 - noise
    assert wrong / runs <= 0.05 + noise


def coverage(interval, n: int, grid: np.ndarray) -> np.ndarray:
    """Probability that the interval holds the truth, for every pair of rates, from all outcomes and their probabilities."""
    intervals = np.array([[interval(a, n, b, n).to_json() for b in range(n + 1)] for a in range(n + 1)])
    weights = np.array([[comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)] for p in grid])
    out = np.empty((len(grid), len(grid)))
    for i, p in enumerate(grid):
        for j, q in enumerate(grid):
            inside = (intervals[..., 0] <= p - q + 1e-12) & (p - q - 1e-12 <= intervals[..., 1])
            out[i, j] = weights[i] @ inside @ weights[j]
    return out


@pytest.mark.parametrize("n", [4, 9])
def test_the_interval_never_covers_less_than_it_says(n):
    """No simulation noise: every outcome, weighed. The large-sample interval is the one that fails this."""
    grid = np.linspace(0.0, 1.0, 41)
    exact = coverage(exact_difference, n, grid)
    assert exact.min() >= 0.95 - 1e-4
    assert coverage(newcombe_difference, n, grid).min() < 0.93
    wide = np.mean(
        [exact_difference(a, n, b, n).high - exact_difference(a, n, b, n).low for a in range(n + 1) for b in range(n + 1)]
    )
    quick = np.mean(
        [newcombe_difference(a, n, b, n).high - newcombe_difference(a, n, b, n).low for a in range(n + 1) for b in range(n + 1)]
    )
    assert wide < 1.25 * quick, "safe, and not by being useless"


def test_known_intervals_and_symmetry():
    """Agresti and Min (2001): exact unconditional score intervals; and swapping the arms turns the sign."""
    found = exact_difference(7, 7, 0, 7)
    assert found.low > 0.3
    assert found.high == 1.0
    assert exact_difference(0, 7, 7, 7).to_json() == pytest.approx([-found.high, -found.low], abs=2e-2)
    same = exact_difference(5, 10, 5, 10)
    assert same.low == pytest.approx(-same.high, abs=1e-2)
    for k in range(11):
        interval = exact_difference(k, 10, 4, 10)
        assert interval.low <= k / 10 - 0.4 <= interval.high
    assert exact_difference(3, 5, 9, 12).low < 3 / 5 - 9 / 12 < exact_difference(3, 5, 9, 12).high
    with pytest.raises(ValueError, match="at least 1"):
        exact_difference(0, 0, 1, 2)
