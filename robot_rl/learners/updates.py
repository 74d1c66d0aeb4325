"""Steps that every objective is made of: build a critic, climb a critic, save a network with its optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robot_rl.learners.config import OffPolicyConfig, Reduction
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.reduce import reduce_with_grad
from robot_rl.nn.flat import FlatAdam, FlatParameters


def make_critic(config: OffPolicyConfig, in_dim: int, generator: torch.Generator, device: torch.device) -> CriticEnsemble:
    return CriticEnsemble(
        config.n_critics, in_dim, config.hidden, layer_norm=config.layer_norm, generator=generator, device=device
    )


def frozen_flat(module: nn.Module) -> FlatParameters:
    """The parameters of a module that only follows another one, side by side; no gradient reaches them."""
    module.requires_grad_(True)  # FlatParameters takes what is trainable
    flat = FlatParameters(module)
    module.requires_grad_(False)
    return flat


def network_state(network: Any, optimizer: FlatAdam) -> dict[str, Any]:
    return {"network": {k: v.clone() for k, v in network.state_dict().items()}, "optimizer": optimizer.state_dict()}


def load_network_state(network: Any, optimizer: FlatAdam, state: dict[str, Any]) -> None:
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])


def climb(
    critic: CriticEnsemble, x: Tensor, how: Reduction, columns: slice, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gradient ascent direction on a critic: (value (B,), dL/dx[:, columns]) of L = -mean over the batch of reduce(Q(x))."""
    value: list[Tensor] = []

    def slope(q: Tensor) -> Tensor:
        v, dv = reduce_with_grad(q, how, generator)
        value.append(v)
        return dv * (-1.0 / q.shape[1])

    _, dx = critic.input_grad(x, slope, columns=columns)
    return value[0], dx
