"""The protocol of a reward source. Whoever implements it is hosted by ``reward_node``, in simulation and off-line alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from robot_rl.types import RewardKind

Coverage = Literal["every_step", "on_event", "episode"]


@dataclass(frozen=True)
class SourceInfo:
    """What a source says about itself; the model and prompt go into every event."""

    model_id: str
    prompt_hash: str = ""
    low: float = 0.0
    high: float = 1.0
    deterministic: bool = True


@dataclass(frozen=True)
class FrameBatch:
    """N observations: feature to (N, ...) rows, their control steps (N,) and stamps (N,) ns, and the instruction.

    ``episode_id`` may be empty; a source that remembers an episode then takes a step that does not rise for a new one.
    """

    observations: Mapping[str, np.ndarray]
    steps: np.ndarray
    stamps_ns: np.ndarray
    task: str = ""
    episode_id: str = ""


@dataclass(frozen=True)
class EpisodeTrace:
    """A whole episode of L steps: features to (L + 1, ...) rows and stamps (L + 1,) ns (0 where unknown)."""

    episode_id: str
    observations: Mapping[str, np.ndarray]
    stamps_ns: np.ndarray
    task: str = ""

    @property
    def length(self) -> int:
        return len(self.stamps_ns) - 1


@dataclass(frozen=True)
class ScoreBatch:
    """Answers about observations.

    Attributes:
        steps: (M,) control steps the answers are about.
        value: (M,) NaN exactly where ``valid`` is false.
        reason: of an invalid answer; empty for a valid one.
        success: verdict on the episode where the source can give one.
        success_step: the observation at which it was reached; -1 for the last.
        terminal: the episode should end now.
    """

    steps: np.ndarray
    value: np.ndarray
    valid: np.ndarray
    reason: tuple[str, ...] = ()
    success: bool | None = None
    success_step: int = -1
    terminal: bool = False

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.value) == len(self.valid):
            raise ValueError(
                f"{len(self.steps)} steps, {len(self.value)} values, {len(self.valid)} valid: accepted are equal counts"
            )
        if (np.isfinite(self.value) != np.asarray(self.valid, bool)).any():
            raise ValueError("a value is finite if and only if it is valid")

    @classmethod
    def none(cls) -> ScoreBatch:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool))

    @classmethod
    def failed(cls, steps: np.ndarray, reason: str) -> ScoreBatch:
        n = len(steps)
        return cls(steps, np.full(n, np.nan, np.float32), np.zeros(n, bool), (reason,) * n)


@runtime_checkable
class RewardSource(Protocol):
    """Scores frames, episodes, or both; a method that raises gives ``valid=false, reason=error`` and stops nothing.

    Attributes:
        name: unique in the session, ``[a-z0-9_.]{1,48}``.
        needs: observation features (and topics) it reads.
    """

    name: str
    kind: RewardKind
    coverage: Coverage
    needs: frozenset[str]

    def describe(self) -> SourceInfo: ...

    def score(self, batch: FrameBatch) -> ScoreBatch:
        """Causal: sees nothing later than each frame."""

    def score_episode(self, trace: EpisodeTrace) -> ScoreBatch: ...


@dataclass
class SourceCounts:
    """For diagnostics."""

    scored: int = 0
    invalid: dict[str, int] = field(default_factory=dict)
    dropped: int = 0

    @property
    def invalid_share(self) -> float:
        bad = sum(self.invalid.values())
        return bad / (self.scored + bad) if self.scored + bad else 0.0
