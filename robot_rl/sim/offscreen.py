"""Off-screen MuJoCo pictures that may be asked for from any thread, with the expensive effects switched off."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np


class OffscreenCamera:
    """Renders cameras of one model; one GL context a thread and size, because a context belongs to one thread at a time.

    ``fast=True`` renders without shadows and reflections and without multisampling: on a CPU renderer these cost most of
    a frame. ``free_camera`` sets the view used for ``camera=""`` when the model's first camera should not be used.
    """

    def __init__(
        self,
        model: Any,
        *,
        fast: bool = True,
        geom_groups: tuple[int, ...] | None = None,
        free_camera: Callable[[Any], None] | None = None,
        max_geom: int = 10_000,
    ) -> None:
        self._model = model
        self._fast = fast
        self._groups = geom_groups
        self._free_camera = free_camera
        self._max_geom = max_geom
        self._renderers: dict[tuple[int, int, int], Any] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The model's cameras."""
        return tuple(self._model.camera(i).name for i in range(self._model.ncam))

    def render(self, data: Any, camera: str, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB of ``data`` seen by ``camera`` (empty: the default view).

        Raises:
            ValueError: unknown camera (the known ones are named) or a size below one pixel.
        """
        import mujoco

        if camera and camera not in self.names:
            raise ValueError(f"camera={camera!r}: accepted are {', '.join(self.names) or 'none'} or '' for the default view")
        renderer, option, free = self._renderer(width, height)
        renderer.update_scene(data, camera=camera or free, scene_option=option)
        if self._fast:
            flags = renderer.scene.flags
            flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return renderer.render()

    def _renderer(self, width: int, height: int) -> tuple[Any, Any, Any]:
        import mujoco

        if width < 1 or height < 1:
            raise ValueError(f"width={width}, height={height}: accepted are sizes of at least 1 pixel")
        key = (threading.get_ident(), width, height)
        found = self._renderers.get(key)
        if found is None:
            with self._lock:  # the model's visual settings are read while the context is made
                visual = self._model.vis
                before = (visual.quality.offsamples, visual.global_.offwidth, visual.global_.offheight)
                if self._fast:
                    visual.quality.offsamples = 0
                visual.global_.offwidth = max(before[1], width)
                visual.global_.offheight = max(before[2], height)
                try:
                    renderer = mujoco.Renderer(self._model, height, width, max_geom=self._max_geom)
                finally:
                    visual.quality.offsamples, visual.global_.offwidth, visual.global_.offheight = before
            option = mujoco.MjvOption()
            if self._groups is not None:
                option.geomgroup[:] = [int(i in self._groups) for i in range(len(option.geomgroup))]
            free: Any = 0 if self._model.ncam else -1
            if self._free_camera is not None:
                free = mujoco.MjvCamera()
                mujoco.mjv_defaultFreeCamera(self._model, free)
                self._free_camera(free)
            found = self._renderers[key] = (renderer, option, free)
            _close_at_exit(self)
        return found

    def close(self) -> None:
        """Free every context. Pictures may be asked for again afterwards."""
        _close_all(self._renderers)


def _close_all(renderers: dict[tuple[int, int, int], Any]) -> None:
    while renderers:
        _, (renderer, _, _) = renderers.popitem()
        with contextlib.suppress(Exception):  # a context whose thread is gone may already be gone
            renderer.close()


_alive: weakref.WeakSet[OffscreenCamera] = weakref.WeakSet()


def _close_at_exit(camera: OffscreenCamera) -> None:
    # Contexts must go before the GL library is shut down, or their destructors complain. That library registered its own
    # shutdown when the first context was made, and exit handlers run backwards: registering now is early enough.
    if not _alive:
        atexit.register(_close_alive)
    _alive.add(camera)


def _close_alive() -> None:
    for camera in list(_alive):
        camera.close()
