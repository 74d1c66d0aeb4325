"""The critic: N Q-networks over one input, evaluated together, regressed together, differentiated together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robot_rl.learners.reduce import Reduction, check_reduction, draw_pair, reduce, reduce_with_grad
from robot_rl.nn.grad import without_grad
from robot_rl.nn.mlp import Activation, StackedMLP, Tape


class CriticLoss(NamedTuple):
    """What a regression saw. Read it before the ensemble's next pass: these are its buffers."""

    q: Tensor  # (N, B)
    slope: Tensor  # (N, B) dL/dq
    y: Tensor  # (B,) or (N, B)

    @property
    def loss(self) -> Tensor:
        """(): 0.5 Σ_heads (weighted mean of squared errors)."""
        return 0.5 * (self.slope * (self.q - self.y)).sum()


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

    def reduced_value(self, x: Tensor, how: Reduction, generator: torch.Generator | None = None, *, k: float = 1.0) -> Tensor:
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
        tape = self._tape(batch, self.n)
        if weight is None:
            if batch not in self._equal:
                self._equal[batch] = x.new_full((batch,), 1.0 / batch)
            share = self._equal[batch]
        else:
            share = weight / weight.sum().clamp_min(1.0)
        q, slope = self.regress(x, tape, y, share)
        return CriticLoss(q, slope, y)

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
    ) -> tuple[Tensor, Tensor]:
        """V(x) = ``reduce(Q(x), how, generator)``, (B,), and dV_b/dx_b, (B, D): what an actor climbs. ``x`` is (B, D).

        Costs one forward and one input-only backward pass; ``columns`` narrows the gradient to the action's columns.
        """
        value: list[Tensor] = []

        def slope(q: Tensor) -> Tensor:
            v, dq = reduce_with_grad(q, how, generator, k=k)
            value.append(v)
            return dq

        _, dx = self.input_grad(x, slope, columns)
        return value[0], dx
