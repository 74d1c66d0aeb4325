"""What a learner trains on: one batch of windows as tensors, normalised."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robot_rl.replay.batches import WindowBatch

if TYPE_CHECKING:
    from robot_rl.learners.cloning import CloneRows
    from robot_rl.learners.prefix_critic import Prefixes

EPISODE_RETURN = "episode_return"
RETURN_KNOWN = "return_known"
OPTIONAL = ("gripper_choice", "gripper_steady", "gripper_change", "unlabelled")
"""Columns of the buffer that only some learners ask for."""


@dataclass(frozen=True)
class Batch:
    """A batch of B windows of n action rows; see :func:`robot_rl.replay.windows.window` for what each means.

    Attributes:
        conditioning, next_conditioning: (B, C) what the base's encoder makes of the observations at both ends.
        action: (B, n, A) executed rows, normalised, padded where the episode ended early.
        reward: (B,) sum of gamma^i r; ``discount``: (B,) gamma^m, zero where the window reached a terminal state.
        weight: (B,) 0 for windows that must not be trained on.
        noise: (B, H_w, A_w) what entered the sampler at a decision start, or None.
        action_base: (B, n, A) the base's rows at a decision start, or None.
        episode_return: (B,) discounted return from the window's start to the end of its episode, or None.
        return_known: (B,) 1 where every reward of that return is known, else 0; None: all are.
        prefixes: what every beginning of the windows is worth learning from, with a critic that values those.
        clone: rows to imitate, where a copy of the base is trained on.
        gripper_choice, gripper_steady, gripper_change: (B,) of the gripper inside the window, see ``learners/facts.py``, or None.
        stratum: (B,) position in ``list(Stratum)``, or None.
        unlabelled: (B,) 1 where the reward is not to be read but guessed, or None.
        base_rows, next_base_rows: (B, M, n, A) chunks of the frozen base at both ends, drawn once per observation, or None.
        base_noise: (B, M, H_w, A_w) the noise that ``base_rows`` were made of, or None.
    """

    conditioning: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_conditioning: Tensor
    weight: Tensor
    noise: Tensor | None = None
    action_base: Tensor | None = None
    episode_return: Tensor | None = None
    return_known: Tensor | None = None
    base_rows: Tensor | None = None
    next_base_rows: Tensor | None = None
    base_noise: Tensor | None = None
    clone: CloneRows | None = None
    gripper_choice: Tensor | None = None
    gripper_steady: Tensor | None = None
    gripper_change: Tensor | None = None
    unlabelled: Tensor | None = None
    stratum: Tensor | None = None
    prefixes: Prefixes | None = None

    @classmethod
    def from_windows(cls, windows: WindowBatch, device: torch.device | str = "cpu") -> Batch:
        """From what :meth:`ReplayBuffer.sample` draws; returns and base rows are extras of that name."""
        extras = (EPISODE_RETURN, RETURN_KNOWN, "base_rows", "next_base_rows", "base_noise", *OPTIONAL)
        names = [f.name for f in fields(cls) if f.name not in ("clone", "prefixes")]
        arrays = {name: windows.extra.get(name) if name in extras else getattr(windows, name) for name in names}
        return cls(**{k: None if v is None else torch.from_numpy(v).to(device, non_blocking=True) for k, v in arrays.items()})
