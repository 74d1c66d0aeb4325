"""Rotations without a quaternion's two signs: the matrix, the way back, and policies that cannot tell the signs apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from spine_kit import ARM, STATE

from robot_rl.policies.behaviour_cloning import clone
from robot_rl.policies.checkpoint import load_policy, save_policy
from robot_rl.policies.config import BCConfig, CompactPolicyConfig
from robot_rl.policies.rotations import matrix_columns, narrowed, quaternion_of, quaternions, widened
from robot_rl.types import Episode, EpisodeMeta, FeatureSpec


def random_quaternions(n: int) -> torch.Tensor:
    return torch.from_numpy(Rotation.random(n, random_state=0).as_quat())


def test_columns_are_those_of_the_rotation_matrix():
    q = random_quaternions(200)
    wanted = Rotation.from_quat(q.numpy()).as_matrix()[..., :2].transpose(0, 2, 1).reshape(-1, 6)
    np.testing.assert_allclose(matrix_columns(q).numpy(), wanted, atol=1e-12)
    np.testing.assert_allclose(matrix_columns(-3 * q).numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1.0, np.pi - 1e-6, np.pi])
@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -2, 3)])
def test_back_to_the_quaternion_at_any_angle(axis, angle):
    q = torch.from_numpy(Rotation.from_rotvec(angle * np.array(axis) / np.linalg.norm(axis)).as_quat())
    back = quaternion_of(matrix_columns(q))
    assert abs(float(back @ q)) == pytest.approx(1.0, abs=1e-9)
    assert back[3] >= 0


def test_where_quaternions_are():
    names = ["x", "arm_qx", "arm_qy", "arm_qz", "arm_qw", "qx", "qy", "qz", "qw", "a_qx", "b_qy", "a_qz", "a_qw", "qw", "qx"]
    assert quaternions(names) == [1, 5]
    assert quaternions([]) == []


def test_a_vector_of_several_there_and_back():
    q = random_quaternions(10)
    q = torch.where(q[:, 3:] < 0, -q, q)
    vector = torch.cat([torch.arange(10.0, dtype=torch.float64)[:, None], q, q.flip(0), torch.ones(10, 2)], -1)
    assert widened(vector, [1, 5]).shape == (10, 15)
    torch.testing.assert_close(narrowed(widened(vector, [1, 5]), [1, 5]), vector)
    assert torch.equal(widened(vector, []), vector)


NAMES = ("height", "hand_qx", "hand_qy", "hand_qz", "hand_qw")


def cloned(rotations: str):
    """From recordings whose quaternions change their sign at every other step."""
    rng = np.random.default_rng(0)
    q = random_quaternions(41).numpy() * np.where(np.arange(41) % 2, -1.0, 1.0)[:, None]
    seen = np.concatenate([rng.normal(size=(41, 1)), q], 1).astype(np.float32)
    episode = Episode.from_arrays(EpisodeMeta("one"), {STATE: seen}, rng.uniform(-1, 1, (40, ARM.dim)).astype(np.float32))
    shape = CompactPolicyConfig(
        horizon=4, n_action_steps=3, width=16, depth=1, num_steps=2, train_steps=10, rotations=rotations
    )
    return clone([episode], {STATE: FeatureSpec((5,), names=NAMES)}, ARM, BCConfig(shape, steps=3, batch_size=8)), seen


def test_a_policy_cannot_tell_the_signs_apart():
    policy, seen = cloned("matrix")
    other = seen * np.array([1, -1, -1, -1, -1], np.float32)
    one, two = (policy.encode({STATE: torch.from_numpy(x)[:, None]}) for x in (seen, other))
    torch.testing.assert_close(one, two)
    assert one.shape == (41, 7)
    assert policy.spec.conditioning_dim == 7
    back = policy.vector_observation(one)[STATE]
    wanted = torch.from_numpy(np.where(seen[:, 4:] < 0, other, seen))
    torch.testing.assert_close(back, wanted, atol=1e-5, rtol=1e-5)
    as_recorded, _ = cloned("quaternion")
    assert as_recorded.spec.conditioning_dim == 5
    assert "rotations" not in as_recorded.describe()["config"], "policies from before keep their identity"


def test_a_checkpoint_keeps_it(tmp_path):
    policy, seen = cloned("matrix")
    save_policy(policy, tmp_path)
    again = load_policy(tmp_path)
    observation = {STATE: torch.from_numpy(seen)[:, None]}
    assert torch.equal(again.encode(observation), policy.encode(observation))
    assert again.spec.base_hash == policy.spec.base_hash
