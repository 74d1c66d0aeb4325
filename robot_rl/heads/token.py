"""A low-rank correction of a token policy's language model: it writes the words itself, so their likelihoods can be learned from."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from robot_rl.heads.base import Head, Mode, Proposal
from robot_rl.heads.config import TokenConfig
from robot_rl.policies.adapters import LoRALinear, replace_module
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.openvla.policy import OpenVLAPolicy


class TokenHead(Head):
    """Writes with the base's language model plus LoRA factors in its linear layers (Hu et al. 2022), which alone are trained and published.

    ``explore`` mode draws every word from its distribution at ``temperature``, ``eval`` mode does what the base does: the likeliest
    words, or with ``decoding=sample`` those at the quantiles of the prior's noise. A fresh one in ``eval`` mode is the base bit for bit.

    Raises:
        ValueError: the base does not write words.
    """

    KIND = "token"

    def __init__(self, base: BasePolicy, config: TokenConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not isinstance(base, OpenVLAPolicy):
            raise ValueError(
                f"a token head trains a language model that writes actions, and a {type(base).__name__} has none; accepted are OpenVLA "
                "checkpoints"
            )
        self.config, self.count = config, base.count
        self.exploration_dim = base.count
        theirs = base.network.language
        language = deepcopy(
            theirs, {id(t): t for t in (*theirs.parameters(), *theirs.buffers())}
        )  # its own modules, the base's numbers
        found = {n: m for n, m in language.model.layers.named_modules() if n.rpartition(".")[2] in config.layers}
        if not found:
            raise ValueError(f"head.token.layers={config.layers}: this language model has none of them")
        factors = {n: LoRALinear(m, config.rank, config.alpha, generator) for n, m in found.items()}
        for name, layer in factors.items():
            replace_module(language.model.layers, name, layer)
        self.factors = nn.ModuleDict({n.replace(".", "_"): m for n, m in factors.items()}).requires_grad_(False)
        self._names = list(found)
        object.__setattr__(self, "language", language)  # not a submodule: only the factors are this head's

    language: Any

    def merged(self) -> dict[str, Tensor]:
        """Weights of the base's language model with the factors worked in, by their names in it; only those that changed."""
        found = (m for m in self.factors.values() if isinstance(m, LoRALinear))
        return {f"model.layers.{n}.weight": m.merge().weight.data for n, m in zip(self._names, found, strict=True)}

    @torch.no_grad()
    def written(self, conditioning: Tensor, base: BasePolicy, exploration: Tensor) -> Tensor:
        """(B, H * A) the bins that ``explore`` mode writes for these draws (B, H * A)."""
        assert isinstance(base, OpenVLAPolicy)
        return base.draw(base.prompts(conditioning), exploration, self.config.temperature, self.language)

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        assert isinstance(base, OpenVLAPolicy)
        prompt = base.prompts(conditioning)
        if mode == "explore":
            if exploration is None:
                raise ValueError("explore mode needs exploration draws (B, exploration_dim)")
            written = base.draw(prompt, exploration, self.config.temperature, self.language)
        elif noise is None:
            written = base.greedy(prompt, self.language)
        else:
            written = base.draw(prompt, noise.flatten(1), base.options.temperature, self.language)
        return Proposal(
            chunk=base.values(written), chunk_base=base.sample(conditioning, noise), noise=noise,
            log_prob=torch.full((len(conditioning),), float("nan"), device=conditioning.device),
        )  # fmt: skip
