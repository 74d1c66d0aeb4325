"""The guard as a state machine: what it lets through, what it holds, when it stops, and how it comes back."""

from __future__ import annotations

import numpy as np
import pytest

from robot_rl.robots.description import RobotDescription, load_robot
from robot_rl.runtime.guard import Guard, GuardConfig, S, Sent

MS = 1_000_000
PERIOD = 20 * MS  # sim_arm_joints: 50 commands a second


class Rig:
    """A guard with a robot that follows its commands, and a clock."""

    def __init__(self, robot: RobotDescription | None = None, **config) -> None:
        self.robot = robot or load_robot("sim_arm_joints")
        self.now = 10 * S
        self.guard = Guard(self.robot, GuardConfig(**config), self.now)
        self.joints = {
            j: 0.3 if j == "joint4" else 0.05 if j == "gripper_width" else 0.0 for c in self.robot.commands for j in c.names
        }
        self.heartbeat = "policy"
        self.sent: list[Sent] = []
        self.alive = True

    def pass_time(self, ns: int, *, state: bool = True) -> list[Sent]:
        """Ticks at 100 Hz with fresh state and heartbeats; what was sent meanwhile."""
        out = []
        end = self.now + ns
        while self.now < end:
            self.now += 10 * MS
            if state:
                self.guard.on_joint_states(self.joints, self.now)
            if self.alive:
                out += self.guard.on_heartbeat(self.heartbeat, self.now)
            out += self._follow(self.guard.tick(self.now))
        return out

    def command(self, shift: float = 0.0, **joints: float) -> list[Sent]:
        """One tick of the policy: every joint where it is, plus ``shift`` on joint1, or as given."""
        wanted = self.joints | {"joint1": self.joints["joint1"] + shift} | joints
        self.now += 1
        self.guard.on_joint_states(self.joints, self.now)
        out = []
        for c in self.robot.commands:
            vector = np.array([wanted[j] for j in c.names])
            out += self.guard.on_command("policy", c.channel, vector, self.now, self.now)
        return self._follow(out)

    def _follow(self, out: list[Sent]) -> list[Sent]:
        names = {c.channel: c.names for c in self.robot.commands}
        for s in out:
            self.joints |= dict(zip(names[s.channel], s.vector.tolist(), strict=True))
        return out

    def armed(self) -> Rig:
        self.pass_time(20 * MS)
        ok, text = self.guard.arm(self.now)
        assert ok, text
        return self

    def moving(self, steps: int = 20) -> Rig:
        self.armed()
        for _ in range(steps):
            self.command(0.0005)
            self.pass_time(PERIOD)
        assert self.guard.level in ("ok", "clamp")
        return self


def positions(out: list[Sent], channel: str = "arm") -> list[np.ndarray]:
    return [s.vector for s in out if s.channel == channel]


def test_nothing_passes_before_it_is_armed():
    rig = Rig()
    rig.pass_time(20 * MS)
    assert rig.command() == []
    assert rig.guard.counters["disarmed"] > 0


def test_arming_names_what_is_missing():
    rig = Rig()
    ok, text = rig.guard.arm(rig.now, ["arm/commands has 2 publishers"])
    assert not ok
    assert "2 publishers" in text
    assert "joint_states" in text
    rig.joints["joint1"] = 2.9
    rig.pass_time(20 * MS)
    ok, text = rig.guard.arm(rig.now)
    assert not ok
    assert "joint1 is at 2.900, outside its limits" in text


def test_commands_inside_the_limits_pass_bit_for_bit():
    rig = Rig().moving()
    before = rig.joints["joint1"]
    out = rig.command(0.0005)
    assert positions(out)[0][0] == before + 0.0005
    assert [s.stamp_ns for s in out] == [rig.now, rig.now]


def test_a_start_that_would_jump_is_refused_and_says_how_to_go_on():
    rig = Rig().armed()
    assert rig.command(0.2) == []
    assert rig.guard.level == "hold"
    assert rig.guard.rule == "start_jump"
    assert "joint1 is at 0.000, the first command is 0.200" in rig.guard.reason
    assert "go home, or re-plan" in rig.guard.reason
    assert rig.command(0.01)  # one that does not jump starts the motion


def test_silence_is_a_hold_within_100_ms_that_brakes_and_then_stays():
    rig = Rig().armed()
    for _ in range(30):
        rig.command(0.02)
        rig.pass_time(PERIOD)
    moving = rig.guard.filters["arm"].last.copy()
    began = rig.now
    rig.alive = False
    held = []
    while rig.guard.level != "hold":
        held += rig.pass_time(10 * MS)
    assert rig.now - began <= 100 * MS
    held += rig.pass_time(600 * MS)
    track = np.array([moving, *positions(held)])[:, 0]
    speed = np.diff(track) * 50
    limit = rig.robot.limits.joints["joint1"]
    assert np.all(np.abs(np.diff(speed)) * 50 <= limit.acceleration * 1.001)  # braked along the limits
    assert speed[-1] == 0.0
    assert track[-1] > track[0]
    assert rig.guard.rule == "watchdog"


def test_after_a_watchdog_hold_three_good_ticks_are_needed():
    rig = Rig().moving()
    rig.pass_time(200 * MS)
    assert rig.guard.rule == "watchdog"
    answers = []
    for _ in range(3):
        answers.append(any(s.stamp_ns is not None for s in rig.command(0.0002)))
        rig.pass_time(PERIOD)
    assert answers == [False, False, True]


def test_a_hold_that_lasts_stops_and_disarms_unless_the_policy_means_it():
    rig = Rig().moving()
    rig.heartbeat = "hold"
    rig.pass_time(4 * S)
    assert rig.guard.armed
    rig.alive = False
    rig.pass_time(4 * S)
    assert not rig.guard.armed
    assert rig.guard.level == "stop"
    assert rig.command(0.0) == []


def test_nan_stops_the_whole_tick_not_one_channel_of_it():
    rig = Rig().moving()
    before = dict(rig.joints)
    rig.command(gripper_width=float("nan"))
    assert rig.guard.rule == "finite"
    assert rig.joints["joint1"] == pytest.approx(before["joint1"], abs=0.002)
    assert not np.isnan(rig.joints["gripper_width"])


def test_a_huge_step_is_a_fault_and_a_large_one_is_trimmed():
    rig = Rig().moving()
    rig.command(0.02)  # 1 rad/s: more acceleration than allowed
    assert rig.guard.level == "clamp"
    before = rig.joints["joint1"]
    rig.command(0.5)
    assert rig.guard.level == "hold"
    assert rig.guard.rule == "step_jump"
    assert abs(rig.joints["joint1"] - before) < 0.03


def test_stamps_must_increase():
    rig = Rig().moving()
    vector = np.array([rig.joints[j] for j in rig.robot.commands[0].names])
    before = rig.guard.counters["stamp_order"]
    rig.guard.on_command("policy", "arm", vector, 5, rig.now)
    assert rig.guard.counters["stamp_order"] == before + 1
    assert rig.guard.level in ("ok", "clamp")
    for _ in range(5):
        rig.guard.on_command("policy", "arm", vector, 5, rig.now)
    assert rig.guard.rule == "stamp_order"
    assert rig.guard.level == "hold"


def test_old_state_is_a_hold_that_ends_by_itself():
    rig = Rig().moving()
    for _ in range(12):
        rig.now += 10 * MS
        rig.guard.on_heartbeat("policy", rig.now)
        rig.guard.tick(rig.now)
    assert rig.guard.rule in ("state", "watchdog")
    for _ in range(6):
        rig.command(0.0)
        rig.pass_time(PERIOD)
    assert rig.guard.level in ("ok", "clamp")


def test_an_arm_that_does_not_follow_is_stopped():
    rig = Rig()
    rig.armed()
    stuck = dict(rig.joints)
    target = dict(rig.joints)
    for _ in range(200):
        target["joint1"] += 0.01
        rig.joints = dict(stuck)
        wanted = dict(target)
        rig.now += 1
        rig.guard.on_joint_states(stuck, rig.now)
        for c in rig.robot.commands:
            rig.guard.on_command("policy", c.channel, np.array([wanted[j] for j in c.names]), rig.now, rig.now)
        rig.joints = dict(stuck)
        end = rig.now + PERIOD
        while rig.now < end:
            rig.now += 10 * MS
            rig.guard.on_joint_states(stuck, rig.now)
            rig.guard.on_heartbeat("policy", rig.now)
            rig.guard.tick(rig.now)
        if not rig.guard.armed:
            break
    assert rig.guard.rule == "tracking"
    assert "joint1 lags" in rig.guard.reason


def test_an_estop_latches_and_is_cleared_only_when_all_is_quiet():
    rig = Rig().moving()
    rig.guard.on_estop(rig.now, "pressed")
    assert rig.command(0.0) == []
    ok, text = rig.guard.reset_estop(rig.now)
    assert not ok
    assert "less than 1 s ago" in text
    assert not rig.guard.arm(rig.now)[0]
    rig.now += 2 * S
    assert rig.guard.reset_estop(rig.now)[0]
    assert not rig.guard.armed
    restarted = Guard(rig.robot, GuardConfig(rearm="auto"), rig.now, estop=True)
    restarted.on_joint_states(rig.joints, rig.now)
    restarted.on_heartbeat("policy", rig.now)
    restarted.tick(rig.now)
    assert restarted.estopped
    assert not restarted.armed


def operator(rig: Rig, shift: float) -> list[Sent]:
    rig.now += 1
    rig.guard.on_joint_states(rig.joints, rig.now)
    names = rig.robot.commands[0].names
    vector = np.array([rig.joints[j] for j in names])
    vector[0] += shift
    return rig._follow(rig.guard.on_command("operator", "arm", vector, rig.now, rig.now))


def test_a_dead_policy_cannot_lock_the_person_out_and_two_never_mix():
    rig = Rig().moving()
    rig.guard.on_operator(True, True, rig.now)
    assert operator(rig, 0.001) == []  # the policy lives: its own arbiter decides
    rig.alive = False
    rig.pass_time(400 * MS)
    taken = []
    for _ in range(5):
        rig.guard.on_operator(True, True, rig.now)
        taken += operator(rig, 0.001)
        rig.pass_time(PERIOD)
    assert taken
    assert rig.guard.source == "operator_direct"
    rig.guard.on_operator(True, True, rig.now)
    assert not any(s.stamp_ns for s in rig.command(0.0))  # the policy is back, but the person has the robot
    rig.guard.on_operator(True, False, rig.now)
    rig.pass_time(20 * MS)
    assert rig.guard.rule == "operator"
    assert rig.guard.level == "hold"


def test_where_a_dead_man_switch_is_required_nothing_moves_without_it():
    rig = Rig(require_operator=True).armed()
    assert rig.command(0.0) == []
    assert rig.guard.rule == "operator_required"
    rig.guard.on_operator(True, True, rig.now)
    assert rig.command(0.001)


def test_while_idle_a_resting_robot_may_be_moved_by_others():
    rig = Rig().moving()
    rig.heartbeat = "idle"
    rig.pass_time(500 * MS)
    assert rig.pass_time(200 * MS) == []
    rig.joints["joint1"] = 1.0  # a homing routine, or a hand
    rig.pass_time(100 * MS)
    rig.heartbeat = "policy"
    out = rig.command(0.01)
    assert positions(out)[0][0] == pytest.approx(1.0, abs=0.011)


def pose_rig() -> tuple[Rig, np.ndarray]:
    rig = Rig(load_robot("sim_arm"))
    pose = np.array([0.0, 0.0, 0.15, 0.0, 0.0, 0.0, 1.0])
    rig.joints = {"gripper_width": 0.05}
    return rig, pose


def send_pose(rig: Rig, measured: np.ndarray, wanted: np.ndarray) -> list[Sent]:
    rig.now += 50 * MS
    rig.guard.on_joint_states(rig.joints, rig.now)
    rig.guard.on_tool_pose(measured, rig.now)
    rig.guard.on_heartbeat("policy", rig.now)
    out = rig.guard.on_command("policy", "arm", wanted, rig.now, rig.now)
    return out + rig.guard.on_command("policy", "gripper", np.array([0.05]), rig.now, rig.now)


def test_poses_stay_in_the_box_and_under_the_tools_speed():
    rig, pose = pose_rig()
    rig.guard.on_joint_states(rig.joints, rig.now)
    rig.guard.on_tool_pose(pose, rig.now)
    assert rig.guard.arm(rig.now)[0]
    at = pose
    for _ in range(20):
        wanted = at + np.array([0.03, 0, 0, 0, 0, 0, 0])
        out = positions(send_pose(rig, at, wanted))
        assert out
        step = float(np.linalg.norm(out[0][:3] - at[:3]))
        assert step <= 0.9 / 20 * 1.001
        at = out[0]
    assert at[0] == pytest.approx(0.20)
    assert rig.guard.counters["workspace"] > 0
    assert positions(send_pose(rig, at, at + np.array([-0.2, 0, 0, 0, 0, 0, 0]))) == [] or rig.guard.rule == "step_jump"
    assert rig.guard.level == "hold"


def test_a_quaternion_nobody_filled_in_is_not_a_pose():
    rig, pose = pose_rig()
    rig.guard.on_joint_states(rig.joints, rig.now)
    rig.guard.on_tool_pose(pose, rig.now)
    rig.guard.arm(rig.now)
    send_pose(rig, pose, pose)
    send_pose(rig, pose, np.zeros(7))
    assert rig.guard.level == "hold"
    assert rig.guard.rule == "finite"


def test_a_stamp_from_another_clock_costs_a_hold_and_not_the_session():
    rig = Rig().moving()
    vector = np.array([rig.joints[j] for j in rig.robot.commands[0].names])
    grip = np.array([rig.joints["gripper_width"]])
    far = rig.now + 1000 * S
    rig.guard.on_command("policy", "arm", vector, far, rig.now)
    rig.guard.on_command("policy", "gripper", grip, far, rig.now)
    rig.pass_time(100 * MS)
    assert rig.guard.level == "hold"
    passed = []
    for _ in range(40):
        passed += rig.command()
        rig.pass_time(PERIOD)
    assert rig.guard.level in ("ok", "clamp")
    assert passed


def test_a_malformed_command_does_not_set_the_order():
    rig = Rig().moving()
    rig.guard.on_command("policy", "arm", None, rig.now + 1000 * S, rig.now)
    assert positions(rig.command(0.0002))


def test_after_a_jump_of_the_clock_nothing_old_counts():
    rig = Rig().moving()
    late = rig.now
    rig.now = S  # /clock begins again
    rig.guard.lost_track("clock_jump", "the clock jumped", rig.now)
    assert rig.guard.level == "hold"
    assert rig.guard.rule == "clock_jump"
    assert not rig.guard.policy_alive(rig.now)
    assert rig.guard.measured("arm", rig.now) is None
    passed = []
    for _ in range(5):
        passed += rig.command(0.0002)
        rig.pass_time(PERIOD)
    assert rig.guard.level in ("ok", "clamp")
    assert all(s.stamp_ns is None or s.stamp_ns < late for s in passed)
    rig.alive = False
    rig.pass_time(100 * MS)
    assert rig.guard.rule == "watchdog", "silence counts from the new time on"


def test_only_joints_of_the_description_are_remembered():
    rig = Rig().armed()
    rig.guard.on_joint_states({f"j{i}": 0.0 for i in range(1000)}, rig.now)
    assert set(rig.guard.joints._last) == {n for c in rig.robot.commands for n in c.names}


def test_a_topic_that_repeats_a_joint_does_not_hide_that_its_driver_died():
    rig = Rig().armed()
    assert rig.guard.measured("arm", rig.now) is not None
    rig.now += 200 * MS
    rig.guard.on_joint_states(rig.joints, rig.now, rank=1)
    assert rig.guard.measured("arm", rig.now) is None
    rig.guard.on_joint_states(rig.joints, rig.now)
    assert rig.guard.measured("arm", rig.now) is not None


def test_it_does_not_arm_itself_against_the_start_checks():
    rig = Rig(rearm="auto")
    rig.guard.on_joint_states(rig.joints, rig.now)
    rig.guard.on_heartbeat("idle", rig.now)
    rig.guard.tick(rig.now, lambda: ["arm/commands has 2 publishers"])
    assert not rig.guard.armed
    rig.guard.tick(rig.now)
    assert rig.guard.armed
