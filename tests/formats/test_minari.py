"""Minari datasets: laid out as ``gymnasium/<id>`` observes, ends and rewards as it gives them, damage named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from robot_rl import cli
from robot_rl.replay import EpisodeStore
from robot_rl.replay.importers import FormatError, detect, open_dataset


def box(size: int, low: float, high: float) -> str:
    return json.dumps({"type": "Box", "dtype": "float32", "shape": [size], "low": [low] * size, "high": [high] * size})


def write(folder: Path, episodes: list[dict[str, Any]], **told: Any) -> Path:
    """What Minari 0.5 writes (checked against its own writer below, where it is installed)."""
    data = folder / "data"
    data.mkdir(parents=True)
    spec = json.dumps({"id": "AdroitHandDoor-v1", "max_episode_steps": 200})
    metadata = {"data_format": "hdf5", "env_spec": spec, "dataset_id": "D4RL/door/human-v2", "action_space": box(2, -1.0, 1.0)}
    (data / "metadata.json").write_text(json.dumps(metadata | told))
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for i, episode in enumerate(episodes):
            group = file.create_group(f"episode_{i}")
            group.attrs["seed"] = 40 + i
            for name, value in episode.items():
                if isinstance(value, dict):
                    for key, rows in value.items():
                        group.create_dataset(f"{name}/{key}", data=rows)
                else:
                    group.create_dataset(name, data=value)
    return folder


def made(length: int, seed: int, success_at: int | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ends = np.zeros(length, bool)
    ends[-1] = True
    success = np.zeros(length + 1, bool)
    if success_at is not None:
        success[success_at + 1 :] = True
    return {
        "observations": rng.normal(size=(length + 1, 3)), "actions": rng.uniform(-0.5, 0.5, (length, 2)).astype(np.float32),
        "rewards": rng.normal(size=length), "terminations": np.zeros(length, bool), "truncations": ends, "infos": {"success": success},
    }  # fmt: skip


def test_an_episode_is_what_the_environment_would_have_given(tmp_path, capsys):
    source = write(tmp_path / "door", [made(6, 0, success_at=3), made(5, 1)])
    assert detect(source) == detect(source / "data") == detect(source / "data" / "main_data.hdf5") == "minari"
    importer = open_dataset(source)
    told = importer.describe()
    assert (told.n_episodes, told.extra["env_id"], told.extra["success_from"]) == (2, "gymnasium/AdroitHandDoor-v1", "success")
    assert (told.action.low, told.extra["action_limits"]) == ((-1.0, -1.0), "format")
    first, second = importer.episodes()
    np.testing.assert_array_equal(first.observations["observation.state"], made(6, 0)["observations"][:5].astype(np.float32))
    np.testing.assert_array_equal(first.action, made(6, 0)["actions"][:4])
    assert first.reward.tolist() == [0, 0, 0, 1]
    assert (first.terminated[-1], first.truncated[-1], first.meta.success, first.meta.seed) == (True, False, True, 40)
    assert (len(second), second.terminated.any(), second.truncated[-1], second.meta.success) == (5, False, True, False)
    whole, _ = open_dataset(source, cut_at_success=False, reward="native").episodes()
    np.testing.assert_array_equal(whole.reward, made(6, 0)["rewards"].astype(np.float32))
    assert len(whole) == 6
    assert cli.main(["import", str(source), str(tmp_path / "store"), "--json"]) == 0
    with EpisodeStore.open(tmp_path / "store") as store:
        np.testing.assert_array_equal(store.read(store.episode_ids()[0]).action, first.action)


def test_dictionaries_are_joined_as_gymnasium_environments_join_them(tmp_path):
    episode = made(4, 2)
    del episode["infos"]
    parts = {"desired_goal": np.full((5, 1), 3.0), "observation": np.full((5, 2), 1.0), "achieved_goal": np.full((5, 1), 2.0)}
    source = write(tmp_path / "goals", [episode | {"observations": parts}], action_space=box(2, -np.inf, np.inf))
    importer = open_dataset(source)
    names = importer.describe().observation_features["observation.state"].names
    assert names == ("observation_0", "observation_1", "achieved_goal_0", "desired_goal_0")
    assert importer.describe().extra["action_limits"] == "recorded range"
    (read,) = importer.episodes()
    assert read.observations["observation.state"][0].tolist() == [1, 1, 2, 3]
    assert read.meta.success is None
    np.testing.assert_array_equal(read.reward, episode["rewards"].astype(np.float32))  # no success is told: its own reward
    with pytest.raises(ValueError, match=r"reward='sparse': .* has none of success, is_success"):
        open_dataset(source, reward="sparse")


def test_damage_is_named(tmp_path):
    short = made(4, 0)
    short["rewards"] = short["rewards"][:-1]
    with pytest.raises(FormatError, match=r"episode_0: rewards has 3 rows, expected 4"):
        list(open_dataset(write(tmp_path / "a", [short])).episodes())
    wrong = made(4, 0)
    wrong["observations"][2, 1] = np.nan
    with pytest.raises(FormatError, match=r"observation.state is not finite at row 2"):
        list(open_dataset(write(tmp_path / "b", [wrong])).episodes())
    with pytest.raises(FormatError, match="data_format='arrow'; accepted is hdf5"):
        open_dataset(write(tmp_path / "c", [made(3, 0)], data_format="arrow"))
    with pytest.raises(FormatError, match=r"no episode_\*"):
        open_dataset(write(tmp_path / "d", []))
    broken = write(tmp_path / "e", [made(3, 0)])
    (broken / "data" / "main_data.hdf5").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="not a readable HDF5 file"):
        open_dataset(broken, format="minari")


def test_minaris_own_files_are_read(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari", reason="pip install minari")
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 1, 1, 3)).repeat(32, 1).repeat(32, 2).astype(np.uint8)
    for name, space, rows in (
        ("vectors/test-v0", Box(-9, 9, (3,), np.float32), rng.normal(size=(4, 3)).astype(np.float32)),
        ("pictures/test-v0", Box(0, 255, (32, 32, 3), np.uint8), frames),
    ):
        buffer = EpisodeBuffer(
            observations=list(rows), actions=list(rng.uniform(-1, 1, (3, 2)).astype(np.float32)), rewards=[0.0, 0.5, 1.0],
            terminations=[False, False, True], truncations=[False] * 3, infos={"success": [False, False, False, True]},
        )  # fmt: skip
        minari.create_dataset_from_buffers(
            name, [buffer], observation_space=space, action_space=Box(-1, 1, (2,), np.float32), author="x", author_email="x@y.z",
            code_permalink="z", algorithm_name="none",
        )  # fmt: skip
        (episode,) = open_dataset(tmp_path / name).episodes()
        seen = next(iter(episode.observations.values()))
        assert seen.shape == rows.shape
        assert np.abs(seen.astype(float) - rows).mean() < (1e-9 if "vectors" in name else 3.0)
        assert (episode.terminated.tolist(), episode.meta.success) == ([False, False, True], True)
