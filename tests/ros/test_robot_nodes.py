"""sim_node, guard_node and policy_node as real processes on real DDS, in simulated time, so that a slow machine is only slow."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from graph_kit import Probe, running
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import DescribeParameters, SetParameters
from sensor_msgs.msg import JointState
from std_msgs.msg import Header
from std_srvs.srv import SetBool, Trigger

from robot_rl.replay.store import EpisodeStore
from robot_rl.ros import qos
from robot_rl.ros.conversion import from_stamp
from robot_rl.ros.graph import NodeSpec
from robot_rl.ros.graph_names import ALL_NODES
from robot_rl.types import Source
from robot_rl.wire import EpisodeStatus, GuardEvent, GuardState

SPACE = "t2/arm"
MS = 1_000_000


def spec(executable: str, order: int, **params) -> NodeSpec:
    params.setdefault("use_sim_time", executable != "sim_node")
    return NodeSpec(executable, executable, SPACE, params, managed=ALL_NODES[executable].lifecycle, respawn=True, order=order)


def topic(name: str) -> str:
    return f"/{SPACE}/{name}"


class Driver:
    """What a person does at a terminal: ``ros2 lifecycle set``, ``ros2 service call``, ``ros2 param set``."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def lifecycle(self, transition: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=transition))
        return self.probe.call(ChangeState, topic("policy_node/change_state"), request, 300.0).success

    def state(self) -> str:
        return self.probe.call(GetState, topic("policy_node/get_state"), GetState.Request()).current_state.label

    def awaken(self, node: str) -> None:
        """Wait until a node that was started again answers: DDS believes in a killed one for a while, and requests to it are lost."""
        service = topic(f"{node}/get_state")
        for _ in range(20):
            try:
                self.probe.call(GetState, service, GetState.Request(), 5.0)
                return
            except AssertionError:
                continue
        raise AssertionError(f"{node} does not answer")

    def trigger(self, name: str) -> tuple[bool, str]:
        answer = self.probe.call(Trigger, topic(name), Trigger.Request())
        return answer.success, answer.message

    def set_bool(self, name: str, data: bool) -> tuple[bool, str]:
        answer = self.probe.call(SetBool, topic(name), SetBool.Request(data=data))
        return answer.success, answer.message

    def param(self, node: str, name: str, value: object) -> tuple[bool, str]:
        kinds = {bool: "bool", int: "integer", float: "double", str: "string"}
        kind = kinds[type(value)]
        ros = ParameterValue(type=getattr(ParameterType, f"PARAMETER_{kind.upper()}"), **{f"{kind}_value": value})
        request = SetParameters.Request(parameters=[Parameter(name=name, value=ros)])
        result = self.probe.call(SetParameters, topic(f"{node}/set_parameters"), request).results[0]
        return result.successful, result.reason


def problem(probe: Probe, node: str) -> str:
    """What the node's diagnostics complain about now."""
    found = ""
    for message in probe.heard["/diagnostics"]:
        for status in message.status:
            if status.name == f"/{SPACE}/{node}: node":
                found = status.message if status.level == b"\x02" else ""
    return found


def test_a_robot_without_a_policy(tmp_path: Path):
    """Lifecycle, refusals, recording, staleness, and death of the policy: one graph, because processes take seconds to start."""
    store = tmp_path / "store"
    specs = [
        spec("sim_node", 0, env="tabletop/Lift", robot="sim_arm_joints", realtime_factor=0.15),
        spec("guard_node", 0, robot="sim_arm_joints", state_file=str(tmp_path / "guard.json")),
        spec("policy_node", 1, robot="no_such_robot", policy="none", store=str(store), control_hz=10, replan_margn=3),
    ]
    with running(specs) as (supervisor, probe, _):
        drive = Driver(probe)
        for name in ("action/arm", "executed/arm"):
            probe.listen(JointState, topic(name), qos.COMMAND)
        probe.listen(Header, topic("policy_node/heartbeat"), qos.LATEST)
        probe.listen(DiagnosticArray, topic("guard_node/state"), qos.STATE)
        probe.listen(DiagnosticArray, topic("guard_node/events"), qos.EVENT)
        probe.listen(DiagnosticArray, topic("episode_status"), qos.STATE)
        probe.listen(DiagnosticArray, "/diagnostics", qos.DIAG)

        def guard() -> GuardState:
            return probe.records(topic("guard_node/state"), GuardState)[-1]

        def episode() -> EpisodeStatus:
            return probe.records(topic("episode_status"), EpisodeStatus)[-1]

        def go_on() -> None:
            """On a machine that is too busy the policy may find the guard silent and end the episode, as it should: begin another."""
            if episode().end_reason == "safety" and episode().state in ("ended", "committed", "aborted"):
                drive.trigger("policy_node/start_episode")

        # Wrong parameters: the node lives, configure refuses with the whole list, requests that cannot be are answered.
        assert not drive.lifecycle(Transition.TRANSITION_ACTIVATE)
        assert not drive.lifecycle(77)
        assert not drive.lifecycle(Transition.TRANSITION_CONFIGURE)
        assert drive.state() == "unconfigured"
        told = probe.until(lambda: problem(probe, "policy_node"), "the reason in diagnostics")
        assert "did you mean replan_margin?" in told
        supervisor.processes[topic("policy_node")].popen.send_signal(signal.SIGINT)
        probe.until(lambda: not supervisor.processes[topic("policy_node")].alive, "the node ends on SIGINT")
        specs[2].params.pop("replan_margn")
        probe.until(lambda: supervisor.processes[topic("policy_node")].alive, "respawn", also=supervisor.look)
        assert not drive.lifecycle(Transition.TRANSITION_CONFIGURE)
        probe.until(lambda: "sim_arm_joints" in problem(probe, "policy_node"), "the reason in diagnostics")
        assert drive.param("policy_node", "robot", "sim_arm_joints") == (True, "")

        # Configured: everything is there, nothing moves.
        assert drive.lifecycle(Transition.TRANSITION_CONFIGURE)
        refused, why = drive.param("policy_node", "robot", "ur")
        assert not refused
        assert "unconfigured" in why
        assert not drive.param("policy_node", "replan_margin", 99)[0]
        assert drive.param("policy_node", "replan_margin", 1)[0]
        assert drive.param("policy_node", "blend", "rtc") == (
            False,
            "blend='rtc': policy is none; accepted are auto, linear, none",
        )
        described = probe.call(
            DescribeParameters, topic("policy_node/describe_parameters"), DescribeParameters.Request(names=["replan_margin"])
        )
        assert described.descriptors[0].integer_range[0].to_value == 50
        assert described.descriptors[0].description
        ok, why = drive.trigger("policy_node/start_episode")
        assert (ok, why) == (False, "policy_node is not active")
        assert probe.node.get_publishers_info_by_topic(topic("action/arm"))
        assert not probe.heard[topic("action/arm")]

        # Active, but the guard has not been armed.
        assert drive.lifecycle(Transition.TRANSITION_ACTIVATE)
        probe.until(lambda: probe.heard[topic("policy_node/heartbeat")][-1].frame_id == "idle", "the heartbeat")
        answers = []
        probe.until(
            lambda: answers.append(drive.trigger("policy_node/start_episode")) or "not armed" in answers[-1][1],
            f"refusal: {answers}",
            30.0,
        )
        probe.until(lambda: drive.set_bool("guard_node/arm", True)[0], "the guard arms")
        probe.until(lambda: drive.trigger("policy_node/start_episode")[0], "an episode begins")
        probe.until(lambda: guard().level in ("ok", "clamp"), "commands pass the guard", also=go_on)
        stamps = probe.until(
            lambda: len(probe.heard[topic("action/arm")]) > 60 and probe.heard[topic("action/arm")], "commands", also=go_on
        )
        stamps = [from_stamp(m.header.stamp) for m in stamps[10:]]
        steps = [b - a for a, b in pairwise(stamps)]
        assert min(steps) > 0
        assert sorted(steps)[len(steps) // 2] == pytest.approx(20 * MS, abs=10 * MS)  # 50 Hz of simulated time

        # A driver falls silent: hold, named; it comes back: motion goes on by itself.
        assert drive.param("sim_node", "fault", "stop:joint_states")[0]
        probe.until(lambda: guard().level == "hold" and guard().rule in ("state", "watchdog"), "the guard holds on old state")
        probe.until(lambda: probe.heard[topic("policy_node/heartbeat")][-1].frame_id == "hold", "the policy holds on old state")
        assert drive.param("sim_node", "fault", "")[0]
        if not guard().armed:
            probe.until(lambda: drive.set_bool("guard_node/arm", True)[0], "the guard arms again")
            probe.until(lambda: drive.trigger("policy_node/start_episode")[0], "an episode begins")
        probe.until(lambda: guard().level in ("ok", "clamp"), "motion goes on", also=go_on)

        # The operator says how it went: labelled, committed, readable.
        assert drive.set_bool("policy_node/end_episode", True)[0]
        probe.until(lambda: episode().state == "committed", "the episode is committed")
        assert (episode().outcome, episode().end_reason, episode().terminated) == ("success", "task", True)
        with EpisodeStore.open(store) as reading:
            assert reading.meta(episode().episode_id).success is True
            recorded = reading.read(episode().episode_id)
        assert recorded.terminated[-1]
        assert set(recorded.source.tolist()) <= {int(Source.HOLD), int(Source.SAFETY)}
        assert (recorded.stamp_ns[1:] > recorded.stamp_ns[:-1]).all()

        # kill -9 in the middle of an episode: the guard holds in time, on its own.
        probe.until(lambda: drive.trigger("policy_node/start_episode")[0], "an episode begins")
        probe.until(lambda: guard().level in ("ok", "clamp"), "motion", also=go_on)
        probe.spin(1.0)
        killed = episode().episode_id
        os.kill(supervisor.processes[topic("policy_node")].pid, signal.SIGKILL)
        probe.until(lambda: guard().level in ("hold", "stop"), "the guard holds")
        last = max(from_stamp(m.header.stamp) for m in probe.heard[topic("action/arm")])
        held = next(
            s
            for m in probe.heard[topic("guard_node/state")]
            for s in [m]
            if from_stamp(s.header.stamp) > last and s.status[0].level != b"\x00"
        )
        assert from_stamp(held.header.stamp) - last <= 100 * MS
        probe.until(lambda: guard().level == "stop" and not guard().armed, "a hold that lasts disarms")

        # The same command brings it back; what was recorded until the kill is there, as a truncated episode.
        specs[2].params["robot"] = "sim_arm_joints"
        probe.until(lambda: supervisor.processes[topic("policy_node")].alive, "respawn", also=supervisor.look)
        drive.awaken("policy_node")
        assert drive.lifecycle(Transition.TRANSITION_CONFIGURE)
        assert drive.lifecycle(Transition.TRANSITION_ACTIVATE)
        with EpisodeStore.open(store) as reading:
            assert reading.meta(killed).recovered
            assert reading.read(killed).truncated[-1]
        probe.until(lambda: drive.set_bool("guard_node/arm", True)[0], "the guard arms again")
        probe.until(lambda: drive.trigger("policy_node/start_episode")[0], "an episode begins")

        # Deactivated: the episode ends and is kept, and nothing more is said on action/*.
        assert drive.lifecycle(Transition.TRANSITION_DEACTIVATE)
        probe.until(lambda: episode().state == "committed" or episode().state == "aborted", "the episode ends")
        assert episode().end_reason == "deactivated"
        before = len(probe.heard[topic("action/arm")])
        probe.spin(0.5)
        assert len(probe.heard[topic("action/arm")]) <= before + 1
        assert drive.lifecycle(Transition.TRANSITION_CLEANUP)
        probe.until(
            lambda: not probe.node.get_publishers_info_by_topic(topic("action/arm")), "no publisher is left after cleanup"
        )
        events = probe.records(topic("guard_node/events"), GuardEvent)
        assert {"watchdog"} <= {e.rule for e in events}


def test_weights_are_swapped_in_motion(tmp_path: Path):
    """A real policy and head: new versions act from the next chunk, bad ones never, and no command jumps."""
    from policy_kit import publish, write_run

    run = write_run(tmp_path / "run")
    specs = [
        spec("sim_node", 0, env="tabletop/Lift", robot="sim_arm", realtime_factor=0.0, lockstep=True),
        spec("guard_node", 0, robot="sim_arm", rearm="auto", state_file=str(tmp_path / "guard.json")),
        spec(
            "policy_node", 1, robot="sim_arm", policy=str(run), head=str(run), run_dir=str(run), swap_at="chunk", replan_margin=0,
            episode_mode="auto", reset_service="sim_node/reset", max_episode_s=3.0, warmup_forwards=1, configure_timeout_s=600.0,
        ),
    ]  # fmt: skip
    with running(specs) as (_, probe, _):
        drive = Driver(probe)
        executed = probe.listen(PoseStamped, topic("executed/arm"), qos.COMMAND)
        probe.listen(DiagnosticArray, topic("guard_node/events"), qos.EVENT)
        probe.listen(DiagnosticArray, topic("episode_status"), qos.STATE)
        assert drive.lifecycle(Transition.TRANSITION_CONFIGURE)
        assert drive.lifecycle(Transition.TRANSITION_ACTIVATE)

        def committed() -> list[EpisodeStatus]:
            found = probe.records(topic("episode_status"), EpisodeStatus)
            return list({s.episode_id: s for s in found if s.state == "committed"}.values())

        def more_weights() -> None:
            if len(executed) > 30 * more_weights.count:  # type: ignore[attr-defined]
                more_weights.count += 1  # type: ignore[attr-defined]
                publish(run, seed=more_weights.count, torn=more_weights.count == 2)  # type: ignore[attr-defined]

        more_weights.count = 0  # type: ignore[attr-defined]
        probe.until(lambda: len(committed()) >= 3, "three episodes", 300.0, also=more_weights)
        ids = [s.episode_id for s in committed()]
        # A machine that is too busy for even a waiting simulator may make the guard end one; swaps never do.
        assert {s.end_reason for s in committed()} <= {"timeout", "safety"}, [(s.end_reason, s.detail) for s in committed()]
        with EpisodeStore.open(run / "store") as reading:
            episodes = [reading.read(i) for i in ids]
        versions = {int(v) for e in episodes for v in e.weights_version}
        assert {e.meta.extra["parameters"]["blend"] for e in episodes} == {"rtc"}  # what auto found that this policy can do
        assert len(versions) >= 2
        assert 2 not in versions  # the torn one
        for e in episodes:
            for d in e.decisions:
                assert d.weights_version in versions | {0}
            chunk_versions = {(int(d), int(v)) for d, v in zip(e.decision_id, e.weights_version, strict=True) if d >= 0}
            assert len({d for d, _ in chunk_versions}) == len(chunk_versions)  # never inside a chunk
        assert not {"step_jump", "start_jump", "velocity"} & {
            e.rule for e in probe.records(topic("guard_node/events"), GuardEvent)
        }

        # Pinned: from the next episode on that version alone acts, however many newer ones are there; an absent one is refused at once.
        def pin(version: int):
            value = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=version)
            request = SetParameters.Request(parameters=[Parameter(name="pin_version", value=value)])
            return probe.call(SetParameters, topic("policy_node/set_parameters"), request).results[0]

        refused = pin(99)
        assert not refused.successful
        assert "version 99 is not ready here" in refused.reason
        probe.until(lambda: pin(1).successful, "version 1 is found again")
        known = {s.episode_id for s in probe.records(topic("episode_status"), EpisodeStatus)}
        probe.until(
            lambda: len({s.episode_id for s in committed()} - known) >= 2, "two more episodes", 300.0, also=more_weights
        )
        assert more_weights.count > 2  # type: ignore[attr-defined]
        with EpisodeStore.open(run / "store") as reading:
            later = [reading.read(s.episode_id) for s in committed() if s.episode_id not in known]
        assert {int(v) for e in later for v in e.weights_version} == {1}
