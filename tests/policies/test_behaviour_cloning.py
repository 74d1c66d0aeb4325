"""Behaviour cloning: what a chunk of a recording is, that both modes are learnt, and that the seed decides everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spine_kit import ARM, STATE

from robot_rl.policies.base import prior_noise
from robot_rl.policies.behaviour_cloning import ChunkDataset, clone
from robot_rl.policies.config import BCConfig, CompactPolicyConfig
from robot_rl.types import ActionSpec, Episode, EpisodeMeta, FeatureSpec

FEATURES = {STATE: FeatureSpec((1,))}


def episode(name: str, states: list[float], actions: np.ndarray) -> Episode:
    rows = np.array([*states, states[-1]], np.float32)[:, None]
    return Episode.from_arrays(EpisodeMeta(name), {STATE: rows}, actions)


def test_chunks_of_an_episode_end_standing_still() -> None:
    """Past the end absolute dimensions hold, deltas are zero; before the start the first frame fills the stack."""
    first = np.arange(1, 13, dtype=np.float32).reshape(4, 3) / 12
    second = -first[:2]
    data = ChunkDataset([episode("a", [0, 1, 2, 3], first), episode("b", [10, 11], second)], FEATURES, ARM, horizon=3, n_obs=2)
    assert len(data) == 6
    seen, chunks = data.get(torch.arange(6))
    assert seen[STATE][:, :, 0].tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [10, 10], [10, 11]]
    np.testing.assert_array_equal(chunks[1], first[1:4])
    hold = np.array([first[3, 0], 0.0, first[3, 2]])
    np.testing.assert_allclose(chunks[2], [first[2], first[3], hold])
    np.testing.assert_allclose(chunks[3], [first[3], hold, hold])
    clipped = np.clip(second, ARM.low, ARM.high)  # the gripper's limits are [0, 1]: what the robot would do
    np.testing.assert_allclose(chunks[5], [clipped[1], [clipped[1, 0], 0, clipped[1, 2]], [clipped[1, 0], 0, clipped[1, 2]]])


def fork(count: int = 60) -> list[Episode]:
    """Go left or right from the same state, then stay on that side: a mean of the two would be a demonstration of neither."""
    out = []
    for i in range(count):
        side = 0.8 if i % 2 else -0.8
        out.append(episode(f"f{i}", [0.01 * (i % 5)], np.full((1, 2), side, np.float32)))
    return out


TOY = ActionSpec((-1.0, -1.0), (1.0, 1.0))


def small(kind: str, **change) -> BCConfig:
    policy = CompactPolicyConfig(kind=kind, horizon=2, n_action_steps=2, width=48, depth=2, num_steps=8, train_steps=40)
    return BCConfig(
        **{"policy": policy, "steps": 400, "batch_size": 64, "learning_rate": 3e-3, "warmup": 20, "ema": 0.98} | change
    )


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_both_modes_are_learnt_and_the_middle_is_not(kind: str) -> None:
    policy = clone(fork(), FEATURES, TOY, small(kind))
    conditioning = policy.encode({STATE: torch.full((400, 1, 1), 0.02)})
    chunk = policy.unnormalize_action(policy.sample(conditioning, prior_noise(policy, 400, torch.Generator().manual_seed(0))))
    first = chunk[:, 0]
    near = (first.abs() - 0.8).abs().amax(1) < 0.25
    assert float(near.float().mean()) > 0.85
    together = first[:, 0] * first[:, 1] > 0  # both dimensions go to the same side
    assert float(together.float().mean()) > 0.9
    right = float((first[:, 0] > 0).float().mean())
    assert 0.25 < right < 0.75


def test_the_seed_decides_everything() -> None:
    reports: list[tuple[int, float]] = []
    config = small("diffusion", steps=25, observation_noise=0.1)
    torch.manual_seed(1)
    one = clone(fork(6), FEATURES, TOY, config, progress=lambda *x: reports.append(x))
    torch.manual_seed(2)
    two = clone(fork(6), FEATURES, TOY, config)
    other = clone(fork(6), FEATURES, TOY, small("diffusion", steps=25, observation_noise=0.1, seed=1))
    assert one.spec.base_hash == two.spec.base_hash != other.spec.base_hash
    assert [s for s, _ in reports] == [1, 25]
    assert not one.training
    assert not any(p.requires_grad for p in one.parameters())


def test_an_interrupted_cloning_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("robot_rl.policies.cloning_checkpoint.CloningCheckpoint.due", lambda self: True)
    config, file = small("diffusion", steps=230, observation_noise=0.1), tmp_path / "base" / "unfinished.safetensors"

    def stop(step: int, loss: float) -> None:
        if step > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clone(fork(6), FEATURES, TOY, config, progress=stop, unfinished=file)
    assert file.exists()
    seen: list[int] = []
    resumed = clone(fork(6), FEATURES, TOY, config, progress=lambda step, _: seen.append(step), unfinished=file)
    assert seen == [101, 201, 230]
    assert resumed.spec.base_hash == clone(fork(6), FEATURES, TOY, config).spec.base_hash
    assert not list(file.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        clone(fork(6), FEATURES, TOY, config, progress=stop, unfinished=file)
    seen.clear()  # other demonstrations: what was begun on these is not taken up
    clone(fork(8), FEATURES, TOY, config, progress=lambda step, _: seen.append(step), unfinished=file)
    assert seen[0] == 1


def test_what_cannot_be_cloned_is_said() -> None:
    with pytest.raises(ValueError, match="no episodes"):
        clone([], FEATURES, TOY, small("flow"))
    with pytest.raises(ValueError, match=r"diverged: loss (nan|inf) at step .*learning_rate"):
        clone(fork(4), FEATURES, TOY, small("flow", steps=101, learning_rate=1e30, warmup=1))
    for change, message in (({"steps": 0}, "steps=0"), ({"ema": 1.0}, "ema=1.0")):
        with pytest.raises(ValueError, match=message):
            small("flow", **change)
