"""What a run takes from others is refused by name where it does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from spine_kit import ARM, STATE, compact

from robot_rl.config import decode
from robot_rl.heads.guidance_config import ReferenceConfig
from robot_rl.replay.store import EpisodeStore
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.earlier_runs import acting_head, read_references
from robot_rl.types import Episode, EpisodeMeta


def test_only_finished_runs_over_this_base_lend_their_head(tmp_path) -> None:
    base = compact()
    with pytest.raises(ValueError, match=r"some\.key=.*result.json is missing"):
        acting_head(tmp_path, base, "some.key")
    (tmp_path / "result.json").write_text(json.dumps({"base_hash": "another", "acting": {"version": 1}}))
    with pytest.raises(ValueError, match="was made over base another"):
        acting_head(tmp_path, base, "some.key")


def test_references_are_what_followed_recorded_states(tmp_path) -> None:
    base = compact()
    with pytest.raises(ValueError, match=r"head\.reference\.references=None: accepted is the folder of an episode store"):
        read_references(base, ReferenceConfig())
    rng = np.random.default_rng(0)
    folder, recorded = tmp_path / "tracks", []
    with EpisodeStore.create(
        folder, observation_features=dict(base.spec.observation_features), action=ARM, sync=False
    ) as store:
        for i, success in enumerate((True, False)):
            action = rng.uniform(-0.9, 0.9, (6, 3)).astype("f4") * [1, 1, 0.5]
            observation = rng.normal(size=(7, 4)).astype("f4")
            store.add(Episode.from_arrays(EpisodeMeta(f"e{i}", seed=i, success=success), {STATE: observation}, action))
            recorded.append((observation, action))
    conditioning, chunk = read_references(base, ReferenceConfig(references=folder))
    assert conditioning.shape == (6, base.conditioning_dim)
    assert chunk.shape == (6, 4, 3)
    observation, action = recorded[0]
    expected = base.encode({STATE: torch.from_numpy(observation[4:5])[:, None]})
    torch.testing.assert_close(conditioning[4:5], expected)
    rows = base.unnormalize_action(chunk[4])
    np.testing.assert_allclose(rows[:2, 0], action[4:, 0], atol=1e-5)
    np.testing.assert_allclose(rows[2:, 0], action[5, 0], atol=1e-5)  # an absolute dimension holds its last value
    np.testing.assert_allclose(rows[2:, 1], 0.0, atol=1e-5)  # a delta dimension stands still
    assert len(read_references(base, ReferenceConfig(references=folder, only_successful=False))[0]) == 12
    assert len(read_references(base, ReferenceConfig(references=folder, only_successful=False, max_references=5))[0]) == 5


@pytest.mark.parametrize(("change", "why"), [
    ({"head": {"kind": "guided"}, "learner": {"algorithm": "guided"}}, "a weight above 0 with 'guided'"),
    ({"head": {"kind": "reference"}, "learner": {"algorithm": "fixed"}}, "which learns nothing: accepted is 0"),
    ({"head": {"kind": "residual", "adapter": {"kind": "lora"}}, "learner": {"algorithm": "residual"}}, "accepted is none, or fine_tuned"),
    ({"head": {"kind": "fine_tuned", "adapter": {"kind": "modulation", "entry": None}}, "learner": {"algorithm": "weighted_bc"}},
     "accepted is learner.algorithm='fixed'"),
    ({"head": {"kind": "distilled"}, "learner": {"algorithm": "weighted_bc"}}, "accepted is distill"),
])  # fmt: skip
def test_combinations_that_make_no_sense_are_refused_before_anything_starts(change, why) -> None:
    with pytest.raises(ValueError, match=why):
        decode(PostTrainConfig, change)
