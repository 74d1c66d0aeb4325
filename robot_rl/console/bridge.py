"""What a session offers to the page, whoever runs it: state, pictures, and the few things that may be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from robot_rl.console.frames import Cameras
from robot_rl.console.messages import Drive


@dataclass(frozen=True)
class Answer:
    """What came of a request; ``text`` is for the person."""

    ok: bool
    text: str = ""


@dataclass(frozen=True)
class EpisodeView:
    """The running (or last) episode. ``human_steps``: those of ``step`` that a person drove, known when it is over."""

    id: str = ""
    state: str = "idle"
    index: int = 0
    step: int = 0
    control: str = ""
    task: str = ""
    outcome: str = ""
    detail: str = ""
    seconds: float = 0.0
    human_steps: int = 0


@dataclass(frozen=True)
class WeightsView:
    """Which version acts, and which one waits for its proof. 0 is the base policy."""

    acting: int = 0
    promoted: int = 0
    candidate: int = 0
    share: float = 0.0
    newest: int = 0
    state: str = ""


@dataclass(frozen=True)
class TracePoint:
    """One reward of the running episode."""

    step: int
    value: float
    kind: str


@dataclass(frozen=True)
class SessionView:
    """Everything a page shows about a live session. Replaced as a whole, never changed.

    Attributes:
        control: who drives: autonomous, requested, human, handback, estop.
        guard: level of the guard (ok, clamp, hold, stop, estop); ``armed`` whether motion may pass.
        nodes: state of each process, for the pre-flight list.
        problems: what stands in the way now, in words.
        traces: rewards of the running episode by source.
        clock_ns: wall clock of this view.
    """

    robot: str = ""
    run: str = ""
    task: str = ""
    phase: str = ""
    line: str = ""
    control: str = "autonomous"
    device: str = ""
    guard: str = ""
    guard_reason: str = ""
    armed: bool = False
    episode: EpisodeView = field(default_factory=EpisodeView)
    episodes: int = 0
    successes: int = 0
    weights: WeightsView = field(default_factory=WeightsView)
    learner: Mapping[str, Any] = field(default_factory=dict)
    learning_paused: bool = False
    nodes: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    traces: Mapping[str, tuple[TracePoint, ...]] = field(default_factory=dict)
    cameras: tuple[str, ...] = ()
    clock_ns: int = 0

    def blinded(self) -> SessionView:
        """The same without anything that says which policy acts (a blind comparison runs)."""
        return replace(self, weights=WeightsView(state="hidden"), learner={}, line="", successes=0, episodes=0)


class Bridge(Protocol):
    """A live session. Methods are called from the server's event loop: they return at once or are awaited.

    The session is the one that commands a robot. What :meth:`drive` gets is a device's sample: take-over, limits, safety filter and
    guard lie between it and any motion, and without fresh samples the robot holds.
    """

    cameras: Cameras

    def view(self) -> SessionView: ...

    def drive(self, sample: Drive, operator: str) -> None:
        """A fresh sample of the operator's controls. Never waits."""
        ...

    async def ask(self, name: str, values: Mapping[str, Any], operator: str) -> Answer:
        """Carry out a command of :data:`~robot_rl.console.messages.COMMANDS` that is about the robot, the episode or learning."""
        ...
