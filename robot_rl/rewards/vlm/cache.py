"""Replies by what was asked, in SQLite: a run can be replayed without a network, and a fixed parser needs no new calls."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.rewards.vlm.config import VlmConfig
from robot_rl.rewards.vlm.questions import Question


def open_database(path: str) -> sqlite3.Connection:
    """One file (or memory) for cache and budget; used by one thread at a time."""
    if path:
        Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(str(Path(path).expanduser()) if path else ":memory:", timeout=10.0, check_same_thread=False)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=NORMAL")
    return database


def pixel_hash(image: np.ndarray) -> str:
    """sha256 of decoded pixels and shape."""
    image = np.ascontiguousarray(image)
    return hashlib.sha256(f"{image.shape}{image.dtype}".encode() + image.tobytes()).hexdigest()


def question_key(config: VlmConfig, question: Question) -> str:
    """sha256 over model, wording, parameters, goal, and the pictures in order."""
    parts = [part if isinstance(part, str) else pixel_hash(part) for part in question.content]
    asked = [
        config.model_id, question.template, question.prompt_hash, question.goal, parts, question.schema, question.logprobs,
        config.max_tokens, config.seed, config.short_side, config.image_format, config.jpeg_quality, config.schema,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """Raw replies; they are parsed anew whenever they are read."""

    COLUMNS = ("key", "model", "template", "raw", "finish", "top", "tokens_in", "tokens_out", "latency_ms", "time")

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, model TEXT, template TEXT, raw TEXT, finish TEXT, "
                "top TEXT, tokens_in INTEGER, tokens_out INTEGER, latency_ms REAL, time REAL)"
            )

    def __len__(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def get(self, key: str) -> tuple[str, str, dict[str, float]] | None:
        """Raw text, finish reason and first token's alternatives."""
        row = self._db.execute("SELECT raw, finish, top FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else (row[0], row[1], json.loads(row[2]))

    def put(
        self, key: str, config: VlmConfig, question: Question, raw: str, finish: str, top: dict[str, float],
        tokens: tuple[int, int], latency_ms: float,
    ) -> None:  # fmt: skip
        row = (key, config.model_id, question.template, raw, finish, json.dumps(top), *tokens, latency_ms, time.time())
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def export(self) -> Iterator[str]:
        """JSON lines, without pictures."""
        for row in self._db.execute(f"SELECT {', '.join(self.COLUMNS)} FROM replies ORDER BY key"):
            yield json.dumps(dict(zip(self.COLUMNS, row, strict=True)))

    def load(self, lines: Iterator[str]) -> int:
        """Take exported lines in; gives how many."""
        rows: list[tuple[Any, ...]] = []
        for line in lines:
            data = json.loads(line)
            rows.append(tuple(data[c] for c in self.COLUMNS))
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        return len(rows)
