"""Reward sources: what says how well it went, in a process of its own and never in the control loop."""

from robot_rl.rewards.registry import load_source, register_source, source_kinds
from robot_rl.rewards.source import EpisodeTrace, FrameBatch, RewardSource, ScoreBatch, SourceInfo

__all__ = [
    "EpisodeTrace",
    "FrameBatch",
    "RewardSource",
    "ScoreBatch",
    "SourceInfo",
    "load_source",
    "register_source",
    "source_kinds",
]
