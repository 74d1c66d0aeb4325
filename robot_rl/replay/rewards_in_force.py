"""Which rewards of an episode are in force: the recorded ones, what was heard late, and verdicts on how it went."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from robot_rl.replay.reward_log import LABEL_SOURCE
from robot_rl.replay.ring import Slot
from robot_rl.types import RewardEvent


def rewards_in_force(
    slot: Slot, events: Iterable[RewardEvent], success_reward: float, failure_reward: float
) -> tuple[np.ndarray, int, bool]:
    """Rewards in force, steps that may be sampled, and whether the last of them is terminal."""
    if slot.composed is not None:
        return slot.composed
    reward = slot.raw.copy()
    success, step, terminates = slot.success, slot.success_step, slot.terminates
    heard: dict[int, float] = {}
    labels = []
    for event in events:
        if event.valid and event.source == LABEL_SOURCE:
            labels.append(event)
        elif event.valid:
            heard[event.step] = heard.get(event.step, 0.0) + event.value
    for k, value in heard.items():
        reward[k - 1] = value
    if labels:
        last = max(labels, key=lambda e: e.event_id)
        success, step, terminates = last.value > 0.5, last.step, True
    if success is None:
        return reward, slot.length, slot.terminated
    reward[np.isnan(reward)] = 0.0
    if not success:
        reward[-1] = failure_reward
        return reward, slot.length, slot.terminated
    reward[step - 1] = success_reward
    return (reward, step, True) if terminates else (reward, slot.length, slot.terminated)
