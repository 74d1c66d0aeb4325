"""``policy_node``: base policy, head, chunk scheduler, arbiter, safety filter, recording and weight swap, as a lifecycle node.

Nothing here waits for a learner, a reward node or a monitor. Commands go to the guard, never to a controller. The play-out runs in
a thread of its own (or on node time under ``use_sim_time``), inference in another one.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import JumpThreshold
from rclpy.duration import Duration
from std_msgs.msg import Bool, Header, Int8
from std_srvs.srv import SetBool, Trigger

from robot_rl.intervention.arbiter import Request
from robot_rl.ros import conversion, names, qos
from robot_rl.ros.base import ERROR, OK, WARN, ManagedNode, run
from robot_rl.ros.deciding import refusal
from robot_rl.ros.parameters import accept_all
from robot_rl.wire import (
    EpisodeStatus,
    GuardEvent,
    GuardState,
    InterventionState,
    OperatorState,
    StepReward,
    WeightsNotice,
    encode,
)
from robot_rl.wire.records import PolicyHealth

if TYPE_CHECKING:
    from robot_rl.ros.session import Session

AUTO_PAUSE_S = 0.3
ORDINARY_WAIT_S = 1.0  # from a reset to the first observations after it
RESET_S = 10.0
CLOCKS_APART_NS = 100_000_000


class PolicyNode(ManagedNode):
    """Wires a :class:`~robot_rl.ros.session.Session` (everything that configure builds) to the graph."""

    def __init__(self) -> None:
        super().__init__(names.POLICY_NODE)
        self.session: Session | None = None
        self.lock = threading.RLock()
        self._heartbeat = self.create_publisher(Header, "~/heartbeat", qos.LATEST)
        self._episode_topic = self.create_publisher(DiagnosticArray, names.EPISODE_STATUS, qos.STATE)
        self._intervention = self.create_publisher(Bool, "~/intervention", qos.STATE)
        self._intervention_state = self.create_publisher(DiagnosticArray, "~/intervention_state", qos.STATE)
        # A rosetta contract reads this (section 3.4 of the ROS specification).
        self._rosetta = (
            self.create_publisher(Int8, "hil_intervention", qos.STATE) if self.parameters["rosetta_compat"] else None
        )
        self.guard: GuardState | None = None
        self._listening: list[Any] = []
        self._clock_gap: int | None = None
        self._auto_at = 0.0
        self._waiting_since: float | None = None  # monotonic seconds: begin() has refused since then
        self._resetting: Any = None
        self._reset_asked = 0.0
        self._reset_client: Any = None
        for name, kind, callback in (
            ("start_episode", Trigger, self._on_start), ("cancel_episode", Trigger, self._on_cancel),
            ("end_episode", SetBool, self._on_end), ("undo_label", Trigger, self._on_undo),
            ("set_intervention", SetBool, self._on_set_intervention), ("hold", SetBool, self._on_hold),
            ("use_base", SetBool, self._on_use_base),
        ):  # fmt: skip
            self.create_service(kind, f"~/{name}", callback)
        threshold = JumpThreshold(min_forward=Duration(seconds=1), min_backward=Duration(nanoseconds=-1), on_clock_change=False)
        self._jump = self.get_clock().create_jump_callback(threshold, post_callback=self._on_clock_jump)
        self.create_timer(0.1, self._slow_tick)
        self.add_check("policy", self._check_loop)
        self.add_check("observations", self._check_observations)
        self.add_check("weights", self._check_weights)
        self.add_check("recorder", self._check_recorder)

    @property
    def sim_time(self) -> bool:
        return bool(self.get_parameter("use_sim_time").value)

    def clock_ns(self) -> int:
        return self.now_ns() if self.sim_time else time.monotonic_ns()

    # ---- lifecycle

    def configure(self) -> None:
        from robot_rl.ros.session import Session  # here, because it imports torch

        began = time.monotonic()
        self.session = session = Session(self)
        session.build()
        self.parameters.refuse = partial(refusal, session.host)
        listen = self._listening.append
        for channel, hop in session.hops.items():
            executed, operator = f"{names.EXECUTED}/{channel}", f"{names.OPERATOR_ACTION}/{channel}"
            listen(self.listen(hop.type, executed, partial(self._on_executed, channel), qos.COMMAND))
            listen(self.listen(hop.type, operator, partial(self._on_operator_action, channel), qos.LATEST))
        listen(self.listen(DiagnosticArray, names.GUARD_STATE, self._on_guard_state, qos.STATE))
        listen(self.listen(DiagnosticArray, names.GUARD_EVENTS, self._on_guard_events, qos.EVENT))
        listen(self.listen(DiagnosticArray, names.OPERATOR_STATE, self._on_operator_state, qos.LATEST))
        listen(self.listen(DiagnosticArray, names.WEIGHTS, self._on_weights, qos.STATE))
        listen(self.listen(DiagnosticArray, names.REWARD_EVENTS, self._on_rewards, qos.EVENT))
        took, limit = time.monotonic() - began, self.parameters["configure_timeout_s"]
        if took > limit:
            raise ValueError(f"configure took {took:.0f} s, accepted are configure_timeout_s={limit:g}")
        session.start_playout(self.tick)

    def activate(self) -> None:
        self._auto_at = time.monotonic() + AUTO_PAUSE_S

    def deactivate(self) -> None:
        with self.lock:
            if self.session is not None:
                if self.session.running:
                    self.session.finish("deactivated", truncated=True)
                self.session.intervals.pause()

    def release(self) -> None:
        session, self.session = self.session, None
        self.parameters.refuse = accept_all
        if session is not None:
            session.stop_playout()
            with self.lock:
                if session.running:
                    session.finish("deactivated", truncated=True)
            session.close()
        for subscription in self._listening:
            self.destroy_subscription(subscription)
        self._listening.clear()
        if self._reset_client is not None:
            self.destroy_client(self._reset_client)
            self._reset_client = self._resetting = None

    # ---- a tick of the play-out (its thread, or node time)

    def prepare(self) -> None:
        with self.lock:
            if self.session is not None and self.active and self.session.running:
                self.session.prepare()

    def tick(self) -> None:
        with self.lock:
            session = self.session
            if session is None:
                return
            self._heartbeat.publish(conversion.header_message(session.state_word(self.active), self.now_ns()))
            if not self.active or not session.running:
                return
            self._compare_clocks()
            session.tick()
            self._publish_intervention(session)

    def _compare_clocks(self) -> None:
        """Wall clock: ROS and steady clock part by more than 0.1 s between two ticks."""
        if self.sim_time:
            return
        gap = self.now_ns() - time.monotonic_ns()
        if self._clock_gap is not None and abs(gap - self._clock_gap) > CLOCKS_APART_NS:
            self._on_clock_jump(None)
        self._clock_gap = gap

    def _on_clock_jump(self, jump: Any) -> None:
        with self.lock:
            if self.session is not None:
                if self.session.running:
                    self.get_logger().warning("the clock jumped: the episode ends and what was received is forgotten")
                self.session.clock_jumped()

    # ---- what is said

    def publish_status(self, status: EpisodeStatus) -> None:
        self._episode_topic.publish(conversion.records_message([status], self.now_ns(), hardware_id=self.robot_id))

    def _publish_intervention(self, session: Session) -> None:
        state = session.intervention_change()
        if state is None:
            return
        word, device, identity = state
        self._intervention.publish(Bool(data=word == "human"))
        if self._rosetta is not None:
            self._rosetta.publish(Int8(data=int(word == "human")))
        record = InterventionState(
            episode_id=session.recording.status.episode_id, state=word, source=device or "policy", device=device or None,
            intervention_id=identity if identity >= 0 else None,
        )  # fmt: skip
        self._intervention_state.publish(conversion.records_message([record], self.now_ns(), hardware_id=self.robot_id))

    # ---- what is heard

    def _on_executed(self, channel: str, message: Any) -> None:
        if self.session is not None:
            self.session.on_executed(channel, *self.session.hops[channel].read_plausible(message))

    def _on_guard_state(self, message: DiagnosticArray) -> None:
        for state in conversion.read_records(message, GuardState):
            self.guard = state
            with self.lock:
                if self.session is not None:
                    self.session.on_guard(state)

    def _on_guard_events(self, message: DiagnosticArray) -> None:
        for event in conversion.read_records(message, GuardEvent):
            with self.lock:
                if self.session is not None:
                    self.session.on_guard_event(event)

    def _on_operator_state(self, message: DiagnosticArray) -> None:
        states = conversion.read_records(message, OperatorState)
        if self.session is not None and states:
            self.session.on_operators(states, conversion.from_stamp(message.header.stamp))

    def _on_operator_action(self, channel: str, message: Any) -> None:
        if self.session is not None:
            self.session.on_operator_action(channel, *self.session.hops[channel].read_plausible(message))

    def _on_weights(self, message: DiagnosticArray) -> None:
        if self.session is not None and self.session.host is not None:
            self.session.host.notice(conversion.read_records(message, WeightsNotice))

    def _on_rewards(self, message: DiagnosticArray) -> None:
        for reward in conversion.read_records(message, StepReward):
            if self.session is not None and self.active:
                with self.lock:
                    self.session.on_reward(reward)

    # ---- services: each answers at once

    def _answer(self, response: Any, work: Any) -> Any:
        try:
            if self.session is None or not self.active:
                raise ValueError("policy_node is not active")
            with self.lock:
                response.message = work(self.session) or ""
            response.success = True
        except (ValueError, OSError, RuntimeError) as error:
            response.success, response.message = False, str(error)
        return response

    def _on_start(self, request: Any, response: Any) -> Any:
        return self._answer(response, lambda s: s.begin())

    def _on_cancel(self, request: Any, response: Any) -> Any:
        return self._answer(response, lambda s: s.abort("operator", "cancelled"))

    def _on_end(self, request: Any, response: Any) -> Any:
        return self._answer(response, lambda s: s.end_with(bool(request.data)))

    def _on_undo(self, request: Any, response: Any) -> Any:
        return self._answer(response, lambda s: s.recording.undo_label())

    def _on_set_intervention(self, request: Any, response: Any) -> Any:
        wanted = Request.HELP if request.data else Request.RELEASE
        return self._answer(response, lambda s: s.arbiter.post(wanted, self.clock_ns()))

    def _on_hold(self, request: Any, response: Any) -> Any:
        return self._answer(response, lambda s: s.hold(bool(request.data)))

    def _on_use_base(self, request: Any, response: Any) -> Any:
        return self._answer(response, lambda s: s.use_base(bool(request.data)))

    # ---- ten times a second: failures of the play-out, automatic episodes

    def _slow_tick(self) -> None:
        session = self.session
        if session is None:
            return
        session.look()
        if (error := session.playout_error) is not None:
            self.report_problem("play-out", f"the play-out stopped: {error!r}")
            with self.lock:
                if session.running:
                    session.abort("crash", repr(error))
            self.finished, self.exit_code = True, 1
            return
        if self.active and self.parameters["episode_mode"] == "auto" and not session.running:
            self._automatic(session)

    def _automatic(self, session: Session) -> None:
        """Between two episodes: reset, wait for the answer, begin."""
        service, now = self.parameters["reset_service"], time.monotonic()
        if session.ended_at is not None and self._auto_at < session.ended_at + AUTO_PAUSE_S:
            self._auto_at, self._resetting = session.ended_at + AUTO_PAUSE_S, None
        if now < self._auto_at:
            return
        if self.guard is None or (
            not self.guard.armed and session.guard_hash_matches(self.guard) and self.guard.level == "estop"
        ):
            return
        if service and self._resetting is None:
            if self._reset_client is None:
                self._reset_client = self.create_client(Trigger, service)
            if not self._reset_client.service_is_ready():
                self.log_sometimes("reset", f"waiting for {service}", 10.0)
                return
            session.recording.say(state="resetting")
            self._resetting, self._reset_asked = self._reset_client.call_async(Trigger.Request()), now
            return
        if service and not self._resetting.done():
            if now - self._reset_asked > RESET_S:  # DDS believes in a killed server for a while: the request is lost
                self._reset_client.remove_pending_request(self._resetting)
                self._resetting = None
            return
        if service and not self._resetting.result().success:
            self.log_sometimes("reset", f"{service}: {self._resetting.result().message}")
            self._auto_at, self._resetting = now + 1.0, None
            return
        try:
            with self.lock:
                session.begin(after_ns=session.reset_answered(self._resetting) if service else None)
            self._resetting = self._waiting_since = None
        except (ValueError, OSError, RuntimeError) as error:
            self._auto_at = now + 0.1
            self._waiting_since = self._waiting_since or now
            if now - self._waiting_since > ORDINARY_WAIT_S:  # observations of the new scene need a moment
                self.log_sometimes("begin", f"no episode yet: {error}", 5.0)

    # ---- diagnostics

    def _check_loop(self) -> tuple[int, str, dict[str, Any]]:
        session = self.session
        if session is None:
            return OK, "not configured", {}
        health: PolicyHealth = session.health(self.get_fully_qualified_name(), self.active)
        status = encode(health)
        late = bool(health.deadline_misses)
        level = ERROR if session.undecided else WARN if late else OK
        return level, health.message, dict(status.values) | {"priority": session.granted}

    def _check_observations(self) -> tuple[int, str, dict[str, Any]]:
        if self.session is None:
            return OK, "not configured", {}
        values: dict[str, Any] = {}
        for topic, stream in self.session.sync.streams.items():
            values |= {f"{topic}.{k}": round(v, 3) for k, v in stream.figures(self.clock_ns()).items()}
            if stream.clock_off_ns:
                values[f"{topic}.clock_off_s"] = stream.clock_off_ns / 1e9
        problems = self.session.sync.snapshot().problems if not self.session.running else self.session.problems
        return (ERROR if problems else OK), "; ".join(problems) or "fresh", values

    def _check_weights(self) -> tuple[int, str, dict[str, Any]]:
        host = self.session.host if self.session is not None else None
        if host is None:
            return OK, "no policy", {}
        values = {"version": host.acting.version, "mode": host.acting.mode, "swaps": host.swaps, "refused": host.refused}
        return (WARN if host.last_error else OK), host.last_error or "verified", values

    def _check_recorder(self) -> tuple[int, str, dict[str, Any]]:
        if self.session is None:
            return OK, "not configured", {}
        recording = self.session.recording
        free = recording.free_gb()
        values = {"episodes": recording.index, "disk_free_gb": free, "state": recording.status.state}
        return (WARN if free < 2.0 else OK), "recording" if recording.store is not None else "not recording", values

    def folder_of_store(self) -> Path | None:
        p = self.parameters
        if not p["record"]:
            return None
        if p["store"]:
            return Path(p["store"]).expanduser()
        if p["run_dir"]:
            return Path(p["run_dir"]).expanduser() / "store"
        raise ValueError("store is empty and so is run_dir: accepted is a folder for episodes in one of them, or record:=false")


def main(argv: Sequence[str] | None = None) -> int:
    return run(PolicyNode, argv, own_priority=True)  # how much of it needs real time depends on where inference runs


if __name__ == "__main__":
    sys.exit(main())
