"""The bridge to the compiled code between networks, :mod:`robot_rl.nn.losses`; shapes are checked by who calls."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from robot_rl.nn.compiled import program, side_by_side, threads

if TYPE_CHECKING:
    from robot_rl.nn.flat import FlatAdam, FlatParameters

WORTH_A_THREAD = 1000  # actions' coordinates: each takes some 40 cycles
_NO_ROOM = (0, 0)


def _shares(rows: int, actions: int) -> list[tuple[int, int]]:
    parts = max(1, min(threads(), rows * actions // WORTH_A_THREAD))
    return list(pairwise(rows * p // parts for p in range(parts + 1)))


def draw(out: Tensor, noise: Tensor, u: Tensor, limits: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """From the actor's output (B, 2 A) and noise (B, A): writes ``u`` (B, A), returns log density (B,), std and free (B, A)."""
    rows, actions = noise.shape
    log_prob, std, free = noise.new_empty(rows), torch.empty_like(noise), torch.empty_like(noise)
    addresses = (out.data_ptr(), noise.data_ptr(), u.data_ptr(), u.stride(0) * u.element_size())
    rest = (*addresses, log_prob.data_ptr(), std.data_ptr(), free.data_ptr(), *limits, *_NO_ROOM)
    calls = [(a, b, actions, *rest) for a, b in _shares(rows, actions)]
    side_by_side(program(noise.dtype).draw, calls, [_NO_ROOM] * len(calls), out, noise, u, log_prob, std, free)
    return log_prob, std, free


def draw_backward(du: Tensor, scale: float, dlog_prob: Tensor, u: Tensor, noise: Tensor, std: Tensor, free: Tensor) -> Tensor:
    """dL/dout (1, rows, 2 A) for dL/du = scale Σ ``du`` (networks, rows, A); the draw may have had more rows."""
    networks, rows, actions = du.shape
    du, dlog_prob = du.to(noise.dtype).contiguous(), dlog_prob.to(noise.dtype).contiguous()
    dy = noise.new_empty(1, rows, 2 * actions)
    drawn = (u.data_ptr(), u.stride(0) * u.element_size(), noise.data_ptr(), std.data_ptr(), free.data_ptr())
    rest = (actions, networks, rows, du.data_ptr(), *drawn, dlog_prob.data_ptr(), dy.data_ptr(), scale, *_NO_ROOM)
    calls = [(a, b, *rest) for a, b in _shares(rows, actions)]
    side_by_side(program(noise.dtype).draw_backward, calls, [_NO_ROOM] * len(calls), du, dlog_prob, dy)
    return dy


def pick(q: Tensor, how: Literal["min", "mean"], heads: Tensor) -> tuple[Tensor, Tensor]:
    """(value (B,), dvalue/dq (N, B)) of the minimum or mean of ``heads`` (K,) int64 among the rows of ``q`` (N, B)."""
    networks, total = q.shape
    value, dq = q.new_empty(total), torch.empty_like(q, memory_format=torch.contiguous_format)
    addresses = (q.data_ptr(), value.data_ptr(), dq.data_ptr())
    call = (int(how == "mean"), len(heads), heads.data_ptr(), networks, total, *addresses, *_NO_ROOM)
    side_by_side(program(q.dtype).pick, [call], [_NO_ROOM], q, heads, value, dq)
    return value, dq


def temperature(
    flat: FlatParameters, optimizer: FlatAdam, log_prob: Tensor, fixed: bool, target_entropy: float, floor: float
) -> Tensor:
    """The loss (), and a step of log α unless it is ``fixed``; ``floor`` is log α's least value."""
    loss = log_prob.new_empty(())
    numbers = (0.0,) * optimizer.NUMBERS if fixed else optimizer.advance(0.0)
    vectors = (loss, flat.data, flat.grad, optimizer.exp_avg, optimizer.exp_avg_sq)
    call = (
        len(log_prob), log_prob.data_ptr(), *(v.data_ptr() for v in vectors), int(fixed), target_entropy, floor, *numbers,
        *_NO_ROOM,
    )  # fmt: skip
    side_by_side(program(flat.data.dtype).temperature, [call], [_NO_ROOM], log_prob, loss)
    return loss
