"""A learner whose reward comes from events: nothing is learned before it is known, and only from sources that were looked at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_kit import tiny

from robot_rl.replay.ulid import new_ulid
from robot_rl.rewards.gate import UncalibratedReward
from robot_rl.training import posttrain
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.learner_core import LearnerCore, LearningCounters
from robot_rl.training.run_folder import RunFolder
from robot_rl.training.scalars import ScalarLog
from robot_rl.types import Decision, Episode, EpisodeMeta, RewardEvent, RewardKind, Stratum

STEPS, CHUNK = 16, 8


def reports(path: Path, findings: list[str]) -> str:
    path.write_text(json.dumps({"source": "clf", "model_id": "classifier@1", "findings": findings}))
    return str(path)


def changes(report: str, **schedule) -> dict:
    return {
        "demos": {"prefill": False},
        "schedule": {"learner": "process", "return_updates": 0, "demo_ratio": 0.0, "demo_ratio_end": 0.0, **schedule},
        "reward": {"channels": [
            {"source": "clf", "kind": "success", "report": report},
            {"source": "progress", "kind": "potential", "weight": 0.0},
        ]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "message"),
    [({"learner": "inline"}, "accepted is process"), ({"return_updates": 4}, "returns are of recorded rewards")],
)
def test_settings_that_cannot_wait_for_rewards_are_refused(tmp_path, schedule, message):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path / "run", **changes("r.json", **schedule))


def test_learning_waits_for_rewards_of_a_source_with_a_good_report(tmp_path):
    config = tiny(tmp_path / "run", **changes(reports(tmp_path / "clf.json", [])))
    folder, spec = RunFolder(tmp_path / "run"), posttrain._env_spec(config)
    with InterruptFlag() as flag:
        base = posttrain.prepare_base(config, spec, folder, posttrain.Silent(), flag, "cpu")
    scalars = ScalarLog(folder, config)
    refused = tiny(tmp_path / "other", **changes(reports(tmp_path / "bad.json", ["auc 0.55 is below 0.8"])))
    with pytest.raises(UncalibratedReward, match=r"clf: auc 0.55"):
        LearnerCore(refused, base, [], LearningCounters(), folder, scalars, "cpu")
    core = LearnerCore(config, base, [], LearningCounters(), folder, scalars, "cpu")
    rng = np.random.default_rng(0)
    observations = {n: rng.normal(size=(STEPS + 1, *f.shape)).astype("f4") for n, f in spec.observation_features.items()}
    steps = np.arange(STEPS)
    chunk = rng.normal(size=(CHUNK, spec.action.dim)).astype("f4")
    noise = rng.normal(size=base.spec.noise_shape).astype("f4")
    core.ingest(Episode.from_arrays(
        EpisodeMeta("e", stratum=Stratum.ONLINE), observations, rng.normal(size=(STEPS, spec.action.dim)),
        truncated=steps == STEPS - 1, decisions=[Decision(t, noise, chunk, chunk) for t in (0, CHUNK)],
        decision_id=steps // CHUNK, chunk_row=steps % CHUNK,
    ))  # fmt: skip
    assert not core.ready, "nobody has said anything about this episode"

    def said(source: str, step: int, value: float, kind: RewardKind, model: str) -> None:
        core.reward(RewardEvent("e", step, source, value, kind, model_id=model, event_id=new_ulid()))

    said("clf", 10, 1.0, RewardKind.SUCCESS, "classifier@2")
    assert not core.ready, "another model than the report is about"
    said("clf", 12, 1.0, RewardKind.SUCCESS, "classifier@1")
    assert core.ready
    batch = core.buffer.sample(100, np.random.default_rng(0))
    assert batch.step.max() == 11
    assert set(batch.reward[batch.step == 11].tolist()) == {1.0}
    scalars.close()
