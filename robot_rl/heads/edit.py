"""Edit head with an on-the-fly policy: choose among the base's chunks and small edits of them (EXPO, Dong et al. 2025)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from robot_rl.heads.base import Mode, Proposal
from robot_rl.heads.best_of_n import Selection, base_candidates, chosen_proposal, lean_of, pick, score
from robot_rl.heads.config import EditConfig
from robot_rl.heads.correction import CorrectionHead
from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.nn.actor import GaussianTanhActor, squashed_log_prob
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.inpainting import instead


class EditHead(CorrectionHead):
    """K base chunks and E edited ones, a' = clamp(a_base + scale * u), u ~ tanh N(mean(s, a_base), std(s, a_base)); the critic picks.

    The mean starts at zero. The critic is published with the head: it is the learner's target network. A base without noise
    has one chunk to offer, edited or not.
    """

    KIND = "edit"
    critic: nn.Module
    lean: Tensor | None

    def __init__(
        self, base: BasePolicy, config: EditConfig, critic: nn.Module, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, config)
        spec, self.config = base.spec, config
        self.own = FineTunedHead(base) if config.own_base else None
        self.register_buffer("lean", lean_of(config))
        self.prior_draws = 1 if spec.noise_shape is None else config.candidates
        self.edits = min(config.edits, self.prior_draws)
        self.actor = GaussianTanhActor(
            spec.conditioning_dim + self.rows * spec.action.dim, self.basis.width, config.hidden,
            layer_norm=config.layer_norm, last_scale=0.0, generator=generator,
        )  # fmt: skip
        self.critic = critic.requires_grad_(False)
        self._choice_dim = self.prior_draws + self.edits if config.samples else 0
        self.exploration_dim = self.edits * self.basis.width + self._choice_dim

    def sampler(self, base: BasePolicy) -> BasePolicy:
        """What draws the chunks that are edited, in episodes and in targets."""
        return base if self.own is None else instead(base, self.own.policy)

    def select(
        self, conditioning: Tensor, base_rows: Tensor, exploration: Tensor | None, pair: Tensor | None = None
    ) -> tuple[Selection, Tensor]:
        """The one rule: edit the first E of base rows (B, K, n, A), score all, pick.

        Args:
            exploration: (B, exploration_dim) standard normals for the edits and the pick; None for ``eval`` mode.
            pair: (2,) critics that rank alone, see :func:`~robot_rl.heads.best_of_n.score`.

        Returns: the selection, and log probabilities (B, E) of the edits.
        """
        b, e = len(conditioning), self.edits
        rows = base_rows[:, :e].flatten(0, 1)
        mean, log_std = self.actor(self.features(conditioning.repeat_interleave(e, dim=0), rows))
        if exploration is None:
            draws, lots = torch.zeros_like(mean), None
        else:
            draws = exploration[:, : e * self.basis.width].reshape(b * e, -1)
            lots = exploration[:, e * self.basis.width :] if self._choice_dim else None
        x = mean + log_std.exp() * draws
        edited = self.combine(rows, torch.tanh(x)).unflatten(0, (b, e))
        candidates = torch.cat([base_rows, edited], dim=1)
        q = score(self.critic, conditioning, candidates, self.config, self.lean, pair)
        index = pick(q, self.config, lots)
        chosen = candidates[torch.arange(b, device=q.device), index]
        return Selection(index, chosen, q, candidates), squashed_log_prob(draws, log_std, x).unflatten(0, (b, e))

    @torch.no_grad()
    def propose(
        self, conditioning: Tensor, base: BasePolicy, noise: Tensor | None, exploration: Tensor | None, mode: Mode
    ) -> Proposal:
        if mode == "explore" and exploration is None:
            raise ValueError("explore mode needs exploration draws (B, exploration_dim)")
        chunks = base_candidates(self.sampler(base), conditioning, noise, self.prior_draws)
        chosen, log_prob = self.select(conditioning, chunks[:, :, : self.rows], exploration if mode == "explore" else None)
        proposal = chosen_proposal(chosen, chunks, noise, self.rows)
        edited = chosen.index - self.prior_draws
        own = log_prob.gather(1, edited.clamp(min=0).unsqueeze(1)).squeeze(1)
        proposal.log_prob = torch.where(edited >= 0, own, proposal.log_prob)
        return proposal if self.own is None else replace(proposal, chunk_base=base.sample(conditioning, proposal.noise))
