"""The layout of LeRobot datasets v2.0 and v2.1: one parquet file and one video per camera for each episode, jsonl metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.importers.base import FormatError
from robot_rl.replay.importers.lerobot import EpisodeRow, LeRobotImporter, Options, VideoPart
from robot_rl.replay.importers.lerobot_files import read_info, read_jsonl, read_table, version_of


class LeRobotV21Importer(LeRobotImporter):
    """Datasets may be partial: the metadata lists all episodes, and only those whose files are here are imported."""

    format = "lerobot_v21"

    def read_rows(self) -> list[EpisodeRow]:
        path = self.root / "meta" / "episodes.jsonl"
        if not path.is_file():
            raise FormatError(f"{self.root} has no meta/episodes.jsonl")
        rows = []
        for number, row in enumerate(read_jsonl(path), 1):
            try:
                tasks = row.get("tasks") or []
                rows.append(EpisodeRow(int(row["episode_index"]), int(row["length"]), tuple(tasks), {}))
            except (KeyError, TypeError, ValueError):
                raise FormatError(f"{path} line {number}: expected episode_index, tasks and length, found {row}") from None
        return sorted(rows, key=lambda r: r.index)

    def tasks(self) -> dict[int, str]:
        path = self.root / "meta" / "tasks.jsonl"
        return {int(r["task_index"]): str(r["task"]) for r in read_jsonl(path)} if path.is_file() else {}

    def _file(self, template: str, row: EpisodeRow, **names: str) -> Path:
        chunk = row.index // int(self.info.get("chunks_size") or 1000)
        try:
            return self.root / template.format(episode_chunk=chunk, episode_index=row.index, **names)
        except (KeyError, IndexError, ValueError) as error:
            raise FormatError(
                f"{self.root}/meta/info.json: path template {template!r} needs an unknown field {error}"
            ) from None

    def video(self, row: EpisodeRow, camera: str) -> VideoPart:
        return VideoPart(self._file(self.info.get("video_path") or "", row, video_key=camera), 0.0)

    def why_missing(self, row: EpisodeRow) -> str:
        if not self._file(self.info["data_path"], row).is_file():
            return "no data file"
        gone = [c.key for c in self.cameras if c.kind == "video" and not self.video(row, c.key).path.is_file()]
        return f"no video of {', '.join(gone)}" if gone else ""

    def table(self, row: EpisodeRow) -> Any:
        return read_table(self._file(self.info["data_path"], row))

    def action_range(self) -> tuple[np.ndarray, np.ndarray] | None:
        path, key = self.root / "meta" / "episodes_stats.jsonl", self.options.action_key
        if not path.is_file():
            return None
        wanted = [r["stats"][key] for r in read_jsonl(path) if key in r.get("stats", {})]
        if len(wanted) < len(self.rows):
            return None
        return (np.min([s["min"] for s in wanted], axis=0), np.max([s["max"] for s in wanted], axis=0))


__all__ = ["Options", "open_source", "sniff"]


def sniff(path: Path) -> bool:
    return version_of(path).startswith("v2")


def open_source(path: Path, options: Options) -> LeRobotV21Importer:
    version = str(read_info(path)["codebase_version"])
    if not version.startswith("v2"):
        raise FormatError(
            f"{path} has codebase_version {version!r}; lerobot_v21 accepts v2.0 and v2.1, lerobot_v3 accepts v3.x"
        )
    return LeRobotV21Importer(path, options)
