"""A store gives back what was put in, in commit order, and refuses what it must not hold."""

from __future__ import annotations

import json
import threading
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_kit import ACTION, FEATURES, IMAGE, STATE, new_store, observation, same, write

from robot_rl.replay import EpisodeStore, SchemaError, StoreError, open_or_create
from robot_rl.replay.maintenance import collect_garbage, list_episodes, show, verify
from robot_rl.types import ActionSpec, Decision, Episode, EpisodeMeta, FeatureSpec, Step, Stratum


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 40),
    state=st.sampled_from([(1,), (7,), (2, 3)]),
    dtype=st.sampled_from(["float32", "float64", "int16"]),
    image=st.sampled_from([None, (8, 9, 3), (20, 8, 1), (9, 8, 4), (3, 3, 3)]),
    depth=st.sampled_from([None, (40, 40, 1)]),
    noise=st.sampled_from([None, (1, 2), (4, 3)]),
    codec=st.sampled_from(["commit", "background", "add"]),
)
def test_round_trip(tmp_path: Path, seed, length, state, dtype, image, depth, noise, codec):
    rng = np.random.default_rng(seed)
    features = {STATE: FeatureSpec(state, dtype)}
    if image:
        features[IMAGE] = FeatureSpec(image, "uint8")
    if depth:
        features["observation.depth"] = FeatureSpec(depth, "float32")
    path = tmp_path / uuid.uuid4().hex
    with new_store(path, observation_features=features, noise_shape=noise, chunk_horizon=4, sync=False) as store:
        meta = EpisodeMeta(
            "", task="put it there", seed=3, stratum=Stratum.PRIOR, extra={"start": {"x": 0.5}, "list": [1, None]}
        )
        if codec == "add":
            source = EpisodeStore.create(path / "other", **{k: getattr(store.spec, k) for k in (
                "observation_features", "action", "noise_shape", "chunk_horizon")}, sync=False)  # fmt: skip
            episode = write(source, rng, length, meta)[1]
            source.close()
            assert store.add(episode) == episode.meta.episode_id
        else:
            episode = write(store, rng, length, meta, success=True, background=codec == "background")[1]
        store.flush()
        episode_id = store.episode_ids()[0]
        same(episode, store.read(episode_id))
        assert store.read(episode_id, keys=[STATE]).observations.keys() == {STATE}
    report = verify(path)
    assert report.ok, report.errors
    assert report.steps == length


def test_zarr_reads_every_array(tmp_path: Path):
    zarr = pytest.importorskip("zarr", "3.0", reason="the library that reads the v3 format needs Python 3.11")
    rng = np.random.default_rng(0)
    with new_store(tmp_path / "s") as store:
        moving = write(store, rng, 37)[1]
        still = Episode.from_arrays(
            EpisodeMeta("still"),
            {
                STATE: np.zeros((24, 5), "f4"),
                IMAGE: observation(rng)[IMAGE][None] // 2 + rng.integers(0, 2, (24, 10, 12, 3), np.uint8),
            },
            np.zeros((23, 3), "f4"),
            truncated=np.arange(23) == 22,
        )
        store.add(still)
    layouts = set()
    for episode in (moving, still):
        folder = store.path / "episodes" / episode.meta.episode_id
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns that a delta filter is not in every zarr implementation
            group = zarr.open_group(folder, mode="r")
            unconsolidated = zarr.open_group(folder, mode="r", use_consolidated=False)
            for key in (STATE, IMAGE):
                np.testing.assert_array_equal(group[key][:], episode.observations[key])
                np.testing.assert_array_equal(unconsolidated[key][:], episode.observations[key])
            names = {"reward": "next.reward", "terminated": "next.terminated", "truncated": "next.truncated"}
            for key in Episode.STEP_ARRAYS:
                name = names.get(key, key)
                np.testing.assert_array_equal(group[name][:], getattr(episode, key), name)
            layouts.add(str(group[IMAGE].metadata.codecs[0]))
        assert group.attrs["robot_rl"]["meta"]["episode_id"] == episode.meta.episode_id
    np.testing.assert_array_equal(
        zarr.open_group(store.path / "episodes" / moving.meta.episode_id, mode="r")["decision.noise"][:],
        np.stack([d.noise for d in moving.decisions]),
    )
    assert len(layouts) == 2, "a still scene is stored along time, a moving one along rows"


def test_array_rewritten_by_another_tool_is_read(tmp_path: Path):
    zarr = pytest.importorskip("zarr", "3.0", reason="the library that reads the v3 format needs Python 3.11")
    with new_store(tmp_path / "s") as store:
        episode = write(store, np.random.default_rng(0), 9)[1]
    folder = store.path / "episodes" / episode.meta.episode_id
    group = zarr.open_group(folder, mode="r+")
    group.create_array("action", data=episode.action, chunks=(2, 3), overwrite=True)
    zarr.consolidate_metadata(folder)
    np.testing.assert_array_equal(EpisodeStore.open(store.path).read(episode.meta.episode_id, keys=()).action, episode.action)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_close_and_small(tmp_path: Path, channels: int):
    pytest.importorskip("PIL")
    y, x = np.mgrid[:128, :160]
    frames = np.stack([((np.sin(x / 9 + t / 5) + np.cos(y / 7)) * 60 + 127)[..., None].repeat(channels, -1) for t in range(20)])
    frames = frames.astype(np.uint8)
    features = {IMAGE: FeatureSpec(frames.shape[1:], "uint8")}
    with new_store(tmp_path / "s", observation_features=features, image_codec="jpeg") as store:
        episode_id = store.add(Episode.from_arrays(EpisodeMeta(""), {IMAGE: frames}, np.zeros((19, 3))))
        back = store.read(episode_id).observations[IMAGE]
        assert np.abs(back.astype(int) - frames).mean() < 3
        assert show(store, episode_id)["arrays"][f"{IMAGE}.jpeg"]["shape"][0] < (0.1 if channels == 3 else 0.2) * frames.nbytes
    assert verify(store.path).ok


def test_commit_order_is_one_for_all(tmp_path: Path):
    rng = np.random.default_rng(0)
    with new_store(tmp_path / "s", sync=False) as a, EpisodeStore.open(tmp_path / "s", "a", sync=False) as b:
        expected = []
        for i in range(6):
            meta = EpisodeMeta(f"e{9 - i}", stratum=Stratum.ONLINE if i % 2 else Stratum.DEMONSTRATION)
            expected.append(write((a, b)[i % 2], rng, 2, meta)[1].meta.episode_id)
        assert a.episode_ids() == b.episode_ids() == EpisodeStore.open(tmp_path / "s").episode_ids() == expected
        assert a.episode_ids(Stratum.DEMONSTRATION) == expected[::2]
        a.discard("e8")
        expected.remove("e8")
        assert a.episode_ids() == b.episode_ids() == expected
        with pytest.raises(KeyError, match="e8"):
            b.read("e8")
        with pytest.raises(StoreError, match="taken"):
            a.begin(EpisodeMeta("e8"))
        assert collect_garbage(tmp_path / "s").removed.keys() == {"discarded/e8"}
        assert collect_garbage(tmp_path / "s", dry_run=False).bytes > 0
    assert verify(tmp_path / "s").ok
    lines = list_episodes(tmp_path / "s")
    assert [line.episode_id for line in lines] == expected
    json.dumps([line.to_json() for line in lines])
    json.dumps(show(tmp_path / "s", "e9"))
    json.dumps(EpisodeStore.open(tmp_path / "s").summary().to_json())


def test_two_writers_at_once(tmp_path: Path):
    new_store(tmp_path / "s", sync=False).close()
    ids: dict[int, list[str]] = {}

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with EpisodeStore.open(tmp_path / "s", "a", sync=False) as store:
            ids[seed] = [write(store, rng, 5, background=bool(i % 2))[1].meta.episode_id for i in range(10)]

    threads = [threading.Thread(target=work, args=(s,)) for s in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = EpisodeStore.open(tmp_path / "s")
    order = store.episode_ids()
    assert sorted(order) == sorted(i for own in ids.values() for i in own)
    for own in ids.values():
        assert [i for i in order if i in own] == own
    assert sorted(store.attributes(i)["sequence"] for i in order) == list(range(1, 31))
    assert verify(store.path).ok


@pytest.mark.parametrize("seed", [2_000_000, 2_000_999, 2_001_000, 2_001_999])
def test_held_out_seeds_never_enter(tmp_path: Path, seed: int):
    with new_store(tmp_path / "s") as store:
        with pytest.raises(ValueError, match=str(seed)):
            store.begin(EpisodeMeta("", seed=seed))
        episode = write(store, np.random.default_rng(0), 3, EpisodeMeta("a", seed=999_999))[1]
        episode.meta.episode_id, episode.meta.seed = "b", seed
        with pytest.raises(ValueError, match="never enters replay"):
            store.add(episode)
        writer = store.begin(EpisodeMeta("c"))
        writer.append(Step(observation(np.random.default_rng(0)), np.zeros(3)))
        writer.meta.seed = seed
        with pytest.raises(ValueError, match=str(seed)):
            writer.commit(observation(np.random.default_rng(0)))
        writer.abort()
        assert store.episode_ids() == ["a"]


def test_refusals_name_the_key(tmp_path: Path):
    rng = np.random.default_rng(0)
    store = new_store(tmp_path / "s", stats_hash="abc")
    good = observation(rng)
    writer = store.begin(EpisodeMeta("x"))
    for bad, word in (
        (Step({STATE: good[STATE]}, np.zeros(3)), IMAGE),
        (Step({**good, STATE: np.zeros(4, "f4")}, np.zeros(3)), r"observation.state has shape \(4,\), expected \(5,\)"),
        (Step({**good, IMAGE: good[IMAGE].astype("f4")}, np.zeros(3)), "float32, expected uint8"),
        (Step({STATE: good[STATE], "other": good[IMAGE]}, np.zeros(3)), IMAGE),
        (Step(good, np.zeros(2)), r"action has shape \(2,\), expected \(3,\)"),
        (Step(good, np.array([0, np.nan, 0])), "expected 3 finite"),
        (Step(good, np.array([0, 0, -np.inf])), "expected 3 finite"),
        (Step(good, np.zeros(3), action_base=np.zeros(1)), "action_base"),
        (Step(good, np.zeros(3), decision_id=0), "decision_id=0"),
    ):
        with pytest.raises(ValueError, match=word):
            writer.append(bad)
    assert len(writer) == 0
    with pytest.raises(ValueError, match="noise"):
        writer.decide(Decision(0, np.zeros((2, 3)), np.zeros((4, 3)), np.zeros((4, 3))))
    with pytest.raises(ValueError, match="chunk_base"):
        writer.decide(Decision(0, None, np.zeros((5, 3)), np.zeros((5, 3))))
    with pytest.raises(ValueError, match="no steps"):
        writer.commit(good)
    writer.append(Step(good, np.zeros(3), terminated=True))
    with pytest.raises(ValueError, match="ended at step 0"):
        writer.append(Step(good, np.zeros(3)))
    with pytest.raises(StoreError, match="already being written"):
        store.begin(EpisodeMeta("x"))
    writer.commit(good)
    with pytest.raises(StoreError, match="committed"):
        writer.append(Step(good, np.zeros(3)))
    with pytest.raises(StoreError, match="taken"):
        store.begin(EpisodeMeta("x"))
    with pytest.raises(ValueError, match="episode_id"):
        store.begin(EpisodeMeta("../x"))
    with pytest.raises(SchemaError, match="'other'"):
        store.begin(EpisodeMeta("", stats_hash="other"))
    with pytest.raises(TypeError, match="handle"):
        store.begin(EpisodeMeta("", extra={"handle": object()}))
    episode = store.read("x")
    episode.meta.episode_id = "y"
    episode.observations[STATE] = episode.observations[STATE][:-1]
    with pytest.raises(ValueError, match=r"observation\.state has shape"):
        store.add(episode)
    store.close()
    reader = EpisodeStore.open(store.path)
    with pytest.raises(StoreError, match="mode='a'"):
        reader.begin(EpisodeMeta(""))
    with pytest.raises(FileExistsError):
        new_store(store.path)
    with pytest.raises(ValueError, match="image_codec='png'"):
        new_store(tmp_path / "t", image_codec="png")


def test_other_versions_are_refused(tmp_path: Path):
    with new_store(tmp_path / "s") as store:
        episode_id = write(store, np.random.default_rng(0), 3)[1].meta.episode_id
    info = json.loads((store.path / "store.json").read_text())
    assert info["git_revision"] is not None
    assert FEATURES[STATE].to_json() == info["observation_features"][STATE]
    (store.path / "store.json").write_text(json.dumps({**info, "schema_version": 99}))
    with pytest.raises(SchemaError, match="schema 99"):
        EpisodeStore.open(store.path)
    (store.path / "store.json").write_text(json.dumps(info))
    group = store.path / "episodes" / episode_id / "zarr.json"
    group.write_text(group.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(SchemaError, match="schema 99"):
        EpisodeStore.open(store.path).episode_ids()
    with pytest.raises(FileNotFoundError, match="no episode store"):
        EpisodeStore.open(tmp_path)


def test_open_or_create(tmp_path: Path):
    options = {"observation_features": FEATURES, "action": ACTION, "stats_hash": "h"}
    open_or_create(tmp_path / "s", **options).close()
    open_or_create(tmp_path / "s", **options).close()
    with pytest.raises(SchemaError, match="action"):
        open_or_create(tmp_path / "s", **{**options, "action": ActionSpec((0,), (1,))})


def test_an_episode_cut_from_outside_is_truncated(tmp_path: Path):
    rng = np.random.default_rng(0)
    with new_store(tmp_path / "s") as store:
        cut = write(store, rng, 5, terminated=False)[1]
        ended = write(store, rng, 5)[1]
    assert cut.truncated.tolist() == [False] * 4 + [True]
    assert not cut.terminated.any()
    assert ended.terminated[-1]
    assert not ended.truncated.any()


def test_verify_finds_damage(tmp_path: Path):
    rng = np.random.default_rng(0)
    with new_store(tmp_path / "s") as store:
        ids = [write(store, rng, 20)[1].meta.episode_id for _ in range(4)]
    assert verify(store.path).ok
    episodes = store.path / "episodes"
    image = episodes / ids[0] / IMAGE / "c.0.0.0.0"
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 64
    image.write_bytes(data)
    (episodes / ids[1] / "action" / "c.0.0").unlink()
    (episodes / ids[2] / "zarr.json").write_text("{")
    report = verify(store.path)
    assert {p.where for p in report.errors} == set(ids[:3])
    assert any(IMAGE in p.what for p in report.errors)
    json.dumps(report.to_json())
    reader = EpisodeStore.open(store.path)
    assert reader.episode_ids() == [ids[0], ids[1], ids[3]]
    with pytest.raises(KeyError, match="cannot be read"):
        reader.meta(ids[2])


def test_a_reader_never_sees_half_an_episode(tmp_path: Path):
    store = new_store(tmp_path / "s", sync=False)
    done = threading.Event()

    def write_many() -> None:
        rng = np.random.default_rng(1)
        try:
            for i in range(25):
                write(store, rng, 1 + i % 7, success=bool(i % 2))
        finally:
            done.set()

    thread = threading.Thread(target=write_many)
    thread.start()
    reader = EpisodeStore.open(store.path)
    cursor, seen = None, []
    while True:
        last = done.is_set()
        new, _, cursor = reader.tail(cursor)
        for episode_id in new:
            assert len(reader.read(episode_id)) == reader.attributes(episode_id)["length"]
        seen += new
        if last:
            break
    thread.join()
    assert seen == store.episode_ids()
    assert len(seen) == 25
    store.close()


def test_a_refused_step_leaves_no_trace(tmp_path: Path):
    rng = np.random.default_rng(0)
    with new_store(tmp_path / "s") as store:
        writer = store.begin(EpisodeMeta("e"))
        with pytest.raises(ValueError, match="scalar"):
            writer.append(Step(observation(rng), np.zeros(3), action_human=np.ones(3), weights_version=2**40))
        writer.append(Step(observation(rng), np.zeros(3)))
        assert np.isnan(writer.commit(observation(rng)).action_human).all()
