"""Run checkpoints: what went in comes out, and a kill at any moment leaves the old state or the new one."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from robot_rl.training import checkpoint
from robot_rl.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint


def tree(value: float) -> dict:
    return {
        "learner": {
            "critic": {"weight": torch.full((2, 3), value), "step": torch.tensor(int(value))},
            "empty": {},
            "alpha": value,
        },
        "generator": torch.Generator().manual_seed(int(value)).get_state(),
        "double": torch.tensor([value], dtype=torch.float64),
    }


def value_of(folder: Path) -> float | None:
    path = latest_checkpoint(folder)
    if path is None:
        return None
    tensors, state = load_checkpoint(path)
    assert state == {"value": tensors["learner"]["alpha"], "list": [1, None, "x"]}
    return tensors["learner"]["alpha"]


def save(folder: Path, name: str, value: float, **options) -> Path:
    return save_checkpoint(folder, name, tree(value), {"value": value, "list": [1, None, "x"]}, **options)


def test_round_trip(tmp_path) -> None:
    path = save(tmp_path, "step-1", 3.0)
    assert latest_checkpoint(tmp_path) == path
    tensors, state = load_checkpoint(path)
    before = tree(3.0)
    assert state["value"] == 3.0
    assert torch.equal(tensors["learner"]["critic"]["weight"], before["learner"]["critic"]["weight"])
    assert tensors["learner"]["critic"]["step"].dtype == torch.int64
    assert tensors["learner"]["empty"] == {}
    assert torch.equal(tensors["generator"], before["generator"])
    assert tensors["double"].dtype == torch.float64


def test_the_last_ones_are_kept_and_views_are_saved(tmp_path) -> None:
    for i in range(5):
        save(tmp_path, f"step-{i}", float(i), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["step-3", "step-4"]
    assert value_of(tmp_path) == 4.0
    shared = torch.arange(6.0)
    path = save_checkpoint(tmp_path, "views", {"a": shared[:4], "b": shared[2:], "c": shared.view(2, 3).T}, None)
    tensors, _ = load_checkpoint(path)
    assert tensors["a"].tolist() == [0, 1, 2, 3]
    assert tensors["c"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_is_no_checkpoint_is_refused(tmp_path) -> None:
    assert latest_checkpoint(tmp_path / "nothing") is None
    with pytest.raises(ValueError, match="'a/b'"):
        save_checkpoint(tmp_path, "x", {"a/b": torch.ones(1)}, None)
    path = save(tmp_path, "y", 1.0)
    (path / "state.json").write_text('{"format": "else/2", "values": {}, "state": null}')
    with pytest.raises(ValueError, match="else/2"):
        load_checkpoint(path)


class Killed(BaseException):
    """Not an Exception: nothing may clean up behind it, as after kill -9."""


CALLS = ("_sync", "save_file", "os.rename", "os.replace", "shutil.rmtree", "Path.write_text", "Path.mkdir")


def patch_boundaries(monkeypatch: pytest.MonkeyPatch, stop_at: int, after: bool) -> list[str]:
    """Die before or after the ``stop_at``-th call that touches the disk; a write dies half-way instead of after."""
    log: list[str] = []

    def wrap(name, real):
        def call(*args, **kwargs):
            log.append(name)
            if len(log) - 1 != stop_at:
                return real(*args, **kwargs)
            if after and name == "Path.write_text":
                real(args[0], args[1][: len(args[1]) // 2])
            elif after:
                real(*args, **kwargs)
            raise Killed

        return call

    for name in CALLS:
        owner, _, attribute = name.rpartition(".")
        target = {"": checkpoint, "os": os, "shutil": shutil, "Path": Path}[owner]
        monkeypatch.setattr(target, attribute, wrap(name, getattr(target, attribute)))
    return log


@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_row_12_a_kill_at_every_boundary_leaves_the_old_or_the_new_state(tmp_path, again: bool) -> None:
    """Then the run goes on: the next save and load work whatever was left lying about."""
    names = ("step-2", "step-2" if again else "step-3")
    with pytest.MonkeyPatch.context() as patch:
        log = patch_boundaries(patch, -1, False)
        for i, name in enumerate(names):
            save(tmp_path / "count", name, float(i + 1))
    boundaries = len(log)
    seen: set[float] = set()
    for stop in range(boundaries):
        for after in (False, True):
            folder = tmp_path / f"{stop}{after}"
            save(folder, "step-1", 0.5)
            save(folder, names[0], 1.0)
            with pytest.MonkeyPatch.context() as patch:
                patch_boundaries(patch, stop, after)
                with suppress(Killed):
                    save(folder, names[1], 2.0)
            found = value_of(folder)
            assert found in (1.0, 2.0), (stop, after)
            seen.add(found)
            save(folder, names[1], 3.0)
            assert value_of(folder) == 3.0
            assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert seen == {1.0, 2.0}
