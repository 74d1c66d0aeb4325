"""The warm-up gate: ranks as a statistician computes them, and an actor that waits for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from run_kit import tiny
from spine_kit import STATE

from robot_rl.training import learner_core, posttrain
from robot_rl.training.hold_out import spearman
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.learner_core import LearnerCore, LearningCounters
from robot_rl.training.run_folder import RunFolder
from robot_rl.training.scalars import ScalarLog
from robot_rl.types import Episode, EpisodeMeta, Stratum


def test_rank_correlation_equals_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 8, 60).astype(float), rng.normal(size=60)
    assert spearman(a, b + 0.3 * a) == pytest.approx(stats.spearmanr(a, b + 0.3 * a).statistic)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))


@pytest.mark.parametrize("passes", [True, False])
def test_the_actor_waits_until_held_out_episodes_are_ranked(
    tmp_path: Path, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No held-out step is trained on and no actor parameter moves before the gate passes or its limit; then they join."""
    monkeypatch.setattr(learner_core, "GATE_BLOCK", 4)
    schedule = {"warmup_gate": 0.5, "warmup_gate_limit": 10, "return_updates": 0, "warmup_updates": 2}
    config = tiny(tmp_path / "run", schedule=schedule, demos={"prefill": False})
    folder, spec = RunFolder(tmp_path / "run"), posttrain._env_spec(config)
    with InterruptFlag() as flag:
        base = posttrain.prepare_base(config, spec, folder, posttrain.Silent(), flag, "cpu")
    scalars = ScalarLog(folder, config)
    core = LearnerCore(config, base, [], LearningCounters(), folder, scalars, "cpu")
    dim, state = spec.action.dim, spec.observation_features[STATE].shape[0]
    for i in range(20):
        rng, end = np.random.default_rng(i), np.arange(12) == 11
        observations = {n: rng.normal(size=(13, *f.shape)).astype("f4") for n, f in spec.observation_features.items()}
        assert observations[STATE].shape == (13, state)
        core.ingest(Episode.from_arrays(
            EpisodeMeta(f"e{i}", stratum=Stratum.ONLINE), observations, rng.normal(size=(12, dim)), reward=end * float(i % 2),
            terminated=end & bool(i % 2), truncated=end & (i % 2 == 0),
        ))  # fmt: skip
    held = [e.meta.episode_id for e in core.hold_out.episodes]
    assert 1 <= len(held) < 12
    assert not set(held) & set(core.buffer.episode_ids())
    assert sorted(core.held()) == sorted(f"e{i}" for i in range(20))
    found = iter([0.1, 0.2, 0.9] if passes else [float("nan")] * 9)
    monkeypatch.setattr(learner_core.HoldOut, "correlation", lambda *a: next(found))
    before = core.learner.head.actor.flat.data.clone()
    core.warm_up()
    assert core.learner.updates == 2 + (8 if passes else 10)
    assert torch.equal(core.learner.head.actor.flat.data, before)
    assert core.warm
    assert set(held) <= set(core.buffer.episode_ids())
    scalars.close()


def test_correlation_reads_the_critic(tmp_path: Path) -> None:
    """A critic that has learned the returns of what it is tested on ranks them; the same data and critic give one number."""
    config = tiny(tmp_path / "run", schedule={"warmup_gate": 0.5}, learner={"critic_lr": 1e-2}, demos={"prefill": False})
    folder, spec = RunFolder(tmp_path / "run"), posttrain._env_spec(config)
    with InterruptFlag() as flag:
        base = posttrain.prepare_base(config, spec, folder, posttrain.Silent(), flag, "cpu")
    scalars = ScalarLog(folder, config)
    core = LearnerCore(config, base, [], LearningCounters(), folder, scalars, "cpu")
    played = []
    for i in range(10):
        rng, end = np.random.default_rng(i), np.arange(12) == 11
        observations = {n: rng.normal(size=(13, *f.shape)).astype("f4") for n, f in spec.observation_features.items()}
        observations[STATE][:, 0] = 3.0 * (i % 2)  # successes look different
        played.append(Episode.from_arrays(
            EpisodeMeta(f"x{i}"), observations, rng.normal(size=(12, spec.action.dim)), reward=end * float(i % 2),
            terminated=end & bool(i % 2), truncated=end & (i % 2 == 0),
        ))  # fmt: skip
    hold_out = core.hold_out
    hold_out.episodes = played
    take = lambda buffer, e: learner_core.ingest(buffer, e, base)  # noqa: E731
    buffer = learner_core.make_buffer(config, base)
    for e in played:
        take(buffer, e)
    start = hold_out.correlation(core.learner, take)
    rng = np.random.default_rng(0)
    for _ in range(120):
        core.learner.pretrain(core.learner.sample(buffer, rng, 32, None))
    after = hold_out.correlation(core.learner, take)
    assert after > max(start, 0.5)
    assert after == hold_out.correlation(core.learner, take)
    scalars.close()
