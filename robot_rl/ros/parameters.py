"""Declared parameters: tables of names, types, ranges and when a change takes effect; and the code that declares them.

Importing this module needs no ROS. What rclpy does by itself is not enough for a node that people start by hand: an override
that is out of range or of the wrong type kills the process in its constructor, and one that nobody declared is ignored without
a word. So the overrides are read first, checked against the table, and every problem is collected into one refusal.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rclpy.node import Node

RUN_TIME, EPISODE, CONFIGURE, FIXED = "R", "E", "C", "X"
WHEN = {
    RUN_TIME: "at run time, from the next tick or chunk",
    EPISODE: "from the next episode",
    CONFIGURE: "read in configure; settable while unconfigured",
    FIXED: "read-only",
}


class ParameterError(ValueError):
    """Parameters that are refused; ``findings`` holds one sentence each."""

    def __init__(self, findings: list[str]) -> None:
        super().__init__("\n".join(findings))
        self.findings = findings


@dataclass(frozen=True)
class Parameter:
    """One declared parameter.

    Attributes:
        default: also says the type: bool, int, float, str, or a tuple of str (string array).
        range: inclusive [low, high] of a number.
        choices: accepted words of a string (or of each element of a string array).
        when: ``R`` run time, ``E`` next episode, ``C`` read in configure, ``X`` read only.
        required: an empty string is refused in configure.
        max_length: of a string.
    """

    name: str
    default: bool | int | float | str | tuple[str, ...]
    description: str
    when: str = CONFIGURE
    range: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    required: bool = False
    max_length: int | None = None

    @property
    def type_name(self) -> str:
        kinds = {bool: "bool", int: "integer", float: "double", str: "string", tuple: "string[]"}
        return kinds[type(self.default)]

    @property
    def accepted(self) -> str:
        if self.choices:
            return ", ".join(self.choices)
        if self.range is not None:
            low, high = self.range
            return f"{self.type_name} in [{low:g}, {high:g}]"
        if self.max_length is not None:
            return f"{self.type_name} of at most {self.max_length} characters"
        return self.type_name

    def check(self, given: Any) -> tuple[Any, str]:
        """(the value in the declared type, what is wrong with it or an empty text)."""
        value: Any = given
        kind: Any = type(self.default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is tuple and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            value = tuple(value)
        if type(value) is not kind:
            return value, f"{self.name}={value!r}: accepted is {self.accepted}"
        if kind is float and not math.isfinite(value):
            return value, f"{self.name}={value!r}: accepted is {self.accepted}"
        if self.range is not None and not self.range[0] <= value <= self.range[1]:
            return value, f"{self.name}={value!r}: accepted is {self.accepted}"
        if self.choices:
            for word in value if kind is tuple else (value,):
                if word not in self.choices:
                    near = difflib.get_close_matches(str(word), self.choices, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    return value, f"{self.name}={word!r}: accepted are {', '.join(self.choices)}{hint}"
        if self.max_length is not None and len(value) > self.max_length:
            return value, f"{self.name} has {len(value)} characters: accepted is {self.accepted}"
        return value, ""


COMMON_PARAMETERS = (
    Parameter("robot_id", "", "name of this robot in records; empty: the namespace", FIXED),
    Parameter("run_dir", "", "folder of the run: store, weights, checkpoints", CONFIGURE),
    Parameter("diagnostics_hz", 1.0, "rate of /diagnostics", RUN_TIME, (0.2, 10.0)),
    Parameter(
        "executor",
        "events",
        "how callbacks are run; single builds a new wait set for every message",
        FIXED,
        choices=("single", "events"),
    ),
    Parameter("rt_priority", 0, "SCHED_FIFO priority to ask for; 0 leaves the scheduler alone", FIXED, (0, 49)),
    Parameter("nice", 0, "nice level to set at start", FIXED, (-20, 19)),
)

POLICY_PARAMETERS = (
    Parameter("robot", "", "name in configs/robots/ or path of a robot description", CONFIGURE, required=True),
    Parameter(
        "policy",
        "",
        "policy or run folder, LeRobot checkpoint, remote:HOST:PORT, or none (holds; for teleoperation)",
        CONFIGURE,
        required=True,
    ),
    Parameter("head", "", "run folder or recipe whose head acts on the base; empty: the base alone", CONFIGURE),
    Parameter("device", "auto", "torch device: auto, cpu, cuda, cuda:<n>", CONFIGURE),
    Parameter("task", "", "instruction recorded with the episode; empty: the policy's own", EPISODE, max_length=500),
    Parameter("control_hz", 0.0, "policy rows per second; 0: the robot description's", CONFIGURE, (0.0, 100.0)),
    Parameter("command_hz", 0.0, "commands per second; 0: the robot description's", CONFIGURE, (0.0, 500.0)),
    Parameter("n_action_steps", 0, "rows of a chunk that may run; 0: the policy's own", RUN_TIME, (0, 256)),
    Parameter("replan_margin", 2, "rows left, beyond the latency, at which the next chunk is asked for", RUN_TIME, (0, 50)),
    Parameter(
        "blend",
        "auto",
        "how chunks are joined; rtc: the new one is drawn so that it goes on from the rows that run meanwhile; auto: rtc where policy and head can, else linear",
        RUN_TIME,
        choices=("auto", "rtc", "linear", "none"),
    ),
    Parameter("blend_steps", 4, "rows over which a new chunk is blended in", RUN_TIME, (0, 64)),
    Parameter(
        "inference",
        "auto",
        "where inference and camera decoding run; auto: in a process of their own above 10 commands a second",
        FIXED,
        choices=("auto", "thread", "process"),
    ),
    Parameter("warmup_forwards", 10, "forward passes in configure", CONFIGURE, (1, 200)),
    Parameter("configure_timeout_s", 60.0, "longest time configure may take", CONFIGURE, (5.0, 600.0)),
    Parameter("swap_at", "episode", "when new weights may start to act", RUN_TIME, choices=("episode", "chunk")),
    Parameter("explore", True, "sample from the head; false: its deterministic action", EPISODE),
    Parameter(
        "pin_version",
        -1,
        "only this version acts, 0: the base, whatever the learner announces; -1: what it announces",
        EPISODE,
        (-1, 2**31 - 1),
    ),
    Parameter("weights_url", "", "http(s) address of the learner's endpoint; empty: what the notice says", CONFIGURE),
    Parameter("token_file", "", "file with the bearer token of that endpoint, mode 0600", CONFIGURE),
    Parameter("record", True, "record episodes", EPISODE),
    Parameter("store", "", "episode store; empty: store in run_dir", CONFIGURE),
    Parameter("wal_flush_s", 0.5, "at most this much of a running episode is lost when the power goes", CONFIGURE, (0.05, 5.0)),
    Parameter("episode_mode", "manual", "who starts episodes", EPISODE, choices=("manual", "auto")),
    Parameter("reset_service", "", "Trigger service called between episodes in auto mode", EPISODE),
    Parameter("max_episode_s", 60.0, "an episode is truncated after this long", EPISODE, (1.0, 3600.0)),
    Parameter("end_on_reward", (), "reward sources whose terminal event ends the episode", EPISODE),
    Parameter("operator_timeout_s", 0.10, "an operator message older than this is a released one", CONFIGURE, (0.05, 0.15)),
    Parameter("handback_blend_s", 0.4, "time over which control returns to the policy", RUN_TIME, (0.0, 2.0)),
    Parameter("seed", 0, "keys the policy's randomness together with the episode's number", EPISODE, (0, 2**31 - 1)),
    Parameter("rosetta_compat", False, "also publish hil_intervention (std_msgs/Int8)", FIXED),
    Parameter(
        "rt_priority",
        10,
        "SCHED_FIFO priority to ask for, for the play-out alone with inference in a thread; 0: none",
        FIXED,
        (0, 49),
    ),
)

GUARD_PARAMETERS = (
    Parameter("robot", "", "name in configs/robots/ or path; must hash equal to policy_node's", FIXED, required=True),
    Parameter("tick_hz", 100.0, "rate of watchdogs, holds and ramps", FIXED, (50.0, 500.0)),
    Parameter("command_timeout_s", 0.0, "silence that means hold; 0: clip(3 / command_hz, 0.030, 0.075)", FIXED, (0.0, 0.2)),
    Parameter("operator_timeout_s", 0.10, "an operator message older than this is a released one", FIXED, (0.05, 0.15)),
    Parameter("state_timeout_s", 0.10, "measured state older than this means hold", FIXED, (0.02, 0.5)),
    Parameter("hold_to_stop_s", 2.0, "a hold longer than this disarms", RUN_TIME, (0.2, 30.0)),
    Parameter("speed_scale", 1.0, "multiplies velocity, acceleration and jerk limits", RUN_TIME, (0.05, 1.0)),
    Parameter("require_operator", False, "the policy moves only while a dead-man switch is held", FIXED),
    Parameter("direct_operator", True, "let the operator through when the policy is silent", FIXED),
    Parameter("rearm", "manual", "auto re-arms after a restart (simulation)", FIXED, choices=("manual", "auto")),
    Parameter(
        "state_file", "", "where armed state and e-stop survive a restart; empty: below the user's runtime folder", FIXED
    ),
    Parameter("rt_priority", 20, "SCHED_FIFO priority to ask for; 0: none", FIXED, (0, 49)),
    Parameter(
        "keep_awake",
        True,
        "armed and with real-time priority: no processor sleeps (/dev/cpu_dma_latency); costs power",
        RUN_TIME,
    ),
)

SIM_PARAMETERS = (
    Parameter("env", "", "simulated task, e.g. tabletop/Lift", FIXED, required=True),
    Parameter("robot", "", "name in configs/robots/ or path", FIXED, required=True),
    Parameter("seed", 0, "of the next reset; counts up by one at each", RUN_TIME, (0, 2**31 - 1)),
    Parameter("realtime_factor", 1.0, "simulated seconds a second; 0: as fast as possible", FIXED, (0.0, 100.0)),
    Parameter(
        "state_hz", 50.0, "joint states and tool poses a second; one with each control step in any case", FIXED, (20.0, 1000.0)
    ),
    Parameter("headless", True, "no window", FIXED),
    Parameter("images", "raw", "what cameras publish", FIXED, choices=("raw", "jpeg", "both", "off")),
    Parameter("image_hz", 30.0, "camera rate", FIXED, (1.0, 120.0)),
    Parameter("publish_clock", True, "publish /clock", FIXED),
    Parameter(
        "controller_timeout_s", 0.0, "silence after which controllers stop; 0: they keep the last command", FIXED, (0.0, 2.0)
    ),
    Parameter("lockstep", False, "with realtime_factor 0: physics waits for each command", FIXED),
    Parameter("command_latency_s", 0.0, "delay of every command", RUN_TIME, (0.0, 0.2)),
    Parameter("fault", "", "a fault to play, several with commas: stop:joint_states, stale:tool_pose, freeze:front", RUN_TIME),
)


def check_overrides(table: tuple[Parameter, ...], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(value of every parameter, findings): unknown names with the nearest known one, wrong types, values out of range."""
    known = {p.name: p for p in table}
    values: dict[str, Any] = {p.name: p.default for p in table}
    findings: list[str] = []
    for name, value in overrides.items():
        if name == "use_sim_time" or name.startswith("qos_overrides."):
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            findings.append(f"{name}: no such parameter; {hint}")
            continue
        checked, wrong = known[name].check(value)
        if wrong:
            findings.append(wrong)
        else:
            values[name] = checked
    return values, findings


def accept_all(changes: Mapping[str, Any]) -> str:
    """No reason to refuse anything."""
    return ""


class Parameters:
    """The declared parameters of one node: ``p["control_hz"]``, changes checked, ``findings`` for configure to refuse.

    Args:
        lifecycle: ``C`` parameters are settable while ``unconfigured`` is true; on plain nodes they are read only.

    Attributes:
        refuse: says why changes, each right by itself, cannot be made to what is configured; nothing where they can.
    """

    def __init__(self, node: Node, table: tuple[Parameter, ...], *, lifecycle: bool = False) -> None:
        from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

        self._table = {p.name: p for p in table}
        self._lifecycle = lifecycle
        self.unconfigured = True
        self.refuse: Callable[[Mapping[str, Any]], str] = accept_all
        overrides = {name: p.value for name, p in node._parameter_overrides.items()}
        self._values, self.findings = check_overrides(table, overrides)
        for p in table:
            descriptor = ParameterDescriptor(
                name=p.name, description=p.description, read_only=self._read_only(p),
                additional_constraints=f"accepted: {p.accepted}; takes effect: {WHEN[p.when]}",
            )  # fmt: skip
            if p.range is not None and type(p.default) is float:
                descriptor.floating_point_range = [FloatingPointRange(from_value=p.range[0], to_value=p.range[1], step=0.0)]
            elif p.range is not None:
                descriptor.integer_range = [IntegerRange(from_value=int(p.range[0]), to_value=int(p.range[1]), step=1)]
            value = self._values[p.name]
            node.declare_parameter(p.name, self._ros(value), descriptor, ignore_override=True)
        node.add_on_set_parameters_callback(self._on_set)

    def _read_only(self, p: Parameter) -> bool:
        return p.when == FIXED or (p.when == CONFIGURE and not self._lifecycle)

    @staticmethod
    def _ros(value: Any) -> Any:
        if isinstance(value, tuple):
            return list(value) if value else [""]  # an empty list has no type in ROS; "" is left out when read
        return value

    def _on_set(self, changes: list[Any]) -> Any:
        from rcl_interfaces.msg import SetParametersResult

        accepted: dict[str, Any] = {}
        for change in changes:
            p = self._table.get(change.name)
            if p is None:
                continue
            if p.when == CONFIGURE and not self.unconfigured:
                reason = f"{p.name} is read in configure: set it while the node is unconfigured"
                return SetParametersResult(successful=False, reason=reason)
            value, wrong = p.check(change.value)
            if wrong:
                return SetParametersResult(successful=False, reason=wrong)
            accepted[p.name] = value
        if reason := self.refuse(accepted):
            return SetParametersResult(successful=False, reason=reason)
        self._values = {**self._values, **accepted}  # one reference: readers in other threads see all of a change or none
        for name in accepted:
            self.findings = [f for f in self.findings if not f.startswith(f"{name}=")]
        return SetParametersResult(successful=True)

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        return tuple(v for v in value if v) if isinstance(value, tuple) else value

    def snapshot(self) -> dict[str, Any]:
        """Every value, as one consistent set."""
        return {name: self[name] for name in self._values}

    def check(self) -> None:
        """Raises ParameterError with everything that is wrong, required ones that are missing included."""
        missing = [f"{p.name} is empty: {p.description}" for p in self._table.values() if p.required and not self[p.name]]
        if self.findings or missing:
            raise ParameterError([*self.findings, *missing])
