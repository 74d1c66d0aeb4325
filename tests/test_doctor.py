"""The doctor names what is wrong and how to mend it, and never dies of a broken check."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from robot_rl import cli, doctor


def _levels(findings) -> list[str]:
    return [f.level for f in findings]


def test_two_cv2_providers_of_different_versions_are_an_error(monkeypatch):
    versions = {"opencv-python": "5.0.0", "opencv-python-headless": "4.11.0.86"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    (finding,) = doctor.check_cv2()
    assert finding.level == "error"
    assert "opencv-python 5.0.0, opencv-python-headless 4.11.0.86" in finding.text
    assert "uninstall -y opencv-python opencv-python-headless" in finding.fix
    versions["opencv-python"] = "4.11.0.86"
    assert _levels(doctor.check_cv2()) == ["ok"], "the same version twice writes the same files"
    versions.clear()
    assert _levels(doctor.check_cv2()) == ["error"]


def test_package_versions_are_held_against_what_the_project_asks_for(monkeypatch):
    asked = [
        "numpy>=1.26,<3",
        "torch>=2.4",
        "opencv-python==4.11.0.86",
        "ray>=2; extra == 'scale'",
        "nothing; python_version < '3'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    have = {"numpy": "1.20.0", "torch": "2.10.0", "opencv-python-headless": "4.11.0.86"}
    monkeypatch.setattr(doctor, "_version", have.get)
    (finding,) = doctor.check_packages()
    assert finding.level == "error"
    assert finding.text == "numpy 1.20.0; numpy<3,>=1.26 is needed"
    assert "pip install 'numpy<3,>=1.26'" in finding.fix
    have["numpy"] = "2.4.6"
    assert _levels(doctor.check_packages()) == ["ok"]


def _prefix_with_rclpy(folder: Path) -> Path:
    (folder / "lib/python3.12/site-packages/rclpy").mkdir(parents=True)
    (folder / "lib/python3.12/site-packages/rclpy/__init__.py").write_text("")
    return folder


@pytest.fixture
def ros(monkeypatch, tmp_path):
    """Pretend where rclpy comes from and which wheels are installed."""
    state = SimpleNamespace(origin=None, wheels=[])
    real = importlib.util.find_spec

    def find_spec(name: str):
        if name == "rclpy":
            return SimpleNamespace(origin=str(state.origin)) if state.origin else None
        return real(name)

    monkeypatch.setattr(doctor.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda: [SimpleNamespace(name=n) for n in state.wheels])
    monkeypatch.delenv("AMENT_PREFIX_PATH", raising=False)
    monkeypatch.delenv("_ROS_WHEELS_BOOTSTRAP_COMPLETE", raising=False)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stderr="", stdout=""))
    return state


def test_no_ros_is_fine(ros):
    assert _levels(doctor.check_ros()) == ["ok"]


def test_wheels_beside_a_sourced_ros_are_an_error(ros, tmp_path, monkeypatch):
    opt = _prefix_with_rclpy(tmp_path / "opt/ros/jazzy")
    monkeypatch.setenv("AMENT_PREFIX_PATH", os.pathsep.join([str(tmp_path / "ws/install"), str(opt)]))
    ros.origin, ros.wheels = tmp_path / "venv/site-packages/rclpy/__init__.py", ["ros-jazzy-rclpy", "numpy"]
    (finding,) = doctor.check_ros()
    assert finding.level == "error"
    assert "ros-jazzy-rclpy" in finding.text
    assert str(opt) in finding.text
    ros.wheels = []
    (finding,) = doctor.check_ros()
    assert finding.level == "error", "an rclpy from elsewhere shadows the sourced one"
    ros.origin = opt / "lib/python3.12/site-packages/rclpy/__init__.py"
    assert _levels(doctor.check_ros()) == ["ok"]


def test_wheels_alone_are_fine_until_their_mark_is_inherited(ros, tmp_path, monkeypatch):
    ros.origin, ros.wheels = tmp_path / "venv/site-packages/rclpy/__init__.py", ["ros-jazzy-rclpy"]
    assert _levels(doctor.check_ros()) == ["ok"]
    monkeypatch.setenv("_ROS_WHEELS_BOOTSTRAP_COMPLETE", "1")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    (finding,) = doctor.check_ros()
    assert finding.level == "error"
    assert finding.fix == "unset _ROS_WHEELS_BOOTSTRAP_COMPLETE"


def test_a_sourced_ros_that_this_python_cannot_see(ros, tmp_path, monkeypatch):
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(_prefix_with_rclpy(tmp_path / "ros")))
    (finding,) = doctor.check_ros()
    assert finding.level == "warn"
    assert "system-site-packages" in finding.fix


def test_fix_links_scripts_for_ros2_run(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "robot-rl").write_text("#!/bin/sh\n")
    entry = SimpleNamespace(name="robot-rl", group="console_scripts")
    monkeypatch.setattr(doctor.importlib.metadata, "distribution", lambda name: SimpleNamespace(entry_points=[entry]))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("AMENT_PREFIX_PATH", "/opt/ros/jazzy")
    (finding,) = doctor.check_ros_scripts()
    assert (finding.level, finding.fix) == ("warn", "robot-rl doctor --fix")
    assert _levels(doctor.check_ros_scripts(fix=True)) == ["ok"]
    assert (tmp_path / "lib/robot_rl/robot-rl").read_text() == "#!/bin/sh\n"
    assert _levels(doctor.check_ros_scripts()) == ["ok"]


def test_gl_backends_are_really_tried(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(doctor, "render_once", lambda backend: 1.0 if backend == "egl" else "library not found")
    findings = list(doctor.check_gl())
    assert _levels(findings) == ["ok", "error"]
    assert findings[1].fix == "export MUJOCO_GL=egl"
    monkeypatch.setattr(doctor, "render_once", lambda backend: "library not found")
    monkeypatch.delenv("MUJOCO_GL")
    (finding,) = doctor.check_gl()
    assert finding.level == "error"
    assert "apt-get install libegl1" in finding.fix


def test_render_once_reports_a_backend_that_does_not_exist():
    result = doctor.render_once("nonsense")
    assert isinstance(result, str)
    assert "nonsense" in result


@pytest.mark.skipif(not doctor.has_library("libEGL.so.1"), reason="no EGL library on this machine")
def test_render_once_renders():
    assert isinstance(doctor.render_once("egl"), float)


def test_choose_gl(monkeypatch):
    monkeypatch.setattr(doctor, "has_library", lambda name: name == "libOSMesa.so.8")
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("MUJOCO_GL", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert doctor.choose_gl() == "glfw", "a choice that was made is kept"
    monkeypatch.delenv("MUJOCO_GL")
    assert doctor.choose_gl() == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("DISPLAY", ":0")
    assert doctor.choose_gl() == ""


def test_disk_that_cannot_be_written(tmp_path, monkeypatch):
    assert all(f.level in ("ok", "warn") for f in doctor.check_disk(tmp_path / "not" / "yet"))

    def refuse(**kwargs):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert _levels(doctor.check_disk(tmp_path))[-1] == "error"


def test_more_threads_than_cores_is_a_warning(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(doctor, "_cgroup_cores", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    finding = next(doctor.check_cpu())
    assert (finding.level, finding.fix) == ("warn", "export OMP_NUM_THREADS=2")


def test_a_broken_check_is_a_finding_and_the_exit_code_says_so(monkeypatch, capsys):
    def broken():
        raise OSError("driver crashed")
        yield

    # Nothing of this machine may speak up: a nearly full disk is a warning of its own.
    for name in ("check_python", "check_packages", "check_torch", "check_gl", "check_ros_scripts", "check_disk", "check_cpu"):
        monkeypatch.setattr(doctor, name, lambda *a, **k: iter([doctor.Finding("ok", "x", "fine")]))
    monkeypatch.setattr(doctor, "check_ros", broken)
    monkeypatch.setattr(doctor, "check_cv2", lambda: iter([doctor.Finding("warn", "cv2", "odd", "mend it")]))
    assert cli.main(["doctor", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] is False
    assert "driver crashed" in json.dumps(record["findings"])
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fix: mend it" in out
    assert out.strip().splitlines()[-1] == "1 errors, 1 warnings"
    monkeypatch.setattr(doctor, "check_ros", lambda: iter([]))
    assert cli.main(["doctor"]) == 0
