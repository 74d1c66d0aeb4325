"""What keeps an actor on the data: a density of recorded chunks (SPOT, Wu et al. 2022).

A conditional variational autoencoder (Kingma and Welling 2014) stands for the density; with m, s its posterior for (state, chunk)::

    -ELBO = mean_d (decode(state, z) - chunk)^2 + kl_weight mean_j (s^2 + m^2 - 1 - log s^2) / 2         z = m + s e
    L_pi  = -mean(Q) [/ mean|Q|] + lambda_t mean(-ELBO(state, pi(state)))

It is fitted first, for ``updates`` updates, and then stays; until then no actor moves. lambda_t is lambda offline, and falls as
max(floor, 1 - t / decay_updates) online.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robot_rl.learners.config import SupportConfig
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.mlp import StackedMLP

LOG_STD = -4.0, 15.0


class BehaviourVAE(nn.Module):
    """-ELBO of a chunk in a state; both networks are small multilayer perceptrons."""

    def __init__(self, features: int, actions: int, config: SupportConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.latent, self.kl_weight = config.latent_factor * actions, config.kl_weight
        self.encoder = StackedMLP(1, features + actions, 2 * self.latent, config.hidden, generator=generator)
        self.decoder = StackedMLP(1, features + self.latent, actions, config.hidden, generator=generator)

    def negative_elbo(self, conditioning: Tensor, chunk: Tensor, noise: Tensor) -> Tensor:
        """(B,) for states (B, C), chunks (B, n*A) and standard normals (B, latent); differentiable in the chunks."""
        mean, log_std = self.encoder(torch.cat([conditioning, chunk], -1))[0].chunk(2, -1)
        log_std = log_std.clamp(*LOG_STD)
        z = mean + log_std.exp() * noise
        decoded = torch.tanh(self.decoder(torch.cat([conditioning, z], -1))[0])
        kl = 0.5 * ((2 * log_std).exp() + mean.square() - 1 - 2 * log_std).mean(-1)
        return (decoded - chunk).square().mean(-1) + self.kl_weight * kl


class Support:
    """The autoencoder, its optimiser, and the weight of the penalty."""

    def __init__(
        self, features: int, actions: int, config: SupportConfig, weight: float, init: torch.Generator, device: torch.device
    ) -> None:
        self.config, self.weight = config, weight
        self.vae = BehaviourVAE(features, actions, config, init).to(device)
        self.parts = [self.vae.encoder.flat, self.vae.decoder.flat]
        self.optimizers = [FlatAdam(flat, config.lr) for flat in self.parts]
        self.fitted = self.online = 0

    @property
    def fitting(self) -> bool:
        """Whether the density is still being learnt; no actor moves until it is done."""
        return self.fitted < self.config.updates

    @property
    def strength(self) -> float:
        """lambda_t."""
        c = self.config
        left = 1.0 - self.online / c.decay_updates if c.decay_updates else 1.0
        return self.weight * max(c.floor, left)

    def _noise(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randn((batch, self.vae.latent), generator=generator, device=generator.device)

    def fit(self, conditioning: Tensor, rows: Tensor, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One step on recorded chunks (B, n, A) of weight (B,)."""
        noise = self._noise(len(rows), generator)
        for flat in self.parts:
            flat.zero_grad()
        with torch.enable_grad():
            per_row = self.vae.negative_elbo(conditioning, rows.flatten(1), noise)
            loss = (weight * per_row).sum() / weight.sum().clamp_min(1.0)
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.fitted += 1
        return {"support/fit": loss.detach()}

    def gradient(self, conditioning: Tensor, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean of -ELBO over chunks (B, n, A), and the gradient of lambda_t times it in them, (B, n*A)."""
        noise, leaf = self._noise(len(rows), generator), rows.detach().flatten(1).clone().requires_grad_(True)
        with torch.enable_grad():
            loss = self.vae.negative_elbo(conditioning, leaf, noise).mean()
            (slope,) = torch.autograd.grad(self.strength * loss, leaf)
        return loss.detach(), slope

    def full_state(self) -> dict[str, Any]:
        return {
            "vae": {k: v.clone() for k, v in self.vae.state_dict().items()},
            "optimizers": {str(i): o.state_dict() for i, o in enumerate(self.optimizers)},
            "counters": torch.tensor([self.fitted, self.online]),
        }

    def load_full_state(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state["optimizers"][str(i)])
        self.fitted, self.online = (int(x) for x in state["counters"])


def penalised(
    objective: Any, conditioning: Tensor, rows: Tensor, value: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient (B, n*A) of an actor's loss in its rows, from that of -mean(Q): scaled, and with the density's penalty."""
    if objective.config.normalize_q:
        gradient = gradient / value.abs().mean().clamp_min(1e-6)
    if objective.support is None:
        return gradient, {}
    loss, slope = objective.support.gradient(conditioning, rows, objective.generator)
    return gradient + slope, {"support/penalty": loss}
