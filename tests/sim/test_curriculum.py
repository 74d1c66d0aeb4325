"""Curricula over starts: where they put their episodes, and that they go on exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robot_rl.sim.curriculum import ResetCurriculum, StartCurriculum, best_mixture, fit_mixture, log_densities
from robot_rl.sim.curriculum_config import CurriculumConfig

POOL = 200
STARTS = [{"x": i / (POOL - 1), "y": 3.0} for i in range(POOL)]


def line(**config) -> StartCurriculum:
    config = {"parameters": ("x",), "pool": POOL, **config}
    return StartCurriculum(CurriculumConfig(**config), list(range(POOL)), STARTS, (0,))


def x_of(places: list[int]) -> np.ndarray:
    return np.array([STARTS[p]["x"] for p in places])


def play(curriculum: StartCurriculum, rounds: int, chance, first: int = 0, size: int = 10, seed: int = 0) -> list[int]:
    rng, places = np.random.default_rng(seed), []
    for number in range(first, first + rounds):
        chosen = curriculum.choose(size, number)
        curriculum.record([(p, float(rng.random() < chance(STARTS[p]["x"], number))) for p in chosen])
        places += chosen
    return places


# ---- mixtures


def test_expectation_maximisation_finds_what_the_points_were_drawn_from() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal([0.2, 0.1], 0.03, (150, 2)), rng.normal([0.8, 0.6], 0.05, (50, 2))])
    mixture, likelihood = fit_mixture(points, 2, np.random.default_rng(1))
    order = np.argsort(mixture.mean[:, 0])
    np.testing.assert_allclose(mixture.mean[order], [[0.2, 0.1], [0.8, 0.6]], atol=0.02)
    np.testing.assert_allclose(mixture.weight[order], [0.75, 0.25], atol=0.02)
    slow = 0.0
    for p in points:
        total = 0.0
        for w, m, c in zip(*mixture, strict=True):
            gap = p - m
            total += w * np.exp(-0.5 * gap @ np.linalg.inv(c) @ gap) / (2 * np.pi * np.sqrt(np.linalg.det(c)))
        slow += np.log(total)
    np.testing.assert_allclose(likelihood, slow, atol=1e-5)
    assert len(best_mixture(points, (1, 6), np.random.default_rng(2)).weight) == 2
    assert np.isfinite(
        log_densities(np.repeat(points[:1], 50, 0), best_mixture(np.repeat(points[:1], 50, 0), (2, 4), rng))
    ).all()


# ---- choosing


def test_alp_gmm_concentrates_where_success_changes_and_keeps_its_share_of_even_draws() -> None:
    """Specification 9: the left half is always solved, the right half is being learnt; a fifth stays uniform."""

    def chance(x: float, number: int) -> float:
        return 1.0 if x < 0.5 else 0.5

    curriculum = line(starts="alp_gmm", window=250)
    boot = x_of(play(curriculum, 25, chance))
    assert 0.4 < (boot > 0.5).mean() < 0.6, "even until there is a window"
    assert curriculum.mixture is not None
    later = x_of(play(curriculum, 75, chance, 25))
    assert (later > 0.5).mean() > 0.75
    assert (later < 0.5).mean() > 0.05, "even draws go on"
    only_even = line(starts="alp_gmm", window=250, uniform=1.0)
    assert 0.4 < (x_of(play(only_even, 60, chance))[300:] > 0.5).mean() < 0.6


def test_learning_progress_is_the_change_since_the_nearest_earlier_start() -> None:
    curriculum = line(starts="alp_gmm")
    curriculum.record([(0, 0.0), (100, 1.0), (1, 1.0), (99, 0.0), (0, 1.0)])
    assert curriculum.gains == [0.0, 1.0, 1.0, 1.0, 1.0]
    curriculum.record([(0, 1.0)])
    assert curriculum.gains[-1] == 0.0, "the newest of equally near ones counts"


def test_success_driven_starts_go_to_the_frontier() -> None:
    curriculum = line(starts="success", uniform=0.0, bandwidth=0.1)
    rates = curriculum.choose(4, 0)
    assert len(set(rates)) > 1

    def frontier(x: float, number: int) -> float:
        return 1.0 if x < 0.3 else 0.5 if x < 0.6 else 0.0

    x = x_of(play(curriculum, 120, frontier))[600:]
    assert ((x > 0.2) & (x < 0.7)).mean() > 0.6
    p = curriculum.success_rates()
    recent = curriculum.history[-4 * 250 :]
    near = [np.exp(-0.5 * ((STARTS[7]["x"] - STARTS[i]["x"]) / 0.1) ** 2) for i, _ in recent]
    np.testing.assert_allclose(
        p[7], (1 + sum(k * s for k, (_, s) in zip(near, recent, strict=True))) / (2 + sum(near)), atol=1e-5
    )


def test_sec_prefers_the_arm_with_the_largest_advantages_and_follows_a_swap() -> None:
    def swap(x: float, number: int) -> float:
        hard = x < 0.25 if number < 60 else x > 0.75
        return 0.5 if hard else 1.0

    curriculum = line(starts="sec", arms=4, uniform=0.1, temperature=0.05, rate=0.3)
    before = x_of(play(curriculum, 60, swap, size=12))[360:]
    after = x_of(play(curriculum, 60, swap, 60, size=12))[360:]
    assert (before < 0.25).mean() > 0.5
    assert (after > 0.75).mean() > 0.5
    assert int(np.argmax(curriculum.values)) == 3


def test_sec_values_are_the_moving_mean_of_group_advantages() -> None:
    curriculum = line(starts="sec", arms=2, rate=0.5)
    curriculum.record([(0, 1.0), (0, 0.0), (0, 0.0), (150, 1.0), (150, 1.0), (150, 1.0)])
    advantages = [3 / 2 * (1 - 1 / 3), -3 / 2 / 3, -3 / 2 / 3]  # K/(K-1) (R - mean), as RLOO has them
    np.testing.assert_allclose(curriculum.values, [0.5 * np.mean(np.abs(advantages)), 0.0], atol=1e-9)


@pytest.mark.parametrize("kind", ["success", "alp_gmm", "sec"])
def test_a_curriculum_goes_on_as_if_it_had_never_stopped(kind: str) -> None:
    def chance(x: float, number: int) -> float:
        return x

    straight = line(starts=kind, window=30, components=(1, 3))
    play(straight, 7, chance)
    resumed = line(starts=kind, window=30, components=(1, 3))
    resumed.load(json.loads(json.dumps(straight.state())))
    assert play(straight, 7, chance, 7, seed=1) == play(resumed, 7, chance, 7, seed=1)
    assert straight.choose(5, 3) == straight.choose(5, 3), "a round's starts depend on its number, not on how often one asks"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parameters=\['z'\].*'x', 'y'"):
        line(parameters=("z",))
    for bad in ({"uniform": 2.0}, {"components": (0, 3)}, {"starts": "sec"}, {"discount_start": 1.0}, {"rate": 0.0}):
        with pytest.raises(ValueError, match="accepted"):
            CurriculumConfig(**bad)


# ---- resets and discounts


def test_resets_move_from_the_end_of_demonstrations_to_their_beginning() -> None:
    demos = [(seed, np.full((20, 2), seed, np.float32)) for seed in (5, 6)]
    config = CurriculumConfig(resets="demonstrations", reset_share=0.5, reset_first=0.8, reset_step=0.4, reset_window=4)
    resets = ResetCurriculum(config, demos, (0,))
    chosen = [r for n in range(40) for r in resets.choose(5, n)]
    inside = [r for r in chosen if r is not None]
    assert 0.35 < len(inside) / len(chosen) < 0.65
    assert {len(a) for _, a in inside} == {16}
    assert {seed for seed, _ in inside} == {5, 6}
    resets.record([1, 1, 0, 0, 1, 1, 1, 1])  # half is not enough, then all
    assert resets.share_done == pytest.approx(0.4)
    lengths = [len(r[1]) for n in range(60) for r in resets.choose(5, n) if r is not None]
    assert (min(lengths), max(lengths)) == (8, 15)
    again = ResetCurriculum(config, demos, (0,))
    again.load(json.loads(json.dumps(resets.state())))
    assert again.share_done == resets.share_done
    resets.record([1] * 4)
    assert all(r is None for n in range(10) for r in resets.choose(5, n)), "it is over"
    with pytest.raises(ValueError, match="no demonstration is a success"):
        ResetCurriculum(config, [], (0,))


def test_the_discount_rises_in_equal_steps_with_success() -> None:
    config = CurriculumConfig(discount_start=0.9, discount_stages=3, discount_reference=0.9)
    assert [config.discount_stage(s) for s in (0.0, 0.29, 0.31, 0.6, 0.9, 1.0)] == [0, 0, 1, 2, 3, 3]
    np.testing.assert_allclose([config.discount(0.99, i) for i in range(5)], [0.9, 0.93, 0.96, 0.99, 0.99])
    assert CurriculumConfig().discount(0.97, 0) == 0.97
