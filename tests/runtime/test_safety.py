"""The safety filter: properties over random command streams, and one table of rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_rl.runtime.safety import SafetyConfig, SafetyFilter, SafetyLevel, default_watchdog_s
from robot_rl.types import ActionSpec, SafetyFlag

HZ = 50.0
TICK = 20_000_000


def joints(n: int = 3, low: float = -1.0, high: float = 1.0, **kwargs) -> ActionSpec:
    return ActionSpec((low,) * n, (high,) * n, **kwargs)


class Runner:
    """Feeds commands at the control rate."""

    def __init__(self, config: SafetyConfig, spec: ActionSpec, measured=None, hz: float = HZ) -> None:
        self.filter, self.now, self.tick = SafetyFilter(config, spec, hz), 10**9, int(1e9 / hz)
        self.filter.reset(self.now, None if measured is None else np.asarray(measured, float))

    def __call__(self, command, **kwargs):
        self.now += kwargs.pop("after", self.tick)
        return self.filter.filter(np.asarray(command, kwargs.pop("dtype", np.float64)), now_ns=self.now, **kwargs)


# -- properties -----------------------------------------------------------------------------------------------------------

limits = st.sampled_from([0.0, 0.3, 1.0, 4.0, float("inf")])


@st.composite
def streams(draw):
    """A filter with random limits and a stream of commands that are sometimes absurd."""
    n = draw(st.integers(1, 4))
    mode = tuple(draw(st.sampled_from(["absolute", "delta"])) for _ in range(n))
    spec = joints(n, mode=mode)
    velocity = [draw(st.sampled_from([0.0, 0.5, 2.0])) for _ in range(n)] if draw(st.booleans()) else None
    acceleration = [draw(st.sampled_from([1.0, 8.0])) for _ in range(n)] if draw(st.booleans()) else None
    jerk = [draw(st.sampled_from([20.0, 300.0])) for _ in range(n)] if draw(st.booleans()) else None
    config = SafetyConfig(
        velocity=velocity, acceleration=acceleration, jerk=jerk,
        chunk_rate=[1.5] * n if draw(st.booleans()) else None,
        step_jump_factor=draw(st.sampled_from([None, 3.0])),
        max_observation_age_s=0.1,
    )  # fmt: skip
    seed = draw(st.integers(0, 2**32 - 1))
    return spec, config, seed


def random_commands(spec: ActionSpec, seed: int, steps: int):
    """Smooth stretches, jumps, bang-bang at the limits, NaN and infinities."""
    rng = np.random.default_rng(seed)
    x = np.zeros(spec.dim)
    kind = "walk"
    for step in range(steps):
        if rng.random() < 0.08:
            kind = rng.choice(["walk", "jump", "bang", "bad", "still"])
        if kind == "walk":
            x = np.clip(x + rng.normal(0, 0.03, spec.dim), -1, 1)
        elif kind == "jump":
            x = rng.uniform(-1.5, 1.5, spec.dim)
        elif kind == "bang":
            x = np.sign(rng.normal(size=spec.dim)) * 1.2 if step % 15 == 0 else x
        command = x.copy()
        if kind == "bad" and rng.random() < 0.5:
            command[rng.integers(spec.dim)] = rng.choice([np.nan, np.inf, -np.inf])
        yield command, rng.random() < 0.1, 200_000_000 if rng.random() < 0.03 else 0


@given(streams())
@settings(max_examples=60, deadline=None)
def test_limits_hold_over_any_stream(stream):
    spec, config, seed = stream
    run = Runner(config, spec, measured=np.zeros(spec.dim))
    delta = spec.delta_mask
    last, speed, acceleration = np.zeros(spec.dim), np.zeros(spec.dim), np.zeros(spec.dim)
    for command, chunk, staleness in random_commands(spec, seed, 250):
        result = run(command, observation_stamp_ns=run.now - staleness, chunk_started=chunk)
        out = result.command
        assert np.isfinite(out).all()
        assert (out >= -1.0).all()
        assert (out <= 1.0).all()
        v = np.where(delta, out, out - last) * HZ
        a = (v - speed) * HZ
        j = (a - acceleration) * HZ
        for value, limit, slack in ((v, config.velocity, 1e-6), (a, config.acceleration, 1e-5), (j, config.jerk, 2e-3)):
            if limit is not None:
                assert (np.abs(value) <= np.asarray(limit) * (1 + 1e-6) + slack).all(), (value, limit, result)
        if result.flags == SafetyFlag.NONE:
            assert out.tobytes() == command.tobytes()
            assert result.level == SafetyLevel.OK
        else:
            assert result.level != SafetyLevel.OK
        last, speed, acceleration = out, v, a


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=30, deadline=None)
def test_a_legal_stream_passes_bit_for_bit(seed, dtype):
    """A motion that respects every limit, including the room to brake, is never touched."""
    rng = np.random.default_rng(seed)
    spec = joints(3, mode=("absolute", "absolute", "delta"))
    config = SafetyConfig(velocity=[1.0] * 3, acceleration=[20.0] * 3, jerk=[2000.0] * 3, chunk_rate=[5.0] * 3)
    run = Runner(config, spec, measured=np.zeros(3))
    phase, rate = rng.uniform(0, 6, 3), rng.uniform(0.5, 2.0, 3)
    for k in range(150):
        ramp = 0.5 - 0.5 * np.cos(np.pi * min(1.0, k / 100))
        command = (ramp * 0.25 * np.sin(rate * k / HZ + phase) * np.array([1, 1, 0.05])).astype(dtype)
        result = run(command, dtype=dtype, chunk_started=k % 8 == 0)
        assert result.flags == SafetyFlag.NONE, (k, result)
        assert result.command.dtype == dtype
        assert result.command.tobytes() == command.tobytes()


@pytest.mark.parametrize("jerk", [None, 40.0, 400.0])
@pytest.mark.parametrize("acceleration", [2.0, 20.0])
def test_a_step_command_is_reached_and_not_overshot(acceleration, jerk):
    """Far-away wishes: the joints arrive within the limits, exactly, without swinging around the wish."""
    config = SafetyConfig(
        velocity=[1.0, 1.0], acceleration=[acceleration] * 2, jerk=None if jerk is None else [jerk] * 2, step_jump_factor=None
    )
    run = Runner(config, joints(2), measured=[-0.5, 0.6])
    results = [run([5.0, -0.7]) for _ in range(250)]
    path = np.array([r.command for r in results])
    assert path[-1].tolist() == [1.0, -0.7]
    assert path[:, 0].max() <= 1.0
    assert path[:, 1].min() >= -0.7 - 2e-3
    assert results[-1].flags == SafetyFlag.POSITION, "only the clamped wish is left to report"


def test_a_joint_that_fell_behind_catches_up_with_a_moving_wish():
    config = SafetyConfig(velocity=[2.0], acceleration=[6.0], jerk=[150.0], step_jump_factor=None)
    run = Runner(config, joints(1), measured=[-0.9])
    wishes = [-0.6 + 0.2 * k / HZ for k in range(250)]
    results = [run([w]) for w in wishes]
    assert results[0].level == SafetyLevel.CLAMP
    assert [r.command[0] for r in results[-100:]] == wishes[-100:]
    assert max(r.command[0] - w for r, w in zip(results, wishes, strict=True)) < 5e-3


@pytest.mark.parametrize("jerk", [None, [40.0]])
def test_acceleration_is_limited_where_positions_are_not(jerk):
    config = SafetyConfig(position=False, acceleration=[8.0], jerk=jerk, step_jump_factor=None)
    run = Runner(config, joints(1), measured=[0.0])
    results = [run([0.5]) for _ in range(200)]
    path = np.array([0.0, 0.0, *(r.command[0] for r in results)])
    assert results[0].flags & SafetyFlag.ACCELERATION
    assert np.abs(np.diff(path, 2)).max() * HZ**2 <= 8.0 + 1e-6
    assert path[-1] == pytest.approx(0.5, abs=1e-3)


def test_direction_is_kept_when_speed_is_limited():
    config = SafetyConfig(velocity=[1.0, 1.0, 0.5], step_jump_factor=None)
    result = Runner(config, joints(), measured=[0, 0, 0])([0.04, 0.02, 0.02])
    assert result.flags == SafetyFlag.VELOCITY
    assert result.command == pytest.approx([0.02, 0.01, 0.01])


def test_a_gripper_neither_slows_nor_is_slowed_by_the_arm():
    spec = joints(2, kind=("continuous", "gripper_continuous"))
    config = SafetyConfig(velocity=[1.0, float("inf")], step_jump_factor=None)
    assert Runner(config, spec, measured=[0, -1])([0.04, 1.0]).command == pytest.approx([0.02, 1.0])
    slow = SafetyConfig(velocity=[1.0, 1.0], step_jump_factor=None)
    assert Runner(slow, spec, measured=[0, -1])([0.02, 1.0]).command == pytest.approx([0.02, -0.98])


# -- single rules ---------------------------------------------------------------------------------------------------------


def test_not_finite_drops_the_whole_command():
    run = Runner(SafetyConfig(), joints(mode=("absolute", "delta", "absolute")), measured=[0.1, 0.2, 0.3])
    run([0.2, 0.05, 0.4])
    for bad in (np.nan, np.inf, -np.inf):
        result = run([0.9, 0.1, bad])
        assert (result.flags, result.level) == (SafetyFlag.NON_FINITE, SafetyLevel.HOLD)
        assert result.command.tolist() == [0.2, 0.0, 0.4], "last executed where absolute, zero where delta, never a part"
    unlimited = Runner(SafetyConfig(position=False), joints(1), measured=[0.0])
    assert unlimited([50.0]).flags == SafetyFlag.NONE
    assert unlimited([np.inf]).flags == SafetyFlag.NON_FINITE


def test_positions_are_clamped_with_margin_and_float32_limits_are_inside():
    spec = ActionSpec((-0.1, -1.0, 0.0), (0.1, 1.0, 0.08), kind=("continuous", "continuous", "gripper_continuous"))
    run = Runner(SafetyConfig(position_margin=0.02), spec)
    result = run([0.5, -3.0, 0.08], dtype=np.float32)
    assert result.flags == SafetyFlag.POSITION
    assert result.command.tolist() == np.array([0.08, -0.98, 0.08], np.float32).tolist()
    exact = Runner(SafetyConfig(), spec)
    clipped = np.clip(np.array([9, 9, 9], np.float32), np.float32(spec.low), np.float32(spec.high))
    assert exact(clipped, dtype=np.float32).flags == SafetyFlag.NONE


def test_step_jump_is_rejected_and_held():
    run = Runner(SafetyConfig(velocity=[1.0, 1.0]), joints(2), measured=[0, 0])
    assert run([0.059, 0.0]).flags == SafetyFlag.VELOCITY, "fast is a wish"
    result = run([0.02 + 0.061, 0.0])
    assert (result.flags, result.level) == (SafetyFlag.STEP_JUMP, SafetyLevel.HOLD), "this fast is a fault"
    assert result.command.tolist() == [0.02, 0.0]
    assert run([0.03, 0.0]).flags == SafetyFlag.NONE


def test_zero_means_zero_and_missing_is_an_error():
    run = Runner(SafetyConfig(velocity=[0.0, 1.0], step_jump_factor=None), joints(2), measured=[0.3, 0.0])
    for _ in range(5):
        assert run([0.9, 0.9]).command[0] == 0.3
    for config, message in [
        (SafetyConfig(velocity=[1.0]), r"safety\.velocity has 1 values; accepted is one for each of the 2 dimensions"),
        (SafetyConfig(jerk=[1.0, float("nan")]), r"safety\.jerk\[a1\]=nan"),
        (SafetyConfig(acceleration=[1.0, -2.0]), r"safety\.acceleration\[a1\]=-2\.0"),
        (SafetyConfig(position_margin=1.0), r"safety\.position_margin\[a0\]=1\.0"),
        (SafetyConfig(max_observation_age_s=-1), r"safety\.max_observation_age_s=-1"),
        (SafetyConfig(neutral=[0.0]), r"safety\.neutral"),
        (SafetyConfig(speed_scale=-1), r"safety\.speed_scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            SafetyFilter(config, joints(2), HZ)
    still = SafetyFilter(SafetyConfig(velocity=[1.0, 1.0]), joints(2), HZ)
    with pytest.raises(RuntimeError, match="call reset"):
        still.filter(np.zeros(2), now_ns=0)
    with pytest.raises(ValueError, match="limits on the change of 'a0' need to know where it is"):
        still.reset(0)


def test_stale_observations_and_operators_hold():
    run = Runner(SafetyConfig(max_observation_age_s=0.1), joints(1), measured=[0.0])
    assert run([0.1], observation_stamp_ns=run.now - 50_000_000).flags == SafetyFlag.NONE
    for stamp in (run.now - 200_000_000, run.now + 400_000_000):
        result = run([0.2], observation_stamp_ns=stamp)
        assert (result.flags, result.command[0]) == (SafetyFlag.STALE_OBSERVATION, 0.1)
    result = run([0.2], observation_stamp_ns=run.now, operator_stamp_ns=run.now - 200_000_000)
    assert (result.flags, result.level) == (SafetyFlag.STALE_OPERATOR, SafetyLevel.HOLD)
    assert run([0.2], observation_stamp_ns=run.now, operator_stamp_ns=run.now).flags == SafetyFlag.NONE
    with pytest.raises(ValueError, match="observation_stamp_ns is missing"):
        run([0.2])


def test_watchdog_comes_back_after_good_ticks_and_a_clock_that_jumps_back_holds():
    assert [round(default_watchdog_s(hz), 3) for hz in (100, 50, 20, 10)] == [0.03, 0.06, 0.075, 0.15]
    run = Runner(SafetyConfig(watchdog_s=0.06, stop_after_hold_s=0.5), joints(1), measured=[0.0])
    run([0.1])
    results = [run([0.2], after=after) for after in (100_000_000, TICK, TICK, TICK, TICK)]
    assert [r.flags for r in results] == [SafetyFlag.WATCHDOG] * 4 + [SafetyFlag.NONE]
    assert [r.command[0] for r in results] == [0.1] * 4 + [0.2]
    assert run([0.3], after=-(10**9)).flags == SafetyFlag.WATCHDOG
    levels = [run([0.3], after=100_000_000).level for _ in range(10)]
    assert (levels[0], levels[-1]) == (SafetyLevel.HOLD, SafetyLevel.STOP)


def test_the_way_into_a_new_chunk_is_rate_limited_until_it_is_caught_up():
    config = SafetyConfig(chunk_rate=[1.0, 1.0])
    run = Runner(config, joints(2, mode=("absolute", "delta")), measured=[0.0, 0.0])
    first = run([0.05, 0.0], chunk_started=True)
    assert first.flags == SafetyFlag.CHUNK_RATE
    path = [first.command[0]] + [run([0.05, 0.0]).command[0] for _ in range(4)]
    assert path == pytest.approx([0.02, 0.04, 0.05, 0.05, 0.05])
    assert run([0.5, 0.0]).flags == SafetyFlag.NONE, "inside a chunk only the velocity rule speaks"
    assert run([0.5, 0.06], chunk_started=True).command[1] == pytest.approx(0.02), "for deltas the change of the delta counts"


def test_workspace_clamps_or_holds():
    def box(command):
        return None if command[1] > 0.5 else np.clip(command, -0.3, 0.3)

    run = Runner(SafetyConfig(workspace=box), joints(2), measured=[0.0, 0.0])
    assert run([0.1, 0.1]).flags == SafetyFlag.NONE
    result = run([0.9, 0.1])
    assert (result.flags, result.command.tolist()) == (SafetyFlag.WORKSPACE, [0.3, 0.1])
    result = run([0.0, 0.9])
    assert (result.level, result.command.tolist()) == (SafetyLevel.HOLD, [0.3, 0.1])


def test_gripper_toggles_are_limited_and_the_arm_goes_on():
    spec = joints(2, kind=("continuous", "gripper_discrete"))
    run = Runner(SafetyConfig(gripper_toggles_per_s=2), spec, measured=[0.0, -1.0])
    results = [run([k / 100, 1.0 if k % 2 else -1.0]) for k in range(10)]
    assert [r.flags for r in results[:3]] == [SafetyFlag.NONE] * 3
    assert [r.command[1] for r in results] == [-1, 1, -1, -1, -1, -1, -1, -1, -1, -1]
    assert [r.command[0] for r in results] == [k / 100 for k in range(10)]
    assert results[3].flags == SafetyFlag.GRIPPER_RATE
    assert run([0.1, 1.0], after=10**9).command[1] == 1.0


def test_a_hold_brakes_along_the_limits_and_then_stays():
    config = SafetyConfig(velocity=[1.0], acceleration=[5.0], step_jump_factor=None)
    run = Runner(config, joints(1), measured=[-0.9])
    for _ in range(40):
        moving = run([1.0]).command[0]
    path = [moving] + [run([np.nan]).command[0] for _ in range(20)]
    speed = np.diff(path) * HZ
    assert speed[0] == pytest.approx(0.9, abs=1e-6)
    assert np.abs(np.diff(speed) * HZ).max() <= 5.0 + 1e-6
    assert path[-1] == path[-5]


def test_nothing_to_hold_is_said_and_neutral_is_used():
    with pytest.raises(RuntimeError, match="nothing to hold"):
        Runner(SafetyConfig(), joints(1))([np.nan])
    assert Runner(SafetyConfig(neutral=[0.25]), joints(1))([np.nan]).command[0] == 0.25
    assert Runner(SafetyConfig(), joints(1, mode=("delta",)))([np.nan]).command[0] == 0.0
    with pytest.raises(ValueError, match=r"command has shape \(2,\); accepted is \(1,\)"):
        Runner(SafetyConfig(), joints(1))([0.0, 0.0])


def test_a_start_outside_the_limits_moves_back_without_a_jump():
    config = SafetyConfig(velocity=[1.0], acceleration=[10.0], jerk=[500.0], step_jump_factor=None)
    run = Runner(config, joints(1), measured=[1.2])
    path = np.array([1.2] + [run([0.0]).command[0] for _ in range(120)])
    assert np.abs(np.diff(path)).max() * HZ <= 1.0 + 1e-6
    assert path[-1] == 0.0
    assert path.min() > -2e-3
