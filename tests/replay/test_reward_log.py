"""Late, repeated, replaced and withdrawn reward events; following stores from another process."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_kit import new_store, write

from robot_rl.replay import EpisodeStore, StoreTailer
from robot_rl.replay.maintenance import verify
from robot_rl.replay.reward_log import RewardTable
from robot_rl.replay.ulid import new_ulid
from robot_rl.types import EpisodeMeta, RewardEvent, RewardKind

ROOT = Path(__file__).parents[2]
NAN = float("nan")


def event(step: int, value: float, name: str, source: str = "clf", **more) -> RewardEvent:
    return RewardEvent("e", step, source, value, valid=bool(np.isfinite(value)), event_id=name, **more)


def test_ulids_increase():
    ids = [new_ulid() for _ in range(5000)]
    assert ids == sorted(set(ids))
    assert {len(i) for i in ids} == {26}


def test_order_and_repetition_do_not_matter():
    events = [event(1, 0.1, "A"), event(1, 0.9, "B"), event(1, NAN, "C", reason="timeout"), event(1, 0.5, "D"),
              event(2, 0.4, "E", revokes="D"), event(1, 0.3, "F", "vlm")]  # fmt: skip
    expected = None
    for order in itertools.permutations(range(6)):
        table = RewardTable()
        for i in (*order, order[0]):
            table.add(events[i])
        active = [(e.step, e.source, e.event_id) for e in table.active("e")]
        expected = expected or active
        assert active == expected
    assert expected == [(1, "clf", "B"), (1, "vlm", "F"), (2, "clf", "E")]
    assert [e.event_id for e in table.history("e")] == list("ABCDEF")


def test_only_invalid_events_are_known_unknowns():
    table = RewardTable()
    table.add(event(1, NAN, "A", reason="parse"))
    table.add(event(1, NAN, "B", reason="timeout"))
    assert [e.reason for e in table.active("e")] == ["timeout"]


def test_events_survive_reopening_and_a_torn_line(tmp_path: Path):
    store = new_store(tmp_path / "s")
    write(store, np.random.default_rng(0), 5, EpisodeMeta("e"))
    first = store.append_reward(
        RewardEvent("e", 2, "vlm.pair", 0.25, RewardKind.DENSE, model_id="m@1", prompt_hash="p", latency_ms=3.5)
    )[0]
    assert len(first.event_id) == 26
    with open(store.path / "rewards" / "vlm.pair.jsonl", "ab") as file:
        file.write(b'{"episode_id": "e", "st')  # a crash tore this line
    assert store.rewards("e") == [first]
    second = store.append_reward(RewardEvent("e", 3, "vlm.pair", NAN, RewardKind.DENSE, valid=False, reason="timeout"))[0]
    again = EpisodeStore.open(store.path)
    assert again.rewards("e")[0] == first
    assert again.rewards("e")[1].event_id == second.event_id
    report = verify(store.path)
    assert report.ok
    assert any("1 unreadable" in w.what for w in report.warnings)
    with pytest.raises(ValueError, match="Bad Name"):
        store.append_reward(RewardEvent("e", 1, "Bad Name", 1.0))
    store.close()


def test_a_wrong_stamp_is_quarantined(tmp_path: Path):
    with new_store(tmp_path / "s") as store:
        store.append_reward(event(2, 1.0, "A", stamp_ns=1002), event(2, 0.0, "B", stamp_ns=5), event(3, 0.5, "C", stamp_ns=7))
        write(store, np.random.default_rng(0), 5, EpisodeMeta("e"))
        active = {e.step: e for e in store.rewards("e")}
        assert active[2].event_id == "A"
        assert (active[3].valid, active[3].reason) == (False, "stamp_mismatch")
        assert len(store.reward_history("e")) == 3


def test_success_is_an_event(tmp_path: Path):
    with new_store(tmp_path / "s") as store:
        episode = write(store, np.random.default_rng(0), 5, EpisodeMeta("e"), success=True)[1]
        files = {p: p.stat().st_mtime_ns for p in (store.path / "episodes").rglob("*")}
        said = store.set_success("e", False)
        assert said.step == 5
        assert store.meta("e").success is store.read("e").meta.success is False
        assert EpisodeStore.open(store.path).summary().failures == 1
        store.set_success("e", True)
        assert store.meta("e").success is True
        assert episode.meta.success is True
        assert files == {p: p.stat().st_mtime_ns for p in (store.path / "episodes").rglob("*")}, "arrays are never rewritten"


def test_tailing_several_stores(tmp_path: Path):
    rng = np.random.default_rng(0)
    tailer = StoreTailer([tmp_path / "a", tmp_path / "b"])
    assert list(tailer.poll()) == []
    a, b = new_store(tmp_path / "a"), new_store(tmp_path / "b")
    write(a, rng, 3, EpisodeMeta("a0"))
    write(b, rng, 3, EpisodeMeta("b0"))
    a.append_reward(RewardEvent("a0", 1, "clf", 1.0))
    b.append_reward(RewardEvent("a0", 2, "clf", 1.0), RewardEvent("b1", 1, "clf", 0.5))  # another machine's label; an early one
    news = list(tailer.poll())
    assert [n.episode.meta.episode_id for n in news if n.episode] == ["a0", "b0"]
    assert [(e.episode_id, e.step) for e in news[0].rewards] == [("a0", 1)]
    assert [(n.episode, [(e.episode_id, e.step) for e in n.rewards]) for n in news[2:]] == [(None, [("a0", 2)])]
    write(b, rng, 3, EpisodeMeta("b1"))
    (news,) = tailer.poll()
    assert news.episode.meta.episode_id == "b1"
    assert [(e.step, e.value) for e in news.rewards] == [(1, 0.5)]
    said = a.set_success("a0", True)
    (news,) = tailer.poll()
    assert news == (None, [said])
    a.append_reward(RewardEvent("a0", 3, "label", NAN, valid=False, revokes=said.event_id))
    (news,) = tailer.poll()
    assert [(e.source, e.valid) for e in news.rewards] == [("label", False)]
    assert list(tailer.poll()) == []
    # A tailer that goes on from the cursors of another one hears only what is new.
    resumed = StoreTailer([tmp_path / "a", tmp_path / "b"], cursors=json.loads(json.dumps(tailer.cursors())))
    assert list(resumed.poll()) == []
    write(a, rng, 2, EpisodeMeta("a1"))
    a.append_reward(RewardEvent("a0", 1, "clf", 0.0))
    news = list(resumed.poll())
    assert news[0].episode.meta.episode_id == "a1"
    assert [e.episode_id for e in news[1].rewards] == ["a0"]
    a.close()
    b.close()


def test_orphans_wait_then_are_counted(tmp_path: Path):
    with new_store(tmp_path / "s") as store:
        tailer = StoreTailer(store.path, pending_limit=3)
        store.append_reward(*(RewardEvent("later", 1 + i, "clf", 1.0) for i in range(5)))
        assert list(tailer.poll()) == []
        assert tailer.reward_orphans_total == 2


def test_tailing_a_writer_that_is_killed_and_restarted(tmp_path: Path):
    new_store(tmp_path / "s", flush_interval_s=0.02).close()
    program = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import time, numpy as np
from store_kit import write
from robot_rl.replay import EpisodeStore
from robot_rl.types import EpisodeMeta
store = EpisodeStore.open({str(tmp_path / "s")!r}, "a")
rng = np.random.default_rng(0)
for i in range(3):
    write(store, rng, 4, EpisodeMeta(sys.argv[1] + str(i)))
write(store, rng, 6, EpisodeMeta(sys.argv[1] + "cut"), commit=False, terminated=False)
store.flush()
print("ready", flush=True)
time.sleep(60)
"""
    tailer, seen = StoreTailer(tmp_path / "s"), []
    for name in ("p", "q"):
        child = subprocess.Popen([sys.executable, "-c", program, name], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        seen += [n.episode for n in tailer.poll()]
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    EpisodeStore.open(tmp_path / "s", "a").close()
    seen += [n.episode for n in tailer.poll()]
    assert [e.meta.episode_id for e in seen] == ["p0", "p1", "p2", "pcut", "q0", "q1", "q2", "qcut"]
    assert [len(e) for e in seen if e.meta.recovered] == [6, 6]
