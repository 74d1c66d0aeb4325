"""A against B without the person knowing which acts: a random, balanced order that stays hidden until the last episode.

Permuted blocks (Zelen 1974; ICH E9, section 2.3.2): every block holds each policy equally often in random order, so that drift of
the scene or of the person meets both alike, and the arms never differ by more than half a block. Block sizes are themselves
random, or the last episode of a block could be guessed by whoever counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from robot_rl.evaluation.exact import exact_difference
from robot_rl.evaluation.statistics import Interval, SuccessRate

Arm = Literal["old", "new"]
ARMS: tuple[Arm, Arm] = ("old", "new")
BLOCKS = (2, 4)  # of each arm one or two; larger blocks would drift further apart before they balance


def assign(per_arm: int, rng: np.random.Generator) -> tuple[Arm, ...]:
    """``2 * per_arm`` arms in permuted blocks of random sizes 2 and 4; both arms exactly ``per_arm`` times.

    Raises:
        ValueError: ``per_arm`` is less than 1.
    """
    if per_arm < 1:
        raise ValueError(f"per_arm={per_arm}: accepted are integers >= 1")
    order: list[Arm] = []
    while (left := 2 * per_arm - len(order)) > 0:
        size = min(int(rng.choice(BLOCKS)), left)
        block: list[Arm] = [arm for arm in ARMS for _ in range(size // 2)]
        order += [block[i] for i in rng.permutation(size)]
    return tuple(order)


@dataclass(frozen=True)
class BlindResult:
    """What came of it.

    Attributes:
        old, new: rates with Wilson intervals.
        difference: new minus old; ``interval`` is the exact one of :func:`exact_difference` at ``confidence``.
        discarded: episodes that did not count.
    """

    old: SuccessRate
    new: SuccessRate
    difference: float
    interval: Interval
    confidence: float
    discarded: int

    @property
    def verdict(self) -> str:
        """One sentence: better and worse only where the interval leaves out zero."""
        if self.interval.low > 0.0:
            return "The new policy is better."
        if self.interval.high < 0.0:
            return "The new policy is worse."
        return "The episodes do not tell the policies apart."

    def to_json(self) -> dict[str, Any]:
        return {
            "old": self.old.to_json(), "new": self.new.to_json(), "difference": self.difference,
            "interval": self.interval.to_json(), "confidence": self.confidence, "discarded": self.discarded,
            "verdict": self.verdict,
        }  # fmt: skip


@dataclass
class BlindTest:
    """One comparison, episode by episode. Its number of episodes is fixed before it begins, so its interval needs no correction.

    A discarded episode (a cable came loose) is played again by the same arm at once, which keeps the arms balanced.

    Attributes:
        order: which arm plays which episode; :attr:`commitment` fixes it before the first one.
        outcomes: success of the episodes so far.
    """

    order: tuple[Arm, ...]
    salt: str
    confidence: float = 0.95
    outcomes: list[bool] = field(default_factory=list)
    discarded: int = 0

    @classmethod
    def begin(cls, per_arm: int, rng: np.random.Generator, confidence: float = 0.95) -> BlindTest:
        """Draw the order. Raises ValueError for ``per_arm`` below 1 or a confidence outside (0, 1)."""
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence={confidence}: accepted are numbers in (0, 1)")
        return cls(assign(per_arm, rng), rng.bytes(16).hex(), confidence)

    @property
    def commitment(self) -> str:
        """SHA-256 of salt and order: shown at the start, it can be checked against the order that is told at the end."""
        return hashlib.sha256(f"{self.salt}:{','.join(self.order)}".encode()).hexdigest()

    @property
    def played(self) -> int:
        return len(self.outcomes)

    @property
    def complete(self) -> bool:
        return self.played >= len(self.order)

    @property
    def arm(self) -> Arm:
        """Who plays the next episode: for the machine, never for the page. Raises ValueError when all are played."""
        if self.complete:
            raise ValueError(f"all {len(self.order)} episodes are played")
        return self.order[self.played]

    def record(self, success: bool) -> None:
        """The outcome of the running episode. Raises ValueError when all are played."""
        if self.complete:
            raise ValueError(f"all {len(self.order)} episodes are played")
        self.outcomes.append(bool(success))

    def discard(self) -> None:
        """The running episode does not count; the same arm plays it again."""
        self.discarded += 1

    def undo(self) -> bool:
        """Take the last outcome back; its arm plays again. False when there is none."""
        if not self.outcomes:
            return False
        self.outcomes.pop()
        return True

    def view(self) -> dict[str, Any]:
        """What the person may see while it runs: how far it is, and nothing by which the arms could be told."""
        return {"played": self.played, "episodes": len(self.order), "commitment": self.commitment, "discarded": self.discarded}

    def result(self) -> BlindResult:
        """Open the envelope. Raises ValueError before the last episode."""
        if not self.complete:
            raise ValueError(f"{self.played} of {len(self.order)} episodes are played: the result is told after the last one")
        counts = {arm: [o for o, a in zip(self.outcomes, self.order, strict=True) if a == arm] for arm in ARMS}
        old, new = (SuccessRate.of(sum(counts[a]), len(counts[a]), confidence=self.confidence) for a in ARMS)
        interval = exact_difference(new.successes, new.n, old.successes, old.n, self.confidence)
        return BlindResult(old, new, new.rate - old.rate, interval, self.confidence, self.discarded)

    # ---- kept between processes

    def to_json(self) -> dict[str, Any]:
        """Everything, the order too: for a file that the page does not serve."""
        return {
            "order": list(self.order), "salt": self.salt, "confidence": self.confidence, "outcomes": self.outcomes,
            "discarded": self.discarded,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BlindTest:
        """Raises ValueError for what :meth:`to_json` did not write."""
        order: Sequence[str] = data["order"]
        if any(a not in ARMS for a in order) or order.count("old") != order.count("new") or len(data["outcomes"]) > len(order):
            raise ValueError(f"no blind comparison: {json.dumps(dict(data), default=str)[:200]}")
        return cls(
            tuple(order), str(data["salt"]), float(data["confidence"]), [bool(o) for o in data["outcomes"]],  # type: ignore[arg-type]
            int(data["discarded"]),
        )  # fmt: skip
