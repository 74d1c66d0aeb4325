"""Where a replay buffer's episodes lie: arrays of rows with a slot per episode, and which episode makes room when they are full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from robot_rl.replay.sampling import CODE, StartGroup
from robot_rl.types import FeatureSpec, Source, Stratum

EVICTION_ORDER = (Stratum.ONLINE, Stratum.INTERVENTION, Stratum.PRIOR, Stratum.DEMONSTRATION)
_IMITATED = np.array([int(Source.POLICY), int(Source.HUMAN)], np.uint8)


@dataclass(slots=True)
class Slot:
    """One episode in the ring. ``raw`` are its rewards before events and labels."""

    number: int
    episode_id: str
    base: int
    length: int
    stratum: Stratum
    raw: np.ndarray
    source: np.ndarray
    decision_id: np.ndarray
    starts: np.ndarray
    terminated: bool
    final_known: bool
    chunks: np.ndarray | None
    noise_rows: np.ndarray
    success: bool | None = None
    success_step: int = 0
    terminates: bool = True
    composed: tuple[np.ndarray, int, bool] | None = None
    component: np.ndarray | None = None  # a learner's own reward, beside the recorded one or (alone) instead of it
    alone: bool = False
    ends: np.ndarray | None = None  # steps that end the MDP of a learner's own reward


class Ring:
    """Arrays of rows by name (``ring[name]``), an episode in one piece, and which of its steps may be drawn.

    Arguments are those of :class:`~robot_rl.replay.buffer.ReplayBuffer`. To add an episode: :meth:`remove` those of
    :meth:`next_out` until it :meth:`fits`, then :meth:`allocate` its rows and :meth:`put` it there.
    """

    def __init__(
        self,
        capacity: int,
        *,
        conditioning_dim: int,
        action_dim: int,
        noise_shape: tuple[int, int] | None,
        extra: Mapping[str, FeatureSpec],
        views: int,
    ):
        self.capacity, self.action_dim, self.views = capacity, action_dim, views
        # Episodes lie in one piece; the slack keeps the gaps between them from forcing a compaction at every eviction.
        rows = self._rows = self.capacity + max(self.capacity // 8, 64)
        self._arrays: dict[str, np.ndarray] = {
            "conditioning": np.zeros((rows, conditioning_dim), np.float32),
            "action": np.zeros((rows, action_dim), np.float32),
            "window_rows": np.zeros(rows, np.int32),
            "reward": np.zeros(rows, np.float32),
            "discount": np.zeros(rows, np.float32),
            "valid": np.zeros(rows, bool),  # whether the window that starts here may be drawn
            "step_reward": np.zeros(rows, np.float32),  # NaN where a row may not be learned from
            "ends": np.zeros(rows, bool),
            "is_decision": np.zeros(rows, bool),
            "imitated": np.zeros(rows, bool),
            "noise_row": np.zeros(rows, np.int32),
            "left": np.zeros(rows, np.int32),  # steps from here to the episode's end
            "stratum": np.zeros(rows, np.uint8),
        }
        if views > 1:
            self._arrays["views"] = np.zeros((rows, views - 1, conditioning_dim), np.float32)
        self.extra = dict(extra)
        for name, spec in self.extra.items():
            self._arrays[f"extra:{name}"] = np.zeros((rows, *spec.shape), spec.dtype)
        self.has_base: bool | None = None
        # Row 0 is all zeros: the noise of a step that starts no decision.
        self.noise = None if noise_shape is None else np.zeros((rows + 1, *noise_shape), np.float32)
        self._free_noise = np.arange(rows, 0, -1, dtype=np.int32)
        self._n_free = rows
        self.windows = StartGroup(rows)
        self.chunks = StartGroup(rows)
        self.states = StartGroup(rows, every_step=True)
        self.slots: dict[str, Slot] = {}  # insertion order is age
        self.by_number: dict[int, Slot] = {}
        self.next_number = 0
        self._used = 0

    def __len__(self) -> int:
        """Steps held (final observations not counted)."""
        return self._used - len(self.slots)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def fits(self, size: int) -> bool:
        """Whether an episode of ``size`` rows may come in without another going out."""
        return self._used + size <= self.capacity

    def next_out(self) -> str:
        """The episode that makes room first."""
        oldest = (next((s for s in self.slots.values() if s.stratum is stratum), None) for stratum in EVICTION_ORDER)
        return next(s.episode_id for s in oldest if s is not None)

    def allocate(self, size: int) -> int:
        """The first of ``size`` free rows in one piece; other episodes are moved together where there is no such gap."""
        slots = sorted(self.slots.values(), key=lambda s: s.base)
        begins = np.array([*(s.base for s in slots), self._rows])
        ends = np.array([0, *(s.base + s.length + 1 for s in slots)])
        fitting = np.flatnonzero(begins - ends >= size)
        if len(fitting):
            # The gap behind the newest episode first: episodes then lie in the order they came, and gaps merge.
            newest = next(reversed(self.slots.values()), None)
            after = fitting[ends[fitting] >= (0 if newest is None else newest.base)]
            return int(ends[after[0] if len(after) else fitting[0]])
        at = 0
        for slot in slots:
            if slot.base != at:
                for array in self._arrays.values():
                    array[at : at + slot.length + 1] = array[slot.base : slot.base + slot.length + 1].copy()
                for group in (self.windows, self.chunks, self.states):
                    group.move(slot.number, slot.base, at, slot.length + 1)
                slot.base = at
            at += slot.length + 1
        return at

    def expect_base(self, present: bool) -> None:
        """Whether episodes come with base actions, from the first one on."""
        if present and not self.has_base:
            self._arrays["action_base"] = np.zeros((self._rows, self.action_dim), np.float32)
        self.has_base = present

    def put(
        self,
        slot: Slot,
        conditioning: np.ndarray,
        action: np.ndarray,
        *,
        action_base: np.ndarray | None,
        views: np.ndarray | None,
        extra: Mapping[str, np.ndarray],
        noise_rows: np.ndarray | None,
    ) -> None:
        """Write an episode's rows where :meth:`allocate` found room; its windows are for the caller to set."""
        base, length = slot.base, slot.length
        here = slice(base, base + length)
        ring = self._arrays
        ring["conditioning"][base : base + length + 1] = conditioning
        if views is not None:
            ring["views"][base : base + length + 1] = views
        ring["action"][here] = action
        if action_base is not None:
            ring["action_base"][here] = action_base
        for name, rows in extra.items():
            ring[f"extra:{name}"][here] = rows
        ring["is_decision"][here] = slot.starts
        ring["imitated"][here] = np.isin(slot.source, _IMITATED)
        ring["noise_row"][base : base + length + 1] = 0
        ring["left"][base : base + length + 1] = np.arange(length, -1, -1)
        ring["stratum"][here] = CODE[slot.stratum]
        if noise_rows is not None and self.noise is not None:
            slot.noise_rows = self._take_noise_rows(len(noise_rows))
            self.noise[slot.noise_rows] = noise_rows
            ring["noise_row"][here][slot.starts] = slot.noise_rows
        self.slots[slot.episode_id] = self.by_number[slot.number] = slot
        self.next_number += 1
        self._used += length + 1
        self.states.set(slot.number, base, slot.stratum, length)
        self.chunks.set(slot.number, base, slot.stratum, np.flatnonzero(ring["imitated"][here]))

    def _take_noise_rows(self, count: int) -> np.ndarray:
        self._n_free -= count
        return self._free_noise[self._n_free : self._n_free + count].copy()

    def remove(self, episode_id: str) -> None:
        """Drop one episode. Raises KeyError when it is not held."""
        slot = self.slots.pop(episode_id)
        del self.by_number[slot.number]
        self._used -= slot.length + 1
        for group in (self.windows, self.chunks, self.states):
            group.remove(slot.number)
        count = len(slot.noise_rows)
        self._free_noise[self._n_free : self._n_free + count] = slot.noise_rows
        self._n_free += count
