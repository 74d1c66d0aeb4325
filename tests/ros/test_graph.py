"""One description of every graph: what launch files and `robot-rl up` start is the same, and it is what the nodes declare."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from robot_rl.ros.graph import GRAPHS, SHIPPER, GraphError, graph
from robot_rl.ros.graph_names import ALL_NODES
from robot_rl.ros.parameters import check_overrides
from robot_rl.ros.starting import command, describe, parameter_file

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = sorted((ROOT / "launch").glob("*.launch.py"))
ARGUMENTS = [
    ("session", {"robot": "sim_arm", "policy": "base", "run_dir": "run"}),
    ("session", {"robot": "sim_arm", "policy": "base", "run_dir": "run", "recipe": "quickstart", "namespace": "cell/arm", "use_respawn": "0"}),
    ("session", {"robot": "sim_arm", "policy": "base", "run_dir": "run", "recipe": "quickstart", "learner_url": "http://l:8765", "operator": "joy,keyboard"}),
    ("sim_session", {"policy": "base", "run_dir": "run"}),
    ("sim_session", {"policy": "base", "run_dir": "run", "recipe": "quickstart", "seed": "7", "images": "jpeg", "realtime_factor": "5", "rewards": "environment,human", "fastdds_profile": "none"}),
    ("teleop_session", {"robot": "sim_arm", "run_dir": "run"}),
    ("teleop_session", {"robot": "sim_arm", "run_dir": "run", "env": "tabletop/Lift", "operator": "keyboard"}),
    ("learner", {"policy": "base", "run_dir": "run", "recipe": "quickstart", "robots": "arm_1,arm_2", "http_bind": "0.0.0.0", "token_file": "token"}),
    ("fleet", {"policy": "base", "run_dir": "run", "n": "3", "env": "tabletop/Lift", "recipe": "quickstart"}),
    ("fleet", {"policy": "base", "run_dir": "run", "robots": "left,right", "namespace": "hall", "params_file": "more.yaml", "rewards": "none"}),
]  # fmt: skip


# ---- launch files


@pytest.mark.parametrize("file", LAUNCH, ids=lambda f: f.name)
def test_launch_files_are_thin(file):
    assert file.name.endswith(".launch.py")
    name = file.name.removesuffix(".launch.py")
    assert name in GRAPHS
    body = ast.parse(file.read_text()).body
    doc, imported, function = body
    assert isinstance(doc, ast.Expr)
    assert isinstance(imported, ast.ImportFrom)
    assert isinstance(function, ast.FunctionDef)
    assert function.name == "generate_launch_description"
    assert ast.unparse(function.body[0]) == f"return to_launch_description('{name}')"
    assert len(function.body) == 1


def test_every_graph_has_a_launch_file():
    assert {f.name.removesuffix(".launch.py") for f in LAUNCH} == set(GRAPHS)


class Recorded:
    """Anything of the launch packages: keeps what it was made with."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


@pytest.fixture
def launch_double(monkeypatch):
    """A recording double of `launch` and `launch_ros`: executes launch files where ROS's packages are not installed."""
    made = {}
    for module, names in {
        "launch": ["LaunchDescription"],
        "launch.actions": ["DeclareLaunchArgument", "OpaqueFunction", "ExecuteProcess"],
        "launch_ros": [],
        "launch_ros.actions": ["Node"],
    }.items():
        double = types.ModuleType(module)
        for name in names:
            made[name] = type(name, (Recorded,), {})
            setattr(double, name, made[name])
        monkeypatch.setitem(sys.modules, module, double)
    return types.SimpleNamespace(**made)


def run_launch_file(name: str, given: dict[str, str], double) -> list[Recorded]:
    spec = importlib.util.spec_from_file_location(f"{name}_launch", ROOT / "launch" / f"{name}.launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (entities,) = module.generate_launch_description().args
    declared = {e.args[0]: e for e in entities if isinstance(e, double.DeclareLaunchArgument)}
    assert all(e.kwargs["description"] for e in declared.values())
    configurations = {n: e.kwargs["default_value"] for n, e in declared.items()} | given
    for n, value in configurations.items():
        assert value in declared[n].kwargs.get("choices", [value])
    (opaque,) = [e for e in entities if isinstance(e, double.OpaqueFunction)]
    context = types.SimpleNamespace(launch_configurations=configurations)
    return opaque.kwargs["function"](context, *opaque.kwargs["args"])


@pytest.mark.parametrize(("name", "given"), ARGUMENTS)
def test_launch_and_up_start_the_same(name, given, launch_double, tmp_path):
    specs = graph(name).build(given)
    actions = run_launch_file(name, given, launch_double)
    assert len(actions) == len(specs)
    for spec, action in zip(specs, actions, strict=True):
        words = command(spec, tmp_path)
        assert words[:3] == [sys.executable, "-m", spec.module]
        assert importlib.util.find_spec(spec.module) is not None, f"{spec.executable} is no module"
        assert action.kwargs["name"] == spec.name
        assert (action.kwargs["respawn"], action.kwargs["respawn_delay"]) == (spec.respawn, spec.respawn_delay)
        assert action.kwargs["additional_env"] == dict(spec.env)
        if spec.executable == SHIPPER:
            assert action.kwargs["cmd"] == words
            continue
        assert (action.kwargs["package"], action.kwargs["executable"]) == ("robot_rl", spec.executable)
        assert f"__node:={spec.name}" in words
        assert (f"__ns:=/{spec.namespace}" in words) is bool(spec.namespace)
        assert [f"{a}:={b}" for a, b in action.kwargs["remappings"]] == [
            w for w in words if ":=" in w and not w.startswith("__")
        ]
        files = [words[i + 1] for i, w in enumerate(words) if w == "--params-file"]
        assert files[:-1] == list(action.kwargs["parameters"][:-1])
        written = yaml.safe_load(Path(files[-1]).read_text())[spec.full_name]["ros__parameters"]
        assert written == {
            k: list(v) if isinstance(v, (list, tuple)) else v for k, v in action.kwargs["parameters"][-1].items()
        }


# ---- parameters


@pytest.mark.parametrize(("name", "given"), ARGUMENTS)
def test_every_parameter_is_declared_and_in_range(name, given):
    for spec in graph(name).build(given):
        if spec.executable == SHIPPER:
            continue
        table = ALL_NODES[spec.executable]
        _, findings = check_overrides(table.all_parameters, spec.params)
        assert findings == [], f"{spec.full_name}: {findings}"
        assert spec.managed is table.lifecycle
        for value in spec.params.values():
            assert value != ""


@pytest.mark.parametrize("file", sorted((ROOT / "configs/ros").glob("*.yaml")), ids=lambda f: f.name)
def test_parameter_files(file):
    for pattern, section in yaml.safe_load(file.read_text()).items():
        parameters = section["ros__parameters"]
        if pattern == "/**":
            tables = list(ALL_NODES.values())
        else:
            assert pattern.startswith("/**/"), f"{pattern}: a bare key does not match a namespaced node, silently"
            tables = [ALL_NODES[pattern.removeprefix("/**/")]]
        for table in tables:
            _, findings = check_overrides(table.all_parameters, parameters)
            assert findings == [], (file.name, pattern, findings)
        assert not any(isinstance(v, str) and v.startswith("/") for v in parameters.values())


def test_wrong_arguments_are_refused_all_at_once():
    with pytest.raises(GraphError) as refused:
        graph("sim_session").build({"sed": "1", "headless": "yes", "images": "png", "run_dir": "x"})
    message = str(refused.value)
    assert "did you mean seed?" in message
    assert "headless:=yes: accepted are true, false, 1, 0" in message
    assert "images:=png: accepted are raw, jpeg, both, off" in message
    assert "policy is empty" in message
    with pytest.raises(GraphError, match="did you mean sim_session"):
        graph("sim_sesion")
    with pytest.raises(GraphError, match="run_dir is empty"):
        graph("sim_session").build({"policy": "p"})
    with pytest.raises(GraphError, match="operator:=wand: accepted are none, joy"):
        graph("sim_session").build({"policy": "p", "run_dir": "x", "operator": "wand"})


# ---- what the graphs are


def names(given: dict[str, str], name: str) -> dict[str, object]:
    return {s.full_name: s for s in graph(name).build(given)}


def test_order_and_supervision(monkeypatch):
    monkeypatch.delenv("ROS_AUTOMATIC_DISCOVERY_RANGE", raising=False)
    nodes = graph("sim_session").build({"policy": "p", "run_dir": "r", "recipe": "quickstart"})
    assert [n.executable for n in nodes] == [
        "guard_node", "sim_node", "intervention_node", "monitor_node", "reward_node", "learner_node", "policy_node",
    ]  # fmt: skip
    by = {n.executable: n for n in nodes}
    assert by["guard_node"].respawn_delay == 0.2
    assert not by["sim_node"].respawn
    assert by["monitor_node"].params["managed"] == ["reward_node", "learner_node", "policy_node"]
    assert by["policy_node"].params["use_sim_time"] is True
    assert by["sim_node"].params["use_sim_time"] is False
    assert by["guard_node"].env["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"


def test_a_fleet_shares_one_learner_and_nothing_else():
    nodes = names({"policy": "p", "run_dir": "r", "n": "2", "env": "tabletop/Lift", "recipe": "quickstart"}, "fleet")
    assert {"/robot_0/policy_node", "/robot_1/policy_node", "/learner/learner_node", "/robot_1/sim_node"} <= set(nodes)
    assert ("weights", "/learner/weights") in nodes["/robot_1/policy_node"].remaps
    assert nodes["/learner/learner_node"].params["robots"] == ["robot_0", "robot_1"]
    stores = nodes["/learner/learner_node"].params["stores"]
    assert stores == [nodes[f"/robot_{i}/policy_node"].params["store"] for i in range(2)]
    assert not nodes["/robot_0/sim_node"].params["publish_clock"], "several physics cannot own one clock"
    seeds = {nodes[f"/robot_{i}/sim_node"].params["seed"] for i in range(2)}
    assert len(seeds) == 2


def test_a_learner_elsewhere_means_a_shipper_here():
    nodes = names(
        {"robot": "sim_arm", "policy": "p", "run_dir": "r", "recipe": "quickstart", "learner_url": "http://l:1"}, "session"
    )
    assert "/learner_node" not in nodes
    assert nodes["/policy_node"].params["weights_url"] == "http://l:1"
    assert nodes["/shipper"].arguments[1:3] == ("--url", "http://l:1")
    assert nodes["/shipper"].arguments[0] == nodes["/policy_node"].params["store"]


def test_the_description_is_json(tmp_path):
    nodes = graph("fleet").build({"policy": "p", "run_dir": "r", "env": "tabletop/Lift"})
    assert json.loads(json.dumps(describe(nodes)))[0]["node"] == nodes[0].full_name
    file = parameter_file(nodes[0], tmp_path)
    assert yaml.safe_load(file.read_text())[nodes[0].full_name]["ros__parameters"]["robot"] == "sim_arm"


READ = """
import json, sys
import rclpy
rclpy.init(args=sys.argv[1:])
node = rclpy.create_node("replaced", automatically_declare_parameters_from_overrides=True)
print(json.dumps([node.get_parameter(name).value for name in ("swap_at", "episode_mode", "warmup_forwards")]))
"""


@pytest.mark.parametrize("namespace", ["", "cell/arm"])
def test_launch_arguments_win_over_files_and_files_over_the_shipped_ones(ros, tmp_path, namespace):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "/**/policy_node:\n  ros__parameters: {swap_at: episode, episode_mode: service, warmup_forwards: 7}\n"
        "/**:\n  ros__parameters: {swap_at: episode}\n"
    )
    given = {
        "policy": "p",
        "run_dir": "r",
        "robot": "sim_arm",
        "swap_at": "chunk",
        "params_file": str(mine),
        "namespace": namespace,
    }
    spec = next(s for s in graph("session").build(given) if s.name == "policy_node")
    arguments = command(spec, tmp_path)[3:]
    done = subprocess.run([sys.executable, "-c", READ, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["chunk", "service", 7]


def test_every_node_is_an_entry_point():
    """`ros2 run` and launch files start what setuptools installs; `python -m` starts the module's own main."""
    import re

    scripts = dict(re.findall(r'^(\w+) = "([\w.:]+)"$', (ROOT / "pyproject.toml").read_text(), re.M))
    for name in ALL_NODES:
        assert scripts.get(name) == f"robot_rl.ros.executables:{name}"
        source = ast.parse((ROOT / "robot_rl" / "ros" / f"{name}.py").read_text())
        assert any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in source.body)


def test_no_node_is_started_that_is_not_in_the_table():
    for name, given in ARGUMENTS:
        for spec in graph(name).build(given):
            assert spec.executable in {*ALL_NODES, SHIPPER}
