"""No learning: for heads that steer the base as they are. The session still gates, evaluates and publishes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.heads.base import Head
from robot_rl.learners.config import FixedConfig
from robot_rl.policies.base import BasePolicy
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.types import Stratum


class FixedLearner:
    """A head as it was built. Asking it to learn is an error: the schedule must leave it alone."""

    def __init__(self, base: BasePolicy, head: Head, config: FixedConfig, device: torch.device | str = "cpu") -> None:
        self.base, self.config = base, config
        self.head = head.to(device)
        self.updates = self.actor_updates = 0

    def sample(
        self,
        buffer: ReplayBuffer,
        rng: np.random.Generator,
        size: int,
        ratios: Mapping[Stratum | str, float] | None = None,
        base_samples: Any = None,
    ) -> Any:
        raise RuntimeError("algorithm='fixed' learns nothing; the schedule asked it for an update")

    def update(self, batch: Any, *, train_actor: bool = True, offline: bool = False) -> dict[str, Tensor]:
        raise RuntimeError("algorithm='fixed' learns nothing; the schedule asked it for an update")

    def pretrain(self, batch: Any) -> dict[str, Tensor]:
        return self.update(batch)

    def finish_pretraining(self) -> None:
        """Nothing was pretrained."""

    def check_finite(self) -> None:
        """Raises FloatingPointError when a number of the head is not finite."""
        for name, value in self.head.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise FloatingPointError(f"head {name} is not finite")

    def state_dict(self) -> dict[str, Any]:
        return {"head": {k: v.clone() for k, v in self.head.state_dict().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
