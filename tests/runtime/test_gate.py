"""The promotion gate: the tabulated thresholds, simulated error rates, transitions, rollback and exact resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robot_rl.runtime.bounds import confidence_sequence
from robot_rl.runtime.gate import GateConfig, GateEvent, PromotionGate


def make(base=(200, 400), **changes) -> PromotionGate:
    gate = PromotionGate(GateConfig(**changes))
    gate.set_reference(*base)
    return gate


def play(gate: PromotionGate, version: int, outcomes) -> list[GateEvent]:
    events: list[GateEvent] = []
    for success in outcomes:
        events += gate.record(version, bool(success))
        if gate.on_probation != version:
            break
    return events


def kinds(events: list[GateEvent]) -> list[tuple[str, int]]:
    return [(e.event, e.version) for e in events]


NEVER = None
TABLE = {
    (160, "sequence"): [14, 19, 29, 52, 94],
    (160, "wilson_fixed"): [11, 15, 24, 43, 82],
    (200, "sequence"): [16, 22, 34, 62, 115],
    (200, "wilson_fixed"): [13, 18, 29, 54, 102],
    (320, "sequence"): [20, 29, 47, 89, 170],
    (320, "wilson_fixed"): [19, 27, 43, 83, 161],
    (360, "sequence"): [NEVER, NEVER, 50, 96, 186],
}


@pytest.mark.parametrize(("base_successes", "bound"), TABLE)
def test_successes_needed_to_promote(base_successes, bound):
    gate = make((base_successes, 400), bound=bound)
    assert [gate.successes_needed(n) for n in (20, 30, 50, 100, 200)] == TABLE[base_successes, bound]


def simulate(p_ref: float, p: float, runs: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    promoted, episodes = 0, []
    for _ in range(runs):
        gate = make((round(400 * p_ref), 400))
        gate.submit(1)
        event = play(gate, 1, rng.random(200) < p)[-1]
        if event.event == "promoted":
            promoted += 1
            episodes.append(event.n)
        assert gate.acting == (1 if event.event == "promoted" else 0)
    return promoted / runs, float(np.median(episodes)) if episodes else float("nan")


@pytest.mark.parametrize(
    ("p_ref", "p", "share", "tolerance", "median", "within"),
    [
        (0.40, 0.35, 0.01, 0.012, None, None),  # exactly at the margin: a false promotion
        (0.40, 0.40, 0.105, 0.035, None, None),  # equal to the base: rarely, on purpose
        (0.40, 0.50, 0.86, 0.04, 81, 14),
        (0.40, 0.60, 1.00, 0.01, 30, 6),
        (0.80, 0.90, 0.99, 0.015, 59, 9),
    ],
)
def test_simulated_promotion_rates(p_ref, p, share, tolerance, median, within):
    got, episodes = simulate(p_ref, p, 700, seed=round(1000 * p))
    assert got == pytest.approx(share, abs=tolerance)
    if median is not None:
        assert episodes == pytest.approx(median, abs=within)


def test_rules_on_every_episode_match_the_bounds():
    """Promotion and rejection happen on exactly the first episode at which the written rule holds."""
    rng = np.random.default_rng(2)
    for _ in range(60):
        p_ref, p = rng.uniform(0.2, 0.9), rng.uniform(0.05, 0.99)
        k_ref = round(400 * p_ref)
        gate = make((k_ref, 400), n_max=80)
        gate.submit(1)
        threshold, k = k_ref / 400 - 0.05, 0
        for n, success in enumerate(rng.random(80) < p, start=1):
            k += int(success)
            low, high = confidence_sequence(k, n, 0.05)
            expected = []
            if n >= 10 and low >= threshold:
                expected = [("promoted", 1)]
            elif (n >= 10 and high < threshold) or n == 80:
                expected = [("rejected", 1)]
            assert kinds(gate.record(1, bool(success))) == expected
            if expected:
                break


def test_one_candidate_at_a_time_and_only_the_newest_waits():
    gate = make()
    assert kinds(gate.submit(1)) == [("candidate", 1)]
    assert gate.submit(2) == []
    assert gate.submit(3) == []
    assert (gate.on_probation, gate.waiting, gate.state(2)) == (1, 3, "superseded")
    events = play(gate, 1, [False] * 50)
    assert kinds(events) == [("rejected", 1), ("candidate", 3)]
    assert (gate.on_probation, gate.waiting, gate.acting) == (3, None, 0)


def test_explore_and_eval_of_one_version_are_two_candidates():
    gate = make()
    gate.submit(4, "explore")
    gate.submit(4, "eval")
    events: list[GateEvent] = []
    while gate.probation_mode == "explore":
        events += gate.record(4, True, mode="explore")
    assert kinds(events) == [("promoted", 4), ("candidate", 4)]
    assert (gate.acting, gate.acting_mode, gate.probation_mode) == (4, "explore", "eval")
    assert gate.record(4, True, mode="explore") == []
    assert gate.late == 1
    play(gate, 4, [False] * 60)
    assert (gate.state(4, "explore"), gate.state(4, "eval")) == ("promoted", "rejected")


def test_a_better_head_takes_over_from_one_that_has_acted_for_long():
    """Without ``min_gain`` a version's evidence ends where the threshold is passed, and the incumbent is never replaced."""
    rng = np.random.default_rng(0)

    def session(min_gain):
        gate = make((160, 400), min_gain=min_gain)
        gate.submit(1)
        play(gate, 1, rng.random(200) < 0.65)
        for success in rng.random(400) < 0.65:
            gate.record_acting(bool(success))
        gate.submit(2)
        play(gate, 2, rng.random(200) < 0.95)
        return gate

    assert (session(0.0).acting, session(0.05).acting) == (2, 2)
    stalled = session(None)
    assert (stalled.acting, stalled.state(2)) == (1, "promoted")


def test_a_worse_but_acceptable_head_is_kept_in_reserve_and_used_after_a_rollback():
    rng = np.random.default_rng(1)
    gate = make((160, 400))
    gate.submit(1)
    play(gate, 1, [True] * 40)
    for _ in range(100):
        gate.record_acting(True)
    gate.submit(2)
    events = play(gate, 2, rng.random(200) < 0.7)
    assert kinds(events) == [("promoted", 2)]
    assert (gate.acting, events[0].acting) == (1, 1)
    assert "reserve" in events[0].reason
    event = gate.fail(1, "NaN in the action")[0]
    assert (event.event, event.acting, gate.acting, gate.state(1)) == ("rolled_back", 2, 2, "demoted")
    assert gate.fail(2, "safety stop")[0].acting == 0
    assert (gate.acting, gate.acting_mode) == (0, "base")


def test_rollback_drill():
    """Weights corrupted after promotion: the base acts again within ``n_max`` episodes."""
    gate = make((200, 400))
    gate.submit(1)
    play(gate, 1, [True] * 40)
    assert gate.acting == 1
    for _ in range(60):
        assert gate.record_acting(True) == []
    events: list[GateEvent] = []
    episodes = 0
    rng = np.random.default_rng(3)
    while not events:
        events = gate.record_acting(bool(rng.random() < 0.05), version=1)
        episodes += 1
    assert episodes <= gate.config.n_max
    assert (kinds(events), gate.acting) == ([("rolled_back", 1)], 0)
    assert events[0].upper < events[0].threshold
    assert gate.record_acting(False, version=1) == []  # an episode that was under way
    assert gate.late == 1


def test_false_rollbacks_are_rare():
    rng = np.random.default_rng(5)
    rolled = 0
    for _ in range(150):
        gate = make((200, 400))
        gate.submit(1)
        play(gate, 1, [True] * 40)
        rolled += any(gate.record_acting(bool(s)) for s in rng.random(300) < 0.45)  # exactly at the margin
    assert rolled / 150 <= 0.05


def test_a_demoted_version_needs_a_new_probation_on_new_seeds():
    gate = make()
    seeds = list(range(1_000_000, 1_000_200))
    gate.submit(1, version_hash="abc")
    played = 0
    while gate.acting == 0:
        (seed,) = gate.fresh_seeds(seeds, 1)
        gate.record(1, True, seed=seed)
        played += 1
    gate.fail(1, "operator pressed stop")
    assert (gate.state(1), gate.acting) == ("demoted", 0)
    gate.submit(1, version_hash="abc")
    assert gate.on_probation == 1, "results from before the demotion do not promote it again"
    assert gate.fresh_seeds(seeds, 2) == seeds[played : played + 2]
    assert gate.record(1, True, seed=seeds[0]) == []
    assert gate.evidence(1) == (0, 0)


def test_equal_weights_share_results_and_a_seed_counts_once():
    gate = make(n_min=10, n_max=30)
    gate.submit(1, version_hash="same")
    for seed in range(8):
        gate.record(1, seed % 2 == 0, seed=seed)
        gate.record(1, True, seed=seed)  # a repeated seed proves nothing
    assert gate.cached(0) is True
    assert gate.cached(1) is False
    assert gate.cached(99) is None
    assert gate.fresh_seeds(range(12), 3) == [8, 9, 10]
    gate.fail(1, "superseded by hand")
    gate.submit(2, version_hash="same")
    assert gate.evidence(2) == (4, 8)
    gate.submit(3, version_hash="other")
    gate.fail(2, "x")
    assert gate.evidence(3) == (0, 0)


def test_hardware_share_keeps_acting_success_within_the_margin():
    for k, n, expected in [(162, 400, 0.123), (200, 400, 0.10), (320, 400, 0.0625), (360, 400, 0.0556), (40, 400, 0.2)]:
        gate = make((k, n))
        assert gate.share == 0.0
        gate.submit(1)
        assert gate.share == pytest.approx(expected, abs=1e-3)
        worst = (1 - gate.share) * gate.p_ref
        assert worst >= gate.threshold - 1e-9
    assert gate.assign(0.19) == (1, "explore")
    assert gate.assign(0.2) == (0, "base")
    fast = make((360, 400), mode="fast")
    fast.submit(1)
    assert fast.share == 0.2


def test_upper_reference_is_stricter_and_frozen():
    mean, upper = make((15, 30)), make((15, 30), reference="upper")
    assert mean.p_ref == 0.5
    assert 0.56 < upper.p_ref < 0.59
    upper.set_reference(15, 30)
    with pytest.raises(ValueError, match="15/30 already and stays frozen"):
        upper.set_reference(16, 30)
    with pytest.raises(ValueError, match="reference_n_min \\(30\\)"):
        PromotionGate().set_reference(5, 10)


def test_an_unreachable_threshold_is_said_at_once(caplog):
    gate = PromotionGate(GateConfig(n_max=20))
    gate.set_reference(360, 400)
    assert not gate.promotable
    assert "raise gate.n_max" in caplog.text


def test_wilson_fixed_looks_once():
    gate = make((160, 400), bound="wilson_fixed", n_max=50)
    gate.submit(1)
    events = play(gate, 1, [True] * 50)
    assert (kinds(events), events[0].n) == ([("promoted", 1)], 50)


def test_bad_input_is_named():
    for changes, message in [
        ({"margin": -0.1}, r"gate\.margin=-0\.1: accepted are numbers in \[0, 1\)"),
        ({"n_min": 20, "n_max": 10}, r"gate\.n_max=10: accepted are integers >= n_min \(20\)"),
        ({"bound": "normal"}, r"gate\.bound='normal': accepted are sequence, wilson_fixed"),
    ]:
        with pytest.raises(ValueError, match=message):
            GateConfig(**changes)
    with pytest.raises(RuntimeError, match="no reference"):
        PromotionGate().submit(1)
    gate = make()
    with pytest.raises(ValueError, match="accepted are explore, eval"):
        gate.submit(1, "mean")
    gate.submit(1)
    with pytest.raises(ValueError, match="0 is the base"):
        gate.submit(0)
    with pytest.raises(ValueError, match="is probation already"):
        gate.submit(1)
    with pytest.raises(ValueError, match="version 9 was never submitted"):
        gate.record(9, True)


def test_resume_is_exact():
    """A gate that is saved through JSON at every step decides the same things in the same order."""
    rng = np.random.default_rng(9)
    straight, resumed = make(), make()
    log: list[list[dict]] = [[], []]
    version = 0
    for step in range(1200):
        skill = 0.3 + 0.6 * step / 1200
        outcome, submits = bool(rng.random() < skill), rng.random() < 0.03
        version += submits
        for index in (0, 1):
            gate = (straight, resumed)[index]
            if submits:
                log[index] += [e.to_json() for e in gate.submit(version, version_hash=f"h{version // 2}")]
            if gate.on_probation is not None and step % 2:
                seed = gate.fresh_seeds(range(1_000_000, 1_010_000), 1)[0]
                log[index] += [e.to_json() for e in gate.record(gate.on_probation, outcome, seed=seed)]
            else:
                log[index] += [e.to_json() for e in gate.record_acting(outcome)]
            if step == 900 and gate.acting:
                log[index] += [e.to_json() for e in gate.fail(gate.acting, "drill")]
        saved = json.dumps(resumed.state_dict(), allow_nan=False)
        resumed = PromotionGate()
        resumed.load_state_dict(json.loads(saved))
    assert log[0] == log[1]
    assert {e["event"] for e in log[0]} >= {"candidate", "promoted", "rejected", "rolled_back"}
    assert straight.state_dict() == resumed.state_dict()
    with pytest.raises(ValueError, match=r"gate\.margin=0\.1 \(saved: 0\.05\)"):
        PromotionGate(GateConfig(margin=0.1)).load_state_dict(straight.state_dict())
