"""Who made a recorded step, for learners that imitate some steps more than others (Sirius, Liu et al. 2023; IWR, Mandlekar et al. 2020)."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from robot_rl.types import Episode, FeatureSpec, Source, Stratum

PRE_INTERVENTION = 15
"""Steps before a takeover that the human saw going wrong (Sirius)."""


class RowClass(IntEnum):
    DEMONSTRATION = 0
    ROLLOUT = 1
    INTERVENTION = 2
    PRE_INTERVENTION = 3


ROW_CLASS, SUCCEEDED = "row_class", "succeeded"
FACTS = {ROW_CLASS: FeatureSpec((), "uint8"), SUCCEEDED: FeatureSpec(())}
"""Per-step arrays that a replay buffer carries for such learners."""


def step_facts(episode: Episode, stratum: Stratum | None = None) -> dict[str, np.ndarray]:
    """``row_class`` (L,) uint8 and ``succeeded`` (L,) float32, 1 in episodes known to have succeeded, and in demonstrations that do
    not say how they ended.

    A demonstration is one from end to end, whoever made it; anywhere else steps that a human executed are interventions, and
    the policy's last 15 before each of them are pre-intervention.
    """
    length, success = len(episode), episode.meta.success
    shown = Stratum(stratum or episode.meta.stratum) is Stratum.DEMONSTRATION
    classes = np.full(length, RowClass.ROLLOUT, np.uint8)
    if shown:
        classes[:] = RowClass.DEMONSTRATION
    else:
        human = episode.source == Source.HUMAN
        takeovers = np.flatnonzero(human & ~np.concatenate([[False], human[:-1]]))
        for at in takeovers:
            classes[max(0, at - PRE_INTERVENTION) : at] = RowClass.PRE_INTERVENTION
        classes[human] = RowClass.INTERVENTION
    return {ROW_CLASS: classes, SUCCEEDED: np.full(length, float(shown if success is None else success), np.float32)}
