"""One process trains in a run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from run_kit import TINY, merged

from robot_rl.config import decode
from robot_rl.training import posttrain
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.exclusive import exclusive
from robot_rl.training.run_folder import RunFolder

HOLD = """
import sys
from pathlib import Path
from robot_rl.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).alone():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_training_in_the_same_folder_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    """Whoever holds the folder may be killed: nothing has to be cleaned up."""
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        before = sorted(run.iterdir())
        with pytest.raises(RuntimeError, match="another process trains in it"):
            posttrain.run(decode(PostTrainConfig, merged(TINY, {"run_dir": str(run)})))
        assert sorted(run.iterdir()) == before
    finally:
        holder.kill()
        holder.wait()
    with RunFolder(run).alone():
        pass


def test_whoever_holds_it_is_given_time_to_leave(tmp_path: Path) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    lock = tmp_path / "lock"
    with exclusive(lock, "no"), pytest.raises(RuntimeError, match="no"), exclusive(lock, "no", stop, 60.0):
        pass
    assert asked == 3
