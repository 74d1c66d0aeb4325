"""Parts of an episode store as LeRobot datasets: which episodes, and what of them arrives."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robot_rl import cli
from robot_rl.replay import EpisodeStore
from robot_rl.replay.exporters import export_from
from robot_rl.replay.exporters.selection import Condition, select
from robot_rl.replay.importers import import_into, open_dataset
from robot_rl.types import ActionSpec, FeatureSpec


@pytest.fixture
def store_path(tmp_path, make_episode):
    features = {"observation.state": FeatureSpec((5,)), "observation.environment_state": FeatureSpec((1,))}
    with EpisodeStore.create(
        tmp_path / "store", observation_features=features, action=ActionSpec((-9,) * 3, (9,) * 3)
    ) as store:
        for i in range(6):
            episode = make_episode(i, length=6 + i, success=i % 3 != 0)
            episode.meta.weights_version = i
            episode.meta.success = None if i == 5 else episode.meta.success
            episode.intervention_id[:] = -1
            if i != 4:
                episode.intervention_id[2:4] = 7
            store.add(episode)
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("success=true", [1, 2, 4]),
        ("success=false", [0, 3]),
        ("success=unknown", [5]),
        ("success!=true", [0, 3, 5]),
        ("stratum=intervention", [1, 3, 5]),
        ("length>=9,weights_version<5", [3, 4]),
        ("intervened=false", [4]),
        ("task=open the drawer, success=true", [2, 4]),
        ("seed>0,seed<=2", [1, 2]),
        ("recovered=true", []),
    ],
)
def test_conditions(store_path, where, wanted):
    with EpisodeStore.open(store_path) as store:
        chosen = select(store, [Condition.parse(c) for c in where.split(",")])
    assert chosen == [f"made-{i}" for i in wanted]


def test_a_condition_that_means_nothing_is_refused():
    for text, said in {
        "sucess=true": "accepted are KEY=VALUE", "success": "accepted are KEY=VALUE", "success=yes": "true, false, unknown",
        "success>true": "has no order", "length>=long": "accepted is an integer", "stratum=live": "online, demonstration",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Condition.parse(text)


@pytest.mark.parametrize("version", ["lerobot_v3", "lerobot_v21"])
def test_a_selection_arrives_with_rewards_interventions_and_provenance(store_path, tmp_path, capsys, version, assert_same):
    out = tmp_path / "out"
    assert cli.main(["export", str(store_path), str(out), "--format", version, "--where", "success=true", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episode_ids"] == ["made-1", "made-2", "made-4"]
    with EpisodeStore.open(store_path) as store:
        made = [store.read(i) for i in ("made-1", "made-2", "made-4")]
    for ours, theirs in zip(made, open_dataset(out).episodes(), strict=True):
        assert_same(ours, theirs)
        np.testing.assert_array_equal(theirs.intervention_id, ours.intervention_id)
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "data_files: data/*/*.parquet" in card
    assert cli.main(["export", str(store_path), str(tmp_path / "none"), "--where", "recovered=true"]) == 2
    assert cli.main(["export", str(store_path), str(tmp_path / "both"), "--where", "success=true", "--episodes", "made-1"]) == 2


@pytest.mark.slow
def test_g1_goes_through_a_store_to_lerobots_own_loader_and_back(g1, tmp_path):
    """Import, store, export, load with LeRobot's own class, import again: vectors to the bit, video within the codec."""
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="needs lerobot")
    source = open_dataset(g1, episodes=[2, 8], image_size=[120, 160])
    told = source.describe()
    with EpisodeStore.create(tmp_path / "store", observation_features=told.observation_features, action=told.action) as store:
        import_into(store, g1, episodes=[2, 8], image_size=[120, 160])
        export_from(store, tmp_path / "out", "lerobot_v3")
        made = [store.read(i) for i in store.episode_ids()]
    dataset = module.LeRobotDataset("local/g1", root=tmp_path / "out", video_backend="pyav")
    assert (dataset.num_episodes, len(dataset)) == (2, sum(len(e) for e in made))
    state = np.concatenate([e.observations["observation.state"][:-1] for e in made])
    action = np.concatenate([e.action for e in made])
    table = dataset.hf_dataset.with_format("numpy")
    np.testing.assert_array_equal(np.stack(table["observation.state"]), state)
    np.testing.assert_array_equal(np.stack(table["action"]), action)
    camera = "observation.images.cam_high"
    pictures = np.concatenate([e.observations[camera][:-1] for e in made])
    for i in (0, 7, len(dataset) - 1):
        frame = dataset[i][camera].numpy().transpose(1, 2, 0) * 255
        assert np.abs(frame - pictures[i]).mean() < 5.0
    for ours, theirs in zip(made, open_dataset(tmp_path / "out").episodes(), strict=True):
        np.testing.assert_array_equal(theirs.action, ours.action)
        np.testing.assert_array_equal(theirs.observations["observation.state"], ours.observations["observation.state"])
        np.testing.assert_array_equal(theirs.source, ours.source)
        assert np.abs(theirs.observations[camera].astype(float) - ours.observations[camera]).mean() < 5.0
        assert theirs.meta.task == ours.meta.task
