"""Recording goes on without a disk, as far as a control loop is concerned; what was logged before is kept."""

from __future__ import annotations

import errno

import numpy as np
from store_kit import new_store, observation

from robot_rl.ros.recording import LossyWriter
from robot_rl.types import EpisodeMeta, Step


def step(rng: np.random.Generator, t: int) -> Step:
    return Step(observation(rng), rng.uniform(-1, 1, 3).astype("f4"), stamp_ns=1000 + t)


def test_a_full_disk_ends_the_record_and_not_the_loop(tmp_path, monkeypatch):
    rng, said = np.random.default_rng(0), []
    with new_store(tmp_path / "store", flush_interval_s=0) as store:
        writer = LossyWriter(store.begin(EpisodeMeta("e1")), said.append)
        for t in range(5):
            writer.append(step(rng, t))

        def full(fd: int, data: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("robot_rl.replay.writer.write_all", full)
        for t in range(5, 12):
            writer.append(step(rng, t))
        monkeypatch.undo()
        for t in range(12, 15):  # there is space again: an episode has no holes
            writer.append(step(rng, t))
        assert writer.commit(observation(rng)) is not None
        episode = store.read("e1")
    assert 5 <= len(episode) <= 6
    assert episode.truncated[-1]
    assert len(said) == 1
    assert "e1" in said[0]


def test_an_episode_without_a_step_leaves_nothing(tmp_path):
    with new_store(tmp_path / "store") as store:
        writer = LossyWriter(store.begin(EpisodeMeta("e1")), lambda text: None)
        assert writer.commit(observation(np.random.default_rng(0))) is None
        assert "e1" not in store
