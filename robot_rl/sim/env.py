"""The contract of a simulated task. Gymnasium's API, LeRobot's names, physical units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from robot_rl.types import ActionSpec, FeatureSpec, Observation


@dataclass(frozen=True)
class EnvSpec:
    """What a task says about itself.

    ``success_terminates``: the episode ends (``terminated``) at the first success. ``max_episode_steps`` ends it
    ``truncated``. ``instruction`` is the sentence stored as ``task``. Rewards are sparse: 1.0 on the step that reaches
    success, else 0.0, unless the task's docstring says otherwise. ``setbacks``: those of ``info["stage"]`` in which something was lost
    that had been achieved (dropped, slipped).
    """

    env_id: str
    instruction: str
    observation_features: Mapping[str, FeatureSpec]
    action: ActionSpec
    control_hz: float
    max_episode_steps: int
    success_terminates: bool = True
    setbacks: tuple[str, ...] = ()


@runtime_checkable
class Environment(Protocol):
    """One simulated robot. ``info`` always holds ``success`` (bool); after ``reset`` also ``start`` (str -> float)."""

    spec: EnvSpec

    def reset(self, *, seed: int) -> tuple[Observation, dict[str, Any]]:
        """Same seed, same start, bit for bit, whatever happened before."""
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One control step. Raises RuntimeError after the episode has ended: a finished episode is never stepped."""
        ...

    def render(self, camera: str = "", width: int = 320, height: int = 240) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        ...

    def get_state(self) -> Any:
        """Everything that ``set_state`` needs to continue bit for bit from here."""
        ...

    def set_state(self, state: Any) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Expert(Protocol):
    """A scripted operator for one task. ``skill`` in [0, 1] and ``noise`` >= 0 make demonstrations of mixed quality."""

    def reset(self, env: Environment, rng: np.random.Generator) -> None: ...

    def take_over(self, env: Environment, rng: np.random.Generator) -> None:
        """Begin in the middle of an episode, from whatever somebody else has brought about."""
        ...

    def act(self, observation: Observation) -> np.ndarray:
        """(A,) physical action for the present state."""
        ...


EnvFactory = Callable[..., Environment]
ExpertFactory = Callable[..., Expert]

_ENVIRONMENTS: dict[str, EnvFactory] = {}
_EXPERTS: dict[str, ExpertFactory] = {}
_FAMILIES: dict[str, str] = {
    "tabletop": "robot_rl.sim.tabletop",
    "robosuite": "robot_rl.sim.robosuite",
    "gymnasium": "robot_rl.sim.gymnasium",
}


def register_env(env_id: str, factory: EnvFactory, expert: ExpertFactory | None = None) -> None:
    """Make ``family/Name`` known to :func:`make_env`; ``expert(env, skill=..., noise=...)`` is optional."""
    _ENVIRONMENTS[env_id] = factory
    if expert is not None:
        _EXPERTS[env_id] = expert


def _load_family(env_id: str) -> None:
    import importlib

    family = env_id.partition("/")[0]
    if family not in _FAMILIES:
        raise ValueError(
            f"env_id={env_id!r}: unknown family {family!r}; accepted are {', '.join(f'{f}/<name>' for f in _FAMILIES)}"
        )
    importlib.import_module(_FAMILIES[family])


def make_env(env_id: str, **options: Any) -> Environment:
    """Build ``tabletop/...``, ``robosuite/...`` or ``gymnasium/<registered id>``.

    Raises:
        ValueError: unknown id (the accepted ones are named) or option.
    """
    _load_family(env_id)
    family = env_id.partition("/")[0]
    factory = _ENVIRONMENTS.get(env_id) or _ENVIRONMENTS.get(f"{family}/*")
    if factory is None:
        known = sorted(e for e in _ENVIRONMENTS if e.startswith(f"{family}/"))
        raise ValueError(f"env_id={env_id!r}: accepted are {', '.join(known)}")
    return factory(env_id=env_id, **options)


def make_expert(env: Environment, *, skill: float = 1.0, noise: float = 0.0) -> Expert:
    """The scripted expert of ``env``'s task. Raises ValueError for a task that has none."""
    factory = _EXPERTS.get(env.spec.env_id)
    if factory is None:
        raise ValueError(
            f"{env.spec.env_id} has no scripted expert; tasks that have one: {', '.join(sorted(_EXPERTS)) or 'none'}"
        )
    return factory(env, skill=skill, noise=noise)


def env_ids() -> list[str]:
    """Every registered id of every family that can be imported here."""
    for family in _FAMILIES:
        try:
            _load_family(f"{family}/x")
        except ImportError:
            continue
    return sorted(_ENVIRONMENTS)
