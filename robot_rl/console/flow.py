"""From "robot on" to "policy better": the steps of a session, as prompts to a person and requests to the robot.

Pre-flight checks, a baseline of the old policy, training, a blind comparison of old and new, a report. What has happened is kept in
``session.json`` after every episode, so that a session goes on where it was when the computer was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robot_rl.console.bridge import SessionView
from robot_rl.evaluation.blind import BlindTest
from robot_rl.evaluation.statistics import SuccessRate
from robot_rl.intervention.metrics import Driven, intervention_rate
from robot_rl.replay.files import replace_json

Phase = Literal["preflight", "baseline", "training", "comparison", "report"]
PHASES: tuple[Phase, ...] = ("preflight", "baseline", "training", "comparison", "report")
TITLES = {
    "preflight": "Pre-flight checks",
    "baseline": "Baseline of the old policy",
    "training": "Training",
    "comparison": "Blind comparison",
    "report": "Report",
}
OVER = ("ended", "committed", "aborted")
RUNS = ("running", "paused")
START_PATIENCE_S = 12.0
ATTEMPTS, ATTEMPTS_S = 5, 60.0  # at one measured episode; after both nobody is asked to go on trying
AGAIN_S = 1.0  # before another attempt that nobody has to press for
VERDICT_S = 10.0  # that a verdict may come after the episode, where nobody is there to give one
ANNOUNCED = -1  # for ``act_with``: whatever version the learner announces
FILE = "session.json"


@dataclass(frozen=True)
class FlowConfig:
    """Attributes:
    baseline_episodes: of the old policy before training; 0 leaves the baseline out.
    training_episodes: after so many training ends by itself; 0: when the operator says so.
    intervention_rate, intervention_steps: it also ends by itself once a person drove less than this share of so many of the last
        training steps; 0: that does not end it.
    comparison_episodes: of each policy in the blind comparison; 0 leaves it out.
    reset_s: countdown between "the scene is reset" and the start, to step back.
    hands_off: nobody has to reset or start anything (simulation).
    seed: of the blind order; negative: drawn from the system's entropy.
    """

    baseline_episodes: int = 20
    training_episodes: int = 0
    comparison_episodes: int = 20
    reset_s: float = 5.0
    hands_off: bool = False
    seed: int = -1
    intervention_rate: float = 0.0
    intervention_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("baseline_episodes", "training_episodes", "comparison_episodes"):
            if not 0 <= getattr(self, name) <= 10_000:
                raise ValueError(f"session.{name}={getattr(self, name)}: accepted are integers from 0 to 10000")
        if not 0.0 <= self.intervention_rate <= 1.0:
            raise ValueError(f"session.intervention_rate={self.intervention_rate}: accepted are numbers from 0 to 1")
        if not 1 <= self.intervention_steps <= 1_000_000:
            raise ValueError(f"session.intervention_steps={self.intervention_steps}: accepted are integers from 1 to 1000000")
        if not 0.0 <= self.reset_s <= 600.0:
            raise ValueError(f"session.reset_s={self.reset_s}: accepted are numbers from 0 to 600")


@dataclass(frozen=True)
class Check:
    """One line of the pre-flight list."""

    name: str
    ok: bool
    text: str


@dataclass(frozen=True)
class Request:
    """Something the flow asks the session for. Requests are carried out in their order.

    Attributes:
        name: ``pause_learning``, ``explore`` (``on``); ``act_with`` (``version``: only that one acts, 0 is the base); ``start_episode``.
        must: no episode may start after a refusal of this one.
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    must: bool = True


@dataclass
class _Kept:
    """What survives a restart."""

    phase: Phase = "preflight"
    baseline: list[bool] = field(default_factory=list)
    training: list[bool] = field(default_factory=list)
    driven: list[list[int]] = field(default_factory=list)  # of every training episode: steps, and those a person drove
    blind: dict[str, Any] | None = None
    version: int = 0
    started_ns: int = 0
    ended_ns: int = 0
    operator: str = ""
    given_up: str = ""


class SessionFlow:
    """The steps. :meth:`look` is called a few times a second and gives the requests that are due; nothing here waits.

    Args:
        folder: of the run; ``session.json`` is read from it and written to it.
    """

    def __init__(self, config: FlowConfig, folder: Path) -> None:
        self.config, self.path = config, folder / FILE
        self.kept = _Kept()
        self.blind: BlindTest | None = None
        if self.path.exists():
            data = json.loads(self.path.read_text(encoding="utf-8"))
            self.kept = _Kept(**data)
            if self.done:  # that session is over: this is the next one
                self.path.rename(self.path.with_name(f"session-{self.kept.ended_ns}.json"))
                self.kept = _Kept()
            if self.kept.blind is not None:
                self.blind = BlindTest.from_json(self.kept.blind)
        self.stage: Literal["prompt", "countdown", "starting", "running", "label"] = "prompt"
        self.problem = ""
        self.tested = False  # the controls have been held once
        self._until = 0.0
        self._episode = ""  # the one that counts now
        self._before = ""  # the one that was there before it
        self._version_off = False
        self._attempts, self._trying_since = 0, 0.0  # at one episode, and since when
        self._settled: Phase | None = None  # the phase whose settings the robot has been given
        self._view = SessionView()

    # ---- what the page shows

    @property
    def blinded(self) -> bool:
        """Whether who acts must stay hidden."""
        return self.kept.phase == "comparison"

    @property
    def done(self) -> bool:
        return self.kept.phase == "report"

    def checks(self, view: SessionView, seated: bool) -> list[Check]:
        """What must be in order before anything moves."""
        down = [n for n, s in view.nodes.items() if s not in ("active", "ok", "running")]
        stopped = view.control == "estop" or view.guard == "estop"
        return [
            Check("Processes", bool(view.nodes) and not down, f"waiting for {', '.join(down)}" if down else "all are up" if view.nodes else "none is heard"),
            Check("Sensors and disk", not view.problems, "; ".join(view.problems) or "nothing is in the way"),
            Check("Cameras", True, ", ".join(view.cameras) or "this robot has none"),
            Check("Emergency stop", not stopped, view.guard_reason or "latched: reset it" if stopped else "not latched; keep the hardware stop within reach"),
            Check("Guard", view.armed, "armed" if view.armed else f"not armed{': ' + view.guard_reason if view.guard_reason else ''}"),
            Check("Operator", seated, "at the controls" if seated else "take the controls"),
            Check("Controls", self.tested, "answer" if self.tested else "hold the drive button once"),
        ]  # fmt: skip

    def view(self, now: float, seated: bool = False) -> dict[str, Any]:
        """For the page; nothing in it says which policy acts while that is hidden."""
        done, total = self._progress()
        out: dict[str, Any] = {
            "phase": self.kept.phase, "title": TITLES[self.kept.phase], "phases": [[p, TITLES[p]] for p in self._wanted()],
            "stage": self.stage, "done": done, "total": total, "problem": self.problem, "blind": self.blinded,
            "countdown": max(0.0, self._until - now) if self.stage == "countdown" else None, "prompt": self._prompt(),
            "hopeless": self._hopeless(now), "driven": self.driven,
            "checks": [asdict(c) for c in self.checks(self._view, seated)] if self.kept.phase == "preflight" else [],
        }  # fmt: skip
        if self.blind is not None:
            out["comparison"] = self.blind.view()
        if self.done:
            out["result"] = self.result()
        return out

    def result(self) -> dict[str, Any]:
        """What the session came to; the comparison only after its last episode."""
        kept = self.kept
        out: dict[str, Any] = {"version": kept.version, "started_ns": kept.started_ns, "ended_ns": kept.ended_ns}
        if kept.given_up:
            out["given_up"] = kept.given_up
        if kept.baseline:
            out["baseline"] = SuccessRate.of(sum(kept.baseline), len(kept.baseline)).to_json()
        if kept.training:
            out["training"] = {
                "episodes": len(kept.training), "successes": sum(kept.training),
                "driven": self.driven, "driven_steps": self.config.intervention_steps,
            }  # fmt: skip
        if self.blind is not None and self.blind.complete:
            out["comparison"] = self.blind.result().to_json()
            out["order"], out["salt"], out["commitment"] = list(self.blind.order), self.blind.salt, self.blind.commitment
        return out

    @property
    def driven(self) -> float | None:
        """The share of the last training steps that a person drove; None before there are enough of them."""
        return intervention_rate(list(map(Driven._make, self.kept.driven)), self.config.intervention_steps)

    def _wanted(self) -> list[Phase]:
        c = self.config
        absent = {"baseline"} if not c.baseline_episodes else set()
        absent |= {"comparison"} if not c.comparison_episodes else set()
        return [p for p in PHASES if p not in absent]

    def _progress(self) -> tuple[int, int]:
        if self.kept.phase == "baseline":
            return len(self.kept.baseline), self.config.baseline_episodes
        if self.kept.phase == "training":
            return len(self.kept.training), self.config.training_episodes
        if self.kept.phase == "comparison" and self.blind is not None:
            return self.blind.played, len(self.blind.order)
        return 0, 0

    def _prompt(self) -> str:
        phase, stage = self.kept.phase, self.stage
        if phase == "preflight":
            return "Go through the list, then begin."
        if phase == "report":
            return "The session is over."
        if stage == "prompt":
            return "Reset the scene, step back, then press Ready."
        if stage == "countdown":
            return "Keep clear: the robot starts."
        if stage == "starting":
            return "Starting …"
        if stage == "label":
            return "How did it go? Success or failure."
        return "Watch. Take over when it helps." if phase == "training" else "Watch, and do not help: this episode is measured."

    # ---- what people say

    def ready(self, now: float, view: SessionView, seated: bool) -> None:
        """The list is done, or the scene is reset. Raises ValueError with what is missing."""
        if self.kept.phase == "preflight":
            missing = [c for c in self.checks(view, seated) if not c.ok]
            if missing:
                raise ValueError("; ".join(f"{c.name}: {c.text}" for c in missing))
            self.kept.started_ns = time.time_ns()
            self._enter(self._wanted()[1], view)
        elif self.stage == "prompt" and not self.done:
            self.stage, self._until = "countdown", now + self.config.reset_s
        else:
            raise ValueError("nothing waits for you now")

    def next_phase(self, now: float, view: SessionView) -> None:
        """Training is enough, or what is measured cannot go on. Raises ValueError elsewhere: a measured phase has its number of episodes."""
        if self.stage in ("running", "starting", "label"):
            raise ValueError("an episode is running: finish it first")
        if self._hopeless(now):
            return self._give_up(view)
        if self.kept.phase != "training":
            raise ValueError("only training may be ended by hand: the others have their number of episodes")
        self._leave_training(view)

    def labelled(self, episode_id: str, success: bool) -> None:
        """A person's verdict on an episode; only that on the one that is waited for counts."""
        if self.stage == "label" and episode_id == self._episode:
            self._count(success)

    def discarded(self, episode_id: str) -> None:
        """An episode does not count; it is played again."""
        if episode_id == self._episode and self.stage in ("running", "label"):
            if self.blind is not None and self.blinded:
                self.blind.discard()
            self._again()

    def undone(self) -> None:
        """The last verdict was taken back: its episode is played again."""
        if self.stage not in ("prompt", "countdown"):
            return
        if self.blinded and self.blind is not None:
            self.blind.undo()
        elif self.kept.phase in ("baseline", "training"):
            outcomes = self.kept.baseline if self.kept.phase == "baseline" else self.kept.training
            if outcomes:
                outcomes.pop()
                if outcomes is self.kept.training:
                    del self.kept.driven[-1:]
        self._again()

    # ---- a few times a second

    def look(self, view: SessionView, now: float, seated: bool) -> list[Request]:
        """What is due now, in its order."""
        self._view = view
        if self.kept.phase == "preflight":
            if self.config.hands_off and all(c.ok for c in self.checks(view, True) if c.name not in ("Controls", "Operator")):
                self.kept.started_ns = time.time_ns()
                self._enter(self._wanted()[1], view)
            return []
        if self.done:
            return self._settle()
        requests = self._settle()
        episode = view.episode
        if self.stage == "prompt" and self.config.hands_off and episode.state not in RUNS:
            if self._hopeless(now):
                self._give_up(view)
                return requests
            self.stage, self._until = "countdown", now + max(self.config.reset_s, AGAIN_S if self._attempts else 0.0)
        if self.stage == "countdown" and not seated and not self.config.hands_off:
            self.stage, self.problem = "prompt", "nobody is at the controls"
        elif self.stage == "countdown" and now >= self._until:
            if not view.armed:
                self.stage, self.problem = "prompt", f"the guard is not armed ({view.guard_reason})"
                return requests
            self.stage, self.problem, self._before, self._until = "starting", "", episode.id, now + START_PATIENCE_S
            self._trying_since = self._trying_since or now
            return [*requests, *self._who_acts(), Request("start_episode")]
        elif self.stage == "starting":
            if episode.id and episode.id != self._before:
                self.stage, self._episode, self._version_off = "running", episode.id, False
            elif now >= self._until:
                self.refused("the episode did not start")
        if self.stage in ("running", "label") and episode.id == self._episode:
            self._watch(view, now)
        if self.stage == "label" and self.config.hands_off and (now >= self._until or episode.id != self._episode):
            self._not_counted("nobody said how the episode went: it is played again")
        return requests

    def refused(self, text: str) -> None:
        """The session said no to a start, or to what must be so before it."""
        if self.stage == "starting":
            self.stage, self.problem = "prompt", text
            self._attempts += 1

    def _watch(self, view: SessionView, now: float) -> None:
        episode = view.episode
        if self.blinded:
            self._version_off |= view.weights.acting != self._due()
        if episode.state not in OVER:
            return
        if self._version_off:
            self._not_counted("another version acted than was asked for: the episode is played again")
        elif episode.state == "aborted":
            self._not_counted(episode.detail or "the episode was aborted")
        elif episode.outcome in ("success", "failure"):
            self._count(episode.outcome == "success")
        elif self.stage != "label":
            self.stage, self._until = "label", now + VERDICT_S

    def _not_counted(self, why: str) -> None:
        """The episode shows nothing: it is played again, and that is not tried for ever."""
        self.problem = why
        self._attempts += 1
        if self.blinded and self.blind is not None:
            self.blind.discard()
        self._again()

    # ---- the record

    def _count(self, success: bool) -> None:
        kept, view = self.kept, self._view
        self.problem, self._attempts, self._trying_since = "", 0, 0.0
        if kept.phase == "baseline":
            kept.baseline.append(success)
            if len(kept.baseline) >= self.config.baseline_episodes:
                return self._enter("training", view)
        elif kept.phase == "training":
            kept.training.append(success)
            kept.driven.append([view.episode.step, view.episode.human_steps])
            enough = self.config.training_episodes and len(kept.training) >= self.config.training_episodes
            if enough or (self.driven is not None and self.driven < self.config.intervention_rate):
                return self._leave_training(view)
        elif self.blind is not None:
            self.blind.record(success)
            if self.blind.complete:
                return self._enter("report", view)
        self._again()

    def _again(self) -> None:
        self.stage = "prompt"
        self._save()

    def _hopeless(self, now: float) -> bool:
        """Whether a measured episode has been tried often and long enough."""
        measured = self.kept.phase in ("baseline", "comparison")
        return measured and self._attempts >= ATTEMPTS and now - self._trying_since >= ATTEMPTS_S

    def _give_up(self, view: SessionView) -> None:
        """What cannot be measured has no result; what stood in its way is kept."""
        played, total = self._progress()
        self.kept.given_up = f"{TITLES[self.kept.phase].lower()} given up after {played} of {total} episodes and {self._attempts} more attempts: {self.problem}"
        self._enter("report", view)

    def _leave_training(self, view: SessionView) -> None:
        if not self.config.comparison_episodes:
            return self._enter("report", view)
        if view.weights.promoted == 0:
            self.stage = "prompt"
            self.problem = "no version has been promoted, so there is nothing to compare: train on, or promote one"
            self._save()
            return None
        return self._enter("comparison", view)

    def _enter(self, phase: Phase, view: SessionView) -> None:
        self.kept.phase, self.stage, self.problem = phase, "prompt", ""
        self._attempts, self._trying_since = 0, 0.0
        if phase == "comparison":
            self.kept.version = view.weights.promoted
            seed = None if self.config.seed < 0 else self.config.seed
            self.blind = BlindTest.begin(self.config.comparison_episodes, np.random.default_rng(seed))
        elif phase == "report":
            self.kept.ended_ns = time.time_ns()
        self._save()

    def _save(self) -> None:
        self.kept.blind = None if self.blind is None else self.blind.to_json()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_json(self.path, asdict(self.kept), sync=True)

    # ---- what acts

    def _settle(self) -> list[Request]:
        """Settings of a phase, given once: measured phases do not learn. Nothing waits for a learner that is not there."""
        phase = self.kept.phase
        if self._settled == phase:
            return []
        self._settled = phase
        paused = [Request("pause_learning", {"on": phase != "training"}, must=False)]
        return paused if phase in ("baseline", "training", "comparison") else [*paused, *self._free()]

    @staticmethod
    def _free() -> list[Request]:
        return [Request("explore", {"on": True}), Request("act_with", {"version": ANNOUNCED})]

    def _due(self) -> int:
        """The version that plays the next episode of a measured phase."""
        return self.kept.version if self.blind is not None and self.blinded and self.blind.arm == "new" else 0

    def _who_acts(self) -> list[Request]:
        """Before every start, because a node that was started again has forgotten it.

        In the comparison the new version is asked for whoever is due: when it cannot be had, that shows before either arm's episodes,
        and tells nobody which one it is.
        """
        if self.kept.phase == "training":
            return self._free()
        wanted = [self.kept.version, self._due()] if self.blinded else [self._due()]
        return [Request("explore", {"on": False}), *(Request("act_with", {"version": v}) for v in wanted)]


def read_session(folder: Path) -> Mapping[str, Any] | None:
    """``session.json`` of a run, or None."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
