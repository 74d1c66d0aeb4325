"""The records of the graph (section 3.2 of the ROS specification). Fields without a default are required keys.

Stamps are integer nanoseconds. Zero means zero; unknown means the key is absent (None).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite, nan
from typing import ClassVar

from robot_rl.types import RewardEvent, RewardKind
from robot_rl.wire.codec import key

EPISODE_STATES = ("idle", "resetting", "running", "paused", "ended", "aborted", "committed")
END_REASONS = ("task", "timeout", "operator", "safety", "clock_jump", "deactivated", "crash")
CONTROLS = ("policy", "human", "latched", "blend", "hold", "safety")
HEARTBEAT_STATES = ("inactive", "idle", "policy", "human", "blend", "hold")


@dataclass(frozen=True)
class StepReward:
    """One reward event on the wire; invalid is "no reward", never a low one."""

    NAME: ClassVar[str] = "reward/*"

    source: str = key(place="name")
    episode_id: str = key(place="message")
    event_id: str = key()
    step: int = key()
    stamp_ns: int = key()
    kind: str = key(choices=tuple(k.value for k in RewardKind))
    value: float = key()
    valid: bool = key()
    recorded: bool = key()
    reason: str | None = key(None)
    confidence: float | None = key(None)
    terminal: bool | None = key(None)
    latency_ms: float | None = key(None)
    model_id: str | None = key(None)
    prompt_hash: str | None = key(None)
    revision: str | None = key(None)
    revokes: str | None = key(None)

    def __post_init__(self) -> None:
        if isfinite(self.value) != self.valid:
            raise ValueError(f"value={self.value} with valid={self.valid}: the value is finite if and only if valid")
        if self.step < 0:
            raise ValueError(f"step={self.step}: accepted are integers >= 0")

    @classmethod
    def from_event(cls, event: RewardEvent, *, recorded: bool, terminal: bool | None = None) -> StepReward:
        return cls(
            source=event.source, episode_id=event.episode_id, event_id=event.event_id, step=event.step, stamp_ns=event.stamp_ns,
            kind=event.kind.value, value=event.value if event.valid else nan, valid=event.valid, recorded=recorded,
            reason=event.reason or None, terminal=terminal, latency_ms=event.latency_ms or None,
            model_id=event.model_id or None, prompt_hash=event.prompt_hash or None, revokes=event.revokes or None,
        )  # fmt: skip

    def to_event(self) -> RewardEvent:
        return RewardEvent(
            episode_id=self.episode_id, step=self.step, source=self.source, value=self.value, kind=RewardKind(self.kind),
            valid=self.valid, reason=self.reason or "", stamp_ns=self.stamp_ns, model_id=self.model_id or "",
            prompt_hash=self.prompt_hash or "", latency_ms=self.latency_ms or 0.0, event_id=self.event_id,
            revokes=self.revokes or "",
        )  # fmt: skip


@dataclass(frozen=True)
class RewardClose:
    """A source says that it is done with an episode up to a step."""

    NAME: ClassVar[str] = "reward_close/*"

    source: str = key(place="name")
    episode_id: str = key(place="message")
    complete_through_step: int = key()
    n_events: int = key()
    valid_fraction: float = key()


@dataclass(frozen=True)
class EpisodeStatus:
    """Where the running (or last) episode of a robot is. ``episode_id`` is empty while ``idle``."""

    NAME: ClassVar[str] = "episode"

    episode_id: str = key(place="message")
    state: str = key(choices=EPISODE_STATES)
    index: int = key()
    step: int = key()
    task: str | None = key(None)
    outcome: str | None = key(None, choices=("success", "failure", "none"))
    end_reason: str | None = key(None, choices=END_REASONS)
    terminated: bool | None = key(None)
    truncated: bool | None = key(None)
    control: str | None = key(None, choices=CONTROLS)
    weights_version: int | None = key(None)
    base_hash: str | None = key(None)
    stats_hash: str | None = key(None)
    started_ns: int | None = key(None)
    ended_ns: int | None = key(None)
    store_uri: str | None = key(None)
    bytes: int | None = key(None)
    sha256: str | None = key(None)
    intervention_steps: int | None = key(None)
    seed: int | None = key(None)
    detail: str | None = key(None)  # why an episode was aborted, in words
    robot_hash: str | None = key(None)  # of policy_node's robot description; the guard refuses to arm on another one


@dataclass(frozen=True)
class WeightsNotice:
    """A version of the head is there to be fetched. ``which`` is ``promoted`` or ``candidate``."""

    NAME: ClassVar[str] = "weights/*"

    which: str = key(place="name", choices=("promoted", "candidate"))
    version: int = key()
    parent: int = key()
    uri: str = key()
    manifest_sha256: str = key()
    sha256: str = key()
    bytes: int = key()
    base_hash: str = key()
    stats_hash: str = key()
    config_hash: str = key()
    updates: int = key()
    published_ns: int = key()
    gate: str | None = key(None, choices=("candidate", "probation", "promoted", "rejected", "demoted"))
    share: float | None = key(None)


@dataclass(frozen=True)
class PolicyHealth:
    """policy_node's health, on ``/diagnostics``; ``message`` is one line for people."""

    NAME: ClassVar[str] = "*: policy"

    node: str = key(place="name")
    message: str = key(place="message")
    state: str = key()
    control: str | None = key(None)
    step: int | None = key(None)
    chunk_rows_left: int | None = key(None)
    chunk_age_ms: float | None = key(None)
    chunk_late: int | None = key(None)
    replans: int | None = key(None)
    inference_p50_ms: float | None = key(None)
    inference_p95_ms: float | None = key(None)
    command_hz: float | None = key(None)
    jitter_p99_ms: float | None = key(None)
    deadline_misses: int | None = key(None)
    obs_age_ms: dict[str, float] = field(default_factory=dict)
    frames_lost: dict[str, int] = field(default_factory=dict)
    camera_skew_ms: float | None = key(None)
    weights_version: int | None = key(None)
    swaps: int | None = key(None)
    swaps_refused: int | None = key(None)
    filter_changed: int | None = key(None)
    wal_lag_ms: float | None = key(None)
    disk_free_gb: float | None = key(None)


@dataclass(frozen=True)
class InterventionState:
    """Who has the robot; a change is published at once."""

    NAME: ClassVar[str] = "intervention"

    episode_id: str = key(place="message")
    state: str = key(choices=("autonomous", "requested", "human", "handback", "estop"))
    source: str = key()
    intervention_id: int | None = key(None)
    device: str | None = key(None)
    t_request_ns: int | None = key(None)
    device_stamp_ns: int | None = key(None)
    stale: bool | None = key(None)


@dataclass(frozen=True)
class OperatorState:
    """What a device says about the person at it."""

    NAME: ClassVar[str] = "operator/*"

    device: str = key(place="name")
    operator_id: str = key(place="message")
    seq: int = key()
    engaged: bool = key()
    deadman: bool = key()
    takeover: bool = key()
    aligned: bool | None = key(None)
    age_ms: float | None = key(None)


@dataclass(frozen=True)
class GuardState:
    """What the guard lets through; ``reason`` in words, ``counters`` how often each rule spoke."""

    NAME: ClassVar[str] = "guard"

    reason: str = key(place="message")
    level: str = key(choices=("ok", "clamp", "hold", "stop", "estop"))
    armed: bool = key()
    since_ns: int = key()
    robot_hash: str = key()
    source: str | None = key(None, choices=("policy", "operator_direct", "hold"))
    rule: str | None = key(None)
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class GuardEvent:
    """A rule of the guard spoke ``count`` times between two stamps."""

    NAME: ClassVar[str] = "guard/*"

    rule: str = key(place="name")
    channel: str = key(place="message")
    count: int = key()
    first_ns: int = key()
    last_ns: int = key()
    joint: str | None = key(None)
    wanted: float | None = key(None)
    sent: float | None = key(None)
    limit: float | None = key(None)
    text: str | None = key(None)  # in words, with the remedy


@dataclass(frozen=True)
class TaskState:
    """Ground truth of a simulated task after one control step; read by the environment's reward source and by evaluation only.

    ``stamp_ns`` is that of the observation published with it. ``step`` counts control steps since the reset with ``seed``.
    """

    NAME: ClassVar[str] = "task/*"

    env_id: str = key(place="name")
    instruction: str = key(place="message")
    stamp_ns: int = key()
    seed: int = key()
    step: int = key()
    success: bool = key()
    terminated: bool = key()
    truncated: bool = key()
    reward: float | None = key(None)  # of the last control step
    stage: str | None = key(None)


@dataclass(frozen=True)
class SessionStatus:
    """The whole session in one line; ``nodes`` maps names to lifecycle states."""

    NAME: ClassVar[str] = "session"

    line: str = key(place="message")
    phase: str | None = key(None, choices=("bringup", "ready", "running", "degraded", "stopped"))
    nodes: dict[str, str] = field(default_factory=dict)
    episodes: int | None = key(None)
    successes: int | None = key(None)
    weights_version: int | None = key(None)
    messages: str | None = key(None, choices=("standard", "typed"))
    run_id: str | None = key(None)
    git: str | None = key(None)
