"""Pictures on their way into a policy: the same pixels in training and in a node, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spine_kit import compact

from robot_rl.policies.behaviour_cloning import clone
from robot_rl.policies.config import BCConfig, CompactPolicyConfig
from robot_rl.policies.pictures import UNIT, PictureTransform, interpolation, random_shift
from robot_rl.types import ActionSpec, Episode, EpisodeMeta, FeatureSpec


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
    ("crop", "resize"), [(None, (96, 128)), ((20, 40, 200, 240), (84, 84)), ((3, 5, 33, 17), (84, 90)), (None, None)]
)
def test_one_frame_in_a_node_is_that_frame_in_a_training_batch(crop, resize):
    transform = PictureTransform((240, 320), crop, resize)
    pictures = noise(40, 2, 240, 320, 3)
    batch = transform(torch.from_numpy(pictures))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in (0, 17, 39):
            alone = transform(torch.from_numpy(np.ascontiguousarray(pictures[i : i + 1])))
            assert torch.equal(alone[0], batch[i])
            assert torch.equal(PictureTransform((240, 320), crop, resize)(torch.from_numpy(pictures[i, 1])), batch[i, 1])
    finally:
        torch.set_num_threads(threads)


def test_resizing_is_exact_whole_number_arithmetic():
    transform = PictureTransform((37, 53), None, (12, 20))
    picture = noise(37, 53, 3)
    rows, columns = (interpolation(*x).astype(np.int64) for x in ((37, 12), (53, 20)))
    assert (rows.sum(1) == UNIT).all()
    assert (columns.sum(1) == UNIT).all()
    summed = np.einsum("ih,hwc,jw->ijc", rows, picture.astype(np.int64), columns)
    wanted = (summed + UNIT * UNIT // 2) // (UNIT * UNIT)
    np.testing.assert_array_equal(transform(torch.from_numpy(picture)).numpy(), wanted)


def test_resizing_is_what_people_expect_of_it():
    flat = torch.full((48, 64, 3), 131, dtype=torch.uint8)
    assert (PictureTransform((48, 64), None, (17, 90))(flat) == 131).all()
    ramp = torch.arange(64).repeat(48, 1)[..., None].expand(-1, -1, 3).to(torch.uint8) * 4
    small = PictureTransform((48, 64), None, (24, 32))(ramp)[12, :, 0].int()
    np.testing.assert_allclose(small[2:-2], np.arange(32)[2:-2] * 8 + 2, atol=1.5)
    picture = torch.from_numpy(noise(40, 40, 3))
    torch.testing.assert_close(PictureTransform((40, 40), (4, 6, 30, 20), None)(picture), picture[4:34, 6:26])


def test_a_transform_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"crop=\(0, 0, 50, 10\): accepted is .* inside 40x40"):
        PictureTransform((40, 40), (0, 0, 50, 10))
    with pytest.raises(ValueError, match=r"cameras.observation.images.top: resize=\(84,\): accepted are 2 integers"):
        PictureTransform.from_json("observation.images.top", {"size": [40, 40], "resize": [84]})
    with pytest.raises(ValueError, match="accepted are size"):
        PictureTransform.from_json("observation.images.top", {"resize": [84, 84]})
    with pytest.raises(ValueError, match=r"uint8 of \(30, 40\); this camera's are uint8 of \(40, 40\)"):
        PictureTransform((40, 40))(torch.zeros(30, 40, 3, dtype=torch.uint8))


def test_random_shift_moves_each_sample_by_itself_and_its_frames_together():
    pictures = torch.from_numpy(noise(16, 2, 12, 14, 3))
    moved = random_shift(pictures, 3, torch.Generator().manual_seed(1))
    assert torch.equal(moved, random_shift(pictures, 3, torch.Generator().manual_seed(1)))
    found = set()
    for before, after in zip(pictures, moved, strict=True):
        padded = (
            torch.nn.functional.pad(before.movedim(-1, 1).float(), (3, 3, 3, 3), mode="replicate")
            .to(torch.uint8)
            .movedim(1, -1)
        )
        places = [
            (y, x) for y in range(7) for x in range(7) if torch.equal(padded[:, y : y + 12, x : x + 14], after)
        ]  # fmt: skip
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 8
    assert torch.equal(random_shift(pictures, 0, torch.Generator()), pictures)


def test_cloning_with_random_shift_trains_and_leaves_the_policy_itself_alone():
    top = "observation.images.top"
    features = {"observation.state": FeatureSpec((2,)), top: FeatureSpec((16, 16, 3), "uint8")}
    rng = np.random.default_rng(0)
    episodes = [
        Episode.from_arrays(
            EpisodeMeta(f"e{i}"),
            {"observation.state": rng.normal(size=(9, 2)).astype(np.float32), top: noise(9, 16, 16, 3, seed=i)},
            rng.uniform(-1, 1, (8, 2)),
        )
        for i in range(2)
    ]
    action = ActionSpec((-1, -1), (1, 1))
    config = CompactPolicyConfig(horizon=4, n_action_steps=4, width=16, depth=1, num_steps=2, train_steps=4, image_dim=8)
    losses: list[float] = []
    made = [
        clone(
            episodes, features, action, BCConfig(config, steps=3, batch_size=4, warmup=1, random_shift=pad),
            progress=lambda _s, loss: losses.append(loss),
        ).spec.base_hash
        for pad in (0, 2, 2)
    ]  # fmt: skip
    assert made[1] == made[2] != made[0]
    assert np.isfinite(losses).all()
    assert compact(images=True).spec.base_hash == compact(images=True).spec.base_hash
