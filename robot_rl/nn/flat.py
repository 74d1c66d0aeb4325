"""Parameters in one vector: a network's weights, gradients and moments as flat buffers.

An optimiser step over forty small tensors costs forty times the Python of a step over one vector, and so do polyak
averaging, gradient clipping and zeroing. :class:`FlatParameters` re-homes the parameters of any module as views of one
contiguous vector; :class:`FlatAdam` and :func:`polyak_` then work on that vector with one kernel each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robot_rl.nn import compiled
from robot_rl.nn.grad import without_grad

ALIGN = 16  # elements; every view starts on a 64-byte line in float32, which vectorised kernels want


class FlatParameters:
    """The trainable parameters of ``module`` as views of ``data`` (P,), their gradients as views of ``grad`` (P,).

    Parameter objects, names and ``state_dict`` of the module stay what they were; autograd adds into the views.
    Gradients are never None: clear them with :meth:`zero_grad` (``module.zero_grad()`` would detach the views).

    Raises:
        ValueError: the module has no trainable parameter, or they differ in dtype or device.
    """

    def __init__(self, module: nn.Module) -> None:
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(f"FlatParameters({type(module).__name__}): the module has no trainable parameter")
        kinds = {(p.dtype, p.device) for p in named.values()}
        if len(kinds) > 1:
            raise ValueError(f"FlatParameters({type(module).__name__}): parameters must share dtype and device, got {kinds}")
        self.names = tuple(named)
        self.parameters = list(named.values())
        self.gather_()

    @without_grad
    def gather_(self) -> None:
        """(Re)build the vectors from the parameters' present values, e.g. after a module moved to another device."""
        first = self.parameters[0]
        sizes = [-(-p.numel() // ALIGN) * ALIGN for p in self.parameters]
        data = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        grad = torch.zeros_like(data)
        start = 0
        for p, size in zip(self.parameters, sizes, strict=True):
            end = start + p.numel()
            data[start:end].copy_(p.detach().reshape(-1))
            if p.grad is not None:
                grad[start:end].copy_(p.grad.reshape(-1))
            p.data = data[start:end].view(p.shape)
            p.grad = grad[start:end].view(p.shape)
            start += size
        self.data, self.grad = data, grad

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatParameters:
        # A plain deep copy would clone every view into its own storage; share the copied Parameters and flatten them anew.
        from copy import deepcopy

        copied = object.__new__(FlatParameters)
        memo[id(self)] = copied
        copied.names = self.names
        copied.parameters = deepcopy(self.parameters, memo)
        copied.gather_()
        return copied

    def is_flat(self) -> bool:
        """Whether every parameter and gradient still is a view of the vectors (``zero_grad(set_to_none=True)`` breaks it)."""
        data, grad = self.data.untyped_storage().data_ptr(), self.grad.untyped_storage().data_ptr()
        return all(
            p.untyped_storage().data_ptr() == data and p.grad is not None and p.grad.untyped_storage().data_ptr() == grad
            for p in self.parameters
        )

    def zero_grad(self) -> None:
        self.grad.zero_()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradient to an L2 norm of at most ``max_norm``; returns the norm before, (), without a host sync."""
        norm = torch.linalg.vector_norm(self.grad)
        self.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @without_grad
    def copy_(self, other: FlatParameters) -> None:
        """Take over the other's values (not its gradients)."""
        _check_same_layout(self, other)
        self.data.copy_(other.data)


def _check_same_layout(a: FlatParameters, b: FlatParameters) -> None:
    if a.data.shape != b.data.shape or [p.shape for p in a.parameters] != [p.shape for p in b.parameters]:
        raise ValueError(f"flat parameters differ in layout: {len(a.data)} elements {a.names} and {len(b.data)} {b.names}")


@without_grad
def polyak_(target: FlatParameters, online: FlatParameters, tau: float) -> None:
    """target <- (1 - tau) target + tau online, one kernel for the whole network."""
    if target.data.shape != online.data.shape:
        _check_same_layout(target, online)
    target.data.lerp_(online.data, tau)


class FlatAdam:
    """Adam (Kingma & Ba 2015; decoupled weight decay as in AdamW, Loshchilov & Hutter 2019) over flat parameters.

        m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g²
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    One fused kernel a step and no host sync (``step_count`` lives on the device), so a CUDA graph may capture it.
    ``lr`` may be assigned between steps; a captured graph keeps the value it was captured with.
    """

    NUMBERS = 6  # that :meth:`advance` gives

    def __init__(
        self,
        parameters: FlatParameters,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                f"FlatAdam({lr=}, {betas=}, {eps=}, {weight_decay=}): lr, weight_decay >= 0, eps > 0, betas in [0, 1)"
            )
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"FlatAdam.max_grad_norm={max_grad_norm}: accepted are None or a positive number")
        self.parameters = parameters
        self.lr, self.betas, self.eps, self.weight_decay, self.max_grad_norm = lr, betas, eps, weight_decay, max_grad_norm
        self.exp_avg = torch.zeros_like(parameters.data)
        self.exp_avg_sq = torch.zeros_like(parameters.data)
        self.step_count = torch.zeros((), dtype=torch.float32, device=parameters.data.device)
        # The fused kernel is private in torch; where a release lacks it, the same maths runs as seven plain operations.
        self.fused = hasattr(torch, "_fused_adamw_") and parameters.data.device.type in ("cpu", "cuda")

    @property
    def compiled(self) -> bool:
        """Whether a step is nothing but one pass of compiled code over the vectors."""
        data = self.parameters.data
        return self.fused and self.max_grad_norm is None and compiled.path(data.device, data.dtype) == "compiled"

    @without_grad
    def step(self, follower: FlatParameters | None = None, tau: float = 0.0) -> None:
        """One update from ``parameters.grad`` (which is left as it is, apart from clipping).

        ``follower`` <- (1 - tau) follower + tau parameters afterwards, as :func:`polyak_` does, in the same sweep over memory.
        """
        flat = self.parameters
        if flat.data.device != self.exp_avg.device or flat.data.dtype != self.exp_avg.dtype:
            raise RuntimeError("the module moved to another device or dtype after its FlatAdam was made; make a new FlatAdam")
        if self.max_grad_norm is not None:
            flat.clip_grad_norm_(self.max_grad_norm)
        (b1, b2), p, g = self.betas, flat.data, flat.grad
        if self.fused and compiled.path(p.device, p.dtype) == "compiled":
            if follower is not None and follower.data.shape != p.shape:
                _check_same_layout(follower, flat)
            compiled.adam(
                flat, self.exp_avg, self.exp_avg_sq, None if follower is None else follower.data, self.advance(tau)
            )  # fmt: skip
            return
        self.step_count.add_(1)
        self._step(p, g, b1, b2)
        if follower is not None:
            polyak_(follower, flat, tau)

    def advance(self, tau: float) -> tuple[float, ...]:
        """Count one more step, and tell what the compiled code (:func:`robot_rl.nn.kernels.adam`) wants to know of it."""
        count = self.step_count.numpy()  # the same memory: a torch operation on one number costs ten times this
        count += 1
        (b1, b2), t = self.betas, float(count)
        decay = 1 - self.lr * self.weight_decay
        root = math.sqrt(1 - b2**t)  # torch's m / (sqrt v / root + eps), extended by root: a division an element less
        return self.lr * root / (1 - b1**t), decay, 1 - b1, 1 - b2, self.eps * root, tau

    def _step(self, p: Tensor, g: Tensor, b1: float, b2: float) -> None:
        if self.fused:
            torch._fused_adamw_(
                [p], [g], [self.exp_avg], [self.exp_avg_sq], [], [self.step_count],
                lr=self.lr, beta1=b1, beta2=b2, weight_decay=self.weight_decay, eps=self.eps, amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        if self.weight_decay:
            p.mul_(1 - self.lr * self.weight_decay)
        self.exp_avg.lerp_(g, 1 - b1)
        self.exp_avg_sq.mul_(b2).addcmul_(g, g, value=1 - b2)
        steps = self.step_count.double()  # 1 - b2^t loses half its digits in float32
        correction1, correction2 = (1 - b1**steps).to(p.dtype), (1 - b2**steps).to(p.dtype)
        denominator = (self.exp_avg_sq / correction2).sqrt_().add_(self.eps)
        p.sub_(self.exp_avg / denominator * (self.lr / correction1))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the moments and the step count; with the module's own ``state_dict`` a resume is bitwise exact."""
        return {name: getattr(self, name).clone() for name in ("exp_avg", "exp_avg_sq", "step_count")}

    @without_grad
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in place. Raises ValueError when a name or a shape does not fit."""
        names = ("exp_avg", "exp_avg_sq", "step_count")
        if set(state) != set(names):
            raise ValueError(f"FlatAdam state holds {sorted(state)}; expected {sorted(names)}")
        for name in names:
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(
                    f"FlatAdam state {name!r} has shape {tuple(state[name].shape)}; expected {tuple(getattr(self, name).shape)}"
                )
        for name in names:
            getattr(self, name).copy_(state[name])
