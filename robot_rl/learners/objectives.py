"""How each kind of head climbs the critic: noise-aliased DSRL, plain SAC in noise space, and residual correction."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from robot_rl.heads.base import Head
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.residual import ResidualHead
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.support import Support, penalised
from robot_rl.learners.updates import climb, load_network_state, make_critic, network_state
from robot_rl.nn.actor import ActorSample, Temperature
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.grad import without_grad
from robot_rl.policies.base import BasePolicy, differentiable
from robot_rl.replay.sampling import CODE
from robot_rl.types import Stratum

Metrics = dict[str, Tensor]
DEMONSTRATION = CODE[Stratum.DEMONSTRATION]


class HeadObjective(Protocol):
    """What one kind of head adds to the core. Every method works on normalised tensors with a leading batch axis."""

    critic_input_dim: int

    def critic_input(self, batch: Batch) -> Tensor:
        """(B, D) what the critic reads for the windows' executed actions."""
        ...

    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        """(B, D) input at the next state and (B,) log probability. ``follow_base``: the base acts, not the head."""
        ...

    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        """One round of whatever trains the head (with ``actor_step``) and its helpers (always)."""
        ...

    def full_state(self) -> dict[str, Any]: ...

    def load_full_state(self, state: dict[str, Any]) -> None: ...


def make_objective(
    base: BasePolicy,
    head: Head,
    config: OffPolicyConfig,
    generator: torch.Generator,
    init: torch.Generator,
    device: torch.device,
) -> HeadObjective:
    """The objective that ``config.algorithm`` names. Raises ValueError when the head is of another kind."""
    kinds: dict[str, tuple[type[Head], Any]] = {
        "dsrl_na": (LatentNoiseHead, NoiseAliased),
        "dsrl_sac": (LatentNoiseHead, NoiseSAC),
        "residual": (ResidualHead, Residual),
    }
    head_type, objective = kinds[config.algorithm]
    if not isinstance(head, head_type):
        raise ValueError(f"algorithm={config.algorithm!r} trains a {head_type.KIND} head; this one is {head.KIND}")
    return objective(base, head, config, generator, init, device)


class _NoiseObjective:
    """What both DSRL variants share: a squashed Gaussian actor over noise, and its temperature."""

    kl_share = 1.0

    def __init__(
        self, base: BasePolicy, head: LatentNoiseHead, config: OffPolicyConfig, generator: torch.Generator,
        init: torch.Generator, device: torch.device,
    ) -> None:  # fmt: skip
        self.base, self.head, self.config, self.generator = base, head, config, generator
        self.optimizer = FlatAdam(head.actor.flat, config.actor_lr)
        self.temperature = Temperature(
            config.target_entropy, initial=config.initial_alpha, lr=config.temperature_lr, floor=config.alpha_floor,
            fixed=config.fixed_alpha, device=device,
        )  # fmt: skip
        assert base.spec.noise_shape is not None
        self.noise_shape = base.spec.noise_shape
        self.noise_dim = self.noise_shape[0] * self.noise_shape[1]
        self.features = base.spec.conditioning_dim

    @property
    def alpha(self) -> Tensor:
        return self.temperature.alpha

    def prior(self, batch: int) -> Tensor:
        return torch.randn((batch, *self.noise_shape), generator=self.generator, device=self.generator.device)

    def rest(self, batch: int) -> Tensor | None:
        """Prior noise for entries the head does not control, drawn only when there are any."""
        return None if self.head.basis.covers_all else self.prior(batch)

    def draw(self, conditioning: Tensor) -> tuple[ActorSample, Tensor]:
        sample = self.head.actor.draw(conditioning, self.generator)
        return sample, self.head.to_noise(sample.u, self.rest(len(conditioning)))

    def step_actor(self, conditioning: Tensor, sample: ActorSample, noise_gradient: Tensor) -> Metrics:
        """Actor step on L = mean(alpha log pi - Q) [+ kl_base KL], given the gradient of mean(-Q) in the noise."""
        b = len(conditioning)
        alpha = self.alpha
        du = self.head.noise_gradient_to_u(noise_gradient.unflatten(1, self.noise_shape))
        self.head.actor.backward_draw(sample, du, (alpha / b).expand(b))
        metrics = {"actor/alpha": alpha, "actor/entropy": -sample.log_prob.mean(), "actor/std": sample.std.mean()}
        if self.config.kl_base > 0:
            gradient = self.head.actor.flat.grad.clone()
            self.head.actor.flat.zero_grad()
            mean, log_std = self.head.actor(conditioning)
            kl = _prior_divergence(mean, log_std).mean()
            (self.kl_weight * kl).backward()
            self.head.actor.flat.grad.add_(gradient)
            metrics["actor/kl_base"] = kl.detach()
        self.optimizer.step()
        self.temperature.step(sample.log_prob)
        return metrics

    @property
    def kl_weight(self) -> float:
        """``kl_base``, less where few demonstrations stand behind the base."""
        return self.config.kl_base * self.kl_share

    @without_grad
    def divergence(self, conditioning: Tensor) -> Tensor:
        """(B,) weighted KL(head || N(0, I)) before squashing."""
        return self.kl_weight * _prior_divergence(*self.head.actor(conditioning))

    def full_state(self) -> dict[str, Any]:
        return {"actor_optimizer": self.optimizer.state_dict(), "temperature": self.temperature.full_state()}

    def load_full_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["actor_optimizer"])
        self.temperature.load_full_state(state["temperature"])


def _prior_divergence(mean: Tensor, log_std: Tensor) -> Tensor:
    return 0.5 * ((2 * log_std).exp() + mean.square() - 1 - 2 * log_std).sum(-1)


class NoiseAliased(_NoiseObjective):
    """DSRL-NA: Q^A(s, chunk) learns from any executed action; Q^W(s, w) is its image under the base; the actor climbs Q^W.

    With ``actor_gradient="sampler"``, or ``"auto"`` over a base that can be differentiated, the actor climbs Q^A through the base's
    sampler instead, and no Q^W exists.

    Raises:
        ValueError: ``sampler`` over a base that cannot be differentiated.
    """

    def __init__(
        self, base: BasePolicy, head: LatentNoiseHead, config: OffPolicyConfig, generator: torch.Generator,
        init: torch.Generator, device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(base, head, config, generator, init, device)
        self.rows = base.spec.n_action_steps
        self.critic_input_dim = self.features + self.rows * base.spec.action.dim
        self.rounds = 0
        self.noise_critic: CriticEnsemble | None = None
        if config.actor_gradient == "sampler" and not differentiable(base):
            raise ValueError(
                f"actor_gradient='sampler': this base ({base.spec.sampler}) gives no gradient from noise to chunk; accepted are auto and distilled"
            )
        if config.actor_gradient == "distilled" or not differentiable(base):
            self.noise_critic = make_critic(config, self.features + self.noise_dim, init, device)
            self.noise_optimizer = FlatAdam(self.noise_critic.flat, config.critic_lr)

    def chunk_input(self, conditioning: Tensor, noise: Tensor) -> Tensor:
        chunk = self.base.sample(conditioning, noise)[:, : self.rows]
        return torch.cat([conditioning, chunk.flatten(1)], dim=-1)

    def critic_input(self, batch: Batch) -> Tensor:
        return torch.cat([batch.conditioning, batch.action.flatten(1)], dim=-1)

    @without_grad
    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        c = batch.next_conditioning
        if follow_base:
            return self.chunk_input(c, self.prior(len(c))), torch.zeros(len(c), device=c.device)
        sample, noise = self.draw(c)
        return self.chunk_input(c, noise), sample.log_prob

    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        metrics: Metrics = {}
        c = batch.conditioning
        if actor_step:
            sample, noise = self.draw(c)
            if self.noise_critic is not None:
                x = torch.cat([c, noise.flatten(1)], dim=-1)
                value, gradient = climb(
                    self.noise_critic, x, self.config.actor_reduce, slice(self.features, None), self.generator
                )
            else:
                value, gradient = self._climb_through_sampler(critic, c, noise)
            metrics |= self.step_actor(c, sample, gradient)
            metrics["actor/value"] = value.mean()
        self.rounds += 1
        if self.noise_critic is not None and self.rounds % self.config.distill_every == 0:
            metrics |= self._distill(batch, critic)
        return metrics

    def _climb_through_sampler(self, critic: CriticEnsemble, c: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        leaf = noise.detach().requires_grad_(True)
        chunk = self.base.sample(c, leaf, grad=True)[:, : self.rows].flatten(1)  # type: ignore[call-arg]
        x = torch.cat([c, chunk.detach()], dim=-1)
        value, gradient = climb(critic, x, self.config.actor_reduce, slice(self.features, None), self.generator)
        (through,) = torch.autograd.grad(chunk, leaf, gradient)
        return value, through.flatten(1)

    @without_grad
    def _distill(self, batch: Batch, critic: CriticEnsemble) -> Metrics:
        assert self.noise_critic is not None
        c = batch.conditioning
        from_actor = int(self.config.distill_actor_share * len(c))
        if batch.base_noise is None or batch.base_rows is None:
            noise, x = self.prior(len(c)), None
        else:  # drawn before: the base need not be asked again
            each = torch.arange(len(c), device=c.device)
            which = torch.randint(batch.base_noise.shape[1], (len(c),), generator=self.generator, device=c.device)
            noise, x = batch.base_noise[each, which], torch.cat([c, batch.base_rows[each, which].flatten(1)], dim=-1)
        if from_actor:
            noise[:from_actor] = self.draw(c[:from_actor])[1]
        if x is None:
            x = self.chunk_input(c, noise)
        elif from_actor:
            x[:from_actor] = self.chunk_input(c[:from_actor], noise[:from_actor])
        target = critic.value(x)  # (N, B): head i distils head i
        result = self.noise_critic.loss_and_grad(torch.cat([c, noise.flatten(1)], dim=-1), target)
        self.noise_optimizer.step()
        error = (result.q - target).abs().mean(0)
        metrics = {"distill/loss": result.loss, "distill/error_prior": error[from_actor:].mean()}
        if from_actor:
            metrics["distill/error_actor"] = error[:from_actor].mean()
        return metrics

    def full_state(self) -> dict[str, Any]:
        state = super().full_state() | {"rounds": torch.tensor(self.rounds)}
        if self.noise_critic is not None:
            state["noise_critic"] = network_state(self.noise_critic, self.noise_optimizer)
        return state

    def load_full_state(self, state: dict[str, Any]) -> None:
        super().load_full_state(state)
        self.rounds = int(state["rounds"])
        if self.noise_critic is not None:
            load_network_state(self.noise_critic, self.noise_optimizer, state["noise_critic"])


class NoiseSAC(_NoiseObjective):
    """DSRL-SAC: plain soft actor-critic with the noise as action. Trains on decision starts, never calls the base."""

    def __init__(
        self, base: BasePolicy, head: LatentNoiseHead, config: OffPolicyConfig, generator: torch.Generator,
        init: torch.Generator, device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(base, head, config, generator, init, device)
        self.critic_input_dim = self.features + self.noise_dim

    def critic_input(self, batch: Batch) -> Tensor:
        if batch.noise is None:
            raise ValueError(
                "dsrl_sac trains on stored noise: sample windows with stride='decision' from a store that recorded it"
            )
        return torch.cat([batch.conditioning, batch.noise.flatten(1)], dim=-1)

    @without_grad
    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        c = batch.next_conditioning
        if follow_base:
            return torch.cat([c, self.prior(len(c)).flatten(1)], dim=-1), torch.zeros(len(c), device=c.device)
        sample, noise = self.draw(c)
        return torch.cat([c, noise.flatten(1)], dim=-1), sample.log_prob

    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        if not actor_step:
            return {}
        c = batch.conditioning
        sample, noise = self.draw(c)
        x = torch.cat([c, noise.flatten(1)], dim=-1)
        value, gradient = climb(critic, x, self.config.actor_reduce, slice(self.features, None), self.generator)
        return self.step_actor(c, sample, gradient) | {"actor/value": value.mean()}


class Residual:
    """Deterministic policy gradient on the combined, clamped action, with target smoothing (TD3, Fujimoto et al. 2018)."""

    support: Support | None = None

    def __init__(
        self, base: BasePolicy, head: ResidualHead, config: OffPolicyConfig, generator: torch.Generator,
        init: torch.Generator, device: torch.device,
    ) -> None:  # fmt: skip
        self.base, self.head, self.config, self.generator = base, head, config, generator
        self.optimizer = FlatAdam(head.actor.flat, config.actor_lr)
        self.features = base.spec.conditioning_dim
        self.critic_input_dim = self.features + head.rows * base.spec.action.dim
        self.noise_optimizer: FlatAdam | None = None
        if head.noise_model is not None:
            self.noise_optimizer = FlatAdam(head.noise_model.network.flat, config.critic_lr)

    def base_rows(self, conditioning: Tensor) -> Tensor:
        shape, noise = self.base.spec.noise_shape, None
        if shape is not None:
            noise = torch.randn((len(conditioning), *shape), generator=self.generator, device=conditioning.device)
        return self.base.sample(conditioning, noise)[:, : self.head.rows]

    def critic_input(self, batch: Batch) -> Tensor:
        return torch.cat([batch.conditioning, batch.action.flatten(1)], dim=-1)

    @without_grad
    def next_input(self, batch: Batch, follow_base: bool) -> tuple[Tensor, Tensor]:
        c = batch.next_conditioning
        rows = self.base_rows(c)
        if not follow_base:
            u = self.head.unit_action(c, rows)
            jitter = torch.randn(u.shape, generator=self.generator, device=c.device) * self.head.config.exploration_std
            limit = self.config.smoothing_clip
            rows = self.head.combine(rows, (u + jitter.clamp(-limit, limit)).clamp(-1.0, 1.0))
        return torch.cat([c, rows.flatten(1)], dim=-1), torch.zeros(len(c), device=c.device)

    def improve(self, batch: Batch, critic: CriticEnsemble, actor_step: bool) -> Metrics:
        guided = self._fit_noise(batch) if self.noise_optimizer is not None else {}
        if not actor_step:
            return guided
        c = batch.conditioning
        rows = self.base_rows(c)
        actor = self.head.actor
        actor.flat.zero_grad()
        u = self.head.unit_action(c, rows)
        combined = self.head.combine(rows, u.detach())
        x = torch.cat([c, combined.flatten(1)], dim=-1)
        value, gradient = climb(critic, x, self.config.actor_reduce, slice(self.features, None), self.generator)
        gradient, found = penalised(self, c, combined, value, gradient)
        u.backward(self.head.combine_gradient_to_u(rows, u.detach(), gradient.unflatten(1, rows.shape[1:])))
        self.optimizer.step()
        return {"actor/value": value.mean(), "actor/residual": u.detach().abs().mean(), **found, **guided}

    def _fit_noise(self, batch: Batch) -> Metrics:
        """DGN: maximum likelihood of clip((a_demo - a_base) / scale) - u(s) over demonstrations; no cloning of the actor itself."""
        head, model = self.head, self.head.noise_model
        if batch.stratum is None:
            raise ValueError("guided exploration tells demonstrations apart by the batch's stratum, and this batch has none")
        assert model is not None
        assert self.noise_optimizer is not None
        c = batch.conditioning
        weight = batch.weight * (batch.stratum == DEMONSTRATION)
        with torch.no_grad():
            rows = self.base_rows(c)
            wanted = ((batch.action - rows) / head.scale.clamp_min(1e-6) * (head.scale > 0)).clamp(-1.0, 1.0)
            gap = wanted.flatten(1) - head.unit_action(c, rows) * (head.scale > 0).repeat(head.rows)
        model.network.flat.zero_grad()
        with torch.enable_grad():
            per_row = model.negative_log_likelihood(head.features(c, rows), gap)
            loss = (weight * per_row).sum() / weight.sum().clamp_min(1.0)
            loss.backward()
        if bool(weight.any()):
            self.noise_optimizer.step()
        return {"guided/loss": loss.detach(), "guided/gap": gap.abs().mean()}

    def full_state(self) -> dict[str, Any]:
        state = {"actor_optimizer": self.optimizer.state_dict()}
        return state if self.noise_optimizer is None else state | {"noise_optimizer": self.noise_optimizer.state_dict()}

    def load_full_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["actor_optimizer"])
        if self.noise_optimizer is not None:
            self.noise_optimizer.load_state_dict(state["noise_optimizer"])
