"""The critic: N Q-networks over one input, evaluated together, regressed together, differentiated together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robot_rl.learners.config import Reduction, check_reduction
from robot_rl.learners.reduce import draw_pair, reduce, reduce_with_grad
from robot_rl.nn import compiled
from robot_rl.nn.flat import FlatAdam
from robot_rl.nn.grad import without_grad
from robot_rl.nn.mlp import Activation, StackedMLP, Tape

SWEEP = 2000  # about so many tasks are set up as one piece of compiled work
PICKED = ("min", "min_pair", "mean")  # the reductions that the compiled code has


class CriticLoss(NamedTuple):
    """What a regression saw. Read it before the ensemble's next pass: these are its buffers."""

    q: Tensor  # (N, B)
    slope: Tensor  # (N, B) dL/dq
    y: Tensor  # (B,) or (N, B)

    @property
    def loss(self) -> Tensor:
        """(): 0.5 Σ_heads (weighted mean of squared errors)."""
        return 0.5 * (self.slope * (self.q - self.y)).sum()


class TDSteps(NamedTuple):
    """What U temporal-difference updates of B transitions learn from.

    Attributes:
        x, next_x: (U, B, D) the critics' inputs: what was done, and what is to be valued at the next states.
        reward, discount: (U, B). bonus: (U, B) or None; ``bonus_scale`` times it is added to the next state's value.
        weight: (U, B) or None.
    """

    x: Tensor
    next_x: Tensor
    reward: Tensor
    discount: Tensor
    bonus: Tensor | None = None
    bonus_scale: Tensor | float = 1.0
    weight: Tensor | None = None


class CriticEnsemble(StackedMLP):
    """N critics Q_i(x): ``forward`` maps x (B, D) or (N, B, D) to (N, B), differentiable; x is the features and the action.

    The fast paths need no autograd: :meth:`value` (targets), :meth:`loss_and_grad` (regression) and :meth:`input_grad`
    (the actor's loss). All of them agree with N separate MLPs. Parameters and gradients are flat vectors,
    ``flat.data`` and ``flat.grad``; ``load_state_dict`` copies into them.
    """

    def __init__(
        self,
        n_heads: int,
        in_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        activation: Activation = "relu",
        layer_norm: bool = False,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            n_heads, in_dim, 1, hidden, activation=activation, layer_norm=layer_norm,
            generator=generator, device=device, dtype=dtype,
        )  # fmt: skip
        self._tapes: dict[tuple[int, int], Tape] = {}
        self._equal: dict[int, Tensor] = {}  # the weights of a batch without weights

    @property
    def n_heads(self) -> int:
        return self.n

    def make_target(self) -> CriticEnsemble:
        """A frozen copy for :func:`~robot_rl.nn.flat.polyak_` to follow this one."""
        tapes, self._tapes = self._tapes, {}
        target = deepcopy(self)
        self._tapes = tapes
        target.flat.zero_grad()
        for p in target.parameters():
            p.requires_grad_(False)
        return target.eval()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)

    def _tape(self, batch: int, n: int) -> Tape:
        # Tapes never outlive a call, so one per shape serves them all.
        if (batch, n) not in self._tapes:
            self._tapes[batch, n] = self.tape(batch, n)
        return self._tapes[batch, n]

    def _apply(self, fn: Any, recurse: bool = True) -> StackedMLP:
        self._tapes.clear()
        self._equal.clear()
        return super()._apply(fn, recurse)

    def value(self, x: Tensor, heads: Tensor | None = None) -> Tensor:
        """(N, B), or (K, B) of the ``heads`` (K,) int64 alone; no gradient."""
        n = self.n if heads is None else len(heads)
        return self._value(x, heads, n).clone()

    def _value(self, x: Tensor, heads: Tensor | None, n: int) -> Tensor:
        return self.run(x, self._tape(x.shape[-2], n), heads).squeeze(-1)  # a buffer: the next pass overwrites it

    def reduced_value(
        self, x: Tensor, how: Reduction, generator: torch.Generator | None = None, *, k: Tensor | float = 1.0
    ) -> Tensor:
        """``reduce(value(x), how, generator)``, (B,); ``min_pair`` evaluates only the two heads it drew (as RLPD does)."""
        check_reduction(how, self.n)
        if how != "min_pair":
            return reduce(self._value(x, None, self.n), how, k=k)
        pair = draw_pair(self.n, generator, x.device)
        return self._value(x, pair if self.n > 2 else None, 2).amin(0)

    @without_grad
    def loss_and_grad(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> CriticLoss:
        """Regress every head onto the same targets; *overwrites* ``flat.grad`` with the gradient.

        loss = 0.5 Σ_i Σ_b weight_b (Q_i(x_b) - y_b)² / max(Σ_b weight_b, 1); without weights a mean over the batch.

        Args:
            x: (B, D) or (N, B, D). y: (B,) or (N, B) targets. weight: (B,) or None.
        """
        batch = x.shape[-2]
        q, slope = self.regress(x, self._tape(batch, self.n), y, self._shares(weight, batch, x))
        return CriticLoss(q, slope, y)

    def _shares(self, weight: Tensor | None, batch: int, like: Tensor) -> Tensor:
        """(..., B): what each row contributes to its batch's mean."""
        if weight is not None:
            return weight / weight.sum(-1, keepdim=True).clamp_min(1.0)
        if batch not in self._equal:
            self._equal[batch] = like.new_full((batch,), 1.0 / batch)
        return self._equal[batch]

    @without_grad
    def td_updates(
        self, target: CriticEnsemble, optimizer: FlatAdam, tau: float, steps: TDSteps, how: Reduction,
        generator: torch.Generator | None = None, *, k: float = 1.0,
    ) -> CriticLoss:  # fmt: skip
        """U updates in a row while the policy stands still; returns what the last one saw.

        Each one regresses every head onto y = reward + discount (``reduce(target(next_x))`` + bonus_scale bonus), as :meth:`loss_and_grad`
        does, takes a step of ``optimizer`` and lets ``target`` follow at rate ``tau``. On a CPU with compiled passes, minima as
        reductions and no limit on the gradient's norm, all of them are one call.
        """
        check_reduction(how, self.n)
        if how in PICKED[:2] and optimizer.compiled and compiled.fits(self, steps.x) and compiled.fits(target, steps.next_x):
            return self._swept(target, optimizer, tau, steps, how, generator)
        fit = None
        for u in range(len(steps.reward)):
            value = target.reduced_value(steps.next_x[u], how, generator, k=k)
            if steps.bonus is not None:
                value = value + steps.bonus_scale * steps.bonus[u]
            y = torch.addcmul(steps.reward[u], steps.discount[u], value)
            fit = self.loss_and_grad(steps.x[u], y, None if steps.weight is None else steps.weight[u])
            optimizer.step(target.flat, tau)
        assert fit is not None
        return fit

    def _swept(
        self, target: CriticEnsemble, optimizer: FlatAdam, tau: float, steps: TDSteps, how: Reduction,
        generator: torch.Generator | None,
    ) -> CriticLoss:  # fmt: skip
        from robot_rl.nn.sweep import Sweep

        updates, batch = steps.reward.shape
        heads = torch.arange(self.n).expand(updates, -1)
        if how == "min_pair":
            pairs = torch.stack([draw_pair(self.n, generator) for _ in range(updates)])
            heads = pairs if self.n > 2 else heads
        reward, discount, bonus, weight = (
            None if t is None else t.to(self.flat.data.dtype).contiguous()
            for t in (steps.reward, steps.discount, steps.bonus, steps.weight)
        )
        assert reward is not None
        assert discount is not None
        share = self._shares(weight, batch, reward).expand(updates, -1)
        y, heads = torch.empty_like(reward), heads.contiguous()
        at_once = max(
            1, SWEEP // (self.n + 4 * compiled.threads())
        )  # one a network, or three stages and the target's by thread
        for first in range(0, updates, at_once):
            part = slice(first, first + at_once)
            q, slope = Sweep(
                self, target, self._tape(batch, self.n), target._tape(batch, heads.shape[1]), optimizer, tau,
                steps.x[part], steps.next_x[part], reward[part], discount[part], None if bonus is None else bonus[part],
                float(steps.bonus_scale), share[part], heads[part], y[part],
            ).run()  # fmt: skip
        return CriticLoss(q, slope, y[-1])

    @without_grad
    def input_grad(
        self, x: Tensor, dq: Tensor | Callable[[Tensor], Tensor], columns: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """Values and the gradient of L with respect to the input; ``flat.grad`` is left alone.

        Args:
            x: (B, D) shared, or (N, B, D).
            dq: dL/dQ (N, B), or a function that makes it from Q (N, B), e.g. the gradient of a reduction.
            columns: only these input columns (the action's), all by default.

        Returns: Q (N, B) and dL/dx in the shape of ``x`` (only ``columns`` in its last axis).
        """
        tape = self._tape(x.shape[-2], self.n)
        q = self.run(x, tape).squeeze(-1).clone()
        dq = dq(q) if callable(dq) else dq
        dx = self.backward(tape, dq.unsqueeze(-1), parameters=False, inputs=True if columns is None else columns)
        assert dx is not None
        return q, dx.sum(0) if x.dim() == 2 else dx

    def reduced_input_grad(
        self,
        x: Tensor,
        how: Reduction,
        generator: torch.Generator | None = None,
        *,
        k: float = 1.0,
        columns: slice | None = None,
        by_head: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """V(x) = ``reduce(Q(x), how, generator)``, (B,), and dV_b/dx_b, (B, D): what an actor climbs. ``x`` is (B, D).

        Costs one forward and one input-only backward pass; ``columns`` narrows the gradient to the action's columns.
        ``by_head``: what each head contributes to it, (N, B, D).
        """
        if how in PICKED and compiled.fits(self, x):
            from robot_rl.nn import compiled_losses

            tape = self._tape(x.shape[-2], self.n)
            q = self.run(x, tape).squeeze(-1)
            heads = draw_pair(self.n, generator) if how == "min_pair" else torch.arange(self.n)
            v, dq = compiled_losses.pick(q, "mean" if how == "mean" else "min", heads)
            dx = self.backward(tape, dq.unsqueeze(-1), parameters=False, inputs=True if columns is None else columns)
            assert dx is not None
            return v, dx if by_head else dx.sum(0)
        value: list[Tensor] = []

        def slope(q: Tensor) -> Tensor:
            v, dq = reduce_with_grad(q, how, generator, k=k)
            value.append(v)
            return dq

        _, dx = self.input_grad(x.expand(self.n, -1, -1) if by_head else x, slope, columns)
        return value[0], dx
