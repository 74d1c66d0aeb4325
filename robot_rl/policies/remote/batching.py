"""One thread asks the policy; robots that ask while it is busy are answered together."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from robot_rl.policies.base import BasePolicy
from robot_rl.policies.remote.messages import Arrays

Operation = Literal["encode", "sample", "infer"]
NOISE, CONDITIONING, CHUNK = "noise", "conditioning", "chunk"


@dataclass
class Question:
    """One robot's question; the future holds what it asked for."""

    operation: Operation
    arrays: Arrays
    rows: int
    answer: Future[Arrays] = field(default_factory=Future)


@dataclass
class BatchCounts:
    """Since the server started. ``cached``: observation rows whose encoding was still known."""

    questions: int = 0
    batches: int = 0
    largest: int = 0
    encoded: int = 0
    cached: int = 0


class Batcher:
    """Answers questions of many threads with few calls of one policy.

    Waits for nobody: what has come in while the policy was busy goes into the next call. A chunk may then differ in its last
    bits from one that was computed alone (matrix products of another size round otherwise); ``max_rows=1`` computes each alone.

    Args:
        max_rows: observations in one call.
        cache_rows: encodings kept, by the observation's own bytes: candidates, retries and heads that ask twice pay once.
    """

    def __init__(self, base: BasePolicy, device: str = "cpu", *, max_rows: int = 64, cache_rows: int = 1024) -> None:
        self.base, self.device, self.max_rows, self.cache_rows = base, device, max_rows, cache_rows
        self.counts = BatchCounts()
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._waiting: deque[Question] = deque()
        self._wake, self._stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)
        self._thread.start()

    def ask(self, operation: Operation, arrays: Arrays) -> Future[Arrays]:
        """Raises ValueError for arrays that do not fit the policy."""
        question = Question(operation, arrays, self._check(operation, arrays))
        with self._wake:
            if self._stopped:
                raise RuntimeError("the server is stopping")
            self._waiting.append(question)
            self._wake.notify()
        return question.answer

    def close(self) -> None:
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join(10.0)
        for question in self._waiting:
            question.answer.set_exception(RuntimeError("the server is stopping"))

    # ---- one question

    def _check(self, operation: Operation, arrays: Arrays) -> int:
        spec = self.base.spec
        wanted: dict[str, tuple[tuple[int, ...], str]] = {}
        if operation in ("encode", "infer"):
            wanted = {n: ((spec.n_obs_steps, *f.shape), f.dtype) for n, f in spec.observation_features.items()}
        if operation == "sample":
            wanted[CONDITIONING] = ((spec.conditioning_dim,), "float32")
        if operation in ("sample", "infer") and spec.noise_shape is not None:
            wanted[NOISE] = (spec.noise_shape, "float32")
        if operation not in ("encode", "sample", "infer"):
            raise ValueError(f"operation {str(operation)[:32]!r}: accepted are encode, sample, infer")
        if arrays.keys() != wanted.keys():
            raise ValueError(f"{operation} takes {sorted(wanted)}; {sorted(arrays)} came")
        rows = {len(a) if a.ndim else -1 for a in arrays.values()}
        if len(rows) != 1 or not 1 <= (n := rows.pop()) <= 4096:
            raise ValueError("all arrays have one row a robot, 1 to 4096 of them")
        for name, (shape, dtype) in wanted.items():
            if arrays[name].shape[1:] != shape or arrays[name].dtype != np.dtype(dtype):
                found = arrays[name]
                raise ValueError(f"{name} is {found.dtype} {found.shape[1:]}; accepted is {dtype} {shape}")
        return n

    # ---- the policy's thread

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopped:
                    self._wake.wait()
                if self._stopped:
                    return
                batch = self._take()
            self.counts.questions += len(batch)
            self.counts.batches += 1
            self.counts.largest = max(self.counts.largest, sum(q.rows for q in batch))
            try:
                answers = self._answer(batch)
            except Exception as error:
                for question in batch:
                    question.answer.set_exception(error)
            else:
                for question, answer in zip(batch, answers, strict=True):
                    question.answer.set_result(answer)

    def _take(self) -> list[Question]:
        """The oldest question, and those of its kind that waited with it, oldest first."""
        first = self._waiting.popleft()
        batch, rows, others = [first], first.rows, deque[Question]()
        while self._waiting:
            question = self._waiting.popleft()
            if question.operation == first.operation and rows + question.rows <= self.max_rows:
                batch.append(question)
                rows += question.rows
            else:
                others.append(question)
        self._waiting.extend(others)
        return batch

    @torch.no_grad()
    def _answer(self, batch: list[Question]) -> list[Arrays]:
        operation, sizes = batch[0].operation, [q.rows for q in batch]
        joined = {n: np.concatenate([q.arrays[n] for q in batch]) for n in batch[0].arrays}
        out: Arrays = {}
        noise = joined.pop(NOISE, None)
        conditioning = joined[CONDITIONING] if operation == "sample" else self._encode(joined)
        if operation != "sample":
            out[CONDITIONING] = conditioning
        if operation != "encode":
            w = None if noise is None else torch.from_numpy(noise.copy()).to(self.device)
            given = torch.from_numpy(conditioning.copy()).to(self.device)
            out[CHUNK] = self.base.sample(given, w).float().cpu().numpy()
        ends = np.cumsum(sizes)
        return [{n: a[end - size : end] for n, a in out.items()} for end, size in zip(ends, sizes, strict=True)]

    def _encode(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        rows = len(next(iter(observation.values())))
        keys = [_key(observation, i) for i in range(rows)]
        new = [i for i, k in enumerate(keys) if k not in self._cache]
        found = {k: self._cache[k] for k in keys if k in self._cache}
        if new:
            asked: dict[str, Any] = {n: torch.from_numpy(a[new].copy()).to(self.device) for n, a in observation.items()}
            encoded = self.base.encode(asked).float().cpu().numpy()
            found |= {keys[i]: row for i, row in zip(new, encoded, strict=True)}
        self.counts.encoded += len(new)
        self.counts.cached += rows - len(new)
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self.cache_rows:
            self._cache.popitem(last=False)
        return np.stack([found[k] for k in keys])


def _key(observation: Mapping[str, np.ndarray], row: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(observation):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(observation[name][row]).view(np.uint8).data)
    return digest.digest()
