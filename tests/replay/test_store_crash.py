"""Crashes, torn logs and full disks: nothing committed is lost, nothing unreadable is left."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_kit import STATE, new_store, observation, same, write

from robot_rl.replay import EpisodeStore, StoreError, StoreFullError
from robot_rl.replay import files as files_module
from robot_rl.replay.maintenance import collect_garbage, recover, verify
from robot_rl.replay.wal import read_wal
from robot_rl.types import EpisodeMeta, FeatureSpec, Step

ROOT = Path(__file__).parents[2]


def kill(kills: int, *options: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "store_kill.py"), "--kills", str(kills), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def no_loss(result: dict) -> None:
    assert result["lost"] == []
    assert result["wrong"] == []
    assert result["unreadable"] == []
    assert result["logs_left"] == []


def test_kill_nine(tmp_path: Path):
    result = kill(15, "--seed", "1")
    no_loss(result)
    assert result["episodes_recovered"] >= 5  # every third child waited half-way through an episode


@pytest.mark.slow
def test_kill_nine_two_hundred_times():
    for options in (("--seed", "2"), ("--seed", "3", "--no-sync")):
        result = kill(200, *options)
        print(json.dumps(result))
        no_loss(result)
        assert result["episodes_acknowledged"] > 100


def abandoned(tmp_path: Path, length: int = 7, name: str = "s") -> tuple[Path, list[Step]]:
    """A store whose writer died with ``length`` logged steps of one episode ("dead") after one committed ("alive")."""
    rng = np.random.default_rng(0)
    features = {STATE: FeatureSpec((5,))}
    store = new_store(tmp_path / name, observation_features=features, noise_shape=(4, 3))
    write(store, rng, 3, EpisodeMeta("alive"))
    writer, _, steps = write(store, rng, length, EpisodeMeta("dead"), commit=False, terminated=False)
    writer.detach()
    store.close()
    return store.path, steps


def test_a_tail_is_recovered_as_a_truncated_episode(tmp_path: Path):
    path, steps = abandoned(tmp_path)
    report = recover(path)
    assert report.recovered == {"dead": 7}
    json.dumps(report.to_json())
    store = EpisodeStore.open(path)
    assert store.episode_ids() == ["alive", "dead"]
    episode = store.read("dead")
    assert episode.meta.recovered
    assert episode.truncated.tolist() == [False] * 6 + [True]
    np.testing.assert_array_equal(episode.observations[STATE][:-1], [s.observation[STATE] for s in steps])
    np.testing.assert_array_equal(episode.action, [s.action for s in steps])
    assert [d.step for d in episode.decisions] == [0, 4]
    assert recover(path).recovered == {}
    assert verify(path).ok


def test_a_torn_log_loses_only_the_torn_record(tmp_path: Path):
    path, steps = abandoned(tmp_path)
    log = path / "wal" / "dead.wal"
    whole = log.read_bytes()
    # Every boundary inside the last two steps and the decision before them.
    size = len(whole)
    full = read_wal(log)
    record = full.steps.dtype.itemsize
    for cut in range(size - 3 * record - 200, size):
        log.write_bytes(whole[:cut])
        content = read_wal(log)
        assert len(content.steps) == 7 - -(-(size - cut) // record) or cut < size - 3 * record
        assert len(content.steps) <= 6
        assert content.torn_bytes < 400
        for row, step in zip(content.steps, steps, strict=False):
            np.testing.assert_array_equal(row["action"], step.action)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, size, 12):  # a flipped byte anywhere: never a wrong value, never an exception from recovery
        broken = bytearray(whole)
        broken[at] ^= 0xFF
        copy = tmp_path / f"copy{at}"
        if not copy.exists():
            shutil.copytree(path, copy)
        (copy / "wal" / "dead.wal").write_bytes(broken)
        with EpisodeStore.open(copy, "a", sync=False) as store:
            if "dead" in store:
                np.testing.assert_array_equal(store.read("dead").action, [s.action for s in steps[: len(store.read("dead"))]])
        assert verify(copy).ok


def test_a_log_cut_inside_its_header_does_not_stop_the_store(tmp_path: Path):
    path, _ = abandoned(tmp_path)
    log = path / "wal" / "dead.wal"
    for cut in (0, 3, 12, 40):
        log.write_bytes(log.read_bytes()[:cut])
        with EpisodeStore.open(path, "a") as store:
            assert store.episode_ids() == ["alive"]
        assert not log.exists()
        (path / "discarded" / "dead.wal").rename(log)


def test_a_committed_episode_is_not_committed_twice(tmp_path: Path):
    path, _ = abandoned(tmp_path)
    log = (path / "wal" / "dead.wal").read_bytes()
    recover(path)
    before = EpisodeStore.open(path).attributes("dead")
    (path / "wal" / "dead.wal").write_bytes(log)
    assert recover(path).already_committed == ["dead"]
    assert EpisodeStore.open(path).attributes("dead") == before


def test_a_live_writer_keeps_its_log(tmp_path: Path):
    with new_store(tmp_path / "s") as live:
        writer, _, _ = write(live, np.random.default_rng(0), 5, EpisodeMeta("mine"), commit=False, terminated=False)
        live.flush()
        with EpisodeStore.open(live.path, "a") as other:
            assert other.recover().live == ["mine"]
            assert other.episode_ids() == []
            with pytest.raises(StoreError, match="already being written"):
                other.begin(EpisodeMeta("mine"))
            assert collect_garbage(live.path, dry_run=False).removed == {}
        writer.commit(observation(np.random.default_rng(0)))
    assert EpisodeStore.open(live.path).episode_ids() == ["mine"]


def test_a_commit_that_was_only_logged_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    store = new_store(tmp_path / "s")
    writer, _, _ = write(store, rng, 6, EpisodeMeta("e"), commit=False, terminated=False)
    final = observation(rng)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            writer.commit(final, success=True)
    assert list((store.path / "tmp").iterdir()) == []
    store.close()
    assert recover(store.path).completed == {"e": 6}
    episode = EpisodeStore.open(store.path).read("e")
    assert episode.meta.success is True
    assert not episode.meta.recovered
    np.testing.assert_array_equal(episode.observations[STATE][-1], final[STATE])


def test_leaving_the_block_keeps_the_steps(tmp_path: Path):
    store = new_store(tmp_path / "s")
    step = Step(observation(np.random.default_rng(0)), np.zeros(3))

    def run() -> None:
        with store.begin(EpisodeMeta("e")) as writer:
            writer.append(step)
            raise RuntimeError("arm fell off")

    with pytest.raises(RuntimeError, match="arm"):
        run()
    with store.begin(EpisodeMeta("f")) as writer:
        writer.append(Step(observation(np.random.default_rng(0)), np.zeros(3)))
        writer.abort()
    assert store.recover().recovered == {"e": 1}
    store.close()


class _Disk:
    """``os.write`` on a disk with room for ``left`` bytes; ``None`` is a big disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.left: int | None = None
        real = os.write

        def write(fd: int, data) -> int:
            if self.left is None or os.fstat(fd).st_mode & 0o170000 != 0o100000:
                return real(fd, data)
            part = memoryview(data)[: self.left]
            if len(data) and not len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= len(part)
            return real(fd, part)

        monkeypatch.setattr(files_module.os, "write", write)


@pytest.mark.parametrize("left", [0, 100, 1500, 5000, 20_000])
def test_full_disk_at_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int):
    disk = _Disk(monkeypatch)
    rng = np.random.default_rng(0)
    store = new_store(tmp_path / "s", flush_interval_s=60)
    kept = write(store, rng, 8, EpisodeMeta("kept"))[1]
    writer, _, _ = write(store, rng, 8, EpisodeMeta("next"), commit=False, terminated=False)
    writer.drain(sync=True)
    final = observation(rng)
    disk.left = left
    with pytest.raises(StoreFullError, match="No space left"):
        writer.commit(final)
    assert store.episode_ids() == ["kept"]
    assert list((store.path / "tmp").iterdir()) == []
    same(kept, store.read("kept"))
    disk.left = None
    if left == 1500:  # the process ends instead: the log has the steps
        store.close()
        with EpisodeStore.open(store.path, "a") as again:
            assert len(again.read("next")) == 8
    else:
        episode = writer.commit(final)
        same(episode, store.read("next"))
        store.close()
    assert verify(store.path).ok


def test_full_disk_while_appending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = _Disk(monkeypatch)
    rng = np.random.default_rng(0)
    store = new_store(tmp_path / "s", flush_interval_s=60)
    writer, _, steps = write(store, rng, 6, EpisodeMeta("e"), commit=False, terminated=False)
    writer.drain(sync=False)
    writer.append(Step(observation(rng), np.zeros(3)))
    disk.left = 30
    with pytest.raises(StoreFullError):
        store.flush()
    refused = observation(rng)
    for _ in range(2):
        with pytest.raises(StoreFullError, match="No space left"):
            writer.append(Step(refused, np.ones(3)))
        refused, first = observation(rng), refused if _ == 0 else first  # noqa: F821
    disk.left = None
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    with pytest.raises(StoreFullError):
        writer.append(Step(refused, np.ones(3)))  # a gap would make a false transition
    episode = writer.commit(observation(rng))
    assert len(episode) == 7
    assert episode.truncated[-1]
    np.testing.assert_array_equal(episode.observations[STATE][-1], first[STATE])
    store.close()
    with EpisodeStore.open(copy, "a", recover=False) as other:
        for lock in (copy / "writers").glob("*.lock"):
            if lock.stem != other._lock.writer_id:
                lock.unlink()
        assert other.recover().recovered == {"e": 6}
    assert verify(store.path).ok
    assert verify(copy).ok
    assert len(steps) == 6


def test_background_commit_reports_at_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = _Disk(monkeypatch)
    rng = np.random.default_rng(0)
    store = new_store(tmp_path / "s")
    disk.left = 4000
    write(store, rng, 8, EpisodeMeta("e"), background=True)
    with pytest.raises(StoreFullError):
        store.flush()
    disk.left = None
    store.flush()
    write(store, rng, 8, EpisodeMeta("f"), background=True)
    store.close()
    with EpisodeStore.open(store.path, "a") as again:
        assert set(again.episode_ids()) == {"e", "f"}
        assert len(again.read("e")) == 8


def _limit(bytes_: int) -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))


def test_a_real_file_size_limit(tmp_path: Path):
    """The kernel's own refusal, in a child process whose files may not grow beyond 8 kB."""
    new_store(tmp_path / "s", flush_interval_s=0.02).close()
    program = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import time, numpy as np
from store_kit import observation
from robot_rl.replay import EpisodeStore, StoreFullError
from robot_rl.types import EpisodeMeta, Step
store = EpisodeStore.open({str(tmp_path / "s")!r}, "a")
writer = store.begin(EpisodeMeta("e"))
rng = np.random.default_rng(0)
try:
    for t in range(500):
        writer.append(Step(observation(rng), np.full(3, t / 500)))
        time.sleep(0.001)
except StoreFullError as error:
    print("refused", len(writer) > 5, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, preexec_fn=lambda: _limit(8192)
    )
    assert done.stdout.startswith("refused True"), done.stdout + done.stderr
    with EpisodeStore.open(tmp_path / "s", "a") as store:
        episode = store.read("e")
    assert 5 < len(episode) < 30
    np.testing.assert_allclose(episode.action[:, 0], np.arange(len(episode)) / 500, atol=1e-6)
    assert verify(tmp_path / "s").ok
