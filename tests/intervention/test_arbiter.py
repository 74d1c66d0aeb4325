"""Who drives when: the state table, the rules about lost input, hand-back, alignment and stops, and a fuzz of all of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robot_rl.intervention.arbiter import ArbiterConfig, OperatorArbiter, Request
from robot_rl.intervention.arbitration import Arbitration, Situation
from robot_rl.intervention.devices import PROFILES, DeviceProfile, DeviceSample, profile
from robot_rl.intervention.states import TRANSITIONS, Event, State, next_state
from robot_rl.types import ActionSpec, Source

MS = 1_000_000
TICK = 20 * MS
RATE = ActionSpec(
    (-1.0,) * 3, (1.0,) * 3, mode=("delta", "delta", "absolute"), kind=("continuous",) * 2 + ("gripper_continuous",)
)
ARM = ActionSpec((-3.0,) * 3, (3.0,) * 3, kind=("continuous",) * 2 + ("gripper_continuous",))
POLICY = np.array([0.5, -0.5, 1.0], np.float32)
HAND = np.array([-0.2, 0.3, 0.0], np.float32)


class Robot:
    """Ticks an arbiter and executes what it says."""

    def __init__(self, action: ActionSpec = RATE, config: ArbiterConfig | None = None, **options) -> None:
        self.arbiter = OperatorArbiter(action, config, **options)
        self.action, self.now, self.step = action, 1_000 * MS, 0
        self.last = np.zeros(action.dim, np.float32)
        self.log: list[Arbitration] = []

    def sample(self, engaged=True, deadman=True, action=HAND, neutral=False, device="joy", **changes) -> None:
        given = profile(device) if "profile" not in changes else changes.pop("profile")
        self.arbiter.offer(DeviceSample(self.now, self.now, device, given, engaged, deadman, action, neutral, **changes))

    def release(self, **changes) -> None:
        self.sample(engaged=False, deadman=False, action=None, neutral=True, **changes)

    def tick(self, wish=POLICY, fresh=True, observation=None) -> Arbitration:
        rest = np.where(self.action.delta_mask, 0.0, self.last).astype(np.float32)
        choice = self.arbiter.arbitrate(self.now, wish if fresh else rest, observation or {}, Situation(self.step, fresh, rest))
        self.last = np.asarray(choice.command, np.float32)
        self.log.append(choice)
        self.now += TICK
        self.step += 1
        return choice

    def take_over(self) -> Arbitration:
        self.sample()
        return self.tick()

    @property
    def state(self) -> State:
        return self.arbiter.state


# ---- the table


def test_the_table_is_the_specification():
    rows = {
        State.AUTONOMOUS: {Event.ENGAGE: State.HUMAN, Event.ENGAGE_ABSOLUTE: State.REQUESTED, Event.HELP: State.REQUESTED},
        State.REQUESTED: {
            Event.ENGAGE: State.HUMAN, Event.ALIGNED: State.HUMAN, Event.CANCEL: State.AUTONOMOUS,
            Event.CANCEL_HELD: State.HANDBACK,
        },
        State.HUMAN: {Event.RELEASED: State.HANDBACK},
        State.HANDBACK: {Event.ENGAGE: State.HUMAN, Event.BLENDED: State.AUTONOMOUS},
        State.ESTOP: {Event.RESET: State.REQUESTED},
    }  # fmt: skip
    for state, event in itertools.product(State, Event):
        wanted = State.ESTOP if event is Event.ESTOP else rows[state].get(event)
        assert next_state(state, event) is wanted, (state, event)
    assert (State.ESTOP, Event.BLENDED) not in TRANSITIONS


def test_what_is_not_in_the_table_is_ignored_and_counted():
    robot = Robot()
    robot.arbiter.post(Request.RESET)
    robot.arbiter.post(Request.CANCEL)
    assert robot.tick().source is Source.POLICY
    assert robot.arbiter.counts.ignored_events == {"autonomous:reset": 1, "autonomous:cancel": 1}


# ---- a take-over with a rate device


def test_a_take_over_and_what_is_said_about_it():
    robot = Robot()
    assert robot.tick().source is Source.POLICY
    taken = robot.take_over()
    assert (taken.source, taken.intervention_id, taken.drop_chunk) == (Source.HUMAN, 0, True)
    np.testing.assert_array_equal(taken.command, HAND)
    np.testing.assert_array_equal(taken.human, HAND)
    assert taken.operator_stamp_ns == robot.now - TICK
    robot.sample(action=2 * HAND)
    assert not robot.tick().drop_chunk
    robot.release()
    back = robot.tick()
    assert (back.source, back.drop_chunk, back.human, back.intervention_id) == (Source.BLEND, True, None, -1)
    report = robot.arbiter.report()["interventions"]
    assert [(i["id"], i["device"], i["first_step"], i["last_step"], i["end"]) for i in report] == [(0, "joy", 1, 3, "released")]


def test_the_person_drives_only_while_the_button_is_held():
    robot = Robot()
    robot.sample(deadman=False)
    assert robot.tick().source is Source.POLICY
    robot.take_over()
    robot.sample(engaged=True, deadman=False)
    robot.tick()
    assert robot.state is State.HANDBACK


@pytest.mark.parametrize(
    ("stale_s", "silence", "held"), [(0.10, 100, False), (0.10, 101, True), (0.15, 150, False), (0.15, 151, True)]
)
def test_lost_input_holds_at_the_first_tick_after_the_limit(stale_s, silence, held):
    robot = Robot()
    robot.sample(profile=DeviceProfile(stale_s=stale_s))
    robot.tick()
    robot.now += silence * MS - TICK
    choice = robot.tick()
    assert (choice.source is Source.HOLD) is held
    if held:
        np.testing.assert_array_equal(choice.command[:2], 0.0)  # never the last command again
        assert choice.operator_stamp_ns is None


def test_after_a_loss_nothing_goes_on_by_itself():
    robot = Robot()
    robot.take_over()
    robot.now += 200 * MS
    for _ in range(600):
        assert robot.tick().source is Source.HOLD  # for ever, the policy is not resumed
    robot.sample()
    assert robot.tick().source is Source.HOLD, "the button was not let go in between"
    robot.release()
    assert robot.tick().source is Source.HOLD
    robot.sample()
    choice = robot.tick()
    assert (choice.source, choice.intervention_id) == (Source.HUMAN, 1)
    assert robot.arbiter.counts.lost == 1


def test_a_lost_take_over_ends_by_cancel_or_where_asked_for_by_release():
    robot = Robot()
    robot.take_over()
    robot.now += 200 * MS
    robot.tick()
    robot.arbiter.post(Request.CANCEL)
    robot.tick()
    assert robot.state is State.HANDBACK
    robot = Robot(config=ArbiterConfig(auto_resume=True))
    robot.take_over()
    robot.now += 200 * MS
    robot.tick()
    robot.release()
    robot.tick()
    assert robot.state is State.HANDBACK


def test_a_latch_holds_without_a_new_take_over():
    robot = Robot()
    mouse = {"device": "spacemouse", "deadman": False}
    robot.sample(**mouse)
    assert robot.tick().source is Source.HUMAN
    for _ in range(10):
        robot.sample(engaged=False, action=None, neutral=True, **mouse)
        choice = robot.tick()
        assert (choice.source, choice.intervention_id, choice.human) == (Source.LATCHED, 0, None)
        np.testing.assert_array_equal(choice.command[:2], 0.0)
    robot.sample(**mouse)
    assert robot.tick().intervention_id == 0
    robot.now += 480 * MS
    robot.sample(engaged=False, action=None, neutral=True, **mouse)
    robot.tick()
    assert robot.state is State.HANDBACK


def test_input_that_cannot_be_used_holds():
    robot = Robot()
    robot.take_over()
    for action in (None, np.array([np.nan, 0, 0])):
        robot.sample(action=action)
        assert robot.tick().source is Source.HOLD
    assert robot.arbiter.counts.invalid == 2
    with pytest.raises(ValueError, match=r"joy: action has shape \(2,\), accepted is \(3,\)"):
        robot.sample(action=np.zeros(2))


# ---- absolute devices


def leader(robot: Robot, action, engaged=True) -> None:
    robot.sample(device="leader", deadman=False, engaged=engaged, action=np.asarray(action, np.float32))


def test_an_absolute_device_takes_over_only_where_the_robot_is():
    here = np.array([1.0, 0.0, 0.0], np.float32)
    robot = Robot(ARM, position=lambda _: here)
    robot.last = here
    leader(robot, [1.3, 0.0, 9.0])  # the gripper needs no alignment
    choice = robot.tick()
    assert (robot.state, choice.source, choice.drop_chunk) == (State.REQUESTED, Source.HOLD, False)
    np.testing.assert_array_equal(choice.command, here)
    assert robot.arbiter.gap == pytest.approx(0.3, abs=1e-6)
    leader(robot, [1.14, 0.0, 9.0])
    choice = robot.tick()
    assert (robot.state, choice.source) == (State.HUMAN, Source.HUMAN)
    np.testing.assert_allclose(choice.command, [1.14, 0.0, 9.0])


def test_alignment_can_be_given_up_at_any_tick_and_ends_by_itself():
    for give_up in ("cancel", "release", "time"):
        robot = Robot(ARM, position=lambda _: np.zeros(3, np.float32))
        leader(robot, [1.0, 0.0, 0.0])
        robot.tick()
        assert robot.state is State.REQUESTED
        for _ in range(5):
            leader(robot, [1.0, 0.0, 0.0])
            robot.tick()
        if give_up == "cancel":
            robot.arbiter.post(Request.CANCEL)
        elif give_up == "release":
            leader(robot, [1.0, 0.0, 0.0], engaged=False)
            robot.tick()
            robot.arbiter.post(Request.CANCEL)
        else:
            robot.now += 11_000 * MS
        robot.tick()
        assert robot.state is State.HANDBACK, give_up
        leader(robot, [1.0, 0.0, 0.0])
        robot.tick()
        assert robot.state is not State.HUMAN


def test_a_clutch_takes_over_from_where_the_robot_is():
    robot = Robot(ARM)
    robot.last = np.array([1.0, 2.0, 0.0], np.float32)
    clutch = replace(PROFILES["leader"], clutch=True)
    robot.sample(profile=clutch, action=np.array([-2.0, 0.0, 1.0], np.float32))
    np.testing.assert_allclose(robot.tick().command, [1.0, 2.0, 1.0])
    robot.sample(profile=clutch, action=np.array([-1.9, 0.0, 1.0], np.float32))
    np.testing.assert_allclose(robot.tick().command, [1.1, 2.0, 1.0], rtol=1e-6)


# ---- requests for help


@pytest.mark.parametrize("hold", [False, True])
def test_a_request_for_help(hold):
    robot = Robot(config=ArbiterConfig(hold_on_request=hold))
    robot.arbiter.post(Request.HELP)
    assert robot.tick().source is (Source.HOLD if hold else Source.POLICY)
    assert robot.state is State.REQUESTED
    robot.now += 10_000 * MS
    robot.tick()
    assert robot.state is (State.HANDBACK if hold else State.AUTONOMOUS)
    robot.arbiter.begin()
    robot.arbiter.post(Request.HELP)
    robot.tick()
    robot.sample()
    assert robot.tick().source is Source.HUMAN


# ---- handing back


def hand_back(robot: Robot) -> Arbitration:
    robot.release()
    return robot.tick()


def test_the_old_chunk_never_runs_and_without_a_fresh_one_the_robot_rests():
    robot = Robot()
    robot.take_over()
    old = np.array([0.9, 0.9, 0.0], np.float32)
    robot.release()
    first = robot.tick(wish=old)  # the old chunk still covers this tick
    np.testing.assert_allclose(first.command[:2], HAND[:2], atol=1e-6)
    for _ in range(19):
        assert robot.tick(fresh=False).source is Source.BLEND
    for _ in range(50):
        choice = robot.tick(fresh=False)
        assert choice.source is Source.HOLD
        np.testing.assert_array_equal(choice.command[:2], 0.0)
    sources = [robot.tick().source for _ in range(22)]
    assert sources == [Source.BLEND] * 20 + [Source.POLICY] * 2


def test_hand_back_of_an_absolute_device_starts_from_the_measured_position():
    where = np.array([0.25, 0.0, 0.0], np.float32)
    robot = Robot(ARM, position=lambda _: where)
    robot.last = where
    leader(robot, [0.3, 0.1, 0.7])
    robot.tick()
    robot.arbiter.post(Request.RELEASE)
    leader(robot, [0.3, 0.1, 0.7])
    choice = robot.tick(fresh=False)
    np.testing.assert_allclose(choice.command[:2], where[:2], atol=1e-6)
    assert choice.command[2] == pytest.approx(0.7), "the gripper stays as the person left it"
    assert robot.arbiter.state is State.HANDBACK
    leader(robot, [0.3, 0.1, 0.7])
    robot.tick()
    assert robot.state is State.HANDBACK, "a device that was never let go does not take over again"


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=2), st.lists(st.floats(-1, 1), min_size=2, max_size=2),
    st.integers(0, 25), st.floats(0.3, 2.0),
)  # fmt: skip
def test_hand_back_is_smooth_and_tagged(human, policy, late, limit):
    """Position commands: no step above the limit, the gripper switches at the end, `blend` and `hold` on exactly those ticks."""
    robot = Robot(ARM, ArbiterConfig(blend_velocity=(limit,) * 3))
    start = np.array([*human, 0.0], np.float32)
    robot.last = start
    leader(robot, start)
    robot.tick()
    wish = np.array([*policy, 1.0], np.float32)
    leader(robot, start, engaged=False)
    robot.now += 500 * MS
    leader(robot, start, engaged=False)
    previous, began = start, len(robot.log)
    for i in range(300):
        choice = robot.tick(wish=wish, fresh=i > late)
        step = np.abs(choice.command - previous)[:2]
        assert step.max() <= limit * TICK / 1e9 + 1e-5
        if choice.source is Source.POLICY:
            break
        assert choice.command[2] in (0.0, 1.0)
        previous = choice.command
    assert robot.state is State.AUTONOMOUS
    during = [c.source for c in robot.log[began:-1]]
    assert set(during) <= {Source.BLEND, Source.HOLD}
    assert during[0] is Source.BLEND


# ---- stops


@pytest.mark.parametrize("state", list(State))
def test_a_stop_from_every_state_takes_one_tick(state):
    robot = Robot(ARM if state is State.REQUESTED else RATE)
    if state in (State.HUMAN, State.HANDBACK):
        robot.take_over()
    if state is State.HANDBACK:
        hand_back(robot)
    if state is State.REQUESTED:
        robot.arbiter.post(Request.HELP)
        robot.tick()
    if state is State.ESTOP:
        robot.arbiter.post(Request.ESTOP)
        robot.tick()
    assert robot.state is state
    robot.sample()
    robot.arbiter.post(Request.ESTOP)
    choice = robot.tick()
    assert (robot.state, choice.source, robot.arbiter.end_requested) == (State.ESTOP, Source.HOLD, "estop")
    robot.arbiter.begin()
    assert robot.state is State.ESTOP, "a new episode does not clear it"
    assert robot.arbiter.end_requested == "estop"


def test_a_reset_needs_a_second_and_hands_off():
    robot = Robot()
    robot.release()
    robot.arbiter.post(Request.ESTOP)
    robot.tick()
    robot.arbiter.post(Request.RESET)
    robot.tick()
    assert robot.state is State.ESTOP
    robot.now += 1_100 * MS
    robot.sample()
    robot.arbiter.post(Request.RESET)
    robot.tick()
    assert robot.state is State.ESTOP
    robot.arbiter.post(Request.RESET)
    robot.now += 500 * MS  # the device is silent: nobody knows that it is neutral
    robot.tick()
    assert robot.state is State.ESTOP
    robot.release()
    robot.arbiter.post(Request.RESET)
    assert robot.tick().source is Source.HOLD
    assert robot.state is State.REQUESTED
    robot.now += 3_600_000 * MS
    assert robot.tick().source is Source.HOLD, "nobody asked to go on"
    robot.arbiter.post(Request.CANCEL)
    robot.tick()
    assert robot.state is State.HANDBACK


# ---- everything at once

ACTIONS = st.one_of(
    st.tuples(st.just("sample"), st.booleans(), st.booleans(), st.sampled_from(["joy", "spacemouse", "leader"])),
    st.tuples(st.just("post"), st.sampled_from(list(Request))),
    st.tuples(st.just("wait"), st.integers(1, 60)),
    st.tuples(st.just("tick"), st.booleans()),
    st.tuples(st.just("begin")),
)


@given(st.lists(ACTIONS, min_size=20, max_size=120))
def test_no_sequence_of_events_lets_the_wrong_one_drive(script):
    robot = Robot(ARM, position=lambda _: np.zeros(3, np.float32))
    newest = None
    was_reset = True
    for what, *rest in script:
        if what == "sample":
            engaged, deadman, device = rest
            action = np.full(3, 0.05, np.float32)
            robot.sample(engaged, deadman, action, neutral=not engaged, device=device)
            newest = robot.now, engaged
        elif what == "post":
            robot.arbiter.post(rest[0])
        elif what == "wait":
            robot.now += rest[0] * 10 * MS
        elif what == "begin":
            robot.arbiter.begin()
        else:
            before = robot.state
            now = robot.now
            choice = robot.tick(fresh=rest[0])
            if robot.state in (State.HUMAN, State.ESTOP):
                assert choice.source in (Source.HUMAN, Source.LATCHED, Source.HOLD)
            if choice.source is Source.HUMAN:
                assert newest is not None
                assert newest[1]
                assert now - newest[0] <= 100 * MS
                assert robot.state is State.HUMAN
                assert choice.intervention_id >= 0
            if choice.source is Source.POLICY:
                assert robot.state in (State.AUTONOMOUS, State.REQUESTED)
            if before is State.ESTOP:
                assert robot.state is not State.AUTONOMOUS
                was_reset = robot.state is not State.ESTOP
            if robot.state is State.ESTOP:
                was_reset = False
            if robot.state is State.AUTONOMOUS:
                assert was_reset
            assert (choice.human is None) == (choice.source is not Source.HUMAN)
            assert np.isfinite(choice.command).all()
