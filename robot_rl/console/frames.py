"""Camera pictures on their way to pages: the newest one only, encoded once, for those who have room for it.

Nothing here queues. A camera has one slot; a page that is slow sees fewer pictures, never older ones.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

HEAD = struct.Struct("<4sHHQQQ")
MAGIC = b"RRF1"


@dataclass(frozen=True)
class Frame:
    """One encoded picture.

    Attributes:
        number: counts the camera's pictures; a gap means that some were skipped.
        stamp_ns: wall clock at acquisition (or at arrival, where the camera's clock is not this machine's).
        encoded_ns: wall clock when it was ready to be sent.
    """

    camera: str
    number: int
    stamp_ns: int
    encoded_ns: int
    jpeg: bytes

    def packed(self) -> bytes:
        """As it goes over the socket: a head (magic, length of the name, 0, number, stamp, encoded), the name, the JPEG."""
        name = self.camera.encode()
        return HEAD.pack(MAGIC, len(name), 0, self.number, self.stamp_ns, self.encoded_ns) + name + self.jpeg


def unpack(data: bytes) -> Frame:
    """The opposite of :meth:`Frame.packed`. Raises ValueError for other bytes."""
    if len(data) < HEAD.size or data[:4] != MAGIC:
        raise ValueError("no frame")
    _, length, _, number, stamp, encoded = HEAD.unpack_from(data)
    name = data[HEAD.size : HEAD.size + length].decode()
    return Frame(name, number, stamp, encoded, data[HEAD.size + length :])


def to_jpeg(pixels: np.ndarray, quality: int = 75, width: int = 640) -> bytes:
    """(H, W, 3) uint8 RGB as a JPEG of at most ``width``."""
    import cv2

    height, across = pixels.shape[:2]
    if across > width:
        pixels = cv2.resize(pixels, (width, max(1, round(height * width / across))), interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"a picture of shape {pixels.shape} and type {pixels.dtype} cannot be encoded")
    return bytes(data.tobytes())


class Cameras:
    """Takes pictures from any thread, encodes them in one of its own, and tells listeners.

    Args:
        hz: pictures a second and camera at most.
        quality, width: of the JPEG; pictures that come as JPEG pass as they are.
    """

    def __init__(self, *, hz: float = 20.0, quality: int = 75, width: int = 640) -> None:
        self.period_ns = int(1e9 / hz)
        self._quality, self._width = quality, width
        self._guard = threading.Condition()
        self._offered: dict[str, tuple[np.ndarray | bytes, int]] = {}
        self._due_ns: dict[str, int] = {}
        self._newest: dict[str, Frame] = {}
        self._listeners: list[Callable[[], object]] = []
        self._stop = False
        self.skipped = 0
        self.failed = ""
        self._thread = threading.Thread(target=self._run, name="frames", daemon=True)
        self._thread.start()

    def due(self, camera: str) -> bool:
        """Whether a picture offered now would be taken: those that would not need no decoding."""
        return time.monotonic_ns() >= self._due_ns.get(camera, 0) - self.period_ns // 2

    def offer(self, camera: str, picture: np.ndarray | bytes, stamp_ns: int) -> None:
        """The newest picture of a camera: (H, W, 3) uint8 RGB, or a JPEG. An older one that waits is dropped. Never waits.

        The caller must not change the array afterwards.
        """
        with self._guard:
            if not self.due(camera):
                self.skipped += 1
                return
            # On a schedule, not since the last one: cameras jitter, and every early picture would be lost otherwise.
            self._due_ns[camera] = max(self._due_ns.get(camera, 0) + self.period_ns, time.monotonic_ns())
            self.skipped += camera in self._offered
            self._offered[camera] = (picture, stamp_ns)
            self._guard.notify()

    def newest(self) -> Mapping[str, Frame]:
        return self._newest  # replaced, never changed

    def listen(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Call ``listener`` (in the encoding thread) after every picture; what is returned ends that."""
        with self._guard:
            self._listeners = [*self._listeners, listener]

        def end() -> None:
            with self._guard:
                self._listeners = [x for x in self._listeners if x is not listener]

        return end

    def close(self) -> None:
        with self._guard:
            self._stop = True
            self._guard.notify()
        self._thread.join(2.0)

    def _run(self) -> None:
        while True:
            with self._guard:
                while not self._offered and not self._stop:
                    self._guard.wait()
                if self._stop:
                    return
                camera = next(iter(self._offered))
                picture, stamp = self._offered.pop(camera)
            try:
                jpeg = picture if isinstance(picture, bytes) else to_jpeg(picture, self._quality, self._width)
            except Exception as error:  # a picture that cannot be encoded must not end the others
                self.failed = f"{camera}: {error}"
                continue
            before = self._newest.get(camera)
            frame = Frame(camera, before.number + 1 if before else 1, stamp, time.time_ns(), jpeg)
            self._newest = {**self._newest, camera: frame}
            for listener in self._listeners:
                with suppress(RuntimeError):  # its event loop has ended meanwhile
                    listener()
