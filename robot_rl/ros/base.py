"""What every node shares: parameters that refuse with reasons, lifecycle transitions that never kill the process, diagnostics,
priority, and a spin loop with our own signal handling.

A node's ``main`` is ``return run(MyNode, argv)``.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription

from robot_rl.ros import qos
from robot_rl.ros.conversion import statuses_message
from robot_rl.ros.names import DIAGNOSTICS, NodeTable
from robot_rl.ros.parameters import ParameterError, Parameters
from robot_rl.runtime import priority
from robot_rl.wire.codec import Status, WireError, WireSchemaError

EXIT_CONFIGURATION = 78  # EX_CONFIG of sysexits.h
EXIT_STUCK = 70
TEARDOWN_S = 10.0
SWITCH_S = 0.0005
"""How long a thread of a node waits for Python's lock before it asks for it. With Python's own 5 ms, whatever computes that long
(diagnostics, once a second) makes a command that is due meanwhile late by as much."""
OK, WARN, ERROR, STALE = 0, 1, 2, 3
SCHEMA_STANDS_S = 10.0
T = TypeVar("T")

Check = Callable[[], tuple[int, str, dict[str, Any]]]
"""A diagnostics check: (level, message, values)."""


class _Shared:
    """Mixed into plain and lifecycle nodes alike."""

    table: NodeTable
    parameters: Parameters

    def _share(self: Any, table: NodeTable, lifecycle: bool) -> None:
        self.table = table
        self.parameters = Parameters(self, table.all_parameters, lifecycle=lifecycle)
        self._checks: dict[str, Check] = {}
        self._standing: dict[str, str] = {}
        self._last_logged: dict[str, float] = {}
        self._other_schema: dict[str, float] = {}  # topic, and when a peer of another schema was last heard there
        self.dropped = 0
        self._diagnostics = self.create_publisher(DiagnosticArray, DIAGNOSTICS, qos.DIAG)
        self._diagnostics_timer: Any = None
        self._diagnostics_hz = 0.0
        self._set_diagnostics_rate()

    @property
    def robot_id(self: Any) -> str:
        return self.parameters["robot_id"] or self.get_namespace().strip("/") or "robot"

    def now_ns(self: Any) -> int:
        """The node's ROS clock: wall time, or simulated time under ``use_sim_time``."""
        return self.get_clock().now().nanoseconds

    # ---- diagnostics

    def add_check(self, name: str, check: Check) -> None:
        """Publish ``<fully qualified node>: <name>`` at ``diagnostics_hz``."""
        self._checks[name] = check

    def report_problem(self, key: str, text: str | None) -> None:
        """An ERROR that stays in diagnostics until ``text`` is None. Logged when it changes."""
        if text is None:
            self._standing.pop(key, None)
        elif self._standing.get(key) != text:
            self._standing[key] = text
            self.get_logger().error(text)  # type: ignore[attr-defined]

    def log_sometimes(self: Any, key: str, text: str, period_s: float = 5.0) -> None:
        """A warning at most every ``period_s`` for each ``key``."""
        now = time.monotonic()
        if now - self._last_logged.get(key, -1e9) >= period_s:
            self._last_logged[key] = now
            self.get_logger().warning(text)

    def _set_diagnostics_rate(self: Any) -> None:
        hz = self.parameters["diagnostics_hz"]
        if hz == self._diagnostics_hz:
            return
        if self._diagnostics_timer is not None:
            self.destroy_timer(self._diagnostics_timer)
        self._diagnostics_hz = hz
        self._diagnostics_timer = self.create_timer(
            1.0 / hz, self.publish_diagnostics, clock=Clock(clock_type=ClockType.STEADY_TIME)
        )

    def publish_diagnostics(self: Any) -> None:
        name = self.get_fully_qualified_name()
        statuses = []
        for topic, at in list(self._other_schema.items()):
            if time.monotonic() - at > SCHEMA_STANDS_S:
                del self._other_schema[topic]
                self.report_problem(f"schema {topic}", None)
        problem = "; ".join(self._standing.values())
        values = {"dropped_messages": self.dropped}
        statuses.append(_status(f"{name}: node", ERROR if problem else OK, problem or "ok", values, self.robot_id))
        for check, function in list(self._checks.items()):
            try:
                level, message, values = function()
            except Exception as error:  # a broken figure must not silence the others
                level, message, values = ERROR, f"check failed: {error!r}", {}
            statuses.append(_status(f"{name}: {check}", level, message, values, self.robot_id))
        self._diagnostics.publish(statuses_message(statuses, self.now_ns()))
        self._set_diagnostics_rate()

    # ---- subscriptions

    def unforeseen(self: Any, where: str, error: Exception) -> None:
        """A message raised what no message should: it is dropped, and the traceback is logged. Nobody's message ends a node."""
        self.dropped += 1
        trace = "".join(traceback.format_exception(error))
        self.log_sometimes(f"unforeseen {where}", f"{where}: message dropped: {error!r}\n{trace}")

    def listen(
        self: Any, message_type: type, topic: str, callback: Callable[[Any], None], profile: Any, **options: Any
    ) -> Subscription:
        """Subscribe; a message that cannot be read is dropped, counted and logged, a QoS clash becomes a diagnostics ERROR."""

        def guarded(message: Any) -> None:
            try:
                callback(message)
            except (WireError, ValueError, OverflowError) as error:
                self.dropped += 1
                self.log_sometimes(f"drop {topic}", f"{topic}: message dropped: {error}")
                if isinstance(error, WireSchemaError):
                    self._other_schema[topic] = time.monotonic()
                    self.report_problem(f"schema {topic}", f"{topic}: {error}")
            except Exception as error:
                self.unforeseen(topic, error)

        def incompatible(event: Any) -> None:
            policy = getattr(event.last_policy_kind, "name", event.last_policy_kind)
            self.report_problem(
                f"qos {topic}", f"{topic}: a publisher offers an incompatible {policy}; no data will arrive from it"
            )

        events = SubscriptionEventCallbacks(incompatible_qos=incompatible)
        return self.create_subscription(message_type, topic, guarded, profile, event_callbacks=events, **options)


def _status(name: str, level: int, message: str, values: dict[str, Any], hardware_id: str) -> Status:
    pairs = [(k, f"{v:.4g}" if isinstance(v, float) else str(v)) for k, v in values.items()]
    return Status(name, message, tuple(pairs), hardware_id, level)


class PlainNode(_Shared, Node):
    """A node without lifecycle: wrong parameters end the process with code 78 and the whole list."""

    def __init__(self, table: NodeTable, **options: Any) -> None:
        Node.__init__(self, table.name, **options)
        self._share(table, lifecycle=False)

    def close(self) -> None:
        """Release everything but ROS entities; called once, before the node is destroyed."""


class ManagedNode(_Shared, LifecycleNode):
    """A lifecycle node. Subclasses implement ``configure``, ``activate``, ``deactivate`` and ``release``.

    ``configure`` and ``activate`` may raise: ValueError and OSError (a cause the user can fix) become FAILURE with the reason
    in log and diagnostics; anything else becomes ERROR, is logged with its traceback, and everything is released, so that
    a later attempt starts clean.
    """

    def __init__(self, table: NodeTable, **options: Any) -> None:
        LifecycleNode.__init__(self, table.name, **options)
        self._share(table, lifecycle=True)
        self.active = False
        # rclpy raises out of spin on an invalid request and the caller never gets an answer (rclpy#1209).
        self._unchecked_change_state = self._service_change_state.callback
        self._service_change_state.callback = self._checked_change_state

    def _checked_change_state(self, request: Any, response: Any) -> Any:
        available = {t[0]: t[1] for t in self._state_machine.available_transitions}
        wanted = request.transition.label or request.transition.id
        if wanted not in (available.values() if request.transition.label else available):
            state = self._state_machine.current_state[1]
            self.get_logger().warning(f"transition {wanted!r} refused in state {state!r}; accepted are {available}")
            response.success = False
            return response
        return self._unchecked_change_state(request, response)

    # ---- what subclasses implement

    def configure(self) -> None:
        """Everything slow."""

    def activate(self) -> None:
        """Under 100 ms."""

    def deactivate(self) -> None:
        """End work in progress."""

    def release(self) -> None:
        """Free what configure built; must be safe to call at any time, twice."""

    # ---- transitions

    def _attempt(self, what: str, steps: Callable[[], None], undo: Callable[[], None]) -> TransitionCallbackReturn:
        try:
            steps()
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError, ImportError))
            if not expected:
                self.get_logger().error(f"{what}: unforeseen error\n{traceback.format_exc()}")
            self.report_problem(what, f"{what} failed: {error}")
            try:
                undo()
            except Exception:
                self.get_logger().error(f"undoing {what}\n{traceback.format_exc()}")
            return TransitionCallbackReturn.FAILURE if expected else TransitionCallbackReturn.ERROR
        self.report_problem(what, None)
        return TransitionCallbackReturn.SUCCESS

    def _release(self) -> None:
        self.parameters.unconfigured = True
        self.release()
        gc.collect()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        def steps() -> None:
            self.parameters.check()
            self.parameters.unconfigured = False
            self.configure()

        return self._attempt("configure", steps, self._release)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        def steps() -> None:
            super(ManagedNode, self).on_activate(state)
            self.active = True
            self.activate()

        def undo() -> None:
            self.active = False
            super(ManagedNode, self).on_deactivate(state)

        return self._attempt("activate", steps, undo)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        def steps() -> None:
            self.active = False
            self.deactivate()
            super(ManagedNode, self).on_deactivate(state)

        return self._attempt("deactivate", steps, self._release)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._attempt("cleanup", self._release, lambda: None)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        def steps() -> None:
            if self.active:
                self.active = False
                self.deactivate()
                super(ManagedNode, self).on_deactivate(state)
            self._release()

        return self._attempt("shutdown", steps, lambda: None)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.active = False
        try:
            self._release()
        except Exception:
            self.get_logger().error(f"release after an error\n{traceback.format_exc()}")
            return TransitionCallbackReturn.FAILURE
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Through ``shutdown`` to finalized, whatever the state is."""
        if self._state_machine.current_state[1] in ("unconfigured", "inactive", "active"):
            self.trigger_shutdown()


def set_priority(rt_priority: int, nice: int) -> str:
    """Ask for SCHED_FIFO or a nice level for this process, every thread of it; returns what was granted, in words."""
    if rt_priority > 0:
        if priority.set_fifo(rt_priority):
            return f"SCHED_FIFO {rt_priority}"
        if priority.set_nice(-10):
            return f"nice -10 (SCHED_FIFO was refused: {priority.REMEDY})"
        return f"normal priority (SCHED_FIFO and nice -10 were refused: {priority.REMEDY})"
    if nice:
        return f"nice {nice}" if priority.set_nice(nice) else f"normal priority (nice {nice} was refused)"
    return "normal priority"


def run(factory: Callable[[], Any], argv: Sequence[str] | None = None, *, own_priority: bool = False) -> int:
    """Make a node, spin it in this thread until SIGINT or SIGTERM, tear it down; the exit code.

    The process takes the node's ``rt_priority`` and ``nice`` when the node has been made, before it spins; with
    ``own_priority`` the node itself asks for real-time priority.

    rclpy's own signal handler invalidates the context before a node can publish its stop, and a second SIGINT (``ros2 launch``
    plus the terminal) kills the clean-up; so the handlers are ours and further SIGINTs are ignored during teardown.
    """
    argv = list(sys.argv if argv is None else argv)
    sys.setswitchinterval(SWITCH_S)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=_give_up, args=(stop,), name="give-up", daemon=True).start()
    rclpy.init(args=argv, signal_handler_options=SignalHandlerOptions.NO)
    node = None
    code = 0
    try:
        node = factory()
        rt = 0 if own_priority else node.parameters["rt_priority"]
        node.granted_priority = set_priority(rt, node.parameters["nice"])
        if rt and not node.granted_priority.startswith("SCHED"):
            node.get_logger().warning(node.granted_priority)
        if isinstance(node, PlainNode):
            node.parameters.check()
        executor = _executor(node)
        executor.add_node(node)
        while not stop.is_set() and rclpy.ok() and not getattr(node, "finished", False):
            try:
                executor.spin_once(timeout_sec=0.1)
            except rclpy._rclpy_pybind11.RCLError as error:  # a message that cannot be deserialized, for one
                node.dropped += 1
                node.log_sometimes("spin", f"rclpy raised out of spin: {error}\n{traceback.format_exc()}")
        code = int(getattr(node, "exit_code", 0))
    except ParameterError as error:
        print(f"{error}", file=sys.stderr, flush=True)
        code = EXIT_CONFIGURATION
    except ExternalShutdownException:
        pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        stop.set()
        if node is not None:
            try:
                node.close()
            except Exception:
                traceback.print_exc()
                code = code or 1
            node.destroy_node()
        rclpy.try_shutdown()
    return code


def _executor(node: Any) -> Any:
    if node.parameters["executor"] == "events":
        try:
            from rclpy.experimental import EventsExecutor

            return EventsExecutor()
        except ImportError as error:
            node.get_logger().warning(f"executor=events is not available here ({error}); single is used")
    return SingleThreadedExecutor()


def _give_up(stop: threading.Event) -> None:
    """A process that was told to stop and hangs (in a callback, in a library) ends all the same."""
    stop.wait()
    time.sleep(TEARDOWN_S)
    os._exit(EXIT_STUCK)


def spin_for(executor: Any, seconds: float) -> None:
    """Spin an executor for a while (tests, scripts)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        executor.spin_once(timeout_sec=0.02)


__all__ = [
    "ERROR",
    "OK",
    "STALE",
    "WARN",
    "Check",
    "ManagedNode",
    "PlainNode",
    "run",
    "set_priority",
    "spin_for",
]
