"""N multilayer perceptrons side by side, with the backward pass written out.

All N networks run as one batched matrix product per layer. Besides :meth:`StackedMLP.forward`, which autograd can
differentiate, there is a pair without autograd: :meth:`StackedMLP.run` records what the chain rule needs on a
:class:`Tape` of preallocated buffers, :meth:`StackedMLP.backward` writes parameter gradients straight into the flat
gradient vector and returns input gradients if asked. No graph is built, nothing is allocated, nothing is computed that
is not asked for; shapes are static and nothing waits for the device, so a CUDA graph can capture it. On a CPU the pair runs
as fused kernels where :func:`robot_rl.nn.compiled.path` says so.

One hidden layer, for each network (LayerNorm: Ba et al. 2016)::

    z = x W + b                      dW = xᵀ dz,  db = Σ dz,  dx = dz Wᵀ
    x̂ = (z - mean z) / std z         dz = (dx̂ - mean dx̂ - x̂ mean(dx̂ x̂)) / std z
    a = gain x̂ + shift               dgain = Σ da x̂,  dshift = Σ da,  dx̂ = gain da
    h = relu a   or   tanh a         da = dh [h > 0]   or   dh (1 - h²)

Σ runs over the batch, means over features. Without LayerNorm a = z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robot_rl.nn import compiled
from robot_rl.nn.flat import FlatParameters
from robot_rl.nn.grad import without_grad

Activation = Literal["relu", "tanh"]
MatmulPrecision = Literal["highest", "high", "medium"]
LAYER_NORM_EPS = 1e-5


@contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """Run with ``torch.set_float32_matmul_precision(precision)`` and put the process-wide setting back afterwards.

    ``medium`` lets CPUs with bfloat16 units (AVX512-BF16, AMX) and tensor cores multiply in bfloat16 and add in float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Layer(NamedTuple):
    """One linear layer of all N networks, and the LayerNorm behind it (None on the last layer, or without LayerNorm)."""

    weight: Tensor  # (N, in, out)
    bias: Tensor  # (N, 1, out)
    norm: tuple[Tensor, Tensor] | None  # gain and shift, (N, 1, out) each

    def pick(self, members: Tensor) -> Layer:
        """Copies of some of the networks; ``members`` (K,) int64."""
        norm = None if self.norm is None else (self.norm[0].index_select(0, members), self.norm[1].index_select(0, members))
        return Layer(self.weight.index_select(0, members), self.bias.index_select(0, members), norm)


class Tape:
    """Buffers of one forward and backward pass at one batch size; the next ``run`` on the same tape overwrites them.

    Attributes:
        inputs: what entered each linear layer, (N, B, in); the first may be an expanded view of a shared input.
        outputs: what left each linear layer (activated for hidden ones), (N, B, out).
        normalised, rstd: x̂ (N, B, out) and 1 / std z (N, B, 1) of each hidden layer with LayerNorm.
    """

    def __init__(self, n: int, batch: int, widths: Sequence[int], layer_norm: bool, like: Tensor) -> None:
        def empty(width: int) -> Tensor:
            return torch.empty(n, batch, width, dtype=like.dtype, device=like.device)

        self.shape = (n, batch)
        self.inputs: list[Tensor] = []
        self.outputs = [empty(width) for width in widths]
        hidden = widths[:-1] if layer_norm else ()
        self.normalised = [empty(width) for width in hidden]
        self.rstd = [empty(1) for _ in hidden]
        self.plan: Any = None  # addresses of these buffers, for the compiled path
        self.compiled = False  # which path recorded it
        self._new = empty
        self._scratch: dict[tuple[str, int], Tensor] = {}

    def scratch(self, name: str, width: int) -> Tensor:
        """A buffer (N, B, width) made on first use: passes that need no gradient never pay for one."""
        key = (name, width)
        if key not in self._scratch:
            self._scratch[key] = self._new(width)
        return self._scratch[key]

    def statistics(self, i: int) -> tuple[Tensor, Tensor]:
        """z (N, B, out) and mean z (N, B, 1) of hidden layer ``i``, which only the torch path keeps."""
        return self.scratch(f"z{i}", self.normalised[i].shape[-1]), self.scratch(f"mean{i}", 1)


class StackedMLP(nn.Module):
    """N independent MLPs of the same shape; ``forward`` maps (B, D) or (N, B, D) to (N, B, out).

    Parameters are ``weight.i`` (N, in, out), ``bias.i`` (N, 1, out) and, with LayerNorm after every hidden linear,
    ``gain.i`` and ``shift.i`` (N, 1, out); all are views of ``flat.data``, their gradients of ``flat.grad``.
    Initialisation is that of ``nn.Linear`` (uniform within 1/sqrt(in)); the last layer is scaled by ``last_scale``.

    Raises:
        ValueError: a size below one, or an unknown activation.
    """

    def __init__(
        self,
        n: int,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        *,
        activation: Activation = "relu",
        layer_norm: bool = False,
        last_scale: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(n, in_dim, out_dim, *hidden, 1 if hidden else 0) < 1:
            raise ValueError(
                f"StackedMLP({n=}, {in_dim=}, {out_dim=}, hidden={tuple(hidden)}): sizes >= 1, at least one hidden layer"
            )
        if activation not in ("relu", "tanh"):
            raise ValueError(f"StackedMLP.activation={activation!r}: accepted are relu, tanh")
        self.n, self.in_dim, self.out_dim, self.hidden = n, in_dim, out_dim, tuple(hidden)
        self.activation, self.layer_norm = activation, layer_norm
        self.compiled_widths = all(width % compiled.WIDTH_MULTIPLE == 0 for width in self.hidden)
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        self.gain, self.shift = nn.ParameterList(), nn.ParameterList()
        widths = (*self.hidden, out_dim)
        for fan_in, fan_out in zip((in_dim, *hidden), widths, strict=True):
            bound = fan_in**-0.5 * (last_scale if len(self.weight) == len(hidden) else 1.0)
            for parameters, shape in ((self.weight, (n, fan_in, fan_out)), (self.bias, (n, 1, fan_out))):
                # Drawn on the CPU in float32, so that one seed means one network on every device and in every precision.
                drawn = torch.rand(shape, generator=generator, dtype=torch.float32).mul_(2 * bound).sub_(bound)
                parameters.append(nn.Parameter(drawn.to(device=device, dtype=dtype or torch.get_default_dtype())))
            if layer_norm and len(self.weight) <= len(hidden):
                self.gain.append(nn.Parameter(torch.ones_like(self.bias[-1])))
                self.shift.append(nn.Parameter(torch.zeros_like(self.bias[-1])))
        # Plain tuples: looking parameters up through nn.Module costs more than some of the kernels below.
        norms: list[tuple[Tensor, Tensor] | None] = [*zip(self.gain, self.shift, strict=True)] or [None] * len(self.hidden)
        self.layers = [Layer(*p) for p in zip(self.weight, self.bias, [*norms, None], strict=True)]
        self.flat = FlatParameters(self)

    def _apply(self, fn: Any, recurse: bool = True) -> StackedMLP:
        super()._apply(fn, recurse)  # .to(), .double(): moves every parameter by itself ...
        self.flat.gather_()  # ... so put them side by side again
        return self

    # ---- with autograd

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) shared by all networks, or (N, B, D), to (N, B, out). Differentiable in everything."""
        h = x if x.dim() == 3 else x.unsqueeze(0).expand(self.n, -1, -1)
        for width, layer in zip(self.hidden, self.layers[:-1], strict=True):
            h = torch.baddbmm(layer.bias, h, layer.weight)
            if layer.norm is not None:
                gain, shift = layer.norm
                h = F.layer_norm(h, (width,), eps=LAYER_NORM_EPS) * gain + shift
            h = torch.relu(h) if self.activation == "relu" else torch.tanh(h)
        return torch.baddbmm(self.layers[-1].bias, h, self.layers[-1].weight)

    # ---- without autograd

    def tape(self, batch: int, n: int | None = None) -> Tape:
        """Buffers for :meth:`run` with ``batch`` rows (and ``n`` of the networks, all by default)."""
        return Tape(self.n if n is None else n, batch, (*self.hidden, self.out_dim), self.layer_norm, self.flat.data)

    def _check(self, x: Tensor, tape: Tape) -> Tensor:
        """``x`` as (K, B, D); the tape learns which path records it."""
        h = x if x.dim() == 3 else x.expand(tape.shape[0], *x.shape)
        if h.shape != (*tape.shape, self.in_dim):
            raise ValueError(
                f"input {tuple(x.shape)} does not fit a tape of {tape.shape[0]} networks and {tape.shape[1]} rows, {self.in_dim} wide"
            )
        tape.compiled = compiled.fits(self, x)
        return h

    @without_grad
    def run(self, x: Tensor, tape: Tape, members: Tensor | None = None) -> Tensor:
        """The same value as :meth:`forward`, recorded on ``tape``.

        Args:
            x: (B, D) or (K, B, D); must stay unchanged until :meth:`backward` is done.
            members: (K,) int64 indices; only these networks are evaluated (no backward then). All by default.

        Returns: (K, B, out), a buffer of the tape: the next run on it overwrites the values.
        """
        h = self._check(x, tape)
        if tape.compiled:
            return compiled.run(self, x, tape, members)
        layers = self.layers if members is None else [layer.pick(members) for layer in self.layers]
        tape.inputs.clear()
        for i, (weight, bias, norm) in enumerate(layers):
            tape.inputs.append(h)
            h = tape.outputs[i]
            if norm is None:
                torch.baddbmm(bias, tape.inputs[i], weight, out=h)
            else:
                z, mean = tape.statistics(i)
                normalised, rstd = tape.normalised[i], tape.rstd[i]
                torch.baddbmm(bias, tape.inputs[i], weight, out=z)
                torch.sub(z, torch.mean(z, -1, keepdim=True, out=mean), out=normalised)
                torch.linalg.vector_norm(normalised, dim=-1, keepdim=True, out=rstd)
                rstd.square_().div_(normalised.shape[-1]).add_(LAYER_NORM_EPS).rsqrt_()
                normalised.mul_(rstd)
                gain, shift = norm
                torch.addcmul(shift, normalised, gain, out=h)
            if i < len(self.hidden):
                h.relu_() if self.activation == "relu" else h.tanh_()
        return h

    @without_grad
    def regress(self, x: Tensor, tape: Tape, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of Σ 0.5 weight (out - y)² of networks with one output, in one go; overwrites ``flat.grad``.

        Args:
            x: as in :meth:`run`. y: (B,) or (N, B). weight: (B,).

        Returns: outputs and dL/dout, (N, B) each; the first is a buffer of the tape.
        """
        self._check(x, tape)
        if tape.compiled:
            return compiled.regress(self, x, tape, y, weight)
        out = self.run(x, tape).squeeze(-1)
        slope = (out - y) * weight
        self.backward(tape, slope.unsqueeze(-1))
        return out, slope

    @without_grad
    def backward(
        self, tape: Tape, dy: Tensor, *, parameters: bool = True, inputs: slice | bool = False, rows: int | None = None
    ) -> Tensor | None:
        """Chain rule along ``tape`` for dL/dy = ``dy`` (N, B, out).

        Args:
            parameters: overwrite ``flat.grad`` with dL/dparameters (never adds to it).
            inputs: also return dL/dx (N, B, D), or only these columns of it.
            rows: only the first ``rows`` rows of the tape take part; ``dy`` then is (N, rows, out).

        Returns: dL/dx for every network by itself (sum over N for a shared input), or None.
        """

        if tape.compiled:
            return compiled.backward(self, tape, dy, parameters, inputs, rows)

        def cut(buffer: Tensor) -> Tensor:
            return buffer if rows is None else buffer[:, :rows]

        d = dy
        for i in reversed(range(len(self.layers))):
            weight, bias, norm = self.layers[i]
            if i < len(self.hidden):  # d is dL/dh of a hidden layer, in a scratch buffer that may be overwritten
                h = cut(tape.outputs[i])
                if self.activation == "relu":
                    torch.ops.aten.threshold_backward.grad_input(d, h, 0, grad_input=d)
                else:
                    torch.ops.aten.tanh_backward.grad_input(d, h, grad_input=d)
                if norm is not None:
                    gain, shift = norm
                    if parameters:
                        torch.sum(d, 1, keepdim=True, out=shift.grad)
                        product = torch.mul(d, cut(tape.normalised[i]), out=cut(tape.scratch("product", d.shape[-1])))
                        torch.sum(product, 1, keepdim=True, out=gain.grad)
                    # The kernel reads its statistics as if they were contiguous; a cut through several networks is not.
                    z, mean, rstd = (cut(buffer).contiguous() for buffer in (*tape.statistics(i), tape.rstd[i]))
                    d, _, _ = torch.ops.aten.native_layer_norm_backward(
                        d.mul_(gain), z, d.shape[-1:], mean, rstd, None, None, [True, False, False]
                    )
            if parameters:
                torch.bmm(cut(tape.inputs[i]).mT, d, out=weight.grad)
                torch.sum(d, 1, keepdim=True, out=bias.grad)
            if i > 0:
                d = torch.bmm(d, weight.mT, out=cut(tape.scratch(f"d{i % 2}", weight.shape[1])))
        if inputs is False:
            return None
        return torch.bmm(d, (weight if inputs is True else weight[:, inputs]).mT)
