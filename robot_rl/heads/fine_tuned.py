"""The base's own denoiser, trained further, whole or through an adapter, with the frozen base kept beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.policies.adapters import Adapted
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.compact import CompactPolicy
from robot_rl.policies.config import AdapterConfig
from robot_rl.policies.inpainting import instead
from robot_rl.policies.lerobot.diffusion import LeRobotDiffusion

WHOLE = AdapterConfig()


class FineTunedHead(Head):
    """Samples with its own denoiser from the base's encoder and normaliser. A fresh one is the base bit for bit, in both modes.

    What it explores with is the base's prior noise; it needs no other. ``policy`` is a whole policy that shares everything but the
    denoiser with the base (with an adapter, the denoiser's weights too: ``denoiser`` then holds the adapter alone).

    Raises:
        ValueError: the base's weights cannot be trained here, or not by this adapter.
    """

    KIND, continues = "fine_tuned", True

    def __init__(self, base: BasePolicy, adapter: AdapterConfig = WHOLE, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not isinstance(base, CompactPolicy | LeRobotDiffusion):
            raise ValueError(
                f"a fine-tuned head trains the base's own weights, and a {type(base).__name__} does not hand them out; accepted are "
                "compact diffusion and flow policies and LeRobot's diffusion policies, or a latent-noise, residual or edit head"
            )
        self.adapter, self.adapted = adapter, Adapted(base.denoiser, adapter, generator)
        policy = base.with_denoiser(self.adapted.denoiser)
        self.denoiser = self.adapted.trained.requires_grad_(False)
        object.__setattr__(self, "policy", policy)  # not a submodule: only the denoiser is this head's
        self.exploration_dim = 0

    policy: Any  # a CompactPolicy or a LeRobotDiffusion, as the base is

    def merged(self) -> Any:
        """A plain policy of the same chunks and the base's kind, to be saved and used as a base of its own."""
        policy = self.policy.with_denoiser(self.adapted.merge().requires_grad_(False))
        return policy.freeze() if isinstance(policy, CompactPolicy) else policy

    def twin(self, base: BasePolicy) -> FineTunedHead:
        """A head of the same shape and values, to train beside this one."""
        twin = FineTunedHead(base, self.adapter)
        twin.load_state_dict(self.state_dict())
        return twin

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        assert noise is not None
        chunk = instead(base, self.policy).sample(conditioning, noise)
        return Proposal(
            chunk=chunk, chunk_base=base.sample(conditioning, noise), noise=noise,
            log_prob=torch.full((len(chunk),), float("nan"), device=chunk.device),
        )  # fmt: skip
