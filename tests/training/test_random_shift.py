"""Learning from moved pictures: replay holds several encodings of an observation, and what comes out is one of them."""

from __future__ import annotations

import numpy as np
import pytest
from run_kit import tiny
from spine_kit import ARM, IMAGE, STATE, compact

from robot_rl.replay import ReplayBuffer, WindowConfig
from robot_rl.training.ingest import encode_episode, ingest
from robot_rl.training.learner_core import make_buffer
from robot_rl.types import Episode, EpisodeMeta


def episode(name: str = "e", length: int = 12) -> Episode:
    rng = np.random.default_rng(len(name))
    seen = {
        STATE: rng.normal(size=(length + 1, 4)).astype(np.float32),
        IMAGE: rng.integers(0, 256, (length + 1, 32, 32, 3), np.uint8),
    }
    action = rng.uniform(ARM.low, ARM.high, (length, 3))
    return Episode.from_arrays(
        EpisodeMeta(name), seen, action, reward=np.zeros(length), truncated=np.arange(length) == length - 1
    )


def buffer_of(base, views: int) -> ReplayBuffer:
    from robot_rl.learners.batch import EPISODE_RETURN, RETURN_KNOWN
    from robot_rl.types import FeatureSpec

    return ReplayBuffer(
        1000, conditioning_dim=base.spec.conditioning_dim, action_dim=3, window=WindowConfig(3, 0.9, "any"),
        delta_mask=ARM.delta_mask, extra={EPISODE_RETURN: FeatureSpec(()), RETURN_KNOWN: FeatureSpec(())}, views=views,
    )  # fmt: skip


def test_every_draw_is_one_of_the_views_of_its_own_observation():
    base = compact(images=True, n_obs_steps=2)
    buffer = buffer_of(base, 4)
    for name in ("one", "three"):
        ingest(buffer, episode(name), base, shift=3)
    views = {
        i: np.stack(
            [encode_episode(base, episode(n)), *(encode_episode(base, episode(n), shift=3, view=v) for v in (1, 2, 3))], 1
        )
        for i, n in enumerate(("one", "three"))
    }
    assert all(np.abs(v[:, 0] - v[:, k]).max() > 1e-4 for v in views.values() for k in (1, 2, 3))
    batch = buffer.sample(256, np.random.default_rng(0))
    used = set()
    for row, following, number, step, action in zip(
        batch.conditioning, batch.next_conditioning, batch.episode_index, batch.step, batch.mask, strict=True
    ):
        mine = views[int(number)]
        found = [k for k in range(4) if np.array_equal(mine[step, k], row)]
        assert found
        used.add(found[0])
        assert any(np.array_equal(mine[step + action.sum(), k], following) for k in range(4))
    assert used == {0, 1, 2, 3}
    states = buffer.sample_states(64, np.random.default_rng(1))
    everything = np.concatenate([v.reshape(-1, v.shape[-1]) for v in views.values()])
    assert all((everything == s).all(1).any() for s in states)


def test_one_view_is_what_it_was_and_asks_the_generator_for_nothing_more():
    base = compact(images=True, n_obs_steps=2)
    plain, other = buffer_of(base, 1), buffer_of(base, 3)
    ingest(plain, episode(), base)
    ingest(other, episode(), base, shift=2)
    one, two = np.random.default_rng(5), np.random.default_rng(5)
    a, b = plain.sample(32, one), other.sample(32, two)
    np.testing.assert_array_equal(a.step, b.step)
    np.testing.assert_array_equal(a.conditioning, encode_episode(base, episode())[a.step])
    assert one.integers(1 << 30) != two.integers(1 << 30)
    with pytest.raises(ValueError, match="comes without views; this buffer has 3 an observation"):
        other.add(episode("x"), np.zeros((13, base.spec.conditioning_dim)), episode("x").action)
    with pytest.raises(ValueError, match="views=0: accepted are integers >= 1"):
        buffer_of(base, 0)


def test_shifts_come_from_the_episode_alone():
    base = compact(images=True)
    first = encode_episode(base, episode(), shift=3, view=1)
    np.testing.assert_array_equal(first, encode_episode(base, episode(), shift=3, view=1))
    assert not np.array_equal(first, encode_episode(base, episode(), shift=3, view=2))


def test_a_base_without_pictures_cannot_be_shifted(tmp_path):
    config = tiny(tmp_path, schedule={"random_shift": 2})
    with pytest.raises(ValueError, match=r"schedule.random_shift=2: the base reads no pictures; accepted is 0"):
        make_buffer(config, compact())
    assert make_buffer(config, compact(images=True)).views == 4
