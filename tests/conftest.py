"""What every test shares: one thread a process, a renderer that works without a display, and where real recordings lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Helpers that several test files share are called <name>_kit.py; importlib mode leaves the path alone.
sys.path += sorted({str(file.parent) for file in (ROOT / "tests").rglob("*_kit.py")})

# Before anything imports numpy, torch or mujoco: test workers share the cores, and there may be no display.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from robot_rl.doctor import choose_gl  # noqa: E402

choose_gl()

# A slow machine must not fail a property, and a failure must come back on the next run.
settings.register_profile("robot_rl", deadline=None, derandomize=True)
settings.load_profile("robot_rl")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real recordings: ``$ROBOT_RL_DATA``, else ``../shared/data`` beside the checkout; tests skip where there are none."""
    folder = Path(os.environ.get("ROBOT_RL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no recordings at {folder}; set ROBOT_RL_DATA")
    return folder


@pytest.fixture(autouse=True)
def usual_priority():
    """A test that takes real-time priority in its own process gives it back: with two cores, what runs after it starves the others."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    before = os.sched_getscheduler(0)
    yield
    if os.sched_getscheduler(0) != before:
        for task in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(task), before, os.sched_param(0))
        pytest.fail("left its process at another scheduling policy")
