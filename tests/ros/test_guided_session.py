"""`robot-rl session` from pre-flight to report on a real graph: simulator, guard, policy, learner, reward, monitor and page as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")
pytest.importorskip("starlette", reason="pip install 'robot_rl[console]'")
pytest.importorskip("uvicorn", reason="pip install 'robot_rl[console]'")

from graph_kit import own_domain
from session_kit import train_base, write_recipe

from robot_rl.replay import EpisodeStore

PATIENCE_S = 1500.0


def kept(run: Path) -> dict:
    path = run / "session.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.slow
def test_a_session_goes_from_preflight_to_a_report(tmp_path):
    """Nobody is there (``--hands-off``): baseline by the base, training until a version is promoted, blind comparison, report."""
    recipe, run, log = write_recipe(tmp_path), tmp_path / "run", tmp_path / "log.txt"
    base = train_base(run, recipe)
    words = [
        sys.executable, "-m", "robot_rl.cli", "session", "--graph", "sim_session", "--baseline", "2", "--training", "2",
        "--comparison", "2", "--reset-s", "0", "--hands-off", "--port", "0", f"policy:={base}", f"run_dir:={run}", f"recipe:={recipe}",
        "operator:=none", "gate:=false", "http_port:=0", f"params_file:={tmp_path / 'parameters.yaml'}", "max_episode_s:=4",
        "realtime_factor:=0", "use_sim_time:=true",
    ]  # fmt: skip
    with own_domain(), open(log, "wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=dict(os.environ))
        try:
            phases = []
            end = time.monotonic() + PATIENCE_S
            while not (run / "session_report.html").exists():
                assert time.monotonic() < end, (kept(run), log.read_text()[-4000:])
                assert process.poll() is None, log.read_text()[-4000:]
                if (phase := kept(run).get("phase", "")) and phase not in phases:
                    phases.append(phase)
                time.sleep(0.5)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60.0)
    assert process.returncode == 0, log.read_text()[-4000:]
    found = kept(run)
    assert found["phase"] == "report"
    assert phases[: len(phases)] == [p for p in ("baseline", "training", "comparison", "report") if p in phases]
    assert len(found["baseline"]) == 2
    assert len(found["training"]) >= 2
    assert found["version"] >= 1
    order = found["blind"]["order"]
    assert sorted(order) == ["new", "new", "old", "old"]
    report = (run / "session_report.html").read_text()
    assert "95 %" in report
    with EpisodeStore.open(run / "store") as store:
        judged = [m for m in map(store.meta, store.episode_ids()) if m.success is not None]  # others were played again
    versions = [m.weights_version for m in judged]
    played = versions[-len(order) :]
    assert [v > 0 for v in played] == [arm == "new" for arm in order], (versions, order)
    assert versions[:2] == [0, 0], "the baseline is the old policy's"
