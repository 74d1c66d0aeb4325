"""``ReplayBuffer``: decoded steps in RAM, sampled as windows that never cross an episode's end.

Everything a window needs except its rows (return, discount, length, validity) is worked out when an episode comes in or a
reward changes, so a draw is a few gathers. float32 throughout; the caller's generator is the only source of randomness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from robot_rl.replay.batches import ChunkBatch, PrefixRows, WindowBatch
from robot_rl.replay.gathering import Gatherer
from robot_rl.replay.reward_log import RewardTable
from robot_rl.replay.rewards_in_force import rewards_in_force
from robot_rl.replay.ring import Ring, Slot
from robot_rl.replay.windows import EpisodeArrays, WindowConfig, decision_starts, final_observation_known, window_table
from robot_rl.types import Episode, FeatureSpec, RewardEvent, RewardKind, Source, Stratum


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

    When full, the oldest episode of the first stratum of :data:`~robot_rl.replay.ring.EVICTION_ORDER` that has any makes room:
    online data goes first, demonstrations last.
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
        self.views = int(views)
        self._ring = Ring(
            self.capacity, conditioning_dim=self.conditioning_dim, action_dim=self.action_dim, noise_shape=self.noise_shape,
            extra=extra or {}, views=self.views,
        )  # fmt: skip
        self._gatherer = Gatherer(self._ring, self.delta_mask)
        self._table = RewardTable()
        self.evicted_episodes = 0

    # ------------------------------------------------------------------ content

    def __len__(self) -> int:
        """Steps held (final observations not counted)."""
        return len(self._ring)

    def __contains__(self, episode_id: object) -> bool:
        return episode_id in self._ring.slots

    def episode_ids(self) -> list[str]:
        """Episodes held, oldest first. Adding them in this order to an empty buffer gives one that samples the same."""
        return list(self._ring.slots)

    def numbers(self) -> set[int]:
        """``WindowBatch.episode_index`` of everything held."""
        return set(self._ring.by_number)

    def episode_id(self, index: int) -> str:
        """The id behind ``WindowBatch.episode_index``. Raises KeyError for one that has been evicted."""
        return self._ring.by_number[int(index)].episode_id

    @property
    def extra_names(self) -> frozenset[str]:
        """Names of the further per-step arrays that :meth:`add` wants."""
        return frozenset(self._ring.extra)

    def column(self, name: str) -> np.ndarray:
        """(steps, ...) a further per-step array over everything held, oldest episode first."""
        rows = self._ring[f"extra:{name}"]
        parts = [rows[s.base : s.base + s.length] for s in self._ring.slots.values()]
        return np.concatenate(parts) if parts else rows[:0].copy()

    def conditioning(self, number: int) -> np.ndarray:
        """(L + 1, C) of one episode, by its number; a view."""
        slot = self._ring.by_number[number]
        return self._ring["conditioning"][slot.base : slot.base + slot.length + 1]

    def rows(self, name: str, number: int) -> np.ndarray:
        """(L, ...) a further per-step array of one episode, by its number; a view, and may be written to."""
        slot = self._ring.by_number[number]
        return self._ring[f"extra:{name}"][slot.base : slot.base + slot.length]

    def starts(self) -> dict[Stratum, int]:
        """Windows that may be drawn per stratum (a lent intervention counts in both)."""
        return self._ring.windows.available()

    @property
    def total_starts(self) -> int:
        """Windows that may be drawn without ratios."""
        return self._ring.windows.all.total

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
        if not episode.meta.episode_id or episode.meta.episode_id in self._ring.slots:
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
        if self._ring.has_base is not None and self._ring.has_base != (action_base is not None):
            raise ValueError(
                f"{who} comes {'without' if action_base is None else 'with'} action_base, the episodes before it "
                f"{'with' if self._ring.has_base else 'without'}: compute base actions for all of them or none"
            )
        if action_base is not None:
            action_base = _fit(action_base, (length, self.action_dim), f"{who}: action_base")
        if chunks is not None:
            chunks = np.asarray(chunks)
            horizon = chunks.shape[1] if chunks.ndim == 3 and self.chunk_horizon is None else self.chunk_horizon
            chunks = _fit(chunks, (len(episode.decisions), horizon or 0, self.action_dim), f"{who}: chunks").copy()
        extra = dict(extra or {})
        if extra.keys() != self._ring.extra.keys():
            raise ValueError(f"{who}: extra has {sorted(extra)}, expected {sorted(self._ring.extra)}")
        extra = {
            k: _fit(v, (length, *self._ring.extra[k].shape), f"{who}: {k}", self._ring.extra[k].dtype) for k, v in extra.items()
        }
        if reward_component is not None:
            reward_component = np.array(reward_component, np.float32)
            _fit(np.nan_to_num(reward_component, nan=0.0, posinf=np.inf, neginf=-np.inf), (length,), f"{who}: reward_component")
        elif not task_reward:
            raise ValueError(f"{who}: task_reward=False leaves no reward at all; accepted with a reward_component")
        if ends is not None:
            ends = _fit(ends, (length,), f"{who}: ends", "bool").copy()
        starts, noise_rows = self._starts(episode, who)
        base = self._make_room(length + 1)
        self._ring.expect_base(action_base is not None)
        slot = Slot(
            number=self._ring.next_number, episode_id=episode.meta.episode_id, base=base, length=length, stratum=stratum,
            raw=np.array(episode.reward, np.float32), source=np.array(episode.source, np.uint8),
            decision_id=np.array(episode.decision_id, np.int32), starts=starts,
            terminated=bool(episode.terminated[-1]) if terminated is None else terminated,
            final_known=final_observation_known(episode), chunks=chunks, noise_rows=np.zeros(0, np.int32),
            component=reward_component, alone=not task_reward,
            ends=ends,
        )  # fmt: skip
        self._ring.put(slot, conditioning, action, action_base=action_base, views=views, extra=extra, noise_rows=noise_rows)
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

    def _make_room(self, size: int) -> int:
        while not self._ring.fits(size):
            self.remove(self._ring.next_out())
            self.evicted_episodes += 1
        return self._ring.allocate(size)

    def remove(self, episode_id: str) -> None:
        """Drop one episode. Raises KeyError when it is not in the buffer."""
        self._ring.remove(episode_id)
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
        slot = self._ring.slots.get(event.episode_id)
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
        slot = self._ring.slots.get(episode_id)
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
        slot = self._ring.slots.get(episode_id)
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
        slot = self._ring.slots.get(episode_id)
        if slot is None:
            return False
        step = slot.length if step is None else int(step)
        if not 1 <= step <= slot.length:
            raise ValueError(f"episode {episode_id}: step={step}, accepted are 1 to {slot.length}")
        slot.success, slot.success_step, slot.terminates = success, step, terminates
        self._refresh(slot)
        return True

    def set_gamma(self, gamma: float) -> None:
        """Cut every window with another discount from now on. Raises ValueError for one outside (0, 1]."""
        self.window = replace(self.window, gamma=gamma)
        for slot in self._ring.slots.values():
            self._refresh(slot)

    def _refresh(self, slot: Slot) -> None:
        """Work out the windows of one episode again."""
        events = self._table.active(slot.episode_id)
        reward, length, terminated = rewards_in_force(slot, events, self.success_reward, self.failure_reward)
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
        self._ring.windows.set(slot.number, slot.base, slot.stratum, np.flatnonzero(table.valid))
        if self.lend_interventions and slot.stratum is not Stratum.INTERVENTION:
            lent = np.flatnonzero(table.valid & (slot.source[:length] == Source.HUMAN))
            self._ring.windows.set(slot.number, slot.base, Stratum.INTERVENTION, lent, lent=True)

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
        (number, base, step), codes = self._ring.windows.draw(batch_size, rng, ratios)
        return self._gatherer.windows(self.window.n, number, base, step, codes, rng)

    def sample_prefixes(
        self, batch_size: int, rng: np.random.Generator, ratios: Mapping[Stratum | str, float] | None = None
    ) -> tuple[WindowBatch, PrefixRows]:
        """Draw windows from every step, and what each of their beginnings is worth; a window that was cut short has weight 0."""
        (number, base, step), codes = self._ring.states.draw(batch_size, rng, ratios)
        return self._gatherer.prefixes(self.window.n, self.window.gamma, number, base, step, codes, rng)

    def sample_states(
        self, batch_size: int, rng: np.random.Generator, ratios: Mapping[Stratum | str, float] | None = None
    ) -> np.ndarray:
        """(B, C) conditioning at uniform steps, whether or not their rewards are known."""
        (_, base, step), _ = self._ring.states.draw(batch_size, rng, ratios)
        return self._gatherer.seen(base + step, rng)

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
        (_, base, step), _ = self._ring.chunks.draw(batch_size, rng, ratios)
        return self._gatherer.chunks(horizon, n_obs, base, step)


def _fit(value: np.ndarray, shape: tuple[int, ...], what: str, dtype: str = "float32") -> np.ndarray:
    """The array as ``dtype``. Raises ValueError when its shape differs or it is not finite."""
    array = np.asarray(value)
    if array.shape != shape:
        raise ValueError(f"{what} has shape {array.shape}, expected {shape}")
    array = array.astype(dtype, copy=False)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{what} is not finite at row {int(np.argwhere(~np.isfinite(array))[0][0])}")
    return array
