"""Adam as compiled code, over whole vectors and over pieces of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robot_rl.nn.simd import Emitter, Int, Kernel

NUMBERS = ("rate", "keep", "c1", "c2", "eps", "tau")  # what FlatAdam.advance gives


class _Step:
    """One step for the elements at an offset, for vectors of them (``wide``) or single ones."""

    def __init__(self, e: Emitter, wide: bool, p: Int, g: Int, m: Int, v: Int, target: Int, numbers: Sequence[Any]) -> None:
        self.e, self.addresses, self.target = e, (p, g, m, v), target
        self.load, self.store = (e.load, e.store) if wide else (e.get, e.put)
        self.numbers = [e.spread(x) for x in numbers] if wide else numbers

    def at(self, o: Int, follow: bool) -> None:
        e, b = self.e, self.e.b
        p, g, m, v = (x + o for x in self.addresses)
        rate, keep, c1, c2, eps, tau = self.numbers
        gradient, first, second = (self.load(x) for x in (g, m, v))
        first = e.fma(c1, b.fsub(gradient, first), first)
        second = e.fma(c2, b.fsub(b.fmul(gradient, gradient), second), second)
        self.store(first, m)
        self.store(second, v)
        denominator = b.fadd(e.root(second), eps)
        new = b.fsub(b.fmul(self.load(p), keep), b.fdiv(b.fmul(rate, first), denominator))
        self.store(new, p)
        if follow:
            old = self.load(self.target + o)
            self.store(e.fma(tau, b.fsub(new, old), old), self.target + o)


def _adam(
    e: Emitter, n: Int, p: Int, g: Int, m: Int, v: Int, target: Int,
    rate: Any, keep: Any, c1: Any, c2: Any, eps: Any, tau: Any, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """One step of Adam, then ``target`` (0: none) += tau (p - target); what depends on the step count is in rate and eps.

    m += c1 (g - m);  v += c2 (g² - v);  p = keep p - rate m / (sqrt v + eps)

    ``n``: a multiple of a vector's width, or less than one vector.
    """
    wide, single = (_Step(e, x, p, g, m, v, target, (rate, keep, c1, c2, eps, tau)) for x in (True, False))
    for follow, condition in ((True, target > 0), (False, ~(target > 0))):

        def body(o: Int, _: list[Any], follow: bool = follow) -> list[Any]:
            wide.at(o, follow)
            return []

        with e.when(condition & (n < e.width)), e.range(0, n) as i:
            single.at(i * e.size, follow)
        with e.when(condition & ~(n < e.width)):
            e.over(n, body)


def _adam_slices(
    e: Emitter, slices: Int, count: Int, p: Int, g: Int, m: Int, v: Int, target: Int,
    rate: Any, keep: Any, c1: Any, c2: Any, eps: Any, tau: Any, scratch: Int, edge: Int,
) -> None:  # fmt: skip
    """:func:`_adam` on pieces of the vectors: ``slices`` (count, 2) are their first bytes and their elements."""
    with e.range(0, count) as i:
        first, n = e.table(slices, i * 2), e.table(slices, i * 2 + 1)
        follower = (target > 0).choose(target + first, 0)
        e.call(
            adam, n, p + first, g + first, m + first, v + first, follower, rate, keep, c1, c2, eps, tau, scratch, edge
        )  # fmt: skip


adam, adam_slices = Kernel(_adam, NUMBERS), Kernel(_adam_slices, NUMBERS)
KERNELS = [adam, adam_slices]
