"""MCAP: exports come back as the same episodes; bags of other programs become episodes through a robot description."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mcap", reason="pip install mcap rosbags")
pytest.importorskip("rosbags", reason="pip install mcap rosbags")

from store_kit import IMAGE, new_store, same, write

from robot_rl.replay import EpisodeStore, exporters, importers
from robot_rl.replay.importers.mcap_messages import TypeStore, mcap_module
from robot_rl.types import EpisodeMeta, Source


def filled(path):
    rng = np.random.default_rng(3)
    with new_store(path) as store:
        for i in range(3):
            write(store, rng, 8 + i, EpisodeMeta(f"e{i}", task="lift it", seed=i, success=bool(i % 2), control_hz=20.0))
    return EpisodeStore.open(path)


def test_an_export_comes_back_exactly(tmp_path):
    store = filled(tmp_path / "a")
    report = exporters.export_from(store, tmp_path / "out.mcap", "mcap")
    assert any("decisions" in note for note in report.notes)
    assert importers.detect(tmp_path / "out.mcap") == "mcap"
    source = importers.open_dataset(tmp_path / "out.mcap").describe()
    assert (source.n_episodes, source.task) == (3, "lift it")
    assert source.action.names == store.action.names
    with new_store(tmp_path / "b", noise_shape=None) as back:
        importers.import_into(back, tmp_path / "out.mcap")
        for i in store.episode_ids():
            mine, theirs = store.read(i), back.read(i)
            mine.decisions, mine.decision_id = [], np.full_like(mine.decision_id, -1)
            assert theirs.meta.extra.pop("imported")["dataset"] == "out.mcap"
            mine.meta.stats_hash = theirs.meta.stats_hash
            same(theirs, mine)


def test_readers_find_ros_schemas_and_topics(tmp_path):
    exporters.export_from(filled(tmp_path / "a"), tmp_path / "out.mcap", "mcap", images="jpeg")
    mcap = mcap_module()
    types = TypeStore()
    with open(tmp_path / "out.mcap", "rb") as file:
        reader = mcap.reader.make_reader(file)
        summary = reader.get_summary()
        schemas = {summary.schemas[c.schema_id].name: c.topic for c in summary.channels.values()}
        assert {s.encoding for s in summary.schemas.values()} == {"ros2msg"}
        assert schemas["sensor_msgs/msg/CompressedImage"] == "/top/image_raw/compressed"
        assert {"/episode_status", "/robot_rl/step", "/action", "/observation/state", "/reward/value"} <= {
            c.topic for c in summary.channels.values()
        }
        times = [m.log_time for _, _, m in reader.iter_messages()]
        assert times == sorted(times)
        for schema, channel, message in reader.iter_messages(topics=["/action"]):
            assert types.deserialize(message.data, schema.name).name
            assert channel.message_encoding == "cdr"


def test_without_the_packages_the_message_says_what_to_install(tmp_path, monkeypatch):
    import sys

    store = filled(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "mcap", None)
    with pytest.raises(ImportError, match="pip install mcap rosbags"):
        exporters.export_from(store, tmp_path / "x.mcap", "mcap")
    assert not (tmp_path / "x.mcap").exists()


# ---- bags of a robot


def bag(path, *, seconds=3.0, lost=None, status=True, image=False, drop=()):
    """What the simulated arm's graph would have recorded: state at 20 Hz, executed commands in between."""
    from robot_rl.robots.description import load_robot

    robot = load_robot("sim_arm")
    mcap, types = mcap_module(), TypeStore()
    names = next(iter(robot.states.values()))[0].names
    rng = np.random.default_rng(0)
    states, deltas = [], []
    with open(path, "wb") as file:
        writer = mcap.writer.Writer(file)
        writer.start(profile="ros2")
        channels: dict[str, int] = {}

        def put(topic, type_name, stamp, message):
            if topic in drop:
                return
            if topic not in channels:
                schema = writer.register_schema(type_name, "ros2msg", types.definition(type_name).encode())
                channels[topic] = writer.register_channel(topic, "cdr", schema)
            writer.add_message(channels[topic], stamp, types.serialize(message, type_name), stamp)

        pose = np.array([0.0, 0.0, 0.2])
        t0, period = 10**12, 50_000_000
        if status:
            put(
                "/episode_status",
                "diagnostic_msgs/msg/DiagnosticArray",
                t0,
                types.record(t0, "episode", "ep", {"state": "running", "task": "lift"}),
            )
        for i in range(int(seconds * 20)):
            stamp = t0 + i * period
            if lost is not None and lost[0] <= i < lost[1]:
                continue
            state = rng.normal(size=len(names))
            states.append(state)
            put("/state_estimate", "sensor_msgs/msg/JointState", stamp, types.joint_state(stamp, names[::-1], state[::-1]))
            delta = np.float32(rng.uniform(-0.02, 0.02, 3))
            deltas.append(delta)
            pose = pose + delta
            at = stamp + 5_000_000
            header = types.header(at, "base")
            point = types.t["geometry_msgs/msg/Point"](*pose.tolist())
            turn = types.t["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0)
            message = types.t["geometry_msgs/msg/PoseStamped"](
                header=header, pose=types.t["geometry_msgs/msg/Pose"](point, turn)
            )
            put("/executed/arm", "geometry_msgs/msg/PoseStamped", at, message)
            put(
                "/executed/gripper",
                "sensor_msgs/msg/JointState",
                at,
                types.joint_state(at, ["gripper_width"], np.array([0.04])),
            )
        end = t0 + int(seconds * 1e9)
        if status:
            put(
                "/episode_status",
                "diagnostic_msgs/msg/DiagnosticArray",
                end,
                types.record(end, "episode", "ep", {"state": "committed", "outcome": "success", "task": "lift"}),
            )
        writer.finish()
    return states, deltas


def test_a_robots_bag_becomes_the_episode_it_recorded(tmp_path):
    states, deltas = bag(tmp_path / "run.mcap")
    recording = importers.open_dataset(tmp_path / "run.mcap", robot="sim_arm", source="policy")
    source = recording.describe()
    assert source.extra["commands"]["arm"] == "/executed/arm"
    assert source.action.dim == 5
    (episode,) = recording.episodes()
    assert (episode.meta.episode_id, episode.meta.task, episode.meta.success) == ("ep", "lift", True)
    n = len(episode)
    assert n == 59
    np.testing.assert_allclose(episode.observations["observation.state"], np.float32(states)[: n + 1], rtol=1e-6)
    np.testing.assert_allclose(episode.action[1:, :3], np.array(deltas)[1:n], atol=1e-6)
    np.testing.assert_allclose(episode.action[:, 4], 0.04)
    assert (np.diff(episode.stamp_ns) == 50_000_000).all()
    assert episode.terminated[-1]
    assert set(episode.source) == {int(Source.POLICY)}


def test_a_source_that_went_silent_ends_the_episode(tmp_path):
    bag(tmp_path / "run.mcap", lost=(30, 40), status=False)
    (episode,) = importers.open_dataset(tmp_path / "run.mcap", robot="sim_arm").episodes()
    assert 30 <= len(episode) <= 33
    assert episode.meta.success is None
    assert episode.truncated[-1]
    assert np.isnan(episode.reward).all()


def test_what_a_bag_lacks_is_named(tmp_path):
    bag(tmp_path / "run.mcap", drop=("/executed/gripper",))
    with pytest.raises(importers.FormatError, match=r"/executed/gripper or /gripper_controller/commands \(missing\)"):
        importers.open_dataset(tmp_path / "run.mcap", robot="sim_arm")
    with pytest.raises(ValueError, match="robot is missing"):
        importers.open_dataset(tmp_path / "run.mcap")
    (tmp_path / "cut.mcap").write_bytes((tmp_path / "run.mcap").read_bytes()[:500])
    with pytest.raises(importers.FormatError):
        importers.open_dataset(tmp_path / "cut.mcap", robot="sim_arm")


def test_pictures_are_kept_raw_or_left_out(tmp_path):
    store = filled(tmp_path / "a")
    report = exporters.export_from(store, tmp_path / "out.mcap", "mcap", images="off")
    assert "images were left out" in report.notes
    assert IMAGE not in importers.open_dataset(tmp_path / "out.mcap").describe().observation_features
