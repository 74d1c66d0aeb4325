"""Learning a coarse-to-fine critic: categorical temporal difference at every level, and demonstrations above all else.

With p_l(b | s) the distribution of bin b at level l (inside the interval that the action lies in), averaged over levels and entries::

    m     = project(R + disc * z, p_target(a' | s'))        a' zoomed with the target network, which also acts
    L_td  = -wmean(Σ_z m log p(a | s))                      C51, Bellemare et al. 2017
    L_bc  = over demonstrations: mean_b max(0, margin - (Q(a) - Q(b)))  [+ mean_b Σ_z max(0, cdf(a) - cdf(b))]
    L     = critic_weight L_td + bc_weight L_bc
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.heads.base import Head
from robot_rl.heads.coarse_to_fine import CoarseToFineHead, ZoomNetwork
from robot_rl.learners.batch import Batch
from robot_rl.learners.config import CoarseToFineLearnerConfig
from robot_rl.learners.objectives import DEMONSTRATION
from robot_rl.learners.updates import frozen_flat
from robot_rl.nn.flat import FlatAdam, FlatParameters, polyak_
from robot_rl.policies.base import BasePolicy
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.types import Stratum

Metrics = dict[str, Tensor]


def project(probability: Tensor, reward: Tensor, discount: Tensor, support: Tensor) -> Tensor:
    """(B, ..., atoms) chances of the values ``support`` (atoms,) to those of reward + discount * support, on the same atoms.

    Mass between two atoms goes to both in proportion; what falls off an end stays on it.
    """
    step = support[1] - support[0]
    moved = (reward[:, None] + discount[:, None] * support).clamp(support[0], support[-1])
    share = (1.0 - ((moved[:, :, None] - support) / step).abs()).clamp(min=0.0)  # (B, from, to)
    flat = probability.flatten(1, -2)
    return torch.bmm(flat, share).view_as(probability)


class CoarseToFineLearner:
    """Trains the online network; the head holds its running average, which chooses in episodes and in targets."""

    def __init__(
        self, base: BasePolicy, head: Head, config: CoarseToFineLearnerConfig, device: torch.device | str = "cpu"
    ) -> None:
        if not isinstance(head, CoarseToFineHead):
            raise ValueError(f"algorithm='cqn' trains a coarse_to_fine head; this one is {head.KIND}")
        self.base, self.config, self.device = base, config, torch.device(device)
        self.head: CoarseToFineHead = head.to(self.device)
        self.online: ZoomNetwork = deepcopy(self.head.network).requires_grad_(True)
        self.flat = FlatParameters(self.online)
        self.average = frozen_flat(self.head.network)
        self.optimizer = FlatAdam(self.flat, config.lr, weight_decay=config.weight_decay)
        self.generator = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.updates = self.actor_updates = 0

    def sample(
        self,
        buffer: ReplayBuffer,
        rng: np.random.Generator,
        size: int,
        ratios: Mapping[Stratum | str, float] | None = None,
        base_samples: Any = None,
    ) -> Batch:
        """``size`` windows."""
        return Batch.from_windows(buffer.sample(size, rng, ratios), self.device)

    # ---- the loss

    def distributions(self, network: ZoomNetwork, conditioning: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, levels, d, bins, atoms) along the intervals of actions (B, d), and their bins (B, levels, d)."""
        centres, bins = self.head.encode(entries)
        logits = [network(conditioning, centre, level) for level, centre in enumerate(centres)]
        return torch.stack(logits, 1), torch.stack(bins, 1)

    @staticmethod
    def taken(distribution: Tensor, bins: Tensor) -> Tensor:
        """(B, levels, d, bins, atoms) at the bins (B, levels, d): (B, levels, d, atoms)."""
        index = bins[..., None, None].expand(*bins.shape, 1, distribution.shape[-1])
        return distribution.gather(3, index)[..., 0, :]

    @torch.no_grad()
    def target(self, batch: Batch, follow_base: bool) -> Tensor:
        """(B, levels, d, atoms): what the chosen bins should say."""
        c = batch.next_conditioning
        if follow_base:
            shape, noise = self.base.spec.noise_shape, None
            if shape is not None:
                noise = torch.randn((len(c), *shape), generator=self.generator, device=self.device)
            entries = self.base.sample(c, noise)[:, : self.head.rows].flatten(1)
        else:
            entries = self.head.zoom(c)
        logits, bins = self.distributions(self.head.network, c, entries)
        return project(self.taken(logits.softmax(-1), bins), batch.reward, batch.discount, self.head.support.to(c.dtype))

    def loss(self, batch: Batch, target: Tensor, weight: Tensor) -> tuple[Tensor, Metrics]:
        """The whole loss, and its parts."""
        c = self.config
        logits, bins = self.distributions(self.online, batch.conditioning, batch.action.flatten(1))
        log_p = logits.log_softmax(-1)
        entropy = -(target * self.taken(log_p, bins)).sum(-1).mean((1, 2))
        critic = (weight * entropy).sum() / weight.sum().clamp_min(1.0)
        metrics = {"critic/loss": critic.detach()}
        if not c.bc_weight:
            return c.critic_weight * critic, metrics
        if batch.stratum is None:
            raise ValueError("bc_weight > 0 tells demonstrations apart by the batch's stratum, and this batch has none")
        shown = (batch.stratum == DEMONSTRATION).to(weight.dtype)
        p = log_p.exp()
        q = p @ self.head.support.to(p.dtype)
        q_taken = q.gather(3, bins[..., None])
        behind = (c.margin - (q_taken - q)).clamp(min=0.0).mean((1, 2, 3))
        if c.dominance:
            cdf = p.cumsum(-1)
            above = (self.taken(cdf, bins)[..., None, :] - cdf).clamp(min=0.0)
            behind = behind + above.sum(-1).mean((1, 2, 3))
        # Without a demonstration in the batch there is nothing to imitate; the released code divides by zero there.
        cloned = (shown * behind).sum() / shown.sum().clamp_min(1.0)
        metrics |= {"critic/margin": cloned.detach(), "critic/q": q_taken.detach().mean()}
        return c.critic_weight * critic + c.bc_weight * cloned, metrics

    def _step(self, batch: Batch, target: Tensor, weight: Tensor) -> Metrics:
        self.flat.zero_grad()
        with torch.enable_grad():
            loss, metrics = self.loss(batch, target, weight)
            loss.backward()
        self.optimizer.step()
        return metrics

    def update(self, batch: Batch, *, train_actor: bool = True, offline: bool = False) -> Metrics:
        """One step of the critic, which is the policy. Before the first one with ``train_actor`` targets follow the base."""
        follow_base = self.actor_updates == 0 and not train_actor
        metrics = self._step(batch, self.target(batch, follow_base), batch.weight)
        polyak_(self.average, self.flat, self.config.tau)
        self.updates += 1
        self.actor_updates += train_actor
        return metrics

    def pretrain(self, batch: Batch) -> Metrics:
        """One step towards the returns themselves."""
        if batch.episode_return is None:
            raise ValueError("pretrain needs episode returns: build the buffer with the extra feature 'episode_return'")
        known = torch.ones_like(batch.weight) if batch.return_known is None else batch.return_known
        shape = (len(batch.reward), self.head.config.levels, self.head.rows * self.head.dims, self.head.config.atoms)
        even = batch.reward.new_full(shape, 1.0 / shape[-1])
        support = self.head.support.to(even.dtype)
        target = project(even, batch.episode_return, torch.zeros_like(batch.discount), support)
        return self._step(batch, target, batch.weight * known)

    def finish_pretraining(self) -> None:
        """The acting network becomes the trained one."""
        self.average.copy_(self.flat)

    # ---- what every learner has

    def check_finite(self) -> None:
        """Raises FloatingPointError when a parameter is not finite."""
        if not bool(torch.isfinite(self.flat.data).all()):
            raise FloatingPointError(f"critic parameters are not finite after {self.updates} updates; lower lr")

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs."""
        return {
            "head": {k: v.clone() for k, v in self.head.state_dict().items()},
            "online": {k: v.clone() for k, v in self.online.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state().clone(),
            "counters": torch.tensor([self.updates, self.actor_updates]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in place."""
        self.head.load_state_dict(state["head"])
        self.online.load_state_dict(state["online"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.updates, self.actor_updates = (int(x) for x in state["counters"])
