"""How rewards are added up, as configuration. Light: a run's settings are read before anything else is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from robot_rl.types import RewardKind

LABEL = "label"
"""The source of verdicts on episodes (:data:`robot_rl.replay.reward_log.LABEL_SOURCE`)."""
CLOSE_SUFFIX = ".closed"
"""``<source>.closed`` at step k: the source has said all it will say about steps up to k. An event without a value, whose reason is
``closed`` or ``closed_partly``: whoever only adds up values has nothing to add."""
CLOSED, CLOSED_PARTLY = "closed", "closed_partly"
RECORDED = "recorded"
"""The channel of the rewards an episode was recorded with."""
Missing = Literal["default", "mask", "neutral", "hold", "zero"]
DEFAULT_MISSING: dict[RewardKind, Missing] = {
    RewardKind.SUCCESS: "mask", RewardKind.POTENTIAL: "neutral", RewardKind.DENSE: "mask", RewardKind.PENALTY: "zero",
    RewardKind.PREFERENCE_MODEL: "mask",
}  # fmt: skip


@dataclass(frozen=True)
class ChannelConfig:
    """One source in the sum.

    Attributes:
        source: name of the events' source.
        kind: how its values enter (see :class:`~robot_rl.types.RewardKind`).
        weight: 0 keeps it for the record only. ``scale``, ``shift``: of dense and preference-model values.
        missing: where nothing valid is known. ``mask``: the transition is not sampled; ``zero``: the term is 0; for potentials
            ``neutral``: the shaping term is 0, ``hold``: the last known potential still stands.
        model_id: only events of this model count; empty takes any (of one model per shaping pair).
        report: JSON report of this source; without one a weight above 0 is refused, unless it is ground truth.
    """

    source: str
    kind: RewardKind = RewardKind.SUCCESS
    weight: float = 1.0
    scale: float = 1.0
    shift: float = 0.0
    missing: Missing = "default"
    model_id: str = ""
    report: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", RewardKind(self.kind))
        if not self.source:
            raise ValueError("reward.channels.source is empty: accepted is the name of a reward source")
        if self.missing not in get_args(Missing):
            raise ValueError(f"reward.channels.missing={self.missing!r}: accepted are {', '.join(get_args(Missing))}")
        potential = self.kind is RewardKind.POTENTIAL
        if (self.missing in ("neutral", "hold") and not potential) or (self.missing == "zero" and potential):
            words = "default, mask, neutral, hold" if potential else "default, mask, zero"
            raise ValueError(f"reward.channels.missing={self.missing!r} for kind={self.kind.value}: accepted are {words}")
        if not np.isfinite([self.weight, self.scale, self.shift]).all():
            raise ValueError(f"channel {self.source!r}: weight, scale and shift are finite numbers")

    @property
    def rule(self) -> Missing:
        return DEFAULT_MISSING[self.kind] if self.missing == "default" else self.missing


@dataclass(frozen=True)
class CompositionConfig:
    """The sum.

    Attributes:
        channels: none leaves rewards as they were recorded.
        terminal_phi: ``zero`` leaves the best policy what it is; ``keep`` is for tasks that are the potential.
        success_terminates: a success ends the MDP there; what was recorded after it is not learned from.
        min_valid_fraction: share of known transitions below which updates stop.
        accept_uncalibrated: train on sources without a good report.
        ground_truth: sources that need no report.
    """

    channels: tuple[ChannelConfig, ...] = ()
    terminal_phi: Literal["zero", "keep"] = "zero"
    success_terminates: bool = True
    min_valid_fraction: float = 0.5
    accept_uncalibrated: bool = False
    ground_truth: tuple[str, ...] = ("env", "environment", "human", "takeover", RECORDED, LABEL)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.terminal_phi not in ("zero", "keep"):
            raise ValueError(f"reward.terminal_phi={self.terminal_phi!r}: accepted are zero, keep")
        if not 0.0 <= self.min_valid_fraction <= 1.0:
            raise ValueError(f"reward.min_valid_fraction={self.min_valid_fraction}: accepted are 0 to 1")
        names = [c.source for c in self.channels]
        if len(set(names)) != len(names):
            raise ValueError(
                f"reward.channels name {sorted(n for n in set(names) if names.count(n) > 1)} twice: accepted is once each"
            )
