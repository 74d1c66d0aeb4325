"""Pictures of the table-top scenes (skipped where no off-screen OpenGL is available)."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from robot_rl.sim.env import make_env
from robot_rl.sim.tabletop import TASK_IDS


def _can_draw() -> bool:
    try:
        env = make_env("tabletop/Lift", cameras=("front",), image_size=16)
        env.reset(seed=0)
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _can_draw(), reason="no off-screen OpenGL (set MUJOCO_GL to egl or osmesa)")


@pytest.mark.parametrize("env_id", TASK_IDS)
def test_camera_observations(env_id: str) -> None:
    env = make_env(env_id, cameras=("front", "wrist"), image_size=84)
    first, _ = env.reset(seed=0)
    for camera in ("front", "wrist"):
        image = first[f"observation.images.{camera}"]
        assert image.shape == env.spec.observation_features[f"observation.images.{camera}"].shape == (84, 84, 3)
        assert image.dtype == np.uint8
        assert image.std() > 10  # a picture of something
        orange = (image[..., 0] > 140) & (image[..., 2] < 90)
        if camera == "front":
            assert orange.sum() > 8  # the thing to manipulate is in sight
    second, _ = env.reset(seed=1)
    assert not np.array_equal(first["observation.images.front"], second["observation.images.front"])
    again, _ = env.reset(seed=0)
    assert np.array_equal(first["observation.images.front"], again["observation.images.front"])


def test_pictures_do_not_change_the_physics() -> None:
    plain, drawn = make_env("tabletop/Lift"), make_env("tabletop/Lift", cameras=("wrist",), image_size=(32, 48))
    a, _ = plain.reset(seed=4)
    b, _ = drawn.reset(seed=4)
    assert b["observation.images.wrist"].shape == (32, 48, 3)
    for _ in range(5):
        drawn.render()
        action = np.array([0.01, -0.01, -0.02, 0.1, 0.02])
        a, b = plain.step(action)[0], drawn.step(action)[0]
        assert np.array_equal(a["observation.state"], b["observation.state"])


def test_render_for_videos() -> None:
    env = make_env("tabletop/Drawer")
    env.reset(seed=0)
    assert env.render().shape == (240, 320, 3)
    assert env.render("wrist", 64, 48).shape == (48, 64, 3)
    with pytest.raises(ValueError, match="front, wrist"):
        env.render("top")


def test_drawing_from_many_threads() -> None:
    """A GL context belongs to one thread; one environment drawn from several must give the same picture in each."""
    env = make_env("tabletop/Lift", cameras=("front",), image_size=32)
    expected = env.reset(seed=0)[0]["observation.images.front"]
    found: list[np.ndarray] = []

    def draw() -> None:
        found.append(env.reset(seed=0)[0]["observation.images.front"])

    for _ in range(3):
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    draw()
    assert len(found) == 4
    assert all(np.array_equal(expected, f) for f in found)
