"""The floors of docs/architecture.md, kept by looking at every import."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "robot_rl"

# Importing these takes seconds, or they belong to an extra; only functions may import them.
LAZY = {
    "lerobot", "robosuite", "gymnasium_robotics", "matplotlib", "cv2", "wandb", "pandas", "pyarrow",
    "transformers", "peft", "ray", "accelerate", "starlette", "uvicorn", "websockets", "grpc", "mcap", "rosbags",
}  # fmt: skip
ROS = {
    "rclpy", "std_msgs", "std_srvs", "sensor_msgs", "geometry_msgs", "trajectory_msgs", "diagnostic_msgs", "lifecycle_msgs",
    "rosgraph_msgs", "rcl_interfaces", "builtin_interfaces", "control_msgs", "launch", "launch_ros",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str
    at_import_time: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def _imports(file: Path) -> Iterator[Import]:
    package = [*file.relative_to(ROOT).parts[:-1]]

    def visit(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, alias.name, top)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                name = ".".join([*base, *([child.module] if child.module else [])])
                # `from robot_rl import seeding` imports a room, `from robot_rl.types import Step` a name of one.
                for alias in child.names if name == "robot_rl" else child.names[:1]:
                    yield Import(file, child.lineno, f"{name}.{alias.name}" if name == "robot_rl" else name, top)
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, top and not function and not typing_only)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), True)


def _modules() -> list[Path]:
    return sorted(f for f in PACKAGE.rglob("*.py") if "__pycache__" not in f.parts)


# Compiled together with robosuite's own functions; its neighbours import it when an environment is made.
LOADED_ON_DEMAND = {PACKAGE / "sim/robosuite/kernel.py"}

ALL = [i for file in _modules() for i in _imports(file)]


def _floors() -> dict[str, int]:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.M)
    return {re.sub(r"(\.py|/)$", "", name): int(floor) for floor, names in rows for name in re.findall(r"`([^`]+)`", names)}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _room_of_file(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def test_every_room_has_a_floor():
    rooms = {_room_of_file(file) for file in _modules()} - {""}
    assert rooms <= set(_floors()), f"docs/architecture.md gives no floor to {sorted(rooms - set(_floors()))}"


def test_rooms_import_only_lower_floors():
    floors = _floors()
    wrong = []
    for found in ALL:
        source, target = _room_of_file(found.file), _room(found.module)
        if not found.module.startswith("robot_rl") or not source or not target or source == target or target not in floors:
            continue
        same_ground = floors[source] == floors[target] == 0
        if floors[target] >= floors[source] and not same_ground:
            wrong.append(f"{found} (floor {floors[source]} imports floor {floors[target]})")
    assert not wrong, "\n".join(wrong)


def test_only_ros_imports_ros():
    wrong = [str(i) for i in ALL if i.module.split(".")[0] in ROS and _room_of_file(i.file) != "ros"]
    assert not wrong, "\n".join(wrong)


def test_heavy_and_optional_packages_are_imported_by_functions_only():
    at_home = {"console": {"starlette", "uvicorn", "websockets"}}
    wrong = [
        str(i)
        for i in ALL
        if i.at_import_time
        and i.file not in LOADED_ON_DEMAND
        and (name := i.module.split(".")[0]) in LAZY
        and name not in at_home.get(_room_of_file(i.file), set())
    ]
    assert not wrong, "\n".join(wrong)


def test_no_pickles_are_loaded():
    wrong = [str(i) for i in ALL if i.module.split(".")[0] in {"pickle", "cPickle", "dill", "joblib", "cloudpickle"}]
    for file in _modules():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                wrong += [
                    f"{file.relative_to(ROOT)}:{node.lineno} {keyword.arg}={ast.unparse(keyword.value)}"
                    for keyword in node.keywords
                    if (keyword.arg, ast.unparse(keyword.value)) in {("allow_pickle", "True"), ("weights_only", "False")}
                ]
    assert not wrong, "\n".join(wrong)


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_cheap():
    heavy = ["torch", "mujoco", "robosuite", "lerobot", "zarr", "gymnasium", "diffusers", "rich"]
    modules = "robot_rl, robot_rl.types, robot_rl.config, robot_rl.paths, robot_rl.doctor, robot_rl.cli"
    code = f"import sys, {modules}; print([m for m in {heavy!r} if m in sys.modules])"
    assert _python(code) == "[]"


def test_reading_a_configuration_and_watching_a_learner_need_no_torch():
    """A mistake in a file is told at once, and the node beside the learner stays small."""
    modules = (
        "robot_rl.training.config, robot_rl.training.learner_process, robot_rl.training.run_folder, robot_rl.runtime.weights"
    )
    assert _python(f"import sys, {modules}; print('torch' in sys.modules)") == "False"


def test_every_module_imports_by_itself_without_extras():
    chosen = [f for f in _modules() if f.name != "__main__.py" and f not in LOADED_ON_DEMAND]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in chosen]
    names = [n.removesuffix(".__init__") for n in names if _room(n) not in ("ros", "console")]
    needs = {name for name in LAZY if importlib.util.find_spec(name) is not None}
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(sorted(m for m in {sorted(needs & {"lerobot", "robosuite", "matplotlib", "cv2", "wandb", "ray"})!r} if m in sys.modules))
"""
    assert _python(code) == "[]"


@pytest.mark.skipif(not (PACKAGE / "ros").is_dir(), reason="this checkout has no ros room")
def test_ros_is_left_alone_by_every_other_room():
    wrong = [str(i) for i in ALL if _room(i.module) == "ros" and _room_of_file(i.file) not in ("ros", "cli", "console")]
    assert not wrong, "\n".join(wrong)
