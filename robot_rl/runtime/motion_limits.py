"""Velocity, acceleration and jerk limits on a command stream, kept so that every joint can still brake before its limits."""

from __future__ import annotations

from math import inf

from robot_rl.runtime.braking import brake, braking_extent, distance_to_stop, highest_start
from robot_rl.types import SafetyFlag

SLACK = 1e-9  # relative: a command exactly at a limit is inside it, whatever the last bit of a product says


class MotionLimits:
    """Trims one robot's commands, period by period; call :meth:`reset` at every start and :meth:`limit` once a period.

    Args:
        velocity, acceleration, jerk: one limit a dimension, ``inf`` for none; ``None``: no such limit at all.
        low, high: the range of every dimension's command.
        delta: dimensions whose command is a change; their velocity is the command times ``hz``.
        gripper: dimensions that are not scaled together with the arm's.
        hz: rate of the calls.
    """

    def __init__(
        self,
        velocity: list[float] | None,
        acceleration: list[float] | None,
        jerk: list[float] | None,
        *,
        low: list[float],
        high: list[float],
        delta: list[bool],
        gripper: list[bool],
        hz: float,
    ) -> None:
        self._dim, self._low, self._high, self._delta, self._gripper = len(low), low, high, delta, gripper
        self._hz, self._dt = hz, 1.0 / hz
        none = [inf] * self._dim
        self._A, self._J = acceleration or none, jerk or none
        # A delta dimension's accepted range is a limit on its speed as well; braking has to know.
        self._top = [
            min(v, hi * self._hz) if d else v for v, hi, d in zip(velocity or none, self._high, self._delta, strict=True)
        ]
        self._back = [
            max(-v, lo * self._hz) if d else -v for v, lo, d in zip(velocity or none, self._low, self._delta, strict=True)
        ]
        self._dynamic = any(x != inf for x in self._A + self._J)
        self._room = [self._braking_room(i) for i in range(self._dim)]

    def _braking_room(self, i: int) -> float:
        """Further than this from a position limit, no speed this dimension may have can reach it while braking."""
        v, a, j = self._top[i], self._A[i], self._J[i]
        if self._delta[i] or (a == inf and j == inf):
            return 0.0
        if v == inf:
            return inf
        if j == inf:
            return distance_to_stop(v, a, self._dt)
        if j == 0.0 or a == 0.0:
            return inf
        return braking_extent(v, min(a, v * self._hz), a, j, self._dt)[1] + v * self._dt

    def limited(self, i: int) -> bool:
        """Whether anything limits how fast dimension ``i`` changes."""
        return min(self._top[i], self._A[i], self._J[i]) < inf

    def reset(self, last: list[float]) -> None:
        """Start at rest, the last executed command being ``last``."""
        self._speed = [0.0] * self._dim
        self._acceleration = [0.0] * self._dim
        self._chasing = False
        self._last, self._wished = last, list(last)

    def limit(self, target: list[float], last: list[float], hold: bool) -> tuple[list[float], int]:
        """The command nearest to ``target`` that may follow ``last``, and the flags of the limits that spoke."""
        dim, hz, dt = self._dim, self._hz, self._dt
        self._last = last
        speed, accel = self._speed, self._acceleration
        wish = [x * hz if d else (x - last) * hz for x, last, d in zip(target, self._last, self._delta, strict=True)]
        flags = 0
        for i in range(dim):  # the cheap question first: is anything outside at all?
            v = wish[i]
            if v > self._top[i] * (1 + SLACK) or v < self._back[i] * (1 + SLACK):
                flags |= 4
            if self._dynamic:
                a = (v - speed[i]) * hz
                if abs(a) > self._A[i] * (1 + SLACK):
                    flags |= 8
                if abs(a - accel[i]) * hz > self._J[i] * (1 + SLACK):
                    flags |= 16
                if not flags and not self._can_stop(i, v, a):
                    flags |= 16 if self._J[i] != inf else 8
        if self._dynamic and (flags or self._chasing):
            eased, caught = self._ease(wish, target, hold)
            self._chasing = bool(flags) or not caught
            if self._chasing:
                wish = eased
                flags = flags or int(SafetyFlag.ACCELERATION)
        self._wished = target
        if flags:
            wish = self._legal(wish)
            moved = []
            for i in range(dim):
                x = wish[i] * dt if self._delta[i] else self._last[i] + wish[i] * dt
                low, high = self._bounds(i)  # the product may round a last bit over the limit
                moved.append(min(max(x, low), high))
            target = moved
        if self._dynamic:
            self._acceleration = [(v - before) * hz for v, before in zip(wish, speed, strict=True)]
        self._speed = wish
        return target, flags

    def _ease(self, wish: list[float], target: list[float], hold: bool) -> tuple[list[float], bool]:
        """Speeds that come alongside the wished motion instead of overshooting it, and whether it is reached.

        A joint that fell behind must not race to the wish at full speed: it could not slow down in time there and would swing
        around it. So it approaches, relative to the wish's own speed, no faster than it can brake.
        """
        hz, dt = self._hz, self._dt
        eased, caught = [], True
        for i, w in enumerate(wish):
            a_max, j_max, v = self._A[i], self._J[i], self._speed[i]
            if not self._delta[i] and (a_max != inf or j_max != inf):
                u = 0.0 if hold else (target[i] - self._wished[i]) * hz
                if not self._back[i] <= u <= self._top[i]:
                    u = 0.0  # a jump has no speed
                behind = target[i] - self._last[i] - u * dt
                size = abs(behind)
                slope = a_max
                if j_max != inf:  # braking builds up at the jerk limit: plan with what it can reach in the distance, with room
                    slope = 0.5 * min(a_max, max(j_max * dt, (j_max * j_max * size) ** (1 / 3)))
                pace = highest_start(size, slope, dt)
                if j_max != inf:
                    pace = min(pace, size * min(hz, j_max / (2 * slope)) if slope else 0.0)
                caught = caught and size <= min(slope * dt * dt / 2, j_max * dt**3 / 3)
                w = u + (pace if behind > 0 else -pace)
            if j_max != inf:
                gap = w - v
                caught = caught and abs(wish[i] - v) <= j_max * dt * dt
                w = v + highest_start(abs(gap), j_max, dt) * dt * (1 if gap > 0 else -1)
            eased.append(w)
        return eased, caught

    def _can_stop(self, i: int, v: float, a: float) -> bool:
        """Whether dimension ``i``, moving on at (v, a), can still respect its velocity and position limits."""
        a_max, j_max, dt = self._A[i], self._J[i], self._dt
        if j_max != inf and a != 0.0:
            room = self._top[i] - v if a > 0 else v - self._back[i]
            if room != inf and abs(a) > highest_start(room + abs(a) * dt, j_max, dt) * (1 + SLACK) + 1e-12:
                return False
        if self._delta[i] or (a_max == inf and j_max == inf):
            return True
        x = self._last[i] + v * dt
        low, high = self._bounds(i)
        below, above = x - low, high - x
        if below >= self._room[i] and above >= self._room[i]:
            return True
        tiny = 1e-9 * (1.0 + abs(x))
        if j_max == inf:
            ahead = above if v > 0 else below
            return distance_to_stop(abs(v), a_max, dt) - abs(v) * dt <= ahead + tiny
        backward, forward = braking_extent(v, a, a_max, j_max, dt)
        return -backward <= below + tiny and forward <= above + tiny

    def _bounds(self, i: int) -> tuple[float, float]:
        """Position limits, widened to where the robot is when it starts outside them: it may come back, never go further."""
        if self._delta[i]:
            return self._low[i], self._high[i]
        return min(self._low[i], self._last[i]), max(self._high[i], self._last[i])

    def _interval(self, i: int) -> tuple[float, float]:
        """Speeds of the next step that respect every limit of dimension ``i`` but the position limits under jerk."""
        a_max, j_max, dt = self._A[i], self._J[i], self._dt
        v, a = self._speed[i], self._acceleration[i]
        low, high = self._back[i], self._top[i]
        if a_max == inf and j_max == inf:
            return low, high
        a_low, a_high = -a_max, a_max
        if j_max != inf:
            a_low, a_high = max(a_low, a - j_max * dt), min(a_high, a + j_max * dt)
            if low != -inf:
                a_low = max(a_low, -highest_start(v - low, j_max, dt))
            if high != inf:
                a_high = min(a_high, highest_start(high - v, j_max, dt))
            if a_low > a_high:  # rounding, or a start outside the limits: brake
                a_low = a_high = brake(v, a, a_max, j_max, dt)
            return v + a_low * dt, v + a_high * dt
        low, high = max(low, v - a_max * dt), min(high, v + a_max * dt)
        if not self._delta[i]:
            up = highest_start(self._high[i] - self._last[i], a_max, dt)
            down = highest_start(self._last[i] - self._low[i], a_max, dt)
            # Beyond a limit already: brake as hard as allowed, never harder.
            high, low = max(min(high, up), v - a_max * dt), min(max(low, -down), v + a_max * dt)
        return (low, high) if low <= high else (0.5 * (low + high),) * 2

    def _legal(self, wish: list[float]) -> list[float]:
        """The legal speeds that keep the wished direction as far as there are any."""
        boxes = [self._interval(i) for i in range(self._dim)]
        floor, scale = 0.0, 1.0
        for i, (low, high) in enumerate(boxes):
            if self._gripper[i] or wish[i] == 0.0:
                continue  # a slow gripper does not slow the arm
            near, far = (low / wish[i], high / wish[i]) if wish[i] > 0 else (high / wish[i], low / wish[i])
            floor, scale = max(floor, near), min(scale, far)
        scale = max(scale, min(floor, 1.0), 0.0)
        legal = []
        for i, (low, high) in enumerate(boxes):
            v = wish[i] if self._gripper[i] else wish[i] * scale
            v = min(max(v, low), high)
            if self._J[i] != inf and not self._delta[i]:
                v = self._stoppable(i, v)
            legal.append(v)
        return legal

    def _stoppable(self, i: int, v: float) -> float:
        """The speed nearest to ``v`` from which dimension ``i`` can still brake before its position limits."""
        now, dt, hz = self._speed[i], self._dt, self._hz
        if self._can_stop(i, v, (v - now) * hz):
            return v
        good = now + brake(now, self._acceleration[i], self._A[i], self._J[i], dt) * dt
        bad = v
        for _ in range(24):
            middle = 0.5 * (good + bad)
            if self._can_stop(i, middle, (middle - now) * hz):
                good = middle
            else:
                bad = middle
        return good
