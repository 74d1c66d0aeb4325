"""A person taking over says that something went wrong just before (RLIF, arXiv 2311.12996; specification 2.11)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from robot_rl.types import Source

Operator = Literal["reactive", "preemptive"]


def takeover_rewards(
    source: np.ndarray, intervention_id: np.ndarray, *, delay_steps: int = 1, penalty: float = -1.0, only_reward: bool = True
) -> np.ndarray:
    """(T,) reward of every transition of an episode in which a person stepped in.

    The penalty is spread evenly over the ``delay_steps`` transitions of the policy before each take-over begins: a person needs
    that long to react, and the blame belongs to what they reacted to.

    Args:
        source, intervention_id: (T,) as recorded.
        only_reward: with no other reward, transitions under human control are NaN (unknown): nobody can take over from
            themselves, so the absence of a take-over says nothing there. Otherwise they are 0.

    Raises:
        ValueError: delay_steps below 1.
    """
    if delay_steps < 1:
        raise ValueError(
            f"delay_steps={delay_steps}: accepted are integers >= 1 (0.3 s of reaction is round(0.3 * control_hz))"
        )
    human = np.isin(source, (int(Source.HUMAN), int(Source.LATCHED), int(Source.BLEND), int(Source.HOLD))) & (
        intervention_id >= 0
    )
    reward = np.where(human & only_reward, np.nan, 0.0)
    previous = np.concatenate([[-1], intervention_id[:-1]])
    for start in np.flatnonzero((intervention_id >= 0) & (intervention_id != previous)):
        blamed = [t for t in range(max(0, int(start) - delay_steps), int(start)) if not human[t]]
        for t in blamed:
            reward[t] += penalty / len(blamed)
    return reward.astype(np.float32)


def reaction_steps(reaction_s: float, control_hz: float) -> int:
    """A person's reaction time in control steps, at least one."""
    return max(1, round(reaction_s * control_hz))
