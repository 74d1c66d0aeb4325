"""Human demonstrations of ``AdroitHandDoor-v1`` in one npz file (from the recordings of the DAPG paper, arXiv:1709.10087).

Arrays: ``observations`` (N, 39), ``actions`` (N, 28), ``dense_rewards`` (N,), ``episode_ends`` (E,), and the start
states ``init_qpos`` (E, 30), ``init_qvel`` (E, 30), ``init_door_body_pos`` (E, 3), which together are the argument of
``env.reset(options={"initial_state_dict": ...})``.

Layout of an observation (gymnasium-robotics' AdroitHandDoor): hand joints 0..26, latch 27, door hinge 28, palm position
29..31, handle position 32..34, palm minus handle 35..37, door open flag 38. Success is a hinge angle of at least 1.35 rad.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robot_rl.replay.importers.base import CommonOptions, FormatError, ImportSource, action_spec, check_type, episode_id
from robot_rl.types import OBSERVATION_STATE, Episode, EpisodeMeta, FeatureSpec, Stratum

ENV_ID = "gymnasium/AdroitHandDoor-v1"
CONTROL_HZ = 100.0  # five physics steps of 2 ms
DOOR_HINGE = 28
SUCCESS_RAD = 1.35
SHAPES = {
    "observations": (39,), "actions": (28,), "episode_ends": (),
    "init_qpos": (30,), "init_qvel": (30,), "init_door_body_pos": (3,),
}  # fmt: skip
OBSERVATION_NAMES = (
    *(f"hand_{i}" for i in range(27)), "latch", "door_hinge",
    *(f"{what}_{axis}" for what in ("palm", "handle", "palm_minus_handle") for axis in "xyz"), "door_open",
)  # fmt: skip


@dataclass(frozen=True)
class Options(CommonOptions):
    """Options of the Adroit door demonstrations.

    Attributes:
        cut_at_success: end an episode, ``terminated``, at the first step that opens the door far enough, as the task does;
            ``False`` keeps what the person did afterwards.
        steps_after_widest: end an episode so many steps after the door stood widest, if it has not ended before; ``None``
            keeps what follows. Most of these people let go short of the angle that counts and the door swings back: cloned
            to the end, their recordings teach to let go.
        success_threshold: hinge angle in rad that counts as open.
        clip_actions: clip to [-1, 1]. The environment clips in any case, so both replay the same; unclipped values keep
            what the glove said.
    """

    task: str | None = "Open the door."
    cut_at_success: bool = True
    steps_after_widest: int | None = None
    success_threshold: float = SUCCESS_RAD
    clip_actions: bool = False

    def __post_init__(self) -> None:
        CommonOptions.__post_init__(self)
        check_type("cut_at_success", self.cut_at_success, bool, "true or false")
        check_type("clip_actions", self.clip_actions, bool, "true or false")
        after = self.steps_after_widest
        if after is not None and (isinstance(after, bool) or not isinstance(after, int) or after < 0):
            raise ValueError(f"steps_after_widest={after!r}: accepted are null or integers >= 0")
        if not isinstance(self.success_threshold, (int, float)) or not 0 < self.success_threshold <= np.pi:
            raise ValueError(f"success_threshold={self.success_threshold!r}: accepted is an angle in (0, pi] rad")


class AdroitDoorImporter:
    """Sparse reward: 1.0 on the step that first opens the door, else 0.0."""

    def __init__(self, path: Path, options: Options):
        self.path, self.options = path, options
        with np.load(path, allow_pickle=False) as file:
            absent = [k for k in SHAPES if k not in file.files]
            if absent:
                raise FormatError(f"{path} has no array {', '.join(absent)}; it has {', '.join(file.files)}")
            self.arrays = {k: file[k] for k in SHAPES}
        self._check()
        ends = self.arrays["episode_ends"]
        self.bounds = list(zip([0, *map(int, ends[:-1])], map(int, ends), strict=True))
        self.wanted = options.select(range(len(ends)), path)

    def _check(self) -> None:
        ends = self.arrays["episode_ends"]
        counts = {"observations": int(ends[-1]) if len(ends) else 0, "episode_ends": len(ends)}
        for key, shape in SHAPES.items():
            rows = counts["observations"] if key in ("observations", "actions") else counts["episode_ends"]
            if self.arrays[key].shape != (rows, *shape):
                raise FormatError(f"{self.path}: {key} has shape {self.arrays[key].shape}, expected {(rows, *shape)}")
            if not np.isfinite(self.arrays[key]).all():
                raise FormatError(f"{self.path}: {key} is not finite everywhere")
        if len(ends) == 0 or (np.diff(ends, prepend=0) <= 0).any():
            raise FormatError(f"{self.path}: episode_ends must rise from above 0, found {ends[:5]}...")

    def describe(self) -> ImportSource:
        actions = self.arrays["actions"]
        outside = np.abs(actions) > 1.0
        spec, origin = action_spec(actions.min(0), actions.max(0), self.options, known=(-1.0, 1.0))
        extra = {
            "env_id": ENV_ID,
            "control_hz": CONTROL_HZ,
            "action_limits": origin,
            "share_of_action_values_outside_limits": float(outside.mean()),
            "share_of_steps_with_a_value_outside_limits": float(outside.any(1).mean()),
            "episodes_reaching_success": sum(self._first_success(*self.bounds[i]) is not None for i in self.wanted),
        }
        features = {OBSERVATION_STATE: FeatureSpec((39,), "float32", OBSERVATION_NAMES)}
        return ImportSource(features, spec, len(self.wanted), self.options.task or "", "adroit_door", extra)

    def _first_success(self, start: int, end: int) -> int | None:
        """The transition (counted from the episode's start) that reached the first open door."""
        open_rows = np.flatnonzero(self.arrays["observations"][start:end, DOOR_HINGE] >= self.options.success_threshold)
        # observation k follows transition k - 1; a door that is open in the first row was opened by nobody
        return int(open_rows[0]) - 1 if len(open_rows) and open_rows[0] > 0 else None

    def episodes(self) -> Iterator[Episode]:
        for index in self.wanted:
            yield self._episode(index)

    def _episode(self, index: int) -> Episode:
        options, (start, end) = self.options, self.bounds[index]
        reached = self._first_success(start, end)
        length = end - start
        if options.cut_at_success and reached is not None:
            length = reached + 1
        elif options.steps_after_widest is not None:
            # observation k follows transition k - 1, so k transitions end at the widest opening
            widest = int(self.arrays["observations"][start:end, DOOR_HINGE].argmax())
            length = min(length, max(widest, 1) + options.steps_after_widest)
        rows = self.arrays["observations"][start : min(start + length + 1, end)].astype(np.float32)
        if len(rows) == length:  # what followed the last action was not recorded
            rows = np.concatenate([rows, rows[-1:]])
        action = self.arrays["actions"][start : start + length].astype(np.float32)
        if options.clip_actions:
            action = np.clip(action, -1.0, 1.0)
        reward, terminated, truncated = np.zeros(length, np.float32), np.zeros(length, bool), np.zeros(length, bool)
        if reached is not None:
            reward[reached] = 1.0
        ended = options.cut_at_success and reached is not None
        (terminated if ended else truncated)[-1] = True
        init = {name: self.arrays[f"init_{name}"][index].tolist() for name in ("qpos", "qvel", "door_body_pos")}
        meta = EpisodeMeta(
            episode_id=episode_id(options.id_prefix or "adroit-door-human", index),
            task=options.task or "",
            env_id=ENV_ID,
            stratum=Stratum(options.stratum),
            success=reached is not None,
            control_hz=CONTROL_HZ,
            extra={
                "initial_state_dict": init,
                "imported": {"format": "adroit_door", "dataset": self.path.parent.name, "episode_index": index},
            },
        )
        return Episode.from_arrays(
            meta,
            {OBSERVATION_STATE: rows},
            action,
            source=np.full(length, options.source_code),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            stamp_ns=np.arange(length, dtype=np.int64) * round(1e9 / CONTROL_HZ),
        )


def _file(path: Path) -> Path:
    return path / "demos.npz" if path.is_dir() else path


def sniff(path: Path) -> bool:
    file = _file(path)
    if file.suffix != ".npz" or not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return {f"{k}.npy" for k in SHAPES} <= set(archive.namelist())


def open_source(path: Path, options: Options) -> AdroitDoorImporter:
    file = _file(path)
    if not zipfile.is_zipfile(file):
        raise FormatError(
            f"{file} is not an npz file (or not there); adroit_door accepts demos.npz or the folder that holds it"
        )
    return AdroitDoorImporter(file, options)
