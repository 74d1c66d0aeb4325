"""Words of a token policy as the steps of a decision, for on-policy learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robot_rl.heads.token import TokenHead
from robot_rl.learners.config import OnPolicyConfig
from robot_rl.nn.flat import FlatParameters
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.openvla.policy import OpenVLAPolicy

if TYPE_CHECKING:
    from robot_rl.learners.on_policy import RoundEpisode


class TokenSteps:
    """Likelihoods of the words that were written, each given those before it."""

    def __init__(self, base: BasePolicy, head: TokenHead, config: OnPolicyConfig) -> None:
        assert isinstance(base, OpenVLAPolicy)
        self.base, self.head, self.config = base, head, config
        head.factors.requires_grad_(True)
        self.flat = FlatParameters(head.factors)

    def trace(self, episode: RoundEpisode) -> Tensor:
        """(D, S) the bins that were written."""
        return self.head.written(episode.conditioning, self.base, episode.exploration)

    def _log_probs(self, prompt: Tensor, trace: Tensor, language: object = None) -> Tensor:
        found = self.base.network.log_probs(prompt, trace, language)
        return (found / self.head.config.temperature).log_softmax(-1)

    def log_prob(self, conditioning: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) log likelihood of every word, and (B,) the divergence from the base summed over them."""
        prompt = self.base.prompts(conditioning)
        own = self._log_probs(prompt, trace, self.head.language)
        of_words = own.gather(-1, trace[..., None]).squeeze(-1)
        if not self.config.kl_base:
            return of_words, torch.zeros_like(of_words[:, 0])
        with torch.no_grad():
            theirs = self._log_probs(prompt, trace)
        return of_words, (own.exp() * (own - theirs)).sum((1, 2))
