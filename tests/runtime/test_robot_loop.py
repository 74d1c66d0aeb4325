"""Actions out, channel vectors in between, and a record of what was really executed."""

from __future__ import annotations

import numpy as np
import pytest

from robot_rl.robots.description import load_robot
from robot_rl.runtime.robot_loop import RobotLoop, bounded_action
from robot_rl.types import ActionSpec, Decision, SafetyFlag, Source, Step

POSE = np.array([0.05, 0.0, 0.15, 0.0, 0.0, 0.0, 1.0])
MEASURED = {"arm": POSE, "gripper": np.array([0.05])}
SEEN = {"observation.state": np.zeros(18, np.float32)}
MS = 1_000_000


class Record:
    def __init__(self) -> None:
        self.steps: list[Step] = []

    def append(self, step: Step) -> None:
        self.steps.append(step)

    def decide(self, decision: Decision) -> int:
        return 0

    def commit(self, *args, **kwargs):
        return None

    def abort(self) -> None: ...


def action() -> ActionSpec:
    from robot_rl.sim.tabletop.core import ACTION

    return ACTION


def begun(chunk: np.ndarray, robot: str = "sim_arm") -> tuple[RobotLoop, Record]:
    loop, record = RobotLoop(load_robot(robot), action(), n_action_steps=8), Record()
    loop.begin(SEEN, MEASURED, key=("t",), recorder=record, now_ns=0, stamp_ns=0)  # type: ignore[arg-type]
    loop.loop.accept(Decision(0, None, chunk, chunk))
    return loop, record


CHUNK = np.tile(np.array([0.01, 0.0, -0.005, 0.1, 0.05], np.float32), (8, 1))


def test_deltas_add_up_from_what_was_executed():
    loop, record = begun(CHUNK)
    for k in range(4):
        loop.step(k * 50 * MS, MEASURED)
        sent = loop.vectors(0, k + 1)
        loop.on_executed("arm", sent["arm"], k + 1, 0)
        loop.on_executed("gripper", sent["gripper"], k + 1, 0)
        loop.close_step(SEEN, 0.0, False, False, k + 1)
    assert sent["arm"][:3] == pytest.approx(POSE[:3] + 4 * np.array([0.01, 0.0, -0.005]), abs=1e-7)
    loop.loop.finish()
    assert [s.action.tolist() for s in record.steps] == [CHUNK[0].tolist()] * 4  # what was meant was done: recorded bit for bit
    assert loop.changed == 0


@pytest.mark.parametrize(("control", "command"), [(20.0, 50.0), (15.0, 50.0), (10.0, 100.0), (20.0, 20.0)])
def test_the_control_rate_holds_where_the_command_rate_is_no_multiple_of_it(control: float, command: float):
    robot = load_robot("sim_arm").with_rates(control, command)
    loop = RobotLoop(robot, action(), n_action_steps=8)
    loop.begin(SEEN, MEASURED, key=("t",), recorder=None, now_ns=0, stamp_ns=0)
    commands = 0
    for k in range(round(10 * control)):  # ten seconds
        loop.step(round(k * 1000 / control) * MS, MEASURED)
        assert loop.per_step in (int(command / control), int(command / control) + 1)
        commands += loop.per_step
        loop.close_step(SEEN, 0.0, False, False, k + 1)
    assert commands == round(10 * command)


def test_a_guard_that_trims_is_what_is_recorded_and_what_the_next_delta_starts_from():
    loop, record = begun(CHUNK)
    loop.step(0, MEASURED)
    sent = loop.vectors(0, 1)
    trimmed = sent["arm"].copy()
    trimmed[:3] = POSE[:3] + 0.5 * (sent["arm"][:3] - POSE[:3])
    loop.on_executed("arm", trimmed, 1, 0)
    loop.on_executed("gripper", sent["gripper"], 1, 0)
    loop.close_step(SEEN, 0.0, False, False, 1)
    loop.step(50 * MS, MEASURED)
    assert record.steps[0].action[:3] == pytest.approx([0.005, 0.0, -0.0025], abs=1e-6)
    assert record.steps[0].action_policy is not None
    assert record.steps[0].action_policy[0] == pytest.approx(0.01)
    assert loop.vectors(0, 2)["arm"][0] == pytest.approx(trimmed[0] + 0.01)


def test_a_guard_that_holds_is_recorded_as_safety():
    loop, record = begun(CHUNK)
    loop.guard_holding = True
    loop.step(0, MEASURED)
    loop.vectors(0, 1)
    loop.on_executed("arm", POSE, 0, 0)
    loop.on_executed("gripper", MEASURED["gripper"], 0, 0)
    loop.close_step(SEEN, 0.0, False, False, 1)
    loop.loop.finish()
    assert record.steps[0].source is Source.SAFETY
    assert record.steps[0].action[:4] == pytest.approx(np.zeros(4), abs=1e-9)


def test_stale_observations_hold_the_robot():
    loop, record = begun(CHUNK)
    loop.step(0, MEASURED, SafetyFlag.STALE_OBSERVATION)
    assert np.array_equal(loop.vectors(0, 1)["arm"], POSE)
    loop.close_step(SEEN, 0.0, False, False, 1)
    loop.loop.finish()
    assert record.steps[0].source is Source.SAFETY
    assert record.steps[0].safety & SafetyFlag.STALE_OBSERVATION


def test_commands_between_two_rows_are_interpolated():
    robot = load_robot("sim_arm_joints")
    low = tuple(robot.limits.joints[j].position[0] for c in robot.commands for j in c.names)
    high = tuple(robot.limits.joints[j].position[1] for c in robot.commands for j in c.names)
    loop = RobotLoop(robot, ActionSpec(low, high), n_action_steps=8)
    start = np.array([0.0, 0, 0, 0.5, 0, 0, 0, 0.05])
    measured = {"arm": start[:7], "gripper": start[7:]}
    seen = {"observation.state": start.astype(np.float32)}
    loop.begin(seen, measured, key=("t",), recorder=None, now_ns=0, stamp_ns=0)
    chunk = np.tile(start + np.array([0.005, 0, 0, 0, 0, 0, 0, 0.0]), (8, 1)).astype(np.float32)
    loop.loop.accept(Decision(0, None, chunk, chunk))
    loop.step(0, measured)
    assert loop.command is not None
    target = float(loop.command[0])
    assert 0 < target <= 0.005 + 1e-9
    parts = [float(loop.vectors(k, k + 1)["arm"][0]) for k in range(5)]
    assert parts == pytest.approx([target * (k + 1) / 5 for k in range(5)], abs=1e-9)


def test_a_policy_that_leaves_no_room_is_refused():
    robot = load_robot("sim_arm_joints")
    far = ActionSpec((3.0,) * 8, (4.0,) * 8)
    with pytest.raises(ValueError, match="nothing in common"):
        bounded_action(robot, far)
