"""Frames out of a video file with PyAV: by time stamp, a range of a longer file, resized on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading and writing videos needs PyAV: pip install av (or import with videos=false)") from error
    return av


def count_frames(path: Path) -> int:
    """Number of frames in a video, from its packets: nothing is decoded."""
    av = import_av()
    with av.open(str(path)) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


def decode_frames(
    path: Path,
    times: np.ndarray,
    *,
    size: tuple[int, int] | None = None,
    tolerance: float,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The frame nearest to each time.

    Args:
        path: video file.
        times: (N,) seconds since the start of the file, rising.
        size: (height, width) to scale to, by area averaging; ``None`` keeps the video's own.
        tolerance: seconds by which a frame may be off before the video counts as damaged.
        out: (>= N, H, W, 3) uint8 to write into, so that a caller needs no second copy.

    Returns:
        (N, H, W, 3) uint8 RGB (a view of ``out`` when given).

    Raises:
        ValueError: no frame lies within ``tolerance`` of a time; names the file and the time.
    """
    av = import_av()
    times = np.asarray(times, np.float64)
    filled = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        height, width = size or (stream.height, stream.width)
        frames = np.empty((len(times), height, width, 3), np.uint8) if out is None else out[: len(times)]
        if frames.shape != (len(times), height, width, 3) or frames.dtype != np.uint8:
            raise ValueError(f"{path}: frames are {(height, width, 3)}, the feature says {frames.shape[1:]}")
        if len(times) == 0:
            return frames
        if times[0] > tolerance:
            # lands on the key frame at or before the wanted time; the frames between are decoded and dropped
            container.seek(max(0, int((times[0] - tolerance) / stream.time_base)), stream=stream, backward=True)
        previous: tuple[float, Any] | None = None
        for frame in container.decode(stream):
            now = float(frame.time)
            # a wanted time that lies nearer to the previous frame than to this one is decided now
            while filled < len(times) and previous is not None and abs(previous[0] - times[filled]) <= abs(now - times[filled]):
                _put(frames, filled, previous, times[filled], tolerance, path, size)
                filled += 1
            if filled == len(times):
                return frames
            previous = (now, frame)
        while filled < len(times) and previous is not None:
            _put(frames, filled, previous, times[filled], tolerance, path, size)
            filled += 1
    if filled < len(times):
        raise ValueError(f"{path}: no frame could be decoded; {len(times)} were expected")
    return frames


def _put(
    frames: np.ndarray, i: int, candidate: tuple[float, Any], time: float, tolerance: float, path: Path, size: Any
) -> None:
    off = abs(candidate[0] - time)
    if off > tolerance:
        raise ValueError(f"{path}: nothing within {tolerance:.4f} s of {time:.4f} s; the nearest frame is {off:.4f} s off")
    frame = candidate[1]
    if size is not None:
        frames[i] = frame.to_ndarray(format="rgb24", height=size[0], width=size[1], interpolation="AREA")
    else:
        frames[i] = frame.to_ndarray(format="rgb24")


def resize_area(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N, H, W, 3) uint8 to (N, height, width, 3) with the same scaler as the videos."""
    av = import_av()
    out = np.empty((len(images), *size, 3), np.uint8)
    for i, image in enumerate(images):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        out[i] = frame.to_ndarray(format="rgb24", height=size[0], width=size[1], interpolation="AREA")
    return out
