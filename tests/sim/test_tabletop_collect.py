"""Scripted demonstrations: the same whatever collects them, honest about quality, ready to be stored."""

from __future__ import annotations

import numpy as np
import pytest

from robot_rl import seeding
from robot_rl.sim.collect import CollectConfig, collect
from robot_rl.sim.env import make_env
from robot_rl.types import Episode, Source, Stratum


class Sink(list):
    add = list.append


def same(a: Episode, b: Episode) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n), equal_nan=n.startswith("action")) for n in Episode.STEP_ARRAYS)
    return arrays and a.meta == b.meta and all(np.array_equal(a.observations[k], b.observations[k]) for k in a.observations)


def test_workers_do_not_change_what_is_collected() -> None:
    config = CollectConfig("tabletop/Lift", 4, skill=(0.0, 1.0), noise=0.1, seed=3, only_successful=True)
    one, two = Sink(), Sink()
    calls: list[tuple[int, int, int]] = []
    report = collect(config, one, lambda *c: calls.append(c))
    again = collect(CollectConfig(**{**config.__dict__, "workers": 2}), two)
    assert len(one) == len(two) == report.episodes == 4
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert (report.attempts, report.successes, report.failures) == (again.attempts, again.successes, again.failures)
    assert calls[-1] == (4, report.attempts, report.successes)
    other = Sink()
    collect(CollectConfig(**{**config.__dict__, "seed": 4}), other)
    assert not same(one[0], other[0])


def test_episodes_replay_to_the_same_observations() -> None:
    sink = Sink()
    collect(CollectConfig("tabletop/Drawer", 2, skill=0.7, noise=0.2, seed=1), sink)
    env = make_env("tabletop/Drawer")
    for episode in sink:
        assert episode.meta.seed in seeding.TRAINING
        assert not seeding.is_held_out(episode.meta.seed)
        observation, info = env.reset(seed=episode.meta.seed)
        assert info["start"] == episode.meta.extra["start"]
        rows = [observation["observation.state"]]
        for action in episode.action:
            observation, reward, terminated, truncated, info = env.step(action)
            rows.append(observation["observation.state"])
        assert np.array_equal(np.stack(rows), episode.observations["observation.state"])
        assert (terminated, truncated) == (episode.terminated[-1], episode.truncated[-1])
        assert reward == episode.reward[-1]


def test_what_an_episode_says_about_itself() -> None:
    sink = Sink()
    report = collect(CollectConfig("tabletop/PegInsertion", 3, skill=(0.2, 0.4), seed=0), sink)
    assert report.successes == sum(e.meta.success for e in sink)
    assert report.steps == sum(map(len, sink))
    assert sum(report.failures.values()) == 3 - report.successes
    for episode in sink:
        meta = episode.meta
        assert meta.stratum is Stratum.DEMONSTRATION
        assert (meta.task, meta.env_id, meta.control_hz) == (
            "insert the orange peg into the green block",
            "tabletop/PegInsertion",
            20,
        )
        assert 0.2 <= meta.extra["skill"] <= 0.4
        assert episode.terminated[-1] == meta.success
        assert episode.truncated[-1] == (not meta.success)
        assert not episode.terminated[:-1].any()
        assert episode.reward.sum() == float(meta.success)
        assert (episode.source == Source.HUMAN).all()
        assert len(episode.observations["observation.state"]) == len(episode) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skill": 1.2}, r"skill=1\.2"),
        ({"skill": (0.8, 0.2)}, "low <= high"),
        ({"episodes": 0}, "episodes=0"),
        ({"workers": 0}, "workers=0"),
        ({"noise": -0.1}, r"noise=-0\.1"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollectConfig(**{"env_id": "tabletop/Lift", "episodes": 1, **change})
