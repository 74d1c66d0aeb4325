"""Write LeRobot datasets, v3.0 and v2.1, with pyarrow and PyAV: LeRobot's own loader reads the result, nothing is uploaded.

Written here rather than through ``LeRobotDataset``: one code serves both versions (LeRobot itself no longer writes v2.1), it
needs neither torch nor a PNG file per frame on the way, and a robot computer without LeRobot can use it.

Beyond LeRobot's own features every frame has ``next.reward`` (NaN where unknown), ``next.terminated``, ``next.truncated``,
``source`` (codes of :class:`robot_rl.types.Source`), ``intervention`` (id, -1 for none), ``weights_version``, ``safety`` (bit
mask), ``stamp_ns``, and ``proposal.base``, ``proposal.policy``, ``proposal.human``: what each wanted, NaN where it did not
speak. ``meta/robot_rl/`` holds what a table of frames cannot: the observation after the last action, and the metadata of each
episode. The importer puts all of it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.exporters.base import Names
from robot_rl.replay.exporters.stats import Stats, image_stats, pool, vector_stats
from robot_rl.replay.exporters.video import CODECS, VideoWriter, encode_png, video_info
from robot_rl.replay.importers.base import check_choice, check_type
from robot_rl.replay.importers.lerobot import PROPOSALS, SIDE_FOLDER
from robot_rl.types import Episode

CHUNK = 1000  # files to a folder
DATA_MB, VIDEO_MB = 100, 200  # LeRobot's sizes at which a new file begins
PROVENANCE = {"source": "source", "intervention_id": "intervention", "weights_version": "weights_version", "safety": "safety",
              "stamp_ns": "stamp_ns"}  # fmt: skip
OUTCOME = {
    "reward": ("next.reward", "float32"),
    "terminated": ("next.terminated", "bool"),
    "truncated": ("next.truncated", "bool"),
}
BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


@dataclass(frozen=True)
class Options:
    """Options of both LeRobot versions.

    Attributes:
        fps: frames per second; ``None`` takes ``control_hz`` of the first episode.
        robot_type: free text of ``info.json``.
        images: ``video`` (small, lossy) or ``png`` (inside the parquet files, exact).
        video_codec: ``libsvtav1`` (LeRobot's choice), ``h264`` or ``hevc``.
        crf: quality of the videos, lower is better (LeRobot's choice is 30).
        provenance: write ``source``, ``intervention``, ``weights_version``, ``safety``, ``stamp_ns``.
        proposals: write ``proposal.base``, ``proposal.policy`` and ``proposal.human``.
        data_file_mb, video_file_mb: sizes at which v3 begins a new file.
    """

    fps: float | None = None
    robot_type: str = ""
    images: str = "video"
    video_codec: str = "libsvtav1"
    crf: int = 30
    provenance: bool = True
    proposals: bool = True
    data_file_mb: float = DATA_MB
    video_file_mb: float = VIDEO_MB

    def __post_init__(self) -> None:
        check_choice("images", self.images, ("video", "png"))
        check_choice("video_codec", self.video_codec, CODECS)
        check_type("provenance", self.provenance, bool, "true or false")
        check_type("proposals", self.proposals, bool, "true or false")
        check_type("robot_type", self.robot_type, str, "a string")
        if self.fps is not None and not (isinstance(self.fps, (int, float)) and 0 < self.fps < 1e4):
            raise ValueError(f"fps={self.fps!r}: accepted is a number > 0")
        if not isinstance(self.crf, int) or not 0 <= self.crf <= 51:
            raise ValueError(f"crf={self.crf!r}: accepted are integers 0 to 51")
        for name in ("data_file_mb", "video_file_mb"):
            if not isinstance(getattr(self, name), (int, float)) or not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted is a number > 0")


class _Rolling:
    """Chunk and file number of a kind of file: LeRobot counts 1000 files to a folder."""

    def __init__(self) -> None:
        self.chunk, self.file = 0, 0

    def advance(self) -> None:
        self.file += 1
        if self.file == CHUNK:
            self.chunk, self.file = self.chunk + 1, 0


class LeRobotWriter:
    """Writes one dataset. ``add`` each episode, then ``finish``."""

    def __init__(self, root: Path, version: str, options: Options, names: Names):
        self.root, self.v3, self.options, self.names = root, version == "lerobot_v3", options, names
        self.features: dict[str, dict[str, Any]] = {}
        self.vectors: list[str] = []
        self.cameras: list[str] = []
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.stats: list[dict[str, Stats]] = []
        self.frames = 0
        self.fps = 0.0
        self.table_writer: Any = None
        self.table_place, self.video_places = _Rolling(), dict[str, _Rolling]()
        self.videos: dict[str, VideoWriter] = {}
        self.notes: list[str] = []

    def _start(self, episode: Episode) -> None:
        options = self.options
        self.fps = float(options.fps or episode.meta.control_hz)
        if not self.fps > 0:
            raise ValueError(
                f"fps: episode {episode.meta.episode_id} has no control_hz; set fps to the recording's frames per second"
            )
        for key, rows in episode.observations.items():
            if rows.dtype == np.uint8 and rows.ndim == 4 and rows.shape[3] == 3:
                height, width = rows.shape[1:3]
                if options.images == "video" and (height % 2 or width % 2):
                    raise ValueError(f"{key}: {height}x{width} frames; video needs even sides: set images=png")
                kind = "video" if options.images == "video" else "image"
                self.features[key] = {"dtype": kind, "shape": [height, width, 3], "names": ["height", "width", "channels"]}
                self.cameras.append(key)
            elif rows.ndim == 2 and key.startswith("observation."):
                spec = self.names.observation_features.get(key)
                self._vector(key, rows.shape[1], spec.names if spec else ())
                self.vectors.append(key)
            else:
                raise ValueError(
                    f"{key}: rows of shape {rows.shape[1:]} {rows.dtype}; LeRobot holds vectors called observation.* and "
                    "(H, W, 3) uint8 images"
                )
        action = self.names.action
        dim = episode.action.shape[1]
        self._vector("action", dim, action.names if action else ())
        for key, dtype in OUTCOME.values():
            self.features[key] = {"dtype": dtype, "shape": [1], "names": None}
        if options.provenance:
            for key in PROVENANCE.values():
                self.features[key] = {"dtype": "int64", "shape": [1], "names": None}
        if options.proposals:
            for key in PROPOSALS.values():
                self._vector(key, dim, action.names if action else ())
        for key, dtype in BOOKKEEPING.items():
            self.features[key] = {"dtype": dtype, "shape": [1], "names": None}
        self.video_places = {key: _Rolling() for key in self.cameras}

    def _vector(self, key: str, dim: int, names: Iterable[str]) -> None:
        listed = list(names)
        self.features[key] = {"dtype": "float32", "shape": [dim], "names": listed if len(listed) == dim else None}

    def add(self, episode: Episode) -> None:
        if not self.features:
            self._start(episode)
        index, length = len(self.rows), len(episode)
        self._check(episode)
        task_index = self.tasks.setdefault(episode.meta.task, len(self.tasks))
        columns: dict[str, np.ndarray] = {key: episode.observations[key][:length] for key in self.vectors}
        columns["action"] = episode.action
        columns |= {key: getattr(episode, name) for name, (key, _) in OUTCOME.items()}
        if self.options.provenance:
            columns |= {key: getattr(episode, name) for name, key in PROVENANCE.items()}
        if self.options.proposals:
            columns |= {key: getattr(episode, name) for name, key in PROPOSALS.items()}
        steps = np.arange(length)
        columns |= {"timestamp": steps / self.fps, "frame_index": steps, "index": self.frames + steps}
        columns |= {"episode_index": np.full(length, index), "task_index": np.full(length, task_index)}
        row: dict[str, Any] = {"episode_index": index, "tasks": [episode.meta.task], "length": length}
        stats = {key: vector_stats(values) for key, values in columns.items()}
        for camera in self.cameras:
            frames = episode.observations[camera][:length]
            stats[camera] = image_stats(frames)
            if self.options.images == "video":
                row |= self._write_video(camera, frames, index)
        row |= self._write_table(columns, episode, index)
        row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
        self._write_side(episode, index)
        self.frames += length
        self.rows.append(row)
        self.stats.append(stats)

    def _check(self, episode: Episode) -> None:
        who = f"episode {episode.meta.episode_id}"
        if set(episode.observations) != {*self.vectors, *self.cameras}:
            first = sorted([*self.vectors, *self.cameras])
            raise ValueError(f"{who}: observations are {sorted(episode.observations)}, the first episode's are {first}")
        for key in (*self.vectors, *self.cameras, "action"):
            shape = (episode.action if key == "action" else episode.observations[key]).shape[1:]
            if list(shape) != self.features[key]["shape"]:
                raise ValueError(f"{who}: {key} has shape {shape}, the first episode {tuple(self.features[key]['shape'])}")
        if not self.options.fps and episode.meta.control_hz != self.fps:
            raise ValueError(
                f"{who}: control_hz={episode.meta.control_hz}, the first episode {self.fps}; a dataset has one rate: set fps"
            )

    def _write_table(self, columns: dict[str, np.ndarray], episode: Episode, index: int) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _schema(self.features)
        arrays = []
        for field in schema:
            if field.name in self.cameras:
                cells = [{"bytes": encode_png(f), "path": None} for f in episode.observations[field.name][: len(episode)]]
                arrays.append(pa.array(cells, field.type))
                continue
            values = columns[field.name].astype(self.features[field.name]["dtype"])
            if pa.types.is_fixed_size_list(field.type):
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), field.type.list_size))
            else:
                arrays.append(pa.array(values.reshape(len(values))))
        table = pa.Table.from_arrays(arrays, schema=schema)
        if not self.v3:
            path = self.root / "data" / f"chunk-{index // CHUNK:03d}" / f"episode_{index:06d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
            return {}
        place = self.table_place
        path = self.root / "data" / f"chunk-{place.chunk:03d}" / f"file-{place.file:03d}.parquet"
        if self.table_writer is not None and path.stat().st_size >= self.options.data_file_mb * 2**20:
            self.table_writer.close()
            self.table_writer = None
            place.advance()
            path = self.root / "data" / f"chunk-{place.chunk:03d}" / f"file-{place.file:03d}.parquet"
        if self.table_writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.table_writer = pq.ParquetWriter(path, schema)
        self.table_writer.write_table(table)
        return {"data/chunk_index": place.chunk, "data/file_index": place.file}

    def _video_path(self, camera: str, index: int) -> Path:
        if self.v3:
            place = self.video_places[camera]
            return self.root / "videos" / camera / f"chunk-{place.chunk:03d}" / f"file-{place.file:03d}.mp4"
        return self.root / "videos" / f"chunk-{index // CHUNK:03d}" / camera / f"episode_{index:06d}.mp4"

    def _write_video(self, camera: str, frames: np.ndarray, index: int) -> dict[str, Any]:
        writer = self.videos.get(camera)
        if writer is not None and (not self.v3 or writer.bytes >= self.options.video_file_mb * 2**20):
            writer.close()
            writer = None
            self.video_places[camera].advance()
        if writer is None:
            size = (int(frames.shape[1]), int(frames.shape[2]))
            path = self._video_path(camera, index)
            writer = VideoWriter(path, self.fps, size, self.options.video_codec, self.options.crf)
            self.videos[camera] = writer
        start = writer.frames
        writer.append(frames)
        place = self.video_places[camera]
        return {
            f"videos/{camera}/chunk_index": place.chunk,
            f"videos/{camera}/file_index": place.file,
            f"videos/{camera}/from_timestamp": start / self.fps,
            f"videos/{camera}/to_timestamp": writer.frames / self.fps,
        }

    def _write_side(self, episode: Episode, index: int) -> None:
        folder = self.root / SIDE_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        meta = asdict(episode.meta)
        meta["stratum"] = episode.meta.stratum.value
        with (folder / "episodes.jsonl").open("a") as file:
            file.write(json.dumps({"episode_index": index, "meta": meta}) + "\n")
        # a repeated last row is what an importer assumes anyway
        last = {k: v[-1] for k, v in episode.observations.items() if not np.array_equal(v[-1], v[-2])}
        if last:
            (folder / "final_observations").mkdir(exist_ok=True)
            np.savez_compressed(folder / "final_observations" / f"episode_{index:06d}.npz", **last)

    def finish(self) -> list[str]:
        if self.table_writer is not None:
            self.table_writer.close()
            self.table_writer = None
        while self.videos:
            self.videos.popitem()[1].close()
        self._write_metadata()
        return self.notes

    def abort(self) -> None:
        if self.table_writer is not None:
            self.table_writer.close()
        for writer in self.videos.values():
            writer.abort()

    def _write_metadata(self) -> None:
        meta = self.root / "meta"
        for camera in self.cameras:
            if self.options.images == "video":
                first = next((self.root / "videos").rglob(f"{camera}/**/*000.mp4"))
                self.features[camera]["info"] = video_info(first, self.fps)
        pooled = {key: pool([s[key] for s in self.stats]) for key in self.stats[0]}
        write_json(meta / "info.json", self._info())
        (self.root / "README.md").write_text(self._card(), encoding="utf-8")
        if self.v3:
            write_json(meta / "stats.json", {k: _listed(s) for k, s in pooled.items()})
            self._write_v3_tables(meta)
        else:
            write_lines(meta / "tasks.jsonl", [{"task_index": i, "task": t} for t, i in self.tasks.items()])
            keys = ("episode_index", "tasks", "length")
            write_lines(meta / "episodes.jsonl", [{k: r[k] for k in keys} for r in self.rows])
            v21 = [
                {k: {n: v for n, v in _listed(s).items() if not n.startswith("q")} for k, s in e.items()} for e in self.stats
            ]
            write_lines(meta / "episodes_stats.jsonl", [{"episode_index": i, "stats": s} for i, s in enumerate(v21)])

    def _write_v3_tables(self, meta: Path) -> None:
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq

        # LeRobot looks tasks up by the pandas index, so the sentence has to be the index
        pd.DataFrame({"task_index": list(self.tasks.values())}, index=list(self.tasks)).to_parquet(meta / "tasks.parquet")
        folder = meta / "episodes" / "chunk-000"
        folder.mkdir(parents=True)
        rows = [
            {
                **row,
                **{f"stats/{key}/{name}": value for key, s in stats.items() for name, value in _listed(s).items()},
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
            for row, stats in zip(self.rows, self.stats, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "file-000.parquet")

    def _card(self) -> str:
        """What a hub shows of the folder; its front matter is what makes the tables browsable there."""
        rate = f"{self.fps:g} frames a second"
        tasks = "\n".join(f"- {task}" for task in self.tasks if task)
        return (
            "---\nlibrary_name: lerobot\ntags: [LeRobot, robotics]\ntask_categories: [robotics]\n"
            "configs:\n- config_name: default\n  data_files: data/*/*.parquet\n---\n\n"
            f"{len(self.rows)} episodes, {self.frames} frames, {rate}, LeRobot dataset {'v3.0' if self.v3 else 'v2.1'}; "
            f"written by robot_rl from an episode store, with what it knows of them in `{SIDE_FOLDER}`.\n"
            + (f"\nTasks:\n\n{tasks}\n" if tasks else "")
        )

    def _info(self) -> dict[str, Any]:
        count, videos = len(self.rows), bool(self.cameras) and self.options.images == "video"
        info: dict[str, Any] = {
            "codebase_version": "v3.0" if self.v3 else "v2.1",
            "robot_type": self.options.robot_type or None,
            "total_episodes": count,
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK,
            "fps": int(self.fps) if self.fps.is_integer() else self.fps,
            "splits": {"train": f"0:{count}"},
        }
        if self.v3:
            info |= {
                "data_files_size_in_mb": self.options.data_file_mb,
                "video_files_size_in_mb": self.options.video_file_mb,
                "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4" if videos else None,
            }
        else:
            info |= {
                "total_videos": count * len(self.cameras) if videos else 0,
                "total_chunks": -(-count // CHUNK),
                "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
                if videos
                else None,
            }
        return info | {"features": self.features}


def _schema(features: dict[str, dict[str, Any]]) -> Any:
    """Arrow schema of the frame table with the note that Hugging Face's ``datasets`` looks for."""
    import pyarrow as pa

    fields: list[Any] = []
    described: dict[str, Any] = {}
    for key, feature in features.items():
        kind, shape = feature["dtype"], feature["shape"]
        if kind == "video":
            continue
        if kind == "image":
            fields.append(pa.field(key, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            described[key] = {"_type": "Image"}
            continue
        value: dict[str, Any] = {"dtype": kind, "_type": "Value"}
        scalar = pa.bool_() if kind == "bool" else pa.from_numpy_dtype(np.dtype(kind))
        fields.append(pa.field(key, scalar if shape == [1] else pa.list_(scalar, shape[0])))
        described[key] = value if shape == [1] else {"feature": value, "length": shape[0], "_type": "Sequence"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})


def _listed(stats: Stats) -> dict[str, Any]:
    return {name: value.tolist() for name, value in stats.items()}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write(episodes: Iterable[Episode], root: Path, format: str, options: Options, names: Names) -> list[str]:
    writer = LeRobotWriter(root, format, options, names)
    try:
        for episode in episodes:
            writer.add(episode)
        return writer.finish() if writer.rows else []
    except BaseException:
        writer.abort()
        raise
