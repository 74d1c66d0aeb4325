"""Small stores and random episodes for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay import EpisodeStore
from robot_rl.types import ActionSpec, Decision, Episode, EpisodeMeta, FeatureSpec, Step

STATE = "observation.state"
IMAGE = "observation.images.top"
FEATURES = {STATE: FeatureSpec((5,)), IMAGE: FeatureSpec((10, 12, 3), "uint8")}
ACTION = ActionSpec((-1, -1, 0), (1, 1, 1), mode=("delta", "delta", "absolute"))


def new_store(path: Path, **options: Any) -> EpisodeStore:
    options = {"observation_features": FEATURES, "action": ACTION, "noise_shape": (4, 3), "chunk_horizon": 4, **options}
    return EpisodeStore.create(path, **options)


def observation(rng: np.random.Generator, features: dict[str, FeatureSpec] | None = None) -> dict[str, np.ndarray]:
    out = {}
    for name, spec in (features or FEATURES).items():
        value = rng.integers(0, 255, spec.shape) if spec.dtype == "uint8" else rng.normal(size=spec.shape)
        out[name] = value.astype(spec.dtype)
    return out


def write(store: EpisodeStore, rng: np.random.Generator, length: int, meta: EpisodeMeta | None = None, *, commit: bool = True,
          terminated: bool = True, **options: Any):  # fmt: skip
    """Step through one random episode; gives (writer, what commit returned or None, the steps)."""
    writer = store.begin(meta or EpisodeMeta(""))
    features, dim = dict(store.observation_features), store.action.dim
    steps = []
    decision = -1
    for t in range(length):
        if t % 4 == 0 and store.spec.noise_shape:
            noise = rng.normal(size=store.spec.noise_shape)
            chunks = rng.normal(size=(2, store.spec.chunk_horizon, dim)).astype("f4")
            decision = writer.decide(Decision(t, noise, *chunks, log_prob=float(rng.normal()), explored=bool(t % 8)))
        step = Step(
            observation(rng, features),
            rng.uniform(-1, 1, dim).astype("f4"),
            action_human=rng.normal(size=dim) if t % 3 == 0 else None,
            reward=float(t),
            terminated=terminated and t == length - 1,
            decision_id=decision,
            chunk_row=t % 4,
            weights_version=7,
            stamp_ns=1000 + t,
        )
        steps.append(step)
        writer.append(step)
    episode = writer.commit(observation(rng, features), **options) if commit else None
    return writer, episode, steps


def same(a: Episode, b: Episode) -> None:
    assert a.meta == b.meta
    assert a.observations.keys() == b.observations.keys()
    for name, rows in a.observations.items():
        assert rows.dtype == b.observations[name].dtype
        np.testing.assert_array_equal(rows, b.observations[name], name)
    for name, dtype in Episode.STEP_ARRAYS.items():
        assert getattr(b, name).dtype == np.dtype(dtype), name
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
    assert len(a.decisions) == len(b.decisions)
    for x, y in zip(a.decisions, b.decisions, strict=True):
        for name in ("step", "candidate_index", "weights_version", "explored"):
            assert getattr(x, name) == getattr(y, name)
        np.testing.assert_equal(x.log_prob, y.log_prob)
        assert (x.noise is None) == (y.noise is None)
        if x.noise is not None:
            np.testing.assert_array_equal(x.noise, y.noise)
        np.testing.assert_array_equal(x.chunk, y.chunk)
        np.testing.assert_array_equal(x.chunk_base, y.chunk_base)
