"""One episode as one zarr v3 group, written and read without zarr's per-array machinery.

The files are plain zarr v3 (any zarr reader opens them; tests hold zarr-python to that). Writing them here costs a few
system calls per array and one consolidated ``zarr.json``. A low-dimensional array is one chunk; an array that holds nothing
but its fill value has no chunk at all; frames go in chunks of about 16. Arrays encoded in ways that this module does not
know are read through the ``zarr`` package.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.errors import CorruptEpisodeError
from robot_rl.replay.files import fsync_dir, sync_paths, write_file

FRAMES_PER_CHUNK = 16
_LAYOUTS = {
    # Neighbours along a row differ little in a moving scene, neighbours in time differ little before a still camera.
    "spatial": ([0, 3, 1, 2], 3),
    "temporal": ([3, 1, 2, 0], 1),
}


@cache
def _zstd(level: int) -> Any:
    from numcodecs import Zstd

    return Zstd(level)


@cache
def _blosc(typesize: int) -> Any:
    from numcodecs import Blosc

    return Blosc("zstd", 1, Blosc.SHUFFLE if typesize > 1 else Blosc.BITSHUFFLE)


def _is_image(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] in (1, 3, 4) and min(array.shape[1:3]) >= 8


def _rows_per_chunk(array: np.ndarray) -> int:
    rows = max(len(array), 1)
    if array.ndim < 2 or array[:1].nbytes < 4096:
        return rows
    return min(rows, FRAMES_PER_CHUNK)


def _encode_frames(chunk: np.ndarray, layout: str) -> bytes:
    order, level = _LAYOUTS[layout]
    flat = chunk.transpose(order).reshape(-1)  # a copy in C order of the new axes
    delta = flat.copy()
    np.subtract(flat[1:], flat[:-1], out=delta[1:])
    return _zstd(level).encode(delta)


def _best_layout(array: np.ndarray, rows: int) -> str:
    middle = (len(array) - 1) // 2 // rows * rows
    sample = array[middle : middle + rows]
    return min(_LAYOUTS, key=lambda layout: len(_encode_frames(sample, layout)))


def encode_array(array: np.ndarray, fill: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Metadata (``zarr.json``) and chunk files of one array."""
    array = np.ascontiguousarray(array)
    rows = _rows_per_chunk(array)
    size = array.dtype.itemsize
    pack: dict[str, Any] = {"name": "bytes"} if size == 1 else {"name": "bytes", "configuration": {"endian": "little"}}
    layout = _best_layout(array, rows) if _is_image(array) and rows > 1 else None
    if layout:
        order, level = _LAYOUTS[layout]
        codecs = [
            {"name": "transpose", "configuration": {"order": order}},
            {"name": "numcodecs.delta", "configuration": {"dtype": "|u1"}},
            pack,
            {"name": "zstd", "configuration": {"level": level, "checksum": False}},
        ]
    elif array[:1].nbytes >= 4096:
        shuffle = "shuffle" if size > 1 else "bitshuffle"
        configuration = {"typesize": size, "cname": "zstd", "clevel": 1, "shuffle": shuffle, "blocksize": 0}
        codecs = [pack, {"name": "blosc", "configuration": configuration}]
    else:
        codecs = [pack, {"name": "zstd", "configuration": {"level": 1, "checksum": False}}]
    chunks = {}
    is_fill = np.isnan(array).all() if isinstance(fill, float) and math.isnan(fill) else (array == fill).all()
    if not is_fill:
        tail = ".0" * (array.ndim - 1)
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        for index in range(0, len(array), rows):
            chunk = little[index : index + rows]
            if len(chunk) < rows:  # zarr stores whole chunks; repeating the last row costs least
                chunk = np.concatenate([chunk, np.repeat(chunk[-1:], rows - len(chunk), 0)])
            if layout:
                data = _encode_frames(chunk, layout)
            elif codecs[-1]["name"] == "blosc":
                data = _blosc(size).encode(np.ascontiguousarray(chunk))
            else:
                data = _zstd(1).encode(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8))
            chunks[f"c.{index // rows}{tail}"] = bytes(data)
    metadata = {
        "shape": list(array.shape),
        "data_type": "bool" if array.dtype == bool else array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *(max(n, 1) for n in array.shape[1:])]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if isinstance(fill, float) and math.isnan(fill) else fill,
        "codecs": codecs,
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return metadata, chunks


def array_hash(array: np.ndarray) -> str:
    """Hash of an array's type, shape and bytes."""
    array = np.ascontiguousarray(array)
    digest = hashlib.blake2b(f"{array.dtype.name}{array.shape}".encode(), digest_size=16)
    digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def write_arrays(folder: Path, arrays: Mapping[str, tuple[np.ndarray, Any]], *, sync: bool) -> dict[str, dict[str, Any]]:
    """Write ``{name: (array, fill value)}`` below an existing folder; gives the metadata to consolidate."""
    consolidated = {}
    written: list[Path] = []
    for name, (array, fill) in arrays.items():
        metadata, chunks = encode_array(array, fill)
        target = folder / name
        target.mkdir()
        for key, data in chunks.items():
            write_file(target / key, data, sync=False)
        write_file(target / "zarr.json", json.dumps(metadata).encode(), sync=False)
        written += [*(target / key for key in chunks), target / "zarr.json", target]
        consolidated[name] = metadata
    if sync:
        sync_paths(written)
    return consolidated


def write_group(folder: Path, attributes: Mapping[str, Any], consolidated: Mapping[str, Any], *, sync: bool) -> None:
    """Write the group's ``zarr.json``: attributes first, so that a reader of attributes need not parse the rest."""
    group = {
        "attributes": dict(attributes),
        "zarr_format": 3,
        "node_type": "group",
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": dict(consolidated)},
    }
    write_file(folder / "zarr.json", json.dumps(group).encode(), sync=sync)
    if sync:
        fsync_dir(folder)


def read_group(folder: Path) -> dict[str, Any]:
    """The group's ``zarr.json``. Raises FileNotFoundError for no such group, CorruptEpisodeError for an unreadable one."""
    try:
        return json.loads((folder / "zarr.json").read_bytes())
    except (ValueError, NotADirectoryError) as error:
        raise CorruptEpisodeError(f"{folder}: zarr.json cannot be read: {error}") from error


def _known(metadata: Mapping[str, Any]) -> str:
    names = [c["name"] for c in metadata["codecs"]]
    key = metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
    whole_rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][1:] == [max(n, 1) for n in metadata["shape"][1:]]
    if key and whole_rows:
        if names in (["bytes", "zstd"], ["bytes", "blosc"]):
            return names[1]
        if names == ["transpose", "numcodecs.delta", "bytes", "zstd"]:
            return "frames"
    return ""


def read_array(folder: Path, name: str, metadata: Mapping[str, Any]) -> np.ndarray:
    """Decode one array of a group. Raises CorruptEpisodeError naming the array and chunk that cannot be decoded."""
    kind = _known(metadata)
    if not kind:
        return _read_with_zarr(folder / name)
    shape = tuple(metadata["shape"])
    dtype = np.dtype(metadata["data_type"])
    rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    fill = metadata["fill_value"]
    out = np.empty(shape, dtype)
    codec = _blosc(dtype.itemsize) if kind == "blosc" else _zstd(1)
    tail = ".0" * (len(shape) - 1)
    for index in range(0, len(out), rows):
        path = folder / name / f"c.{index // rows}{tail}"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            out[index : index + rows] = np.nan if fill == "NaN" else fill
            continue
        try:
            flat = np.frombuffer(codec.decode(data), dtype.newbyteorder("<"))
            if kind == "frames":
                order = metadata["codecs"][0]["configuration"]["order"]
                turned = [(rows, *shape[1:])[axis] for axis in order]
                chunk = np.cumsum(flat, dtype=np.uint8).reshape(turned).transpose(np.argsort(order))
            else:
                chunk = flat.reshape(rows, *shape[1:])
        except (RuntimeError, ValueError) as error:
            raise CorruptEpisodeError(f"{path}: {error}") from error
        out[index : index + rows] = chunk[: len(out) - index]
    return out


def _read_with_zarr(path: Path) -> np.ndarray:
    import zarr

    if int(zarr.__version__.split(".")[0]) < 3:
        raise CorruptEpisodeError(
            f"{path} uses codecs that need zarr 3 (Python 3.11 or later); zarr {zarr.__version__} is installed"
        )
    return np.asarray(zarr.open_array(path, mode="r")[:])


def jpeg_encode(frames: np.ndarray, quality: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W, 3) or (N, H, W, 1) uint8 to the concatenated JPEG files and N + 1 offsets into them."""
    image = _pillow()
    blobs = []
    for frame in frames:
        buffer = io.BytesIO()
        image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).save(buffer, "JPEG", quality=quality)
        blobs.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, blobs)], dtype=np.int64)
    return np.frombuffer(b"".join(blobs), np.uint8), offsets


def jpeg_decode(data: np.ndarray, offsets: np.ndarray, shape: Iterable[int]) -> np.ndarray:
    """The inverse of :func:`jpeg_encode`, up to JPEG's loss."""
    image = _pillow()
    shape = tuple(shape)
    out = np.empty((len(offsets) - 1, *shape), np.uint8)
    raw = data.tobytes()
    for i, (low, high) in enumerate(pairwise(offsets.tolist())):
        out[i] = np.asarray(image.open(io.BytesIO(raw[low:high]))).reshape(shape)
    return out


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image_codec='jpeg' needs Pillow: pip install pillow") from error
    return Image


def remove_tree(path: Path) -> None:
    """Delete a folder of files; a name that is already gone is no error."""
    for folder, folders, names in os.walk(path, topdown=False):
        for name in names:
            Path(folder, name).unlink(missing_ok=True)
        for name in folders:
            os.rmdir(os.path.join(folder, name))
    if path.is_dir():
        os.rmdir(path)
