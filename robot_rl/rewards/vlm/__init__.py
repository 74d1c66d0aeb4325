"""Questions to vision-language models over HTTP: constrained answers, a cache that can be replayed, hard limits."""

from robot_rl.rewards.vlm.client import VlmClient
from robot_rl.rewards.vlm.config import VlmConfig
from robot_rl.rewards.vlm.questions import Answer, Question

__all__ = ["Answer", "Question", "VlmClient", "VlmConfig"]
