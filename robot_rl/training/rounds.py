"""From an episode that was just played to what an on-policy learner reads: its decisions, with the draws they were made of."""

from __future__ import annotations

import numpy as np
import torch

from robot_rl.learners.on_policy import OnPolicyLearner, RoundEpisode
from robot_rl.policies.base import BasePolicy
from robot_rl.replay.windows import decision_starts
from robot_rl.runtime.acting import drawn
from robot_rl.training.ingest import encode_episode
from robot_rl.types import Episode, Source


def round_data(
    episode: Episode, base: BasePolicy, learner: OnPolicyLearner, device: torch.device | str = "cpu"
) -> RoundEpisode:
    """Decisions of an episode with rewards, discounts and random draws.

    The draws are not stored: they belong to (key, index) alone and are made again; the stored noise shows whether they are the
    same.

    Raises:
        ValueError: an episode of somebody else: no key, other noise, decisions of the base, steps the policy did not execute.
    """
    meta, gamma = episode.meta, learner.config.gamma
    who = f"episode {meta.episode_id}"
    key = meta.extra.get("key")
    if not key or not episode.decisions:
        raise ValueError(f"{who}: on-policy learning needs episodes of this run; this one names no key or holds no decisions")
    if (episode.source != Source.POLICY).any() or any(d.explored for d in episode.decisions):
        raise ValueError(f"{who}: somebody else than the learning policy acted in it, so it is not on-policy")
    starts = np.flatnonzero(decision_starts(episode))
    ends = np.append(starts[1:], len(episode))
    width = learner.head.exploration_dim
    noises, explorations = [], []
    for i in episode.decision_id[starts]:
        noise, _, exploration = drawn(base, width, tuple(key), int(i))
        stored = episode.decisions[i].noise
        if exploration is None or (noise is None and learner.head.KIND != "token"):
            raise ValueError(
                f"{who}: on-policy learning needs a base that takes noise, or writes words, and a head that explores"
            )
        if learner.head.KIND == "chain" and (noise is None or stored is None or not np.array_equal(noise, stored)):
            raise ValueError(f"{who}: decision {i} was made of other noise than its key {key} draws")
        noises.append(np.zeros(0, np.float32) if noise is None else noise)
        explorations.append(exploration)
    reward = np.array(
        [sum(gamma**j * float(r) for j, r in enumerate(episode.reward[a:b])) for a, b in zip(starts, ends, strict=True)]
    )
    if not np.isfinite(reward).all():
        raise ValueError(f"{who}: rewards are missing; on-policy learning cannot wait for late ones")
    steps = ends - starts
    discount = np.power(gamma, steps)
    if episode.terminated[-1]:
        discount[-1] = 0.0
    conditioning = torch.from_numpy(encode_episode(base, episode, device)).to(device)
    send = lambda x: torch.as_tensor(np.asarray(x, np.float32), device=device)  # noqa: E731
    return RoundEpisode(
        conditioning=conditioning[starts], next_conditioning=conditioning[ends], noise=send(np.stack(noises)),
        exploration=send(np.stack(explorations)), reward=send(reward), steps=torch.from_numpy(steps).to(device),
        discount=send(discount), success=float(meta.success is True),
        group=int(meta.extra.get("group", -1 if meta.seed is None else meta.seed)),
    )  # fmt: skip
