"""The squashed Gaussian actor and its temperature (SAC, Haarnoja et al. 2018), with and without autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robot_rl.nn.flat import FlatAdam, FlatParameters
from robot_rl.nn.grad import without_grad
from robot_rl.nn.mlp import Activation, StackedMLP, Tape

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class ActorSample(NamedTuple):
    """A draw made without autograd, with what :meth:`GaussianTanhActor.backward` needs."""

    u: Tensor  # (B, A) in (-1, 1)
    log_prob: Tensor  # (B,) log density of u in unit space
    noise: Tensor  # (B, A) the standard normal it was made of
    std: Tensor  # (B, A)
    free: Tensor  # (B, A) whether log_std was inside its limits, as a number or a truth
    tape: Tape


class GaussianTanhActor(StackedMLP):
    """u = tanh(mean(s) + std(s) ε), ε ~ N(0, I): actions in the unit box, densities in unit space.

    Whatever scales u afterwards (a noise bound, a residual scale) does not enter the density, so a target entropy means
    the same at every scale. One linear output layer gives mean and log_std, clamped to [-20, 2]; ``last_scale=1e-2``
    starts the actor at mean ≈ 0, std ≈ 1.
    """

    def __init__(
        self,
        in_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        activation: Activation = "relu",
        layer_norm: bool = False,
        *,
        last_scale: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            1, in_dim, 2 * action_dim, hidden, activation=activation, layer_norm=layer_norm, last_scale=last_scale,
            generator=generator, device=device, dtype=dtype,
        )  # fmt: skip
        self.action_dim = action_dim

    # ---- with autograd

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) features to mean and log_std before squashing, (B, A) each."""
        mean, log_std = super().forward(features)[0].chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def mean(self, features: Tensor) -> Tensor:
        """tanh(mean), (B, A): the action of evaluation."""
        return torch.tanh(self(features)[0])

    def rsample(self, features: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """A reparameterised draw u (B, A) and its log density (B,) in unit space."""
        mean, log_std = self(features)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        x = mean + log_std.exp() * noise
        return torch.tanh(x), squashed_log_prob(noise, log_std, x)

    def log_prob(self, features: Tensor, u: Tensor) -> Tensor:
        """Log density (B,) in unit space of given actions u (B, A) inside (-1, 1)."""
        mean, log_std = self(features)
        x = torch.atanh(u)
        return squashed_log_prob((x - mean) / log_std.exp(), log_std, x)

    # ---- without autograd

    @without_grad
    def draw(
        self,
        features: Tensor,
        generator: torch.Generator | None = None,
        tape: Tape | None = None,
        into: Tensor | None = None,
    ) -> ActorSample:
        """Like :meth:`rsample` (same generator, same draw), without autograd.

        A tape saves the allocations; u is written ``into`` (B, A) if given, whose last axis must be contiguous.
        """
        tape = self.tape(len(features)) if tape is None else tape
        out = self.run(features, tape)[0]
        noise = torch.randn((len(features), self.action_dim), generator=generator, dtype=out.dtype, device=out.device)
        u = torch.empty_like(noise) if into is None else into
        if tape.compiled:
            from robot_rl.nn import compiled_losses

            log_prob, std, free = compiled_losses.draw(out, noise, u, (LOG_STD_MIN, LOG_STD_MAX))
            return ActorSample(u, log_prob, noise, std, free, tape)
        mean, raw = out.chunk(2, -1)
        log_std = raw.clamp(LOG_STD_MIN, LOG_STD_MAX)
        std = log_std.exp()
        x = torch.addcmul(mean, std, noise)
        u.copy_(torch.tanh(x))
        return ActorSample(u, squashed_log_prob(noise, log_std, x), noise, std, raw == log_std, tape)

    @without_grad
    def backward_draw(
        self, sample: ActorSample, du: Tensor, dlog_prob: Tensor, rows: int | None = None, scale: float = 1.0
    ) -> None:
        """Overwrite ``flat.grad`` with the gradient of L, given dL/dlog_prob (B,) and dL/du (B, A) divided by ``scale``.

        ``du`` may also be (N, B, A), N terms of that.

        With x = mean + std ε and u = tanh x::

            dL/dx       = dL/du (1 - u²) + dL/dlogp · 2u          since dlogp/dx = 2 tanh x
            dL/dmean    = dL/dx
            dL/dlog_std = dL/dx · std ε - dL/dlogp                where log_std is not clamped

        ``rows``: only the first rows of the draw take part (``du`` and ``dlog_prob`` have that many).
        """
        u, noise, std, free = (t[:rows] for t in (sample.u, sample.noise, sample.std, sample.free))
        if sample.tape.compiled:
            from robot_rl.nn import compiled_losses

            terms = du if du.dim() == 3 else du.unsqueeze(0)
            dy = compiled_losses.draw_backward(terms, scale, dlog_prob, u, noise, std, free)
            self.backward(sample.tape, dy, rows=rows)
            return
        du = (du.sum(0) if du.dim() == 3 else du) * scale
        dlog_prob = dlog_prob.unsqueeze(-1)
        dx = torch.addcmul(du, u, 2 * dlog_prob - du * u)
        dlog_std = (dx * std).mul_(noise).sub_(dlog_prob).mul_(free)
        self.backward(sample.tape, torch.cat((dx, dlog_std), -1).unsqueeze(0), rows=rows)


def squashed_log_prob(noise: Tensor, log_std: Tensor, x: Tensor) -> Tensor:
    """Log density (B,) in unit space of u = tanh(x), x = mean + exp(log_std) noise.

    Σ -noise²/2 - log_std - log √2π - log(1 - tanh² x), the last of which is 2 (log 2 - x + log sigmoid 2x): few operations,
    because each costs more than the numbers in it.
    """
    twice = x + x
    terms = torch.addcmul(log_std, noise, noise, value=0.5) - twice
    constant = x.shape[-1] * (HALF_LOG_2PI + 2 * math.log(2))
    return -constant - terms.add(F.logsigmoid(twice), alpha=2).sum(-1)


class Temperature(nn.Module):
    """α = exp(log α), driven so that the policy's entropy meets a target: loss -log α (log π + H̄).

    Args:
        target_entropy: H̄ in unit space.
        initial: α at the start.
        lr: of Adam on log α.
        floor: α never falls below it (0: no floor).
        fixed: α stays at ``initial``.
    """

    def __init__(
        self,
        target_entropy: float,
        *,
        initial: float = 1.0,
        lr: float = 3e-4,
        floor: float = 0.0,
        fixed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # A fixed α of exactly 0 switches entropy off; a learned one lives in log space and must be positive.
        if initial < 0 or (initial == 0 and not fixed) or floor < 0 or floor > initial:
            raise ValueError(
                f"Temperature({initial=}, {floor=}, {fixed=}): 0 <= floor <= initial, and initial > 0 unless fixed"
            )
        self.target_entropy, self.floor, self.fixed = target_entropy, floor, fixed
        start = torch.tensor(initial, device=device, dtype=dtype or torch.get_default_dtype())
        self.log_alpha = nn.Parameter(start.log())
        self.flat = FlatParameters(self)
        self.optimizer = FlatAdam(self.flat, lr)

    @property
    def alpha(self) -> Tensor:
        """(), detached; a fresh tensor, so later steps do not change it."""
        return self.log_alpha.detach().exp()

    @without_grad
    def step(self, log_prob: Tensor) -> Tensor:
        """One Adam step from log densities (B,); returns the loss, (). Does nothing but that when fixed."""
        if self.optimizer.compiled:
            from robot_rl.nn import compiled_losses

            floor = math.log(self.floor) if self.floor > 0 else -math.inf
            return compiled_losses.temperature(self.flat, self.optimizer, log_prob, self.fixed, self.target_entropy, floor)
        slope = -(log_prob.mean() + self.target_entropy)  # dloss/dlog α
        loss = self.log_alpha.detach() * slope
        if not self.fixed:
            self.log_alpha.grad.copy_(slope)
            self.optimizer.step()
            if self.floor > 0:
                self.log_alpha.clamp_(min=math.log(self.floor))
        return loss

    def full_state(self) -> dict[str, Tensor]:
        """log α and its optimiser, for an exact resume."""
        return {"log_alpha": self.log_alpha.detach().clone(), **self.optimizer.state_dict()}

    @without_grad
    def load_full_state(self, state: Mapping[str, Tensor]) -> None:
        state = dict(state)
        self.log_alpha.copy_(state.pop("log_alpha"))
        self.optimizer.load_state_dict(state)
