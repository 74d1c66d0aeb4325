"""What a learner wants to know about every recorded step beside its action: per-step columns, and rewards of its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from robot_rl.heads.hybrid import gripper_table, nearest_choice
from robot_rl.learners.config import LearnerConfig, OffPolicyConfig, WeightedBCConfig
from robot_rl.learners.row_class import FACTS
from robot_rl.replay.windows import WindowConfig
from robot_rl.types import ActionSpec, Episode, FeatureSpec, Source, Stratum

GRIPPER_CHOICE, GRIPPER_STEADY, GRIPPER_CHANGE = "gripper_choice", "gripper_steady", "gripper_change"
UNLABELLED = "unlabelled"
GRIPPER = {GRIPPER_CHOICE: FeatureSpec((), "int64"), GRIPPER_STEADY: FeatureSpec(()), GRIPPER_CHANGE: FeatureSpec(())}


STEPS_LEFT, OUTCOME, ADVANTAGE = "steps_left", "outcome", "advantage"
RECAP = {STEPS_LEFT: FeatureSpec(()), OUTCOME: FeatureSpec((), "int8"), ADVANTAGE: FeatureSpec((), "uint8")}
"""Steps that follow until the last one; how the episode ended (1 success, 0 failure, -1 unknown); the label, which is written later."""


class OwnReward(NamedTuple):
    """A learner's own reward (L,) or None; whether the recorded one counts too; whether it is to be guessed later; (L,) bool, steps that
    nothing after them counts for, or None."""

    component: np.ndarray | None = None
    task: bool = True
    unlabelled: bool = False
    ends: np.ndarray | None = None

    def composed(self, reward: np.ndarray) -> np.ndarray:
        """The reward that returns are made of."""
        if self.component is None:
            return reward
        return reward + self.component if self.task else self.component


def columns(learner: LearnerConfig) -> dict[str, FeatureSpec]:
    """Per-step arrays that this learner's buffer carries beside the returns."""
    found: dict[str, FeatureSpec] = {}
    if isinstance(learner, WeightedBCConfig) or (
        isinstance(learner, OffPolicyConfig) and learner.base_update.rows == "success"
    ):
        found |= FACTS
    if learner.algorithm == "hybrid_sac":
        found |= GRIPPER
    if isinstance(learner, WeightedBCConfig) and learner.weights == "recap":
        found |= RECAP
    if isinstance(learner, OffPolicyConfig) and learner.optimism.strata:
        found[UNLABELLED] = FeatureSpec(())
    return found


def recap_facts(episode: Episode, stratum: Stratum | None) -> dict[str, np.ndarray]:
    """A demonstration that does not say how it ended succeeded."""
    length = len(episode)
    shown = Stratum(stratum or episode.meta.stratum) is Stratum.DEMONSTRATION
    outcome = {True: 1, False: 0, None: 1 if shown else -1}[episode.meta.success]
    return {
        STEPS_LEFT: np.arange(length - 1, -1, -1, dtype=np.float32), OUTCOME: np.full(length, outcome, np.int8),
        ADVANTAGE: np.zeros(length, np.uint8),
    }  # fmt: skip


def takeovers(episode: Episode) -> np.ndarray:
    """The policy's last step before each takeover. Letting go for a moment and taking hold again is one takeover."""
    ours = np.isin(episode.source, (int(Source.POLICY), int(Source.SAFETY)))
    found, last = [], -1
    for t, source in enumerate(episode.source):
        if source == Source.HUMAN and last >= 0:
            found.append(last)
        last = t if ours[t] else -1 if source == Source.HUMAN else last
    return np.array(found, np.int64)


def own_reward(episode: Episode, learner: LearnerConfig | None, stratum: Stratum | None = None) -> OwnReward:
    """``takeover_reward`` on the policy's last step before each takeover, once. A demonstration has none, whoever made it.

    Where takeovers are the only reward, it is unknown (NaN) while a person drives and in episodes that nobody watched: that nobody took over
    says nothing there, and taken for 0 it would teach that whatever was done was right (specification 2.11, ``human_steps: exclude``).
    Being taken over from then ends what is judged (ours; the published code bootstraps from the step after it, which the person plays): a
    chunk that was cut off by the person is worth the -1 that it came to, where its whole window would be unknown.
    """
    if not isinstance(learner, OffPolicyConfig):
        return OwnReward()
    ends = None
    component, kind = np.zeros(len(episode), np.float32), Stratum(stratum or episode.meta.stratum)
    if kind.value in learner.optimism.strata:
        return OwnReward(component, task=False, unlabelled=True)
    if not learner.takeover_reward:
        return OwnReward()
    if kind is not Stratum.DEMONSTRATION:
        component[takeovers(episode)] = learner.takeover_reward
        if not learner.task_reward:
            driven = np.isin(episode.source, (int(Source.HUMAN), int(Source.LATCHED), int(Source.BLEND)))
            component[driven | (episode.meta.extra.get("watched") is False)] = np.nan
            ends = component == learner.takeover_reward
    return OwnReward(component, learner.task_reward, ends=ends)


def learner_facts(
    episode: Episode,
    action: np.ndarray,
    learner: LearnerConfig | None,
    window: WindowConfig,
    spec: ActionSpec,
    own: OwnReward,
    stratum: Stratum | None = None,
) -> dict[str, np.ndarray]:
    """Columns that depend on the learner; ``action`` (L, A) normalised."""
    if isinstance(learner, WeightedBCConfig):
        return recap_facts(episode, stratum) if learner.weights == "recap" else {}
    if not isinstance(learner, OffPolicyConfig):
        return {}
    found = {UNLABELLED: np.full(len(episode), float(own.unlabelled), np.float32)} if learner.optimism.strata else {}
    if learner.algorithm != "hybrid_sac":
        return found
    gripper = spec.gripper_mask
    return found | gripper_facts(action[:, gripper], learner.gripper.told(spec), window, stays=spec.delta_mask[gripper])


def gripper_facts(
    command: np.ndarray, values: tuple[float, ...], window: WindowConfig, *, stays: np.ndarray
) -> dict[str, np.ndarray]:
    """What the gripper's critic learns from, for the window that starts at every step.

    Args:
        command: (L, G) normalised gripper commands. values: what a command may be.
        stays: (G,) bool: the gripper is told a change, so that 0 leaves it as it is. Else 0 is a width like any other.

    Returns: ``gripper_choice`` (L,) of the first row; ``gripper_steady`` (L,) 1 where no other choice is made inside the window;
        ``gripper_change`` (L,) sum of gamma^i over its rows at which the commanded state became another one.
    """
    length, grippers = command.shape
    choice = nearest_choice(command, values)
    held = gripper_table(values, grippers)[choice]
    keep = (held == 0.0) & stays
    state, changed = np.full(grippers, np.nan), np.zeros(length)
    for t in range(length):
        now = np.where(keep[t], state, held[t])
        changed[t] = float(((now != state) & ~np.isnan(state)).any())
        state = now
    steady, change = np.ones(length, np.float32), np.zeros(length, np.float32)
    for i in range(min(window.n, length)):
        here, later = slice(0, length - i), slice(i, length)
        change[here] += window.gamma**i * changed[later]
        steady[here] *= ((held[later] == held[here]) | keep[later]).all(1)
    return {GRIPPER_CHOICE: choice, GRIPPER_STEADY: steady, GRIPPER_CHANGE: change}
