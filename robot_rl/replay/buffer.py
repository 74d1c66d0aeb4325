"""``ReplayBuffer``: decoded steps in RAM, sampled as windows that never cross an episode's end.

Everything a window needs except its rows (return, discount, length, validity) is worked out when an episode comes in or a
reward changes, so a draw is a few gathers. float32 throughout; the caller's generator is the only source of randomness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from robot_rl.replay.reward_log import LABEL_SOURCE, RewardTable
from robot_rl.replay.sampling import CODE, StartGroup
from robot_rl.replay.windows import EpisodeArrays, WindowConfig, decision_starts, final_observation_known, window_table
from robot_rl.types import Episode, FeatureSpec, RewardEvent, RewardKind, Source, Stratum

EVICTION_ORDER = (Stratum.ONLINE, Stratum.INTERVENTION, Stratum.PRIOR, Stratum.DEMONSTRATION)
_IMITATED = np.array([int(Source.POLICY), int(Source.HUMAN)], np.uint8)


@dataclass(slots=True)
class WindowBatch:
    """B windows of n rows, float32 unless said otherwise; actions are normalised.

    Attributes:
        conditioning: (B, C) at the window's start.
        action: (B, n, A) executed. Rows past the window's end hold the proposed rows where the window starts at a decision
            whose chunk is known, else the last action (zero in delta dimensions).
        mask: (B, n) bool, rows that ran.
        reward: (B,) discounted sum inside the window.
        discount: (B,) factor of the bootstrap value; 0 after the terminal step.
        next_conditioning: (B, C) after the window's last row.
        weight: (B,) 1.0: windows of weight 0 are not drawn. Divide losses by its sum.
        noise: (B, H_w, A_w) of the decision that starts here, zeros where ``is_decision`` is False; ``None`` without noise.
        action_base, next_action_base: (B, n, A) base actions of these rows, and of the n rows from the bootstrap observation
            on (padded like ``action``; of no meaning where ``discount`` is 0); ``None`` when the buffer holds none.
        is_decision: (B,) bool.
        stratum: (B,) uint8, position in ``list(Stratum)``.
        episode_index: (B,) int64 for :meth:`ReplayBuffer.episode_id`.
        step: (B,) int64 start step within the episode.
        extra: name to (B, ...) at the window's start.
    """

    conditioning: np.ndarray
    action: np.ndarray
    mask: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    next_conditioning: np.ndarray
    weight: np.ndarray
    noise: np.ndarray | None
    action_base: np.ndarray | None
    next_action_base: np.ndarray | None
    is_decision: np.ndarray
    stratum: np.ndarray
    episode_index: np.ndarray
    step: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reward)


class PrefixRows(NamedTuple):
    """What every beginning of B windows of n rows is worth learning from; j runs from 1 to n.

    reward, discount, weight (B, n) of the first j rows, next_conditioning (B, n, C) after them. Weight 0: they did not all run, a
    reward is missing, or the observation after them is not known.
    """

    reward: np.ndarray
    discount: np.ndarray
    next_conditioning: np.ndarray
    weight: np.ndarray


class ChunkBatch(NamedTuple):
    """For behaviour cloning: conditioning (B, n_obs, C) oldest first, action (B, H, A), mask (B, H) bool."""

    conditioning: np.ndarray
    action: np.ndarray
    mask: np.ndarray


@dataclass(slots=True)
class _Slot:
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


class ReplayBuffer:
    """A ring of steps with whole-episode eviction.

    Args:
        capacity: rows; an episode of L steps takes L + 1 (its last observation included).
        conditioning_dim, action_dim: C and A.
        window: how windows are cut.
        delta_mask: (A,) bool, action dimensions padded with zero (:attr:`ActionSpec.delta_mask`).
        noise_shape: (H_w, A_w), or ``None`` for decisions without noise.
        chunk_horizon: H of the proposed chunks given to :meth:`add`; ``None``: any.
        extra: further per-step arrays to carry, name to shape and dtype.
        success_reward, failure_reward: what :meth:`mark_success` puts on the deciding transition.
        views: K encodings of every observation, of which a draw takes one at random (pictures moved by a few pixels each time).
        lend_interventions: windows of other strata whose first row a human executed are also drawn as ``intervention``.

    When full, the oldest episode of the first stratum of ``EVICTION_ORDER`` that has any makes room: online data goes first,
    demonstrations last.
    """

    def __init__(
        self,
        capacity: int,
        *,
        conditioning_dim: int,
        action_dim: int,
        window: WindowConfig,
        delta_mask: np.ndarray | Sequence[bool],
        noise_shape: tuple[int, int] | None = None,
        chunk_horizon: int | None = None,
        extra: Mapping[str, FeatureSpec] | None = None,
        success_reward: float = 1.0,
        failure_reward: float = 0.0,
        lend_interventions: bool = True,
        views: int = 1,
    ):
        if views < 1:
            raise ValueError(f"views={views}: accepted are integers >= 1")
        if capacity < 2:
            raise ValueError(f"capacity={capacity}: accepted are integers >= 2")
        self.capacity = int(capacity)
        self.window = window
        self.conditioning_dim, self.action_dim = int(conditioning_dim), int(action_dim)
        self.delta_mask = np.asarray(delta_mask, bool)
        if self.delta_mask.shape != (self.action_dim,):
            raise ValueError(f"delta_mask has shape {self.delta_mask.shape}, expected ({self.action_dim},)")
        self.noise_shape = None if noise_shape is None else (int(noise_shape[0]), int(noise_shape[1]))
        self.chunk_horizon = chunk_horizon
        self.success_reward, self.failure_reward = float(success_reward), float(failure_reward)
        self.lend_interventions = lend_interventions
        # Episodes lie in one piece; the slack keeps the gaps between them from forcing a compaction at every eviction.
        rows = self._rows = self.capacity + max(self.capacity // 8, 64)
        self._ring: dict[str, np.ndarray] = {
            "conditioning": np.zeros((rows, self.conditioning_dim), np.float32),
            "action": np.zeros((rows, self.action_dim), np.float32),
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
        self.views = int(views)
        if self.views > 1:
            self._ring["views"] = np.zeros((rows, self.views - 1, self.conditioning_dim), np.float32)
        self._extra = dict(extra or {})
        for name, spec in self._extra.items():
            self._ring[f"extra:{name}"] = np.zeros((rows, *spec.shape), spec.dtype)
        self._has_base: bool | None = None
        # Row 0 is all zeros: the noise of a step that starts no decision.
        self._noise = None if self.noise_shape is None else np.zeros((rows + 1, *self.noise_shape), np.float32)
        self._free_noise = np.arange(rows, 0, -1, dtype=np.int32)
        self._n_free = rows
        self._windows = StartGroup(rows)
        self._chunks = StartGroup(rows)
        self._states = StartGroup(rows, every_step=True)
        self._slots: dict[str, _Slot] = {}  # insertion order is age
        self._by_number: dict[int, _Slot] = {}
        self._next_number = 0
        self._used = 0
        self._table = RewardTable()
        self.evicted_episodes = 0

    # ------------------------------------------------------------------ content

    def __len__(self) -> int:
        """Steps held (final observations not counted)."""
        return self._used - len(self._slots)

    def __contains__(self, episode_id: object) -> bool:
        return episode_id in self._slots

    def episode_ids(self) -> list[str]:
        """Episodes held, oldest first. Adding them in this order to an empty buffer gives one that samples the same."""
        return list(self._slots)

    def numbers(self) -> set[int]:
        """``WindowBatch.episode_index`` of everything held."""
        return set(self._by_number)

    def episode_id(self, index: int) -> str:
        """The id behind ``WindowBatch.episode_index``. Raises KeyError for one that has been evicted."""
        return self._by_number[int(index)].episode_id

    @property
    def extra_names(self) -> frozenset[str]:
        """Names of the further per-step arrays that :meth:`add` wants."""
        return frozenset(self._extra)

    def column(self, name: str) -> np.ndarray:
        """(steps, ...) a further per-step array over everything held, oldest episode first."""
        rows = self._ring[f"extra:{name}"]
        parts = [rows[s.base : s.base + s.length] for s in self._slots.values()]
        return np.concatenate(parts) if parts else rows[:0].copy()

    def conditioning(self, number: int) -> np.ndarray:
        """(L + 1, C) of one episode, by its number; a view."""
        slot = self._by_number[number]
        return self._ring["conditioning"][slot.base : slot.base + slot.length + 1]

    def rows(self, name: str, number: int) -> np.ndarray:
        """(L, ...) a further per-step array of one episode, by its number; a view, and may be written to."""
        slot = self._by_number[number]
        return self._ring[f"extra:{name}"][slot.base : slot.base + slot.length]

    def starts(self) -> dict[Stratum, int]:
        """Windows that may be drawn per stratum (a lent intervention counts in both)."""
        return self._windows.available()

    @property
    def total_starts(self) -> int:
        """Windows that may be drawn without ratios."""
        return self._windows.all.total

    def add(
        self,
        episode: Episode,
        conditioning: np.ndarray,
        action: np.ndarray,
        *,
        action_base: np.ndarray | None = None,
        chunks: np.ndarray | None = None,
        extra: Mapping[str, np.ndarray] | None = None,
        stratum: Stratum | None = None,
        views: np.ndarray | None = None,
        reward_component: np.ndarray | None = None,
        task_reward: bool = True,
        terminated: bool | None = None,
        ends: np.ndarray | None = None,
    ) -> int:
        """Take an episode of L steps in; gives its index.

        Args:
            conditioning: (L + 1, C) float32.
            action: (L, A) float32, normalised executed action.
            action_base: (L, A) normalised; all episodes have it or none.
            chunks: (D, H, A) normalised proposals, one per decision of the episode.
            extra: every array named in the constructor, (L, ...).
            stratum: default is the episode's own.
            views: (L + 1, K - 1, C), the encodings beside ``conditioning``; needed where ``views`` K is more than one.
            reward_component: (L,) a reward of the learner's own (takeovers, say), added to the recorded one however late that
                comes, NaN where nothing may be learned from a step; it never reaches the store.
            task_reward: False leaves the recorded reward out altogether, late ones included; needs a ``reward_component``.
            terminated: overrides what the recording says about its end.
            ends: (L,) bool, see :class:`~robot_rl.replay.windows.EpisodeArrays`.

        Raises:
            ValueError: shapes do not fit, values are not finite, the id is in the buffer already, or the episode is larger
                than the buffer.
        """
        length = len(episode)
        who = f"episode {episode.meta.episode_id!r}"
        stratum = Stratum(episode.meta.stratum if stratum is None else stratum)
        if not episode.meta.episode_id or episode.meta.episode_id in self._slots:
            raise ValueError(f"{who} is already in the buffer, or has no id")
        if not 1 <= length < self.capacity:
            raise ValueError(f"{who} has {length} steps; accepted are 1 to {self.capacity - 1} with capacity={self.capacity}")
        conditioning = _fit(conditioning, (length + 1, self.conditioning_dim), f"{who}: conditioning")
        if (views is None) != (self.views == 1):
            raise ValueError(
                f"{who} comes with{'out' if views is None else ''} views; this buffer has {self.views} an observation"
            )
        if views is not None:
            views = _fit(views, (length + 1, self.views - 1, self.conditioning_dim), f"{who}: views")
        action = _fit(action, (length, self.action_dim), f"{who}: action")
        if self._has_base is not None and self._has_base != (action_base is not None):
            raise ValueError(
                f"{who} comes {'without' if action_base is None else 'with'} action_base, the episodes before it "
                f"{'with' if self._has_base else 'without'}: compute base actions for all of them or none"
            )
        if action_base is not None:
            action_base = _fit(action_base, (length, self.action_dim), f"{who}: action_base")
        if chunks is not None:
            chunks = np.asarray(chunks)
            horizon = chunks.shape[1] if chunks.ndim == 3 and self.chunk_horizon is None else self.chunk_horizon
            chunks = _fit(chunks, (len(episode.decisions), horizon or 0, self.action_dim), f"{who}: chunks").copy()
        extra = dict(extra or {})
        if extra.keys() != self._extra.keys():
            raise ValueError(f"{who}: extra has {sorted(extra)}, expected {sorted(self._extra)}")
        extra = {k: _fit(v, (length, *self._extra[k].shape), f"{who}: {k}", self._extra[k].dtype) for k, v in extra.items()}
        if reward_component is not None:
            reward_component = np.array(reward_component, np.float32)
            _fit(np.nan_to_num(reward_component, nan=0.0, posinf=np.inf, neginf=-np.inf), (length,), f"{who}: reward_component")
        elif not task_reward:
            raise ValueError(f"{who}: task_reward=False leaves no reward at all; accepted with a reward_component")
        starts, noise_rows = self._starts(episode, who)
        base = self._allocate(length + 1)
        if action_base is not None and not self._has_base:
            self._ring["action_base"] = np.zeros((self._rows, self.action_dim), np.float32)
        self._has_base = action_base is not None
        slot = _Slot(
            number=self._next_number, episode_id=episode.meta.episode_id, base=base, length=length, stratum=stratum,
            raw=np.array(episode.reward, np.float32), source=np.array(episode.source, np.uint8),
            decision_id=np.array(episode.decision_id, np.int32), starts=starts,
            terminated=bool(episode.terminated[-1]) if terminated is None else terminated,
            final_known=final_observation_known(episode), chunks=chunks, noise_rows=np.zeros(0, np.int32),
            component=reward_component, alone=not task_reward,
            ends=None if ends is None else _fit(ends, (length,), f"{who}: ends", "bool").copy(),
        )  # fmt: skip
        here = slice(base, base + length)
        ring = self._ring
        ring["conditioning"][base : base + length + 1] = conditioning
        if views is not None:
            ring["views"][base : base + length + 1] = views
        ring["action"][here] = action
        if action_base is not None:
            ring["action_base"][here] = action_base
        for name, rows in extra.items():
            ring[f"extra:{name}"][here] = rows
        ring["is_decision"][here] = starts
        ring["imitated"][here] = np.isin(slot.source, _IMITATED)
        ring["noise_row"][base : base + length + 1] = 0
        ring["left"][base : base + length + 1] = np.arange(length, -1, -1)
        ring["stratum"][here] = CODE[stratum]
        if noise_rows is not None and self._noise is not None:
            slot.noise_rows = self._take_noise_rows(len(noise_rows))
            self._noise[slot.noise_rows] = noise_rows
            ring["noise_row"][here][starts] = slot.noise_rows
        self._slots[slot.episode_id] = self._by_number[slot.number] = slot
        self._next_number += 1
        self._used += length + 1
        self._states.set(slot.number, base, stratum, length)
        self._chunks.set(slot.number, base, stratum, np.flatnonzero(ring["imitated"][here]))
        self._refresh(slot)
        return slot.number

    def _starts(self, episode: Episode, who: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Decision starts, and the noise (starts, H_w, A_w) that belongs to them."""
        starts = decision_starts(episode)
        if self.noise_shape is None:
            return starts, None
        present = np.array([d.noise is not None for d in episode.decisions], bool)
        if len(present):
            starts &= present[np.clip(episode.decision_id, 0, len(present) - 1)]
        else:
            starts = np.zeros(len(episode), bool)
        noise = [episode.decisions[i].noise for i in episode.decision_id[starts]]
        if not noise:
            return starts, None
        return starts, _fit(np.stack(noise), (len(noise), *self.noise_shape), f"{who}: noise")

    def _take_noise_rows(self, count: int) -> np.ndarray:
        self._n_free -= count
        return self._free_noise[self._n_free : self._n_free + count].copy()

    # ------------------------------------------------------------------ room in the ring

    def _allocate(self, size: int) -> int:
        while self._used + size > self.capacity:
            self._evict()
        slots = sorted(self._slots.values(), key=lambda s: s.base)
        begins = np.array([*(s.base for s in slots), self._rows])
        ends = np.array([0, *(s.base + s.length + 1 for s in slots)])
        fitting = np.flatnonzero(begins - ends >= size)
        if len(fitting):
            # The gap behind the newest episode first: episodes then lie in the order they came, and gaps merge.
            newest = next(reversed(self._slots.values()), None)
            after = fitting[ends[fitting] >= (0 if newest is None else newest.base)]
            return int(ends[after[0] if len(after) else fitting[0]])
        at = 0
        for slot in slots:
            if slot.base != at:
                for array in self._ring.values():
                    array[at : at + slot.length + 1] = array[slot.base : slot.base + slot.length + 1].copy()
                for group in (self._windows, self._chunks, self._states):
                    group.move(slot.number, slot.base, at, slot.length + 1)
                slot.base = at
            at += slot.length + 1
        return at

    def _evict(self) -> None:
        for stratum in EVICTION_ORDER:
            oldest = next((s for s in self._slots.values() if s.stratum is stratum), None)
            if oldest is not None:
                self.remove(oldest.episode_id)
                self.evicted_episodes += 1
                return

    def remove(self, episode_id: str) -> None:
        """Drop one episode. Raises KeyError when it is not in the buffer."""
        slot = self._slots.pop(episode_id)
        del self._by_number[slot.number]
        self._used -= slot.length + 1
        for group in (self._windows, self._chunks, self._states):
            group.remove(slot.number)
        count = len(slot.noise_rows)
        self._free_noise[self._n_free : self._n_free + count] = slot.noise_rows
        self._n_free += count
        self._table.forget(episode_id)

    # ------------------------------------------------------------------ rewards

    def update_reward(self, event: RewardEvent | tuple[str, int, float]) -> bool:
        """Let a late reward change what is sampled next; gives whether the episode is in the buffer.

        An event about observation ``k`` sets the reward of transition ``k - 1``. Repeats and disorder do not matter: of the
        events of one (step, source) the greatest valid, unrevoked id counts; several sources add up; where none is valid the
        recorded reward stands. Events of the source ``label`` are verdicts on the episode (:meth:`mark_success`). A tuple is
        ``(episode_id, transition, value)`` and replaces the recorded reward; NaN makes it unknown.

        Raises:
            ValueError: a potential (it shapes two transitions: compose it first, then give the sum as a tuple), or a step
                outside the episode.
        """
        if not isinstance(event, RewardEvent):
            episode_id, step, value = event
            return self.set_rewards(episode_id, np.asarray([value], np.float32), first=int(step))
        slot = self._slots.get(event.episode_id)
        if slot is None:
            return False
        if event.kind is RewardKind.POTENTIAL:
            raise ValueError(
                f"{event.source}: a potential is no reward of one transition; compose it and pass (episode_id, step, value)"
            )
        if not 1 <= event.step <= slot.length:
            raise ValueError(
                f"episode {slot.episode_id}: event about observation {event.step}, accepted are 1 to {slot.length}"
            )
        self._table.add(event)
        self._refresh(slot)
        return True

    def set_rewards(self, episode_id: str, values: np.ndarray, *, first: int = 0) -> bool:
        """Replace the recorded rewards of transitions [first, first + len(values)); False when the episode is not here."""
        slot = self._slots.get(episode_id)
        if slot is None:
            return False
        if not 0 <= first <= first + len(values) <= slot.length:
            raise ValueError(
                f"episode {episode_id}: rewards for [{first}, {first + len(values)}), it has {slot.length} transitions"
            )
        slot.raw[first : first + len(values)] = values
        self._refresh(slot)
        return True

    def set_composed(self, episode_id: str, reward: np.ndarray, *, length: int, terminated: bool) -> bool:
        """Put an episode's rewards (L,) in force as somebody else composed them, NaN where unknown; False when it is not here.

        Of the episode, ``length`` transitions are sampled, the last of them terminal if ``terminated``. Recorded rewards, events
        and verdicts given to this buffer no longer count for it.

        Raises:
            ValueError: shapes do not fit, or the episode came with a learner's own ``reward_component``: who composes must know all.
        """
        slot = self._slots.get(episode_id)
        if slot is None:
            return False
        if slot.component is not None:
            raise ValueError(
                f"episode {episode_id} has a reward_component, which composed rewards would hide: accepted is one or the other"
            )
        if np.shape(reward) != (slot.length,) or not 1 <= length <= slot.length:
            raise ValueError(
                f"episode {episode_id}: rewards {np.shape(reward)} and length={length}, accepted are ({slot.length},) and 1 to "
                f"{slot.length}"
            )
        slot.composed = (np.array(reward, np.float32), int(length), bool(terminated))
        self._refresh(slot)
        return True

    def mark_success(self, episode_id: str, success: bool | None, *, step: int | None = None, terminates: bool = True) -> bool:
        """A verdict on a sparse-reward episode; ``None`` takes it back. False when the episode is not in the buffer.

        Unknown rewards become 0. Success puts ``success_reward`` on the transition that reached observation ``step`` (default:
        the last), which then ends the MDP if ``terminates``; what was recorded after it is no longer sampled. Failure puts
        ``failure_reward`` on the last transition and leaves how the episode ended as it was.
        """
        slot = self._slots.get(episode_id)
        if slot is None:
            return False
        step = slot.length if step is None else int(step)
        if not 1 <= step <= slot.length:
            raise ValueError(f"episode {episode_id}: step={step}, accepted are 1 to {slot.length}")
        slot.success, slot.success_step, slot.terminates = success, step, terminates
        self._refresh(slot)
        return True

    def _composed(self, slot: _Slot) -> tuple[np.ndarray, int, bool]:
        """Rewards in force, steps that may be sampled, and whether the last of them is terminal."""
        if slot.composed is not None:
            return slot.composed
        reward = slot.raw.copy()
        success, step, terminates = slot.success, slot.success_step, slot.terminates
        heard: dict[int, float] = {}
        labels = []
        for event in self._table.active(slot.episode_id):
            if event.valid and event.source == LABEL_SOURCE:
                labels.append(event)
            elif event.valid:
                heard[event.step] = heard.get(event.step, 0.0) + event.value
        for k, value in heard.items():
            reward[k - 1] = value
        if labels:
            last = max(labels, key=lambda e: e.event_id)
            success, step, terminates = last.value > 0.5, last.step, True
        if success is None:
            return reward, slot.length, slot.terminated
        reward[np.isnan(reward)] = 0.0
        if not success:
            reward[-1] = self.failure_reward
            return reward, slot.length, slot.terminated
        reward[step - 1] = self.success_reward
        return (reward, step, True) if terminates else (reward, slot.length, slot.terminated)

    def set_gamma(self, gamma: float) -> None:
        """Cut every window with another discount from now on. Raises ValueError for one outside (0, 1]."""
        self.window = replace(self.window, gamma=gamma)
        for slot in self._slots.values():
            self._refresh(slot)

    def _refresh(self, slot: _Slot) -> None:
        """Work out the windows of one episode again."""
        reward, length, terminated = self._composed(slot)
        if slot.component is not None:
            reward = slot.component if slot.alone else reward + slot.component
        here = slice(slot.base, slot.base + length)
        arrays = EpisodeArrays(
            action=self._ring["action"][here], reward=reward[:length], source=slot.source[:length], terminated=terminated,
            delta_mask=self.delta_mask, final_known=slot.final_known or length < slot.length,
            decision_id=slot.decision_id[:length], starts=slot.starts[:length],
            ends=None if slot.ends is None else slot.ends[:length],
        )  # fmt: skip
        table = window_table(arrays, self.window)
        self._ring["window_rows"][here] = table.rows
        self._ring["reward"][here] = table.reward
        self._ring["discount"][here] = table.discount
        whole = slice(slot.base, slot.base + slot.length)
        self._ring["valid"][whole], self._ring["step_reward"][whole], self._ring["ends"][whole] = False, np.nan, False
        self._ring["valid"][here] = table.valid
        self._ring["step_reward"][here] = np.where(arrays.source == Source.HOLD, np.nan, arrays.reward)
        self._ring["ends"][here] = False if arrays.ends is None else arrays.ends
        self._ring["ends"][here.stop - 1] |= terminated
        if not (terminated or arrays.final_known):
            self._ring["step_reward"][here.stop - 1] = np.nan
        self._windows.set(slot.number, slot.base, slot.stratum, np.flatnonzero(table.valid))
        if self.lend_interventions and slot.stratum is not Stratum.INTERVENTION:
            lent = np.flatnonzero(table.valid & (slot.source[:length] == Source.HUMAN))
            self._windows.set(slot.number, slot.base, Stratum.INTERVENTION, lent, lent=True)

    # ------------------------------------------------------------------ sampling

    def sample(
        self, batch_size: int, rng: np.random.Generator, ratios: Mapping[Stratum | str, float] | None = None
    ) -> WindowBatch:
        """Draw windows uniformly, with replacement.

        Args:
            ratios: share of each stratum (normalised). Rows of the strata are interleaved so that every slice of the batch
                keeps the shares to within one row. A stratum without valid windows gives its share to the others asked
                for, in proportion to theirs. ``None``: uniform over everything.

        Raises:
            EmptyBufferError: no valid window (in the strata asked for).
        """
        (number, base, step), codes = self._windows.draw(batch_size, rng, ratios)
        return self._gather(number, base, step, codes, rng)

    def sample_prefixes(
        self, batch_size: int, rng: np.random.Generator, ratios: Mapping[Stratum | str, float] | None = None
    ) -> tuple[WindowBatch, PrefixRows]:
        """Draw windows from every step, and what each of their beginnings is worth; a window that was cut short has weight 0."""
        (number, base, step), codes = self._states.draw(batch_size, rng, ratios)
        windows = self._gather(number, base, step, codes, rng)
        ring, n, gamma = self._ring, self.window.n, self.window.gamma
        at, offsets = base + step, np.arange(n)
        windows.weight = ring["valid"][at].astype(np.float32)
        inside = offsets < ring["left"][at][:, None]
        places = at[:, None] + np.minimum(offsets, ring["left"][at][:, None] - 1)
        reward = np.cumsum(np.where(inside, ring["step_reward"][places], np.nan) * gamma**offsets, axis=1)
        weight = np.isfinite(reward)
        discount = np.where(ring["ends"][places], 0.0, gamma ** (offsets + 1.0))
        rows = np.where(weight, reward, 0.0).astype(np.float32), np.where(weight, discount, 0.0).astype(np.float32)
        return windows, PrefixRows(*rows, self._seen(places + 1, rng), weight.astype(np.float32))

    def _gather(
        self, number: np.ndarray, base: np.ndarray, step: np.ndarray, codes: np.ndarray | None, rng: np.random.Generator
    ) -> WindowBatch:
        ring, n, batch_size = self._ring, self.window.n, len(step)
        at = base + step
        if codes is None:
            codes = ring["stratum"][at]
        rows = ring["window_rows"][at]
        offsets = np.arange(n)
        mask = offsets < rows[:, None]
        places = at[:, None] + np.minimum(offsets, rows[:, None] - 1)
        is_decision = ring["is_decision"][at]
        action = ring["action"].take(places, axis=0)
        self._pad(action, mask, np.flatnonzero(rows < n), number, step, is_decision)
        next_at = at + rows
        has_base = bool(self._has_base)
        return WindowBatch(
            conditioning=self._seen(at, rng),
            action=action,
            mask=mask,
            reward=ring["reward"][at],
            discount=ring["discount"][at],
            next_conditioning=self._seen(next_at, rng),
            weight=np.ones(batch_size, np.float32),
            noise=None if self._noise is None else self._noise.take(ring["noise_row"][at], axis=0),
            action_base=self._base_rows(at) if has_base else None,
            next_action_base=self._base_rows(next_at) if has_base else None,
            is_decision=is_decision,
            stratum=np.array(codes),
            episode_index=number,
            step=step,
            extra={name: ring[f"extra:{name}"].take(at, axis=0) for name in self._extra},
        )

    def _seen(self, at: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(..., C) conditioning at ring rows ``at``; where observations have several encodings, one of them each."""
        found = self._ring["conditioning"].take(at, axis=0)
        if self.views > 1:
            which = rng.integers(self.views, size=at.shape)
            moved = which > 0
            found[moved] = self._ring["views"][at[moved], which[moved] - 1]
        return found

    def _pad(
        self, action: np.ndarray, mask: np.ndarray, cut: np.ndarray, number: np.ndarray, step: np.ndarray, starts: np.ndarray
    ) -> None:
        """Rows past the end (they hold the last action so far): zero in delta dimensions, or what was proposed."""
        if not len(cut):
            return
        action[cut] *= mask[cut][:, :, None] | ~self.delta_mask
        for i in cut[starts[cut]].tolist():
            slot = self._by_number[int(number[i])]
            if slot.chunks is not None:
                proposed = slot.chunks[slot.decision_id[step[i]]]
                first, last = int(mask[i].sum()), min(self.window.n, len(proposed))
                action[i, first:last] = proposed[first:last]

    def _base_rows(self, at: np.ndarray) -> np.ndarray:
        """(B, n, A) base actions from ring row ``at`` on, held (or zero) past the episode's last step."""
        offsets = np.arange(self.window.n)
        left = self._ring["left"][at][:, None]
        out = self._ring["action_base"].take(at[:, None] + np.minimum(offsets, left - 1), axis=0)
        out *= (offsets < left)[:, :, None] | ~self.delta_mask
        return out

    def sample_states(
        self, batch_size: int, rng: np.random.Generator, ratios: Mapping[Stratum | str, float] | None = None
    ) -> np.ndarray:
        """(B, C) conditioning at uniform steps, whether or not their rewards are known."""
        (_, base, step), _ = self._states.draw(batch_size, rng, ratios)
        return self._seen(base + step, rng)

    def sample_chunks(
        self,
        batch_size: int,
        rng: np.random.Generator,
        horizon: int,
        n_obs: int = 1,
        ratios: Mapping[Stratum | str, float] | None = None,
    ) -> ChunkBatch:
        """Draw sequences for behaviour cloning, from every step that the policy or a human executed.

        Conditioning repeats the first frame before the episode's start; actions past its end hold (zero in delta
        dimensions) and are masked, as are rows that nobody should imitate (latched, blended, held, replaced by safety).
        """
        return self.sample_chunk_rows(batch_size, rng, horizon, n_obs, ratios)[0]

    def sample_chunk_rows(
        self,
        batch_size: int,
        rng: np.random.Generator,
        horizon: int,
        n_obs: int = 1,
        ratios: Mapping[Stratum | str, float] | None = None,
    ) -> tuple[ChunkBatch, dict[str, np.ndarray]]:
        """:meth:`sample_chunks`, and the extra arrays of its rows: name to (B, H, ...), past the end those of the last step."""
        if horizon < 1 or n_obs < 1:
            raise ValueError(f"horizon={horizon}, n_obs={n_obs}: accepted are integers >= 1")
        (_, base, step), _ = self._chunks.draw(batch_size, rng, ratios)
        back = np.maximum(step[:, None] - np.arange(n_obs - 1, -1, -1), 0)
        left = self._ring["left"][base + step]
        offsets = np.arange(horizon)
        inside = offsets < left[:, None]
        places = (base + step)[:, None] + np.minimum(offsets, left[:, None] - 1)
        action = self._ring["action"].take(places, axis=0)
        action *= inside[:, :, None] | ~self.delta_mask
        mask = inside & self._ring["imitated"].take(places)
        extra = {name: self._ring[f"extra:{name}"].take(places, axis=0) for name in self._extra}
        return ChunkBatch(self._ring["conditioning"].take(base[:, None] + back, axis=0), action, mask), extra


def _fit(value: np.ndarray, shape: tuple[int, ...], what: str, dtype: str = "float32") -> np.ndarray:
    """The array as ``dtype``. Raises ValueError when its shape differs or it is not finite."""
    array = np.asarray(value)
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}, expected {shape}")
    array = array.astype(dtype, copy=False)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{what} is not finite at row {int(np.argwhere(~np.isfinite(array))[0][0])}")
    return array
