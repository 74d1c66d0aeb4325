"""The whole graph as `robot-rl up` starts it: sim, guard, policy, learner, reward, intervention and monitor as processes on real DDS."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")

from diagnostic_msgs.msg import DiagnosticArray
from graph_kit import running
from session_kit import train_base, write_recipe
from std_srvs.srv import SetBool, Trigger

from robot_rl.replay import EpisodeStore
from robot_rl.ros import qos
from robot_rl.ros.graph import graph
from robot_rl.wire import EpisodeStatus, SessionStatus, WeightsNotice

PATIENCE_S = 900.0
RISE_S = 2400.0
BLOCK, GOAL = 50, 45


@pytest.mark.slow
def test_episodes_flow_the_learner_publishes_and_the_policy_acts_on_it(tmp_path):
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    base = train_base(run, recipe)
    given = {
        "policy": str(base), "run_dir": str(run), "recipe": str(recipe), "operator": "joy", "gate": "false", "http_port": "0",
        "params_file": str(tmp_path / "parameters.yaml"), "max_episode_s": "4", "realtime_factor": "0",
    }  # fmt: skip
    specs = graph("sim_session").build(given)
    assert {s.executable for s in specs} >= {
        "sim_node",
        "guard_node",
        "policy_node",
        "learner_node",
        "reward_node",
        "intervention_node",
    }
    with running(specs) as (supervisor, probe, _):
        look = supervisor.look
        for topic in ("episode_status", "weights", "session_status"):
            probe.listen(DiagnosticArray, f"/{topic}", qos.STATE)
        committed = lambda: {s.episode_id: s for s in probe.records("/episode_status", EpisodeStatus) if s.state == "committed"}  # noqa: E731
        probe.until(lambda: len(committed()) >= 2, "episodes are committed", PATIENCE_S, look)
        notice = probe.until(lambda: probe.records("/weights", WeightsNotice), "weights are published", PATIENCE_S, look)[0]
        assert notice.which == "promoted"
        assert notice.version >= 1
        probe.until(
            lambda: any((s.weights_version or 0) >= 1 for s in committed().values()), "an episode with a head", PATIENCE_S, look
        )
        phases = {s.phase for s in probe.records("/session_status", SessionStatus)}
        assert "running" in phases
        # The operator's services answer while everything runs.
        assert probe.call(Trigger, "/learner_node/checkpoint", Trigger.Request()).success
        assert probe.call(Trigger, "/learner_node/rollback", Trigger.Request()).success
        seen = len(probe.records("/weights", WeightsNotice))
        probe.until(lambda: probe.records("/weights", WeightsNotice)[-1].version == 0 or len(probe.records("/weights", WeightsNotice)) > seen,
                    "the rollback is announced", also=look)  # fmt: skip
        assert probe.call(SetBool, "/learner_node/pause", SetBool.Request(data=True)).success
        assert {n: p.restarts for n, p in supervisor.processes.items() if p.restarts} == {}
        ids = list(committed())
    with EpisodeStore.open(run / "store") as store:
        known = [store.meta(i) for i in ids if i in store]
        assert len(known) >= 2
        assert any(m.success is not None for m in known), "rewards arrive as verdicts"
        with_head = [m for m in known if m.weights_version >= 1]
        assert with_head
        episode = store.read(with_head[0].episode_id)
        assert (episode.weights_version[episode.decision_id >= 0] >= 0).all()
        assert episode.weights_version.max() >= 1
        assert any(e.source == "label" for i in ids for e in store.rewards(i))
    status = json.loads((run / "learner" / "status.json").read_bytes())
    assert status["version"] >= 1
    assert status["episodes"] >= 2
    assert status["error"] == ""


def verdicts(store: Path) -> list[tuple[bool, int]]:
    """(success, version of the head) of every episode with a verdict, oldest first."""
    if not (store / "store.json").exists():
        return []
    with EpisodeStore.open(store) as opened:
        metas = [opened.meta(i) for i in opened.episode_ids()]
    return [(bool(m.success), m.weights_version) for m in metas if m.success is not None]


@pytest.mark.slow
def test_success_rises_from_the_base_policys_to_ninety_per_cent_while_the_graph_runs(tmp_path):
    from robot_rl.paths import find_config

    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(f"extends: {find_config('quickstart')}\ndemos: {{prefill: false}}\n")
    given = {
        "policy": str(train_base(run, recipe)), "run_dir": str(run), "recipe": str(recipe), "operator": "joy", "gate": "false",
        "http_port": "0", "max_episode_s": "5",
    }  # fmt: skip
    with running(graph("sim_session").build(given)) as (supervisor, _, _):
        end = time.monotonic() + RISE_S
        while sum(s for s, _ in verdicts(run / "store")[-BLOCK:]) < GOAL:
            assert time.monotonic() < end, verdicts(run / "store")
            supervisor.look()
            time.sleep(1.0)
        restarts = {n: p.restarts for n, p in supervisor.processes.items() if p.restarts}
    found = verdicts(run / "store")
    base = [success for success, version in found if version == 0]
    assert len(base) >= 20
    assert sum(base) <= 0.6 * len(base), "the base policy left something to learn"
    assert found[-1][1] > 0
    assert restarts == {}
