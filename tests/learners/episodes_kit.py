"""Recorded episodes, a buffer for them, and batches that hold rows to imitate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from recipe_kit import gen, random_batch
from spine_kit import ARM, STATE

from robot_rl.learners.cloning import CloneRows
from robot_rl.learners.row_class import FACTS
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.windows import WindowConfig
from robot_rl.types import Episode, EpisodeMeta, FeatureSpec, Source


def batch_with_clones(base, seed: int = 0):
    g, size = gen(seed + 100), 12
    kind = torch.get_default_dtype()
    rows = CloneRows(
        torch.randn(size, base.spec.conditioning_dim, generator=g),
        torch.rand(size, base.spec.horizon, base.spec.action.dim, generator=g) * 2 - 1,
        (torch.rand(size, base.spec.horizon, generator=g) > 0.3).to(kind),
    )
    return replace(random_batch(base, size, seed), clone=rows)


def recorded(
    name: str, length: int, seed: int, *, terminated: bool, success: bool | None = None, source: Source | None = None
) -> Episode:
    rng = np.random.default_rng(seed)
    arrays = {"reward": rng.normal(size=length).astype(np.float32), "terminated": np.zeros(length, bool)}
    arrays["terminated"][-1] = terminated
    arrays["truncated"] = np.zeros(length, bool)
    arrays["truncated"][-1] = not terminated
    if source is not None:
        arrays["source"] = np.full(length, int(source), np.uint8)
    low, high = np.array(ARM.low), np.array(ARM.high)
    action = (low + rng.uniform(size=(length, 3)) * (high - low)).astype(np.float32)
    meta = EpisodeMeta(name, success=success)
    return Episode.from_arrays(meta, {STATE: rng.normal(size=(length + 1, 4)).astype(np.float32)}, action, **arrays)


def buffer_for(base, n_step: int = 1, extra: bool = False) -> ReplayBuffer:
    spec = base.spec
    columns = {"episode_return": FeatureSpec(()), "return_known": FeatureSpec(())} | (FACTS if extra else {})
    return ReplayBuffer(
        500, conditioning_dim=spec.conditioning_dim, action_dim=spec.action.dim,
        window=WindowConfig(spec.n_action_steps * n_step, 0.9), delta_mask=spec.action.delta_mask, extra=columns,
    )  # fmt: skip
