"""Stopping in time, in discrete time: how fast a joint may move so that it can still brake before a limit.

A filter that only clamps each step to its velocity, acceleration and jerk limits sooner or later faces a step on which they
contradict each other (full speed, one step before the position limit). These functions keep the joint inside the set of
states from which a braking plan exists, so that the next step is never without a legal answer.
"""

from __future__ import annotations

from math import ceil, inf, sqrt


def highest_start(budget: float, slope: float, dt: float) -> float:
    """Largest ``r >= 0`` with ``dt * (r + (r - slope * dt) + (r - 2 * slope * dt) + ... down to 0) <= budget``.

    With ``slope`` an acceleration and ``budget`` a distance: the highest speed for the next step that can still stop within
    the distance. With ``slope`` a jerk and ``budget`` a speed: the highest acceleration that does not overshoot the speed.
    """
    if budget <= 0.0 or slope <= 0.0:
        return 0.0
    if slope == inf or budget == inf:
        return budget / dt
    unit = slope * dt * dt
    terms = max(1, ceil((sqrt(1.0 + 8.0 * budget / unit) - 1.0) / 2.0 - 1e-12))  # terms above zero
    return (budget / dt + slope * dt * terms * (terms - 1) / 2.0) / terms


def distance_to_stop(speed: float, acceleration: float, dt: float) -> float:
    """Distance covered by steps of ``speed``, ``speed - acceleration * dt``, ... down to zero."""
    if speed <= 0.0:
        return 0.0
    if acceleration == inf:
        return speed * dt
    if acceleration <= 0.0:
        return inf
    terms = ceil(speed / (acceleration * dt) - 1e-12)
    return dt * (terms * speed - acceleration * dt * terms * (terms - 1) / 2.0)


def brake(v: float, a: float, limit: float, jerk: float, dt: float) -> float:
    """Acceleration of the next step of the plan that brings (v, a) to rest under ``|a| <= limit`` and the jerk limit."""
    wanted = -highest_start(v, jerk, dt) if v > 0.0 else highest_start(-v, jerk, dt)
    wanted = min(max(wanted, -limit), limit)
    return min(max(wanted, a - jerk * dt), a + jerk * dt)


def braking_extent(v: float, a: float, limit: float, jerk: float, dt: float, horizon: int = 10_000) -> tuple[float, float]:
    """Lowest and highest displacement on the way to rest from (v, a), the present place being 0."""
    x = low = high = 0.0
    still = 1e-9 * jerk * dt * dt
    for _ in range(horizon):
        if abs(v) <= still and abs(a) <= jerk * dt:
            break
        a = brake(v, a, limit, jerk, dt)
        v += a * dt
        x += v * dt
        if x > high:
            high = x
        elif x < low:
            low = x
    return low, high
