"""The page in graph descriptions, and the verbs that start it."""

from __future__ import annotations

import json

import pytest

from robot_rl.cli import main
from robot_rl.ros.graph import GraphError, graph

GIVEN = {"robot": "sim_arm", "policy": "base", "run_dir": "run"}


def by_name(specs):
    return {s.executable: s for s in specs}


def test_the_page_is_one_more_device():
    plain = by_name(graph("session").build(GIVEN))
    assert "console_node" not in plain
    nodes = by_name(graph("session").build({**GIVEN, "console": "true", "console_port": "9000", "operator": "spacemouse"}))
    assert nodes["intervention_node"].params["devices"] == ["spacemouse", "console"]
    page = nodes["console_node"]
    assert page.params["http_port"] == 9000
    assert page.params["store"].endswith("run/store")
    assert page.params["http_bind"] == "127.0.0.1"
    assert "guide" not in page.params
    assert page.order < nodes["policy_node"].order
    alone = by_name(graph("session").build({**GIVEN, "console": "1", "operator": "none"}))
    assert alone["intervention_node"].params["devices"] == ["console"]
    with pytest.raises(GraphError, match="console_port:=x: accepted is an integer"):
        graph("session").build({**GIVEN, "console": "true", "console_port": "x"})


def test_a_guided_session_starts_its_episodes_itself():
    given = {**GIVEN, "guide": "true", "baseline_episodes": "5", "hands_off": "true", "reset_s": "1.5"}
    nodes = by_name(graph("sim_session").build(given))
    assert nodes["policy_node"].params["episode_mode"] == "manual", "the graph's own file says auto"
    page = nodes["console_node"].params
    assert (page["guide"], page["baseline_episodes"], page["comparison_episodes"]) == (True, 5, 20)
    assert (page["hands_off"], page["reset_s"], page["reset_service"]) == (True, 1.5, "sim_node/reset")
    assert by_name(graph("sim_session").build({**GIVEN, "console": "true"}))["policy_node"].params["episode_mode"] == "auto"


def test_the_verbs(capsys):
    words = [f"{k}:={v}" for k, v in GIVEN.items()]
    assert main(["session", *words, "--baseline", "3", "--comparison", "4", "--port", "0", "--print"]) == 0
    shown = json.loads(capsys.readouterr().out)
    page = next(n for n in shown["result"] if n["executable"] == "console_node")
    assert (page["params"]["baseline_episodes"], page["params"]["comparison_episodes"], page["params"]["http_port"]) == (
        3,
        4,
        0,
    )
    for words, what in (
        (["console"], "--sim RUN or --robot"),
        (["console", "--sim", "nowhere"], "folder of a run"),
        (["session", "--sim", "nowhere", "--comparison", "-1"], "comparison_episodes=-1"),
        (["session", "--sim", "nowhere", "robot:=ur"], "no graph"),
        (["session", "robot:=ur", "polcy:=x"], "did you mean policy"),
    ):
        assert main(words) == 2
        assert what in capsys.readouterr().err
