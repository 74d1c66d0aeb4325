"""The write-ahead log of one running episode: fixed-size step records, each with its length and CRC.

File: ``magic | u32 length | u32 crc | JSON header``, then records ``u32 length | u32 crc | u8 kind | body``. A reader stops at
the first record whose length or CRC does not fit, so a torn tail costs the torn record and what follows it, never more.
Step records hold the raw frames too; everything is little-endian and packed.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.errors import SchemaError, StoreError
from robot_rl.replay.schema import SCHEMA_VERSION, StoreSpec, meta_from_json, meta_to_json
from robot_rl.types import Decision, EpisodeMeta, Step

MAGIC = b"RRLWAL\x00\x01"
STEP, DECISION, FINAL = 1, 2, 3
_HEAD = struct.Struct("<II")
_ACTIONS = ("action", "action_base", "action_policy", "action_human")
_SCALARS = struct.Struct("<BIBIf??iiiiq")  # kind, index, source, safety, reward, terminated, ... as in _SCALAR_FIELDS
_F4 = np.dtype("<f4")
_LOWEST, _HIGHEST = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
_SMALL = 4096  # bytes of an observation worth a second copy
_SCALAR_FIELDS = [
    ("kind", "u1"), ("index", "<u4"), ("source", "u1"), ("safety", "<u4"), ("reward", "<f4"), ("terminated", "?"),
    ("truncated", "?"), ("decision_id", "<i4"), ("chunk_row", "<i4"), ("weights_version", "<i4"), ("intervention_id", "<i4"),
    ("stamp_ns", "<i8"),
]  # fmt: skip
_DECISION = struct.Struct("<Bidii??HHH")  # kind, step, log_prob, candidate, version, explored, has_noise, H, H_w, A_w


def step_dtype(spec: StoreSpec) -> np.dtype:
    """The packed record of one step, ``size`` and ``crc`` included."""
    dim = (spec.action.dim,)
    fields: list[Any] = [("size", "<u4"), ("crc", "<u4"), *_SCALAR_FIELDS, *((name, "<f4", dim) for name in _ACTIONS)]
    fields += [(f"o:{k}", np.dtype(f.dtype).newbyteorder("<"), f.shape) for k, f in spec.observation_features.items()]
    return np.dtype(fields)


class StepRows:
    """Steps of the running episode in RAM, laid out as the log's records so that logging them is one ``write``.

    Rows live in blocks that are never moved: the control thread fills row ``count`` and then raises ``count``; a flusher may
    read every row below it at any time.
    """

    def __init__(self, spec: StoreSpec):
        self.dtype = step_dtype(spec)
        self.itemsize = self.dtype.itemsize
        self.block_rows = min(max((1 << 20) // self.itemsize, 8), 512)
        self.count = 0
        self.blocks: list[np.ndarray] = []
        self._features = [(k, f.shape, np.dtype(f.dtype)) for k, f in spec.observation_features.items()]
        self._shape = (spec.action.dim,)
        self._head = struct.Struct(_SCALARS.format + len(_ACTIONS) * f"{4 * spec.action.dim}s")
        self._nobody = np.full(spec.action.dim, np.nan, "<f4").tobytes()
        self._numbers = struct.Struct(f"<{spec.action.dim}f")
        self._packers = [self._packer(f"o:{name}", dtype) for name, _, dtype in self._features]
        self._castable: dict[tuple[Any, Any], bool] = {}
        self._new_block()

    def _new_block(self) -> None:
        block = np.zeros(self.block_rows, self.dtype)
        self.blocks.append(block)
        self._bytes = block.view(np.uint8).data.cast("B")
        self._views = [block[f"o:{name}"] for name, _, _ in self._features]
        self._row = 0

    def _packer(self, field: str, native: np.dtype) -> tuple[struct.Struct | None, int, np.dtype]:
        """How a small array becomes bytes of its field: packer, offset, and the dtype whose bytes are those of the file."""
        assert self.dtype.fields is not None
        dtype, offset = self.dtype.fields[field][:2]
        small = dtype.itemsize <= _SMALL and dtype.base == native
        return (struct.Struct(f"{dtype.itemsize}s") if small else None), offset, native

    def append(self, step: Step) -> None:
        """Copy one step in. A step that does not fit raises ValueError and leaves nothing behind.

        A control loop comes here with cold caches, where each first use of a routine costs several microseconds: hence bytes,
        ``pack_into`` for all that is small, rather than numpy's own assignments and reductions.
        """
        if self._row == self.block_rows:
            self._new_block()
        base, policy, human = step.action_base, step.action_policy, step.action_human
        action = self._action_bytes("action", step.action)
        for x in self._numbers.unpack(action):
            if not _LOWEST <= x <= _HIGHEST:  # NaN fails it too
                raise ValueError(f"step {self.count}: action={step.action!r}, expected {self._shape[0]} finite numbers")
        observation = step.observation
        if len(observation) != len(self._features):
            raise ValueError(
                f"step {self.count}: observation has {sorted(observation)}; the store holds {[f[0] for f in self._features]}"
            )
        values = [self.check_observation(observation, feature) for feature in self._features]
        start = self._row * self.itemsize
        try:
            # A step refused here may leave bytes in the row, but the row does not count and the next step fills all of it.
            self._head.pack_into(
                self._bytes, start + 8, STEP, self.count, step.source, step.safety, step.reward,
                step.terminated, step.truncated, step.decision_id, step.chunk_row, step.weights_version, step.intervention_id,
                step.stamp_ns, action,
                self._nobody if base is None else self._action_bytes("action_base", base),
                self._nobody if policy is None else self._action_bytes("action_policy", policy),
                self._nobody if human is None else self._action_bytes("action_human", human),
            )  # fmt: skip
        except (struct.error, TypeError) as error:
            raise ValueError(f"step {self.count}: a scalar does not fit its type: {error}") from error
        for (packer, offset, dtype), view, value in zip(self._packers, self._views, values, strict=True):
            if packer is not None and value.dtype is dtype:
                packer.pack_into(self._bytes, start + offset, value.tobytes())
            else:
                view[self._row] = value
        self._row += 1
        self.count += 1  # last: a flusher reads rows below count only

    def _action_bytes(self, name: str, value: Any) -> bytes:
        """``value`` as (A,) little-endian float32; ValueError where its shape is another."""
        if value.__class__ is not np.ndarray:
            value = np.asarray(value)
        if value.shape != self._shape:
            raise ValueError(f"step {self.count}: {name} has shape {value.shape}, expected {self._shape}")
        return (value if value.dtype is _F4 else value.astype(_F4)).tobytes()

    def check_observation(self, observation: Any, feature: tuple[str, tuple[int, ...], np.dtype]) -> np.ndarray:
        """The array of one feature. Raises ValueError naming the feature that is missing or does not fit."""
        name, shape, dtype = feature
        value = observation.get(name)
        if value is None:
            raise ValueError(f"step {self.count}: observation lacks {name!r}; it has {sorted(observation)}")
        if value.__class__ is not np.ndarray:
            value = np.asarray(value)
        if value.shape != shape:
            raise ValueError(f"step {self.count}: {name} has shape {value.shape}, expected {shape}")
        if value.dtype is not dtype:
            pair = (value.dtype, dtype)
            if pair not in self._castable:
                self._castable[pair] = np.can_cast(value.dtype, dtype, "same_kind")
            if not self._castable[pair]:
                raise ValueError(f"step {self.count}: {name} has dtype {value.dtype}, expected {dtype}")
        return value

    def observation_arrays(self, observation: Any) -> list[np.ndarray]:
        """Every feature of one observation, checked, in the store's order."""
        if len(observation) != len(self._features):
            raise ValueError(f"final observation has {sorted(observation)}; the store holds {[f[0] for f in self._features]}")
        return [np.ascontiguousarray(self.check_observation(observation, f), f[2]) for f in self._features]

    def column(self, name: str, extra: int = 0) -> np.ndarray:
        """(count + extra, ...) copy of one field; the extra rows are left for the caller to fill."""
        first = self.blocks[0][name]
        out = np.empty((self.count + extra, *first.shape[1:]), first.dtype.newbyteorder("="))
        for i, block in enumerate(self.blocks):
            low = i * self.block_rows
            rows = min(self.block_rows, self.count - low)
            out[low : low + rows] = block[name][:rows]
        return out

    def sealed(self, first: int, last: int) -> list[memoryview]:
        """Bytes of records [first, last) with their length and CRC filled in."""
        out = []
        size = self.itemsize - 8
        while first < last:
            block, row = divmod(first, self.block_rows)
            stop = min(self.block_rows, row + last - first)
            data = self.blocks[block].view(np.uint8).data.cast("B")
            for offset in range(row * self.itemsize, stop * self.itemsize, self.itemsize):
                _HEAD.pack_into(data, offset, size, zlib.crc32(data[offset + 8 : offset + self.itemsize]))
            out.append(data[row * self.itemsize : stop * self.itemsize])
            first += stop - row
        return out


def record(body: bytes) -> bytes:
    return _HEAD.pack(len(body), zlib.crc32(body)) + body


def header_bytes(meta: EpisodeMeta, spec: StoreSpec, writer_id: str) -> bytes:
    """The head of a log: all that recovery needs, whatever became of ``store.json``."""
    body = json.dumps(
        {"schema_version": SCHEMA_VERSION, "writer": writer_id, "meta": meta_to_json(meta), "spec": spec.to_json()}
    ).encode()
    return MAGIC + record(body)


def decision_bytes(decision: Decision) -> bytes:
    noise = decision.noise
    shape = (0, 0) if noise is None else noise.shape
    return record(
        _DECISION.pack(
            DECISION,
            decision.step,
            decision.log_prob,
            decision.candidate_index,
            decision.weights_version,
            decision.explored,
            noise is not None,
            decision.chunk.shape[0],
            *shape,
        )
        + (b"" if noise is None else noise.astype("<f4").tobytes())
        + decision.chunk_base.astype("<f4").tobytes()
        + decision.chunk.astype("<f4").tobytes()
    )


def final_bytes(meta: EpisodeMeta, observation: list[np.ndarray]) -> bytes:
    text = json.dumps(meta_to_json(meta)).encode()
    return record(
        struct.pack("<BI", FINAL, len(text))
        + text
        + b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in observation)
    )


@dataclass
class WalContent:
    """What a log held: ``steps`` is a structured array, ``final`` the closing record when it was reached."""

    writer_id: str
    meta: EpisodeMeta
    spec: StoreSpec
    steps: np.ndarray
    decisions: list[Decision] = field(default_factory=list)
    final: dict[str, np.ndarray] | None = None
    torn_bytes: int = 0

    def column(self, name: str) -> np.ndarray:
        return np.ascontiguousarray(self.steps[name], self.steps.dtype[name].base.newbyteorder("="))


def read_header(path: Path) -> tuple[dict[str, Any], int] | None:
    """The header and where records begin, or ``None`` when the log was cut inside its header."""
    with open(path, "rb") as file:
        head = file.read(len(MAGIC) + _HEAD.size)
        if len(head) < len(MAGIC) + _HEAD.size:
            return None
        if head[:6] != MAGIC[:6]:
            raise StoreError(f"{path} is not a write-ahead log: it starts with {head[:8]!r}, expected {MAGIC!r}")
        size, crc = _HEAD.unpack_from(head, len(MAGIC))
        body = file.read(size)
        if len(body) < size or zlib.crc32(body) != crc:
            return None
        header = json.loads(body)
    if head[: len(MAGIC)] != MAGIC or header["schema_version"] != SCHEMA_VERSION:
        raise SchemaError(f"{path} was written with schema {header['schema_version']}; this version reads {SCHEMA_VERSION}")
    return header, len(head) + size


def read_wal(path: Path) -> WalContent | None:
    """Everything whole in a log; ``None`` when not even its header is."""
    found = read_header(path)
    if found is None:
        return None
    header, offset = found
    spec = StoreSpec.from_json(header["spec"])
    dtype = step_dtype(spec)
    size = os.path.getsize(path)
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    view = data.data.cast("B")
    content = WalContent(header["writer"], meta_from_json(header["meta"]), spec, np.zeros(0, dtype))
    rows: list[int] = []
    while offset + 9 <= size:
        length, crc = _HEAD.unpack_from(view, offset)
        body = view[offset + 8 : offset + 8 + length]
        if length < 1 or len(body) < length or zlib.crc32(body) != crc:
            break
        kind = body[0]
        if kind == STEP and length == dtype.itemsize - 8:
            rows.append(offset)
        elif kind == DECISION:
            content.decisions.append(_read_decision(body, spec))
        elif kind == FINAL:
            content.meta, content.final = _read_final(body, spec)
        else:
            raise StoreError(f"{path}: unknown record kind {kind} of {length} bytes at byte {offset}")
        offset += 8 + length
    content.torn_bytes = size - offset
    content.steps = np.empty(len(rows), dtype)
    out = content.steps.view(np.uint8).reshape(len(rows), dtype.itemsize)
    for i, at in enumerate(rows):
        out[i] = data[at : at + dtype.itemsize]
    return content


def _read_decision(body: memoryview, spec: StoreSpec) -> Decision:
    _, step, log_prob, candidate, version, explored, has_noise, horizon, rows, dims = _DECISION.unpack_from(body)
    values = np.frombuffer(body, "<f4", offset=_DECISION.size) if len(body) > _DECISION.size else np.zeros(0, "<f4")
    values = values.astype(np.float32)
    n, c = rows * dims, horizon * spec.action.dim
    return Decision(
        step=step, noise=values[:n].reshape(rows, dims) if has_noise else None,
        chunk_base=values[n : n + c].reshape(horizon, -1), chunk=values[n + c : n + 2 * c].reshape(horizon, -1),
        log_prob=log_prob, candidate_index=candidate, weights_version=version, explored=explored,
    )  # fmt: skip


def _read_final(body: memoryview, spec: StoreSpec) -> tuple[EpisodeMeta, dict[str, np.ndarray]]:
    _, size = struct.unpack_from("<BI", body)
    meta = meta_from_json(json.loads(bytes(body[5 : 5 + size])))
    offset, observation = 5 + size, {}
    for name, feature in spec.observation_features.items():
        dtype = np.dtype(feature.dtype)
        count = math.prod(feature.shape)
        value = np.frombuffer(body, dtype.newbyteorder("<"), count, offset).astype(dtype)
        observation[name] = value.reshape(feature.shape)
        offset += count * dtype.itemsize
    return meta, observation
