"""Settings of the VLM client; every limit has a number (rewards specification, section 3.4)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

CacheMode = Literal["off", "readwrite", "replay"]
ImageFormat = Literal["jpeg", "png"]


@dataclass(frozen=True)
class VlmConfig:
    """An OpenAI-compatible server, what may be spent on it, and how long anything may take.

    Attributes:
        base_url: ``http(s)://host[:port][/prefix]``; ``/v1/chat/completions`` is added.
        model, revision: as the server names it; both go into the model's identity.
        api_key_env: name of the environment variable that holds the key; empty for none. Keys never stand in files or logs.
        requests_per_day, tokens_per_day, money_per_day: the budget; every attempt counts, retries too. No defaults: whoever
            runs a model says what it may cost. Money is 0 for a server of one's own.
        price_in, price_out: money per million tokens.
        state: SQLite file that keeps budget and cache across restarts; empty keeps them in memory.
        cache: ``replay`` never opens a socket.
        queue, in_flight: questions that wait (the oldest is dropped for a new one), and requests at a time.
        rate_per_s: requests a second; 0 for no limit. ``deadline_s`` is for one question, retries included.
        retries, backoff_s, backoff_most_s: only after connection errors, 429 and 5xx; full jitter.
        open_after, open_share, open_s: the circuit opens after so many failures in a row, or that share of the last 20, and
            lets one probe through after ``open_s``.
        max_age_s: a question that waited longer is answered ``stale`` without a request.
        short_side: larger pictures are scaled down to it.
        schema: ask for schema-constrained decoding; off for servers that refuse ``response_format``.
    """

    base_url: str
    model: str
    requests_per_day: int
    tokens_per_day: int
    money_per_day: float
    revision: str = ""
    api_key_env: str = ""
    price_in: float = 0.0
    price_out: float = 0.0
    reset_hour: int = 0
    state: str = ""
    cache: CacheMode = "readwrite"
    queue: int = 64
    in_flight: int = 4
    rate_per_s: float = 2.0
    deadline_s: float = 20.0
    connect_s: float = 2.0
    retries: int = 3
    backoff_s: float = 0.5
    backoff_most_s: float = 8.0
    open_after: int = 5
    open_share: float = 0.5
    open_s: float = 30.0
    max_age_s: float = 60.0
    short_side: int = 336
    image_format: ImageFormat = "jpeg"
    jpeg_quality: int = 92
    schema: bool = True
    max_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(f"vlm.base_url={self.base_url!r}: accepted is http(s)://host[:port][/prefix], without credentials")
        if not self.model:
            raise ValueError("vlm.model is empty: accepted is the name the server knows the model by")
        for name, accepted in (("cache", CacheMode), ("image_format", ImageFormat)):
            if getattr(self, name) not in get_args(accepted):
                raise ValueError(f"vlm.{name}={getattr(self, name)!r}: accepted are {', '.join(get_args(accepted))}")
        if self.cache == "replay" and not self.state:
            raise ValueError("vlm.state is empty: cache=replay needs the file the answers were recorded in")
        limits: dict[str, tuple[float, float]] = {
            "requests_per_day": (0, 1e9), "tokens_per_day": (0, 1e13), "money_per_day": (0, 1e9), "reset_hour": (0, 23),
            "queue": (1, 4096), "in_flight": (1, 256), "rate_per_s": (0, 1e4), "deadline_s": (0.05, 600), "connect_s": (0.05, 60),
            "retries": (0, 10), "backoff_s": (0, 60), "backoff_most_s": (0, 600), "open_after": (1, 1000), "open_share": (0, 1),
            "open_s": (0, 3600), "max_age_s": (0.1, 1e6), "short_side": (32, 2048), "jpeg_quality": (90, 100),
            "max_tokens": (1, 32768), "price_in": (0, 1e6), "price_out": (0, 1e6),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"vlm.{name}={value!r}: accepted are {low:g} to {high:g}")

    @property
    def model_id(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else self.model

    def api_key(self) -> str:
        """The key, or an empty string. Raises ValueError when the variable it should be in is not set."""
        if not self.api_key_env:
            return ""
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise ValueError(f"vlm.api_key_env={self.api_key_env!r}: that environment variable is not set")
        return key


BUDGET = ("requests_per_day", "tokens_per_day", "money_per_day")


def vlm_config(data: Mapping[str, Any] | VlmConfig) -> VlmConfig:
    """From a YAML mapping. Raises ValueError naming the key that is missing or unknown."""
    if isinstance(data, VlmConfig):
        return data
    known = [f.name for f in fields(VlmConfig)]
    for key in data:
        if key not in known:
            raise ValueError(f"vlm.{key}={data[key]!r} is unknown; accepted are {', '.join(known)}")
    for key in ("base_url", "model", *BUDGET):
        if key not in data:
            why = " (a budget has no default: say what a day may cost)" if key in BUDGET else ""
            raise ValueError(f"vlm.{key} is missing{why}")
    return VlmConfig(**data)
