"""What a run takes from others: the head that acted at the end of a finished run, and references out of an episode store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from robot_rl.heads.base import Head
from robot_rl.heads.guidance_config import ReferenceConfig
from robot_rl.learners.config import DistillConfig
from robot_rl.policies.behaviour_cloning import ChunkDataset
from robot_rl.policies.compact import CompactPolicy
from robot_rl.replay.store import EpisodeStore
from robot_rl.runtime.weights import WeightChannel
from robot_rl.training.ingest import encode_episode

if TYPE_CHECKING:
    from robot_rl.training.config import PostTrainConfig


def acting_head(run: Path, base: CompactPolicy, key: str) -> tuple[Head | None, PostTrainConfig]:
    """The head that acted when ``run`` ended (None: its base did), on the same base policy, and the run's configuration.

    Raises:
        ValueError: no finished run, or one over another base; the message names ``key``.
    """
    from robot_rl.config import load
    from robot_rl.training.build import build_head
    from robot_rl.training.config import PostTrainConfig

    if not (run / "result.json").exists():
        raise ValueError(f"{key}={str(run)!r}: accepted is the folder of a finished run (result.json is missing)")
    result = json.loads((run / "result.json").read_text())
    if result["base_hash"] != base.spec.base_hash:
        raise ValueError(
            f"{key}={str(run)!r} was made over base {result['base_hash']}, this base is {base.spec.base_hash}; accepted are runs of it"
        )
    config = load(PostTrainConfig, run / "config.yaml")
    version = result["acting"]["version"]
    if version == 0:
        return None, config
    head = build_head(base, config.head, config.seed, config.learner)
    head.load_state_dict(WeightChannel(run / "weights").load(version))
    return head.requires_grad_(False), config


@torch.no_grad()
def read_references(base: CompactPolicy, config: ReferenceConfig) -> tuple[Tensor, Tensor]:
    """Recorded states (N, C) and the chunks that followed them (N, H, A), normalised.

    Past an episode's end absolute dimensions hold their last value and delta dimensions stand still.

    Raises:
        ValueError: ``references`` is no episode store, or holds nothing that may be followed.
    """
    where = f"head.reference.references={None if config.references is None else str(config.references)!r}"
    if config.references is None or not (config.references / "store.json").exists():
        raise ValueError(f"{where}: accepted is the folder of an episode store with what is to be followed")
    spec = base.spec
    with EpisodeStore.open(config.references, mode="r") as store:
        episodes = [store.read(i) for i in store.episode_ids()]
    episodes = [e for e in episodes if e.meta.success or not config.only_successful]
    if not episodes:
        raise ValueError(f"{where} with only_successful={config.only_successful}: no episode is left to follow")
    data = ChunkDataset(episodes, dict(spec.observation_features), spec.action, spec.horizon, spec.n_obs_steps)
    count = min(len(data), config.max_references)
    chosen = torch.from_numpy(np.linspace(0, len(data) - 1, count).round().astype(np.int64))
    conditioning, chunks = [], []
    for rows in chosen.split(512):
        observation, chunk = data.get(rows)
        conditioning.append(base.encode({n: v.to(base.normalizer.action_low.device) for n, v in observation.items()}).cpu())
        chunks.append(base.normalize_action(chunk.to(base.normalizer.action_low.device)).clamp(-1.0, 1.0).cpu())
    return torch.cat(conditioning), torch.cat(chunks)


def read_teacher(run: Path, base: CompactPolicy, config: DistillConfig, code: int) -> tuple[Head, int, Tensor]:
    """The acting head of a finished run, its code, and states (N, C) of the episodes that its heads played.

    Raises:
        ValueError: as :func:`acting_head`; or the run's base acted at its end, or its heads played nothing.
    """
    key = f"learner.teachers.{code}"
    head, _ = acting_head(run, base, key)
    if head is None:
        raise ValueError(
            f"{key}={str(run)!r}: its base acted at the end, so there is no specialist; accepted is a run with a promoted head"
        )
    with EpisodeStore.open(run / "store", mode="r") as store:
        played = [store.read(i) for i in store.episode_ids()]
    states = [encode_episode(base, e)[:-1] for e in played if e.meta.weights_version > 0]
    if not states:
        raise ValueError(f"{key}={str(run)!r}: its store holds no episode that a head played")
    rows = np.concatenate(states)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), config.max_states)).round().astype(np.int64)
    return head, code, torch.from_numpy(rows[chosen])
