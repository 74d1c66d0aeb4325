"""Other ways for a critic to learn from recorded data: expectile values (IQL), conservative and calibrated terms (CQL, Cal-QL)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robot_rl.learners.batch import Batch
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.updates import load_network_state, network_state
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.grad import without_grad

Metrics = dict[str, Tensor]


class ValueRule:
    """IQL (Kostrikov et al. 2022): V(s) is an expectile of Q over recorded actions, and Q regresses on R + discount * V(s').

    No action outside the data is ever asked for::

        u   = reduce(Q_target(s, a)) - V(s)
        L_V = wmean(|tau - 1(u < 0)| u^2)
        y   = R + disc * V(s')                    with V after its step, as in the released code
    """

    def __init__(self, config: OffPolicyConfig, features: int, init: torch.Generator, device: torch.device) -> None:
        self.config = config
        self.network = CriticEnsemble(1, features, config.hidden, layer_norm=config.layer_norm, generator=init, device=device)
        self.optimizer = FlatAdam(self.network.flat, config.critic_lr)

    @without_grad
    def target(self, batch: Batch, x: Tensor, target: CriticEnsemble, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """One step of V, then the regression target (B,) of the critics. ``x`` (B, D): the critic's input for the data."""
        c, b = self.config, len(batch.reward)
        q = target.reduced_value(x, c.target_reduce, generator)
        tape = self.network._tape(b, 1)
        v = self.network.run(batch.conditioning, tape)[0, :, 0]
        u = q - v
        slope = torch.where(u < 0, 1.0 - c.expectile, c.expectile)
        part = batch.weight / batch.weight.sum().clamp_min(1.0)
        loss = (part * slope * u.square()).sum()
        self.network.backward(tape, (-2.0 * part * slope * u)[None, :, None])
        self.optimizer.step()
        following = self.network.value(batch.next_conditioning)[0]
        if c.value_min is not None or c.value_max is not None:
            following = following.clamp(c.value_min, c.value_max)
        return batch.reward + batch.discount * following, {"value/loss": loss, "value/advantage": u.mean()}

    def full_state(self) -> dict[str, Any]:
        return network_state(self.network, self.optimizer)

    def load_full_state(self, state: dict[str, Any]) -> None:
        load_network_state(self.network, self.optimizer, state)


@without_grad
def add_conservative_gradient(
    critic: CriticEnsemble, objective: Any, batch: Batch, config: OffPolicyConfig, calibrated: bool, generator: torch.Generator
) -> Metrics:
    """Add the gradient of half of alpha * Σ_i wmean(D_i) to ``critic.flat.grad`` (half, as all squared errors here are halved).

    With n actions each of uniform, policy at s and policy at s' (Kumar et al. 2020), and G the return from s on::

        Q~_ij = max(Q_i(s, a_j), G(s)) for policy actions when calibrated (Nakamoto et al. 2023), Q_i(s, a_j) otherwise
        D_i   = T logsumexp_j((Q~_ij - log p_j) / T) - Q_i(s, a_data)

    Actors that are composed with a base have no density: then a_data joins the set and T log(count) is subtracted instead
    of the log densities. Where the return is unknown nothing is calibrated.
    """
    c, b = config.conservative, len(batch.reward)
    samples, log_density, from_policy = _actions(objective, batch, c.samples, generator)
    count = samples.shape[1]
    data = objective.critic_input(batch)
    features = batch.conditioning

    def inputs(j: int) -> Tensor:
        return torch.cat([features, samples[:, j]], dim=-1)

    q = torch.stack([critic.value(inputs(j)) for j in range(count)], dim=-1)  # (N, B, J)
    free = torch.ones_like(q)
    if calibrated:
        if batch.episode_return is None:
            raise ValueError("calql needs episode returns: build the buffer with the extra feature 'episode_return'")
        known = torch.ones_like(batch.reward) if batch.return_known is None else batch.return_known
        bound = torch.where(known > 0, batch.episode_return, torch.full_like(batch.episode_return, -math.inf))
        held = from_policy & (q < bound[None, :, None])
        free = (~held).to(q.dtype)
        q = torch.where(held, bound[None, :, None].expand_as(q), q)
    tape = critic._tape(b, critic.n)
    q_data = critic.run(data, tape)[..., 0].clone()
    if log_density is None:
        logits = torch.cat([q, q_data.unsqueeze(-1)], dim=-1) / c.temperature
        offset = -c.temperature * math.log(count + 1)
    else:
        logits, offset = (q - log_density) / c.temperature, 0.0
    gap = c.temperature * logits.logsumexp(-1) + offset - q_data
    share = logits.softmax(-1)
    scale = 0.5 * c.weight * batch.weight / batch.weight.sum().clamp_min(1.0)  # (B,)
    total = critic.flat.grad.clone()
    own = -1.0 if log_density is not None else share[..., count] - 1.0
    critic.backward(tape, (scale * own).expand_as(q_data).unsqueeze(-1).contiguous())
    total.add_(critic.flat.grad)
    for j in range(count):
        critic.run(inputs(j), tape)
        critic.backward(tape, (scale * share[..., j] * free[..., j]).unsqueeze(-1))
        total.add_(critic.flat.grad)
    critic.flat.grad.copy_(total)
    part = batch.weight / batch.weight.sum().clamp_min(1.0)
    return {"critic/gap": (part * gap).sum(-1).mean(), "critic/calibrated": 1.0 - free.mean()}


def _actions(objective: Any, batch: Batch, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor]:
    """(B, 3n, D) uniform, policy at s, policy at s'; their log densities (B, 3n) or None; which are the policy's (3n,)."""
    b, dim = len(batch.reward), batch.action.flatten(1).shape[1]
    kind = {"device": batch.action.device, "dtype": batch.action.dtype}
    uniform = torch.rand(b, n, dim, generator=generator, **kind) * 2 - 1
    here, p_here = _policy_samples(objective, batch, batch.conditioning, n)
    there, p_there = _policy_samples(objective, batch, batch.next_conditioning, n)
    samples = torch.cat([uniform, here, there], dim=1)
    density = None
    if p_here is not None and p_there is not None:
        even = torch.full((b, n), -dim * math.log(2.0), **kind)
        density = torch.cat([even, p_here, p_there], dim=1)
    return samples, density, torch.arange(3 * n, device=batch.action.device) >= n


def _policy_samples(objective: Any, batch: Batch, conditioning: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
    """(B, n, D) actions in these states; with log densities (B, n) from an actor that has them.

    A head that is composed with a base gives its own actions and the base's in turns.
    """
    if hasattr(objective, "policy_samples"):
        return objective.policy_samples(conditioning, n)
    there = replace(batch, next_conditioning=conditioning, next_base_rows=None)
    first = conditioning.shape[1]
    return torch.stack([objective.next_input(there, i % 2 == 1)[0][:, first:] for i in range(n)], dim=1), None


@without_grad
def copy_wider(critic: CriticEnsemble, weights: Mapping[str, Tensor]) -> None:
    """Copy a critic's ``state_dict`` into one that may read more inputs behind the old ones; those start at zero weight.

    Raises:
        ValueError: other names, another number of heads or hidden layers, or a narrower input.
    """
    own = critic.state_dict()
    if own.keys() != weights.keys():
        raise ValueError(f"critic weights {sorted(weights)[:4]}... do not fit a critic with {sorted(own)[:4]}...")
    for name, tensor in own.items():
        given = weights[name].to(tensor)
        if name == "weight.0" and given.shape[1] <= tensor.shape[1] and given.shape[::2] == tensor.shape[::2]:
            tensor.zero_()
            tensor[:, : given.shape[1]] = given
        elif given.shape == tensor.shape:
            tensor.copy_(given)
        else:
            raise ValueError(
                f"critic weights: {name} has shape {tuple(given.shape)}, this critic {tuple(tensor.shape)}; accepted are the same "
                "n_critics and hidden, and no more inputs"
            )
