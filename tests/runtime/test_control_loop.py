"""The control loop of one robot: what is logged is what was seen, wanted and done."""

from __future__ import annotations

import numpy as np
import pytest
from spine_kit import ARM, STATE, FakeEnv, ListRecorder, SmoothBase, compact

from robot_rl.heads.config import LatentNoiseConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.chunk_scheduler import ChunkScheduler
from robot_rl.runtime.control_loop import Arbitration, ControlLoop, PolicyOnly
from robot_rl.runtime.safety import SafetyConfig, SafetyFilter
from robot_rl.types import Decision, SafetyFlag, Source

HZ = 10.0


def make(n_action_steps: int = 2, arbiter=None, n_obs: int = 1, **safety) -> ControlLoop:
    filter_ = SafetyFilter(SafetyConfig(**safety), ARM, HZ)
    return ControlLoop(ARM, ChunkScheduler(ARM, n_action_steps), filter_, n_obs_steps=n_obs, arbiter=arbiter)


def drive(loop: ControlLoop, env: FakeEnv, policy: ActingPolicy | None, recorder: ListRecorder | None, seed: int = 0) -> None:
    """Until the environment says that the episode is over."""
    observation, _ = env.reset(seed=seed)
    loop.begin(observation, key=("test", seed), recorder=recorder, stamp_ns=1)
    while True:
        if policy is not None and loop.wants_chunk:
            loop.accept(policy.decide([loop.request()])[0])
        now = 1 + round(loop.step * 1e9 / HZ)
        command = loop.tick(now)
        observation, reward, terminated, truncated, _ = env.step(command)
        loop.observe(observation, reward, terminated, truncated, 1 + round((loop.step + 1) * 1e9 / HZ))
        if terminated or truncated:
            return


@pytest.mark.parametrize(("length", "success_at"), [(10, 7), (7, None), (1, 1)])
def test_row_21_every_step_is_stored_and_row_6_a_chunk_stops_at_the_end(length: int, success_at: int | None) -> None:
    """L steps, L rows, L + 1 observations; the environment raises if it is stepped once too often."""
    env, recorder, base = FakeEnv(length, success_at), ListRecorder(), SmoothBase()
    loop = make()
    drive(loop, env, ActingPolicy(base), recorder)
    steps = success_at or length
    assert (len(recorder.steps), len(env.commands), loop.step) == (steps, steps, steps)
    assert [s.observation[STATE][0] for s in recorder.steps] == list(range(steps))
    episode = loop.finish(success=success_at is not None)
    assert len(episode) == steps
    assert recorder.final[STATE][0] == steps
    assert [s.reward for s in recorder.steps] == [0.0] * (steps - 1) + [float(success_at is not None)]
    assert [s.terminated for s in recorder.steps] == [False] * (steps - 1) + [success_at is not None]
    assert [s.truncated for s in recorder.steps] == [False] * (steps - 1) + [success_at is None]
    for t, (step, command) in enumerate(zip(recorder.steps, env.commands, strict=True)):
        assert (step.decision_id, step.chunk_row) == (t // 2, t % 2)
        assert np.array_equal(step.action, command)  # stored as executed
        decision = recorder.decisions[step.decision_id]
        assert decision.step == t - t % 2
        np.testing.assert_array_equal(step.action_policy, decision.chunk[step.chunk_row])
        assert step.source is Source.POLICY
        assert step.stamp_ns == 1 + round(t * 1e9 / HZ)


def test_row_22_the_stored_base_action_belongs_to_the_plan_that_acted() -> None:
    env, recorder = FakeEnv(9), ListRecorder()
    drive(make(), env, ActingPolicy(SmoothBase()), recorder)
    for step in recorder.steps:
        np.testing.assert_array_equal(step.action_base, recorder.decisions[step.decision_id].chunk_base[step.chunk_row])


def test_row_25_two_interleaved_episodes_are_those_played_apart() -> None:
    policy = ActingPolicy(SmoothBase())
    apart = []
    for seed in (3, 4):
        recorder = ListRecorder()
        drive(make(), FakeEnv(6), policy, recorder, seed)
        apart.append(recorder)
    loops, envs, recorders = [make(), make()], [FakeEnv(6), FakeEnv(6)], [ListRecorder(), ListRecorder()]
    for seed, loop, env, recorder in zip((3, 4), loops, envs, recorders, strict=True):
        loop.begin(env.reset(seed=seed)[0], key=("test", seed), recorder=recorder, stamp_ns=1)
    for _ in range(6):
        asking = [loop for loop in loops if loop.wants_chunk]
        for loop, decision in zip(asking, policy.decide([a.request() for a in asking]) if asking else [], strict=True):
            loop.accept(decision)
        for loop, env in zip(loops, envs, strict=True):
            o, r, terminated, truncated, _ = env.step(loop.tick(1 + round(loop.step * 1e9 / HZ)))
            loop.observe(o, r, terminated, truncated, 1 + round((loop.step + 1) * 1e9 / HZ))
    for one, two in zip(apart, recorders, strict=True):
        np.testing.assert_allclose([s.action for s in one.steps], [s.action for s in two.steps], atol=1e-5)


def test_without_a_chunk_the_robot_stands_still() -> None:
    """Absolute dimensions keep the last command, deltas are zero, and the rows say ``hold``."""
    loop, recorder = make(), ListRecorder()
    env = FakeEnv(4)
    loop.begin(env.reset(seed=0)[0], key=("x",), recorder=recorder, stamp_ns=1, measured=np.array([0.3, 0.0, 0.6]))
    rows = np.array([[0.5, 1.5, 0.2], [0.6, 1.0, 0.4]], np.float32)
    for t in range(4):
        if t == 1:
            assert loop.accept(Decision(1, None, rows, rows, weights_version=1))
        loop.tick(1 + t * 10**8)
        loop.observe(*env.step(recorder.steps[-1].action if recorder.steps else rows[0])[:4], 1 + (t + 1) * 10**8)
    np.testing.assert_allclose([s.action for s in recorder.steps], [[0.3, 0, 0.6], rows[0], rows[1], [0.6, 0, 0.4]], atol=1e-6)
    assert [s.source for s in recorder.steps] == [Source.HOLD, Source.POLICY, Source.POLICY, Source.HOLD]
    assert [s.decision_id for s in recorder.steps] == [-1, 0, 0, -1]
    assert recorder.steps[0].action_policy is None
    assert recorder.steps[3].weights_version == 0


def test_what_the_safety_filter_replaces_is_marked() -> None:
    """A command that is not finite is replaced and its source is ``safety``; a trimmed one stays the policy's."""
    loop, recorder, env = make(n_action_steps=3), ListRecorder(), FakeEnv(3)
    loop.begin(env.reset(seed=0)[0], key=("x",), recorder=recorder, stamp_ns=1, measured=np.zeros(3))
    rows = np.array([[0.1, 0.0, 0.1], [np.nan, 0.0, 0.1], [5.0, 0.0, 0.1]], np.float32)
    loop.accept(Decision(0, None, rows, rows))
    for t in range(3):
        loop.observe(*env.step(loop.tick(1 + t * 10**8))[:4], 1 + (t + 1) * 10**8)
    assert [s.source for s in recorder.steps] == [Source.POLICY, Source.SAFETY, Source.POLICY]
    assert recorder.steps[1].safety & SafetyFlag.NON_FINITE
    assert recorder.steps[2].safety & SafetyFlag.POSITION
    assert np.isfinite([s.action for s in recorder.steps]).all()
    np.testing.assert_allclose(recorder.steps[2].action[0], 1.0)
    assert recorder.steps[2].action_policy[0] == 5.0  # what was wanted is kept beside it


def test_a_take_over_ends_the_running_chunk() -> None:
    class Operator(PolicyOnly):
        def arbitrate(self, now_ns, wish, observation, situation):
            t = int(observation[STATE][0])
            if t in (1, 2):
                return Arbitration(np.array([-0.5, 0, 0.5]), Source.HUMAN, np.array([-0.5, 0, 0.5]), 0, t == 1, now_ns)
            return Arbitration(wish, drop_chunk=False)

    recorder, env = ListRecorder(), FakeEnv(6)
    loop = make(n_action_steps=3, arbiter=Operator())
    drive(loop, env, ActingPolicy(SmoothBase()), recorder)
    assert [s.source for s in recorder.steps] == [Source.POLICY, Source.HUMAN, Source.HUMAN, *[Source.POLICY] * 3]
    assert [s.intervention_id for s in recorder.steps] == [-1, 0, 0, -1, -1, -1]
    ids = [s.decision_id for s in recorder.steps]
    assert ids[0] != ids[2]  # the chunk of step 0 was dropped; a new one was asked for at step 2
    assert [d.step for d in recorder.decisions][:2] == [0, 2]


def test_a_slow_policy_continues_the_rows_that_run_meanwhile_and_only_those() -> None:
    """A chunk that takes two steps: the old one runs on, the new one begins with these rows; after a person's step it begins anew."""

    class Person(PolicyOnly):
        def arbitrate(self, now_ns, wish, observation, situation):
            choice = super().arbitrate(now_ns, wish, observation, situation)
            return Arbitration(wish, Source.HUMAN) if situation.step == 6 else choice

    loop, env, policy = (
        make(4, arbiter=Person()),
        FakeEnv(30),
        ActingPolicy(compact(state=len(FakeEnv(1).reset(seed=0)[0][STATE]))),
    )
    loop.scheduler.replan_margin, loop.scheduler.blend_steps = 3, 9
    observation, _ = env.reset(seed=0)
    loop.begin(observation, key=("test", 0), stamp_ns=1)

    def step() -> np.ndarray:
        command = loop.tick(1 + round(loop.step * 1e9 / HZ))
        observation, *rest, _ = env.step(command)
        loop.observe(observation, *rest, 1 + round((loop.step + 1) * 1e9 / HZ))
        return command

    assert loop.request(2).running is None
    first = policy.decide([loop.request(2)])[0]
    loop.accept(first)
    step()
    assert loop.wants_chunk
    second = policy.decide([loop.request(2)])[0]
    assert second.chunk[:2].tobytes() == first.chunk[1:3].tobytes()
    commands = [step(), step()]
    loop.accept(second)
    commands += [step(), step()]
    expected = np.concatenate([first.chunk[1:3], second.chunk[2:4]])
    np.testing.assert_allclose(commands, np.clip(expected, ARM.low, ARM.high), atol=1e-6)  # and nothing is blended once more
    loop.accept(policy.decide([loop.request(0)])[0])
    step()
    assert loop.request(1).running is not None
    step()  # by the person
    assert loop.scheduler.rows_left(loop.step)
    assert loop.request(1).running is None


def test_row_34_a_version_changes_only_between_episodes() -> None:
    """A version published while an episode runs acts from the next one on."""
    base = SmoothBase()
    versions = {v: ActingPolicy(base, LatentNoiseHead(base, LatentNoiseConfig(hidden=(8,))), "explore", v) for v in (1, 2)}
    newest = 1
    loop, found = make(), []
    for seed in range(2):
        acting, recorder, env = versions[newest], ListRecorder(), FakeEnv(6)
        loop.begin(env.reset(seed=seed)[0], key=("x", seed), recorder=recorder, stamp_ns=1)
        for t in range(6):
            if t == 3:
                newest = 2
            if loop.wants_chunk:
                loop.accept(acting.decide([loop.request()])[0])
            loop.observe(*env.step(loop.tick(1 + t * 10**8))[:4], 1 + (t + 1) * 10**8)
        loop.finish()
        found.append({s.weights_version for s in recorder.steps})
    assert found == [{1}, {2}]


def test_frames_are_stacked_and_decisions_are_numbered() -> None:
    loop, env = make(n_obs=3), FakeEnv(5)
    loop.begin(env.reset(seed=0)[0], key=("k", 1), stamp_ns=1)
    assert loop.request().observation[STATE][:, 0].tolist() == [0, 0, 0]
    for t in range(2):
        loop.observe(*env.step(loop.tick(1 + t * 10**8))[:4], 1 + (t + 1) * 10**8)
    asked = loop.request()
    assert asked.observation[STATE][:, 0].tolist() == [0, 1, 2]
    assert (asked.key, asked.index, asked.step) == (("k", 1), 0, 2)
    rows = np.zeros((3, 3), np.float32)
    assert not loop.accept(Decision(0, None, rows, rows))  # two rows long, two steps late
    assert loop.request().index == 1
    assert loop.scheduler.late_chunks == 1
    assert loop.finish() is None


def test_calls_out_of_order_are_refused() -> None:
    loop, env, recorder = make(), FakeEnv(3), ListRecorder()
    with pytest.raises(RuntimeError, match="begin an episode first"):
        loop.tick(1)
    loop.begin(env.reset(seed=0)[0], key=("x",), recorder=recorder, stamp_ns=1)
    with pytest.raises(RuntimeError, match="call tick first"):
        loop.observe({}, 0.0, False, False)
    with pytest.raises(RuntimeError, match="an episode is running"):
        loop.begin({}, key=("x",))
    loop.tick(1)
    with pytest.raises(RuntimeError, match="observe the outcome"):
        loop.tick(2)
    loop.abort()
    assert recorder.aborted
    assert not loop.running


class FullDisk(ListRecorder):
    def append(self, step) -> None:
        if len(self.steps) == 2:
            raise OSError("disk full")
        super().append(step)


def test_the_log_follows_the_command_and_misses_nothing() -> None:
    """A step is logged behind the next command; a new decision, the end of the episode and ``finish`` do not lose one."""
    rows = np.full((2, 3), 0.1, np.float32)
    loop, recorder = make(), ListRecorder()
    loop.begin({STATE: np.zeros(4, np.float32)}, key=("x",), recorder=recorder, stamp_ns=1, measured=np.zeros(3))
    seen: list[tuple[int, int]] = []
    for t in range(4):
        if loop.wants_chunk:
            loop.accept(Decision(t, None, rows, rows))
            assert len(recorder.steps) == t  # everything before a decision is in the log before it
        loop.tick(1 + t * 10**8)
        seen.append((t, len(recorder.steps)))
        loop.observe({STATE: np.full(4, t + 1.0, np.float32)}, 0.0, False, False, 1 + (t + 1) * 10**8)
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)]
    loop.finish()
    assert [float(s.observation[STATE][0]) for s in recorder.steps] == [0, 1, 2, 3]

    loop, recorder = make(), FullDisk()
    loop.begin({STATE: np.zeros(4, np.float32)}, key=("x",), recorder=recorder, stamp_ns=1, measured=np.zeros(3))
    loop.accept(Decision(0, None, rows, rows))
    for t in range(3):
        loop.tick(1 + t * 10**8)
        loop.observe({STATE: np.zeros(4, np.float32)}, 0.0, False, False, 1 + (t + 1) * 10**8)
    with pytest.raises(OSError, match="disk full"):
        loop.finish()
    assert recorder.final is not None, "what came before the full disk is committed"
    assert len(recorder.steps) == 2
