"""diffusion_policy's ReplayBuffer on disk: zarr v2 layout, folder and zip, state and image variants."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import zarr

from robot_rl.replay.importers import FormatError, detect, open_dataset

ENDS = np.array([5, 12, 15])
ZARR_3 = int(zarr.__version__.split(".")[0]) >= 3  # Python 3.10 gets zarr 2, which writes the v2 format alone


def _write(path, arrays: dict[str, np.ndarray], zarr_format: int = 2):
    group = zarr.open_group(str(path), mode="w", **({"zarr_format": zarr_format} if ZARR_3 else {}))
    data, meta = group.create_group("data"), group.create_group("meta")

    def create(where, name, values, **options):
        (where.create_array if ZARR_3 else where.array)(name, data=values, **options)

    for name, values in arrays.items():
        create(data, name, values, chunks=(4, *values.shape[1:]))
    create(meta, "episode_ends", ENDS)
    return path


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "state": rng.normal(size=(15, 5)).astype(np.float32),
        "keypoint": rng.normal(size=(15, 9, 2)).astype(np.float32),
        "img": rng.integers(0, 256, (15, 6, 8, 3)).astype(np.float32),
        "action": rng.normal(size=(15, 2)).astype(np.float32) * 100,
    }


@pytest.mark.parametrize("kind", ["v2 folder", "v2 zip", "v3 folder"])
def test_pusht_layout(tmp_path, arrays, kind):
    if kind.startswith("v3") and not ZARR_3:
        pytest.skip("zarr 2 cannot write the v3 format; zarr 3 needs Python 3.11")
    path = _write(tmp_path / "pusht.zarr", arrays, 3 if kind.startswith("v3") else 2)
    if kind == "v2 folder":
        assert (path / "data" / "img" / ".zarray").is_file()  # the layout on disk that the original code writes
    if kind == "v2 zip":
        path = type(path)(shutil.make_archive(str(path), "zip", path))
    assert detect(path) == "diffusion_policy"
    importer = open_dataset(path, control_hz=10, task="push the T")
    source = importer.describe()
    assert source.n_episodes == 3
    assert source.extra["arrays_left_out"] == ["keypoint"]
    np.testing.assert_allclose(source.action.high, arrays["action"].max(0))
    start = 0
    for index, (end, episode) in enumerate(zip(ENDS, importer.episodes(), strict=True)):
        assert episode.meta.episode_id == f"pusht-{index:06d}"
        np.testing.assert_array_equal(episode.action, arrays["action"][start:end])
        np.testing.assert_array_equal(episode.observations["observation.state"][:-1], arrays["state"][start:end])
        frames = episode.observations["observation.images.img"]
        assert frames.dtype == np.uint8
        np.testing.assert_array_equal(frames[:-1], arrays["img"][start:end])
        np.testing.assert_array_equal(frames[-1], frames[-2])
        assert np.diff(episode.stamp_ns).tolist() == [100_000_000] * (end - start - 1)
        start = end


def test_key_mapping_concatenates_in_the_order_given(tmp_path, arrays):
    arrays["img"] = arrays["img"] / 255.0  # the other convention
    keys = {"keypoint": "observation.state", "state": "observation.state", "img": "observation.images.top", "action": "action"}
    importer = open_dataset(_write(tmp_path / "b.zarr", arrays), keys=keys, episodes=[1])
    (episode,) = importer.episodes()
    expected = np.concatenate([arrays["keypoint"][5:12].reshape(7, 18), arrays["state"][5:12]], axis=1)
    np.testing.assert_array_equal(episode.observations["observation.state"][:-1], expected)
    np.testing.assert_array_equal(episode.observations["observation.images.top"][:-1], np.rint(arrays["img"][5:12] * 255))
    assert importer.describe().observation_features["observation.state"].shape == (23,)


def test_refusals(tmp_path, arrays):
    path = _write(tmp_path / "b.zarr", arrays)
    with pytest.raises(ValueError, match=r"has no array \['velocity'\]; it has action, img, keypoint, state"):
        open_dataset(path, keys={"velocity": "observation.state", "action": "action"})
    with pytest.raises(ValueError, match="exactly one array becomes the action"):
        open_dataset(path, keys={"state": "observation.state"})
    with pytest.raises(ValueError, match=r"keys\['state'\]='obs'"):
        open_dataset(path, keys={"state": "obs", "action": "action"})
    with pytest.raises(ValueError, match="control_hz=-1"):
        open_dataset(path, control_hz=-1)
    short = arrays | {"state": arrays["state"][:14]}
    with pytest.raises(FormatError, match="data/state has 14 rows, episode_ends says 15"):
        open_dataset(_write(tmp_path / "short.zarr", short))
    broken = arrays | {"state": np.where(np.arange(15)[:, None] == 6, np.nan, arrays["state"])}
    with pytest.raises(FormatError, match=r"episode 1: observation\.state is not finite at row 1"):
        list(open_dataset(_write(tmp_path / "nan.zarr", broken)).episodes())
    # an image codec that is not installed is named, with what to install
    meta = path / "data" / "img" / ".zarray"
    described = json.loads(meta.read_text()) | {"compressor": {"id": "imagecodecs_jpeg2k", "level": 50}}
    meta.write_text(json.dumps(described))
    with pytest.raises(FormatError, match=r"imagecodecs_jpeg2k.*pip install imagecodecs"):
        open_dataset(path)
