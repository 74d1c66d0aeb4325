"""The layout of LeRobot datasets v3: many episodes to a parquet file and to a video, with parquet metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.importers.base import FormatError
from robot_rl.replay.importers.lerobot import EpisodeRow, LeRobotImporter, Options, VideoPart
from robot_rl.replay.importers.lerobot_files import column_to_numpy, read_info, read_table, version_of


class LeRobotV3Importer(LeRobotImporter):
    """Datasets may be partial: episodes whose data file or videos are absent are reported, the others imported."""

    format = "lerobot_v3"

    def __init__(self, root: Path, options: Options):
        self._open_file: tuple[Path, Any, np.ndarray] | None = None
        super().__init__(root, options)

    def read_rows(self) -> list[EpisodeRow]:
        files = sorted((self.root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
        if not files:
            raise FormatError(f"{self.root} has no meta/episodes/chunk-*/file-*.parquet")
        rows = []
        for file in files:
            table = read_table(file)
            needed = {"episode_index", "length", "data/chunk_index", "data/file_index"}
            if needed - set(table.column_names):
                raise FormatError(f"{file} has no column {sorted(needed - set(table.column_names))}")
            # statistics are most of these tables and are not needed here
            slim = table.select([c for c in table.column_names if not c.startswith("stats/")])
            for row in slim.to_pylist():
                tasks = row.get("tasks") or []
                tasks = [tasks] if isinstance(tasks, str) else tasks
                rows.append(EpisodeRow(int(row["episode_index"]), int(row["length"]), tuple(tasks), row))
        return sorted(rows, key=lambda r: r.index)

    def tasks(self) -> dict[int, str]:
        path = self.root / "meta" / "tasks.parquet"
        if not path.is_file():
            return {}
        table = read_table(path)
        # the sentence is the pandas index: its column is named "__index_level_0__" or as the index was
        texts = [c for c in table.column_names if c != "task_index"]
        if "task_index" not in table.column_names or len(texts) != 1:
            raise FormatError(f"{path}: expected task_index and one column of sentences, found {table.column_names}")
        return {int(i): str(t) for i, t in zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True)}

    def _data_file(self, row: EpisodeRow) -> Path:
        place = row.place
        return self.root / self.info["data_path"].format(
            chunk_index=place["data/chunk_index"], file_index=place["data/file_index"]
        )

    def video(self, row: EpisodeRow, camera: str) -> VideoPart:
        try:
            chunk, file, start = (row.place[f"videos/{camera}/{n}"] for n in ("chunk_index", "file_index", "from_timestamp"))
        except KeyError as error:
            raise FormatError(f"{self.root} episode {row.index}: meta/episodes has no column {error}") from None
        template = self.info.get("video_path") or ""
        return VideoPart(self.root / template.format(video_key=camera, chunk_index=chunk, file_index=file), float(start))

    def why_missing(self, row: EpisodeRow) -> str:
        if not self._data_file(row).is_file():
            return "no data file"
        gone = [c.key for c in self.cameras if c.kind == "video" and not self.video(row, c.key).path.is_file()]
        return f"no video of {', '.join(gone)}" if gone else ""

    def table(self, row: EpisodeRow) -> Any:
        path = self._data_file(row)
        if self._open_file is None or self._open_file[0] != path:
            table = read_table(path)
            if "episode_index" not in table.column_names:
                raise FormatError(f"{path} has no column 'episode_index'")
            self._open_file = (path, table, column_to_numpy(table.column("episode_index")).ravel())
        _, table, index = self._open_file
        rows = np.flatnonzero(index == row.index)
        if len(rows) == 0:
            raise FormatError(f"{path} has no row of episode {row.index}, which meta/episodes places there")
        if rows[-1] - rows[0] + 1 != len(rows):
            raise FormatError(f"{path}: the rows of episode {row.index} are not in one piece")
        return table.slice(int(rows[0]), len(rows))

    def action_range(self) -> tuple[np.ndarray, np.ndarray] | None:
        path = self.root / "meta" / "stats.json"
        try:
            stats = json.loads(path.read_text())[self.options.action_key]
            return np.asarray(stats["min"], np.float64), np.asarray(stats["max"], np.float64)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # statistics are optional: the range is then read from the data


__all__ = ["Options", "open_source", "sniff"]


def sniff(path: Path) -> bool:
    return version_of(path).startswith("v3")


def open_source(path: Path, options: Options) -> LeRobotV3Importer:
    version = str(read_info(path)["codebase_version"])
    if not version.startswith("v3"):
        raise FormatError(
            f"{path} has codebase_version {version!r}; lerobot_v3 accepts v3.x, lerobot_v21 accepts v2.0 and v2.1"
        )
    return LeRobotV3Importer(path, options)
