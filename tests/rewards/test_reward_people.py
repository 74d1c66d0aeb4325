"""What a person marks and says on a page, and what it becomes: a classifier's frames, a delay. Through the verbs and real HTTP."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from robot_rl.cli import main
from robot_rl.replay import EpisodeStore
from robot_rl.rewards.marks import Look, append_look, marked, read_looks, tally
from robot_rl.types import ActionSpec, Episode, EpisodeMeta, FeatureSpec, RewardEvent, RewardKind

httpx = pytest.importorskip("httpx", reason="pip install httpx")
pytest.importorskip("uvicorn", reason="pip install 'robot_rl[console]'")

CAMERA = "observation.images.top"
FEATURES = {CAMERA: FeatureSpec((48, 48, 3), "uint8"), "observation.state": FeatureSpec((1,))}


def block(rng: np.random.Generator, length: int, done_at: int) -> Episode:
    """A block that jumps into the right half at ``done_at`` (never, where that lies beyond the end); the state tells where it is."""
    x = np.where(np.arange(length + 1) >= done_at, 30, 4)
    frames = rng.integers(50, 60, (length + 1, 48, 48, 3), np.uint8)
    for frame, left in zip(frames, x, strict=True):
        frame[16:28, left : left + 12] = (220, 40, 30)
    return Episode.from_arrays(
        EpisodeMeta("", task="move the block", control_hz=10.0),
        {CAMERA: frames, "observation.state": (x[:, None] / 48).astype(np.float32)}, np.zeros((length, 1), np.float32),
        stamp_ns=10**9 + 10**8 * np.arange(length), truncated=np.arange(length) == length - 1,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    path, rng = tmp_path / "episodes", np.random.default_rng(0)
    with EpisodeStore.create(path, observation_features=FEATURES, action=ActionSpec((-1,), (1,))) as store:
        for k in range(8):
            store.add(block(rng, 20 + k, 12 if k % 2 else 99))
    return path


def watched(monkeypatch, arguments, person):
    """Run a verb that serves a page; ``person(http)`` is who looks at it. Gives the exit code."""
    from robot_rl.console.hosting import PageServer

    started, trouble = PageServer.start, []

    def start(server):
        started(server)

        def visit():
            try:
                with httpx.Client(base_url=server.url, headers={"origin": server.url}) as http:
                    person(http)
            except BaseException as error:  # shown by the test, not lost in a thread
                trouble.append(error)
                with httpx.Client(base_url=server.url) as http:
                    while not http.get("/api/reel").json()["finished"]:
                        name = http.get("/api/reel").json()["episode"]
                        http.post("/api/reel", content=json.dumps({"episode": name, "leave_out": True}))

        threading.Thread(target=visit, daemon=True).start()
        return server

    monkeypatch.setattr(PageServer, "start", start)
    code = main([*arguments, "--port", "0", "--json"])
    if trouble:
        raise trouble[0]
    return code


def test_marked_frames_train_a_classifier(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "marks.jsonl"

    def person(http):
        assert "<canvas" in http.get("/").text
        assert http.get("/page/marking.js").status_code == 200
        while not (reel := http.get("/api/reel").json())["finished"]:
            name, frames = reel["episode"], reel["frames"]
            picture = http.get(f"/api/reel/{name}/{frames - 1}.jpg")
            assert picture.content[:2] == b"\xff\xd8"
            assert http.get(f"/api/reel/{name}/{frames}.jpg").status_code == 404
            beyond = {"episode": name, "first": 0, "last": frames, "success": []}
            assert "accepted are 0 to" in http.post("/api/reel", content=json.dumps(beyond)).json()["error"]
            success = [[12, frames - 1]] if int(name, 36) and frames % 2 == 0 else []
            said = {"episode": name, "first": 0, "last": frames - 1, "success": success, "mode": "" if success else "stuck"}
            assert http.post("/api/reel", content=json.dumps(said)).status_code == 200

    verb = ["reward", "record", str(folder), "--out", str(out), "--positives", "30", "--failures", "stuck,dropped"]
    assert watched(monkeypatch, verb, person) == 1  # nothing was dropped: a way of failing is not covered
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    told = last.get("result", last)
    assert told["missing"] == ["an attempt that fails by: dropped"]
    assert told["positives"] == sum(20 + k + 1 - 12 for k in range(1, 8, 2))
    assert main([*verb[:-1], "stuck", "--count", "--json"]) == 0
    model = str(tmp_path / "clf")
    train = ["reward", "train", str(folder), "--kind", "classifier", "--marks", str(out), "--cameras", CAMERA, "--out", model]
    options = ["--encoder", '{"size": 32}', "--options", '{"width": 16, "crops": 1, "pad": 0, "learning_rate": 1e-3}']
    capsys.readouterr()
    assert main([*train, *options, "--steps", "40", "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out.splitlines()[-1])
    fitted = fitted.get("result", fitted)
    assert fitted["positive_frames"] == told["positives"]
    assert fitted["auc"] >= 0.95


def test_what_was_shown_and_not_flagged_is_negative_and_the_later_look_counts(tmp_path):
    path = tmp_path / "marks.jsonl"
    append_look(path, Look("a", 0, 9, ((4, 6),)))
    append_look(path, Look("b", 0, 4, (), "dropped"))
    append_look(path, Look("a", 6, 12, ((11, 12),)))
    with path.open("ab") as file:
        file.write(b'{"episode": "c", "fir')  # cut by a crash
    looks = read_looks(path)
    frames, yes = marked(looks)["a"]
    assert frames.tolist() == list(range(13))
    assert frames[yes].tolist() == [4, 5, 11, 12]
    found = tally(looks, enough=4, modes=("dropped", "missed"))
    assert (found.positives, found.negatives, found.modes) == (4, 14, {"dropped": 1, "missed": 0})
    assert found.missing == ("an attempt that fails by: missed", "success in at least two episodes (one is held out)")
    with pytest.raises(ValueError, match="within the frames shown"):
        Look("a", 0, 5, ((3, 6),))


def test_delay_of_a_slider_on_the_page_and_of_recorded_feedback(folder, monkeypatch, capsys):
    late = 4

    def person(http):
        while not (reel := http.get("/api/reel").json())["finished"]:
            frames = reel["frames"]
            moved = (
                [1.0 if k >= 12 + late else -1.0 for k in range(frames)]
                if frames % 2 == 0
                else [None] * 3 + [-1.0] * (frames - 3)
            )
            wrong = http.post("/api/reel", content=json.dumps({"episode": reel["episode"], "readings": moved[1:]}))
            assert wrong.status_code == 400
            http.post("/api/reel", content=json.dumps({"episode": reel["episode"], "readings": moved}))

    verb = ["reward", "calibrate-delay", str(folder), "--signal", "observation.state[0]"]
    assert watched(monkeypatch, [*verb, "--seconds", "14"], person) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    told = last.get("result", last)
    assert told["delay_steps"] == late
    assert told["seconds"] == pytest.approx(0.4)
    assert told["correlation"] > 0.95
    with EpisodeStore.open(folder, mode="a") as store:
        for name in store.episode_ids():
            x = store.read(name, ["observation.state"]).observations["observation.state"][:, 0]
            for k in range(late, len(x)):  # recorded with delay_steps 1: one step earlier than it came
                value = float(np.clip(4 * x[k - late] - 1, -1, 1))
                store.append_reward(RewardEvent(name, k - 1, "human", value, RewardKind.DENSE, model_id="human:me"))
    assert main([*verb, "--recorded", "human", "--moved", "1", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last.get("result", last)["delay_steps"] == late
    assert main([*verb[:-1], "observation.state[3]", "--recorded", "human", "--json"]) == 1
    assert "accepted are 0 to 0" in capsys.readouterr().out
    assert main([*verb, "--recorded", "nobody", "--json"]) == 2
