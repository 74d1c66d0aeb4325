"""Playing a policy on fixed seeds and counting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from robot_rl.evaluation.statistics import Interval, wilson
from robot_rl.progress import Progress
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.sim.rollout import EpisodeOutcome, EpisodePlan, Rollout
from robot_rl.training.interrupt import Interrupted


def measure(
    rollout: Rollout,
    policy: ActingPolicy,
    seeds: Sequence[int],
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
    film: tuple[int, int] | None = None,
) -> list[EpisodeOutcome]:
    """Play one episode a seed; start state and the policy's noise depend on the seed alone.

    Raises:
        Interrupted: ``should_stop`` said so; nothing counts then.
    """
    plans = [EpisodePlan(seed, ("evaluation", seed), policy) for seed in seeds]
    advance = (lambda _: progress.advance(1)) if progress is not None else None
    outcomes = rollout.play(plans, film=film, on_outcome=advance, should_stop=should_stop)
    if len(outcomes) < len(plans):
        raise Interrupted
    return outcomes


def success_interval(outcomes: Sequence[EpisodeOutcome]) -> tuple[int, int, Interval]:
    """(successes, n, 95 % Wilson interval)."""
    successes = sum(o.success for o in outcomes)
    return successes, len(outcomes), wilson(successes, len(outcomes))
