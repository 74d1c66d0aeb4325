"""The seam between the control loop and whoever decides between policy and person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from robot_rl.types import Observation, Source


@dataclass(frozen=True)
class Arbitration:
    """What the arbiter makes of the policy's wish in one step.

    Attributes:
        command: (A,) what goes to the safety filter.
        human: (A,) what the person wanted, or None.
        drop_chunk: a take-over or hand-back ends the running chunk, and no chunk computed from an earlier observation may run.
        operator_stamp_ns: when the person's command was received, on the loop's clock; given only while it is executed.
    """

    command: np.ndarray
    source: Source = Source.POLICY
    human: np.ndarray | None = None
    intervention_id: int = -1
    drop_chunk: bool = False
    operator_stamp_ns: int | None = None


@dataclass(frozen=True)
class Situation:
    """What the loop knows in this tick beside the wish.

    Attributes:
        step: control step.
        fresh: a scheduled chunk covers this step; otherwise the wish is ``standstill``.
        standstill: (A,) absolute dimensions keep their last executed command, deltas are zero.
    """

    step: int
    fresh: bool
    standstill: np.ndarray


class Arbiter(Protocol):
    """Decides between policy and person, once per tick."""

    def begin(self) -> None:
        """An episode starts."""

    def arbitrate(self, now_ns: int, wish: np.ndarray, observation: Observation, situation: Situation) -> Arbitration: ...

    def report(self) -> dict[str, Any]:
        """JSON values for ``EpisodeMeta.extra`` of the episode that ends."""


class PolicyOnly:
    """The arbiter of a robot without an operator."""

    def begin(self) -> None: ...

    def arbitrate(self, now_ns: int, wish: np.ndarray, observation: Observation, situation: Situation) -> Arbitration:
        return Arbitration(wish)

    def report(self) -> dict[str, Any]:
        return {}
