"""What a simulated operator can be told. Reading a configuration costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OperatorConfig:
    """A simulated person who watches training episodes in simulation and takes over when one goes wrong.

    Attributes:
        patience: control steps without a new stage of the task (``info["stage"]``) after which the person takes over; 0: nobody is
            there.
        reaction: control steps after which a setback (``EnvSpec.setbacks``: dropped, slipped) makes the person take over, too; 0: the
            person does not tell a setback from progress.
        hand_back: ``end``: the person drives until the episode ends; ``stage``: until the task has reached another stage than at the
            take-over, then lets the policy go on, and may take over again.
        skill, noise: of the task's scripted expert, who then drives.
        share: of the episodes that are watched at all.
        overlooked: chance that the person misses a moment to take over, and waits as long once more.
        mistaken: chance per control step of taking over for nothing.
        fatigue: share by which patience, reaction and noise have grown at the end of a spell of ``spell`` watched control steps; then the
            person has rested, and begins afresh. 36,000 steps are half an hour at 20 Hz, when a rest is due (specification, rule 11).
    """

    patience: int = 0
    reaction: int = 0
    skill: float = 1.0
    noise: float = 0.0
    hand_back: Literal["end", "stage"] = "end"
    share: float = 1.0
    overlooked: float = 0.0
    mistaken: float = 0.0
    fatigue: float = 0.0
    spell: int = 36_000

    def __post_init__(self) -> None:
        if self.patience < 0 or self.reaction < 0:
            raise ValueError(f"patience={self.patience}, reaction={self.reaction}: accepted are integers >= 0")
        others = {name: getattr(self, name) for name in ("reaction", "overlooked", "mistaken", "fatigue")}
        if not self.patience and any(others.values()):
            told = ", ".join(f"{name}={value}" for name, value in others.items() if value)
            raise ValueError(f"{told} with patience=0, where nobody is there: accepted are a patience above 0, or 0 of these")
        if not 0.0 <= self.skill <= 1.0 or not 0.0 < self.share <= 1.0:
            raise ValueError(f"skill={self.skill}, share={self.share}: accepted are numbers from 0 to 1, a share above 0")
        if not 0.0 <= self.overlooked < 1.0 or not 0.0 <= self.mistaken < 1.0:
            raise ValueError(f"overlooked={self.overlooked}, mistaken={self.mistaken}: accepted are numbers from 0, below 1")
        if self.hand_back not in ("end", "stage"):
            raise ValueError(f"hand_back={self.hand_back!r}: accepted are end, stage")
        for name in ("noise", "fatigue"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: accepted are finite numbers >= 0")
        if self.spell < 1:
            raise ValueError(f"spell={self.spell}: accepted are integers >= 1")
