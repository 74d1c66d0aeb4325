"""Which row of which chunk runs at which control step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from robot_rl.types import ActionSpec


@dataclass(frozen=True)
class Row:
    """One scheduled command: physical (A,) values and where they come from."""

    command: np.ndarray
    base: np.ndarray
    decision_id: int
    chunk_row: int
    version: int
    chunk_started: bool  # True for the first row that runs of its chunk


@dataclass(frozen=True)
class RunningChunk:
    """What runs while the next chunk is computed, from that one's own control step on.

    Attributes:
        rows, base: (m, A) physical, of the head and of its base, with rows that may not run any more; m >= 1.
        frozen: the first so many will have run before the next chunk is there.
    """

    rows: np.ndarray
    base: np.ndarray
    frozen: int


@dataclass
class _Chunk:
    start: int  # control step that row 0 belongs to
    rows: np.ndarray  # (H, A)
    base: np.ndarray  # (H, A)
    n: int  # rows that may run
    arrived: int  # control step at which it was there
    decision_id: int
    version: int
    begun: bool = field(default=False)


class ChunkScheduler:
    """Absolute indexing: row i of a chunk computed from the observation at step t belongs to step t + i.

    A chunk that arrives late loses the rows whose step has passed, by the *measured* step and never by an estimate of
    latency; one with no row left is dropped whole and counted in ``late_chunks``. Where two chunks overlap, the newer one
    is blended in over ``blend_steps`` rows from its arrival on with a linear weight; grippers are never averaged, they take the newest value. A chunk
    that already continues the older one (:meth:`running`) is not blended.

    Args:
        n_action_steps: rows of a chunk that may run.
        replan_margin: ask for the next chunk when at most this many rows are left (0: when the last one has run, which is
            right for a simulator that waits).
        blend_steps: 0 switches chunks without blending.
    """

    def __init__(self, action: ActionSpec, n_action_steps: int, *, replan_margin: int = 0, blend_steps: int = 0) -> None:
        if n_action_steps < 1:
            raise ValueError(f"n_action_steps={n_action_steps}: accepted are integers >= 1")
        if replan_margin < 0 or blend_steps < 0:
            raise ValueError(f"replan_margin={replan_margin}, blend_steps={blend_steps}: accepted are integers >= 0")
        self.n_action_steps, self.replan_margin, self.blend_steps = n_action_steps, replan_margin, blend_steps
        self._newest_only = np.array([k in ("gripper_discrete", "gripper_continuous") for k in action.kind])
        self._current: _Chunk | None = None
        self._previous: _Chunk | None = None
        self.late_chunks = 0

    def clear(self) -> None:
        """Forget every scheduled row (episode start, take-over, hand-back)."""
        self._current = self._previous = None

    def push(
        self, step: int, now: int, rows: np.ndarray, base: np.ndarray, decision_id: int, version: int, continues: bool = False
    ) -> bool:
        """Schedule a chunk computed from the observation at ``step`` that arrived at step ``now``; False if it came too late."""
        n = min(self.n_action_steps, len(rows))
        if step + n <= now:
            self.late_chunks += 1
            return False
        self._previous = self._current if self.blend_steps and not continues else None
        self._current = _Chunk(step, rows, base, n, now, decision_id, version)
        return True

    def rows_left(self, now: int) -> int:
        """Rows that can still run from step ``now`` on."""
        chunk = self._current
        return 0 if chunk is None else max(0, chunk.start + chunk.n - now)

    def running(self, now: int, frozen: int) -> RunningChunk | None:
        """What a chunk computed from step ``now`` has to continue, where ``frozen`` rows run before it is there.

        None where no row is left that runs: then it begins something new, as chunks of a simulator that waits do.
        """
        chunk, left = self._current, self.rows_left(now)
        if chunk is None or left == 0:
            return None
        i = now - chunk.start
        return RunningChunk(chunk.rows[i:], chunk.base[i:], min(frozen, left))

    def wants_chunk(self, now: int) -> bool:
        return self.rows_left(now) <= self.replan_margin

    def row(self, now: int) -> Row | None:
        """The command for step ``now``, or None when nothing is scheduled."""
        chunk = self._current
        if chunk is None:
            return None
        i = now - chunk.start
        if not 0 <= i < chunk.n:
            return None
        command = chunk.rows[i]
        if self._previous is not None:
            command = self._blend(command, now)
        started, chunk.begun = not chunk.begun, True
        return Row(command, chunk.base[i], chunk.decision_id, i, chunk.version, started)

    def _blend(self, command: np.ndarray, now: int) -> np.ndarray:
        old, new = self._previous, self._current
        assert old is not None
        assert new is not None
        j, age = now - old.start, now - new.arrived
        if j >= old.n or age >= self.blend_steps:
            self._previous = None
            return command
        weight = (age + 1) / (self.blend_steps + 1)
        return np.where(self._newest_only, command, weight * command + (1.0 - weight) * old.rows[j])
