"""Parts of a run that meet: a base asked more often, moved pictures, composed rewards, and what excludes each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_kit import tiny
from spine_kit import ARM, IMAGE, STATE, compact

from robot_rl.heads.advantage import AdvantageHead
from robot_rl.heads.config import AdvantageConfig
from robot_rl.learners.batch import EPISODE_RETURN, RETURN_KNOWN
from robot_rl.policies.loading import load_policy
from robot_rl.replay import ReplayBuffer, WindowConfig
from robot_rl.runtime.weights import WeightChannel
from robot_rl.training import posttrain
from robot_rl.training.artifact import export_run
from robot_rl.training.config import BaseConfig
from robot_rl.training.evaluate import load_acting
from robot_rl.training.ingest import encode_episode, ingest
from robot_rl.training.run_folder import base_source
from robot_rl.types import Episode, EpisodeMeta, FeatureSpec

QUICK = {
    "schedule": {"env_steps": 60}, "demos": {"episodes": 4}, "gate": {"n_min": 2, "n_max": 2, "reference_n_min": 2},
    "evaluation": {"reference_episodes": 2, "curve_episodes": 2, "final_episodes": 2, "videos": 0},
}  # fmt: skip


def recorded(length: int = 12) -> Episode:
    rng = np.random.default_rng(length)
    seen = {
        STATE: rng.normal(size=(length + 1, 4)).astype(np.float32),
        IMAGE: rng.integers(0, 256, (length + 1, 32, 32, 3), np.uint8),
    }
    ends = np.arange(length) == length - 1
    return Episode.from_arrays(
        EpisodeMeta("e"), seen, rng.uniform(ARM.low, ARM.high, (length, 3)), reward=np.ones(length), truncated=ends
    )


def buffer_of(base, views: int) -> ReplayBuffer:
    return ReplayBuffer(
        1000, conditioning_dim=base.spec.conditioning_dim, action_dim=3, window=WindowConfig(3, 0.9, "any"),
        delta_mask=ARM.delta_mask, extra={EPISODE_RETURN: FeatureSpec(()), RETURN_KNOWN: FeatureSpec(())}, views=views,
    )  # fmt: skip


def test_a_loaded_base_that_is_asked_more_often_is_found_by_everybody(tmp_path):
    """The run's own base is the changed one, for the run itself, a second attempt, evaluation and export; the given one stays."""
    folder = tmp_path / "first"
    posttrain.run(tiny(folder, **QUICK))
    given = load_policy(folder / "base")
    run = tmp_path / "run"
    config = tiny(run, **QUICK, base={"path": str(folder / "base"), "replan_every": 2})
    result = posttrain.run(config)
    assert posttrain.run(config)["base_hash"] == result["base_hash"]
    own = load_policy(run / "base")
    assert (own.spec.n_action_steps, given.spec.n_action_steps) == (2, 8)
    assert result["base_hash"] == own.spec.base_hash != given.spec.base_hash
    assert load_policy(folder / "base").spec.base_hash == given.spec.base_hash
    version = max(WeightChannel(run / "weights").versions())
    (run / "result.json").write_text(json.dumps(result | {"acting": {"version": version, "mode": "eval"}}))
    for who in ("base", "policy"):
        assert load_acting(run, who, "cpu")[0].base.spec.base_hash == own.spec.base_hash
    export_run(run, tmp_path / "out")
    (tmp_path / "first").rename(tmp_path / "gone")
    assert load_acting(tmp_path / "out", "policy", "cpu")[0].base.spec.base_hash == own.spec.base_hash


def test_where_a_runs_base_is(tmp_path):
    mine, theirs, checkpoint = (tmp_path / n for n in ("base", "theirs", "checkpoint"))
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / "policy.json").write_text("{}")
    assert base_source(mine, BaseConfig()) == mine
    assert base_source(mine, BaseConfig(theirs)) == theirs
    assert base_source(mine, BaseConfig(theirs, replan_every=1)) == mine
    assert base_source(mine, BaseConfig(checkpoint)) == mine  # which says how the checkpoint was loaded
    assert base_source(tmp_path / "none", BaseConfig(checkpoint)) == checkpoint


def test_only_a_compact_base_can_be_asked_more_often():
    with pytest.raises(ValueError, match=r"base.replan_every=1: the base is a object, .* accepted is 0, or a compact"):
        posttrain.replanned(object(), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"base.replan_every=99: accepted are 0 to"):
        posttrain.replanned(compact(), 99)
    with pytest.raises(ValueError, match=r"replan_every=1 with options="):
        BaseConfig(Path("x"), {"num_inference_steps": 2}, 1)


@pytest.mark.parametrize(
    ("learner", "key"),
    [
        ({"algorithm": "chunk_sac", "takeover_reward": -1.0}, "learner.takeover_reward=-1.0"),
        ({"algorithm": "chunk_sac", "optimism": {"strata": ["prior"]}}, r"learner.optimism.strata=\['prior'\]"),
    ],
)
def test_a_learners_own_rewards_and_composed_ones_exclude_each_other(tmp_path, learner, key):
    chosen = {"head": {"kind": "chunk_policy"}, "schedule": {"return_updates": 0}, "learner": learner}
    tiny(tmp_path, **chosen)
    with pytest.raises(ValueError, match=f"{key} with reward.channels"):
        tiny(tmp_path, **chosen, reward={"channels": [{"source": "recorded"}]})


def test_composed_rewards_never_hide_a_component():
    base = compact(images=True)
    buffer = buffer_of(base, 1)
    episode = recorded()
    arrays = encode_episode(base, episode), np.zeros((12, 3), np.float32)
    extra = {EPISODE_RETURN: np.zeros(12), RETURN_KNOWN: np.ones(12)}
    buffer.add(episode, *arrays, extra=extra, reward_component=np.zeros(12))
    with pytest.raises(ValueError, match="episode e has a reward_component"):
        buffer.set_composed("e", np.zeros(12), length=12, terminated=False)


def test_what_never_reads_a_students_answer_refuses_one(tmp_path):
    student = {"algorithm": "edit", "base_update": {"rows": "all"}, "student": {"hidden": [8]}}
    with pytest.raises(ValueError, match=r"student with base_update.rows='all'"):
        tiny(tmp_path, head={"kind": "edit", "edit": {"own_base": True}}, learner=student)


def test_a_grippers_critic_keeps_its_discount(tmp_path):
    with pytest.raises(ValueError, match=r"curriculum.discount_start=0.9 with learner.algorithm='hybrid_sac'"):
        tiny(tmp_path, head={"kind": "hybrid_policy"}, learner={"algorithm": "hybrid_sac"}, curriculum={"discount_start": 0.9})


def test_beginnings_of_windows_see_moved_pictures_too():
    base = compact(images=True)
    buffer = buffer_of(base, 3)
    episode = recorded()
    ingest(buffer, episode, base, shift=3)
    views = np.stack([encode_episode(base, episode), *(encode_episode(base, episode, shift=3, view=v) for v in (1, 2))], axis=1)
    windows, parts = buffer.sample_prefixes(64, np.random.default_rng(0))
    used = set()
    for i in range(64):
        for j in np.flatnonzero(parts.weight[i]):
            mine = views[windows.step[i] + j + 1]
            found = [k for k in range(3) if np.array_equal(mine[k], parts.next_conditioning[i, j])]
            assert found
            used.add(found[0])
    assert used == {0, 1, 2}


def test_an_advantage_conditioned_head_cannot_be_merged():
    head = AdvantageHead(compact(), replace(AdvantageConfig(), guidance=2.0))
    with pytest.raises(ValueError, match="cannot be merged"):
        head.merged()
    assert torch.equal(head.twin(compact()).denoiser.indicator, head.denoiser.indicator)
