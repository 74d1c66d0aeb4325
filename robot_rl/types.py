"""The words every room shares: features, actions, steps, decisions, episodes and reward events.

Names follow LeRobot (``observation.state``, ``observation.images.<camera>``, ``action``, ``task``) and Gymnasium
(``terminated``, ``truncated``, never a bare ``done``). Everything here is in physical units; normalised values live
inside policies and heads only. This module imports numpy and nothing heavier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag
from typing import Any, ClassVar, TypeAlias

import numpy as np

OBSERVATION_STATE = "observation.state"
OBSERVATION_ENVIRONMENT_STATE = "observation.environment_state"
OBSERVATION_IMAGES = "observation.images."

Observation: TypeAlias = dict[str, np.ndarray]
"""One observation: feature name to array. ``observation.state`` is (S,) float32, images are (H, W, 3) uint8 RGB."""


class Source(IntEnum):
    """Who was in control of one executed step. This list is the one that every part uses."""

    POLICY = 0
    HUMAN = 1
    LATCHED = 2
    BLEND = 3
    HOLD = 4
    SAFETY = 5  # the filter or the guard replaced the command rather than trimmed it


class SafetyFlag(IntFlag):
    """What the safety filter changed in one step (stored as a bit mask)."""

    NONE = 0
    NON_FINITE = 1
    POSITION = 2
    VELOCITY = 4
    ACCELERATION = 8
    JERK = 16
    WORKSPACE = 32
    STEP_JUMP = 64
    STALE_OBSERVATION = 128
    STALE_OPERATOR = 256
    WATCHDOG = 512
    CHUNK_RATE = 1024
    GRIPPER_RATE = 2048  # opened and closed more often than allowed


class Stratum(str, Enum):
    """Where an episode's data came from; the replay buffer mixes strata in fixed ratios."""

    ONLINE = "online"
    DEMONSTRATION = "demonstration"
    INTERVENTION = "intervention"
    PRIOR = "prior"


@dataclass(frozen=True)
class FeatureSpec:
    """Shape and type of one observation feature.

    Attributes:
        shape: without batch or time axes; images are (H, W, 3).
        dtype: numpy name, ``float32`` for vectors and ``uint8`` for images.
        names: one name per element of a vector feature, or empty.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "names", tuple(self.names))
        np.dtype(self.dtype)

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype, "names": list(self.names)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FeatureSpec:
        return cls(tuple(data["shape"]), data["dtype"], tuple(data.get("names", ())))


@dataclass(frozen=True)
class ActionSpec:
    """Every dimension of the executed action, in physical units.

    Attributes:
        low, high: limits the robot accepts, length A.
        names: one per dimension (made up as ``a0..`` when not given).
        kind: ``continuous``, ``gripper_continuous``, ``gripper_discrete`` or ``frozen`` per dimension.
        mode: ``absolute`` or ``delta`` per dimension; says how a cut chunk is padded (hold or zero).
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    names: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    mode: tuple[str, ...] = ()

    KINDS: ClassVar[tuple[str, ...]] = ("continuous", "gripper_continuous", "gripper_discrete", "frozen")
    MODES: ClassVar[tuple[str, ...]] = ("absolute", "delta")

    def __post_init__(self) -> None:
        n = len(self.low)
        for name, default in (("names", [f"a{i}" for i in range(n)]), ("kind", ["continuous"] * n), ("mode", ["absolute"] * n)):
            value = tuple(getattr(self, name)) or tuple(default)
            if len(value) != n:
                raise ValueError(f"ActionSpec.{name} has {len(value)} entries; the action has {n} dimensions")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "low", tuple(float(x) for x in self.low))
        object.__setattr__(self, "high", tuple(float(x) for x in self.high))
        if len(self.high) != n:
            raise ValueError(f"ActionSpec.high has {len(self.high)} entries; the action has {n} dimensions")
        for i, (lo, hi) in enumerate(zip(self.low, self.high, strict=True)):
            if not lo < hi:
                raise ValueError(f"ActionSpec dimension {self.names[i]!r}: low {lo} must be below high {hi}")
        for name, accepted in (("kind", self.KINDS), ("mode", self.MODES)):
            for value in getattr(self, name):
                if value not in accepted:
                    raise ValueError(f"ActionSpec.{name}={value!r}: accepted are {', '.join(accepted)}")

    @property
    def dim(self) -> int:
        return len(self.low)

    @property
    def delta_mask(self) -> np.ndarray:
        """(A,) bool: dimensions whose neutral value is zero rather than the last value."""
        return np.array([m == "delta" for m in self.mode])

    @property
    def gripper_mask(self) -> np.ndarray:
        """(A,) bool: dimensions that move a gripper."""
        return np.array([k.startswith("gripper") for k in self.kind])

    def to_json(self) -> dict[str, Any]:
        return {k: list(getattr(self, k)) for k in ("low", "high", "names", "kind", "mode")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ActionSpec:
        return cls(**{k: tuple(data[k]) for k in ("low", "high", "names", "kind", "mode")})


@dataclass(slots=True)
class Step:
    """One control step as the control loop logs it: what was seen, proposed, wanted and done.

    Actions are (A,) float32 in physical units; ``None`` where nobody proposed one (stored as NaN).
    ``reward``, ``terminated`` and ``truncated`` belong to the transition this step started.
    """

    observation: Observation
    action: np.ndarray  # executed
    action_base: np.ndarray | None = None
    action_policy: np.ndarray | None = None
    action_human: np.ndarray | None = None
    source: Source = Source.POLICY
    safety: SafetyFlag = SafetyFlag.NONE
    reward: float = float("nan")
    terminated: bool = False
    truncated: bool = False
    decision_id: int = -1  # index into the episode's decisions; -1 when no chunk was running
    chunk_row: int = -1
    weights_version: int = 0  # 0 is the base policy
    intervention_id: int = -1
    stamp_ns: int = 0


@dataclass(slots=True)
class Decision:
    """One call of the policy: what it drew and what chunk came out (physical units)."""

    step: int  # control step whose observation it was computed from
    noise: np.ndarray | None  # (H_w, A_w) float32, exactly what entered the sampler
    chunk_base: np.ndarray  # (H, A)
    chunk: np.ndarray  # (H, A) after the head
    log_prob: float = float("nan")
    candidate_index: int = -1
    weights_version: int = 0
    explored: bool = False  # drawn from the base's own prior rather than from the head (mixture acting)
    continues: bool = False  # in-painted to go on from the chunk that ran meanwhile; not recorded


@dataclass(slots=True)
class EpisodeMeta:
    """What is known about an episode as a whole. ``extra`` holds JSON values only."""

    episode_id: str
    task: str = ""
    env_id: str = ""
    seed: int | None = None
    stratum: Stratum = Stratum.ONLINE
    success: bool | None = None  # None: unknown
    recovered: bool = False  # its tail was recovered after a crash; then it is truncated
    weights_version: int = 0
    base_hash: str = ""
    stats_hash: str = ""
    control_hz: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Episode:
    """A whole episode of L steps as arrays. ``observations`` holds L + 1 rows: the last one follows the last step.

    Shapes: ``action*`` (L, A) float32 (NaN rows where absent), ``source`` (L,) uint8, ``safety`` (L,) uint32,
    ``reward`` (L,) float32 (NaN unknown), ``terminated``/``truncated`` (L,) bool, ``decision_id`` (L,) int32,
    ``chunk_row`` (L,) int32, ``weights_version`` (L,) int32, ``intervention_id`` (L,) int32, ``stamp_ns`` (L,) int64.
    """

    meta: EpisodeMeta
    observations: dict[str, np.ndarray]
    action: np.ndarray
    action_base: np.ndarray
    action_policy: np.ndarray
    action_human: np.ndarray
    source: np.ndarray
    safety: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    decision_id: np.ndarray
    chunk_row: np.ndarray
    weights_version: np.ndarray
    intervention_id: np.ndarray
    stamp_ns: np.ndarray
    decisions: list[Decision] = field(default_factory=list)

    STEP_ARRAYS: ClassVar[dict[str, str]] = {
        "action": "float32", "action_base": "float32", "action_policy": "float32", "action_human": "float32",
        "source": "uint8", "safety": "uint32", "reward": "float32", "terminated": "bool", "truncated": "bool",
        "decision_id": "int32", "chunk_row": "int32", "weights_version": "int32", "intervention_id": "int32",
        "stamp_ns": "int64",
    }  # fmt: skip

    def __len__(self) -> int:
        return len(self.action)

    @classmethod
    def from_arrays(
        cls, meta: EpisodeMeta, observations: Mapping[str, np.ndarray], action: np.ndarray, **arrays: np.ndarray
    ) -> Episode:
        """Build an episode from what a recording has; everything else gets its "unknown" value.

        ``observations`` must hold L + 1 rows; a recording that has only L repeats its last row.

        Raises:
            ValueError: an array's length does not match, or its name is unknown.
        """
        action = np.ascontiguousarray(action, np.float32)
        length, dim = action.shape
        unknown: dict[str, Any] = {
            "action_base": np.nan, "action_policy": np.nan, "action_human": np.nan, "source": int(Source.POLICY), "safety": 0,
            "reward": np.nan, "terminated": False, "truncated": False, "decision_id": -1, "chunk_row": -1,
            "weights_version": 0, "intervention_id": -1, "stamp_ns": 0,
        }  # fmt: skip
        decisions: Any = arrays.pop("decisions", [])
        full: dict[str, np.ndarray] = {"action": action}
        for name, value in unknown.items():
            shape = (length, dim) if name.startswith("action_") else (length,)
            given = arrays.pop(name, None)
            full[name] = (
                np.full(shape, value, cls.STEP_ARRAYS[name])
                if given is None
                else np.ascontiguousarray(given, cls.STEP_ARRAYS[name])
            )
            if full[name].shape != shape:
                raise ValueError(f"episode {meta.episode_id}: {name} has shape {full[name].shape}, expected {shape}")
        if arrays:
            raise ValueError(f"episode {meta.episode_id}: unknown arrays {sorted(arrays)}; known are {sorted(cls.STEP_ARRAYS)}")
        obs = {}
        for name, rows in observations.items():
            rows = np.asarray(rows)
            if len(rows) != length + 1:
                raise ValueError(f"episode {meta.episode_id}: {name} has {len(rows)} rows, expected {length + 1} (steps + 1)")
            obs[name] = rows
        return cls(meta=meta, observations=obs, decisions=list(decisions), **full)


class RewardKind(str, Enum):
    """How an event enters the composed reward (see the rewards specification)."""

    POTENTIAL = "potential"
    SUCCESS = "success"
    DENSE = "dense"
    PENALTY = "penalty"
    PREFERENCE_MODEL = "preference-model"


@dataclass(frozen=True, slots=True)
class RewardEvent:
    """One statement about one observation of one episode; it may arrive at any time after that observation.

    A non-potential event with ``step = k`` belongs to transition ``k - 1``, the one that reached observation ``k``.
    ``value`` is finite if and only if ``valid``; invalid means "no reward known", never "low reward".
    """

    episode_id: str
    step: int
    source: str
    value: float
    kind: RewardKind = RewardKind.SUCCESS
    valid: bool = True
    reason: str = ""
    stamp_ns: int = 0
    model_id: str = ""
    prompt_hash: str = ""
    latency_ms: float = 0.0
    event_id: str = ""  # ULID, set by the source; the same id twice is one event
    revokes: str = ""

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"RewardEvent.step={self.step}: accepted are integers >= 0")
        if bool(np.isfinite(self.value)) != self.valid:
            raise ValueError(
                f"RewardEvent.value={self.value} with valid={self.valid}: the value is finite if and only if valid"
            )
        if not self.source:
            raise ValueError("RewardEvent.source is empty: accepted is [a-z0-9_.]{1,48}")
