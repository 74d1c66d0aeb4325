"""Reading the files of a LeRobot dataset: JSON, parquet columns, encoded images."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.importers.base import FormatError
from robot_rl.replay.importers.video import import_av


def read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise FormatError(f"{root} has no meta/info.json: not a LeRobot dataset") from None
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    for name in ("codebase_version", "features", "fps", "data_path"):
        if not isinstance(info, dict) or not info.get(name):
            raise FormatError(f"{path} has no {name!r}")
    return info


def version_of(path: Path) -> str:
    """``v2.1`` of a LeRobot dataset, empty for anything else."""
    try:
        version = json.loads((path / "meta" / "info.json").read_text())["codebase_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return version if isinstance(version, str) else ""


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise FormatError(f"{path} line {number} is not JSON: {error}") from None
    return rows


def flat_names(names: Any) -> tuple[str, ...]:
    """LeRobot's ``names`` came as a list, a list of a list, and ``{"motors": [...]}``: one tuple of strings for all."""
    if names is None:
        return ()
    if isinstance(names, Mapping):
        names = list(names.values()) if any(isinstance(v, (list, tuple)) for v in names.values()) else list(names)
    flat: list[str] = []
    for name in names:
        flat.extend(flat_names(name) if isinstance(name, (list, tuple, Mapping)) else [str(name)])
    return tuple(flat)


def column_to_numpy(column: Any) -> np.ndarray:
    """(L, ...) array of a pyarrow column of scalars or of lists of equal length, without a Python object per number."""
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    length, shape = len(array), [len(array)]
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type) or pa.types.is_large_list(array.type):
        if array.null_count:
            return np.array(column.to_pylist(), dtype=object)
        outer, array = len(array), array.flatten()
        if outer and len(array) % outer:
            return np.array(column.to_pylist(), dtype=object)
        shape.append(len(array) // max(outer, 1))
    if array.null_count and pa.types.is_floating(array.type):
        array = array.fill_null(float("nan"))  # a dataset that went through pandas has null where there was NaN
    if array.null_count:
        return np.array(column.to_pylist(), dtype=object)
    values = array.to_numpy(zero_copy_only=False)
    return values.reshape(shape) if length else values


def decode_image(cell: Mapping[str, Any], root: Path, where: str) -> np.ndarray:
    """(H, W, 3) uint8 of one ``{"bytes", "path"}`` cell. A path leads inside the dataset or nowhere."""
    av = import_av()
    data = cell.get("bytes")
    if data is None:
        path = (root / str(cell.get("path"))).resolve()
        if root.resolve() not in path.parents or not path.is_file():
            raise FormatError(f"{where}: neither bytes nor a file inside the dataset (path {cell.get('path')!r})")
        data = path.read_bytes()
    try:
        with av.open(io.BytesIO(data)) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (av.FFmpegError, StopIteration, IndexError) as error:
        raise FormatError(f"{where}: not an image: {error}") from None


def read_table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # one file is one table: partitioning rules must not read columns out of folder names
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path} is not a readable parquet file: {error}") from None
