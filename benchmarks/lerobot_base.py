"""A LeRobot policy of mixed quality, made with LeRobot's own training code, to be post-trained by path.

Scripted demonstrations of a shipped task become a LeRobot v3 dataset; ``lerobot-train`` trains on it in a process of its own and saves
with ``save_pretrained``; the checkpoint is then loaded by path here and, with the same noise, compared to LeRobot's ``select_action``
before it plays evaluation starts. Prints one JSON object. The networks are small, so two cores are enough:

    python benchmarks/lerobot_base.py --out runs/lerobot_lift
    robot-rl train --config configs/lerobot_lift.yaml                    # latent noise
    robot-rl train --config configs/lerobot_lift_residual.yaml           # residual

    python benchmarks/lerobot_base.py --policy smolvla --out runs/smolvla_lift     # needs the extra vla
    robot-rl train --config configs/smolvla_lift.yaml
    robot-rl train --config configs/smolvla_lift_residual.yaml

The SmolVLA is of the published architecture in a tiny configuration, drawn at random and trained from scratch with its vision-language
part. It reads one 32x32 camera, the instruction and the whole state, the block's place included.

A second call with the same folder goes on where the first one stopped (demonstrations, dataset, training, measuring).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
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
from robot_rl.sim.env import EnvSpec, make_env
from robot_rl.sim.rollout import Rollout
from robot_rl.sim.vector import make_vector
from robot_rl.training.measuring import measure, success_interval
from robot_rl.types import OBSERVATION_ENVIRONMENT_STATE, OBSERVATION_STATE, Episode, FeatureSpec

ROBOT_COLUMNS = {"tabletop/Lift": 10}
"""What of ``observation.state`` is the robot; the rest is the scene, which LeRobot keeps in ``observation.environment_state``."""
ENV_OPTIONS: dict[str, dict[str, Any]] = {"diffusion": {}, "smolvla": {"cameras": ["front"], "image_size": 32}}
EXECUTED = 8
NORMALIZATION = json.dumps({"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ENV": "MEAN_STD", "ACTION": "MIN_MAX"})
"""LeRobot's default leaves ``observation.environment_state`` in metres, in which a small network hardly sees the block."""


def split(episode: Episode, columns: int) -> Episode:
    state = episode.observations.pop(OBSERVATION_STATE)
    episode.observations |= {
        OBSERVATION_STATE: np.ascontiguousarray(state[:, :columns]),
        OBSERVATION_ENVIRONMENT_STATE: np.ascontiguousarray(state[:, columns:]),
    }
    return episode


def make_dataset(given: argparse.Namespace, spec: EnvSpec) -> Path:
    demos, dataset = given.out / "demos", given.out / "dataset"
    if dataset.exists():
        return dataset
    shutil.rmtree(demos, ignore_errors=True)
    with EpisodeStore.create(demos, observation_features=spec.observation_features, action=spec.action, sync=False) as store:
        config = CollectConfig(
            given.task, given.episodes, tuple(given.skill), given.noise, given.seed, workers=given.workers,
            env_options=ENV_OPTIONS[given.policy],
        )  # fmt: skip
        collect(config, store)
    features, columns = dict(spec.observation_features), ROBOT_COLUMNS[given.task]
    if given.policy == "diffusion":  # which is conditioned on the scene apart from the robot
        names = features[OBSERVATION_STATE].names
        features = {
            OBSERVATION_STATE: FeatureSpec((columns,), names=names[:columns]),
            OBSERVATION_ENVIRONMENT_STATE: FeatureSpec((len(names) - columns,), names=names[columns:]),
        }
    with EpisodeStore.open(demos, mode="r") as store:
        episodes = (split(e, columns) if given.policy == "diffusion" else e for e in map(store.read, store.episode_ids()))
        exporters.export(
            episodes,
            dataset,
            "lerobot_v3",
            observation_features=features,
            action=spec.action,
            proposals=False,
            provenance=False,
            images="png",
        )
    return dataset


def architecture(given: argparse.Namespace, spec: EnvSpec) -> list[str]:
    """Arguments of ``lerobot-train`` that shape the policy."""
    if given.policy == "diffusion":
        return [
            "--policy.type=diffusion", f"--policy.horizon={given.horizon}", f"--policy.n_obs_steps={given.obs_steps}",
            f"--policy.n_action_steps={EXECUTED}", f"--policy.drop_n_last_frames={given.horizon - EXECUTED - given.obs_steps + 1}",
            f"--policy.down_dims=[{given.down_dims}]", f"--policy.kernel_size={given.kernel_size}",
            f"--policy.diffusion_step_embed_dim={given.step_embedding}", f"--policy.normalization_mapping={NORMALIZATION}",
            "--policy.prediction_type=sample",  # a few steps from pure noise amplify what a small network gets wrong about the noise
        ]  # fmt: skip
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "policies"))
    from lerobot_kit import tiny_vlm

    vlm = given.out / "vlm"
    if not vlm.exists():
        tiny_vlm(vlm, spec.instruction, width=64, layers=2)
    return [
        "--policy.type=smolvla", f"--policy.vlm_model_name={vlm}", "--policy.load_vlm_weights=false", f"--policy.chunk_size={EXECUTED}",
        f"--policy.n_action_steps={EXECUTED}", "--policy.max_state_dim=18", "--policy.max_action_dim=8", "--policy.num_vlm_layers=2",
        "--policy.resize_imgs_with_padding=[32,32]", "--policy.freeze_vision_encoder=false", "--policy.train_expert_only=false",
        "--policy.expert_width_multiplier=1.0", "--policy.tokenizer_max_length=8", "--policy.pad_language_to=max_length",
        "--policy.scheduler_warmup_steps=100", f"--policy.scheduler_decay_steps={given.steps}",
    ]  # fmt: skip


def train(given: argparse.Namespace, dataset: Path, spec: EnvSpec) -> Path:
    """``lerobot-train``, frames kept in memory, with LeRobot's own defaults but for the size of the network and the schedule."""
    output = given.out / "lerobot"
    checkpoint = output / "checkpoints" / "last" / "pretrained_model"
    reached = output / "checkpoints" / "last" / "training_state" / "training_step.json"
    done = json.loads(reached.read_text(encoding="utf-8"))["step"] if reached.exists() else 0
    if done >= given.steps:
        return checkpoint
    program = [sys.executable, str(Path(__file__).with_name("lerobot_train.py"))]
    if done:
        command = [*program, f"--config_path={checkpoint / 'train_config.json'}", "--resume=true"]
    else:
        shutil.rmtree(output, ignore_errors=True)
        command = [
            *program, "--dataset.repo_id=robot_rl/demonstrations", f"--dataset.root={dataset}", *architecture(given, spec),
            f"--policy.device={given.device}", "--policy.push_to_hub=false", f"--policy.optimizer_lr={given.lr}",
            f"--output_dir={output}", f"--steps={given.steps}", f"--save_freq={given.save_every or given.steps}",
            f"--batch_size={given.batch_size}", "--num_workers=0", "--eval_freq=0", "--log_freq=500", "--wandb.enable=false",
            f"--seed={given.seed}",
        ]  # fmt: skip
    print(" ".join(command), file=sys.stderr)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    return checkpoint


def as_lerobot(given: argparse.Namespace, checkpoint: Path, spec: EnvSpec) -> dict[str, Any]:
    """Whether the adapter hands out, bit for bit, what LeRobot's own loop does on the same observations and noise.

    What a policy asks beyond the executed action's limits is clipped here and not there: such entries are counted apart.
    """
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    base = load_lerobot(checkpoint, "cpu")
    config = PreTrainedConfig.from_pretrained(checkpoint)
    config.device = "cpu"
    if given.policy == "diffusion":
        config.noise_scheduler_type, config.num_inference_steps = "DDIM", given.sampling_steps
    else:
        config.num_steps = given.sampling_steps
    policy = get_policy_class(given.policy).from_pretrained(checkpoint, config=config)
    pre, post = make_pre_post_processors(
        config, pretrained_path=str(checkpoint), preprocessor_overrides={"device_processor": {"device": "cpu"}}
    )
    env = make_env(given.task, **ENV_OPTIONS[given.policy])
    columns, equal, inside, difference = ROBOT_COLUMNS[given.task], 0, 0, 0.0
    starts = seeding.EVALUATION.take(10)
    for i, seed in enumerate(starts):
        policy.reset()
        observation, _ = env.reset(seed=seed)
        now = {k: torch.from_numpy(v) for k, v in observation.items()}
        noise = torch.randn(1, *base.spec.noise_shape, generator=torch.Generator().manual_seed(i))
        batch: dict[str, Any] = {k: (v.float() / 255).permute(2, 0, 1) if v.dtype == torch.uint8 else v for k, v in now.items()}
        if given.policy == "diffusion":
            state = batch.pop(OBSERVATION_STATE)
            batch |= {OBSERVATION_STATE: state[:columns], OBSERVATION_ENVIRONMENT_STATE: state[columns:]}
        ready = {k: v for k, v in pre({**batch, "task": spec.instruction}).items() if k.startswith("observation.")}
        with torch.no_grad():
            theirs = torch.cat([post(policy.select_action(dict(ready), noise=noise)) for _ in range(EXECUTED)])
            stack = {k: v.expand(1, base.spec.n_obs_steps, *v.shape) for k, v in now.items()}
            chunk = base.sample(base.encode(stack), noise)
            again = base.sample(base.encode(stack), noise)
        assert torch.equal(chunk, again), "the same noise gave another action"
        within = chunk[0, :EXECUTED].abs() < 1.0
        ours = base.unnormalize_action(chunk)[0, :EXECUTED]
        equal += int((ours == theirs)[within].sum())
        inside += int(within.sum())
        difference = max(difference, float((ours - theirs)[within].abs().max()))
    env.close()
    return {
        "bitwise_equal": equal == inside, "largest_difference": difference, "entries": inside,
        "clipped": len(starts) * EXECUTED * base.spec.action.dim - inside,
    }  # fmt: skip


def success(given: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    base = load_lerobot(checkpoint, given.device)
    seeds = seeding.EVALUATION.take(given.evaluate)
    began = time.perf_counter()
    with make_vector(given.task, 16, "serial", **ENV_OPTIONS[given.policy]) as vector:
        outcomes = measure(Rollout(vector, vector.spec), ActingPolicy(base, device=given.device), seeds)
    successes, n, interval = success_interval(outcomes)
    return {
        "success": successes / n, "interval": [interval.low, interval.high], "n": n, "seconds": round(time.perf_counter() - began, 1)
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lerobot_lift"))
    parser.add_argument("--policy", choices=sorted(ENV_OPTIONS), default="diffusion")
    parser.add_argument("--task", default="tabletop/Lift", choices=sorted(ROBOT_COLUMNS))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument(
        "--skill", type=float, nargs=2, default=(0.0, 0.7), help="of the scripted operator, drawn between these"
    )
    parser.add_argument("--noise", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--save-every", type=int, default=500, help="training steps between checkpoints to go on from")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="LeRobot's default is 1e-4, for its larger networks")
    parser.add_argument("--down-dims", default="64", help="of the U-Net; LeRobot's default is 512,1024,2048")
    parser.add_argument("--kernel-size", type=int, default=3, help="LeRobot's default is 5")
    parser.add_argument("--step-embedding", type=int, default=32, help="LeRobot's default is 128")
    parser.add_argument(
        "--horizon", type=int, default=EXECUTED, help=f"of which {EXECUTED} are executed; LeRobot's default is 16"
    )
    parser.add_argument("--obs-steps", type=int, default=1, help="LeRobot's default is 2")
    parser.add_argument("--sampling-steps", type=int, default=3, help="DDIM or Euler steps")
    parser.add_argument("--evaluate", type=int, default=200, help="evaluation starts; 0 leaves the measuring out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out = given.out.resolve()
    env = make_env(given.task, **ENV_OPTIONS[given.policy])
    spec = env.spec
    env.close()
    began = time.perf_counter()
    trained = train(given, make_dataset(given, spec), spec)
    seconds = time.perf_counter() - began
    # In place of LeRobot's link, with what loading it needs to know beside it: from here on the path alone is enough.
    checkpoint = given.out / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(trained, checkpoint)
    options: dict[str, Any] = {"num_inference_steps": given.sampling_steps, "action": spec.action.to_json()}
    if given.policy == "diffusion":
        columns, width = ROBOT_COLUMNS[given.task], spec.observation_features[OBSERVATION_STATE].shape[0]
        options["features"] = {
            OBSERVATION_STATE: f"{OBSERVATION_STATE}[0:{columns}]",
            OBSERVATION_ENVIRONMENT_STATE: f"{OBSERVATION_STATE}[{columns}:{width}]",
        }
    else:
        options["task"] = spec.instruction
    (checkpoint / OPTIONS_FILE).write_text(json.dumps(options, indent=2), encoding="utf-8")
    with contextlib.redirect_stdout(sys.stderr):  # where LeRobot says that it loads
        compared = as_lerobot(given, checkpoint, spec)
        base = success(given, checkpoint) if given.evaluate else None
    print(json.dumps({
        "checkpoint": str(given.out.name + "/checkpoint"), "policy": given.policy, "lerobot": version("lerobot"), "task": given.task,
        "episodes": given.episodes, "training_steps": given.steps, "batch_size": given.batch_size, "sampling_steps": given.sampling_steps,
        "made_in_seconds": round(seconds, 1), "against_select_action": compared,
        "base": base,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
