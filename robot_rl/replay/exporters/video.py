"""Frames into videos and PNG bytes with PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.replay.importers.video import import_av

CODECS = ("libsvtav1", "h264", "hevc")


TASKS = Path("/proc/self/task")


@contextmanager
def scheduling_kept() -> Iterator[None]:
    """Give this thread, and threads that begin in here, the scheduling that this thread had before.

    SVT-AV1 gives itself and its caller the highest real-time priority there is when it runs as root, as in a container: an
    export would then take the processor from the robot's controllers, and from everything after it in this process.
    """
    if not TASKS.is_dir():
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    before = {task.name for task in TASKS.iterdir()}
    try:
        yield
    finally:
        for task in [0, *(int(t.name) for t in TASKS.iterdir() if t.name not in before)]:
            with suppress(ProcessLookupError):
                os.sched_setscheduler(task, policy, parameters)


class VideoWriter:
    """One mp4 file that frames are appended to; ``bytes`` counts what has been encoded.

    A key frame at every second frame keeps random access cheap.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int], codec: str, crf: int):
        av = import_av()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.frames, self.bytes = path, 0, 0
        options = {"g": "2", "crf": str(crf)}
        if codec == "libsvtav1":
            options["preset"] = "12"
        name = {"h264": "libx264", "hevc": "libx265"}.get(codec, codec)
        try:
            self.container = av.open(str(path), "w")
            self.stream: Any = self.container.add_stream(name, Fraction(fps).limit_denominator(1001), options=options)
        except (av.FFmpegError, ValueError) as error:
            raise ValueError(
                f"video_codec={codec!r}: this PyAV cannot encode it ({error}); accepted are {', '.join(CODECS)}"
            ) from None
        self.stream.height, self.stream.width = size
        self.stream.pix_fmt = "yuv420p"

    def append(self, frames: np.ndarray) -> None:
        """Encode (N, H, W, 3) uint8."""
        av = import_av()
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self.frames  # counted in frames: the stream's time base is one frame until the muxer rescales it
            frame.time_base = Fraction(1, 1) / self.stream.codec_context.framerate
            if self.frames == 0:  # here the encoder starts
                with scheduling_kept():
                    packets = self.stream.encode(frame)
            else:
                packets = self.stream.encode(frame)
            self._mux(packets)
            self.frames += 1

    def _mux(self, packets: list[Any]) -> None:
        self.bytes += sum(packet.size for packet in packets)
        self.container.mux(packets)

    def close(self) -> None:
        self._mux(self.stream.encode(None))
        self.container.close()

    def abort(self) -> None:
        """Let go of the file without caring for what is in it."""
        self.container.close()


def video_info(path: Path, fps: float) -> dict[str, Any]:
    """What LeRobot's ``info.json`` says about a camera's videos."""
    av = import_av()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return {
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": stream.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt,
            "video.is_depth_map": False,
            "video.fps": int(fps) if float(fps).is_integer() else fps,
            "video.channels": 3,
            "has_audio": False,
        }


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of one (H, W, 3) uint8 image."""
    av = import_av()
    context = av.CodecContext.create("png", "w")
    context.height, context.width = image.shape[:2]
    context.pix_fmt, context.time_base = "rgb24", Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame.pts = 0
    packets = [*context.encode(frame), *context.encode(None)]
    return bytes(packets[0])
