"""Learner-side nodes as real processes on real DDS: what they declare, bring-up, take-over messages, rewards, refusals."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from graph_kit import running
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import DescribeParameters
from sensor_msgs.msg import Joy
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger
from store_kit import new_store, write

from robot_rl.replay import EpisodeStore
from robot_rl.ros import qos
from robot_rl.ros.conversion import pose_message, records_message
from robot_rl.ros.graph import NodeSpec
from robot_rl.ros.graph_names import ALL_NODES
from robot_rl.types import EpisodeMeta
from robot_rl.wire import EpisodeStatus, OperatorState, RewardClose, SessionStatus, StepReward, TaskState

SPACE = "t1/arm"


def spec(executable: str, order: int, **params) -> NodeSpec:
    return NodeSpec(executable, executable, SPACE, params, managed=ALL_NODES[executable].lifecycle, respawn=True, order=order)


def filled(path, length=20):
    """One committed episode of 20 Hz whose stamps are known."""
    with new_store(path) as store:
        write(store, np.random.default_rng(0), length, EpisodeMeta("e1", task="lift", control_hz=20.0))
    return EpisodeStore.open(path).read("e1").stamp_ns


def test_learner_side_nodes_on_a_real_graph(tmp_path):
    """One graph for all of this, because processes take seconds to start."""
    stamps = filled(tmp_path / "store")
    specs = [
        spec("intervention_node", 0, robot="sim_arm", devices=["joy"]),
        spec("monitor_node", 1, managed=["reward_node"], silence_s=30.0),
        spec("reward_node", 2, source="environment", robot="sim_arm"),
        spec("vlm_reward_node", 2, source="vlm_progress"),
    ]
    with running(specs) as (supervisor, probe, lines):
        look = supervisor.look
        session = f"/{SPACE}/session_status"
        probe.listen(DiagnosticArray, session, qos.STATE)
        probe.listen(DiagnosticArray, f"/{SPACE}/reward/events", qos.EVENT)
        probe.listen(DiagnosticArray, f"/{SPACE}/operator/state", qos.LATEST)
        probe.listen(DiagnosticArray, "/diagnostics", qos.DIAG)
        poses = probe.listen(PoseStamped, f"/{SPACE}/operator/action/arm", qos.LATEST)
        stops = probe.listen(Bool, f"/{SPACE}/estop", qos.STATE)

        # ---- bring-up
        probe.until(
            lambda: any(s.phase == "ready" for s in probe.records(session, SessionStatus)), "the session is ready", also=look
        )

        # ---- the graph shows what the tables say
        there = lambda: {n for n, where in probe.node.get_node_names_and_namespaces() if where == f"/{SPACE}"}  # noqa: E731
        probe.until(lambda: {s.executable for s in specs} <= there(), "every node is discovered")
        for name in ("intervention_node", "monitor_node", "reward_node"):
            table = ALL_NODES[name]
            shown = dict(probe.node.get_publisher_names_and_types_by_node(name, f"/{SPACE}"))
            wanted = {
                t.name if t.name.startswith("/") else f"/{SPACE}/{t.name}": t.type for t in table.publishes if "<" not in t.name
            }
            assert {n: [t] for n, t in wanted.items()}.items() <= shown.items(), name
            allowed = {"/rosout", "/parameter_events", "/diagnostics", f"/{SPACE}/{name}/transition_event"}
            extra = set(shown) - set(wanted) - allowed
            assert all("operator/action" in n for n in extra), (name, extra)
            services = dict(probe.node.get_service_names_and_types_by_node(name, f"/{SPACE}"))
            assert {f"/{SPACE}/{s.name}": [s.type] for s in table.services}.items() <= services.items(), name
            asked = DescribeParameters.Request(names=[p.name for p in table.all_parameters])
            answer = probe.call(DescribeParameters, f"/{SPACE}/{name}/describe_parameters", asked)
            for p, d in zip(table.all_parameters, answer.descriptors, strict=True):
                assert d.description == p.description
                if p.range is not None:
                    ranges = list(d.floating_point_range) or list(d.integer_range)
                    assert [ranges[0].from_value, ranges[0].to_value] == list(p.range)

        # ---- a source that is not installed refuses, and says what is
        change = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE))
        assert not probe.call(ChangeState, f"/{SPACE}/vlm_reward_node/change_state", change).success
        state = probe.call(GetState, f"/{SPACE}/vlm_reward_node/get_state", GetState.Request())
        assert state.current_state.label == "unconfigured"
        probe.until(
            lambda: any(
                "no reward source of that name is installed" in line and "environment, human" in line for line in lines
            ),
            "the refusal is logged",
        )

        # ---- rewards of a committed episode, exactly where they belong
        status_out = probe.node.create_publisher(DiagnosticArray, f"/{SPACE}/episode_status", qos.STATE)
        truth_out = probe.node.create_publisher(DiagnosticArray, f"/{SPACE}/sim_node/task_state", qos.EVENT)
        say = lambda **c: status_out.publish(records_message([EpisodeStatus("e1", index=1, **c)], 1))  # noqa: E731
        probe.until(lambda: truth_out.get_subscription_count() and status_out.get_subscription_count() >= 3, "they listen")
        say(state="running", step=0, started_ns=int(stamps[0]))
        probe.spin(0.5)
        for i, stamp in enumerate(stamps.tolist()):
            truth = TaskState("tabletop/Lift", "lift", stamp, 0, i, i >= 12, i >= 12, False)
            truth_out.publish(records_message([truth], stamp))
        live = lambda: [r for r in probe.records(f"/{SPACE}/reward/events", StepReward) if r.terminal and not r.recorded]  # noqa: E731
        first = probe.until(live, "the end of the episode is asked for")[0]
        assert (first.source, first.value, first.stamp_ns) == ("env", 1.0, int(stamps[12]))
        say(state="committed", step=20, store_uri=(tmp_path / "store").as_uri(), outcome="success")
        closed = probe.until(lambda: probe.records(f"/{SPACE}/reward/events", RewardClose), "the source is done with it")[0]
        assert (closed.episode_id, closed.complete_through_step) == ("e1", 20)
        with EpisodeStore.open(tmp_path / "store") as store:
            events = store.rewards("e1")
            assert [(e.source, e.step, e.value) for e in events if e.valid] == [("env", 12, 1.0), ("label", 12, 1.0)]
            assert [(e.source, e.step, e.reason) for e in events if not e.valid] == [("env.closed", 20, "closed")]
            assert store.meta("e1").success is True
        assert probe.call(Trigger, f"/{SPACE}/reward_node/score_last", Trigger.Request()).success

        # ---- a person takes over
        pad = probe.node.create_publisher(Joy, f"/{SPACE}/joy", qos.LATEST)
        executed = probe.node.create_publisher(PoseStamped, f"/{SPACE}/executed/arm", qos.COMMAND)
        probe.until(lambda: pad.get_subscription_count() and executed.get_subscription_count(), "the pad is heard")
        here = np.array([0.1, 0.0, 0.2, 0.0, 0.0, 0.0, 1.0])
        sticks = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]

        def press(*buttons: int) -> None:
            executed.publish(pose_message(here, probe.node.get_clock().now().nanoseconds, "base"))
            pad.publish(Joy(axes=sticks, buttons=[int(i in buttons) for i in range(10)]))

        driven = probe.until(
            lambda: [s for s in probe.records(f"/{SPACE}/operator/state", OperatorState) if s.takeover],
            "take-over",
            also=lambda: press(5),
        )
        assert driven[0].device == "joy"
        assert driven[0].deadman
        probe.until(lambda: len(poses) > 3, "commands of the person", also=lambda: press(5))
        p = poses[-1].pose.position
        np.testing.assert_allclose([p.x, p.y, p.z], [0.1 + 0.10 / 20.0, 0.0, 0.2], atol=1e-6)
        box = probe.heard[f"/{SPACE}/operator/state"]
        box.clear()
        before = time.monotonic()
        probe.until(  # silence is a release
            lambda: box and not probe.records(f"/{SPACE}/operator/state", OperatorState)[-1].takeover, "the stale pad lets go"
        )
        assert time.monotonic() - before < 5.0
        probe.until(lambda: stops, "e-stop", also=lambda: press(8))
        assert stops[-1].data
        probe.until(  # a verdict on an episode that has ended becomes its label
            lambda: [r for r in probe.records(f"/{SPACE}/reward/events", StepReward) if r.source == "label" and r.model_id == "human:operator"],
            "the verdict", also=lambda: (press(), press(1)),
        )  # fmt: skip

        # ---- diagnostics, and a node that dies comes back up
        seen = lambda: {s.name for m in probe.heard["/diagnostics"] for s in m.status}  # noqa: E731
        probe.until(lambda: {f"/{SPACE}/reward_node: source", f"/{SPACE}/intervention_node: devices"} <= seen(), "diagnostics")
        probe.heard[session].clear()
        supervisor.processes[f"/{SPACE}/reward_node"].popen.kill()
        probe.until(lambda: supervisor.processes[f"/{SPACE}/reward_node"].restarts == 1, "it is started again", also=look)
        configured = lambda: sum("source env (environment)" in line for line in lines)  # noqa: E731
        probe.until(lambda: configured() >= 2, "it is configured again", also=look)
        probe.heard[session].clear()  # what was said before the death was noticed
        probe.until(
            lambda: any(s.phase == "ready" and s.nodes["reward_node"] == "active" for s in probe.records(session, SessionStatus)[-1:]),
            "it is up again", also=look,
        )  # fmt: skip
        answer = probe.call(SetBool, f"/{SPACE}/intervention_node/engage", SetBool.Request(data=True))
        assert "no toggle device" in answer.message

        # ---- a node that somebody deactivates stays so until somebody wants it up again
        turn = lambda which: probe.call(  # noqa: E731
            ChangeState, f"/{SPACE}/reward_node/change_state", ChangeState.Request(transition=Transition(id=which))
        )
        assert turn(Transition.TRANSITION_DEACTIVATE).success
        told = lambda word: any(word in s.line for s in probe.records(session, SessionStatus)[-1:])  # noqa: E731
        probe.until(lambda: told("reward_node was deactivated by somebody else"), "the monitor has noticed", also=look)
        probe.spin(2.0)
        state = probe.call(GetState, f"/{SPACE}/reward_node/get_state", GetState.Request())
        assert state.current_state.label == "inactive"
        assert probe.call(Trigger, f"/{SPACE}/monitor_node/bringup", Trigger.Request()).success
        probe.until(
            lambda: any(s.phase == "ready" and s.nodes["reward_node"] == "active" for s in probe.records(session, SessionStatus)[-1:]),
            "bringup has it up again", also=look,
        )  # fmt: skip


def test_wrong_parameters_end_a_plain_node_with_code_78(tmp_path):
    import subprocess

    from graph_kit import own_domain

    from robot_rl.ros.starting import child_environment, command

    bad = spec("intervention_node", 0, robot="sim_arm", devices=["wand"], rat_hz=3.0)
    with own_domain():
        done = subprocess.run(command(bad, tmp_path), env=child_environment(bad), capture_output=True, text=True, timeout=90)
    assert done.returncode == 78
    assert "devices='wand': accepted are joy, spacemouse" in done.stderr
    assert "did you mean rate_hz?" in done.stderr
