"""Off-policy recipes are configuration: this is all there is to choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robot_rl.learners.reduce import Reduction, check_reduction


@dataclass(frozen=True)
class OffPolicyConfig:
    """The choices that make a recipe.

    Attributes:
        algorithm: ``dsrl_na`` (critic on chunks, distilled to noise), ``dsrl_sac`` (critic on noise, decision starts
            only), ``residual``.
        n_critics, hidden, layer_norm: of every critic ensemble.
        gamma: discount per environment step. tau: target smoothing.
        critic_lr, actor_lr, temperature_lr: Adam.
        target_reduce, actor_reduce: how N critics become one value.
        entropy_backup: subtract alpha log pi in the target (DSRL does; the default does not).
        initial_alpha, alpha_floor, fixed_alpha, target_entropy: of the temperature; entropy is that of unit space.
        actor_every: critic updates an actor update.
        critic_grad_clip: largest gradient norm of a critic step; 0 turns it off.
        distill_every: critic updates a noise-critic update (``dsrl_na``).
        distill_actor_share: share of distillation noise drawn from the actor instead of the prior.
        actor_gradient: ``distilled`` climbs the noise critic; ``sampler`` differentiates the chunk critic through the
            base's sampler (needs a base that can), which needs no distillation.
        kl_base: weight of KL(head || N(0, I)) before squashing in the actor loss; never beside a temperature.
        value_max, value_min: bounds of what a return can be, to clamp targets with; None leaves them open.
    """

    algorithm: Literal["dsrl_na", "dsrl_sac", "residual"] = "dsrl_na"
    n_critics: int = 5
    hidden: tuple[int, ...] = (256, 256, 256)
    layer_norm: bool = True
    gamma: float = 0.99
    tau: float = 0.005
    critic_lr: float = 3e-4
    actor_lr: float = 3e-4
    temperature_lr: float = 3e-4
    target_reduce: Reduction = "min_pair"
    actor_reduce: Reduction = "mean"
    entropy_backup: bool = False
    initial_alpha: float = 1.0
    alpha_floor: float = 0.0
    fixed_alpha: bool = False
    target_entropy: float = 0.0
    actor_every: int = 1
    critic_grad_clip: float = 0.0
    distill_every: int = 2
    distill_actor_share: float = 0.0
    actor_gradient: Literal["distilled", "sampler"] = "distilled"
    kl_base: float = 0.0
    value_min: float | None = None
    value_max: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_critics", "actor_every", "distill_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are integers >= 1")
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"gamma={self.gamma}: accepted are 0 < gamma <= 1")
        if not 0.0 <= self.distill_actor_share <= 1.0:
            raise ValueError(f"distill_actor_share={self.distill_actor_share}: accepted are 0 to 1")
        if self.kl_base > 0 and not (self.fixed_alpha and self.initial_alpha == 0.0):
            raise ValueError(
                "kl_base > 0 with a temperature: one density cannot carry both; set fixed_alpha and initial_alpha=0"
            )
        for name in ("target_reduce", "actor_reduce"):
            check_reduction(getattr(self, name), self.n_critics, name)
