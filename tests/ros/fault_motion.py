"""Faults 1 to 6: processes that die or hang, sensors that lie. A robot in motion must come to rest, and go on by itself."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import fault_net as net
from fault_kit import RECOVER_S, Bench, Run
from pad_kit import Pad

from robot_rl.replay import EpisodeStore
from robot_rl.training.learner_status import read_status

HOLD_MS = 100.0
STATE_MS = 100.0  # the guard's limit on measured state; HOLD_MS after it
ESTIMATE_MS = 150.0  # max_age_s of the simulated arm's state estimate
FROZEN_MS = 1000.0
OPERATOR_MS = 200.0
HANG_S = 3.0


# ---- 1, 2, 3: kills


def kill_policy(b: Bench, i: int) -> Run:
    """The guard holds; the tail is recovered as a truncated episode; the session goes on."""
    run = Run("kill -9 policy_node")
    b.await_motion()
    episode = b.watch.episodes[-1].value.episode_id
    others = net.children(b.pid("policy_node"))
    t0 = net.send(b.pid("policy_node"), signal.SIGKILL)
    for pid in others:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    b.held(run, t0, HOLD_MS)
    b.recovered(run, t0)
    with EpisodeStore.open(b.store) as store:
        there = episode in store
        run.check(not there or store.meta(episode).recovered, "the tail was not recovered as such")
        run.check(not there or store.read(episode).truncated[-1], "the recovered episode is not truncated")
        run.figures["tail_recovered"] = float(there)
    return run


def kill_guard(b: Bench, i: int) -> Run:
    """Nothing reaches the controller any more; the policy stops; the next guard arms itself (simulation) and it goes on."""
    run = Run("kill -9 guard_node")
    b.await_motion()
    t0 = net.send(b.pid("guard_node"), signal.SIGKILL)
    back = b.watch.until(lambda: next((s for s in list(b.watch.guards) if s.sent_ns > t0), None), 30.0)
    run.check(back is not None, "no new guard was heard of")
    _policy_stopped(b, run, t0)
    b.still(run, t0, None if back is None else back.sent_ns, HOLD_MS)
    b.recovered(run, t0)
    return run


def _policy_stopped(b: Bench, run: Run, t0: int) -> None:
    """The episode that ran sends nothing more; one that begins meanwhile does not count."""
    over = b.watch.until(
        lambda: next((s for s in list(b.watch.episodes) if s.sent_ns > t0 and s.value.state != "running"), None), 5.0
    )
    run.check(over is not None, "the policy did not end the episode")
    end = time.time_ns() if over is None else over.sent_ns
    last = max((s.sent_ns for s in list(b.watch.actions) if t0 < s.sent_ns <= end), default=t0)
    run.figures["policy_stopped_ms"] = round((last - t0) / 1e6 * b.rate, 1)
    run.check(
        run.figures["policy_stopped_ms"] <= HOLD_MS, f"the policy sent until {run.figures['policy_stopped_ms']} ms after it"
    )


def kill_others(b: Bench, i: int) -> Run:
    what = ("learner_node", "reward_node", "intervention_node", "operator", "monitor_node", "sim_node")[i % 6]
    if what == "operator":
        return kill_operator(b)
    run = Run(f"kill -9 {what}")
    if what == "learner_node":
        b.trigger("learner_node/checkpoint")
    b.await_motion()
    before = read_status(b.run / "learner")
    t0 = net.send(b.pid(what), signal.SIGKILL)
    if what == "sim_node":
        b.held(run, t0, STATE_MS + HOLD_MS)
        b.supervisor.revive("/sim_node")
        b.recovered(run, t0)
        return run
    b.went_on(run, t0)
    b.recovered(run, t0, new_episode=False)
    if what == "learner_node" and before is not None:

        def resumed() -> bool:
            now = read_status(b.run / "learner")
            return now is not None and now.pid != before.pid and now.state not in ("starting", "failed", "stopped")

        run.check(b.watch.until(resumed, RECOVER_S, 0.2), "the learner did not come back")
        now = read_status(b.run / "learner")
        run.check(now is not None and now.version >= before.version, "the learner forgot a version")
    return run


def kill_operator(b: Bench) -> Run:
    """A person drives, and the node between them and the robot dies."""
    run = Run("kill -9 intervention_node, operator in control")
    b.await_motion()
    human = lambda: b.watch.heartbeats and b.watch.heartbeats[-1].value == "human"  # noqa: E731
    with Pad(b.watch) as pad:
        pad.drive(0.0, 0.3, 0.0)
        if not b.watch.until(human, 10.0):
            run.problems.append("the operator did not get the robot")
            return run
        time.sleep(b.rng.uniform(0.3, 1.0))
        t0 = net.send(b.pid("intervention_node"), signal.SIGKILL)
        time.sleep(1.0)
        # The person's hand is still on the button, and the node is not back (an interpreter takes longer to start).
        b.still(run, t0, t0 + 900_000_000, OPERATOR_MS)
        pad.release()
        time.sleep(0.5)
    b.recovered(run, t0, new_episode=False)
    return run


def kill_vlm(b: Bench, i: int) -> Run:
    """Whoever asks a model server is nobody that a robot waits for."""
    run = Run("kill -9 vlm_reward_node")
    b.await_motion()
    t0 = net.send(b.pid("vlm_reward_node"), signal.SIGKILL)
    b.went_on(run, t0)
    b.recovered(run, t0, new_episode=False)
    back = lambda: (s := b.watch.diagnostics.get("/vlm_reward_node: source")) is not None and s.sent_ns > t0  # noqa: E731
    run.check(b.watch.until(back, RECOVER_S, 0.1), "the source did not come back")
    return run


# ---- 4: hangs


def hang_vlm(b: Bench, i: int) -> Run:
    run = Run("hang vlm_reward_node")
    b.await_motion()
    t0 = net.send(b.pid("vlm_reward_node"), signal.SIGSTOP)
    try:
        b.went_on(run, t0, HANG_S)
    finally:
        net.send(b.pid("vlm_reward_node"), signal.SIGCONT)
    b.recovered(run, t0, new_episode=False)
    return run


def hang(b: Bench, i: int) -> Run:
    """SIGSTOP for three seconds: as a death, and nothing old is replayed on waking."""
    what = ("policy_node", "guard_node", "sim_node", "learner_node", "reward_node", "intervention_node", "monitor_node")[i % 7]
    run = Run(f"hang {what}")
    b.await_motion()
    t0 = net.send(b.pid(what), signal.SIGSTOP)
    try:
        time.sleep(HANG_S)
    finally:
        woken = net.send(b.pid(what), signal.SIGCONT)
    if what == "policy_node":
        b.held(run, t0, HOLD_MS)
    elif what == "sim_node":
        b.held(run, t0, STATE_MS + HOLD_MS)
    elif what == "guard_node":
        b.still(run, t0, woken, HOLD_MS)
        _policy_stopped(b, run, t0)
    else:
        b.went_on(run, t0, HANG_S)
    b.recovered(
        run,
        woken if what in ("policy_node", "guard_node", "sim_node") else t0,
        new_episode=what in ("policy_node", "guard_node"),
    )
    replayed = b.watch.replayed(t0)
    run.figures["replayed"] = float(replayed)
    run.check(replayed == 0, f"{replayed} old commands reached the controller after waking")
    if what == "guard_node":
        early = [m for m in b.watch.moves(woken, woken + 100_000_000)]
        run.check(not early, f"{len(early)} commands moved within 100 ms of waking")
    return run


# ---- 5, 6: sensors


def frozen_camera(b: Bench, i: int) -> Run:
    run = Run("frozen camera")
    b.await_motion()
    b.set_parameter("sim_node", "fault", "freeze:front")
    t0 = time.time_ns()
    held = b.watch.until(
        lambda: next((s for s in list(b.watch.heartbeats) if s.sent_ns > t0 and s.value == "hold"), None), 10.0
    )
    run.check(held is not None, "the policy did not hold")
    named = b.watch.until(lambda: b.watch.says("policy_node", "frozen", t0), 5.0)
    run.check(named, "diagnostics do not name the frozen camera")
    now = time.time_ns()
    b.set_parameter("sim_node", "fault", "")
    b.still(run, t0, now, FROZEN_MS + HOLD_MS)
    b.recovered(run, t0, new_episode=False)
    return run


def sensors(b: Bench, i: int) -> Run:
    fault, bar = (
        ("stop:joint_states", STATE_MS + HOLD_MS), ("stop:tool_pose", STATE_MS + HOLD_MS), ("stale:joint_states", STATE_MS + HOLD_MS),
        ("stale:tool_pose", STATE_MS + HOLD_MS), ("stop:state_estimate", ESTIMATE_MS + HOLD_MS),
    )[i % 5]  # fmt: skip
    run = Run(fault)
    b.await_motion()
    b.set_parameter("sim_node", "fault", fault)
    t0 = time.time_ns()
    if fault.endswith("state_estimate"):
        found = b.watch.until(
            lambda: next((s for s in list(b.watch.heartbeats) if s.sent_ns > t0 and s.value == "hold"), None), 10.0
        )
        run.check(found is not None, "the policy did not hold")
        time.sleep(1.0)
        b.still(run, t0, time.time_ns(), bar)
    else:
        b.held(run, t0, bar)
        time.sleep(b.rng.uniform(0.2, 1.0))
    since = time.time_ns()
    b.set_parameter("sim_node", "fault", "")
    b.recovered(run, since, new_episode=False)
    return run
