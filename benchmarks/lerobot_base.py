"""A LeRobot DiffusionPolicy of mixed quality, made with LeRobot's own training code, to be post-trained by path.

Scripted demonstrations of a shipped task become a LeRobot v3 dataset; ``lerobot-train`` trains on it in a process of its own and saves
with ``save_pretrained``; the checkpoint is then loaded by path here and, with the same noise, compared to LeRobot's ``select_action``
(bitwise) before it plays evaluation starts. Prints one JSON object. Takes hours on two cores, a quarter of an hour on a GPU:

    python benchmarks/lerobot_base.py --out runs/lerobot_lift --device cuda
    robot-rl train --config configs/lerobot_lift.yaml                    # latent noise
    robot-rl train --config configs/lerobot_lift_residual.yaml           # residual

A second call with the same folder goes on where the first one stopped (demonstrations, dataset, training, measuring).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robot_rl import seeding
from robot_rl.policies.lerobot.loading import load_lerobot
from robot_rl.policies.lerobot.options import OPTIONS_FILE
from robot_rl.replay import EpisodeStore, exporters
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.sim.collect import CollectConfig, collect
from robot_rl.sim.env import make_env
from robot_rl.sim.rollout import Rollout
from robot_rl.sim.vector import make_vector
from robot_rl.training.measuring import measure, success_interval
from robot_rl.types import OBSERVATION_ENVIRONMENT_STATE, OBSERVATION_STATE, Episode, FeatureSpec

ROBOT_COLUMNS = {"tabletop/Lift": 10}
"""What of ``observation.state`` is the robot; the rest is the scene, which LeRobot keeps in ``observation.environment_state``."""


def split(episode: Episode, columns: int) -> Episode:
    state = episode.observations.pop(OBSERVATION_STATE)
    episode.observations |= {
        OBSERVATION_STATE: np.ascontiguousarray(state[:, :columns]),
        OBSERVATION_ENVIRONMENT_STATE: np.ascontiguousarray(state[:, columns:]),
    }
    return episode


def make_dataset(given: argparse.Namespace, columns: int) -> Path:
    demos, dataset = given.out / "demos", given.out / "dataset"
    if dataset.exists():
        return dataset
    shutil.rmtree(demos, ignore_errors=True)
    env = make_env(given.task)
    spec = env.spec
    env.close()
    with EpisodeStore.create(demos, observation_features=spec.observation_features, action=spec.action, sync=False) as store:
        config = CollectConfig(given.task, given.episodes, tuple(given.skill), given.noise, given.seed, workers=given.workers)
        collect(config, store)
    names = spec.observation_features[OBSERVATION_STATE].names
    features = {
        OBSERVATION_STATE: FeatureSpec((columns,), names=names[:columns]),
        OBSERVATION_ENVIRONMENT_STATE: FeatureSpec((len(names) - columns,), names=names[columns:]),
    }
    with EpisodeStore.open(demos, mode="r") as store:
        episodes = (split(store.read(i), columns) for i in store.episode_ids())
        exporters.export(
            episodes,
            dataset,
            "lerobot_v3",
            observation_features=features,
            action=spec.action,
            proposals=False,
            provenance=False,
        )
    return dataset


def train(given: argparse.Namespace, dataset: Path) -> Path:
    """``lerobot-train`` with LeRobot's own defaults but for the size of the network and the schedule."""
    output = given.out / "lerobot"
    checkpoint = output / "checkpoints" / "last" / "pretrained_model"
    if checkpoint.exists():
        return checkpoint
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable, "-m", "lerobot.scripts.lerobot_train", "--dataset.repo_id=robot_rl/demonstrations", f"--dataset.root={dataset}",
        "--policy.type=diffusion", f"--policy.device={given.device}", "--policy.push_to_hub=false", "--policy.horizon=16",
        "--policy.n_obs_steps=2", "--policy.n_action_steps=8", f"--policy.down_dims=[{given.down_dims}]", f"--output_dir={output}",
        f"--steps={given.steps}", f"--save_freq={given.steps}", f"--batch_size={given.batch_size}", "--num_workers=0", "--eval_freq=0",
        "--log_freq=500", "--wandb.enable=false", f"--seed={given.seed}",
    ]  # fmt: skip
    print(" ".join(command), file=sys.stderr)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    return checkpoint


def as_lerobot(given: argparse.Namespace, checkpoint: Path, steps: int) -> dict[str, Any]:
    """Whether the adapter hands out, bit for bit, what LeRobot's own loop does on the same observations and noise."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    base = load_lerobot(checkpoint, "cpu")
    config = PreTrainedConfig.from_pretrained(checkpoint)
    config.device, config.noise_scheduler_type, config.num_inference_steps = "cpu", "DDIM", steps
    policy = get_policy_class("diffusion").from_pretrained(checkpoint, config=config)
    pre, post = make_pre_post_processors(
        config, pretrained_path=str(checkpoint), preprocessor_overrides={"device_processor": {"device": "cpu"}}
    )
    policy.reset()
    env = make_env(given.task)
    observation, _ = env.reset(seed=seeding.EVALUATION.take(1)[0])
    state = torch.from_numpy(observation[OBSERVATION_STATE])
    columns = ROBOT_COLUMNS[given.task]
    noise = torch.randn(1, *base.spec.noise_shape, generator=torch.Generator().manual_seed(0))
    batch = pre({OBSERVATION_STATE: state[:columns], OBSERVATION_ENVIRONMENT_STATE: state[columns:]})
    batch = {k: v for k, v in batch.items() if k.startswith("observation.")}
    with torch.no_grad():
        theirs = torch.cat([post(policy.select_action(dict(batch), noise=noise)) for _ in range(base.spec.n_action_steps)])
        stack = state.expand(1, base.spec.n_obs_steps, -1)
        chunk = base.unnormalize_action(base.sample(base.encode({OBSERVATION_STATE: stack}), noise))[0]
    env.close()
    ours = chunk[: base.spec.n_action_steps]
    return {"bitwise_equal": bool(torch.equal(ours, theirs)), "largest_difference": float((ours - theirs).abs().max())}


def success(given: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    base = load_lerobot(checkpoint, given.device)
    seeds = seeding.EVALUATION.take(given.evaluate)
    began = time.perf_counter()
    with make_vector(given.task, 16, "serial") as vector:
        outcomes = measure(Rollout(vector, vector.spec), ActingPolicy(base, device=given.device), seeds)
    successes, n, interval = success_interval(outcomes)
    return {
        "success": successes / n, "interval": [interval.low, interval.high], "n": n, "seconds": round(time.perf_counter() - began, 1)
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lerobot_lift"))
    parser.add_argument("--task", default="tabletop/Lift", choices=sorted(ROBOT_COLUMNS))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument(
        "--skill", type=float, nargs=2, default=(0.0, 0.7), help="of the scripted operator, drawn between these"
    )
    parser.add_argument("--noise", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--down-dims", default="64,128", help="of the U-Net; LeRobot's default is 512,1024,2048")
    parser.add_argument("--ddim-steps", type=int, default=8)
    parser.add_argument("--evaluate", type=int, default=200, help="evaluation starts; 0 leaves the measuring out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out = given.out.resolve()
    columns = ROBOT_COLUMNS[given.task]
    env = make_env(given.task)
    width, action = env.spec.observation_features[OBSERVATION_STATE].shape[0], env.spec.action
    env.close()
    began = time.perf_counter()
    trained = train(given, make_dataset(given, columns))
    seconds = time.perf_counter() - began
    # In place of LeRobot's link, with what loading it needs to know beside it: from here on the path alone is enough.
    checkpoint = given.out / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(trained, checkpoint)
    options = {
        "num_inference_steps": given.ddim_steps, "action": action.to_json(),
        "features": {
            OBSERVATION_STATE: f"{OBSERVATION_STATE}[0:{columns}]", OBSERVATION_ENVIRONMENT_STATE: f"{OBSERVATION_STATE}[{columns}:{width}]",
        },
    }  # fmt: skip
    (checkpoint / OPTIONS_FILE).write_text(json.dumps(options, indent=2), encoding="utf-8")
    from importlib.metadata import version

    print(json.dumps({
        "checkpoint": str(given.out.name + "/checkpoint"), "lerobot": version("lerobot"), "task": given.task, "episodes": given.episodes,
        "training_steps": given.steps, "batch_size": given.batch_size, "down_dims": given.down_dims, "made_in_seconds": round(seconds, 1),
        "against_select_action": as_lerobot(given, checkpoint, given.ddim_steps),
        "base": success(given, checkpoint) if given.evaluate else None,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
