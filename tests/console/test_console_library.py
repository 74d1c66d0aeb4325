"""Recorded episodes on the page: queue, film, labels, pairs, curve; and the server's plain requests."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install 'robot_rl[console]'")
pytest.importorskip("uvicorn", reason="pip install 'robot_rl[console]'")

from console_kit import ACTION, live

from robot_rl.console.clips import ClipRecorder, Clips
from robot_rl.console.frames import Cameras, Frame, to_jpeg, unpack
from robot_rl.console.hosting import ConsoleServer, HostConfig
from robot_rl.console.library import Library
from robot_rl.evaluation.statistics import wilson
from robot_rl.replay.store import EpisodeStore
from robot_rl.rewards.comparisons import read_comparisons, segment_pairs
from robot_rl.types import Episode, EpisodeMeta, FeatureSpec, RewardEvent, RewardKind

httpx = pytest.importorskip("httpx", reason="pip install httpx")

IMAGE = "observation.images.front"


def store_with(path, outcomes, *, images: bool = False, steps: int = 12) -> list[str]:
    features = {"observation.state": FeatureSpec((2,))} | ({IMAGE: FeatureSpec((12, 16, 3), "uint8")} if images else {})
    ids = []
    with EpisodeStore.create(path, observation_features=features, action=ACTION, sync=False) as store:
        for i, outcome in enumerate(outcomes):
            observations = {"observation.state": np.zeros((steps + 1, 2), np.float32)}
            if images:
                observations[IMAGE] = np.repeat(np.arange(steps + 1, dtype=np.uint8) * 10, 12 * 16 * 3).reshape(-1, 12, 16, 3)
            meta = EpisodeMeta(f"e{i:03d}", task="push", control_hz=10.0, success=outcome, weights_version=i)
            ids.append(store.add(Episode.from_arrays(meta, observations, np.zeros((steps, ACTION.dim), np.float32))))
    return ids


def mean(jpeg: bytes) -> float:
    import cv2

    return float(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).mean())


def test_queue_labels_and_what_they_leave_in_the_store(tmp_path):
    ids = store_with(tmp_path / "store", [True, None, False, None])
    library = Library(tmp_path / "store", tmp_path / "console")
    assert [r.id for r in library.rows()] == ids[::-1]
    assert [r.id for r in library.rows(unlabelled=True)] == [ids[3], ids[1]]
    assert [r.version for r in library.rows(hide=True)] == [-1] * 4
    library.label(ids[1], True, "ann")
    assert [r.id for r in library.rows(unlabelled=True)] == [ids[3]]
    with EpisodeStore.open(tmp_path / "store") as store:
        assert store.meta(ids[1]).success is True
        assert store.rewards(ids[1])[0].model_id == "human:ann"
    library.undo()
    assert [r.id for r in library.rows(unlabelled=True)] == [ids[3], ids[1]]
    with pytest.raises(ValueError, match="no label to undo"):
        library.undo()
    library.discard(ids[3])
    assert [r.id for r in library.rows()] == ids[2::-1]
    for wrong in ("../../etc/passwd", "none", ".", ""):
        with pytest.raises((KeyError, ValueError), match=r"no such episode|no episode"):
            library.label(wrong, True, "ann")


def test_film_comes_from_the_store_or_from_the_clip(tmp_path):
    (identity,) = store_with(tmp_path / "store", [None], images=True)
    library = Library(tmp_path / "store", tmp_path / "console")
    assert library.rows()[0].cameras == ("front",)
    assert mean(library.picture(identity, "front", 0.0)) == pytest.approx(0, abs=2)
    assert mean(library.picture(identity, "front", 1.0)) == pytest.approx(120, abs=2)
    assert mean(library.picture(identity, "front", 0.5)) == pytest.approx(60, abs=2)
    with pytest.raises(KeyError, match="no camera 'wrist'"):
        library.picture(identity, "wrist", 0.0)
    recorder = ClipRecorder(tmp_path / "console" / "clips", hz=10.0)
    for i in range(5):
        grey = np.full((12, 16, 3), 200 + i * 10, np.uint8)
        recorder.look(identity, True, {"side": Frame("side", i + 1, i, (i + 1) * 10**9, to_jpeg(grey))})
    recorder.look(identity, False, {})
    again = Library(tmp_path / "store", tmp_path / "console")
    assert again.rows()[0].cameras == ("side",)
    assert mean(again.picture(identity, "side", 1.0)) == pytest.approx(240, abs=2)
    path = tmp_path / "console" / "clips" / f"{identity}.clip"
    path.write_bytes(path.read_bytes()[:-7])  # the power went
    assert len(Clips(path.parent).cameras(identity)["side"]) == 4


def test_old_clips_go(tmp_path):
    recorder = ClipRecorder(tmp_path, keep=3)
    for i in range(6):
        recorder.look(f"episode-{i}", True, {"a": Frame("a", 1, 0, 10**9, b"x")})
        time.sleep(0.01)
    assert sorted(p.stem for p in tmp_path.glob("*.clip")) == ["episode-3", "episode-4", "episode-5"]
    recorder.look("../evil", True, {})
    assert not (tmp_path.parent / "evil.clip").exists()


def test_pairs_are_of_two_episodes_and_answers_are_kept_once(tmp_path):
    store_with(tmp_path / "store", [None] * 5, images=True)
    library = Library(tmp_path / "store", tmp_path / "console", segment_s=0.5)
    for choice, label in (("first", 0), ("second", 1), ("neither", -1)):
        pair = library.pair()
        assert pair.first.episode != pair.second.episode
        assert pair.first.stop - pair.first.start == pair.second.stop - pair.second.start == 5
        assert 0 <= pair.first.start < pair.first.stop <= 12
        library.prefer(pair.id, choice, "ann")
        with pytest.raises(ValueError, match="answered before"):
            library.prefer(pair.id, choice, "ann")
        kept = read_comparisons(tmp_path / "console" / "comparisons.jsonl")[-1]
        assert (kept.label, kept.pair, kept.operator) == (label, pair, "ann")
    assert library.prefer(library.pair().id, "skip", "ann") == "skipped"
    assert len(read_comparisons(tmp_path / "console" / "comparisons.jsonl")) == 3
    assert Library(tmp_path / "none", tmp_path / "console").pair() is None
    comparisons = read_comparisons(tmp_path / "console" / "comparisons.jsonl")
    with EpisodeStore.open(tmp_path / "store") as store:
        episodes = [store.read(i) for i in store.episode_ids()]
    frames, pairs = segment_pairs(comparisons, episodes, [IMAGE], frames=4)
    assert pairs.first.shape == pairs.second.shape == (3, 4)
    assert pairs.label.tolist() == [0, 1, -1]
    shown = frames[IMAGE][pairs.second[1]].mean((1, 2, 3))
    segment = comparisons[1].pair.second
    np.testing.assert_allclose(shown, np.linspace(segment.start, segment.stop, 4).round() * 10)


def test_the_curve_has_wilson_intervals(tmp_path):
    store_with(tmp_path / "store", [False] * 10 + [None] + [True] * 20)
    points = Library(tmp_path / "store", tmp_path / "console").curve()
    assert [p["x"] for p in points] == list(range(1, 31))
    assert points[9]["rate"] == 0.0
    assert points[-1] == {"x": 30, "rate": 1.0, "low": wilson(20, 20).low, "high": 1.0, "n": 20, "version": 30}


def test_rewards_lie_beside_the_film(tmp_path):
    (identity,) = store_with(tmp_path / "store", [None])
    with EpisodeStore.open(tmp_path / "store", mode="a") as store:
        store.append_reward(
            RewardEvent(identity, 3, "progress", 0.25, RewardKind.POTENTIAL), RewardEvent(identity, 4, "progress", float("nan"), RewardKind.POTENTIAL, valid=False, reason="timeout")
        )  # fmt: skip
    detail = Library(tmp_path / "store", tmp_path / "console").detail(identity)
    assert detail["traces"] == {"progress": [(3, 0.25)]}
    assert len(detail["source"]) == 12


def test_cameras_keep_the_newest_only():
    cameras = Cameras(hz=1000.0)
    try:
        for i in range(200):
            cameras.offer("a", np.full((4, 4, 3), i % 250, np.uint8), i)
            cameras.offer("b", b"\xff\xd8 a jpeg", i)
        until = time.monotonic() + 60.0
        while set(cameras.newest()) != {"a", "b"}:
            assert time.monotonic() < until
            time.sleep(0.01)
        frame = cameras.newest()["b"]
        assert unpack(frame.packed()) == frame
        assert frame.number <= 200
        cameras.offer("c", np.zeros((0, 0, 3), np.uint8), 0)  # cannot be encoded
        time.sleep(0.05)
        while not cameras.failed:
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        cameras.close()


def test_plain_requests_with_a_token(tmp_path):
    token = "correct-horse-battery"
    (tmp_path / "token").write_text(token)
    (tmp_path / "token").chmod(0o600)
    host = HostConfig(bind="127.0.0.1", port=0, token_file=str(tmp_path / "token"))
    with live(tmp_path, cameras=(), host=host) as console, httpx.Client(base_url=console.url) as http:
        assert http.get("/").status_code == 200
        assert "frame-ancestors 'none'" in http.get("/").headers["content-security-policy"]
        assert http.get("/api/me").json() == {"inside": False, "token": True}
        for path in ("/api/episodes", "/api/pair", "/api/curve", "/api/notes", "/report", "/api/episodes/x"):
            assert http.get(path).status_code == 401, path
        for body in (b"", b"[]", b'{"token":3}', b"[" * 3000, b'{"token":"' + b"x" * 5000):
            assert http.post("/api/login", content=body).status_code in (400, 413)
        assert http.post("/api/login", json={"token": "wrong-wrong-wrong-wrong"}).status_code == 401
        assert http.post("/api/login", json={"token": token}, headers={"origin": "http://evil.example"}).status_code == 403
        assert http.get("/", headers={"host": "evil.example"}).status_code == 403
        answer = http.post("/api/login", json={"token": token})
        assert answer.status_code == 200
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert "samesite=strict" in answer.headers["set-cookie"].lower()
        assert http.get("/api/episodes").json() == []
        assert http.get("/api/episodes/none").status_code == 404
        assert http.get("/api/episodes/..%2F..%2Fstore/front.jpg").status_code in (404, 409)
        assert http.get("/page/../server.py").status_code == 404
        assert http.get("/page/%2e%2e/server.py").status_code == 404
        assert http.get("/api/episodes/x/front.jpg?at=nan").status_code == 400
        assert http.get("/api/pair").json() == {"pair": None}
        assert httpx.get(f"{console.url}/api/notes", headers={"authorization": f"Bearer {token}"}).json() == []


def test_a_server_that_cannot_be_says_why(tmp_path):
    with pytest.raises(ValueError, match="token_file"), live(tmp_path, cameras=(), host=HostConfig("0.0.0.0", 0)):
        pass
    with live(tmp_path / "a", cameras=()) as console, pytest.raises(OSError, match=f"http_port={console.server.port}"):
        ConsoleServer(console.office, HostConfig(port=console.server.port))
    with pytest.raises(ValueError, match="both or neither"):
        HostConfig(certificate="x")
