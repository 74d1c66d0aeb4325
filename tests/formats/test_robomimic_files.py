"""robomimic HDF5: files as robomimic makes them, and our own export."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robot_rl.replay.exporters import export
from robot_rl.replay.importers import FormatError, detect, open_dataset

h5py = pytest.importorskip("h5py")

WIDTHS = {"object": 10, "robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "robot0_joint_pos": 7}


@pytest.fixture
def lift(tmp_path):
    """Three demonstrations; number 10 sorts after 2; number 2 goes on for two steps after its success."""
    rng = np.random.default_rng(0)
    path = tmp_path / "lift.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}})
        for number, length, success in ((10, 6, None), (0, 5, 4), (2, 8, 5)):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            demo["states"] = rng.normal(size=(length, 32))
            reward = np.zeros(length)
            if success is not None:
                reward[success:] = 1.0
            demo["rewards"], demo["dones"] = reward, (reward > 0).astype(int)
            for key, width in WIDTHS.items():
                rows = rng.normal(size=(length + 1, width))
                demo[f"obs/{key}"], demo[f"next_obs/{key}"] = rows[:-1], rows[1:]
            frames = rng.integers(0, 256, (length + 1, 8, 8, 3), dtype=np.uint8)
            demo["obs/agentview_image"], demo["next_obs/agentview_image"] = frames[:-1], frames[1:]
        file["mask/train"] = np.array([b"demo_0", b"demo_10"])
        file["mask/empty"] = np.array([], "S8")
    return path


def test_default_keys_order_and_ends(lift):
    assert detect(lift) == "robomimic"
    importer = open_dataset(lift, task="lift the cube")
    source = importer.describe()
    assert source.extra["env_id"] == "robosuite/Lift"
    assert source.extra["control_hz"] == 20.0
    assert source.extra["observations_left_out"] == ["agentview_image", "robot0_joint_pos"]
    assert source.action.low == (-1.0,) * 7
    assert source.extra["action_limits"] == "format"
    first, second, third = importer.episodes()
    assert [e.meta.extra["imported"]["episode_index"] for e in (first, second, third)] == [0, 2, 10]
    with h5py.File(lift) as file:
        demo = file["data/demo_0"]
        keys = list(WIDTHS)[:4]
        for group, rows in (("obs", slice(0, -1)), ("next_obs", slice(1, None))):
            expected = np.concatenate([demo[group][k][()] for k in keys], axis=1).astype(np.float32)
            np.testing.assert_array_equal(first.observations["observation.state"][rows], expected)
        assert first.meta.extra["initial_state"] == demo["states"][0].tolist()
        after = file["data/demo_2/obs/object"][6].astype(np.float32)
    assert first.meta.task == "lift the cube"
    assert first.terminated.tolist() == [False] * 4 + [True]
    assert len(second) == 6  # cut at its first success, with the recorded observation after it
    assert second.terminated[-1]
    np.testing.assert_array_equal(second.observations["observation.state"][-1, :10], after)
    assert third.meta.success is False
    assert third.truncated[-1]
    assert not third.terminated.any()


def test_options(lift):
    importer = open_dataset(
        lift, obs_keys=["robot0_joint_pos"], image_keys=["agentview_image"], filter_key="train", cut_at_success=False
    )
    episodes = list(importer.episodes())
    assert [e.meta.extra["imported"]["episode_index"] for e in episodes] == [0, 10]
    assert episodes[0].observations["observation.state"].shape == (6, 7)
    with h5py.File(lift) as file:
        np.testing.assert_array_equal(
            episodes[0].observations["observation.images.agentview"][1:], file["data/demo_0/next_obs/agentview_image"]
        )
    (kept,) = open_dataset(lift, episodes=[2], cut_at_success=False).episodes()
    assert len(kept) == 8
    assert kept.meta.success is True
    assert kept.truncated[-1]


def test_wrong_options_and_damage(lift):
    with pytest.raises(ValueError, match=r"has no \['camera'\]; it has .*robot0_eef_pos"):
        open_dataset(lift, obs_keys=["object", "camera"])
    with pytest.raises(ValueError, match=r"'object' is no \(H, W, 3\) image; images are \['agentview_image'\]"):
        open_dataset(lift, image_keys=["object"])
    with pytest.raises(ValueError, match=r"filter_key='valid': .* has empty, train"):
        open_dataset(lift, filter_key="valid")
    with pytest.raises(FormatError, match="mask/empty is empty"):
        open_dataset(lift, filter_key="empty")
    with h5py.File(lift, "a") as file:
        del file["data/demo_2/obs/object"]
        file["data/demo_2/obs/object"] = np.zeros((3, 10))
    with pytest.raises(FormatError, match="demo_2: obs/object has 3 rows, actions has 8"):
        list(open_dataset(lift).episodes())
    lift.write_bytes(lift.read_bytes()[:512])
    with pytest.raises(FormatError, match="not a readable HDF5 file"):
        open_dataset(lift, "robomimic")


def test_export_comes_back_equal(tmp_path, make_episode, assert_same):
    made = [make_episode(i, length=9 + i, image=(16, 24), success=i != 1) for i in range(2)]
    made[1].reward[:3] = np.nan
    report = export(made, tmp_path / "out.hdf5", "robomimic", unknown_reward=-1.0)
    assert report.notes == ("3 unknown rewards were written as -1.0",)
    made[1].reward[:3] = -1.0
    for ours, theirs in zip(made, open_dataset(tmp_path / "out.hdf5").episodes(), strict=True):
        assert_same(ours, theirs, skip=("action_base", "action_human"))
        theirs.meta.extra.pop("imported")
        assert theirs.meta == ours.meta
    with h5py.File(tmp_path / "out.hdf5") as file:
        assert file["data"].attrs["total"] == 19
        assert json.loads(file["data"].attrs["env_args"])["env_name"] == "Drawer"
        assert file["data/demo_0"].attrs["num_samples"] == 9
        assert (
            set(file["data/demo_0/obs"]) == set(file["data/demo_0/next_obs"]) == {"state", "environment_state", "front_image"}
        )
