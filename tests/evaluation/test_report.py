"""The report page: complete, self-contained, honest about what is missing, and deaf to hostile strings."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_run_kit import draw_video, make_run

from robot_rl.evaluation.plots import informative_parameters, percent, short, ticks
from robot_rl.evaluation.report import write_report
from robot_rl.evaluation.results import EpisodeLine, append_jsonl, load_lines

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what the page would load or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "poster"):
                self.urls.append(value or "")
            if name.startswith("on"):
                self.handlers.append(f"{tag}.{name}")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack
        assert self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split()).replace("\u202f", " ")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run-1")


def copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_says_what_the_files_say(run):
    page = page_of(run)
    result = json.loads((run / "result.json").read_text())
    base, policy = result["base"], result["policy"]
    assert f"{base['successes']} of 200" in page.text
    assert f"{round(100 * policy['success'])} %" in page.text
    episodes = load_lines(EpisodeLine, run / "episodes.jsonl")
    before = {e.seed: e.success for e in episodes if e.who == "base"}
    after = {e.seed: e.success for e in episodes if e.who == "policy"}
    won = sum(after[s] and not before[s] for s in before)
    assert f"newly solved {won} starts" in page.text
    for word in (
        "Insert the peg into the hole", "150 000", "Learning curve", "Success by start state", "What failed", "Training",
        "critic_loss", "How this was made", "9f31c2e07ab4", "Gate decisions", "torch 2.10.0", "utd: 20", "rolled back",
    ):  # fmt: skip
        assert word in page.text, word
    for seed in [s for s in after if not after[s]]:
        assert str(seed) in page.text, "every failed start is listed"
    assert "peg x (m)" in page.text
    assert "table height" not in page.text.split("Training")[0], "a parameter that never changes explains nothing"


def test_the_page_needs_nothing_from_outside(run):
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert all(u.startswith("data:") for u in page.urls), page.urls
    assert page.handlers == []
    assert not re.search(r"https?://|@import|url\(", html)
    assert "default-src &#x27;none&#x27;" in html
    assert not list(run.glob("*.tmp"))


def test_videos_are_embedded_in_pairs(run, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    folder = copy(run, tmp_path / "filmed")
    (folder / "videos").mkdir()
    for who, success in (("base", False), ("policy", True)):
        draw_video(folder / "videos" / f"{who}_2001003.mp4", 2_001_003, success, (64, 48), 6)
    (folder / "videos" / "notes.mp4").write_bytes(b"not ours")
    page = page_of(folder)
    assert page.tags.count("video") == 2
    assert sum(u.startswith("data:video/mp4;base64,") for u in page.urls) == 2
    assert "Start 2001003" in page.text


@pytest.mark.parametrize(
    "missing",
    [
        ["gate.jsonl"], ["metrics.jsonl"], ["episodes.jsonl"], ["result.json"], ["config.yaml"], ["evaluations.jsonl"],
        ["result.json", "episodes.jsonl", "gate.jsonl"],
        ["result.json", "episodes.jsonl", "gate.jsonl", "metrics.jsonl", "evaluations.jsonl", "config.yaml"],
    ],
)  # fmt: skip
def test_missing_parts_are_left_out(run, tmp_path, missing):
    folder = copy(run, tmp_path / "partial")
    for name in missing:
        (folder / name).unlink()
    page = page_of(folder)
    assert "How this was made" in page.text
    assert "nan" not in page.text.lower().split()
    if "result.json" in missing and "episodes.jsonl" in missing:
        assert "no final evaluation yet" in page.text


def test_a_run_in_progress_with_a_torn_line_can_be_looked_at(run, tmp_path):
    folder = copy(run, tmp_path / "running")
    (folder / "result.json").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"env_steps": 150500, "critic_')
    assert "critic_loss" in page_of(folder).text
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        write_report(tmp_path / "nowhere")


def test_hostile_strings_stay_strings(run, tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>"
    folder = copy(run, tmp_path / "evil")
    result = json.loads((folder / "result.json").read_text())
    result |= {"task": evil, "config_hash": evil, "env_id": evil, "machine": {evil: evil}, "seeds": {evil: 1}, evil: evil}
    result["steps_to"] = {evil: 3}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text(f"task: {evil}\n")
    (folder / "episodes.jsonl").unlink()
    rng = np.random.default_rng(0)
    for seed in range(40):
        for who in ("base", "policy"):
            success = bool(rng.random() < 0.6)
            start = {f"{evil} {axis}": float(rng.normal()) for axis in "ab"}
            append_jsonl(folder / "episodes.jsonl", EpisodeLine(who, seed, success, 10, start, evil, "" if success else evil))
    append_jsonl(folder / "metrics.jsonl", {"env_steps": 5, evil: 1.0})
    gate = {"env_steps": 5, "event": "rolled_back", "version": 1, "mode": evil, "reason": evil}
    append_jsonl(folder / "gate.jsonl", gate)
    append_jsonl(folder / "gate.jsonl", gate | {"event": evil})
    for who in ("policy", "acting", evil):
        row = {"env_steps": 9, "who": who, "mode": evil, "version": 3, "successes": 1, "n": 2}
        append_jsonl(folder / "evaluations.jsonl", row)
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert page.handlers == []
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert html.count("<script>") == 1
    assert "alert(1)" in page.text, "shown as text"


def test_parameters_are_chosen_by_what_they_explain():
    rng = np.random.default_rng(1)
    starts = [{"noise": rng.random(), "edge": rng.random(), "slope": rng.random(), "fixed": 0.8} for _ in range(300)]
    before = [abs(s["edge"] - 0.5) < 0.25 for s in starts]  # not monotonic
    after = [rng.random() < 0.2 + 0.7 * s["slope"] for s in starts]
    assert informative_parameters(starts, [before, after]) == ["edge", "slope", "noise"]
    assert informative_parameters([], []) == []


def test_numbers_are_shown_honestly():
    assert [percent(v) for v in (0.0, 0.42, 0.998, 1.0, 0.002)] == [
        "0\u202f%", "42\u202f%", "99.8\u202f%", "100\u202f%", "0.2\u202f%",
    ]  # fmt: skip
    assert ticks(0, 150_000, 6) == [0, 25_000, 50_000, 75_000, 100_000, 125_000, 150_000]
    assert ticks(3, 3) == [3]
    assert [short(v) for v in (0, 2500, 1_200_000, 0.00012)] == ["0", "2.5k", "1.2M", "1e-4"]
