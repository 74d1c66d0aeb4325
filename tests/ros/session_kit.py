"""A quick base policy, a quick recipe, and a simulated session made of them."""

from __future__ import annotations

from pathlib import Path

from robot_rl.progress import Silent

RECIPE = """
extends: {quickstart}
demos: {{prefill: false, episodes: {demos}}}
base: {{bc: {{steps: {steps}, policy: {{kind: diffusion, horizon: 8, n_action_steps: 8, width: 64, num_steps: 2}}}}}}
schedule: {{warmup_steps: {warmup}, return_updates: 10, warmup_updates: 10, batch_size: 32, updates_per_step: 0.1}}
gate: {{reference_n_min: 5, n_min: 5}}
"""
PARAMETERS = """
/**/policy_node:
  ros__parameters:
    configure_timeout_s: 600.0
    warmup_forwards: 1
/**/monitor_node:
  ros__parameters:
    configure_timeout_s: 600.0
    silence_s: 60.0
/**/learner_node:
  ros__parameters:
    publish_period_s: 1.0
    nice: 0
"""


def write_recipe(folder: Path, *, steps: int = 120, demos: int = 20, warmup: int = 60) -> Path:
    from robot_rl.paths import find_config

    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(quickstart=find_config("quickstart"), steps=steps, demos=demos, warmup=warmup))
    (folder / "parameters.yaml").write_text(PARAMETERS)
    return path


def train_base(run_dir: Path, recipe: Path) -> Path:
    """Demonstrations of a clumsy operator, cloned: the folder of the base policy."""
    import torch

    from robot_rl.config import load
    from robot_rl.training.config import PostTrainConfig
    from robot_rl.training.interrupt import InterruptFlag
    from robot_rl.training.posttrain import _env_spec, prepare_base
    from robot_rl.training.run_folder import RunFolder

    torch.set_num_threads(1)
    config = load(PostTrainConfig, recipe)
    with InterruptFlag() as flag:
        prepare_base(config, _env_spec(config), RunFolder(run_dir), Silent(), flag, "cpu")
    return run_dir / "base"
