"""Denoising from a noised reference chunk (DemoDiffusion): rough guesses become chunks that the base would make.

    i = round((1 - strength) K);  x = noised_i(reference, w);  x <- step_j(x) for j = i .. K - 1;  a = clamp(x)

The reference is the chunk that followed the recorded state nearest to this one (Euclidean, the base's conditioning). At strength 0
it is returned as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.guidance import need_compact
from robot_rl.heads.guidance_config import ReferenceConfig
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.compact import CompactPolicy


def denoise_reference(base: CompactPolicy, conditioning: Tensor, reference: Tensor, noise: Tensor, strength: float) -> Tensor:
    """(B, C), normalised references (B, H, A) and prior noise (B, H, A) to chunks (B, H, A)."""
    steps = base.config.num_steps
    first = round((1.0 - strength) * steps)
    if first == steps:
        return reference
    x = base.noised(first, reference.flatten(1), noise.flatten(1))
    condition, times = base.chain_inputs(conditioning)
    for i in range(first, steps):
        x = base.chain_step(i, x, condition, times)
    return x.clamp(-1.0, 1.0).unflatten(1, reference.shape[1:])


class ReferenceHead(Head):
    """Follows recorded references through the base's own denoiser; both modes are the same.

    The references are published with the head.

    Args:
        conditioning: (N, C) of recorded states. chunk: (N, H, A) what followed them, normalised.
    """

    KIND = "reference"
    library_conditioning: Tensor
    library_chunk: Tensor

    def __init__(self, base: BasePolicy, config: ReferenceConfig, conditioning: Tensor, chunk: Tensor) -> None:
        super().__init__()
        spec = need_compact(base, "reference denoising").spec
        if not len(conditioning) or chunk.shape != (len(conditioning), spec.horizon, spec.action.dim):
            raise ValueError(
                f"references: {tuple(conditioning.shape)} states with chunks {tuple(chunk.shape)}; accepted is at least one chunk of "
                f"{spec.horizon} rows of {spec.action.dim} actions"
            )
        self.config, self.exploration_dim = config, 0
        self.register_buffer("library_conditioning", conditioning)
        self.register_buffer("library_chunk", chunk.clamp(-1.0, 1.0))

    def nearest(self, conditioning: Tensor) -> Tensor:
        """(B, H, A) the reference of every state."""
        return self.library_chunk[torch.cdist(conditioning, self.library_conditioning).argmin(1)]

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        assert isinstance(base, CompactPolicy)
        assert noise is not None
        reference = self.nearest(conditioning)
        chunk = denoise_reference(base, conditioning, reference, noise, self.config.strength)
        return Proposal(
            chunk=chunk, chunk_base=base.sample(conditioning, noise), noise=noise,
            log_prob=torch.full((len(chunk),), float("nan"), device=chunk.device),
            info={"distance": (chunk - reference).square().mean((1, 2)).sqrt()},
        )  # fmt: skip
