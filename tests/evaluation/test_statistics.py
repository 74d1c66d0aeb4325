"""Intervals and tests against scipy, tabulated values and simulation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_rl.evaluation.statistics import (
    Outcome,
    SuccessRate,
    beta_cdf,
    confidence_sequence,
    hierarchical_bootstrap,
    holm,
    jeffreys,
    log_evidence_against,
    mcnemar_exact,
    newcombe_difference,
    paired_comparison,
    required_n,
    required_n_difference,
    wilson,
)

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 30), (1, 7), (12, 30), (30, 30), (199, 200), (523, 1000)])
@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.95, 0.99])
def test_wilson_and_jeffreys_agree_with_scipy(k, n, confidence):
    reference = scipy_stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((reference.low, reference.high), abs=1e-12)
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else scipy_stats.beta.ppf(tail, 0.5 + k, 0.5 + n - k)
    high = 1.0 if k == n else scipy_stats.beta.ppf(1 - tail, 0.5 + k, 0.5 + n - k)
    assert jeffreys(k, n, confidence) == pytest.approx((low, high), abs=1e-9)


@given(st.floats(0.001, 0.999), st.floats(0.5, 400), st.floats(0.5, 400))
@settings(max_examples=200, deadline=None)
def test_incomplete_beta_agrees_with_scipy(x, a, b):
    assert beta_cdf(x, a, b) == pytest.approx(float(scipy_stats.beta.cdf(x, a, b)), abs=1e-10)


def test_half_widths_of_the_planning_table():
    got = [round(wilson(n // 2, n).width / 2, 2) for n in (30, 50, 100, 200, 1000)]
    assert got == [0.17, 0.13, 0.1, 0.07, 0.03]  # Wilson is a little tighter than the normal .18 and .14 at small n


def test_the_sequence_contains_its_mean_and_its_ends_carry_the_evidence():
    for k, n in [(0, 5), (3, 5), (40, 100), (100, 100)]:
        low, high = confidence_sequence(k, n, 0.05)
        assert low <= k / n <= high
        for end in (low, high):
            if 0 < end < 1:
                assert log_evidence_against(k, n, end) == pytest.approx(np.log(20), abs=1e-9)
    assert confidence_sequence(0, 0) == (0.0, 1.0)


def test_the_sequence_holds_under_peeking_and_wilson_does_not():
    """60 looks up to 300 episodes: the sequence is wrong in at most about 2.2 % of runs, Wilson in 21-31 %."""
    rng = np.random.default_rng(7)
    for p in (0.35, 0.5, 0.85):
        wins = rng.binomial(5, p, size=(1500, 60)).cumsum(axis=1)
        n = np.arange(5, 301, 5)
        wrong_sequence = wrong_wilson = 0
        for row in wins:
            wrong_sequence += any(confidence_sequence(int(k), int(m), 0.05).low > p for k, m in zip(row, n, strict=True))
            wrong_wilson += any(wilson(int(k), int(m), 0.90).low > p for k, m in zip(row, n, strict=True))
        assert wrong_sequence / 1500 <= 0.03
        assert 0.15 <= wrong_wilson / 1500 <= 0.35


@pytest.mark.parametrize("p", [0.1, 0.42, 0.9])
def test_wilson_covers_at_a_preset_n(p):
    draws = np.random.default_rng(3).binomial(200, p, size=4000)
    covered = np.mean([p in wilson(int(k), 200) for k in draws])
    assert 0.93 <= covered <= 0.97


def test_mcnemar_examples_and_scipy():
    for b, c, expected in [(10, 2, 0.019), (15, 5, 0.021), (20, 10, 0.049)]:
        assert mcnemar_exact(b, c) == pytest.approx(expected, abs=5e-4)
        assert mcnemar_exact(b, c) == pytest.approx(scipy_stats.binomtest(b, b + c, 0.5, alternative="greater").pvalue)
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(112, 0) == pytest.approx(2.0**-112)


def test_paired_comparison_counts_starts_and_refuses_different_ones():
    old = [Outcome(s, s < 4) for s in range(10)]
    new = [Outcome(s, s >= 2) for s in range(10)]
    result = paired_comparison(new, old)
    assert (result.new_wins, result.old_wins, result.both, result.neither, result.n) == (6, 2, 2, 0, 10)
    assert result.difference == pytest.approx(0.4)
    assert result.interval.low == pytest.approx(0.4 - 1.959964 * np.sqrt(8 - 16 / 10) / 10, abs=1e-6)
    assert json.loads(json.dumps(result.to_json()))["p_value"] == pytest.approx(mcnemar_exact(6, 2))
    with pytest.raises(ValueError, match=r"same seeds.*\[11\]"):
        paired_comparison([*new, Outcome(11, True)], old)
    with pytest.raises(ValueError, match="appears twice"):
        paired_comparison([*new, new[0]], old)
    with pytest.raises(ValueError, match="there are none"):
        paired_comparison([], [])


def test_paired_interval_covers_the_true_difference():
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(600):
        ease = rng.random(200)  # shared difficulty: outcomes of one start are correlated
        old, new = ease < 0.45, ease < 0.6
        flip = rng.random(200) < 0.1
        new = new ^ flip
        truth = 0.6 * 0.9 + 0.4 * 0.1 - 0.45
        hits += truth in paired_comparison(dict(enumerate(new)), dict(enumerate(old))).interval
    assert 0.92 <= hits / 600 <= 0.98


def test_newcombe_published_example():
    """Newcombe (1998), Statistics in Medicine 17, table II: 56/70 against 48/80, method 10."""
    assert newcombe_difference(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-4)


def test_hierarchical_bootstrap_is_wider_than_pooling_when_seeds_differ():
    rng = np.random.default_rng(0)
    same = [rng.random(200) < 0.6 for _ in range(5)]
    spread = [rng.random(200) < p for p in (0.3, 0.45, 0.6, 0.75, 0.9)]
    assert hierarchical_bootstrap(spread).width > 2.5 * hierarchical_bootstrap(same).width
    assert hierarchical_bootstrap(spread) == hierarchical_bootstrap(spread)
    differences = {0: [0.0, 1.0, -1.0, 0.5], 1: [0.25] * 4}
    low, high = hierarchical_bootstrap(differences, samples=500)
    assert -1 <= low <= high <= 1
    with pytest.raises(ValueError, match="at least one episode"):
        hierarchical_bootstrap([[1, 0], []])


def test_required_n():
    n = required_n(0.5, 0.05)
    z = 1.959964
    half = [z / (m + z * z) * np.sqrt(m / 4 + z * z / 4) for m in (n - 1, n)]
    assert half[1] <= 0.05 < half[0]
    power = required_n_difference(0.4, 0.6)
    rng = np.random.default_rng(5)
    old, new = rng.binomial(power, 0.4, 4000), rng.binomial(power, 0.6, 4000)
    pooled = (old + new) / (2 * power)
    found = (new - old) / power > 1.644854 * np.sqrt(2 * pooled * (1 - pooled) / power)
    assert found.mean() == pytest.approx(0.8, abs=0.04)


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_success_rate_says_how_it_was_made():
    rate = SuccessRate.of_outcomes([True, False, True, True])
    assert rate.to_json()["interval"] == list(wilson(3, 4))
    assert (rate.rate, rate.method) == (0.75, "wilson")
    assert SuccessRate.of(0, 0).to_json()["success"] is None
    with pytest.raises(ValueError, match=r"successes=5 of n=4"):
        SuccessRate.of(5, 4)
    with pytest.raises(ValueError, match="accepted are wilson, jeffreys, sequence"):
        SuccessRate.of(1, 4, method="normal")  # type: ignore[arg-type]
