"""LeRobot datasets written by us come back as they were; partial, old and damaged ones are handled as documented."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robot_rl.replay.exporters import export
from robot_rl.replay.exporters.stats import pool, vector_stats
from robot_rl.replay.exporters.video import TASKS, VideoWriter
from robot_rl.replay.importers import FormatError, open_dataset
from robot_rl.types import ActionSpec, FeatureSpec, Source


@pytest.mark.parametrize("version", ["lerobot_v3", "lerobot_v21"])
@pytest.mark.parametrize("images", ["video", "png"])
def test_export_comes_back_equal(tmp_path, make_episode, assert_same, version, images):
    made = [make_episode(i, length=10 + i, image=(64, 96), success=i != 1) for i in range(3)]
    report = export(made, tmp_path / "out", version, images=images)
    assert report.episode_ids == ("made-0", "made-1", "made-2")
    assert report.steps == 33

    importer = open_dataset(tmp_path / "out")
    source = importer.describe()
    assert source.format == version
    assert source.n_episodes == 3
    assert source.observation_features["observation.images.front"] == FeatureSpec(
        (64, 96, 3), "uint8", ("height", "width", "channel")
    )
    for ours, theirs in zip(made, importer.episodes(), strict=True):
        # AV1 at LeRobot's quality keeps these frames within about a grey level
        assert_same(ours, theirs, image_tolerance=2.0 if images == "video" else 0.0)
        assert theirs.meta.extra.pop("imported")["format"] == version
        assert theirs.meta == ours.meta


def test_files_roll_over_and_stay_readable(tmp_path, make_episode, assert_same):
    made = [make_episode(i, image=(64, 64)) for i in range(4)]
    export(made, tmp_path / "out", data_file_mb=1e-6, video_file_mb=1e-6, video_codec="h264", crf=10)
    assert len(list((tmp_path / "out" / "data").rglob("*.parquet"))) == 4
    assert len(list((tmp_path / "out" / "videos").rglob("*.mp4"))) == 4
    wanted = list(open_dataset(tmp_path / "out", episodes=[2]).episodes())
    assert len(wanted) == 1
    assert_same(made[2], wanted[0], image_tolerance=2.0)


def test_names_and_scaling(tmp_path, make_episode):
    features = {"observation.state": FeatureSpec((5,), names=("a", "b", "c", "d", "e"))}
    action = ActionSpec(low=(-1,) * 3, high=(1,) * 3, names=("x", "y", "grip"))
    export([make_episode(0, image=(64, 96))], tmp_path / "out", observation_features=features, action=action)
    importer = open_dataset(tmp_path / "out", image_size=[32, 48], action_low=-2.0, action_high=[2, 2, 5])
    source = importer.describe()
    assert source.observation_features["observation.state"].names == ("a", "b", "c", "d", "e")
    assert source.action.names == ("x", "y", "grip")
    assert source.action.high == (2.0, 2.0, 5.0)
    (episode,) = importer.episodes()
    frames = episode.observations["observation.images.front"]
    assert frames.shape == (13, 32, 48, 3)
    original = make_episode(0, image=(64, 96)).observations["observation.images.front"]
    means = original.reshape(13, 32, 2, 48, 2, 3).mean((2, 4))
    assert np.abs(frames - means).mean() < 3.0  # the final row goes through the same scaler as the video


def test_without_cameras_and_with_some(tmp_path, make_episode):
    export([make_episode(0, image=(64, 64))], tmp_path / "out")
    (episode,) = open_dataset(tmp_path / "out", videos=False).episodes()
    assert "observation.images.front" not in episode.observations
    with pytest.raises(ValueError, match=r"cameras=\['wrist'\].*front"):
        open_dataset(tmp_path / "out", cameras=["wrist"])


def test_last_frame_is_repeated_without_the_side_file(tmp_path, make_episode):
    export([make_episode(0)], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "meta" / "robot_rl")
    (episode,) = open_dataset(tmp_path / "out").episodes()
    state = episode.observations["observation.state"]
    np.testing.assert_array_equal(state[-1], state[-2])
    assert episode.meta.episode_id == "out-000000"
    assert episode.meta.task == "open the drawer"
    assert episode.meta.control_hz == 20.0


def _old_dataset(root, columns: dict[str, list], features: dict[str, dict], lengths: tuple[int, ...], **info):
    """A v2.1 dataset such as other tools wrote them: only what the format asks for."""
    frame = {"dtype": "float32", "shape": [2], "names": {"motors": ["m0", "m1"]}}
    base = {"observation.state": frame, "action": frame, **features}
    for key, kind in {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "task_index": "int64"}.items():
        base[key] = {"dtype": kind, "shape": [1], "names": None}
    (root / "meta").mkdir(parents=True)
    header = {"codebase_version": "v2.1", "fps": 10, "chunks_size": 2, "features": base, "video_path": None} | info
    header["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    (root / "meta" / "info.json").write_text(json.dumps(header))
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "push"}\n{"task_index": 1, "task": "pull"}\n')
    rows = [json.dumps({"episode_index": i, "tasks": ["push"], "length": n}) for i, n in enumerate(lengths)]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(rows))
    for i, n in enumerate(lengths):
        values = np.arange(2 * n, dtype=np.float32).reshape(n, 2) + 100 * i
        table = {"observation.state": list(values), "action": list(-values), "timestamp": np.arange(n, dtype=np.float32) / 10}
        table |= {"frame_index": np.arange(n), "episode_index": np.full(n, i), "task_index": np.full(n, i % 2)}
        table |= {k: v[i] for k, v in columns.items()}
        path = root / header["data_path"].format(episode_chunk=i // 2, episode_index=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({k: pa.array(list(v)) for k, v in table.items()}), path)
    return root


FLAG = {"dtype": "bool", "shape": [1], "names": None}


def test_bare_done_is_truncation_unless_success_says_otherwise(tmp_path):
    last = [False, False, True]
    root = _old_dataset(
        tmp_path / "old",
        {"next.done": [last, last], "next.success": [last, [False] * 3]},
        {"next.done": FLAG, "next.success": FLAG},
        (3, 3),
    )
    won, lost = open_dataset(root).episodes()
    assert won.terminated.tolist() == last
    assert won.reward.tolist() == [0.0, 0.0, 1.0]
    assert won.meta.success is True
    assert not won.truncated.any()
    assert lost.truncated.tolist() == last
    assert not lost.terminated.any()
    assert lost.meta.success is False
    assert [won.meta.task, lost.meta.task] == ["push", "pull"]
    assert won.stamp_ns.tolist() == [0, 100_000_000, 200_000_000]
    assert (won.source == Source.HUMAN).all()


def test_unknown_outcome_stays_unknown_unless_success_is_assumed(tmp_path):
    root = _old_dataset(tmp_path / "old", {}, {}, (4,))
    source = open_dataset(root).describe()
    assert source.action.names == ("m0", "m1")
    assert (source.action.low, source.action.high) == ((-6.0, -7.0), (0.0, -1.0))
    assert source.extra["action_limits"] == "recorded range"
    (unknown,) = open_dataset(root).episodes()
    assert np.isnan(unknown.reward).all()
    assert unknown.meta.success is None
    assert unknown.truncated[-1]
    (assumed,) = open_dataset(root, assume_success=True).episodes()
    assert assumed.reward.tolist() == [0, 0, 0, 1]
    assert assumed.terminated[-1]
    assert assumed.meta.success is True


def test_hil_serl_interventions(tmp_path):
    takeover = [False, True, True, False, True]
    root = _old_dataset(
        tmp_path / "old",
        {"complementary_info.is_intervention": [takeover]},
        {"complementary_info.is_intervention": FLAG},
        (5,),
    )
    (episode,) = open_dataset(root).episodes()
    assert episode.source.tolist() == [Source.POLICY, Source.HUMAN, Source.HUMAN, Source.POLICY, Source.HUMAN]
    assert episode.intervention_id.tolist() == [-1, 0, 0, -1, 1]


def test_rows_after_the_end_are_dropped(tmp_path):
    ends = [False, True, False, False]
    root = _old_dataset(
        tmp_path / "old",
        {"next.terminated": [ends], "next.truncated": [[False] * 4]},
        {"next.terminated": FLAG, "next.truncated": FLAG},
        (4,),
    )
    (episode,) = open_dataset(root).episodes()
    assert len(episode) == 2
    assert episode.terminated.tolist() == [False, True]
    assert episode.meta.extra["imported"]["steps_after_end_dropped"] == 2
    # the observation after the last step is a recorded one here
    np.testing.assert_array_equal(episode.observations["observation.state"][-1], [4.0, 5.0])


def test_partial_dataset_imports_what_is_there_and_reports_the_rest(tmp_path):
    root = _old_dataset(tmp_path / "old", {}, {}, (3, 3, 3, 3, 3))
    (root / "data" / "chunk-001" / "episode_000002.parquet").unlink()
    importer = open_dataset(root)
    assert importer.describe().extra["episodes_missing"] == {"2": "no data file"}
    assert [e.meta.episode_id for e in importer.episodes()] == [f"old-{i:06d}" for i in (0, 1, 3, 4)]
    with pytest.raises(ValueError, match=r"does not have \[2\].*present are \[0, 1, 3, 4\]"):
        open_dataset(root, episodes=[1, 2])
    shutil.rmtree(root / "data")
    with pytest.raises(FormatError, match="none of the 5 episodes"):
        open_dataset(root)


def test_damaged_datasets_are_refused_by_name(tmp_path, make_episode):
    root = _old_dataset(tmp_path / "old", {}, {}, (3, 3))
    second = root / "data" / "chunk-000" / "episode_000001.parquet"
    table = pq.read_table(second)
    pq.write_table(table.slice(0, 2), second)
    with pytest.raises(FormatError, match="episode 1: 2 rows, the metadata says 3"):
        list(open_dataset(root).episodes())
    broken = table.set_column(table.column_names.index("action"), "action", pa.array([[1.0, 2.0], [np.nan, 0.0], [0.0, 0.0]]))
    pq.write_table(broken, second)
    with pytest.raises(FormatError, match="episode 1: action is not finite at row 1"):
        list(open_dataset(root).episodes())
    pq.write_table(table.drop_columns(["action"]), second)
    with pytest.raises(FormatError, match="no column 'action'"):
        list(open_dataset(root).episodes())
    second.write_bytes(b"PAR1 torn")
    with pytest.raises(FormatError, match="not a readable parquet file"):
        list(open_dataset(root).episodes())
    with pytest.raises(FormatError, match=r"lerobot_v3 accepts v3\.x"):
        open_dataset(root, "lerobot_v3")
    with pytest.raises(FormatError, match="action_key to one of"):
        open_dataset(root, action_key="torques")

    export([make_episode(0, image=(64, 64))], tmp_path / "v3")
    (video,) = (tmp_path / "v3" / "videos").rglob("*.mp4")
    video.unlink()
    with pytest.raises(FormatError, match=r"no video of observation\.images\.front"):
        open_dataset(tmp_path / "v3")
    assert open_dataset(tmp_path / "v3", videos=False).describe().n_episodes == 1


def test_export_refuses_what_it_cannot_write(tmp_path, make_episode):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="unknown option push_to_hub=True; accepted are fps"):
        export([make_episode(0)], out, push_to_hub=True)
    with pytest.raises(ValueError, match="images='gif': accepted are video, png"):
        export([make_episode(0)], out, images="gif")
    with pytest.raises(ValueError, match="even sides: set images=png"):
        export([make_episode(0, image=(63, 64))], out)
    odd = make_episode(1)
    odd.observations.pop("observation.state")
    with pytest.raises(ValueError, match="made-1: observations are"):
        export([make_episode(0), odd], out)
    with pytest.raises(ValueError, match="no episode was given"):
        export([], out)
    assert list(tmp_path.iterdir()) == []  # a failed export leaves nothing behind
    export([make_episode(0)], out)
    with pytest.raises(FileExistsError, match="never overwrites"):
        export([make_episode(0)], out)


def test_pooled_statistics_are_those_of_the_union():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 3)) * (i + 1) for i, n in enumerate((5, 40, 7))]
    whole, pooled = vector_stats(np.concatenate(parts)), pool([vector_stats(p) for p in parts])
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(pooled[name], whole[name])
    unknown = vector_stats(np.full((4, 1), np.nan))
    assert unknown["count"] == 0
    mixed = pool([unknown, vector_stats(np.array([1.0, 3.0, np.nan]))])
    assert (mixed["mean"], mixed["max"], mixed["count"]) == (2.0, 3.0, 2)


@pytest.mark.parametrize("codec", ["libsvtav1", "h264"])
def test_encoding_leaves_scheduling_alone(tmp_path, codec):
    """SVT-AV1 makes itself and its caller SCHED_FIFO 99 when it runs as root: on a robot that starves the controllers."""

    def scheduling() -> dict[str, tuple[int, int]]:
        tasks = [t.name for t in TASKS.iterdir()]
        return {t: (os.sched_getscheduler(int(t)), os.sched_getparam(int(t)).sched_priority) for t in tasks}

    pytest.importorskip("av")
    if not TASKS.is_dir():
        pytest.skip("this system does not list a process's threads")
    before, usual = scheduling(), (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)
    writer = VideoWriter(tmp_path / "x.mp4", 10, (64, 64), codec, 30)
    frames = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), np.uint8)
    for part in (frames[:1], frames[1:]):
        writer.append(part)
        assert {v for k, v in scheduling().items() if k not in before} <= {usual}
    writer.close()
    assert usual == (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)
