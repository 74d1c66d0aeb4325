"""The contract of a head: propose a chunk, given what the base would do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from robot_rl.policies.base import BasePolicy

Mode = Literal["explore", "eval"]


@dataclass
class Proposal:
    """A batch of proposed chunks, normalised.

    Attributes:
        chunk: (B, H, A) what should run; ``chunk_base``: (B, H, A) what the base would have run on the same noise.
        noise: (B, H_w, A_w) what entered the sampler, or None for a base without noise.
        log_prob: (B,) of the head's own action in unit space; NaN where the head has no density.
    """

    chunk: Tensor
    chunk_base: Tensor
    noise: Tensor | None
    log_prob: Tensor
    info: dict[str, Tensor] = field(default_factory=dict)


class Head(nn.Module):
    """Small, versioned, and the only thing that is published to the acting side.

    A fresh head acts exactly like the base policy in ``explore`` mode (residual: bitwise; latent noise: same
    distribution up to its documented bound). ``propose(mode="eval")`` is deterministic given the noise it is handed.
    """

    def propose(self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, generator: torch.Generator, mode: Mode) -> Proposal:
        """``noise`` (B, H_w, A_w) is a draw of the base's prior, keyed by the episode; a latent-noise head replaces it."""
        raise NotImplementedError
