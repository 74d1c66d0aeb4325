"""``robot-rl console --sim RUN``: a trained run acts behind the page, with real pictures of the simulated task."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "ros"))

from robot_rl.cli.console import _simulated
from robot_rl.replay.store import EpisodeStore


@pytest.mark.slow
def test_a_run_acts_behind_the_page(tmp_path):
    from session_kit import train_base, write_recipe

    recipe = write_recipe(tmp_path, steps=30, demos=6)
    run = tmp_path / "run"
    train_base(run, recipe)
    (run / "config.yaml").write_text(recipe.read_text())
    folder = run / "sessions" / "simulated"
    folder.mkdir(parents=True)
    simulated, versions = _simulated(run, folder, 3, auto=True)
    assert versions == [0]
    with simulated:
        until = time.monotonic() + 80.0
        while simulated.view().episode.step < 3 or set(simulated.cameras.newest()) != {"front", "wrist"}:
            assert time.monotonic() < until, simulated.view()
            assert simulated.error is None
            time.sleep(0.05)
    assert simulated.error is None
    with EpisodeStore.open(folder / "store") as store:
        assert store.spec.noise_shape is not None
