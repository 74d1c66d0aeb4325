"""``robot-rl bc``: clone a base policy from recorded episodes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from robot_rl.paths import find_recording
from robot_rl.policies.behaviour_cloning import clone
from robot_rl.policies.checkpoint import save_policy
from robot_rl.progress import Progress, Silent
from robot_rl.replay.importers import open_dataset
from robot_rl.replay.store import EpisodeStore
from robot_rl.training.build import pick_device
from robot_rl.training.config import BCRunConfig
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.run_folder import UNFINISHED
from robot_rl.types import Episode


def run(config: BCRunConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Train and save the policy; returns what was trained on and where it went.

    Raises:
        FileNotFoundError, ValueError: no such data, or no episode in it that may be used.
    """
    progress = progress or Silent()
    device = pick_device(config.device)
    if (config.data / "store.json").exists():
        with EpisodeStore.open(config.data, mode="r") as store:
            features, action = dict(store.observation_features), store.action
            episodes = [store.read(i) for i in store.episode_ids()]
    else:
        importer = open_dataset(find_recording(config.data), config.format, **config.options)
        source = importer.describe()
        features, action = dict(source.observation_features), source.action
        episodes = list(importer.episodes())
    kept = [e for e in episodes if not (config.only_successful and e.meta.success is False)]
    if not kept:
        raise ValueError(
            f"data={str(config.data)!r}: {len(episodes)} episodes, none left with only_successful={config.only_successful}"
        )
    progress.start("behaviour cloning", config.bc.steps)
    done, last = 0, float("nan")
    with InterruptFlag() as flag:

        def report(step: int, loss: float) -> None:
            nonlocal done, last
            flag.raise_if_set()
            progress.advance(step - done)
            progress.status(loss=loss)
            done, last = step, loss

        unfinished = config.out / UNFINISHED
        policy = clone(kept, features, action, config.bc, device=device, progress=report, unfinished=unfinished)
    save_policy(policy.cpu(), config.out, extra={"episodes": len(kept), "task": _task(kept)})
    return {
        "policy": str(config.out), "episodes": len(kept), "steps": sum(map(len, kept)), "loss": last,
        "base_hash": policy.spec.base_hash, "config": asdict(config.bc),
    }  # fmt: skip


def _task(episodes: list[Episode]) -> str:
    return next((e.meta.env_id for e in episodes if e.meta.env_id), "")
