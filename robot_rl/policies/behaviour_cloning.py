"""Behaviour cloning of a compact policy from recorded episodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robot_rl.policies.checkpoint import build_policy
from robot_rl.policies.cloning_checkpoint import CloningCheckpoint
from robot_rl.policies.compact import CompactPolicy
from robot_rl.policies.config import BCConfig
from robot_rl.policies.normalizer import Normalizer
from robot_rl.policies.pictures import random_shift
from robot_rl.types import ActionSpec, Episode, FeatureSpec


class ChunkDataset:
    """All (observation stack, action chunk) pairs of some episodes as tensors in RAM.

    The first observation fills the stack before an episode's start. After its end absolute dimensions repeat the last
    action and delta dimensions are zero: the robot stands still.
    """

    def __init__(
        self, episodes: Sequence[Episode], features: dict[str, FeatureSpec], action: ActionSpec, horizon: int, n_obs: int
    ) -> None:
        first_observation, first_action = 0, 0
        stacks, chunks, actions = [], [], []
        for episode in episodes:
            t = np.arange(len(episode))[:, None]
            stacks.append(first_observation + np.maximum(t + np.arange(1 - n_obs, 1), 0))
            chunks.append(first_action + t + np.arange(horizon))
            executed = np.clip(episode.action, action.low, action.high).astype(np.float32)
            tail = np.where(action.delta_mask, 0.0, executed[-1]).astype(np.float32)
            actions.append(np.concatenate([executed, np.repeat(tail[None], horizon, 0)]))
            first_observation += len(episode) + 1
            first_action += len(actions[-1])
        self.observations = {n: torch.from_numpy(np.concatenate([e.observations[n] for e in episodes])) for n in features}
        self.actions = torch.from_numpy(np.concatenate(actions))
        self.stack = torch.from_numpy(np.concatenate(stacks))
        self.chunk = torch.from_numpy(np.concatenate(chunks))

    def __len__(self) -> int:
        return len(self.stack)

    def get(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Observations (B, n_obs, ...) and physical action chunks (B, H, A)."""
        rows = self.stack[index]
        return {n: v[rows] for n, v in self.observations.items()}, self.actions[self.chunk[index]]


def clone(
    episodes: Sequence[Episode],
    features: dict[str, FeatureSpec],
    action: ActionSpec,
    config: BCConfig,
    *,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
    unfinished: Path | None = None,
) -> CompactPolicy:
    """Train a compact policy on ``episodes`` and return its frozen EMA copy.

    Deterministic in ``config.seed`` on one device and thread count, interrupted or not. ``progress(step, loss)`` is called now and
    then. ``unfinished``: file in which a cloning that is interrupted is kept, and from which the same call goes on.

    Raises:
        ValueError: no episodes, or a loss that is not finite (the message names the step).
    """
    if not episodes:
        raise ValueError("clone: no episodes given; behaviour cloning needs at least one")
    torch.manual_seed(config.seed)  # parameter initialisation draws from the global generator
    generator = torch.Generator(device).manual_seed(config.seed)
    normalizer = Normalizer.fit(
        episodes, features, action, action_quantile=config.action_quantile, rotations=config.policy.rotations
    )
    policy = build_policy(config.policy, features, action, normalizer).to(device)
    average = deepcopy(policy)
    data = ChunkDataset(episodes, features, action, config.policy.horizon, config.policy.n_obs_steps)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    policy.train()
    kept = None if unfinished is None else CloningCheckpoint(unfinished, config, {"actions": data.actions, **data.observations})
    done = 0 if kept is None else kept.restore(policy, average, optimizer, generator, device)
    for step in range(done, config.steps):
        if kept is not None and step > done and kept.due():
            kept.save(step, policy, average, optimizer, generator)
        scale = min(1.0, (step + 1) / max(config.warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * scale
        index = torch.randint(0, len(data), (config.batch_size,), generator=generator, device=device)
        observation, chunk = data.get(index.cpu())
        observation = {n: v.to(device) for n, v in observation.items()}
        if config.random_shift:
            for name in normalizer.image_features:
                observation[name] = random_shift(observation[name], config.random_shift, generator)
        conditioning = policy.encode(observation)
        if config.observation_noise > 0:
            conditioning = conditioning + config.observation_noise * torch.randn(
                conditioning.shape, generator=generator, device=device
            )
        loss = policy.denoising_loss(conditioning, policy.normalize_action(chunk.to(device)).clamp(-1, 1), generator).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(policy.parameters()), 1 - decay)
        if step % 100 == 0 or step + 1 == config.steps:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(
                    f"behaviour cloning diverged: loss {value} at step {step}; lower learning_rate ({config.learning_rate})"
                )
            if progress is not None:
                progress(step + 1, value)
    if kept is not None:
        kept.remove()
    return average.freeze()
