"""robot-rl: configuration reaches the rooms, results and errors reach people and machines."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from robot_rl import cli
from robot_rl.cli.output import emit, table
from robot_rl.cli.progress import ProgressDisplay, duration
from robot_rl.cli.runs import parse
from robot_rl.config import option
from robot_rl.training.interrupt import Interrupted


@dataclass(frozen=True)
class Inner:
    utd: int = option(1, help="updates for each environment step", ge=1)


@dataclass(frozen=True)
class Config:
    task: str = "lift"
    train: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Result:
    success: float
    path: Path
    count: Any = None


@pytest.fixture
def rooms(monkeypatch):
    """Stand-ins for the rooms that `train` calls; `calls` holds what they were given."""
    calls: list[Any] = []
    outcome: dict[str, Any] = {"result": Result(0.97, Path("runs/a"), np.int64(3)), "error": None}

    def run(config: Config, progress: ProgressDisplay) -> Any:
        calls.append(config)
        progress.start("post-train", 10)
        progress.advance(10)
        progress.status(success=0.9, interval=(0.8, 0.95))
        if outcome["error"] is not None:
            raise outcome["error"]
        return outcome["result"]

    for name, content in (
        ("robot_rl.training.config", {"PostTrainConfig": Config}),
        ("robot_rl.training.posttrain", {"run": run}),
    ):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(calls=calls, outcome=outcome)


def test_train_gets_file_and_overrides(rooms, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("task: can\ntrain: {utd: 2}\n")
    assert cli.main(["train", "--config", str(file), "--train.utd=4"]) == 0
    assert cli.main(["train", f"--config={file}", "--train.utd", "5", "--quiet"]) == 0
    assert rooms.calls == [Config("can", Inner(4)), Config("can", Inner(5))]
    out, err = capsys.readouterr()
    assert "success: 0.97" in out
    assert "post-train: 10 of 10 (100 %), success 90.0 % [80.0, 95.0]" in err


def test_json_is_one_object_a_line(rooms, capsys):
    assert cli.main(["train", "--json"]) == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in events] == ["start", "finish", "result"]
    assert events[1]["interval"] == [0.8, 0.95]
    assert events[2] == {"event": "result", "success": 0.97, "path": "runs/a", "count": 3}
    assert err == ""


def test_a_wrong_configuration_is_refused_before_anything_starts(rooms, capsys):
    assert cli.main(["train", "--train.utd=0", "--trian.utd=1"]) == 2
    err = capsys.readouterr().err
    assert "2 problems in the command line" in err
    assert "train.utd = 0: accepted is an integer >= 1" in err
    assert "did you mean train?" in err
    assert "Traceback" not in err
    assert not rooms.calls
    assert cli.main(["train", "--json", "--train.utd=0"]) == 2
    record = json.loads(capsys.readouterr().out)
    assert record["event"] == "error"
    assert record["findings"] == [{"key": "train.utd", "accepted": "accepted is an integer >= 1"}]


def test_errors_are_one_message_and_a_code(rooms, capsys, monkeypatch):
    rooms.outcome["error"] = RuntimeError("the store is full")
    assert cli.main(["train", "--quiet"]) == 1
    assert capsys.readouterr().err == "robot-rl: the store is full\n"
    rooms.outcome["error"] = ZeroDivisionError("division by zero")
    assert cli.main(["train", "--quiet"]) == 1
    assert "ZeroDivisionError: division by zero\n(ROBOT_RL_TRACEBACK=1 shows where)" in capsys.readouterr().err
    monkeypatch.setenv("ROBOT_RL_TRACEBACK", "1")
    assert cli.main(["train", "--quiet"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    for ctrl_c in (KeyboardInterrupt(), Interrupted()):  # at once, and at the next safe point
        rooms.outcome["error"] = ctrl_c
        assert cli.main(["train", "--quiet"]) == 130
        assert capsys.readouterr().err == "robot-rl: interrupted; the same command goes on from the last checkpoint\n"
    rooms.outcome["error"] = ModuleNotFoundError("No module named 'ray'", name="ray")
    assert cli.main(["train", "--quiet"]) == 1
    assert "robot_rl[scale]" in capsys.readouterr().err


def test_help_lists_keys_and_print_config_is_read_back(rooms, capsys, tmp_path):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--train.utd  an integer >= 1  [1]" in out
    assert "updates for each environment step" in out
    assert cli.main(["train", "--print-config", "--train.utd=9"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert not rooms.calls
    assert cli.main(["train", "--config", str(file), "--quiet"]) == 0
    assert rooms.calls == [Config("lift", Inner(9))]


def test_usage(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)
    assert cli.main([]) == 2
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert cli.main(["train", "--config"]) == 2
    assert "--config needs a value" in capsys.readouterr().err


def test_flags_are_told_from_overrides():
    flags = parse(["--store", "a", "--seed", "-3", "--json", "--config=x.yaml", "--amp"], valued=("--store",))
    assert (flags.config, flags.json, flags.values, flags.rest) == ("x.yaml", True, {"--store": "a"}, ["--seed", "-3", "--amp"])
    with pytest.raises(cli.output.UsageError, match="given twice"):
        parse(["--config=a", "--config=b"])


def test_store_verbs_reach_maintenance(monkeypatch, capsys):
    import robot_rl.replay

    module = ModuleType("robot_rl.replay.maintenance")
    rows = [{"episode": "a", "steps": 3, "success": True}, {"episode": "b", "steps": 12, "success": None}]
    module.__dict__.update(
        list_episodes=lambda path: rows,
        show=lambda path, episode: {"episode": episode, "path": path},
        verify=lambda path: SimpleNamespace(ok=False, to_json=lambda: {"ok": False, "damaged": ["b"]}),
        recover=lambda path: {"recovered": 1},
        collect_garbage=lambda path, dry_run: {"dry_run": dry_run},
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(robot_rl.replay, "maintenance", module, raising=False)
    assert cli.main(["store", "ls", "s"]) == 0
    assert capsys.readouterr().out == "episode  steps  success\na        3      yes\nb        12     -\n"
    assert cli.main(["store", "show", "s", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"event": "result", "episode": "a", "path": "s"}
    assert cli.main(["store", "--json", "verify", "s"]) == 1
    assert json.loads(capsys.readouterr().out)["damaged"] == ["b"]
    assert cli.main(["store", "gc", "s", "--dry-run"]) == 0
    assert capsys.readouterr().out == "dry_run: yes\n"


def test_results_are_plain_json(capsys):
    emit({"a": np.float32(0.5), "b": float("nan"), "c": [np.int64(1), Path("x")]}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"event": "result", "a": 0.5, "b": None, "c": [1, "x"]}
    assert table([]) == "nothing"


def test_plain_progress_writes_a_line_now_and_then():
    stream = io.StringIO()
    with ProgressDisplay("auto", stream, every=0.0) as progress:
        assert progress.mode == "plain"
        progress.start("evaluate", 4)
        progress.advance(3)
        progress.status(success=0.5, interval=(0.2, 0.8), steps_per_s=1234.5, eta=75, base=0.41)
        progress.log("promoted version 3")
    text = stream.getvalue().splitlines()
    assert text[0] == "evaluate: started (4)"
    assert text[-2] == "promoted version 3"
    assert "evaluate: 3 of 4 (75 %), success 50.0 % [20.0, 80.0], 1,234 steps/s, base 0.41, 1:15 left" in text
    assert text[-1].startswith("evaluate: 3 of 4")
    quiet = io.StringIO()
    with ProgressDisplay("plain", quiet, every=3600) as progress:
        progress.start("x", 1000)
        for _ in range(1000):
            progress.advance()
    assert len(quiet.getvalue().splitlines()) == 2, "start and end only"


def test_rich_progress_shows_the_same():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ProgressDisplay("auto", stream) as progress:
        assert progress.mode == "rich"
        progress.start("post-train", 100)
        progress.advance(40)
        progress.status(success=0.9, interval=(0.8, 0.95))
        progress.log("a line [that] stays")
        progress.start("evaluate", None)
        progress.advance(2)
    text = stream.getvalue()
    assert "post-train" in text
    assert "40/100" in text
    assert "success 90.0 % [80.0, 95.0]" in text
    assert "a line [that] stays" in text
    assert "evaluate" in text


def test_durations():
    assert [duration(s) for s in (0, 59.6, 75, 4000)] == ["0:00", "1:00", "1:15", "1:06:40"]


def test_a_closed_pipe_is_no_error():
    code = "import sys; from robot_rl.cli import main; sys.exit(main(['--help']))"
    command = f'{sys.executable} -c "{code}" | head -c 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
