"""What a person marked in recorded episodes: which frames show success, which do not (the classifier's recording workflow, 2.3).

Every frame that was shown is a negative unless it was flagged while it was on the screen; what was never shown says nothing. A file
of JSON lines, one a look at an episode; where somebody looked twice, the later look counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from robot_rl.rewards.lines import read_lines
from robot_rl.types import OBSERVATION_STATE, Episode

if TYPE_CHECKING:  # it imports torch, which the page's server does without
    from robot_rl.rewards.classifier_model import LabelledFrames

ENOUGH = 200
"""Positive frames from which a small head on a frozen encoder learns."""
NEGATIVES = 2.0
"""Negatives a positive, at least."""


@dataclass(frozen=True)
class Look:
    """One look at an episode.

    Attributes:
        first, last: the frames that were shown, both included.
        success: (first, last) of the stretches that were flagged.
        mode: how this attempt failed, in the person's words; empty where it did not, or nobody said.
    """

    episode: str
    first: int
    last: int
    success: tuple[tuple[int, int], ...] = ()
    mode: str = ""
    operator: str = "operator"
    stamp_ns: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "success", tuple((int(a), int(b)) for a, b in self.success))
        if not 0 <= self.first <= self.last:
            raise ValueError(f"look at {self.episode!r}: frames {self.first} to {self.last}, accepted is 0 <= first <= last")
        for a, b in self.success:
            if not self.first <= a <= b <= self.last:
                raise ValueError(
                    f"look at {self.episode!r}: flagged {a} to {b}, accepted lies within the frames shown, {self.first} to {self.last}"
                )

    def flags(self) -> np.ndarray:
        """(last - first + 1,) whether each frame that was shown was flagged."""
        out = np.zeros(self.last - self.first + 1, bool)
        for a, b in self.success:
            out[a - self.first : b - self.first + 1] = True
        return out


def append_look(path: str | os.PathLike[str], look: Look) -> None:
    """Add a look to the file, on disk when this returns."""
    with open(path, "ab") as file:
        file.write(json.dumps(dataclasses.asdict(look)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_looks(path: str | os.PathLike[str]) -> list[Look]:
    """A file's looks, oldest first; a last line that a crash cut is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is none of ours.
    """
    return read_lines(path, lambda d: Look(**d), "look at an episode")


def marked(looks: Sequence[Look]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Episode to (K,) frames that were shown and (K,) whether each shows success."""
    known: dict[str, dict[int, bool]] = {}
    for look in looks:
        frames = range(look.first, look.last + 1)
        known.setdefault(look.episode, {}).update(zip(frames, look.flags().tolist(), strict=True))
    return {
        episode: (np.array(sorted(said), np.int64), np.array([said[k] for k in sorted(said)]))
        for episode, said in known.items()
    }


@dataclass(frozen=True)
class Tally:
    """How much was marked, and what training still lacks."""

    positives: int
    negatives: int
    episodes: int
    modes: Mapping[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def tally(looks: Sequence[Look], enough: int = ENOUGH, modes: Sequence[str] = ()) -> Tally:
    """Count what was marked.

    Args:
        enough: positive frames that are wanted.
        modes: ways of failing that must each have been seen.
    """
    frames = marked(looks)
    positives = int(sum(yes.sum() for _, yes in frames.values()))
    negatives = int(sum((~yes).sum() for _, yes in frames.values()))
    failed = {look.episode: look.mode for look in looks}  # the latest word on an episode
    seen = {mode: sum(m == mode for m in failed.values()) for mode in sorted({*modes, *failed.values()} - {""})}
    missing = []
    if positives < enough:
        missing.append(f"{enough - positives} more frames of success")
    if negatives < NEGATIVES * max(positives, enough):
        missing.append(f"{int(NEGATIVES * max(positives, enough)) - negatives} more frames without")
    missing += [f"an attempt that fails by: {mode}" for mode in modes if not seen.get(mode)]
    if sum(bool(yes.any()) for _, yes in frames.values()) < 2:
        missing.append("success in at least two episodes (one is held out)")
    return Tally(positives, negatives, len(frames), seen, tuple(missing))


def marked_frames(looks: Sequence[Look], episodes: Sequence[Episode], cameras: Sequence[str], state: int = 0) -> LabelledFrames:
    """The marked frames of these episodes, for :func:`~robot_rl.rewards.classifier_model.fit_classifier`.

    Args:
        state: how many numbers of ``observation.state`` go with each frame; 0 for none.

    Raises:
        ValueError: no look is about any of the episodes, or one flags frames that an episode does not have.
    """
    from robot_rl.rewards.classifier_model import LabelledFrames

    frames = marked(looks)
    images: dict[str, list[np.ndarray]] = {c: [] for c in cameras}
    positive, number, states = [], [], []
    for k, episode in enumerate(episodes):
        at, yes = frames.get(episode.meta.episode_id, (np.zeros(0, np.int64), np.zeros(0, bool)))
        if not len(at):
            continue
        if at[-1] > len(episode):
            raise ValueError(
                f"marks name frame {at[-1]} of episode {episode.meta.episode_id}: accepted are 0 to {len(episode)}; are they of another store?"
            )
        for camera in cameras:
            images[camera].append(np.asarray(episode.observations[camera])[at])
        if state:
            states.append(np.asarray(episode.observations[OBSERVATION_STATE])[at, :state])
        positive.append(yes)
        number.append(np.full(len(at), k))
    if not positive:
        raise ValueError(f"{len(looks)} looks, none at the {len(episodes)} episodes that are read")
    return LabelledFrames(
        {c: np.concatenate(v) for c, v in images.items()}, np.concatenate(positive), np.concatenate(number),
        np.concatenate(states) if states else None,
    )  # fmt: skip
