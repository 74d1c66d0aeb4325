"""From a recorded episode to what the replay buffer holds: conditioning of the frozen base, normalised actions and chunks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from robot_rl import seeding
from robot_rl.learners.batch import EPISODE_RETURN, RETURN_KNOWN
from robot_rl.learners.config import LearnerConfig
from robot_rl.learners.facts import learner_facts, own_reward
from robot_rl.learners.row_class import step_facts
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.pictures import random_shift
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.types import Episode, Stratum

ENCODE_ROWS = 512  # images are encoded in pieces of this many frames


class Ingested(NamedTuple):
    """What came of an episode: its number in the buffer, and (L + 1, C) conditioning."""

    number: int
    conditioning: np.ndarray


def stack_frames(rows: np.ndarray, n_obs: int) -> np.ndarray:
    """(T, ...) to (T, n_obs, ...), oldest first; the first frame fills the stack before the start."""
    index = np.maximum(np.arange(len(rows))[:, None] + np.arange(1 - n_obs, 1), 0)
    return rows[index]


@torch.no_grad()
def encode_episode(
    base: BasePolicy, episode: Episode, device: torch.device | str = "cpu", shift: int = 0, view: int = 0
) -> np.ndarray:
    """(L + 1, C) conditioning of every observation.

    ``shift``: pictures are moved by up to so many pixels first, in a way that the episode and ``view`` alone decide.
    """
    n_obs = base.spec.n_obs_steps
    generator = torch.Generator().manual_seed(seeding.key("random shift", episode.meta.episode_id, view))
    pieces = []
    for first in range(0, len(episode) + 1, ENCODE_ROWS):
        observation = {
            name: torch.from_numpy(stack_frames(episode.observations[name], n_obs)[first : first + ENCODE_ROWS]).to(device)
            for name in base.spec.observation_features
        }
        if shift:
            observation = {
                n: random_shift(v, shift, generator) if v.dtype == torch.uint8 else v for n, v in observation.items()
            }
        pieces.append(base.encode(observation).cpu().numpy())
    return np.concatenate(pieces)


@torch.no_grad()
def ingest(
    buffer: ReplayBuffer,
    episode: Episode,
    base: BasePolicy,
    *,
    stratum: Stratum | None = None,
    device: torch.device | str = "cpu",
    failure_reward: float = 0.0,
    shift: int = 0,
    learner: LearnerConfig | None = None,
) -> Ingested:
    """Add an episode to the buffer. The critic learns from what was executed, as the policy would have normalised it.

    ``failure_reward``: see :func:`discounted_returns`. ``shift``: pixels by which the pictures of a buffer's further views are moved.
    ``learner``: whose facts about steps and whose own rewards the buffer is to hold (``takeover_reward``, ``gripper``, ...); None: none.

    Raises:
        ValueError: the episode was recorded with other normalisation statistics than the base's.
    """
    meta = episode.meta
    if meta.stats_hash and meta.stats_hash != base.spec.stats_hash:
        raise ValueError(
            f"episode {meta.episode_id}: stats_hash={meta.stats_hash!r}, but the base policy normalises with "
            f"{base.spec.stats_hash!r}; accepted are episodes of this base, or recordings without a hash"
        )

    def normalized(values: np.ndarray) -> np.ndarray:
        return base.normalize_action(torch.from_numpy(values).to(device)).clamp(-1.0, 1.0).cpu().numpy()

    chunks = normalized(np.stack([d.chunk for d in episode.decisions])) if episode.decisions else None
    tail = 0.0 if episode.terminated[-1] or not failure_reward else failure_reward / (1.0 - buffer.window.gamma)
    own = own_reward(episode, learner, stratum)
    returns, known = discounted_returns(own.composed(episode.reward), buffer.window.gamma, tail, own.ends)
    if own.unlabelled:
        known[:] = 0.0
    action = normalized(episode.action)
    extra = {EPISODE_RETURN: returns, RETURN_KNOWN: known}
    facts = step_facts(episode, stratum) | learner_facts(
        episode, action, learner, buffer.window, base.spec.action, own, stratum
    )
    extra |= {name: rows for name, rows in facts.items() if name in buffer.extra_names}
    conditioning = encode_episode(base, episode, device)
    further = [encode_episode(base, episode, device, shift, view) for view in range(1, buffer.views)]
    number = buffer.add(
        episode, conditioning, action, chunks=chunks, stratum=stratum, extra=extra,
        views=np.stack(further, axis=1) if further else None,
        reward_component=own.component, task_reward=own.task, terminated=False if own.unlabelled else None,
        ends=own.ends,
    )  # fmt: skip
    return Ingested(number, conditioning)


def discounted_returns(
    reward: np.ndarray, gamma: float, tail: float = 0.0, ends: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(L,) return from every step to the episode's end, and (L,) 1 where no reward of it is unknown (NaN), else 0.

    ``tail`` is what would have come after the last step: an episode that was cut off while it earned r a step is worth
    r / (1 - gamma) from there on, not nothing. ``ends`` (L,): steps that nothing after them counts for.
    """
    returns, known = np.zeros(len(reward), np.float32), np.ones(len(reward), np.float32)
    total, complete = tail, 1.0
    for t in range(len(reward) - 1, -1, -1):
        if ends is not None and ends[t]:
            total, complete = 0.0, 1.0
        if np.isnan(reward[t]):
            complete = 0.0
        else:
            total = float(reward[t]) + gamma * total
        returns[t], known[t] = total, complete
    return returns, known
