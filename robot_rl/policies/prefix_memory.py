"""What a large policy made of an observation, found again by the conditioning that heads and replay buffers carry.

A vision-language-action model turns an observation into megabytes of attention keys and values. A replay buffer cannot hold those
for every step, and heads have no use for them: they read a feature vector. That vector's own bytes are the key under which the rest
is remembered here; a copy of it, however it was indexed, repeated or stored, finds the same.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def row_keys(rows: Tensor) -> list[bytes]:
    """One key a row of (B, C), from its bytes."""
    data = rows.detach().float().cpu().contiguous().numpy()
    return [hashlib.blake2b(r.tobytes(), digest_size=16).digest() for r in data]


@dataclass
class Prefix:
    """What the sampler reads of B observations: tensors with B rows each, by name."""

    tensors: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


class PrefixMemory:
    """Prefixes by conditioning row, the newest ``prefix_bytes`` of them; observations by the same, the newest ``input_bytes``.

    Args:
        compute: observations (features to (B, n_obs, ...)) to a prefix, for rows whose own was forgotten.
    """

    def __init__(
        self, compute: Callable[[dict[str, Tensor]], Prefix], prefix_bytes: int, input_bytes: int, device: str
    ) -> None:
        self._compute, self._limits, self._device = compute, (prefix_bytes, input_bytes), device
        self._prefixes: OrderedDict[int, tuple[Prefix, list[bytes]]] = OrderedDict()
        self._place: dict[bytes, tuple[int, int]] = {}
        self._inputs: OrderedDict[bytes, dict[str, Tensor]] = OrderedDict()
        self._prefix_bytes = self._input_bytes = self._number = 0
        self.recomputed = 0

    def add(self, rows: Tensor, prefix: Prefix, observation: Mapping[str, Tensor]) -> None:
        """Remember what ``rows`` (B, C) stand for."""
        keys = row_keys(rows)
        self._add_prefix(keys, prefix)
        for i, key in enumerate(keys):
            if key in self._inputs:
                self._inputs.move_to_end(key)
                continue
            kept = {n: v[i].cpu().clone() for n, v in observation.items()}
            self._inputs[key] = kept
            self._input_bytes += sum(v.nbytes for v in kept.values())
        while self._input_bytes > self._limits[1] and len(self._inputs) > len(keys):
            _, dropped = self._inputs.popitem(last=False)
            self._input_bytes -= sum(v.nbytes for v in dropped.values())

    def _add_prefix(self, keys: list[bytes], prefix: Prefix) -> None:
        self._number += 1
        self._prefixes[self._number] = prefix, keys
        self._prefix_bytes += prefix.bytes
        for i, key in enumerate(keys):
            self._place[key] = self._number, i
        while self._prefix_bytes > self._limits[0] and len(self._prefixes) > 1:
            number, (dropped, theirs) = self._prefixes.popitem(last=False)
            self._prefix_bytes -= dropped.bytes
            for key in theirs:
                if self._place.get(key, (0, 0))[0] == number:
                    del self._place[key]

    def find(self, rows: Tensor) -> Prefix:
        """The prefix of (B, C) conditioning rows, in their order.

        Raises:
            LookupError: rows that this policy never made of an observation, or that were forgotten with their observation.
        """
        keys = row_keys(rows)
        missing = list(dict.fromkeys(k for k in keys if k not in self._place))
        lost = [k for k in missing if k not in self._inputs]
        if lost:
            raise LookupError(
                f"{len(lost)} of {len(keys)} conditioning rows belong to no observation that this policy remembers. It remembers the "
                f"newest {self._limits[1] >> 20} MiB of observations (base.options.input_cache_mb); a learner that asks the base "
                "about all of its replay needs them all; dsrl_sac does not ask"
            )
        if missing:
            stacks = {n: torch.stack([self._inputs[k][n] for k in missing]).to(self._device) for n in self._inputs[missing[0]]}
            self.recomputed += len(missing)
            again = self._compute(stacks)
        places = {k: self._place[k] for k in keys if k in self._place} | {k: (0, i) for i, k in enumerate(missing)}
        parts = {number: self._prefixes[number][0] for number in {p[0] for p in places.values()} if number}
        if missing:
            parts[0] = again
        found = _gather([places[k] for k in keys], parts)
        if missing:
            self._add_prefix(missing, again)
        return found


def _gather(places: list[tuple[int, int]], parts: dict[int, Prefix]) -> Prefix:
    if len(parts) == 1:
        (whole,) = parts.values()
        rows = [row for _, row in places]
        if rows == list(range(len(whole))):
            return whole
        return Prefix({n: t[rows] for n, t in whole.tensors.items()})
    out = {}
    for name in next(iter(parts.values())).tensors:
        out[name] = torch.stack([parts[number].tensors[name][row] for number, row in places])
    return Prefix(out)
