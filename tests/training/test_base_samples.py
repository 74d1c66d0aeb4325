"""Cached chunks of the base: the same after a restart, at the right observation, and forgotten with their episodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spine_kit import SmoothBase

from robot_rl.training.base_samples import BaseSamples


def rows(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length + 1, 3)).astype(np.float32)


def test_what_is_drawn_depends_on_the_episode_and_not_on_the_order() -> None:
    base = SmoothBase()
    one, other = (BaseSamples(base, 4, seed=7) for _ in range(2))
    episodes = {"a": rows(5, 1), "b": rows(9, 2), "c": rows(2, 3)}
    for number, (name, conditioning) in enumerate(episodes.items()):
        one.add(number, name, conditioning)
    for number, name in enumerate(["c", "a", "b"]):
        other.add(10 + number, name, episodes[name])
    numbers, steps = np.array([0, 1, 2, 1]), np.array([5, 9, 0, 3])
    found = one.take(numbers, steps)
    assert found.shape == (4, 4, 2, 3)
    assert np.array_equal(found, other.take(np.array([11, 12, 10, 12]), steps))
    assert not np.array_equal(found, filled(base, 8, episodes).take(numbers, steps))
    assert len(np.unique(found[0].reshape(4, -1), axis=0)) == 4  # four draws, not one


def filled(base, seed: int, episodes: dict[str, np.ndarray]) -> BaseSamples:
    samples = BaseSamples(base, 4, seed)
    for number, (name, conditioning) in enumerate(episodes.items()):
        samples.add(number, name, conditioning)
    return samples


def test_the_state_of_a_cached_chunk_is_the_right_one() -> None:
    """A base that ignores its noise makes the conditioning visible."""

    class Mute(SmoothBase):
        def sample(self, conditioning, noise, *, grad=False):
            return super().sample(conditioning, torch.zeros_like(noise))

    base = Mute()
    samples, conditioning = BaseSamples(base, 3, 0), rows(30, 4)
    samples.add(0, "a", rows(6, 9))
    samples.add(1, "b", conditioning)
    expected = base.sample(torch.from_numpy(conditioning[[30, 0, 17]]), torch.zeros(3, 3, 3))[:, :2].numpy()
    np.testing.assert_allclose(samples.take(np.array([1, 1, 1]), np.array([30, 0, 17]))[:, 2], expected, atol=1e-6)


def test_forgotten_episodes_make_room() -> None:
    base = SmoothBase()
    samples = BaseSamples(base, 2, 0)
    for number in range(40):
        samples.add(number, str(number), rows(99, number))
    before = {n: samples.take(np.array([n]), np.array([50])) for n in (38, 39)}
    samples.forget(set(range(38)))
    assert (samples.numbers(), len(samples)) == ({38, 39}, 200)
    assert len(samples._rows) < 4000
    for n, kept in before.items():
        assert np.array_equal(samples.take(np.array([n]), np.array([50])), kept)
    with pytest.raises(KeyError):
        samples.take(np.array([3]), np.array([0]))
    with pytest.raises(ValueError, match="takes no noise"):
        BaseSamples(SmoothBase(noise=False), 2, 0)
