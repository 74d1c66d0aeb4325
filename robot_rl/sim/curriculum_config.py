"""What a curriculum over start states, resets and discounts can be told. Reading a configuration costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CurriculumConfig:
    """Which starts are trained on. Gate, evaluation and final seeds are never touched: what is measured stays the same.

    Attributes:
        starts: ``all``: a new start every episode. The others draw from a pool of starts whose parameters (``info["start"]``) are known:
            ``success``: those that succeed about every second time; ``alp_gmm``: where success changes fastest (Portelas et al.
            2019); ``sec``: one of a few categories by its learning gain (Chen et al. 2025).
        pool: starts in the pool. parameters: names of start parameters; none: all of them.
        uniform: share of starts that are drawn evenly whatever the rest says.
        bandwidth: of ``success``: how far a result tells about neighbours, in units of each parameter's range.
        window: of ``alp_gmm``: episodes before the first mixture, between two, and in each. components: smallest and largest mixture.
        arms: of ``sec``: categories, equal parts of the pool along the first of ``parameters``. rate: of an arm's moving value.
            temperature: of the draw among arms.
        resets: ``demonstrations``: an episode may begin in the middle of a successful demonstration, replayed to there from its own
            start; all episodes of a group (``schedule.group_size``) begin in the same state.
        reset_share: chance of a group to do so. reset_first: share of the demonstration that is replayed at first; it falls by
            ``reset_step`` whenever ``reset_window`` such episodes succeeded at least ``reset_success`` often, down to none.
        discount_start: gamma of the first stage; None: ``learner.gamma`` throughout. It rises to ``learner.gamma`` in ``discount_stages``
            steps with success in training relative to ``discount_reference``, never falls, and every step restarts the target
            network as a copy of the critic (ADS).
    """

    starts: Literal["all", "success", "alp_gmm", "sec"] = "all"
    pool: int = 256
    parameters: tuple[str, ...] = ()
    uniform: float = 0.2
    bandwidth: float = 0.15
    window: int = 250
    components: tuple[int, int] = (2, 10)
    arms: int = 4
    rate: float = 0.5
    temperature: float = 0.1
    resets: Literal["off", "demonstrations"] = "off"
    reset_share: float = 0.5
    reset_first: float = 0.8
    reset_step: float = 0.1
    reset_window: int = 50
    reset_success: float = 0.6
    discount_start: float | None = None
    discount_stages: int = 5
    discount_reference: float = 0.9

    def __post_init__(self) -> None:
        for name in ("pool", "window", "arms", "reset_window", "discount_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are integers >= 1")
        for name in ("uniform", "reset_share", "reset_first", "reset_success"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are numbers from 0 to 1")
        for name in ("bandwidth", "temperature", "reset_step", "discount_reference"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are numbers > 0")
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"rate={self.rate}: accepted are numbers above 0, at most 1")
        if not 1 <= self.components[0] <= self.components[1]:
            raise ValueError(f"components={list(self.components)}: accepted are smallest and largest number, from 1 on")
        if self.starts == "sec" and self.arms > self.pool:
            raise ValueError(f"arms={self.arms} with pool={self.pool}: accepted are at most as many as starts")
        if self.starts == "sec" and len(self.parameters) != 1:
            raise ValueError(
                f"parameters={list(self.parameters)} with starts='sec': accepted is the one that tells categories apart"
            )
        if self.discount_start is not None and not 0.0 < self.discount_start < 1.0:
            raise ValueError(f"discount_start={self.discount_start}: accepted are null, or numbers between 0 and 1")

    def discount(self, gamma: float, stage: int) -> float:
        """gamma of a stage: from ``discount_start`` to the learner's own in equal steps."""
        if self.discount_start is None:
            return gamma
        return self.discount_start + (gamma - self.discount_start) * min(stage, self.discount_stages) / self.discount_stages

    def discount_stage(self, success: float) -> int:
        """The stage that a success rate in training is worth."""
        return min(self.discount_stages, int(self.discount_stages * success / self.discount_reference + 1e-9))
