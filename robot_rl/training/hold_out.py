"""Is the critic fit to be climbed? Its ranking of held-out episodes against what they returned (PORL's start)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from robot_rl import seeding
from robot_rl.learners.off_policy import OffPolicyLearner
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.types import Episode

EVERY = 5
"""One in so many warm-up episodes is held out."""
WINDOWS = 1024


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank; NaN where one side is constant."""

    def ranks(x: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    ra, rb = ranks(a), ranks(b)
    if np.ptp(ra) == 0 or np.ptp(rb) == 0:
        return float("nan")
    return float(np.corrcoef(ra, rb)[0, 1])


class HoldOut:
    """Warm-up episodes that the critic is tested on instead of trained on; they join the others when the warm-up is over.

    Attributes:
        episodes: held out, oldest first.
    """

    def __init__(self, buffer: Callable[[], ReplayBuffer]) -> None:
        self._make = buffer
        self.episodes: list[Episode] = []

    def takes(self, episode: Episode) -> bool:
        """Keep the episode if it is one to be held out, which its id alone decides; gives whether it is."""
        if seeding.key("held out", episode.meta.episode_id) % EVERY:
            return False
        self.episodes.append(episode)
        return True

    def correlation(self, learner: OffPolicyLearner, ingest: Callable[[ReplayBuffer, Episode], object]) -> float:
        """Spearman of mean critic value and return over windows of the held-out episodes; NaN where they cannot tell."""
        buffer = self._make()
        for episode in self.episodes:
            ingest(buffer, episode)
        if not buffer.total_starts:
            return float("nan")
        batch = learner.batch(buffer.sample(WINDOWS, np.random.default_rng(0)))
        assert batch.episode_return is not None
        assert batch.return_known is not None
        known = batch.return_known.cpu().numpy() > 0
        value, returned = learner.value(batch).cpu().numpy(), batch.episode_return.cpu().numpy()
        return spearman(value[known], returned[known]) if known.any() else float("nan")
