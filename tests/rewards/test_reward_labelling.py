"""From a store of episodes to a trained source, its labels, its report and the composed reward, as a user would do it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from vlm_kit import ROOMY

from robot_rl.cli import main
from robot_rl.replay import EpisodeStore
from robot_rl.rewards import EpisodeTrace, FrameBatch, RewardSource, ScoreBatch, SourceInfo, load_source, source_kinds
from robot_rl.rewards.composition import channels_of, compose
from robot_rl.rewards.composition_config import ChannelConfig, CompositionConfig
from robot_rl.rewards.labelling import label_store, trace_of
from robot_rl.rewards.preference import LabelConfig, label_pairs
from robot_rl.rewards.preference_model import choose_pairs
from robot_rl.rewards.report import judge_source, write_report
from robot_rl.rewards.vlm.fake_server import FakeVlmServer, Knobs
from robot_rl.rewards.vlm_progress import VlmProgressSource, shuffled_values
from robot_rl.types import ActionSpec, Episode, EpisodeMeta, FeatureSpec, RewardEvent, RewardKind

CAMERA, TASK = "observation.images.top", "push the red block to the right"
FEATURES = {CAMERA: FeatureSpec((48, 48, 3), "uint8"), "observation.state": FeatureSpec((2,))}


def recording(rng: np.random.Generator, success: bool, length: int) -> Episode:
    """A block that is pushed all the way to the right, or not."""
    reach = 1.0 if success else float(rng.uniform(0.1, 0.45))
    share = np.linspace(0, reach, length + 1)
    frames = np.full((length + 1, 48, 48, 3), 60, np.uint8)
    frames += rng.integers(0, 8, frames.shape, np.uint8)
    y = int(rng.integers(16, 24))
    for frame, s in zip(frames, share, strict=True):
        x = int(2 + s * 34)
        frame[y : y + 10, x : x + 10] = (220, 40, 30)
    state = np.stack([share, np.zeros_like(share)], 1).astype(np.float32)
    return Episode.from_arrays(
        EpisodeMeta("", task=TASK, success=success, control_hz=10.0), {CAMERA: frames, "observation.state": state},
        np.zeros((length, 2), np.float32), stamp_ns=10**9 + 10**8 * np.arange(length), truncated=np.arange(length) == length - 1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "episodes"
    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, observation_features=FEATURES, action=ActionSpec((-1, -1), (1, 1))) as store:
        for k in range(20):
            store.add(recording(rng, k % 2 == 0, int(rng.integers(18, 30))))
    return path


@pytest.fixture(scope="module")
def models(folder, tmp_path_factory):
    """A classifier and a progress model, trained by the verb."""
    out = tmp_path_factory.mktemp("models")
    common = ["--cameras", CAMERA, "--encoder", '{"size": 48}', "--json"]
    classifier = ["--options", '{"width": 32, "crops": 2, "pad": 2, "learning_rate": 1e-3}', "--steps", "150"]
    progress = ["--options", '{"width": 32, "layers": 1, "components": 8, "batch": 16, "noise": 0.1}', "--steps", "250"]
    assert main(["reward", "train", str(folder), "--kind", "classifier", "--out", str(out / "clf"), *classifier, *common]) == 0
    assert main(["reward", "train", str(folder), "--kind", "progress", "--out", str(out / "progress"), *progress, *common]) == 0
    (out / "clf.yaml").write_text(f"kind: classifier\nname: clf\nmodel: {out / 'clf'}\n")
    (out / "progress.yaml").write_text(f"kind: progress\nname: progress\nmodel: {out / 'progress'}\n")
    return out


def test_label_report_and_compose(folder, models, capsys):
    for name in ("clf", "progress"):
        assert main(["reward", "label", str(folder), "--source", str(models / f"{name}.yaml"), "--json"]) == 0
        code = main(
            [
                "reward",
                "report",
                str(folder),
                "--source",
                str(models / f"{name}.yaml"),
                "--out",
                str(models / "reports"),
                "--json",
            ]
        )
        assert code == 0, capsys.readouterr().out
    capsys.readouterr()
    report = json.loads((models / "reports" / "progress.json").read_text())
    assert report["voc"] >= 0.9
    assert report["voc_reversed"] <= -0.5
    assert abs(report["voc_shuffled"]) <= 0.5
    assert report["auc"] >= 0.9
    assert report["findings"] == []
    judged = json.loads((models / "reports" / "clf.json").read_text())
    assert judged["agreement"] >= 0.9
    assert judged["calibration"]["error"] <= 0.25
    page = (models / "reports" / "progress.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert "<script" not in page
    channels = (
        ChannelConfig("clf", report=str(models / "reports" / "clf.json")),
        ChannelConfig("progress", RewardKind.POTENTIAL),
    )
    with EpisodeStore.open(folder) as store:
        for episode_id in store.episode_ids():
            e = store.read(episode_id, ["observation.state"])
            composed = compose(
                channels_of(len(e), store.rewards(episode_id), channels), CompositionConfig(channels), 0.97, False
            )
            assert np.isfinite(composed.reward[: composed.length]).all()
            assert composed.terminated == bool(e.meta.success)


def test_labelling_again_skips_and_relabelling_replaces(folder, models):
    source = load_source(str(models / "progress.yaml"))
    with EpisodeStore.open(folder, mode="a") as store:
        first = store.episode_ids()[:3]
        label_store(store, source, episodes=first)
        assert label_store(store, source, episodes=first).skipped == 3
        before = [(e.step, e.source, e.value) for e in store.rewards(first[0]) if e.valid]
        assert label_store(store, source, episodes=first, again=True).episodes == 3
        assert [(e.step, e.source, e.value) for e in store.rewards(first[0]) if e.valid] == before


def test_frame_by_frame_equals_the_whole_episode_and_the_future_changes_nothing(folder, models):
    with EpisodeStore.open(folder) as store:
        episode = store.read(store.episode_ids()[0], [CAMERA])
    trace = trace_of(episode)
    changed = dict(trace.observations)
    changed[CAMERA] = np.concatenate([changed[CAMERA][:10], changed[CAMERA][10:] // 2])
    for name in ("progress", "clf"):
        source = load_probability(models) if name == "clf" else load_source(str(models / f"{name}.yaml"))
        whole = source.score_episode(trace)
        online = []
        for k in range(len(trace.stamps_ns)):
            batch = FrameBatch(
                {CAMERA: trace.observations[CAMERA][k : k + 1]}, np.array([k]), trace.stamps_ns[k : k + 1], TASK, "x"
            )
            online.append(float(source.score(batch).value[0]))
        np.testing.assert_allclose(online, whole.value, atol=1e-5)
        other = source.score_episode(EpisodeTrace("y", changed, trace.stamps_ns, TASK))
        np.testing.assert_allclose(other.value[:10], whole.value[:10], atol=1e-6)


def load_probability(models):
    path = models / "prob.yaml"
    path.write_text(f"kind: classifier\nname: clf.prob\noutput: probability\nmodel: {models / 'clf'}\n")
    return load_source(str(path))


def test_classifier_online_fires_once_where_the_whole_episode_says(folder, models):
    source = load_source(str(models / "clf.yaml"))
    with EpisodeStore.open(folder) as store:
        episode = store.read(store.episode_ids()[0], [CAMERA])
    trace = trace_of(episode)
    verdict = source.score_episode(trace)
    fired = []
    for k in range(len(trace.stamps_ns)):
        batch = FrameBatch(
            {CAMERA: trace.observations[CAMERA][k : k + 1]}, np.array([k]), trace.stamps_ns[k : k + 1], TASK, "x"
        )
        fired += source.score(batch).steps.tolist()
    assert fired == verdict.steps.tolist()
    assert len(fired) == 1


def test_a_classifier_that_never_says_success_is_found_out(folder, models):
    told = load_source(str(models / "clf.yaml"))
    path = models / "deaf.yaml"
    path.write_text(f"kind: classifier\nname: clf.deaf\nthreshold: 0.9999999\nmodel: {models / 'clf'}\n")
    with EpisodeStore.open(folder) as store:
        episodes = [store.read(n, [CAMERA]) for n in store.episode_ids()]
    heard, deaf = (judge_source(s, episodes) for s in (told, load_source(str(path))))
    assert heard.recall >= 0.5
    assert not any("recall" in f for f in heard.findings())
    assert deaf.recall == 0.0
    assert "recall 0.00 is below 0.5: it calls few of the successes one" in deaf.findings()


class Broken:
    name, kind, coverage, needs = "broken", RewardKind.DENSE, "every_step", frozenset()

    def describe(self):
        return SourceInfo("broken")

    def score(self, batch):
        raise RuntimeError("no")

    def score_episode(self, trace):
        raise RuntimeError("no")


def test_a_source_that_raises_gives_invalid_answers_and_nothing_else(folder):
    source = Broken()
    assert isinstance(source, RewardSource)
    with EpisodeStore.open(folder, mode="a") as store:
        one = store.episode_ids()[:1]
        summary = label_store(store, source, episodes=one)
        assert summary.valid == 0
        assert set(summary.invalid) == {"error"}
        channel = ChannelConfig("broken", RewardKind.DENSE)
        e = store.read(one[0], ["observation.state"])
        reward = compose(
            channels_of(len(e), store.rewards(one[0]), [channel]), CompositionConfig((channel,)), 0.9, False
        ).reward
        assert np.isnan(reward).all()
    report = judge_source(source, [e])
    assert any("valid_fraction" in f for f in report.findings())


class Judge:
    """Progress that is right, or that only counts frames."""

    kind, coverage, needs = RewardKind.POTENTIAL, "every_step", frozenset({"observation.state", CAMERA})

    def __init__(self, name: str):
        self.name = name

    def describe(self):
        return SourceInfo(self.name)

    def score(self, batch):
        return ScoreBatch.none()

    def score_episode(self, trace):
        n = trace.length + 1
        value = trace.observations["observation.state"][:, 0] if self.name == "right" else np.linspace(0, 1, n)
        return ScoreBatch(np.arange(n), value.astype(np.float32), np.ones(n, bool), ("",) * n)


def test_a_report_tells_progress_from_counting(folder, tmp_path):
    with EpisodeStore.open(folder) as store:
        episodes = [store.read(e) for e in store.episode_ids()]
    right, counting = (judge_source(Judge(name), episodes) for name in ("right", "counting"))
    assert (right.voc, right.voc_reversed, right.auc) == (pytest.approx(1.0), pytest.approx(-1.0), 1.0)
    assert right.findings() == []
    assert counting.voc == pytest.approx(1.0)
    assert counting.voc_reversed == pytest.approx(1.0)
    assert any("auc" in f for f in counting.findings())
    written = json.loads(write_report(right, tmp_path).read_text())
    assert len(written["per_episode"]) == 20
    assert len(written["false_positive_frames"]) == 10


# ---- with a VLM that knows


def bars(n: int = 20) -> np.ndarray:
    """Frames that get brighter: brightness is progress."""
    return np.stack([np.full((24, 24, 3), int(20 + 220 * k / (n - 1)), np.uint8) for k in range(n)])


@pytest.fixture
def server():
    with FakeVlmServer() as running:
        yield running


def vlm(url: str, **more) -> dict:
    return {**ROOMY, "base_url": url, "model": "fake", "rate_per_s": 0.0, "cache": "off", **more}


def asking(server, method: str) -> VlmProgressSource:
    return VlmProgressSource(vlm(server.url), CAMERA, method=method, goal=TASK)


def test_vlm_progress_of_every_kind(server):
    frames = bars()
    trace = EpisodeTrace("e", {CAMERA: frames}, np.arange(20), TASK)
    for method in ("shuffled", "pairwise"):
        scores = asking(server, method).score_episode(trace)
        assert scores.valid.all()
        assert (np.diff(scores.value) >= -1e-6).all()
    dark = EpisodeTrace("d", {CAMERA: frames[:4]}, np.arange(4), TASK)
    for method in ("claim", "rubric"):
        assert asking(server, method).score_episode(trace).value[0] > 0.8
        assert asking(server, method).score_episode(dark).value[0] < 0.3
    assert asking(server, "done").score_episode(trace).success is False, "not sure enough at 0.9"
    server.knobs.p_500 = 1.0
    failed = asking(server, "shuffled").score_episode(trace)
    assert not failed.valid.any()
    assert set(failed.reason) == {"http_5xx"}


def test_a_trend_pays_for_every_stretch_and_fails_alone(server):
    source = VlmProgressSource(vlm(server.url), CAMERA, method="trend", goal=TASK, stride=5)
    up, down, still = bars(), bars()[::-1], np.repeat(bars()[:1], 20, 0)
    film = np.concatenate([up, down, still])  # 60 frames: what is before a turn and after it share a stretch
    scores = source.score_episode(EpisodeTrace("e", {CAMERA: film}, np.arange(60), TASK))
    assert scores.steps.tolist() == [*range(5, 60, 5), 59]
    assert scores.value[:3].tolist() == [1.0] * 3
    assert scores.value[4:7].tolist() == pytest.approx([-0.2] * 3)
    assert scores.value[8:].tolist() == [0.0] * 4
    assert source.kind is RewardKind.DENSE
    server.knobs.p_500 = 1.0
    failed = source.score_episode(EpisodeTrace("f", {CAMERA: up}, np.arange(20), TASK))
    assert not failed.valid.any()
    assert set(failed.reason) == {"http_5xx"}


def test_a_node_tells_the_source_where_the_server_is(server):
    source = VlmProgressSource(vlm("http://127.0.0.1:9"), CAMERA, goal=TASK)
    source.connect(endpoint=server.url, model="other", max_qps=50.0, max_in_flight=2, cache="off")
    assert source.describe().model_id == "other/shuffled"
    assert source.score_episode(EpisodeTrace("e", {CAMERA: bars(4)}, np.arange(4), TASK)).valid.all()
    assert source.figures()["requests"] == 1


class Positional:
    """A model that answers by position, whatever it is shown."""

    def ask(self, question):
        from robot_rl.rewards.vlm import Answer

        n = len(question.images) - 1
        rows = [{"i": k + 2, "seen": "", "progress": 100 * (k + 1) / n} for k in range(n)]
        return Answer({"frames": rows})


def test_shuffling_unmasks_a_model_that_answers_by_position():
    from robot_rl.rewards.statistics import value_order_correlation

    frames = bars(15)
    shuffled = [value_order_correlation(shuffled_values(Positional(), TASK, frames, str(k))[0][1:]) for k in range(50)]
    plain = shuffled_values(Positional(), TASK, frames, "0", shuffle=False)[0]
    assert abs(np.mean(shuffled)) <= 0.12
    assert value_order_correlation(plain) == pytest.approx(1.0)


def test_asking_in_both_orders_removes_position_bias(server):
    server.knobs.position_bias = 0.3
    rng = np.random.default_rng(0)
    frames = bars(40)
    chosen = choose_pairs(40, 200, rng)
    truth = chosen[:, 1] > chosen[:, 0]
    views = [[f] for f in frames]
    source = asking(server, "shuffled")
    plain, _ = label_pairs(source.client, TASK, views, chosen, LabelConfig(swap_first=0, swap_share=0.0))
    both, report = label_pairs(source.client, TASK, views, chosen, LabelConfig(swap_first=200))
    assert (plain.label == truth).mean() == pytest.approx(0.85, abs=0.08)
    assert (both.label == (both.second > both.first)).all(), "what survives is right"
    assert report.asked == 200
    assert 0.55 <= len(both.label) / 200 <= 0.85
    same, twin = label_pairs(source.client, TASK, [[frames[0]], [frames[0]]], np.array([[0, 1]]))
    assert (len(same.label), twin.invalid) == (0, {"identical_images": 1})


def test_real_rice_frames_in_both_orders(data_dir, server):
    folder = data_dir / "rice_scoop_frames"
    if not folder.is_dir():
        pytest.skip(f"needs the recording rice_scoop_frames in {data_dir}")
    from robot_rl.rewards.goal import read_picture
    from robot_rl.rewards.vlm.cache import pixel_hash

    steps = (0, 100, 200, 300, 400, 457)
    views = [[read_picture(folder / f"599-{s}-521-{c}.jpg")[::4, ::4] for c in range(3)] for s in steps]
    known = {pixel_hash(p): s / 521 for s, pictures in zip(steps, views, strict=True) for p in pictures}
    from robot_rl.rewards.vlm.fake_server import scripted

    server.judge = scripted(known)
    source = VlmProgressSource(vlm(server.url, image_format="png", in_flight=2), CAMERA, goal="scoop the rice")
    pairs = np.array([(a, b) for a in range(6) for b in range(a + 1, 6)])
    total = 0
    for camera in range(3):
        found, report = label_pairs(source.client, "to scoop the rice", [[v[camera]] for v in views], pairs)
        total += int((found.label == 1).sum())
        assert report.consistency == 1.0
    assert total == 45


def test_a_process_reward_pays_for_each_sub_task_once(tmp_path):
    rng = np.random.default_rng(1)
    features = {CAMERA: FeatureSpec((48, 48, 3), "uint8"), "observation.state": FeatureSpec((4,))}
    stops = (18, 40)
    with EpisodeStore.create(tmp_path / "s", observation_features=features, action=ActionSpec((-1, -1), (1, 1))) as store:
        for _ in range(8):
            base = recording(rng, True, 59)
            at, frames = np.zeros(60), base.observations[CAMERA].copy()
            for a, b, p, q in ((0, 18, 0, 1), (26, 40, 1, 2)):
                s = np.clip((np.arange(60) - a) / (b - a), 0, 1)
                at = np.where(np.arange(60) >= a, p + (q - p) * (3 * s**2 - 2 * s**3), at)
            for frame, x in zip(frames, at, strict=True):
                frame[:] = 50 + rng.integers(0, 8)
                frame[20:28, int(2 + 18 * x) : int(10 + 18 * x)] = (220, 40, 30)
            state = np.stack([np.ones(60), at, np.zeros(60), np.zeros(60)], 1).astype(np.float32)
            observations = {CAMERA: frames, "observation.state": state}
            store.add(
                Episode.from_arrays(base.meta, observations, base.action, stamp_ns=base.stamp_ns, truncated=base.truncated)
            )
            base.meta.episode_id = ""
    options = [
        "--options",
        '{"width": 32, "crops": 1, "learning_rate": 2e-3}',
        "--steps",
        "200",
        "--gripper",
        "0",
        "--position",
        "1,2,3",
    ]
    common = ["--cameras", CAMERA, "--encoder", '{"size": 48}', "--out", str(tmp_path / "m"), "--json"]
    assert main(["reward", "train", str(tmp_path / "s"), "--kind", "process", *options, *common]) == 0
    (tmp_path / "process.yaml").write_text(f"kind: process\nmodel: {tmp_path / 'm'}\n")
    source = load_source(str(tmp_path / "process.yaml"))
    assert source.keyframes == pytest.approx(2.0, abs=0.5)
    with EpisodeStore.open(tmp_path / "s") as store:
        for episode_id in store.episode_ids()[:3]:
            scores = source.score_episode(trace_of(store.read(episode_id)))
            assert 0.5 <= float(scores.value.sum()) <= 1.5
            assert all(min(abs(step - s) for s in stops) <= 8 for step in scores.steps.tolist())


def redness(image: np.ndarray) -> float:
    """Where the red block is: 0 left, 1 right."""
    red = (image[..., 0].astype(int) - image[..., 1]) > 60
    return float(np.nonzero(red)[1].mean()) / image.shape[1] if red.any() else 0.0


def test_a_reward_learned_from_a_vlms_comparisons(folder, tmp_path, capsys):
    from robot_rl.rewards.statistics import spearman

    with FakeVlmServer(redness) as judge:
        judge.knobs.p_500 = judge.knobs.p_malformed = 0.1
        given = json.dumps(vlm(judge.url, in_flight=4, backoff_s=0.001))
        out = tmp_path / "pref"
        arguments = [
            "--cameras",
            CAMERA,
            "--encoder",
            '{"size": 48}',
            "--vlm",
            given,
            "--pairs",
            "250",
            "--out",
            str(out),
            "--json",
        ]
        assert main(["reward", "train", str(folder), "--kind", "preference", *arguments]) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["order_consistency"] == 1.0
    assert said["labelled"] >= 150
    path = tmp_path / "pref.yaml"
    path.write_text(f"kind: preference\nname: vlm.pair\nmodel: {out}\n")
    source = load_source(str(path))
    with EpisodeStore.open(folder) as store:
        episodes = [store.read(e) for e in store.episode_ids()]
    values = np.concatenate([source.score_episode(trace_of(e)).value for e in episodes])
    truth = np.concatenate([e.observations["observation.state"][1:, 0] for e in episodes])
    assert spearman(values, truth) >= 0.85


def test_installed_kinds_are_told():
    assert {"classifier", "progress", "goal_image", "preference", "vlm", "video_likelihood"} <= set(source_kinds())
    assert Knobs.FAULTS


def test_rewards_written_down_for_learning_offline(folder, models, tmp_path, capsys):
    """Label, report, apply: the copy's rewards are what a learner would compose from the events, and episodes end at success."""
    source = str(models / "clf.yaml")
    assert main(["reward", "label", str(folder), "--source", source, "--json"]) == 0
    assert main(["reward", "report", str(folder), "--source", source, "--out", str(models / "reports"), "--json"]) == 0
    block = tmp_path / "reward.yaml"
    block.write_text(
        "reward:\n  channels:\n"
        f"    - {{source: clf, kind: success, weight: 2.0, report: {models / 'reports' / 'clf.json'}}}\n"
        "    - {source: progress, kind: potential, weight: 0.0}\n"
    )
    out = tmp_path / "rewarded"
    verb = ["reward", "apply", str(folder), "--reward", str(block), "--gamma", "0.97", "--out", str(out), "--json"]
    capsys.readouterr()
    assert main(verb) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    told = last.get("result", last)
    with EpisodeStore.open(folder) as store, EpisodeStore.open(out) as copied:
        assert told["episodes"] == len(copied) == len(store)
        assert told["successes"] >= 9  # of ten
        for name in copied.episode_ids():
            before, after = store.read(name), copied.read(name)
            fired = [e.step for e in store.rewards(name) if e.source == "clf" and e.valid and e.value > 0.5]
            assert len(after) == (fired[0] if fired else len(before))
            assert after.reward.tolist() == [0.0] * (len(after) - 1) + [2.0 if fired else 0.0]
            assert after.terminated[-1] == bool(fired)
            np.testing.assert_array_equal(after.observations[CAMERA], before.observations[CAMERA][: len(after) + 1])
    assert main(verb) == 2  # a store is never written over
    block.write_text("channels:\n  - {source: progress, kind: dense}\n")
    assert main([*verb[:-2], str(tmp_path / "none"), "--json"]) != 0
    assert "it has no report" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_references_and_a_persons_feedback_are_trained_by_the_verb(folder, tmp_path, capsys):
    common = ["--cameras", CAMERA, "--encoder", '{"size": 48}', "--json"]

    def train(kind, *more):
        return main(["reward", "train", str(folder), "--kind", kind, "--out", str(tmp_path / kind), *common, *more])

    assert train("transport", "--demonstrations", "2") == 0
    assert train("video_similarity") == 0
    about = {"cameras": [CAMERA], "encoder": {"size": 48}}
    files = sorted(str(f) for f in (tmp_path / "transport").glob("*.npz"))
    assert len(files) == 2
    sources = [
        {"kind": "transport", "demonstrations": files, **about},
        {"kind": "video_similarity", "reference": str(tmp_path / "video_similarity" / "reference.npz"), **about},
    ]
    with EpisodeStore.open(folder) as store:
        names = store.episode_ids()
        for settings in sources:
            (tmp_path / "source.yaml").write_text(json.dumps(settings))
            source = load_source(str(tmp_path / "source.yaml"))
            total = {True: [], False: []}
            for name in names[:10]:
                episode = store.read(name, [CAMERA])
                total[bool(episode.meta.success)].append(float(source.score_episode(trace_of(episode)).value.sum()))
            assert np.mean(total[True]) > np.mean(total[False]), settings["kind"]
    assert train("feedback") == 1
    assert "spoke in 0 of 20 episodes" in capsys.readouterr().out
    with EpisodeStore.open(folder, mode="a") as store:
        for name in names:
            share = store.read(name, ["observation.state"]).observations["observation.state"][:, 0]
            for k in range(1, len(share)):
                store.append_reward(
                    RewardEvent(name, k, "human", float(2 * share[k] - 1), RewardKind.DENSE, model_id="human:me")
                )
    assert train("feedback", "--grid", "4", "--options", '{"learning_rate": 1e-3}', "--steps", "200") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told.get("result", told)["correlation"] > 0.6
    assert train("clip") == 2
