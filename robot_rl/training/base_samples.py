"""Chunks of the frozen base at every recorded observation, drawn once: what does not depend on the head need not be redone."""

from __future__ import annotations

import numpy as np
import torch

from robot_rl import seeding
from robot_rl.policies.base import BasePolicy

ROWS_AT_ONCE = 2048


class BaseSamples:
    """M chunks (n, A) for each of the L + 1 observations of the episodes in a replay buffer.

    What is drawn for an episode depends on the run's seed and the episode's id alone, so a buffer that is filled again after a
    restart holds the same. Memory: M * n * A * 4 bytes an observation; with ``keeps_noise`` also M * H_w * A_w * 4.
    """

    def __init__(
        self, base: BasePolicy, count: int, seed: int, device: torch.device | str = "cpu", *, keeps_noise: bool = False
    ) -> None:
        spec = base.spec
        if spec.noise_shape is None:
            raise ValueError(
                f"base_samples={count}: this base ({spec.sampler}) takes no noise and has one chunk; accepted is 0"
            )
        self.base, self.count, self.seed, self.device = base, count, seed, torch.device(device)
        self.shape = (count, spec.n_action_steps, spec.action.dim)
        self.keeps_noise, self.noise_shape = keeps_noise, (count, *spec.noise_shape)
        self._rows = np.zeros((0, *self.shape), np.float32)
        self._noise = np.zeros((0, *self.noise_shape), np.float32)
        self._used = 0
        self._first: dict[int, tuple[int, int]] = {}  # episode number to first row and rows

    def __len__(self) -> int:
        """Observations held."""
        return sum(rows for _, rows in self._first.values())

    @torch.no_grad()
    def add(self, number: int, episode_id: str, conditioning: np.ndarray) -> None:
        """Draw for an episode with conditioning (L + 1, C)."""
        assert self.base.spec.noise_shape is not None
        generator = torch.Generator().manual_seed(seeding.key("base samples", self.seed, episode_id))
        noise = torch.randn(len(conditioning) * self.count, *self.base.spec.noise_shape, generator=generator)
        repeated = torch.from_numpy(conditioning).repeat_interleave(self.count, dim=0)
        n = self.shape[1]
        pieces = [
            self.base.sample(c.to(self.device), w.to(self.device))[:, :n].cpu()
            for c, w in zip(repeated.split(ROWS_AT_ONCE), noise.split(ROWS_AT_ONCE), strict=True)
        ]
        drawn = torch.cat(pieces).numpy().reshape(-1, *self.shape)
        if self._used + len(drawn) > len(self._rows):
            grown = np.zeros((max(2 * len(self._rows), self._used + len(drawn), 1024), *self.shape), np.float32)
            grown[: self._used] = self._rows[: self._used]
            self._rows = grown
            if self.keeps_noise:
                self._noise = np.concatenate([
                    self._noise[: self._used], np.zeros((len(grown) - self._used, *self.noise_shape), np.float32)
                ])  # fmt: skip
        if self.keeps_noise:
            self._noise[self._used : self._used + len(drawn)] = noise.numpy().reshape(-1, *self.noise_shape)
        self._rows[self._used : self._used + len(drawn)] = drawn
        self._first[number] = self._used, len(drawn)
        self._used += len(drawn)

    def forget(self, numbers: set[int]) -> None:
        """Drop episodes; the room is reclaimed once half of it is unused."""
        for number in numbers & self._first.keys():
            del self._first[number]
        if len(self) * 2 < self._used:
            kept, at = np.zeros((max(len(self), 1024), *self.shape), np.float32), 0
            noise = np.zeros((len(kept), *self.noise_shape), np.float32) if self.keeps_noise else self._noise
            for number, (first, rows) in self._first.items():
                kept[at : at + rows] = self._rows[first : first + rows]
                if self.keeps_noise:
                    noise[at : at + rows] = self._noise[first : first + rows]
                self._first[number] = at, rows
                at += rows
            self._rows, self._noise, self._used = kept, noise, at

    def numbers(self) -> set[int]:
        return set(self._first)

    def take(self, number: np.ndarray, step: np.ndarray) -> np.ndarray:
        """(B, M, n, A) at observation ``step`` (B,) of the episodes ``number`` (B,)."""
        first = np.array([self._first[int(i)][0] for i in number])
        return self._rows[first + step]

    def take_noise(self, number: np.ndarray, step: np.ndarray) -> np.ndarray:
        """(B, M, H_w, A_w) what :meth:`take` was drawn from. Raises ValueError when it was not kept."""
        if not self.keeps_noise:
            raise ValueError("these base samples were drawn without keeping their noise")
        first = np.array([self._first[int(i)][0] for i in number])
        return self._noise[first + step]
