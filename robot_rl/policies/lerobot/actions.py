"""Between a LeRobot policy's own action space and the unit cube that heads, critics and the replay buffer live in."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from robot_rl.policies.lerobot import versions
from robot_rl.types import ActionSpec

WIDENED = 0.1
"""Share of the recorded range by which the unit cube reaches beyond it on either side (where the policy's space is no cube)."""
_DEVIATIONS = 5.0
_INVERTIBLE = ("unnormalizer_processor", "device_processor")


class ActionSpace:
    """Normalises with the checkpoint's own processors.

    Where LeRobot maps the recorded minimum and maximum to -1 and 1, its space is ours, number for number. Anywhere else (mean
    and standard deviation, quantiles, none) physical limits a little wider than what was recorded become -1 and 1, and what a
    policy asks beyond them is clipped there.

    Raises:
        ValueError: a post-processor step that has no known inverse, or no statistics to take limits from.
    """

    def __init__(self, pre: Any, post: Any, dim: int, action: ActionSpec | None, device: str) -> None:
        self._normalizer = next((s for s in pre.steps if versions.step_name(s) == "normalizer_processor"), None)
        self._steps = []
        for step in post.steps:
            name = versions.step_name(step)
            if name not in _INVERTIBLE:
                raise ValueError(
                    f"post-processor step {name!r}: recorded actions cannot be brought back through it; accepted are "
                    f"{', '.join(_INVERTIBLE)}"
                )
            if name == "unnormalizer_processor":
                self._steps.append(step)
        mode, statistics = "IDENTITY", dict[str, Tensor]()
        if self._steps:
            mode, statistics = versions.action_normalization(self._steps[0])
        self.mode, self.own_cube = mode, mode == "MIN_MAX"
        self.deviation = 0.5 if self.own_cube else 1.0  # about, of actions in the policy's own numbers
        self.recorded = self._recorded(statistics, dim)
        if self.own_cube and self.recorded is None:
            raise ValueError(f"the post-processor's minimum and maximum are not those of {dim} action dimensions")
        self.low = self.high = torch.zeros(0)
        if not self.own_cube:
            low, high = self._limits(statistics, action, dim)
            self.low, self.high = low.to(device), high.to(device)

    def _recorded(self, statistics: dict[str, Tensor], dim: int) -> tuple[list[float], list[float]] | None:
        if "min" not in statistics or "max" not in statistics or len(statistics["min"]) != dim:
            return None
        low, high = statistics["min"].double(), statistics["max"].double()
        still = high - low < 1e-6
        return torch.where(still, low - 0.5, low).tolist(), torch.where(still, high + 0.5, high).tolist()

    def _limits(self, statistics: dict[str, Tensor], action: ActionSpec | None, dim: int) -> tuple[Tensor, Tensor]:
        if self.recorded is not None:
            low, high = (torch.tensor(x) for x in self.recorded)
            margin = WIDENED * (high - low)
            return (low - margin).float(), (high + margin).float()
        if "mean" in statistics and "std" in statistics:
            spread = _DEVIATIONS * statistics["std"].cpu().clamp(min=1e-3)
            return (statistics["mean"].cpu() - spread).float(), (statistics["mean"].cpu() + spread).float()
        if action is not None:
            return torch.tensor(action.low, dtype=torch.float32), torch.tensor(action.high, dtype=torch.float32)
        raise ValueError(
            f"the checkpoint normalises its {dim} action dimensions by {self.mode} and holds no statistics of them; accepted is the "
            "option action with the robot's low and high"
        )

    def default_spec(self) -> ActionSpec:
        """What the statistics tell: limits, but neither names nor which dimensions grip or count as differences."""
        if self.recorded is not None:
            return ActionSpec(tuple(self.recorded[0]), tuple(self.recorded[1]))
        return ActionSpec(tuple(self.low.tolist()), tuple(self.high.tolist()))

    # ---- the policy's own space

    def own_to_physical(self, action: Tensor) -> Tensor:
        """What LeRobot's post-processor makes of the policy's output, on the same device."""
        transition = versions.action_transition(action)
        for step in self._steps:
            transition = step(transition)
        return versions.action_of(transition)

    def physical_to_own(self, action: Tensor) -> Tensor:
        if self._normalizer is None:
            return action
        return versions.action_of(self._normalizer(versions.action_transition(action)))

    def own_to_unit(self, action: Tensor) -> Tensor:
        """The policy's output, clipped to the cube."""
        unit = action if self.own_cube else self.normalize(self.own_to_physical(action))
        return unit.clamp(-1.0, 1.0)

    def unit_to_own(self, action: Tensor) -> Tensor:
        """The cube to what the policy puts out."""
        return action if self.own_cube else self.physical_to_own(self.unnormalize(action))

    # ---- the unit cube

    def normalize(self, action: Tensor) -> Tensor:
        """Physical to unit; what lies outside the limits stays outside."""
        if self.own_cube:
            return self.physical_to_own(action)
        return (action - self.low) * (2.0 / (self.high - self.low)) - 1.0

    def unnormalize(self, action: Tensor) -> Tensor:
        if self.own_cube:
            return self.own_to_physical(action)
        return self.low + (action + 1.0) * (0.5 * (self.high - self.low))

    def add_to(self, digest: Any) -> None:
        for value in (self.low, self.high):
            digest.update(value.cpu().numpy().tobytes())


def processor_hash(pipelines: tuple[Any, ...], space: ActionSpace) -> str:
    """Hash of every statistic in the processors, and of the cube."""
    digest = hashlib.sha256()
    for pipeline in pipelines:
        for i, step in enumerate(pipeline.steps):
            if hasattr(step, "state_dict"):
                for name, value in sorted(step.state_dict().items()):
                    digest.update(f"{i} {versions.step_name(step)} {name}".encode())
                    digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    space.add_to(digest)
    return digest.hexdigest()[:12]
