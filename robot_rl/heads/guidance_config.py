"""What guidance of the base's sampler can be told. Reading a configuration costs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from robot_rl.heads.config import SelectReduce

Term = Literal[
    "expression", "python", "reach", "avoid_sphere", "keep_out_plane", "align_axis", "speed_limit", "stay_near_reference"
]
OPTIONS: dict[str, tuple[str, ...]] = {
    "expression": (), "python": (), "reach": ("target",), "avoid_sphere": ("centre", "radius"),
    "keep_out_plane": ("point", "normal"), "align_axis": ("axis",), "speed_limit": ("limit",), "stay_near_reference": (),
}  # fmt: skip
"""The closed registry of terms, and what each must be told."""
MAX_WEIGHT = 1000.0


@dataclass(frozen=True)
class CostConfig:
    """One differentiable cost of a chunk; see :mod:`robot_rl.heads.costs` for what each term computes.

    Attributes:
        term: of the registry; ``expression`` and ``python`` are for people, never for a model's output.
        weight: above 0, at most 1000.
        options: what the term must be told; numbers, or expressions of the observation (``"ee_x + cube_from_ee_x"``).
        expression: of ``expression``, see :mod:`robot_rl.heads.expressions`.
        function: ``package.module:function`` of ``python``: (action (B, n, A), observation name to (B, dim)) to costs (B,).
        gripper: whether this cost may move gripper dimensions.
    """

    term: Term
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    expression: str = ""
    function: str = ""
    gripper: bool = False

    def __post_init__(self) -> None:
        if self.term not in OPTIONS:
            raise ValueError(f"term={self.term!r}: accepted are {', '.join(OPTIONS)}")
        if not 0.0 < self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight={self.weight} of {self.term}: accepted are numbers above 0, at most {MAX_WEIGHT:g}")
        wanted = OPTIONS[self.term]
        if set(self.options) != set(wanted):
            raise ValueError(f"options={sorted(self.options)} of term {self.term}: accepted are {sorted(wanted)}")
        for name, term in (("expression", "expression"), ("function", "python")):
            if bool(getattr(self, name)) != (self.term == term):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with term={self.term!r}: it belongs to {term!r} and to no other"
                )


@dataclass(frozen=True)
class PathConfig:
    """Where a chunk takes the tool: its position after every row, which the terms of the registry measure.

    Delta dimensions add up from the observed position, absolute ones are positions.

    Attributes:
        action: names of the three action dimensions that move the tool.
        observation: names of the three elements of the observation that say where it is now.
        scale: metres a unit of these actions.
    """

    action: tuple[str, ...] = ()
    observation: tuple[str, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        if len(self.action) not in (0, 3) or len(self.observation) != len(self.action):
            raise ValueError(
                f"action={self.action}, observation={self.observation}: accepted are three names each, or none when no cost reads a path"
            )
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale}: accepted are numbers > 0")


@dataclass(frozen=True)
class GuidanceConfig:
    """How the base's sampler is steered (VLS's form; formulas in :mod:`robot_rl.heads.guidance`).

    Attributes:
        costs: differentiable costs that are to fall. terms_file: JSON with more of them, registry terms alone (what a
            language model may write). path: where the tool is, for registry terms.
        value_weight: of the learner's critic, whose value is to rise; 0: no critic. value_reduce, value_k: how its votes are one.
        strength: lambda. schedule: ``constant``, or ``noise``: times the noise level of the state.
        gradient_max: largest norm of one guiding gradient. inner_steps: M per sampling step. from_step: sampling steps before
            the first guided one.
        through: ``denoiser`` differentiates through the network's clean estimate, ``identity`` takes the gradient at the
            estimate as it is (half the price).
        max_displacement: largest change of a normalised entry against the base's own chunk.
        particles: chains that are run beside each other; the best by reward acts. resample_every: sampling steps between two
            systematic resamplings by exp(gain in reward / resample_temperature); 0: none.
    """

    costs: tuple[CostConfig, ...] = ()
    terms_file: Path | None = None
    path: PathConfig = field(default_factory=PathConfig)
    value_weight: float = 0.0
    value_reduce: SelectReduce = "min"
    value_k: float = 1.0
    strength: float = 0.1
    schedule: Literal["constant", "noise"] = "constant"
    gradient_max: float = 1.0
    inner_steps: int = 1
    from_step: int = 0
    through: Literal["denoiser", "identity"] = "denoiser"
    max_displacement: float = 0.5
    particles: int = 1
    resample_every: int = 0
    resample_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("value_weight", "strength", "from_step", "resample_every", "max_displacement"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are numbers >= 0")
        for name in ("inner_steps", "particles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are integers >= 1")
        for name in ("gradient_max", "resample_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are numbers > 0")
        if self.resample_every and self.particles == 1:
            raise ValueError(
                f"resample_every={self.resample_every} with particles=1: there is nothing to draw from; accepted is 0"
            )

    @property
    def all_costs(self) -> tuple[CostConfig, ...]:
        """With those of ``terms_file``. Raises ValueError naming what is wrong in it."""
        return self.costs if self.terms_file is None else self.costs + terms_from_json(self.terms_file.read_text("utf-8"))


@dataclass(frozen=True)
class ScoreCorrectionConfig:
    """A filter towards what the base was trained on (CDSA): a <- a + rate * grad log p(a | s), ``steps`` times.

    Attributes:
        run: folder of a finished run whose acting head is filtered; None filters the base itself.
        rate: eta; the square of the noise level's sigma is one full step to the denoised chunk.
        level: noise level in (0, 1] at which the base's own denoiser stands in for the score of the data.
        gripper: whether gripper dimensions are corrected too.
    """

    run: Path | None = None
    steps: int = 1
    rate: float = 0.01
    level: float = 0.1
    gripper: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate < 0 or not 0.0 < self.level <= 1.0:
            raise ValueError(
                f"steps={self.steps}, rate={self.rate}, level={self.level}: accepted are steps >= 0, rate >= 0, 0 < level <= 1"
            )


@dataclass(frozen=True)
class ReferenceConfig:
    """Denoising from a reference chunk rather than from pure noise (DemoDiffusion).

    Attributes:
        references: an episode store of what to follow: retargeted human tracks, planner output, old successes. At every
            decision the chunk that followed the nearest recorded state is the reference; None: the run's demonstrations.
        strength: share of the sampling steps that are run on the noised reference: 0 returns it as it is, 1 is nearly the base.
        only_successful: leave out episodes that are not known to have succeeded.
        max_references: at most so many recorded states, evenly spaced.
    """

    references: Path | None = None
    strength: float = 0.5
    only_successful: bool = True
    max_references: int = 20_000

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"strength={self.strength}: accepted are numbers from 0 to 1")
        if self.max_references < 1:
            raise ValueError(f"max_references={self.max_references}: accepted are integers >= 1")


def terms_from_json(text: str) -> tuple[CostConfig, ...]:
    """Costs from what a model wrote: a JSON list of {"term", "weight", "options"}. No expression, no function, nothing that runs.

    Raises:
        ValueError: not such a list, a term outside the registry, an option that is no number, a weight out of bounds.
    """
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"terms are not JSON: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ValueError("terms: accepted is a JSON list of objects with the keys term, weight, options")
    allowed = [t for t in OPTIONS if t not in ("expression", "python")]
    out = []
    for entry in entries:
        extra = set(entry) - {"term", "weight", "options", "gripper"}
        if extra:
            raise ValueError(f"terms: unknown keys {sorted(extra)}; accepted are term, weight, options, gripper")
        if entry.get("term") not in allowed:
            raise ValueError(f"terms: term={entry.get('term')!r}; accepted are {', '.join(allowed)}")
        options = entry.get("options", {})
        if not isinstance(options, dict):
            raise ValueError(f"terms: options={options!r} of {entry['term']}; accepted is an object of numbers")
        for name, value in options.items():
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
                raise ValueError(f"terms: option {name}={value!r} of {entry['term']}; accepted are numbers")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"terms: weight={weight!r} of {entry['term']}; accepted is a number")
        out.append(CostConfig(entry["term"], float(weight), options, gripper=entry.get("gripper", False) is True))
    return tuple(out)
