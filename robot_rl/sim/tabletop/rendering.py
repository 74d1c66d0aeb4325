"""Off-screen pictures of MuJoCo scenes, callable from any thread.

A GL context belongs to one thread at a time. Each thread therefore keeps one context of its own, and a renderer for each
(model, size, quality) it was asked for; environments own none, so they can be stepped and drawn from whichever thread.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from typing import Any

import mujoco
import numpy as np

_LOCAL = threading.local()
MAX_SIZE = (1280, 960)


class _Picture:
    """One MuJoCo rendering context of a fixed size."""

    def __init__(self, model: Any, width: int, height: int, fine: bool) -> None:
        self.viewport = mujoco.MjrRect(0, 0, width, height)
        self.scene = mujoco.MjvScene(model, maxgeom=256)
        self.option = mujoco.MjvOption()
        self.camera = mujoco.MjvCamera()
        self.fine = fine
        # Multisampling, shadow map and buffer size are read from the model when the context is made.
        quality, glob = model.vis.quality, model.vis.global_
        saved = (quality.offsamples, quality.shadowsize, glob.offwidth, glob.offheight)
        quality.offsamples, quality.shadowsize = (4, 2048) if fine else (0, 0)
        glob.offwidth, glob.offheight = width, height
        try:
            self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        finally:
            quality.offsamples, quality.shadowsize, glob.offwidth, glob.offheight = saved
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = fine
        self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False

    def draw(self, model: Any, data: Any, camera_id: int) -> np.ndarray:
        self.camera.fixedcamid = camera_id
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(model, data, self.option, None, self.camera, everything, self.scene)
        if self.fine:
            for i in range(self.scene.nlight):
                if not self.scene.lights[i].headlight:
                    self.scene.lights[i].castshadow = 1
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        mujoco.mjr_render(self.viewport, self.scene, self.context)
        frame = np.empty((self.viewport.height, self.viewport.width, 3), np.uint8)
        mujoco.mjr_readPixels(frame, None, self.viewport, self.context)
        return np.ascontiguousarray(frame[::-1])


def _new_context() -> Any:
    """A GL context for this thread: what MUJOCO_GL asks for, else EGL on Linux (no display needed), else MuJoCo's default."""
    try:
        if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
            from mujoco import egl

            return egl.GLContext(*MAX_SIZE)
        return mujoco.GLContext(*MAX_SIZE)
    except Exception as error:
        raise RuntimeError(
            f"cannot draw off screen ({type(error).__name__}: {error}); install libegl1 and libgl1 "
            "(software rendering needs no GPU), or set MUJOCO_GL=osmesa with libosmesa6"
        ) from error


def _forget() -> None:
    """Free the GL objects of the main thread while the libraries are still loaded."""
    _LOCAL.__dict__.pop("pictures", None)
    context = _LOCAL.__dict__.pop("context", None)
    if context is not None:
        context.free()


def draw(model: Any, data: Any, camera_id: int, width: int, height: int, *, fine: bool = False) -> np.ndarray:
    """(height, width, 3) uint8 RGB of ``data`` from a camera of the model.

    ``fine`` adds shadows and 4x multisampling (for videos); without them an 84x84 frame takes 2 to 3 ms
    of processor time in software.

    Raises:
        RuntimeError: no off-screen OpenGL here (the message says what to install).
    """
    context = getattr(_LOCAL, "context", None)
    if context is None:
        context = _LOCAL.context = _new_context()
        if threading.current_thread() is threading.main_thread():
            atexit.register(_forget)  # after the GL library has registered its own, so that this runs first
        _LOCAL.pictures = {}
    context.make_current()
    pictures: dict[int, tuple[Any, dict[Any, _Picture]]] = _LOCAL.pictures
    # Renderers of dead models are freed here, in the thread whose context they belong to, rather than where the model died.
    for stale in [k for k, (reference, _) in pictures.items() if reference() is None]:
        del pictures[stale]
    _, renderers = pictures.setdefault(id(model), (weakref.ref(model), {}))
    key = (width, height, fine)
    if key not in renderers:
        renderers[key] = _Picture(model, width, height, fine)
    return renderers[key].draw(model, data, camera_id)
