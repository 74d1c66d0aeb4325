"""One update of the off-policy learner written from the formulas, for the tests of several recipes."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from robot_rl.learners.reduce import draw_pair, reduce


class Reference:
    """One update from the formulas, sample by sample where it chooses; the learner's random draws in the same order."""

    def __init__(self, learner) -> None:
        self.c, self.base, self.n = learner.config, learner.base, learner.base.spec.n_action_steps
        self.head, self.critic, self.target = (deepcopy(x) for x in (learner.head, learner.critic, learner.target))
        self.alpha, self.g = learner.config.initial_alpha, torch.Generator()
        self.g.set_state(learner.generator.get_state())
        self.critic.flat.zero_grad()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g)

    def q(self, critic, s: Tensor, a: Tensor) -> Tensor:
        """(N,) values of one state and chunk, each critic by itself."""
        return critic(torch.cat([s, a.flatten()])[None])[:, 0]

    def correct(self, rows: Tensor, x: Tensor) -> Tensor:
        u = torch.tanh(x).unflatten(-1, rows.shape[-2:])
        return (rows + self.head.scale * u).clamp(-1, 1)

    def density(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        normal = torch.distributions.Normal(mean, std)
        return (normal.log_prob(x) - torch.log(1 - torch.tanh(x) ** 2)).sum(-1)

    def gaussian(self, features: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.head.actor(features)
        x = mean + log_std.exp() * draw
        return x, self.density(x, mean, log_std.exp())

    def candidates(self, c: Tensor, cached: Tensor | None, k: int) -> Tensor:
        b, spec = len(c), self.base.spec
        if cached is not None:
            keep = torch.rand(cached.shape[:2], generator=self.g).argsort(1, descending=True)[:, :k]
            return torch.stack([cached[i, keep[i]] for i in range(b)])
        noise = self.randn(b, *((k,) if k > 1 else ()), *spec.noise_shape).reshape(b, k, *spec.noise_shape)
        return torch.stack(
            [torch.cat([self.base.sample(c[i : i + 1], noise[i, j][None]) for j in range(k)]) for i in range(b)]
        )[:, :, : self.n]

    def choose(self, c: Tensor, rows: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """The selection rule: every candidate scored by the target network alone."""
        h, chosen, density = self.head.config, [], []
        edits = getattr(self.head, "edits", 0)
        width = rows[0, 0].numel()
        pair = draw_pair(self.c.n_critics, self.g) if h.select_reduce == "min_pair" else slice(None)
        how = "min" if h.select_reduce == "min_pair" else h.select_reduce
        for i in range(len(c)):
            options = list(rows[i])
            logs = [torch.zeros(()) for _ in options]
            for j in range(edits):
                x, log_prob = self.gaussian(
                    torch.cat([c[i], rows[i, j].flatten()])[None], draws[i, j * width : (j + 1) * width][None]
                )
                options.append(self.correct(rows[i, j], x[0]))
                logs.append(log_prob[0])
            scores = torch.stack([reduce(self.q(self.target, c[i], o)[pair][:, None], how, k=h.select_k)[0] for o in options])
            if h.temperature > 0:
                lots = draws[i, edits * width :]
                uniform = torch.distributions.Normal(0.0, 1.0).cdf(lots)
                scores = scores / h.temperature - torch.log(-torch.log(uniform))
            best = int(scores.argmax())
            chosen.append(options[best])
            density.append(logs[best])
        return torch.stack(chosen), torch.stack(density)

    def act(self, c: Tensor, cached: Tensor | None, follow_base: bool) -> tuple[Tensor, Tensor]:
        kind, zeros = self.c.algorithm, torch.zeros(len(c))
        if follow_base:
            return self.candidates(c, cached, 1)[:, 0], zeros
        if kind == "chunk_sac":
            x, log_prob = self.gaussian(c, self.randn(len(c), self.head.exploration_dim))
            return torch.tanh(x).unflatten(1, (self.n, -1)), log_prob
        if kind == "residual_sac":
            rows = self.candidates(c, None, 1)[:, 0]
            x, log_prob = self.gaussian(torch.cat([c, rows.flatten(1)], 1), self.randn(len(c), self.head.exploration_dim))
            return self.correct(rows, x), log_prob
        rows = self.candidates(c, cached, self.head.config.candidates)
        draws = self.randn(len(c), self.head.exploration_dim) if self.head.exploration_dim else None
        return self.choose(c, rows, draws)

    @torch.no_grad()
    def target_value(self, b, follow_base: bool) -> Tensor:
        a, log_prob = self.act(b.next_conditioning, b.next_base_rows, follow_base or self.c.backup == "base")
        q = self.target(torch.cat([b.next_conditioning, a.flatten(1)], 1))
        v = reduce(q, self.c.target_reduce, self.g)
        if self.c.entropy_backup:
            v = v - self.alpha * log_prob
        return b.reward + b.discount * v

    def critic_loss(self, b, y: Tensor) -> Tensor:
        q = self.critic(torch.cat([b.conditioning, b.action.flatten(1)], 1))
        valid = max(float(b.weight.sum()), 1.0)
        return sum(0.5 * sum(b.weight[j] * (q[i, j] - y[j]) ** 2 for j in range(len(y))) / valid for i in range(len(q)))

    def actor_loss(self, b) -> Tensor:
        c = b.conditioning
        if self.c.algorithm == "edit":
            rows = b.action if self.c.actor_source == "replay" else self.candidates(c, b.base_rows, 1)[:, 0]
            draw = self.randn(len(c), self.head.basis.width)
            x, log_prob = self.gaussian(torch.cat([c, rows.flatten(1)], 1), draw)
            a = self.correct(rows, x)
        elif self.c.algorithm == "residual_sac":
            rows = self.candidates(c, None, 1)[:, 0]
            x, log_prob = self.gaussian(torch.cat([c, rows.flatten(1)], 1), self.randn(len(c), self.head.exploration_dim))
            a = self.correct(rows, x)
        else:
            x, log_prob = self.gaussian(c, self.randn(len(c), self.head.exploration_dim))
            a = torch.tanh(x).unflatten(1, (self.n, -1))
        value = reduce(self.critic(torch.cat([c, a.flatten(1)], 1)), self.c.actor_reduce, self.g)
        gain = 1.0 / float(value.detach().abs().mean()) if self.c.normalize_q else 1.0
        loss = (self.alpha * log_prob - gain * value).mean()
        loss = loss + self.c.support_penalty * 0.5 * (torch.tanh(x) ** 2).sum(1).mean()
        if self.c.bc_weight:
            mean, log_std = self.head.actor(c)
            recorded = self.density(torch.atanh(b.action.flatten(1).clamp(-0.999, 0.999)), mean, log_std.exp())
            loss = loss - self.c.bc_weight * (b.weight * recorded).sum() / b.weight.sum()
        return loss
