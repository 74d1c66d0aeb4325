"""Turns places drawn from a ring into batches: rows are gathered, padded past the end, and given the base's actions and noise."""

from __future__ import annotations

import numpy as np

from robot_rl.replay.batches import ChunkBatch, PrefixRows, WindowBatch
from robot_rl.replay.ring import Ring


class Gatherer:
    """Reads batches out of a ring; places are (number, first row, step) as :class:`~robot_rl.replay.sampling.StartGroup` draws them.

    Args:
        delta_mask: (A,) bool, action dimensions padded with zero; the others hold their last value.
    """

    def __init__(self, ring: Ring, delta_mask: np.ndarray) -> None:
        self._ring, self._delta_mask = ring, delta_mask

    def windows(
        self, n: int, number: np.ndarray, base: np.ndarray, step: np.ndarray, codes: np.ndarray | None, rng: np.random.Generator
    ) -> WindowBatch:
        """Windows of ``n`` rows; ``codes`` are the strata they were drawn for, ``None``: their episodes' own."""
        ring, batch_size = self._ring, len(step)
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
        has_base = bool(ring.has_base)
        return WindowBatch(
            conditioning=self.seen(at, rng),
            action=action,
            mask=mask,
            reward=ring["reward"][at],
            discount=ring["discount"][at],
            next_conditioning=self.seen(next_at, rng),
            weight=np.ones(batch_size, np.float32),
            noise=None if ring.noise is None else ring.noise.take(ring["noise_row"][at], axis=0),
            action_base=self._base_rows(n, at) if has_base else None,
            next_action_base=self._base_rows(n, next_at) if has_base else None,
            is_decision=is_decision,
            stratum=np.array(codes),
            episode_index=number,
            step=step,
            extra={name: ring[f"extra:{name}"].take(at, axis=0) for name in ring.extra},
        )

    def prefixes(
        self,
        n: int,
        gamma: float,
        number: np.ndarray,
        base: np.ndarray,
        step: np.ndarray,
        codes: np.ndarray | None,
        rng: np.random.Generator,
    ) -> tuple[WindowBatch, PrefixRows]:
        """Windows, and what each of their beginnings is worth; a window that was cut short has weight 0."""
        windows = self.windows(n, number, base, step, codes, rng)
        ring = self._ring
        at, offsets = base + step, np.arange(n)
        windows.weight = ring["valid"][at].astype(np.float32)
        inside = offsets < ring["left"][at][:, None]
        places = at[:, None] + np.minimum(offsets, ring["left"][at][:, None] - 1)
        reward = np.cumsum(np.where(inside, ring["step_reward"][places], np.nan) * gamma**offsets, axis=1)
        weight = np.isfinite(reward)
        discount = np.where(ring["ends"][places], 0.0, gamma ** (offsets + 1.0))
        rows = np.where(weight, reward, 0.0).astype(np.float32), np.where(weight, discount, 0.0).astype(np.float32)
        return windows, PrefixRows(*rows, self.seen(places + 1, rng), weight.astype(np.float32))

    def chunks(self, horizon: int, n_obs: int, base: np.ndarray, step: np.ndarray) -> tuple[ChunkBatch, dict[str, np.ndarray]]:
        """Sequences for behaviour cloning, and the extra arrays of their rows."""
        ring = self._ring
        back = np.maximum(step[:, None] - np.arange(n_obs - 1, -1, -1), 0)
        left = ring["left"][base + step]
        offsets = np.arange(horizon)
        inside = offsets < left[:, None]
        places = (base + step)[:, None] + np.minimum(offsets, left[:, None] - 1)
        action = ring["action"].take(places, axis=0)
        action *= inside[:, :, None] | ~self._delta_mask
        mask = inside & ring["imitated"].take(places)
        extra = {name: ring[f"extra:{name}"].take(places, axis=0) for name in ring.extra}
        return ChunkBatch(ring["conditioning"].take(base[:, None] + back, axis=0), action, mask), extra

    def seen(self, at: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(..., C) conditioning at ring rows ``at``; where observations have several encodings, one of them each."""
        found = self._ring["conditioning"].take(at, axis=0)
        if self._ring.views > 1:
            which = rng.integers(self._ring.views, size=at.shape)
            moved = which > 0
            found[moved] = self._ring["views"][at[moved], which[moved] - 1]
        return found

    def _pad(
        self, action: np.ndarray, mask: np.ndarray, cut: np.ndarray, number: np.ndarray, step: np.ndarray, starts: np.ndarray
    ) -> None:
        """Rows past the end (they hold the last action so far): zero in delta dimensions, or what was proposed."""
        if not len(cut):
            return
        action[cut] *= mask[cut][:, :, None] | ~self._delta_mask
        for i in cut[starts[cut]].tolist():
            slot = self._ring.by_number[int(number[i])]
            if slot.chunks is not None:
                proposed = slot.chunks[slot.decision_id[step[i]]]
                first, last = int(mask[i].sum()), min(action.shape[1], len(proposed))
                action[i, first:last] = proposed[first:last]

    def _base_rows(self, n: int, at: np.ndarray) -> np.ndarray:
        """(B, n, A) base actions from ring row ``at`` on, held (or zero) past the episode's last step."""
        offsets = np.arange(n)
        left = self._ring["left"][at][:, None]
        out = self._ring["action_base"].take(at[:, None] + np.minimum(offsets, left - 1), axis=0)
        out *= (offsets < left)[:, :, None] | ~self._delta_mask
        return out
