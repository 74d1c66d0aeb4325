"""A one-step student of the base's noise-to-action map, for what the learner asks of the base; acting always uses the base itself.

    L = mean((f(s, w) - base(s, w))^2),  w ~ N(0, I),  s from the learner's own batches

Each step's error is measured on draws the student has not been trained on yet, and is what the run's metrics and report show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robot_rl.learners.config import StudentConfig
from robot_rl.learners.updates import load_network_state, network_state
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.mlp import StackedMLP
from robot_rl.policies.base import BasePolicy, differentiable

LOOK_EVERY = 50  # updates between two looks at the error, each of which waits for the device
SMOOTHING = 0.05


class StudentBase:
    """A base policy that answers :meth:`sample` with its student, once that is good enough.

    Attributes:
        error: () running mean of |student - base| over normalised entries that run.
        trusted: whether ``sample`` is the student; until its error is at most ``config.tolerance`` it is the base.
    """

    def __init__(self, base: BasePolicy, config: StudentConfig, init: torch.Generator, seed: int, device: torch.device) -> None:
        if base.spec.noise_shape is None:
            raise ValueError(
                f"learner.student: this base ({base.spec.sampler}) takes no noise and is one step already; accepted is null"
            )
        self.base, self.config, self.spec = base, config, base.spec
        rows, dims = base.spec.noise_shape
        self.shape = (base.spec.horizon, base.spec.action.dim)
        self.network = StackedMLP(
            1, base.spec.conditioning_dim + rows * dims, self.shape[0] * self.shape[1], config.hidden, layer_norm=True,
            generator=init, device=device,
        )  # fmt: skip
        self.optimizer = FlatAdam(self.network.flat, config.lr)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.error = torch.full((), float("inf"), device=device)
        self.updates, self.trusted = 0, False

    # ---- a base policy

    @property
    def differentiable(self) -> bool:
        return differentiable(self.base)

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        return self.base.encode(observation)

    def normalize_action(self, action: Tensor) -> Tensor:
        return self.base.normalize_action(action)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        return self.base.unnormalize_action(action)

    def sample(self, conditioning: Tensor, noise: Tensor, *, grad: bool = False) -> Tensor:
        """The student's chunk where it is trusted, else the base's."""
        if not self.trusted:
            return self.base.sample(conditioning, noise, grad=True) if grad else self.base.sample(conditioning, noise)  # type: ignore[call-arg]
        with torch.set_grad_enabled(grad):
            return self.predicted(conditioning, noise).clamp(-1.0, 1.0)

    # ---- the student

    def predicted(self, conditioning: Tensor, noise: Tensor) -> Tensor:
        """(B, H, A), not clamped, so that saturated entries still teach."""
        x = torch.cat([conditioning, noise.flatten(1)], dim=-1)
        return self.network(x)[0].unflatten(1, self.shape)

    def learn(self, conditioning: Tensor) -> dict[str, Tensor]:
        """One step on fresh noise at these states (B, C)."""
        noise_shape = self.spec.noise_shape
        assert noise_shape is not None
        noise = torch.randn((len(conditioning), *noise_shape), generator=self.generator, device=conditioning.device).to(
            conditioning
        )
        wanted = self.base.sample(conditioning, noise)
        self.network.flat.zero_grad()
        with torch.enable_grad():
            found = self.predicted(conditioning, noise)
            loss = (found - wanted).square().mean()
            loss.backward()
        with torch.no_grad():
            n = self.spec.n_action_steps
            gap = (found.clamp(-1.0, 1.0) - wanted)[:, :n].abs().mean()
            self.error = gap if self.updates == 0 else torch.lerp(self.error, gap, SMOOTHING)
        self.optimizer.step()
        self.updates += 1
        if self.updates % LOOK_EVERY == 0:
            self.trusted = bool(self.error <= self.config.tolerance)
        return {"student/error": gap, "student/loss": loss.detach(), "student/used": torch.tensor(float(self.trusted))}

    def full_state(self) -> dict[str, Any]:
        return {
            "network": network_state(self.network, self.optimizer),
            "generator": self.generator.get_state().clone(),
            "error": self.error.clone(),
            "counters": torch.tensor([self.updates, int(self.trusted)]),
        }

    def load_full_state(self, state: dict[str, Any]) -> None:
        load_network_state(self.network, self.optimizer, state["network"])
        self.generator.set_state(state["generator"].cpu())
        self.error = state["error"].to(self.error)
        self.updates, self.trusted = int(state["counters"][0]), bool(state["counters"][1])
