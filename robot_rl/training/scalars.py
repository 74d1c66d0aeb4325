"""Scalars for people with dashboards: TensorBoard always, Weights & Biases when asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robot_rl.config import config_hash, to_dict
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.run_folder import RunFolder, to_json


class ScalarLog:
    """Writes scalars against environment steps.

    Args:
        job: a second process of one run writes under its own name: TensorBoard and W&B want one writer each.

    Raises:
        ImportError: W&B was asked for and is not installed.
    """

    def __init__(self, folder: RunFolder, config: PostTrainConfig, job: str = "") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.config_hash = config_hash(config)
        self._writer = SummaryWriter(str(folder.tensorboard / job) if job else str(folder.tensorboard))
        self._wandb: Any = None
        if config.logging.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ImportError(
                    f"logging.wandb={config.logging.wandb!r} needs the package wandb: pip install wandb"
                ) from error
            group: dict[str, Any] = {"group": folder.path.name, "job_type": job} if job else {}
            self._wandb = wandb.init(
                project=config.logging.wandb, config=to_json(to_dict(config)), dir=str(folder.path), resume="allow", **group
            )

    def write(self, values: Mapping[str, float], env_steps: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, env_steps)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=env_steps)

    def close(self) -> None:
        self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
