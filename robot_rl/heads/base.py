"""The contract of a head: propose a chunk, given what the base would do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from robot_rl.policies.base import BasePolicy

Mode = Literal["explore", "eval"]


@dataclass
class Proposal:
    """A batch of proposed chunks, normalised.

    Attributes:
        chunk: (B, H, A) what should run; ``chunk_base``: (B, H, A) what the base itself makes of ``noise``.
        noise: (B, H_w, A_w) what entered the sampler, or None for a base without noise.
        log_prob: (B,) of the head's own action in unit space; NaN where the head has no density.
        candidate_index: (B,) which of several candidates was chosen, or None for a head that makes one.
    """

    chunk: Tensor
    chunk_base: Tensor
    noise: Tensor | None
    log_prob: Tensor
    candidate_index: Tensor | None = None
    info: dict[str, Tensor] = field(default_factory=dict)


class Head(nn.Module):
    """Small, versioned, and the only thing that is published to the acting side.

    All randomness is handed in, so that what a head does in an episode depends on that episode's seed and on nothing
    else. A fresh head acts like the base policy: bitwise for a residual, and in distribution (up to its documented
    bound) for latent noise in ``explore`` mode.

    Attributes:
        exploration_dim: width of the standard normals that ``explore`` mode consumes.
        continues: whether chunks follow where ``base.sample`` leads, so that they continue a running chunk when that does
            (:mod:`robot_rl.policies.inpainting`).
        prior_draws: K, how many draws of the base's prior a decision reads; more than one for heads that choose.
    """

    KIND: ClassVar[str]
    exploration_dim: int
    continues: bool = False
    prior_draws: int = 1

    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        """Propose a batch of chunks.

        Args:
            conditioning: (B, C) from ``base.encode``.
            noise: (B, H_w, A_w) a draw of the base's prior; (B, K, H_w, A_w) where ``prior_draws`` K is more than one.
            exploration: (B, exploration_dim) standard normals; not read in ``eval`` mode.
            mode: ``explore`` samples, ``eval`` is the head's deterministic action.
        """
        raise NotImplementedError


def prior_shape(head: Head | None, base: BasePolicy, batch: int) -> tuple[int, ...] | None:
    """Shape of the prior noise that ``propose`` wants for ``batch`` decisions, or None for a base that takes none."""
    if base.spec.noise_shape is None:
        return None
    draws = 1 if head is None else head.prior_draws
    return (batch, *((draws,) if draws > 1 else ()), *base.spec.noise_shape)
