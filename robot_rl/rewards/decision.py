"""From a stream of probabilities to one decision: k of n frames, a guard on the robot's state, and once is enough."""

from __future__ import annotations

import operator
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip
_FIELD = re.compile(r"(?P<name>[\w.]+)(\[(?P<index>\d+)\])?")


@dataclass(frozen=True)
class Guard:
    """A condition on one number of an observation: ``{field: "observation.state[2]", op: ">", value: 0.04}``."""

    field: str
    op: str
    value: float

    def __post_init__(self) -> None:
        if not _FIELD.fullmatch(self.field):
            raise ValueError(f"guard.field={self.field!r}: accepted is a feature with an index, such as observation.state[2]")
        if self.op not in OPERATORS:
            raise ValueError(f"guard.op={self.op!r}: accepted are {', '.join(OPERATORS)}")

    @property
    def feature(self) -> str:
        return self.field.partition("[")[0]

    def holds(self, observation: Mapping[str, np.ndarray]) -> bool | None:
        """``None`` where the observation lacks the field."""
        row = observation.get(self.feature)
        found = _FIELD.fullmatch(self.field)
        index = int(found.group("index") or 0) if found else 0
        if row is None or np.ndim(row) != 1 or index >= len(row) or not np.isfinite(row[index]):
            return None
        return OPERATORS[self.op](float(row[index]), self.value)


@dataclass(frozen=True)
class DecisionConfig:
    """Attributes:
    threshold: a frame counts when its probability is above it.
    k, n: how many of the last n frames must count.
    refractory_s: no second decision for so long; ``once`` allows one an episode at all.
    guards: all must hold at the deciding frame.
    """

    threshold: float = 0.85
    k: int = 3
    n: int = 5
    refractory_s: float = 2.0
    once: bool = True
    guards: tuple[Guard, ...] = ()

    def __post_init__(self) -> None:
        guards = tuple(g if isinstance(g, Guard) else Guard(**g) for g in self.guards)
        object.__setattr__(self, "guards", guards)
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold={self.threshold}: accepted are numbers between 0 and 1")
        if not 1 <= self.k <= self.n:
            raise ValueError(f"k={self.k} of n={self.n}: accepted is 1 <= k <= n")
        if self.refractory_s < 0:
            raise ValueError(f"refractory_s={self.refractory_s}: accepted are numbers >= 0")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecisionConfig:
        return cls(**data)


class Decider:
    """One episode's decisions; frames must come in order."""

    def __init__(self, config: DecisionConfig) -> None:
        self.config = config
        self.reset()

    def reset(self) -> None:
        self._recent: deque[bool] = deque(maxlen=self.config.n)
        self._last_s: float | None = None

    def push(self, probability: float, seconds: float, observation: Mapping[str, np.ndarray] | None = None) -> bool | None:
        """Whether success is decided at this frame; ``None`` where a guard cannot be read.

        A NaN probability counts as a frame without evidence.
        """
        c = self.config
        self._recent.append(bool(probability > c.threshold))
        if sum(self._recent) < c.k or not self._recent[-1]:
            return False
        if self._last_s is not None and (c.once or seconds - self._last_s < c.refractory_s):
            return False
        held = [g.holds(observation or {}) for g in c.guards]
        if any(h is None for h in held):
            return None
        if not all(held):
            return False
        self._last_s = seconds
        return True
