"""What the server does between the sockets and the session: requests, the state all pages are told, the session's steps.

One object a server. Everything runs in the server's event loop but what waits for a disk, which runs in threads.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robot_rl.console.bridge import Answer, Bridge, SessionView, TracePoint
from robot_rl.console.clips import ClipRecorder
from robot_rl.console.control import Desk, DeskConfig, Refused
from robot_rl.console.feedback import Feelings
from robot_rl.console.flow import Request, SessionFlow
from robot_rl.console.library import Library
from robot_rl.console.messages import Ask, Drive, Feel
from robot_rl.console.notes import Notes
from robot_rl.console.report import write_session_report
from robot_rl.console.rest import RestClock

STATE_S = 0.2
TRACE_POINTS = 240
LOGGED = {
    "estop", "reset_estop", "arm", "hold", "promote", "rollback", "pause_learning", "instruction", "success", "failure", "discard",
    "undo_label", "take_seat", "leave_seat",
}  # fmt: skip
MEASURED = "not while who acts is hidden: the comparison would be spoilt"
RUNS = ("running", "paused")


class Office:
    """See the module.

    Args:
        folder: of the run; the console's own files go to ``console/`` in it.
        store: the episode store, which may not exist yet; None: nothing is recorded.
    """

    def __init__(
        self,
        bridge: Bridge,
        folder: Path,
        store: Path | None,
        *,
        flow: SessionFlow | None = None,
        desk: DeskConfig | None = None,
    ) -> None:
        self.bridge, self.flow, self.folder = bridge, flow, folder
        self.desk = Desk(desk or DeskConfig())
        self.library = Library(store, folder / "console")
        self.notes = Notes(folder / "console")
        self._clips = ClipRecorder(folder / "console" / "clips")
        self.state, self.number = "{}", 0
        self._said: dict[str, Any] = {}
        self._last_verdict = ""  # where the last one was written: bridge or library
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop = threading.Event()
        self._recorder: threading.Thread | None = None
        self.problem = ""
        self.feelings = Feelings(self.library.feel)
        self._in_order = asyncio.Lock()
        self._settling: asyncio.Task[Any] | None = None
        self._rest, self._rest_minutes = RestClock(), 0

    # ---- running

    async def run(self) -> None:
        """Until cancelled: watch the seat, walk the session's steps, make the state that pages are told."""
        self._recorder = threading.Thread(target=self._record, name="clips", daemon=True)
        self._recorder.start()
        try:
            while True:
                try:
                    self.look()
                except Exception as error:  # one bad look must not end the page's only clock
                    self.problem = f"{type(error).__name__}: {error}"
                await asyncio.sleep(STATE_S)
        finally:
            self._stop.set()

    def close(self) -> None:
        self._stop.set()
        if self._recorder is not None:
            self._recorder.join(2.0)
        self._clips.close()

    def _record(self) -> None:
        while not self._stop.wait(0.05):
            episode = self.bridge.view().episode
            self._clips.look(episode.id, episode.state in RUNS, self.bridge.cameras.newest())

    def look(self) -> None:
        """One look; also for tests."""
        self.desk.sweep(time.monotonic_ns())
        view = self.bridge.view()
        seat = self.desk.seat
        self._rest_minutes = self._rest.look("" if seat is None else seat.name, time.monotonic())
        running = view.episode.id if view.episode.state in RUNS else ""
        if self.feelings.waiting(running) and (self._settling is None or self._settling.done()):
            self._settling = asyncio.ensure_future(asyncio.to_thread(self.feelings.settle, running))
        if self.flow is not None:
            over = self.flow.done
            if requests := self.flow.look(view, time.monotonic(), self.desk.seat is not None):
                self._later(self._carry_out_all(self.flow, requests))
            if self.flow.done and not over:
                self._later(asyncio.to_thread(write_session_report, self.folder, self.flow, self.library, self.notes))
        said = self.describe(view)
        if said != self._said:
            self._said, self.number = said, self.number + 1
            self.state = json.dumps({"type": "state", **said}, allow_nan=False, default=str)

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out_all(self, flow: SessionFlow, requests: Sequence[Request]) -> None:
        """One after the other, and after those of earlier looks; nothing starts once something that must be so was refused."""
        async with self._in_order:
            for request in requests:
                if request.name == "start_episode" and flow.stage != "starting":
                    return  # it took too long: the page has said so already
                answer = await self.bridge.ask(request.name, request.values, self.operator)
                if not answer.ok and request.must:
                    flow.refused(answer.text)
                    return

    # ---- what pages are told

    @property
    def operator(self) -> str:
        seat = self.desk.seat
        return seat.name if seat is not None else "operator"

    @property
    def blinded(self) -> bool:
        return self.flow is not None and self.flow.blinded

    def describe(self, view: SessionView) -> dict[str, Any]:
        """The state as JSON values; nothing in it tells the policies apart while that is hidden."""
        if self.blinded:
            view = view.blinded()
        seat = self.desk.seat
        out = asdict(view)
        out["traces"] = {s: [[p.step, _finite(p.value)] for p in _thin(points)] for s, points in view.traces.items()}
        out.pop("clock_ns")
        out["seat"] = None if seat is None else {"connection": seat.connection, "operator": seat.name, "driving": seat.driving}
        out["watchers"] = self.desk.watchers
        out["blind"] = self.blinded
        out["flow"] = None if self.flow is None else self.flow.view(time.monotonic(), seat is not None)
        out["notes"] = self.notes.number
        out["rest"] = self._rest_minutes
        out["console_problem"] = self._clips.problem or self.bridge.cameras.failed or self.feelings.problem or self.problem
        return out

    # ---- what pages say

    def drive(self, connection: int, drive: Drive) -> None:
        sample = self.desk.drive(connection, drive, time.monotonic_ns())
        if sample is not None:
            if sample.held and self.flow is not None:
                self.flow.tested = True
            self.bridge.drive(sample, self.operator)

    def feel(self, connection: int, feel: Feel) -> None:
        """What the person at the controls feels about the running episode; nobody else's feelings count, and none count between episodes."""
        episode = self.bridge.view().episode
        if self.desk.holds(connection) and episode.state in RUNS and episode.id:
            self.feelings.add(episode.id, feel.value, self.operator)

    def gone(self, connection: int) -> None:
        """A connection is closed. Whoever drove through it is silent from now on, and the robot holds: a loss is no hand-back."""
        name = self.operator
        if self.desk.part(connection):
            with suppress(OSError):
                self.notes.add(name, "lost the connection while at the controls", "event")

    async def ask(self, connection: int, ask: Ask) -> Answer:
        """Carry a request out; refusals and errors come back as words."""
        who = self.desk.name(connection)
        try:
            self.desk.allow(connection, ask, time.monotonic_ns())
            answer = await self._carry_out(connection, ask)
        except Refused as error:
            return Answer(False, str(error))
        except (ValueError, OSError, RuntimeError) as error:
            return Answer(False, str(error))
        except KeyError as error:
            return Answer(False, str(error.args[0] if error.args else error))
        if answer.ok and ask.name in LOGGED:
            who = self.desk.name(connection) if ask.name == "take_seat" else who
            text = ask.name.replace("_", " ") + "".join(f" {v}" for v in ask.values.values())
            with suppress(OSError):
                await asyncio.to_thread(self.notes.add, who, text, "event", self.bridge.view().episode.id)
        return answer

    async def _carry_out(self, connection: int, ask: Ask) -> Answer:
        name, values, flow = ask.name, ask.values, self.flow
        if name == "take_seat":
            seat = self.desk.take(connection, values["operator"], time.monotonic_ns())
            await self.bridge.ask("operator", {}, seat.name)  # for the record; a session that keeps none says so, and goes on
            return Answer(True, f"{seat.name} is in control")
        if name == "leave_seat":
            seat_before = self.desk.seat
            if seat_before is not None and seat_before.driving:  # letting go is a hand-back, unlike a loss
                self.bridge.drive(Drive(0, 0, False, (0.0,) * 6), self.operator)
            self.desk.leave(connection)
            return Answer(True, "the controls are free")
        if name == "note":
            text = values["text"].strip()
            if not text:
                return Answer(False, "the note is empty")
            await asyncio.to_thread(self.notes.add, self.desk.name(connection), text, "note", self.bridge.view().episode.id)
            return Answer(True, "noted")
        if name == "prefer":
            return Answer(True, await asyncio.to_thread(self.library.prefer, values["pair"], values["choice"], self.operator))
        if name == "label_episode":
            return await self._label(values["episode"], values["success"])
        if name in ("success", "failure", "discard", "undo_label"):
            return await self._verdict(name)
        if name in ("ready", "next_phase"):
            if flow is None:
                return Answer(False, "no session is being guided: start one with robot-rl session")
            if name == "ready":
                flow.ready(time.monotonic(), self.bridge.view(), self.desk.seat is not None)
            else:
                flow.next_phase(time.monotonic(), self.bridge.view())
            return Answer(True, flow.view(time.monotonic())["prompt"] if not flow.problem else flow.problem)
        if flow is not None and flow.kept.phase not in ("preflight", "report"):
            if name in ("promote", "rollback", "pause_learning") and flow.kept.phase != "training":
                return Answer(False, MEASURED if flow.blinded else "not during the baseline: it measures the old policy")
            if name == "start_episode":
                return Answer(False, "the session starts its episodes: press Ready")
        return await self.bridge.ask(name, values, self.operator)

    async def _verdict(self, name: str) -> Answer:
        """On the running episode, or on the one that has just ended."""
        episode = self.bridge.view().episode
        if name == "undo_label":
            if self._last_verdict == "library":
                answer = Answer(True, await asyncio.to_thread(self.library.undo))
            else:
                answer = await self.bridge.ask(name, {}, self.operator)
            if answer.ok:
                self._last_verdict = ""
                if self.flow is not None:
                    self.flow.undone()
            return answer
        if episode.state in RUNS:
            answer = await self.bridge.ask(name, {}, self.operator)
            if answer.ok and name != "discard":
                self._last_verdict = "bridge"
            elif answer.ok and self.flow is not None:
                self.flow.discarded(episode.id)
            return answer
        if not episode.id:
            return Answer(False, "there is no episode yet")
        if name == "discard":
            text = await asyncio.to_thread(self.library.discard, episode.id)
            if self.flow is not None:
                self.flow.discarded(episode.id)
            return Answer(True, text)
        return await self._label(episode.id, name == "success")

    async def _label(self, episode: str, success: bool) -> Answer:
        text = await asyncio.to_thread(self.library.label, episode, success, self.operator)
        self._last_verdict = "library"
        if self.flow is not None:
            self.flow.labelled(episode, success)
        return Answer(True, text)


def _thin(points: tuple[TracePoint, ...]) -> tuple[TracePoint, ...]:
    step = max(1, len(points) // TRACE_POINTS)
    return points[::-1][::step][::-1]


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
