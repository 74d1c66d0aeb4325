"""Pictures whose right answer is known, and clients with room to move."""

from __future__ import annotations

from typing import Any

import numpy as np

from robot_rl.rewards.vlm import Question, VlmClient, VlmConfig
from robot_rl.rewards.vlm.questions import pair

GOAL = "to light the lamp"
ROOMY: dict[str, Any] = {"requests_per_day": 100_000, "tokens_per_day": 10**9, "money_per_day": 0.0}


def picture(level: int, size: int = 32) -> np.ndarray:
    return np.full((size, size, 3), level, np.uint8)


def pair_of(a: int, b: int) -> Question:
    return pair(GOAL, [picture(a)], [picture(b)])


def config(url: str, **changes: Any) -> VlmConfig:
    given: dict[str, Any] = {
        **ROOMY, "base_url": url, "model": "fake", "rate_per_s": 0.0, "cache": "off", "backoff_s": 0.001, "deadline_s": 5.0,
        "open_s": 0.05, **changes,
    }  # fmt: skip
    return VlmConfig(**given)


def client(url: str, **changes: Any) -> VlmClient:
    return VlmClient(config(url, **changes))
