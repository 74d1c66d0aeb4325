"""One source of metadata for pip, wheels and colcon; shipped files are found in every install; set-up survives kills."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

import robot_rl
from robot_rl import paths

ROOT = Path(__file__).resolve().parents[1]

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _load(path: Path, name: str) -> ModuleType:
    from importlib.machinery import SourceFileLoader

    spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------------------------- metadata


@pytest.fixture
def setup_arguments(tmp_path, monkeypatch) -> dict[str, Any]:
    """What setup.py passes on in a colcon symlink build: a link in a folder without pyproject.toml."""
    link = tmp_path / "setup.py"
    link.symlink_to(ROOT / "setup.py")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
    monkeypatch.chdir(tmp_path)
    _load(link, "robot_rl_setup")
    return seen


def test_setup_py_says_what_pyproject_says(setup_arguments):
    assert setup_arguments["name"] == PROJECT["name"] == "robot_rl"
    assert setup_arguments["version"] == PROJECT["version"]
    assert setup_arguments["install_requires"] == PROJECT["dependencies"]
    assert setup_arguments["extras_require"] == PROJECT["optional-dependencies"]
    assert setup_arguments["python_requires"] == PROJECT["requires-python"]
    scripts = dict(entry.split(" = ") for entry in setup_arguments["entry_points"]["console_scripts"])
    assert scripts == PROJECT["scripts"]
    assert {"ros", "vla", "scale", "console", "test", "dev"} <= set(setup_arguments["extras_require"])
    assert any(r.startswith("pytest") for r in PROJECT["optional-dependencies"]["test"]), "else colcon test finds no tests"


def test_every_package_and_data_file_is_named(setup_arguments):
    packages = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "robot_rl").rglob("__init__.py")}
    assert set(setup_arguments["packages"]) == packages
    files = dict(setup_arguments["data_files"])
    assert files["share/ament_index/resource_index/packages"] == ["resource/robot_rl"]
    assert files["share/robot_rl"] == ["package.xml"]
    shipped = {source for sources in files.values() for source in sources}
    assert not [s for s in shipped if Path(s).is_absolute()], "setuptools wants paths relative to the project"
    for folder in paths.FOLDERS:
        tracked = [f for f in (ROOT / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts and f.name[0] != "."]
        assert {f.relative_to(ROOT).as_posix() for f in tracked} <= shipped
    for target, sources in files.items():
        for source in sources:
            if source.split("/")[0] in paths.FOLDERS:
                assert target == f"share/robot_rl/{Path(source).parent.as_posix()}"


def test_entry_points_exist():
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), target
        if module == "robot_rl.ros.executables":  # the node itself cannot be imported where ROS is not installed
            tree = ast.parse((ROOT / f"robot_rl/ros/{function}.py").read_text(encoding="utf-8"))
            assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def test_one_version_everywhere():
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    assert package.findtext("version") == PROJECT["version"] == robot_rl.__version__


def test_package_xml_is_format_3_for_ament_python():
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    assert package.tag == "package"
    assert package.get("format") == "3"
    assert package.findtext("name") == "robot_rl"
    assert package.findtext("export/build_type") == "ament_python"
    assert package.findtext("license") == PROJECT["license"] == "Apache-2.0"
    # REP-149: the order of these elements is fixed by the schema.
    tags = [child.tag for child in package]
    first = [t for t in tags if t in ("name", "version", "description", "maintainer", "license", "author")]
    assert first == ["name", "version", "description", "maintainer", "license", "author"]
    depends = {e.text for e in package if e.tag.endswith("depend")}
    assert {"rclpy", "launch_ros", "lifecycle_msgs", "python3-pytest"} <= depends
    assert not depends & {"torch", "lerobot", "mujoco", "python3-torch"}, "rosdep would install them as root"


def test_licence_is_the_whole_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "9. Accepting Warranty or Additional Liability" in text


# -------------------------------------------------------------------------------------------------------------- lock files


def _pins(name: str) -> dict[str, list[str]]:
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    pins: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, _, hashes = line.partition(" --hash=")
        assert "sha256:" in hashes, f"{name}: {requirement} has no hash"
        parsed = Requirement(requirement)
        pins.setdefault(parsed.name.lower(), []).append(str(parsed.specifier).removeprefix("=="))
    return pins


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-all.lock"])
def test_lock_files_hold_what_the_project_asks_for(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"https?://|file:|@ |--(?!hash)|\+cpu|^-", text, re.M)
    pins = _pins(name)
    extras = ("test", "dev") if name == "requirements.lock" else tuple(PROJECT["optional-dependencies"])
    wanted = [*PROJECT["dependencies"], *(r for e in extras for r in PROJECT["optional-dependencies"][e])]
    for requirement in map(Requirement, wanted):
        if requirement.name == "opencv-python":
            continue
        versions = pins[requirement.name.lower()]
        assert any(requirement.specifier.contains(v) for v in versions), f"{requirement}: locked at {versions}"
    assert "opencv-python" not in pins, "only one provider of cv2"
    assert "evdev" not in pins, "a bare machine cannot build it"
    assert "setuptools" in pins, "the editable install is built without isolation"


def test_both_locks_agree():
    core, everything = _pins("requirements.lock"), _pins("requirements-all.lock")
    assert {n: v for n, v in everything.items() if n in core} == core


# ------------------------------------------------------------------------------------------------------------------ README


def _sh_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_readme_commands_exist():
    run, tests = (block.strip() for block in _sh_blocks()[:2])
    for command in (run, tests):
        assert "\n" not in command, "one line each"
        assert command.split()[:2] == ["python3", "bootstrap"]
    assert tests.split()[2] == "test"
    from robot_rl.cli import VERBS

    assert run.split()[2] in VERBS
    assert (ROOT / run.split("--config", 1)[1].split()[0].strip("=")).is_file()


def test_readme_lists_every_verb_and_its_links_lead_somewhere():
    from robot_rl.cli import VERBS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in VERBS:
        assert re.search(rf"^\| .*`(robot-rl )?{verb}\b.*\|", text, re.M), f"{verb} is not in README's table"
    for document in ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]:
        content = (ROOT / document).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", content):
            assert ((ROOT / document).parent / link).exists(), f"{document} links to {link}"


def test_ci_runs_the_readme_test_command():
    printed = subprocess.run([ROOT / ".ci/run", "--print"], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == _sh_blocks()[1].strip()


# ----------------------------------------------------------------------------------------------------------------- paths


def test_shipped_files_are_found_in_a_checkout(monkeypatch):
    monkeypatch.delenv("ROBOT_RL_SHARE", raising=False)
    assert paths.share() == ROOT
    assert paths.find("configs") == ROOT / "configs"
    with pytest.raises(ValueError, match="folder='assets': accepted are configs, sim_assets, launch"):
        paths.find("assets")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        paths.find("configs", "no-such.yaml")


def _fake_share(folder: Path) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "here.yaml").write_text("task: x\n")
    (folder / "package.xml").write_text("<package/>")
    return folder


def _share_of(code_root: Path, **environment: str) -> str:
    """Where a copy of the package outside the checkout finds its files."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ROBOT_RL_SHARE")}
    code = "import robot_rl, robot_rl.paths as p; print(p.share()); print(robot_rl.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=code_root,
        env={**env, "PYTHONPATH": str(code_root), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found, file = done.stdout.split("\n")[:2]
    assert Path(file).is_relative_to(code_root)
    return found


def _copy_of_package(folder: Path) -> Path:
    (folder / "robot_rl").mkdir(parents=True)
    for name in ("__init__.py", "paths.py"):
        shutil.copy(ROOT / "robot_rl" / name, folder / "robot_rl" / name)
    return folder


def test_shipped_files_are_found_in_a_prefix(tmp_path):
    """pip install --prefix, wheels in a virtual environment, and colcon's install folder have this layout."""
    site = _copy_of_package(tmp_path / "prefix/lib/python3.11/site-packages")
    share = _fake_share(tmp_path / "prefix/share/robot_rl")
    assert _share_of(site) == str(share)


def test_shipped_files_are_found_through_ament(tmp_path):
    code = _copy_of_package(tmp_path / "code")
    share = _fake_share(tmp_path / "elsewhere/share/robot_rl")
    (code / "ament_index_python").mkdir()
    (code / "ament_index_python/__init__.py").write_text("")
    (code / "ament_index_python/packages.py").write_text(
        "class PackageNotFoundError(KeyError): pass\n"
        f"def get_package_share_directory(name):\n    assert name == 'robot_rl'\n    return {str(share)!r}\n"
    )
    assert _share_of(code) == str(share)


def test_share_can_be_given(tmp_path):
    code = _copy_of_package(tmp_path / "code")
    share = _fake_share(tmp_path / "given")
    assert _share_of(code, ROBOT_RL_SHARE=str(share)) == str(share)


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    share = _fake_share(tmp_path / "share")
    monkeypatch.setenv("ROBOT_RL_SHARE", str(share))
    monkeypatch.chdir(tmp_path)
    wanted = share / "configs" / "here.yaml"
    assert paths.find_config("here") == paths.find_config("here.yaml") == paths.find_config("configs/here.yaml") == wanted
    with pytest.raises(FileNotFoundError, match=r"'there' not found; shipped ones are here\.yaml"):
        paths.find_config("there")


# -------------------------------------------------------------------------------------------------------------- bootstrap

FAKE_UV = """#!/bin/sh
echo "$@" >> "$LOG"
case "$1 $2" in
  "--version ") echo "uv 1.0.0"; exit 0;;
esac
if [ "$1" = venv ]; then
  for last; do :; done
  mkdir -p "$last/bin"
  printf '#!/bin/sh\\nexec "%s" "$@"\\n' "$REAL" > "$last/bin/python"
  chmod +x "$last/bin/python"
fi
case "$*" in *--require-hashes*) [ -n "$SLOW" ] && sleep 30; [ -n "$BROKEN" ] && { echo "no such wheel" >&2; exit 1; };; esac
exit 0
"""


@pytest.fixture
def sandbox(tmp_path):
    """A checkout whose `uv` only writes down what it was asked for."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("bootstrap", "requirements.lock", "pyproject.toml", "setup.py", "setup.cfg"):
        shutil.copy(ROOT / name, folder / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "uv").write_text(FAKE_UV)
    (tools / "uv").chmod(0o755)
    # What pyenv leaves on PATH for versions that are not installed.
    (tools / "python3.11").write_text("#!/bin/sh\nexit 127\n")
    (tools / "python3.11").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(tmp_path / "uv.log"),
        "REAL": sys.executable,
        "ROBOT_RL_NO_APT": "1",
        "MUJOCO_GL": "disable",
    }
    environment.pop("ROBOT_RL_VENV", None)
    return folder, environment, tmp_path / "uv.log"


def _bootstrap(sandbox, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    folder, environment, _ = sandbox
    command = [sys.executable, str(folder / "bootstrap"), *arguments]
    return subprocess.run(command, env={**environment, **extra}, capture_output=True, text=True, timeout=60)


def _asked(sandbox) -> list[str]:
    log = sandbox[2]
    lines = [line for line in log.read_text().splitlines() if not line.startswith("--version")] if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_bootstrap_can_be_read_by_old_pythons():
    ast.parse((ROOT / "bootstrap").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_bootstrap_sets_up_once(sandbox):
    assert _bootstrap(sandbox, "setup").returncode == 0
    asked = _asked(sandbox)
    assert [line.split()[0] for line in asked] == ["venv", "pip", "pip"]
    assert "--require-hashes" in asked[1]
    assert "requirements.lock" in asked[1]
    assert "-e" in asked[2]
    assert (sandbox[0] / ".venv" / "COLCON_IGNORE").exists()
    assert _bootstrap(sandbox, "setup").returncode == 0
    assert _asked(sandbox) == [], "the second call starts at once"
    with (sandbox[0] / "requirements.lock").open("a") as lock:
        lock.write("\n")
    assert _bootstrap(sandbox, "setup").returncode == 0
    assert [line.split()[0] for line in _asked(sandbox)] == ["pip", "pip"], "a new lock file updates the same environment"


def test_bootstrap_starts_over_after_a_kill(sandbox):
    folder, environment, log = sandbox
    command = [sys.executable, str(folder / "bootstrap"), "setup"]
    process = subprocess.Popen(command, env={**environment, "SLOW": "1"}, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (log.exists() and "--require-hashes" in log.read_text()):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _asked(sandbox)
    assert _bootstrap(sandbox, "setup").returncode == 0
    assert [line.split()[0] for line in _asked(sandbox)] == ["venv", "pip", "pip"], "a half-filled environment is not trusted"


def test_bootstrap_reports_a_failed_install_and_tries_again(sandbox):
    failed = _bootstrap(sandbox, "setup", BROKEN="1")
    assert failed.returncode == 1
    assert "no such wheel" in failed.stderr
    assert "the same command tries again" in failed.stderr
    assert _bootstrap(sandbox, "setup").returncode == 0


def test_bootstrap_runs_the_command_in_the_environment(sandbox):
    folder, _, _ = sandbox
    assert _bootstrap(sandbox, "setup").returncode == 0
    script = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['VIRTUAL_ENV']])); sys.exit(7)"
    (folder / ".venv" / "bin" / "robot-rl").write_text(script)
    done = _bootstrap(sandbox, "train", "--config", "a b.yaml")
    assert done.returncode == 7
    assert json.loads(done.stdout) == [["train", "--config", "a b.yaml"], str(folder / ".venv")]


def test_bootstrap_waits_for_another_set_up(sandbox):
    folder, environment, _ = sandbox
    command = [sys.executable, str(folder / "bootstrap"), "setup"]
    pair = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait(timeout=60) for p in pair] == [0, 0]
    assert [line.split()[0] for line in _asked(sandbox)] == ["venv", "pip", "pip"], "one of them installed, the other waited"


# ---------------------------------------------------------------------------------------------------------- real builds


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout as git sees it, with one nested file in each shipped folder."""
    folder = tmp_path_factory.mktemp("src") / "robot_rl"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for shipped in paths.FOLDERS:
        (folder / shipped / "probe" / "deep").mkdir(parents=True)
        (folder / shipped / "probe" / "deep" / "file.yaml").write_text("a: 1\n")
    return folder


def _quiet(command: list[str], cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**env, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def _check_install(prefix: Path, python: str = sys.executable) -> None:
    for shipped in paths.FOLDERS:
        assert (prefix / "share" / "robot_rl" / shipped / "probe" / "deep" / "file.yaml").is_file()
    assert (prefix / "share/ament_index/resource_index/packages/robot_rl").exists()
    assert (prefix / "share/robot_rl/package.xml").exists()


@pytest.mark.slow
def test_sdist_and_wheel_install_into_a_prefix(tree, tmp_path):
    """sdist, then wheel from the sdist, then the wheel unpacked the way pip does it."""
    build = "from setuptools import build_meta as b; import sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    _quiet([sys.executable, "-c", build, "build_sdist", str(tmp_path)], tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "sdist")
    (source,) = (tmp_path / "sdist").iterdir()
    assert (source / "bootstrap").exists()
    assert (source / "requirements.lock").exists()
    _quiet([sys.executable, "-c", build, "build_wheel", str(tmp_path)], source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"robot_rl-{PROJECT['version']}-py3-none-any.whl"
    installer = [shutil.which("uv"), "pip"] if shutil.which("uv") else [sys.executable, "-m", "pip"]
    prefix = tmp_path / "prefix"
    _quiet([*installer, "install", "--no-deps", "--prefix", str(prefix), str(wheel)], tmp_path)
    _check_install(prefix)
    (site,) = prefix.glob("lib/python3*/site-packages")
    entry_points = next(site.glob("robot_rl-*.dist-info")) / "entry_points.txt"
    assert "robot-rl = robot_rl.cli:main" in entry_points.read_text()
    assert (site / "robot_rl" / "py.typed").exists()
    assert (prefix / "bin" / "robot-rl").exists()
    code = "import robot_rl.paths as p; print(p.find('sim_assets', 'probe', 'deep', 'file.yaml'))"
    found = _quiet([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site)).strip()
    assert found == str(prefix / "share/robot_rl/sim_assets/probe/deep/file.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("symlink", [False, True], ids=["build", "symlink-install"])
def test_colcon_build(tree, tmp_path, symlink):
    pytest.importorskip("colcon_core", reason="pip install colcon-core colcon-ros colcon-python-setup-py")
    pytest.importorskip("colcon_ros", reason="pip install colcon-ros")
    options = ["--symlink-install"] if symlink else []
    _quiet([sys.executable, "-m", "colcon", "build", "--base-paths", str(tree), *options], tmp_path)
    prefix = tmp_path / "install" / "robot_rl"
    _check_install(prefix)
    assert (prefix / "lib" / "robot_rl" / "robot-rl").exists(), "where ros2 run looks"
    (site,) = [p for p in prefix.glob("lib/python3*/site-packages")]
    build = tmp_path / "build" / "robot_rl"
    code = "import robot_rl.paths as p; print(p.find('configs', 'probe', 'deep', 'file.yaml').read_text())"
    where = os.pathsep.join([str(site), *([str(build)] if symlink else [])])
    assert _quiet([sys.executable, "-c", code], tmp_path, PYTHONPATH=where).strip() == "a: 1"
