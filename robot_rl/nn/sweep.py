"""Several temporal-difference updates of stacked networks in a row, as one piece of compiled work.

While a policy stands still, nothing but the critics decides what their next update does, so a group of updates needs no
Python in between: its steps are tasks that wait for one another (:func:`robot_rl.nn.team.in_order`). A network that has taken
its step begins the next update while others still work on this one, and the networks that the next targets ask come
first, so that threads wait for each other only where the group ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from robot_rl.nn.compiled import Plan, adam_edges, plan_of
from robot_rl.nn.team import Task, hold, in_order

if TYPE_CHECKING:
    from robot_rl.nn.flat import FlatAdam
    from robot_rl.nn.mlp import StackedMLP, Tape


@dataclass(frozen=True)
class Sweep:
    """U updates of ``net`` (N networks with one output) towards y = reward + discount (min over heads of target(next_x) + bonus_scale bonus).

    Attributes:
        x, next_x: (U, B, D), the last axis contiguous. reward, discount, bonus, y: (U, B) contiguous; ``y`` is written.
        weight: (U, B), the last axis contiguous: of each row's squared error, as in :meth:`StackedMLP.regress`.
        heads: (U, K) int64, which networks of the target an update asks, K being the tape's.
        optimizer: of ``net``, without a limit on the gradient's norm. tau: of ``target``, which follows after each step.
    """

    net: StackedMLP
    target: StackedMLP
    tape: Tape
    target_tape: Tape
    optimizer: FlatAdam
    tau: float
    x: Tensor
    next_x: Tensor
    reward: Tensor
    discount: Tensor
    bonus: Tensor | None
    bonus_scale: float
    weight: Tensor
    heads: Tensor
    y: Tensor

    def run(self) -> tuple[Tensor, Tensor]:
        """Do them all; returns outputs and dL/dout of the last one, (N, B) each, as :meth:`StackedMLP.regress` does."""
        plan, target = plan_of(self.net, self.tape), plan_of(self.target, self.target_tape)
        parts = max(plan.parts(3 * plan.flops), target.parts(target.flops))
        group = _Group(self, plan, target, parts)
        hold(self, group)
        in_order(
            list(group.tasks()), group.counters, (group.count(group.updates - 1, 4), group.ends), plan.rooms(parts, target)
        )
        self.tape.inputs = [self.x[-1].expand(self.net.n, -1, -1)]
        return self.tape.outputs[-1].squeeze(-1), plan.dq


class _Group:
    """The tasks of a sweep: per update those of the target (``asks``), of y, and of the networks (``fits``).

    Counters: one a network, its finished updates; then per update the finished asks, whether y is there, and the finished tasks of
    each stage of the fits.
    """

    STAGES = 5  # counters an update: asks, y, rows, gradients, Adam

    def __init__(self, sweep: Sweep, plan: Plan, target: Plan, parts: int) -> None:
        self.sweep, self.plan, self.target, self.parts = sweep, plan, target, parts
        self.updates = len(sweep.x)
        self.counters = plan.slots + self.STAGES * self.updates
        self.whole = plan.by_network(parts)
        self.heads = sweep.heads.tolist()
        flat, optimizer = sweep.net.flat, sweep.optimizer
        self.numbers = [optimizer.advance(sweep.tau) for _ in range(self.updates)]
        vectors = (flat.data, flat.grad, optimizer.exp_avg, optimizer.exp_avg_sq, sweep.target.flat.data)
        self.vectors = tuple(v.data_ptr() for v in vectors)
        self.fit_tables, self.ask_tables = plan.tapes(sweep.x), target.tapes(sweep.next_x)
        size, edges = plan.size, adam_edges(flat, parts)
        self.pieces = np.array([(a * size, b - a) for a, b in pairwise(edges)], np.int64)
        self.ends = plan.slots if self.whole else len(self.pieces)  # how many tasks end an update
        self.ask_shares = target.shares(min(parts, target.parts(target.flops)), target.total)

    def count(self, update: int, stage: int) -> int:
        return self.plan.slots + self.STAGES * update + stage

    def tasks(self) -> Iterator[Task]:
        for u in range(self.updates):
            last = u + 1 == self.updates
            if u == 0:
                yield from self.asks(0)
                yield self.join(0)
            fits = self.fits(u)
            if last or not self.whole:
                yield from (task for _, task in fits)
                if not last:
                    yield from self.asks(u + 1)
                    yield self.join(u + 1)
                continue
            # The next update's target networks first, and next to them those of the one after: they begin the next update.
            asked = set(self.heads[u + 1])
            later = set(self.heads[u + 2]) if u + 2 < self.updates else set()
            fits.sort(key=lambda fit: 0 if fit[0] in asked else 1 if fit[0] in later else 2)
            ready = min(len(fits), len(asked) + self.parts - 1)  # by then the threads have at most begun other networks
            joined = min(len(fits), ready + self.parts)
            yield from (task for _, task in fits[:ready])
            yield from self.asks(u + 1)
            yield from (task for _, task in fits[ready:joined])
            yield self.join(u + 1)
            yield from (task for _, task in fits[joined:])

    def asks(self, u: int) -> Iterator[Task]:
        """Values of the target at the next states."""
        s, t = self.sweep, self.target
        layers, dims, params, _ = t.head
        front = (layers, dims, params, self.ask_tables[u], s.heads.data_ptr() + 8 * s.heads.shape[1] * u, t.total)
        for share in self.ask_shares:
            waits: tuple[tuple[int, int], ...] = ()
            if u > 0 and self.whole and share[1] - share[0] <= 2:
                waits = tuple((head, u) for head in self.heads[u][share[0] : share[1]])
            elif u > 0:
                waits = ((self.count(u - 1, 4), self.ends),)
            yield Task(t.program.forward, (*front, *share, 0, 0), waits, (self.count(u, 0),))

    def join(self, u: int) -> Task:
        """From them and the rewards, y."""
        s, t = self.sweep, self.target
        bonus = 0 if s.bonus is None else s.bonus[u].data_ptr()
        vectors = (self.sweep.target_tape.outputs[-1], s.reward[u], s.discount[u])
        arguments = (t.slots, t.total, *(v.data_ptr() for v in vectors), bonus, s.y[u].data_ptr(), s.bonus_scale, 0, 0)
        return Task(
            t.program.td_target, arguments, ((self.count(u, 0), len(self.ask_shares)),), (self.count(u, 1),)
        )  # fmt: skip

    def fits(self, u: int) -> list[tuple[int, Task]]:
        """Regression and step; with each task the network that it is about."""
        s, plan, program = self.sweep, self.plan, self.plan.program
        layers, dims, params, _ = plan.head
        head = (layers, dims, params, self.fit_tables[u])
        error = (s.y[u].data_ptr(), 0, s.weight[u].data_ptr(), plan.dq.data_ptr())
        front, sums = (*head, plan.all_heads, plan.total, *error), (plan.sums, plan.widest)
        numbers, there = self.numbers[u], (self.count(u, 1), 1)
        if self.whole:
            slices, per_network = plan.slices
            rest = (*sums, slices, per_network, *self.vectors, *numbers, 0, 0)
            ended = self.count(u, 4)
            return [
                (h, Task(program.fit_whole, (*front, h, h + 1, *rest), (there, (h, u)), (h, ended)))
                for h in range(plan.slots)
            ]  # fmt: skip
        stage = [self.count(u, i) for i in range(self.STAGES)]
        before = ((self.count(u - 1, 4), self.ends),) if u else ()
        shares = plan.shares(self.parts, plan.total)
        tasks = [Task(program.regress, (*front, *r, *sums, 0, 0), (there, *before), (stage[2],)) for r in shares]
        slope = (plan.dq.data_ptr(), plan.total * plan.size, plan.size)
        gradient = (*head, plan.total, plan.total, *slope, 0, plan.slots)
        tasks += [
            Task(program.backward_parameters, (*gradient, p, self.parts, *sums, 0, 0), ((stage[2], len(shares)),), (stage[3],))
            for p in range(self.parts)
        ]  # fmt: skip
        for i in range(len(self.pieces)):
            arguments = (self.pieces[i].ctypes.data, 1, *self.vectors, *numbers, 0, 0)
            tasks.append(Task(program.adam_slices, arguments, ((stage[3], self.parts),), (stage[4],)))
        return [(0, task) for task in tasks]
