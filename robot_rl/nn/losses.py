"""What stands between the networks of an actor-critic update, as compiled code: draws, targets, slopes, the temperature.

Each is a few thousand numbers, for which a dozen operations of a tensor library cost more than the arithmetic. The formulas
are those of :mod:`robot_rl.nn.actor` and :mod:`robot_rl.learners.reduce`. Arguments are as in :mod:`robot_rl.nn.kernels`:
addresses in bytes and sizes; matrices are row-major without gaps where no distance between rows is given.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

from robot_rl.nn.adam import NUMBERS, adam
from robot_rl.nn.simd import I64, Emitter, Int, Kernel

MINIMUM, MEAN = 0, 1


def _number(e: Emitter, value: float) -> Any:
    return ir.Constant(e.scalar, value)


def _draw(
    e: Emitter, r0: Int, r1: Int, actions: Int, out: Int, noise: Int, u: Int, u_row: Int, log_prob: Int, std: Int, free: Int,
    low: Any, high: Any, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """From ``out`` (B, 2 A), mean and raw log std, rows r0 to r1 of u = tanh(mean + std noise) and of its log density.

    With x before the tanh and q = exp(-2 |x|): tanh |x| = (1 - q) / (1 + q), log(1 - tanh² x) = 2 (log 2 - |x| - log(1 + q)).
    ``std`` and ``free`` (B, A): exp of the log std within ``low`` and ``high``; 1 where it was within them, else 0.
    """
    b, one, two = e.b, _number(e, 1.0), _number(e, 2.0)
    with e.range(r0, r1) as m:
        total = log_prob + m * e.size
        e.put(e.zero, total)
        with e.range(0, actions) as i:
            k = (m * actions + i) * e.size
            raw = e.get(out + (m * actions * 2 + actions + i) * e.size)
            log_std = e.least(e.greatest(raw, low), high)
            e.put(b.select(b.fcmp_ordered("==", raw, log_std), one, e.zero), free + k)
            scale, z = e.exp(log_std), e.get(noise + k)
            e.put(scale, std + k)
            x = e.fma(scale, z, e.get(out + (m * actions * 2 + i) * e.size))
            size = e.intrinsic(f"llvm.fabs.f{8 * e.size}", e.scalar, x)
            q = e.exp(b.fmul(_number(e, -2.0), size))
            t = b.fdiv(b.fsub(one, q), b.fadd(one, q))
            e.put(b.select(b.fcmp_ordered("<", x, e.zero), b.fneg(t), t), u + m * u_row + i * e.size)
            squash = b.fmul(two, b.fsub(b.fsub(_number(e, math.log(2)), size), e.log1p(q)))
            normal = e.fma(b.fmul(_number(e, 0.5), z), z, b.fadd(log_std, _number(e, 0.5 * math.log(2 * math.pi))))
            e.put(b.fsub(e.get(total), b.fadd(normal, squash)), total)


def _draw_backward(
    e: Emitter, r0: Int, r1: Int, actions: Int, networks: Int, rows: Int, du: Int, u: Int, u_row: Int, noise: Int, std: Int,
    free: Int, dlog_prob: Int, dy: Int, scale: Any, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """dL/d(mean, raw log std), ``dy`` (rows, 2 A), from dL/du = scale Σ ``du`` (networks, rows, A) and dL/dlog_prob (rows,)."""
    b = e.b
    with e.range(r0, r1) as m, e.range(0, actions) as i:
        k = (m * actions + i) * e.size
        mean = dy + (m * actions * 2 + i) * e.size
        e.put(e.get(du + k), mean)
        with e.range(1, networks) as h:
            e.put(b.fadd(e.get(mean), e.get(du + h * rows * actions * e.size + k)), mean)
        slope, density, drawn = b.fmul(scale, e.get(mean)), e.get(dlog_prob + m * e.size), e.get(u + m * u_row + i * e.size)
        dx = e.fma(drawn, b.fsub(b.fmul(_number(e, 2.0), density), b.fmul(slope, drawn)), slope)
        e.put(dx, mean)
        dlog_std = b.fsub(b.fmul(b.fmul(dx, e.get(std + k)), e.get(noise + k)), density)
        e.put(b.fmul(dlog_std, e.get(free + k)), mean + actions * e.size)


def _least(e: Emitter, x: Any, y: Any) -> Any:
    """The smaller one; a NaN if one is."""
    b = e.b
    keep = b.or_(b.fcmp_unordered("uno", x, x), b.fcmp_ordered("<=", x, y))
    return b.select(keep, x, y)


def _td_target(
    e: Emitter, heads: Int, total: Int, q: Int, reward: Int, discount: Int, bonus: Int, y: Int, scale: Any,
    scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """y = reward + discount (min over ``heads`` of q (heads, total) + scale bonus); ``bonus`` 0: none."""
    with e.range(0, total) as m:
        o = m * e.size
        e.put(e.get(q + o), y + o)
        with e.range(1, heads) as h:
            e.put(_least(e, e.get(y + o), e.get(q + h * total * e.size + o)), y + o)
        with e.when(bonus > 0):
            e.put(e.fma(scale, e.get(bonus + o), e.get(y + o)), y + o)
        e.put(e.fma(e.get(discount + o), e.get(y + o), e.get(reward + o)), y + o)


def _pick(
    e: Emitter, how: Int, chosen: Int, heads: Int, networks: Int, total: Int, q: Int, value: Int, dq: Int,
    scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """MINIMUM or MEAN over the ``chosen`` networks named in ``heads`` of q (networks, total), and its slope ``dq``.

    Where networks tie, the first one named has the slope.
    """
    b = e.b
    found, row = b.alloca(I64), total * e.size
    share = b.fdiv(_number(e, 1.0), b.sitofp(chosen.value, e.scalar))
    with e.range(0, total) as m:
        o = m * e.size
        with e.range(0, networks) as h:
            e.put(e.zero, dq + h * row + o)
        with e.when(how.is_(MINIMUM)):
            e.put(e.get(q + e.table(heads, 0) * row + o), value + o)
            with e.range(1, chosen) as h:
                e.put(_least(e, e.get(value + o), e.get(q + e.table(heads, h) * row + o)), value + o)
            b.store(I64(0), found)
            with e.range(0, chosen) as h:
                place = e.table(heads, h) * row + o
                equal = Int(e, b.fcmp_ordered("==", e.get(q + place), e.get(value + o)))
                with e.when(equal & Int(e, b.load(found)).is_(0)):
                    e.put(_number(e, 1.0), dq + place)
                    b.store(I64(1), found)
        with e.when(how.is_(MEAN)):
            e.put(e.zero, value + o)
            with e.range(0, chosen) as h:
                place = e.table(heads, h) * row + o
                e.put(e.fma(share, e.get(q + place), e.get(value + o)), value + o)
                e.put(share, dq + place)


def _temperature(
    e: Emitter, rows: Int, log_prob: Int, loss: Int, p: Int, g: Int, m: Int, v: Int, fixed: Int, entropy: Any, floor: Any,
    rate: Any, keep: Any, c1: Any, c2: Any, eps: Any, tau: Any, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """loss = -p (mean log_prob + entropy) and, unless ``fixed``, a step of Adam on p = log α, kept above ``floor``."""
    b = e.b
    e.put(e.zero, loss)
    with e.range(0, rows) as r:
        e.put(b.fadd(e.get(loss), e.get(log_prob + r * e.size)), loss)
    mean = b.fdiv(e.get(loss), b.sitofp(rows.value, e.scalar))
    slope = b.fneg(b.fadd(mean, entropy))
    e.put(b.fmul(e.get(p), slope), loss)
    with e.when(fixed.is_(0)):
        e.put(slope, g)
        e.call(adam, 1, p, g, m, v, 0, rate, keep, c1, c2, eps, tau, scratch, edge)
        e.put(e.greatest(e.get(p), floor), p)


draw, draw_backward = Kernel(_draw, ("low", "high")), Kernel(_draw_backward, ("scale",))
td_target, pick = Kernel(_td_target, ("scale",)), Kernel(_pick)
temperature = Kernel(_temperature, ("entropy", "floor", *NUMBERS))
KERNELS = [draw, draw_backward, td_target, pick, temperature]
