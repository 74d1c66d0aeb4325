"""Episodes made up for the format tests, and where the real recordings are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from robot_rl.types import Episode, EpisodeMeta, Stratum

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask the network


def _moving_gradient(rows: int, height: int, width: int) -> np.ndarray:
    """(rows, H, W, 3) uint8 frames that a video codec keeps well and that differ from one another."""
    x = np.linspace(0.0, 1.0, width)[None, None, :, None]
    y = np.linspace(0.0, 1.0, height)[None, :, None, None]
    phase = np.linspace(0.0, 1.0, rows)[:, None, None, None]
    colour = np.array([1.0, 0.7, 0.4])[None, None, None, :]
    return np.rint(255 * (0.5 * x + 0.2 * y + 0.3 * phase) * colour).astype(np.uint8)


def _make(index: int, length: int = 12, image: tuple[int, int] | None = None, success: bool = True) -> Episode:
    rng = np.random.default_rng(100 + index)
    observations = {
        "observation.state": rng.normal(size=(length + 1, 5)).astype(np.float32),
        "observation.environment_state": rng.normal(size=(length + 1, 1)).astype(np.float32),
    }
    if image is not None:
        observations["observation.images.front"] = _moving_gradient(length + 1, *image)
    reward, terminated, truncated = np.zeros(length, np.float32), np.zeros(length, bool), np.zeros(length, bool)
    reward[-1] = float(success)
    (terminated if success else truncated)[-1] = True
    proposal = rng.normal(size=(length, 3)).astype(np.float32)
    proposal[: length // 2] = np.nan
    source = rng.integers(0, 6, length)
    meta = EpisodeMeta(
        f"made-{index}",
        task=("open the drawer", "ferme-le, s'il te plaît")[index % 2],
        env_id="tabletop/Drawer",
        seed=index,
        stratum=(Stratum.ONLINE, Stratum.INTERVENTION)[index % 2],
        success=success,
        weights_version=3,
        control_hz=20.0,
        extra={"start": {"x": 0.25}},
    )
    return Episode.from_arrays(
        meta,
        observations,
        rng.normal(size=(length, 3)).astype(np.float32),
        action_base=proposal,
        action_human=-proposal,
        source=source,
        safety=rng.integers(0, 2047, length),
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        weights_version=rng.integers(0, 4, length),
        intervention_id=np.where(source == 1, 2, -1),
        stamp_ns=1_700_000_000_000_000_000 + np.arange(length) * 50_000_123,
    )


@pytest.fixture
def make_episode() -> Callable[..., Episode]:
    return _make


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Compare two episodes: every step array and vector exactly, images within ``image_tolerance`` grey levels on average."""

    def check(ours: Episode, theirs: Episode, image_tolerance: float = 0.0, skip: tuple[str, ...] = ()) -> None:
        for name in Episode.STEP_ARRAYS:
            if name not in skip:
                np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name), err_msg=name)
                assert getattr(theirs, name).dtype == getattr(ours, name).dtype, name
        assert set(theirs.observations) == set(ours.observations)
        for name, rows in ours.observations.items():
            got = theirs.observations[name]
            assert got.shape == rows.shape
            assert got.dtype == rows.dtype
            if rows.dtype == np.uint8:
                assert np.abs(got.astype(float) - rows).mean() <= image_tolerance, name
            else:
                np.testing.assert_array_equal(got, rows, err_msg=name)

    return check


@pytest.fixture
def data_root() -> Path:
    """Folder of the real recordings."""
    return Path(os.environ.get("ROBOT_RL_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")


@pytest.fixture
def g1(data_root: Path) -> Path:
    path = data_root / "g1_bottle_lerobot_v21"
    if not path.is_dir():
        pytest.skip(f"needs the recording g1_bottle_lerobot_v21 in {data_root} (set ROBOT_RL_DATA)")
    return path


@pytest.fixture
def adroit(data_root: Path) -> Path:
    path = data_root / "adroit_door_human"
    if not path.is_dir():
        pytest.skip(f"needs the recording adroit_door_human in {data_root} (set ROBOT_RL_DATA)")
    return path
