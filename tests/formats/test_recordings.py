"""The real recordings: a Unitree G1 in LeRobot v2.1, and human demonstrations with the Adroit hand."""

from __future__ import annotations

import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from robot_rl.replay.exporters import export
from robot_rl.replay.importers import FormatError, detect, open_dataset
from robot_rl.replay.importers.video import count_frames, decode_frames
from robot_rl.types import Source, Stratum

PRESENT = [1, 2, 7, 8, 19, 40, 42, 49]
CAMERA = "observation.images.cam_high"


def test_g1_imports_the_episodes_that_are_there(g1):
    assert detect(g1) == "lerobot_v21"
    importer = open_dataset(g1, videos=False)
    source = importer.describe()
    assert source.n_episodes == 8
    assert source.task == "Pick up the yellow bottle on the table."
    assert source.extra["episodes_listed"] == 100
    assert sorted(map(int, source.extra["episodes_missing"])) == [i for i in range(100) if i not in PRESENT]
    assert source.extra["control_hz"] == 30.0
    assert source.action.dim == 26
    assert source.action.names[0] == "kLeftShoulderPitch"
    assert source.observation_features["observation.state"].names[-1] == "kRightHandThumbRotation"
    for index, episode in zip(PRESENT, importer.episodes(), strict=True):
        table = pq.read_table(g1 / "data" / "chunk-000" / f"episode_{index:06d}.parquet")
        length = table.num_rows
        assert len(episode) == length
        assert episode.meta.episode_id == f"g1_bottle_lerobot_v21-{index:06d}"
        assert episode.observations["observation.state"].shape == (length + 1, 26)
        assert episode.observations["observation.state"].dtype == np.float32
        np.testing.assert_array_equal(episode.action, np.stack(table["action"].to_numpy()))
        assert (episode.action >= np.float32(source.action.low)).all()
        assert (episode.action <= np.float32(source.action.high)).all()
        assert np.isnan(episode.reward).all()
        assert episode.truncated.tolist() == [False] * (length - 1) + [True]
        assert episode.meta.stratum is Stratum.DEMONSTRATION
        assert (episode.source == Source.HUMAN).all()
        assert episode.stamp_ns[-1] == round((length - 1) * 1e9 / 30)


def test_g1_videos_have_a_frame_for_every_row(g1):
    for index in PRESENT:
        rows = pq.read_metadata(g1 / "data" / "chunk-000" / f"episode_{index:06d}.parquet").num_rows
        assert count_frames(g1 / "videos" / "chunk-000" / CAMERA / f"episode_{index:06d}.mp4") == rows


def test_g1_decodes_the_frame_that_was_asked_for(g1):
    video = g1 / "videos" / "chunk-000" / CAMERA / "episode_000002.mp4"
    first = decode_frames(video, np.arange(12) / 30, tolerance=0.5 / 30)
    assert first.shape == (12, 480, 640, 3)
    assert 20 < first.mean() < 235
    assert first.std() > 10
    av = pytest.importorskip("av")
    with av.open(str(video)) as container:  # the plain way: from the start, one after the other
        plain = [frame.to_ndarray(format="rgb24") for _, frame in zip(range(12), container.decode(video=0), strict=False)]
    np.testing.assert_array_equal(first, plain)
    later = decode_frames(video, np.array([8, 11]) / 30, tolerance=0.5 / 30)  # by seeking
    np.testing.assert_array_equal(later, first[[8, 11]])
    small = decode_frames(video, np.arange(2) / 30, size=(96, 128), tolerance=0.5 / 30)
    blocks = first[:2].reshape(2, 96, 5, 128, 5, 3).mean((2, 4))
    assert np.abs(small - blocks).mean() < 3.0
    with pytest.raises(ValueError, match=r"nothing within 0\.0167 s of 100\.0000 s"):
        decode_frames(video, np.array([100.0]), tolerance=0.5 / 30)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["lerobot_v3", "lerobot_v21"])
def test_g1_goes_out_and_comes_back(g1, tmp_path, assert_same, version):
    size = [120, 160]
    made = list(open_dataset(g1, episodes=[2, 8], image_size=size).episodes())
    export(made, tmp_path / "out", version)
    for ours, theirs in zip(made, open_dataset(tmp_path / "out").episodes(), strict=True):
        assert_same(ours, theirs, image_tolerance=5.0)
        assert theirs.meta.task == ours.meta.task


def test_adroit_rewards_and_ends(adroit):
    assert detect(adroit) == detect(adroit / "demos.npz") == "adroit_door"
    whole = open_dataset(adroit, cut_at_success=False)
    source = whole.describe()
    episodes = list(whole.episodes())
    assert source.n_episodes == len(episodes) == 25
    assert sum(map(len, episodes)) == 6729
    assert source.action.low == (-1.0,) * 28
    assert 0.05 < source.extra["share_of_action_values_outside_limits"] < 0.06
    raw = np.load(adroit / "demos.npz", allow_pickle=False)
    np.testing.assert_array_equal(np.concatenate([e.action for e in episodes]), raw["actions"])
    start = 0
    for episode in episodes:
        length = len(episode)
        state, dense = episode.observations["observation.state"], raw["dense_rewards"][start : start + length]
        np.testing.assert_array_equal(state[:-1], raw["observations"][start : start + length])
        # the recorded dense reward has a bonus of 10 from the very step that opens the door beyond the threshold on
        opened = np.flatnonzero(dense > 15)
        assert episode.meta.success == bool(len(opened))
        assert np.flatnonzero(episode.reward).tolist() == opened[:1].tolist()
        assert episode.truncated[-1]
        start += length
    assert source.extra["episodes_reaching_success"] == sum(e.meta.success for e in episodes)

    for cut, episode in zip(open_dataset(adroit).episodes(), episodes, strict=True):
        if not episode.meta.success:
            assert len(cut) == len(episode)
            assert cut.truncated[-1]
            continue
        first = int(episode.reward.argmax())
        assert len(cut) == first + 1
        assert cut.terminated[-1]
        assert not cut.truncated.any()
        assert cut.observations["observation.state"][-1, 28] >= 1.35 > cut.observations["observation.state"][-2, 28]
    for cut, episode in zip(open_dataset(adroit, cut_at_success=False, steps_after_widest=5).episodes(), episodes, strict=True):
        door = episode.observations["observation.state"][:-1, 28]
        assert len(cut) == min(int(door.argmax()) + 5, len(episode))
        assert cut.observations["observation.state"][:, 28].max() == door.max()
        assert cut.meta.success == episode.meta.success == bool(cut.reward.sum())
    with pytest.raises(ValueError, match=r"steps_after_widest=-1: accepted are null or integers >= 0"):
        open_dataset(adroit, steps_after_widest=-1)
    easier = open_dataset(adroit, success_threshold=1.0).describe().extra["episodes_reaching_success"]
    assert easier == 25


def test_adroit_demonstrations_replay(adroit):
    gym = pytest.importorskip("gymnasium")
    robotics = pytest.importorskip("gymnasium_robotics")
    os.environ.setdefault("MUJOCO_GL", "egl")
    gym.register_envs(robotics)
    env = gym.make("AdroitHandDoor-v1", max_episode_steps=1000)

    def mean_error(episode, actions):
        init = {k: np.array(v) for k, v in episode.meta.extra["initial_state_dict"].items()}
        state, _ = env.reset(seed=0, options={"initial_state_dict": init})
        error = []
        for t in range(50):
            error.append(np.abs(state - episode.observations["observation.state"][t]).mean())
            state, *_ = env.step(np.clip(actions[t], -1, 1))
        return np.array(error)

    for episode in open_dataset(adroit, episodes=range(0, 25, 4), cut_at_success=False).episodes():
        error = mean_error(episode, episode.action)
        # The recorded hand is already under way in the first row; following its commands closes the gap in 0.3 s,
        # and then the simulation stays within thousandths, a few hundredths where fingers meet, of what was recorded.
        assert error[0] > 0.01
        assert np.median(error[30:]) < 0.006
        assert error[30:].max() < 0.03
        assert np.median(mean_error(episode, np.zeros_like(episode.action))[30:]) > 10 * np.median(error[30:])
    env.close()


def test_adroit_damage_is_named(adroit, tmp_path):
    raw = dict(np.load(adroit / "demos.npz", allow_pickle=False))
    np.savez(tmp_path / "demos.npz", **{k: v for k, v in raw.items() if k != "init_qpos"})
    with pytest.raises(FormatError, match="no array init_qpos"):
        open_dataset(tmp_path, "adroit_door")
    np.savez(tmp_path / "demos.npz", **(raw | {"actions": raw["actions"][:-1]}))
    with pytest.raises(FormatError, match=r"actions has shape \(6728, 28\), expected \(6729, 28\)"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="success_threshold=9"):
        open_dataset(adroit, success_threshold=9)
