"""LeRobot datasets: what versions 2.x and 3.x share. The layouts are in ``lerobot_v21`` and ``lerobot_v3``.

Read with pyarrow and PyAV only; the ``lerobot`` package is not needed and nothing is ever downloaded.

How a LeRobot frame becomes a step:

* ``observation.*`` vectors keep their names; ``observation.images.*`` are (H, W, 3) uint8 RGB whatever the order on disk.
* A dataset holds L observations for L actions; the observation after the last action is taken from the side file that
  our exporter writes (``meta/robot_rl/``), otherwise the last row is repeated.
* ``next.terminated`` and ``next.truncated`` are taken as they are. An old bare ``next.done`` says only that the recording
  stopped, so the last step is ``truncated``, unless ``next.success`` says that it ended because the task was done.
* ``complementary_info.is_intervention`` (HIL-SERL recordings) becomes ``source`` and ``intervention_id``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.importers.base import (
    CommonOptions,
    FormatError,
    ImportSource,
    action_spec,
    check_string_list,
    check_type,
    episode_id,
    provenance,
    shorten,
    unknown_outcome,
)
from robot_rl.replay.importers.lerobot_files import column_to_numpy, decode_image, flat_names, read_info, read_jsonl
from robot_rl.replay.importers.video import decode_frames, resize_area
from robot_rl.types import OBSERVATION_IMAGES, Episode, EpisodeMeta, FeatureSpec, Source, Stratum

SIDE_FOLDER = Path("meta") / "robot_rl"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
PROPOSALS = {"action_base": "proposal.base", "action_policy": "proposal.policy", "action_human": "proposal.human"}
"""Our arrays to exported features. Not ``action.*``: LeRobot takes every key that begins with ``action`` for an action."""

STEP_FEATURES = {
    "reward": "next.reward",
    "terminated": "next.terminated",
    "truncated": "next.truncated",
    "source": "source",
    "intervention_id": "intervention",
    "weights_version": "weights_version",
    "safety": "safety",
    "stamp_ns": "stamp_ns",
    **PROPOSALS,
}
OLD_SIGNALS = ("next.done", "next.success", "complementary_info.is_intervention")


@dataclass(frozen=True)
class Options(CommonOptions):
    """Options of both LeRobot versions.

    Attributes:
        videos: read the cameras; ``false`` imports the rest only.
        cameras: only these (``cam_high`` or ``observation.images.cam_high``); ``None`` is all.
        image_size: (height, width) to scale every frame to; ``None`` keeps the recorded size. A whole episode of frames is in
            memory at once: 400 frames of 480x640 are 370 MB.
        action_key: the feature that holds the action.
    """

    videos: bool = True
    cameras: Sequence[str] | None = None
    image_size: Sequence[int] | None = None
    action_key: str = "action"

    def __post_init__(self) -> None:
        CommonOptions.__post_init__(self)
        check_type("videos", self.videos, bool, "true or false")
        check_type("action_key", self.action_key, str, "a feature name")
        if self.cameras is not None:
            names = check_string_list("cameras", self.cameras)
            object.__setattr__(self, "cameras", tuple(n.removeprefix(OBSERVATION_IMAGES) for n in names))
        if self.image_size is not None:
            size = self.image_size
            if isinstance(size, str) or len(size) != 2 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in size):
                raise ValueError(f"image_size={size!r}: accepted is (height, width), two integers > 0")
            object.__setattr__(self, "image_size", (int(size[0]), int(size[1])))


@dataclass(frozen=True)
class Camera:
    """One camera feature: where its frames are and how they lie."""

    key: str
    kind: str  # "video" or "image" (bytes in the parquet file)
    shape: tuple[int, int, int]  # (H, W, 3) as imported


@dataclass(frozen=True)
class EpisodeRow:
    """What the metadata says about one episode."""

    index: int
    length: int
    tasks: tuple[str, ...]
    place: Mapping[str, Any]  # of a layout's own making


@dataclass(frozen=True)
class VideoPart:
    """Where one episode's frames of one camera are."""

    path: Path
    start: float  # seconds


class LeRobotImporter:
    """Base of both layouts: a subclass finds rows, tables and videos; this class makes episodes of them."""

    format = "lerobot"

    def __init__(self, root: Path, options: Options):
        self.root, self.options, self.info = root, options, read_info(root)
        self.fps = float(self.info["fps"])
        self.side = {r["episode_index"]: r["meta"] for r in self._side_rows()}
        self.features: dict[str, FeatureSpec] = {}
        self.cameras: list[Camera] = []
        self.left_out: dict[str, str] = {}
        self._sort_features()
        self.rows = self.read_rows()
        self.missing: dict[int, str] = {}
        for row in self.rows:
            reason = self.why_missing(row)
            if reason:
                self.missing[row.index] = reason
        present = [r.index for r in self.rows if r.index not in self.missing]
        if not present:
            reasons = shorten(sorted(set(self.missing.values())), 3)
            raise FormatError(f"{root}: none of the {len(self.rows)} episodes in the metadata is here: {reasons}")
        self.wanted = set(options.select(present, root))

    # what a layout provides
    def read_rows(self) -> list[EpisodeRow]:
        raise NotImplementedError

    def why_missing(self, row: EpisodeRow) -> str:
        """Empty when all files of an episode are here."""
        raise NotImplementedError

    def table(self, row: EpisodeRow) -> Any:
        """The pyarrow table of one episode."""
        raise NotImplementedError

    def video(self, row: EpisodeRow, camera: str) -> VideoPart:
        raise NotImplementedError

    def tasks(self) -> dict[int, str]:
        raise NotImplementedError

    def action_range(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Recorded lowest and highest action from the statistics, when the dataset has them."""
        raise NotImplementedError

    def _side_rows(self) -> list[dict[str, Any]]:
        path = self.root / SIDE_FOLDER / "episodes.jsonl"
        return read_jsonl(path) if path.is_file() else []

    def _sort_features(self) -> None:
        features, options = self.info["features"], self.options
        if options.action_key not in features:
            raise FormatError(
                f"{self.root}: no action feature {options.action_key!r}; set action_key to one of {', '.join(features)}"
            )
        used = {options.action_key, *BOOKKEEPING, *STEP_FEATURES.values(), *OLD_SIGNALS}
        for key, feature in features.items():
            kind, shape = feature["dtype"], tuple(feature["shape"] or (1,))
            if kind in ("video", "image"):
                self._add_camera(key, kind, shape, feature)
            elif kind == "string" or not key.startswith("observation."):
                if key not in used:
                    self.left_out[key] = f"{kind} {list(shape)}: no place in an episode"
            else:
                self.features[key] = FeatureSpec(shape, "float32", flat_names(feature.get("names")))
        if options.cameras is not None:
            known = [k.removeprefix(OBSERVATION_IMAGES) for k, f in features.items() if f["dtype"] in ("video", "image")]
            absent = [c for c in options.cameras if c not in known]
            if absent:
                raise ValueError(f"cameras={list(options.cameras)}: {self.root} has no {absent}; it has {known}")
        for camera in self.cameras:
            self.features[camera.key] = FeatureSpec(camera.shape, "uint8", ("height", "width", "channel"))

    def _add_camera(self, key: str, kind: str, shape: tuple[int, ...], feature: Mapping[str, Any]) -> None:
        options = self.options
        extra = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
        if not options.videos:
            self.left_out[key] = "camera: videos=false"
        elif options.cameras is not None and key.removeprefix(OBSERVATION_IMAGES) not in options.cameras:
            self.left_out[key] = "camera: not among the wanted"
        elif extra.get("video.is_depth_map"):
            self.left_out[key] = "camera: a depth map, not RGB"
        else:
            names = flat_names(feature.get("names"))
            first = names[0].startswith("channel") if len(names) == 3 else (len(shape) == 3 and shape[2] not in (1, 3, 4))
            height, width = (shape[1], shape[2]) if first else (shape[0], shape[1])
            if options.image_size is not None:
                height, width = options.image_size
            self.cameras.append(Camera(key, kind, (height, width, 3)))

    def describe(self) -> ImportSource:
        action = self.info["features"][self.options.action_key]
        recorded = self.action_range()
        if recorded is None:
            recorded = self._range_from_tables()
        spec, origin = action_spec(*recorded, self.options, flat_names(action.get("names"))[: len(recorded[0])])
        tasks = sorted({t for r in self.rows if r.index in self.wanted for t in r.tasks})
        task = self.options.task if self.options.task is not None else (tasks[0] if len(tasks) == 1 else "")
        extra = {
            "codebase_version": self.info["codebase_version"],
            "control_hz": self.fps,
            "robot_type": self.info.get("robot_type") or "",
            "tasks": tasks,
            "episodes_listed": len(self.rows),
            "episodes_missing": {str(k): v for k, v in self.missing.items()},
            "features_left_out": self.left_out,
            "action_limits": origin,
        }
        return ImportSource(self.features, spec, len(self.wanted), task, self.format, extra)

    def _range_from_tables(self) -> tuple[np.ndarray, np.ndarray]:
        rows = [row for row in self.rows if row.index in self.wanted]
        ranges = [(a.min(0), a.max(0)) for a in (self._column(self.table(r), self.options.action_key, r) for r in rows)]
        return np.min([low for low, _ in ranges], axis=0), np.max([high for _, high in ranges], axis=0)

    def episodes(self) -> Iterator[Episode]:
        tasks = self.tasks()
        for row in self.rows:
            if row.index in self.wanted:
                yield self._episode(row, tasks)

    def _column(self, table: Any, key: str, row: EpisodeRow) -> np.ndarray:
        """(L, ...) array of one feature, checked against the shape that the dataset declares."""
        if key not in table.column_names:
            raise FormatError(f"{self.root} episode {row.index}: the table has no column {key!r}; it has {table.column_names}")
        values = column_to_numpy(table.column(key))
        shape = tuple(self.info["features"].get(key, {}).get("shape") or (1,))
        try:
            values = values.reshape(len(values), *shape)
        except (ValueError, TypeError):
            raise FormatError(
                f"{self.root} episode {row.index}: {key} has rows of shape {values.shape[1:]}, info.json says {list(shape)}"
            ) from None
        if values.dtype == object:
            raise FormatError(f"{self.root} episode {row.index}: {key} has rows of different length or missing values")
        return values

    def _optional(self, table: Any, key: str, row: EpisodeRow) -> np.ndarray | None:
        if key not in table.column_names:
            return None
        values = self._column(table, key, row)
        return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values

    def _episode(self, row: EpisodeRow, tasks: Mapping[int, str]) -> Episode:
        options, table, where = self.options, self.table(row), f"{self.root} episode {row.index}"
        length = table.num_rows
        if length != row.length or length == 0:
            raise FormatError(f"{where}: {length} rows, the metadata says {row.length} (accepted is an equal number >= 1)")
        action = self._column(table, options.action_key, row).reshape(length, -1).astype(np.float32)
        observations: dict[str, np.ndarray] = {}
        last = self._last_observation(row)
        for key, spec in self.features.items():
            if spec.dtype == "uint8":
                continue
            values = self._column(table, key, row).astype(np.float32)
            observations[key] = np.concatenate([values, last.get(key, values[-1])[None]])
        for key, values in (*observations.items(), (options.action_key, action)):
            if not np.isfinite(values).all():
                raise FormatError(f"{where}: {key} is not finite at row {np.argwhere(~np.isfinite(values))[0][0]}")
        for camera in self.cameras:
            observations[camera.key] = self._frames(camera, row, table, last.get(camera.key))
        arrays, success = self._steps(table, row, length)
        names = self._tasks_of(table, row, tasks)
        meta = self._meta(row, names, success)
        ends = np.flatnonzero(arrays["terminated"].astype(bool) | arrays["truncated"].astype(bool))
        if len(ends) == 0:  # the recording stops here, so the episode does
            arrays["truncated"] = np.arange(length) == length - 1
        elif ends[0] < length - 1:  # nothing after the end of an episode belongs to it
            keep = int(ends[0]) + 1
            meta.extra["imported"]["steps_after_end_dropped"] = length - keep
            observations = {k: v[: keep + 1] for k, v in observations.items()}
            action, arrays = action[:keep], {k: v[:keep] for k, v in arrays.items()}
        return Episode.from_arrays(meta, observations, action, **arrays)

    def _meta(self, row: EpisodeRow, names: Sequence[str], success: bool | None) -> EpisodeMeta:
        options = self.options
        saved = dict(self.side.get(row.index, {}))
        extra = dict(saved.pop("extra", {}))
        extra["imported"] = provenance(self.format, self.root.name, row.index, extra.get("imported"))
        if len(names) > 1:
            extra["tasks"] = list(names)
        if saved:  # our own export: everything that was known comes back
            saved["stratum"] = Stratum(saved["stratum"])
            meta = EpisodeMeta(**saved, extra=extra)
            if options.task is not None:
                meta.task = options.task
            if options.id_prefix is not None:
                meta.episode_id = episode_id(options.id_prefix, row.index)
            return meta
        return EpisodeMeta(
            episode_id=episode_id(options.id_prefix or self.root.name, row.index),
            task=options.task if options.task is not None else (names[0] if names else ""),
            env_id="",
            stratum=Stratum(options.stratum),
            success=success,
            control_hz=self.fps,
            extra=extra,
        )

    def _tasks_of(self, table: Any, row: EpisodeRow, tasks: Mapping[int, str]) -> list[str]:
        if "task_index" not in table.column_names:
            return list(row.tasks)
        indices = dict.fromkeys(int(i) for i in column_to_numpy(table.column("task_index")).ravel())
        unknown = [i for i in indices if i not in tasks]
        if unknown:
            raise FormatError(f"{self.root} episode {row.index}: task_index {unknown} is not in the task list of {len(tasks)}")
        return [tasks[i] for i in indices]

    def _steps(self, table: Any, row: EpisodeRow, length: int) -> tuple[dict[str, np.ndarray], bool | None]:
        """Everything of an episode except observations and actions."""
        arrays: dict[str, np.ndarray] = {}
        for name, key in STEP_FEATURES.items():
            values = self._optional(table, key, row)
            if values is not None:
                arrays[name] = values.reshape(length, -1) if name in PROPOSALS else values
        if "source" not in arrays:
            arrays["source"] = np.full(length, self.options.source_code, np.uint8)
            takeover = self._optional(table, "complementary_info.is_intervention", row)
            if takeover is not None:
                takeover = takeover.astype(bool)
                arrays["source"] = np.where(takeover, int(Source.HUMAN), int(Source.POLICY)).astype(np.uint8)
                starts = takeover & ~np.concatenate([[False], takeover[:-1]])
                arrays["intervention_id"] = np.where(takeover, np.cumsum(starts) - 1, -1)
        elif not np.isin(arrays["source"], [int(s) for s in Source]).all():
            found = sorted({int(s) for s in arrays["source"]})
            raise FormatError(
                f"{self.root} episode {row.index}: source has codes {found}; accepted are {[int(s) for s in Source]}"
            )
        if "stamp_ns" not in arrays:
            arrays["stamp_ns"] = self._stamps(table, row)
        success = self._outcome(table, row, length, arrays)
        return arrays, success

    def _outcome(self, table: Any, row: EpisodeRow, length: int, arrays: dict[str, np.ndarray]) -> bool | None:
        """Fill reward, terminated and truncated from whatever the dataset has; returns whether it succeeded."""
        signal = self._optional(table, "next.success", row)
        success = None if signal is None else bool(signal.astype(bool).any())
        if "reward" not in arrays and signal is not None:
            arrays["reward"] = np.zeros(length, np.float32)
            if success:
                arrays["reward"][int(signal.astype(bool).argmax())] = 1.0
        if "terminated" in arrays and "truncated" in arrays:
            return success
        if "reward" not in arrays:
            arrays["reward"], arrays["terminated"], arrays["truncated"], success = unknown_outcome(length, self.options)
            return success
        ended = np.zeros(length, bool)
        ended[-1] = True
        reached = bool(signal.astype(bool)[-1]) if signal is not None else False
        arrays["terminated"], arrays["truncated"] = ended & reached, ended & (not reached)
        return success

    def _stamps(self, table: Any, row: EpisodeRow) -> np.ndarray:
        """(L,) ns since the episode's start. Stored times are float32, so a regular clock is rebuilt from the rate."""
        regular = np.arange(table.num_rows) / self.fps
        stored = self._optional(table, "timestamp", row)
        if stored is not None and np.abs(stored - regular).max() > 1e-3:
            regular = stored.astype(np.float64)
        return np.round(regular * 1e9).astype(np.int64)

    def _last_observation(self, row: EpisodeRow) -> dict[str, np.ndarray]:
        path = self.root / SIDE_FOLDER / "final_observations" / f"episode_{row.index:06d}.npz"
        if not path.is_file():
            return {}
        with np.load(path, allow_pickle=False) as saved:
            return {key: saved[key] for key in saved.files}

    def _frames(self, camera: Camera, row: EpisodeRow, table: Any, last: np.ndarray | None) -> np.ndarray:
        """(L + 1, H, W, 3) uint8."""
        length = table.num_rows
        frames = np.empty((length + 1, *camera.shape), np.uint8)
        size = self.options.image_size
        pair = None if size is None else (int(size[0]), int(size[1]))
        if camera.kind == "video":
            part = self.video(row, camera.key)
            stored = self._optional(table, "timestamp", row)
            times = np.arange(length) / self.fps if stored is None else stored.astype(np.float64)
            decode_frames(part.path, part.start + times, size=pair, tolerance=0.5 / self.fps, out=frames)
        else:
            for i, cell in enumerate(table.column(camera.key).to_pylist()):
                image = decode_image(cell, self.root, f"{self.root} episode {row.index} {camera.key} row {i}")
                image = image if pair is None else resize_area(image[None], pair)[0]
                if image.shape != camera.shape:
                    raise FormatError(
                        f"{self.root} episode {row.index}: {camera.key} is {image.shape}, expected {camera.shape}"
                    )
                frames[i] = image
        if last is None:
            frames[-1] = frames[-2]
        else:
            frames[-1] = last if pair is None or last.shape == camera.shape else resize_area(last[None], pair)[0]
        return frames


def sniff(path: Path) -> bool:
    return False  # detect() names the version; this name is for users who do not care which


def open_source(path: Path, options: Options) -> LeRobotImporter:
    """Either version."""
    from robot_rl.replay.importers import lerobot_v3, lerobot_v21

    info = read_info(path)
    return (lerobot_v3 if str(info["codebase_version"]).startswith("v3") else lerobot_v21).open_source(path, options)
