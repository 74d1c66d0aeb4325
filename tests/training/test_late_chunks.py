"""A learner of whole decisions whose chunks all come late says so instead of waiting for ever."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from run_kit import tiny

from robot_rl.training import posttrain
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.learner_core import USELESS_IN_A_ROW, LearnerCore, LearningCounters
from robot_rl.training.run_folder import RunFolder
from robot_rl.training.scalars import ScalarLog
from robot_rl.types import Decision, Episode, EpisodeMeta, Stratum

STEPS, CHUNK = 16, 8


@pytest.mark.parametrize("late", [0, 2])
def test_it_says_that_no_episode_can_be_learned_from(tmp_path: Path, late: int, caplog: pytest.LogCaptureFixture) -> None:
    change = {"demos": {"prefill": False}, "schedule": {"demo_ratio": 0.0, "demo_ratio_end": 0.0}}
    config = tiny(tmp_path / "run", learner={"algorithm": "dsrl_sac"}, **change)
    folder, spec = RunFolder(tmp_path / "run"), posttrain._env_spec(config)
    with InterruptFlag() as flag:
        base = posttrain.prepare_base(config, spec, folder, posttrain.Silent(), flag, "cpu")
    scalars = ScalarLog(folder, config)
    core = LearnerCore(config, base, [], LearningCounters(), folder, scalars, "cpu")
    rng = np.random.default_rng(0)

    def episode(number: int) -> Episode:
        observations = {n: rng.normal(size=(STEPS + 1, *f.shape)).astype("f4") for n, f in spec.observation_features.items()}
        steps, end = np.arange(STEPS), np.arange(STEPS) == STEPS - 1
        # Decided at steps 0 and 8; what runs first is the row of the step at which the chunk arrived.
        decision, row = steps // CHUNK, steps % CHUNK
        decision = np.where(row < late, decision - 1, decision)
        chunk = rng.normal(size=(CHUNK, spec.action.dim)).astype("f4")
        noise = rng.normal(size=base.spec.noise_shape).astype("f4")
        return Episode.from_arrays(
            EpisodeMeta(f"e{number}", stratum=Stratum.ONLINE), observations, rng.normal(size=(STEPS, spec.action.dim)),
            reward=end.astype(float), terminated=end, decisions=[Decision(t, noise, chunk, chunk) for t in (0, CHUNK)], decision_id=decision,
            chunk_row=np.where(decision >= 0, np.where(row < late, row + CHUNK - late, row), -1),
        )  # fmt: skip

    with caplog.at_level(logging.WARNING, "robot_rl.training.learner_core"):
        for number in range(USELESS_IN_A_ROW + 3):
            core.ingest(episode(number))
    scalars.close()
    said = [r.getMessage() for r in caplog.records if "came at least one step late" in r.getMessage()]
    assert core.ready == (late == 0)
    assert len(said) == (1 if late else 0)
    assert all("dsrl_sac" in text and f"e{USELESS_IN_A_ROW - 1}" in text for text in said)
