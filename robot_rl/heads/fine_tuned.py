"""The base's own denoiser, trained further: full fine-tuning of a compact policy with the frozen base kept beside it."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.compact import CompactPolicy


class FineTunedHead(Head):
    """Samples with its own denoiser from the base's encoder and normaliser. A fresh one is the base bit for bit, in both modes.

    What it explores with is the base's prior noise; it needs no other. ``policy`` is a whole compact policy that shares
    everything but the denoiser with the base.

    Raises:
        ValueError: the base is not a compact policy, so that its weights cannot be trained here.
    """

    KIND = "fine_tuned"

    def __init__(self, base: BasePolicy) -> None:
        super().__init__()
        if not isinstance(base, CompactPolicy):
            raise ValueError(
                f"a fine-tuned head trains the base's own weights, and a {type(base).__name__} does not hand them out; accepted are "
                "compact diffusion and flow policies, or a latent-noise, residual or edit head"
            )
        denoiser = deepcopy(base.denoiser)
        policy = object.__new__(type(base))
        policy.__dict__.update(base.__dict__)
        policy.__dict__["_modules"] = {**base._modules, "denoiser": denoiser}
        self.denoiser = denoiser.requires_grad_(False)
        object.__setattr__(self, "policy", policy)  # not a submodule: only the denoiser is this head's
        self.exploration_dim = 0

    policy: CompactPolicy

    def twin(self, base: BasePolicy) -> FineTunedHead:
        """A fresh head of the same shape, to train beside this one."""
        return FineTunedHead(base)

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        assert noise is not None
        chunk = self.policy.sample(conditioning, noise)
        return Proposal(
            chunk=chunk, chunk_base=base.sample(conditioning, noise), noise=noise,
            log_prob=torch.full((len(chunk),), float("nan"), device=chunk.device),
        )  # fmt: skip
