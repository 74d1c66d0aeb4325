"""``monitor_node``: brings lifecycle nodes up in order, aggregates diagnostics, says how the session is.

It moves nothing and stops nothing but the lifecycle states it manages. After its own restart it adopts active nodes as they are.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from std_msgs.msg import Header
from std_srvs.srv import Trigger

from robot_rl.ros import qos
from robot_rl.ros.base import ERROR, OK, STALE, WARN, PlainNode, run
from robot_rl.ros.conversion import read_records, read_status, records_message, statuses_message
from robot_rl.ros.graph_names import ALL_TOPICS, DIAGNOSTICS_AGG, MONITOR_NODE, TOPLEVEL
from robot_rl.ros.names import DIAGNOSTICS, EPISODE_STATUS, GUARD_STATE, HEARTBEAT, PER_ROBOT, SESSION_STATUS, WEIGHTS
from robot_rl.wire import EpisodeStatus, GuardState, SessionStatus, WeightsNotice
from robot_rl.wire.codec import Status

STEP_S = 0.1
PROBE_S = 1.0
PROBE_AGAIN_S = 2.0
"""DDS believes in a killed process for up to 20 s, and requests to it are lost: what is not answered is asked again."""
MAX_STATUSES_KEPT, MAX_EPISODES_KEPT = 4096, 100_000
RESTART_WINDOW_S = 60.0
LEVELS = {OK: "ok", WARN: "warning", ERROR: "error", STALE: "stale"}


@dataclass
class Managed:
    """One lifecycle node and where its bring-up is."""

    name: str
    state: str = "unknown"
    wanted: str = "active"  # active, unconfigured
    future: Any = None
    probes: list[Any] = field(default_factory=list)  # get_state, asked again while the answer is awaited
    probed: float = 0.0
    asked: float = 0.0
    what: str = ""
    since: float = 0.0
    bringups: deque[float] = field(default_factory=deque)
    ups: int = 0
    was_active: bool = False
    failed: str = ""


class MonitorNode(PlainNode):
    """See the module."""

    def __init__(self, **options: Any) -> None:
        super().__init__(MONITOR_NODE, **options)
        p = self.parameters
        p.check()
        self._nodes = [Managed(name) for name in p["managed"]]
        self._lifecycle = {
            m.name: (
                self.create_client(GetState, f"{m.name}/get_state"),
                self.create_client(ChangeState, f"{m.name}/change_state"),
            )
            for m in self._nodes
        }
        self._up = p["autostart"]
        self._session = self.create_publisher(DiagnosticArray, SESSION_STATUS, qos.STATE)
        self._aggregate = self.create_publisher(DiagnosticArray, DIAGNOSTICS_AGG, qos.DIAG)
        self._top = self.create_publisher(DiagnosticStatus, TOPLEVEL, qos.DIAG)
        self.listen(DiagnosticArray, DIAGNOSTICS, self._on_diagnostics, qos.DIAG)
        self.listen(DiagnosticArray, EPISODE_STATUS, self._on_episode, qos.STATE)
        self.listen(DiagnosticArray, WEIGHTS, self._on_weights, qos.STATE)
        self.listen(DiagnosticArray, GUARD_STATE, self._on_guard, qos.STATE)
        self.listen(Header, HEARTBEAT, self._on_heartbeat, qos.LATEST)
        for name, callback in (("bringup", self._on_bringup), ("shutdown", self._on_shutdown), ("is_active", self._on_active)):
            self.create_service(Trigger, f"~/{name}", callback)
        self._statuses: dict[str, tuple[float, Status, int]] = {}
        self._episodes: dict[str, bool | None] = {}
        self._episode: EpisodeStatus | None = None
        self._version = 0
        self._estop = False
        self._heartbeat = 0.0
        self._published: SessionStatus | None = None
        self._published_at = 0.0
        self._type_clashes: list[str] = []
        self._clash_checked = 0.0
        self.create_timer(STEP_S, self._step)
        self.create_timer(1.0, self._publish)
        self.add_check("session", self._check)

    # ---- bring-up

    def _step(self) -> None:
        """One look at every managed node; transitions are asked for one at a time, in order, and never waited for."""
        now = time.monotonic()
        ready = True
        for managed in self._nodes if self._up else list(reversed(self._nodes)):
            self._read_answer(managed, now)
            if managed.future is not None:
                ready = False
                continue
            if managed.state == "unknown" or now - managed.since > PROBE_S:
                self._ask_state(managed, now)
            if not ready or managed.future is not None:
                ready = False
                continue
            ready = self._advance(managed, now)

    def _advance(self, m: Managed, now: float) -> bool:
        """Ask for the next transition; True when the node is where it should be."""
        if self._up:
            if m.state == "active":
                m.failed = ""
                self.report_problem(m.name, None)
                return True
            if m.failed or self._estop:
                return False
            if m.state == "unconfigured":
                while m.bringups and now - m.bringups[0] > RESTART_WINDOW_S:
                    m.bringups.popleft()
                if len(m.bringups) > self.parameters["max_restarts"]:
                    m.failed = f"{m.name} came back {len(m.bringups)} times within 60 s; it stays down"
                    self.report_problem(m.name, m.failed)
                    return False
                m.bringups.append(now)
                self._change(m, Transition.TRANSITION_CONFIGURE, "configure", now)
            elif m.state == "inactive":
                self._change(m, Transition.TRANSITION_ACTIVATE, "activate", now)
            return False
        m.was_active = False
        if m.state == "active":
            self._change(m, Transition.TRANSITION_DEACTIVATE, "deactivate", now)
            return False
        return True

    def _ask_state(self, m: Managed, now: float) -> None:
        get, _ = self._lifecycle[m.name]
        if not get.service_is_ready():
            if m.state not in ("unknown", "gone"):
                self.get_logger().warning(f"{m.name} is gone")
                m.state = "gone"
            m.since = now
            return
        m.future, m.what, m.asked, m.probed = get.call_async(GetState.Request()), "get_state", now, now

    def _change(self, m: Managed, transition: int, what: str, now: float) -> None:
        _, change = self._lifecycle[m.name]
        if change.service_is_ready():
            request = ChangeState.Request(transition=Transition(id=transition))
            m.future, m.what, m.asked, m.probed = change.call_async(request), what, now, now
            self.get_logger().info(f"{what} {m.name}")

    def _read_answer(self, m: Managed, now: float) -> None:
        if m.future is None:
            return
        limit = self.parameters["configure_timeout_s"] + 5.0
        get, change = self._lifecycle[m.name]
        if not m.future.done():
            # Transitions block a node's executor, so one that answers a later question has lost the earlier request.
            found = next((p for p in m.probes if p.done()), None)
            if found is not None or now - m.asked > limit or not get.service_is_ready():
                (get if m.what == "get_state" else change).remove_pending_request(m.future)
                m.future, m.state, m.since = found, "unknown", now
                m.what = "get_state"
                if found is None and now - m.asked > limit:
                    self.report_problem(m.name, f"{m.name} has not answered for {limit:.0f} s")
            elif now - m.probed > PROBE_AGAIN_S:
                m.probes.append(get.call_async(GetState.Request()))
                m.probed = now
        if m.future is None or m.future.done():
            for probe in m.probes:
                if probe is not m.future:
                    get.remove_pending_request(probe)
            m.probes.clear()
        if m.future is None or not m.future.done():
            return
        answer, what, m.future = m.future.result(), m.what, None
        if what == "get_state":
            if answer is not None:
                m.state = {
                    State.PRIMARY_STATE_UNCONFIGURED: "unconfigured", State.PRIMARY_STATE_INACTIVE: "inactive",
                    State.PRIMARY_STATE_ACTIVE: "active", State.PRIMARY_STATE_FINALIZED: "finalized",
                }.get(answer.current_state.id, answer.current_state.label)  # fmt: skip
                self._notice_others(m)
            m.since = now
            return
        m.state, m.since = "unknown", now
        if answer is not None and answer.success:
            self.report_problem(m.name, None)
            m.ups += what == "activate"
        elif what == "configure":
            m.failed = f"{m.name} refused to configure; its log and diagnostics say why"
            self.report_problem(m.name, m.failed)

    def _notice_others(self, m: Managed) -> None:
        """Who deactivates a node by hand wants it to stay so; one that has died comes back unconfigured and is brought up again."""
        if self._up and m.was_active and m.state == "inactive":
            m.failed = f"{m.name} was deactivated by somebody else: activate it, or call monitor_node/bringup"
            self.report_problem(m.name, m.failed)
        m.was_active = m.state == "active"

    # ---- what comes in

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        now = time.monotonic()
        for raw in message.status:
            status = read_status(raw)
            if status.name not in self._statuses and len(self._statuses) >= MAX_STATUSES_KEPT:
                self._statuses.pop(min(self._statuses, key=lambda n: self._statuses[n][0]))
            self._statuses[status.name] = (now, status, raw.level[0] if isinstance(raw.level, bytes) else int(raw.level))

    def _on_episode(self, message: DiagnosticArray) -> None:
        for status in read_records(message, EpisodeStatus):
            self._episode = status
            if status.state == "committed":
                self._episodes[status.episode_id] = {"success": True, "failure": False}.get(status.outcome or "")
                if len(self._episodes) > MAX_EPISODES_KEPT:
                    self._episodes.pop(next(iter(self._episodes)))

    def _on_weights(self, message: DiagnosticArray) -> None:
        for notice in read_records(message, WeightsNotice):
            if notice.which == "promoted":
                self._version = notice.version

    def _on_guard(self, message: DiagnosticArray) -> None:
        for state in read_records(message, GuardState):
            self._estop = state.level == "estop"

    def _on_heartbeat(self, _: Header) -> None:
        self._heartbeat = time.monotonic()

    # ---- what goes out

    def _silent(self, now: float) -> list[str]:
        own = self.get_fully_qualified_name()
        newest: dict[str, float] = {}
        for name, (at, _, _) in self._statuses.items():
            node = name.split(":", 1)[0]
            newest[node] = max(newest.get(node, 0.0), at)
        return sorted(n for n, at in newest.items() if n != own and now - at > self.parameters["silence_s"])

    def _look_for_clashes(self) -> list[str]:
        """A type clash on one name is silent in DDS: compare the graph with the table, and find topics nobody publishes."""
        found = []
        namespace = self.get_namespace().rstrip("/")
        known = {f"{namespace}/{t.name}" if not t.name.startswith("/") else t.name: t.type for t in ALL_TOPICS.values()}
        for name, types in self.get_topic_names_and_types():
            wanted = known.get(name)
            if wanted and wanted != PER_ROBOT and any(t != wanted for t in types):
                found.append(f"{name} is used with {', '.join(sorted(types))}; accepted is {wanted}")
        for topic in self.parameters["expected"]:
            if self.count_publishers(topic) == 0:
                found.append(f"{topic} has no publisher")
        return found

    def _publish(self) -> None:
        now = time.monotonic()
        if now - self._clash_checked > 5.0:
            self._clash_checked = now
            self._type_clashes = self._look_for_clashes()
            self.report_problem("topics", "; ".join(self._type_clashes) or None)
        silent = self._silent(now)
        statuses, worst = [], OK
        for name, (at, status, level) in sorted(self._statuses.items()):
            stale = now - at > self.parameters["silence_s"]
            level = STALE if stale else level
            worst = max(worst, min(level, ERROR))
            statuses.append(
                Status(f"/{name.lstrip('/').replace(': ', '/', 1)}", status.message, status.values, status.hardware_id, level)
            )
        for first in range(0, len(statuses), 200):
            self._aggregate.publish(statuses_message(statuses[first : first + 200], self.now_ns()))
        top = DiagnosticStatus(level=bytes([worst]), name="toplevel_state", message=LEVELS[worst], hardware_id=self.robot_id)
        self._top.publish(top)
        session = self._status(silent, worst)
        if session != self._published or now - self._published_at > 10.0:
            self._published, self._published_at = session, now
            self._session.publish(records_message([session], self.now_ns(), hardware_id=self.robot_id, level=min(worst, ERROR)))

    def _status(self, silent: list[str], worst: int) -> SessionStatus:
        states = {m.name: m.state for m in self._nodes}
        up = all(m.state == "active" for m in self._nodes)
        troubled = bool(silent) or any(m.failed or m.state == "gone" for m in self._nodes) or self._estop
        running = self._episode is not None and self._episode.state == "running" and time.monotonic() - self._heartbeat < 1.0
        if not self._up:
            phase = "stopped"
        elif troubled:
            phase = "degraded"
        elif not up:
            phase = "bringup"
        else:
            phase = "running" if running else "ready"
        successes = sum(v is True for v in self._episodes.values())
        parts = [f"{len(self._episodes)} episodes, {successes} successes, version {self._version} acts"]
        parts += [m.failed for m in self._nodes if m.failed]
        if self._estop:
            parts.append("e-stop")
        if silent:
            parts.append(f"silent: {', '.join(silent)}")
        return SessionStatus(
            "; ".join(parts),
            phase,
            states,
            len(self._episodes),
            successes,
            self._version,
            "standard",
            self.parameters["run_dir"] or None,
        )

    # ---- services

    def _on_bringup(self, _: Any, response: Any) -> Any:
        self._up = True
        for m in self._nodes:
            m.failed = ""
            m.bringups.clear()
            self.report_problem(m.name, None)
        response.success, response.message = True, "session_status says how far it is"
        return response

    def _on_shutdown(self, _: Any, response: Any) -> Any:
        self._up = False
        response.success, response.message = True, "session_status says how far it is"
        return response

    def _on_active(self, _: Any, response: Any) -> Any:
        down = [f"{m.name} is {m.state}" for m in self._nodes if m.state != "active"]
        response.success, response.message = not down, "; ".join(down) or "all active"
        return response

    def _check(self) -> tuple[int, str, dict[str, Any]]:
        failed = [m.failed for m in self._nodes if m.failed]
        values: dict[str, Any] = {m.name: m.state for m in self._nodes}
        values |= {f"{m.name}.bringups": m.ups for m in self._nodes}
        return (
            (ERROR if failed else OK),
            "; ".join(failed) or (self._published.phase or "" if self._published else "bringup"),
            values,
        )


def main(argv: list[str] | None = None) -> int:
    return run(MonitorNode, argv)


if __name__ == "__main__":
    raise SystemExit(main())
