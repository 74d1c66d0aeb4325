"""A page on which a person watches recorded episodes and holds a key: frames of success for the classifier, or running feedback.

What is marked is the frame on the screen, known by its number: neither the display's nor the network's delay moves a mark. One
episode at a time; the next one is served when what was said about the last has arrived.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from robot_rl.console.access import Access
from robot_rl.console.frames import to_jpeg
from robot_rl.console.server import PAGE, Gate, read_body
from robot_rl.replay.store import EpisodeStore
from robot_rl.rewards.marks import Look, Tally, append_look, read_looks, tally

MAX_BODY = 1 << 20
Heard = Callable[[dict[str, Any]], dict[str, Any]]


class Reel:
    """Recorded episodes, one after the other, and what people said about them.

    Args:
        camera: feature whose pictures are shown.
        task: ``mark`` asks to hold a key while success is on the screen, ``feedback`` to move a slider with what happens.
        heard: takes what was said about an episode (a JSON object of the page) and gives what to tell the person; raises ValueError
            for what is none.
        done: whether enough was said, asked before each episode.
        modes: ways of failing to choose from.
    """

    def __init__(
        self,
        store: EpisodeStore,
        camera: str,
        task: Literal["mark", "feedback"],
        heard: Heard,
        done: Callable[[], bool],
        *,
        episodes: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        modes: Sequence[str] = (),
        said: str = "",
    ) -> None:
        if camera not in store.observation_features:
            raise ValueError(f"camera={camera!r}: the store has {', '.join(sorted(store.observation_features))}")
        known = store.episode_ids()
        absent = sorted(set(episodes or ()) - set(known))
        if absent:
            raise ValueError(f"episodes={', '.join(absent)}: the store has no such episodes")
        self.store, self.camera, self.task, self.modes, self.said = store, camera, task, tuple(modes), said
        self._heard, self._done = heard, done
        seen = set(skip)
        self._waiting = [e for e in (known if episodes is None else episodes) if e not in seen]
        self._current: tuple[str, np.ndarray] | None = None
        self._guard = threading.Lock()
        self.finished = threading.Event()

    def present(self) -> dict[str, Any]:
        """What the page shows now."""
        with self._guard:
            if self._done() or not self._waiting:
                self.finished.set()
                return {"finished": True, "said": self.said, "left": len(self._waiting)}
            name = self._waiting[0]
            meta = self.store.meta(name)
            frames = len(self._pictures(name))
        return {
            "finished": False, "task": self.task, "episode": name, "instruction": meta.task, "frames": frames, "modes": self.modes,
            "hz": meta.control_hz or 10.0, "said": self.said, "left": len(self._waiting),
        }  # fmt: skip

    def _pictures(self, episode: str) -> np.ndarray:
        if self._current is None or self._current[0] != episode:
            self._current = (episode, np.asarray(self.store.read(episode, [self.camera]).observations[self.camera]))
        return self._current[1]

    def picture(self, episode: str, frame: int) -> bytes:
        """Raises KeyError for another episode than the present one, or a frame that it does not have."""
        with self._guard:
            if not self._waiting or episode != self._waiting[0] or not 0 <= frame < len(self._pictures(episode)):
                raise KeyError(f"frame {frame} of {episode!r} is not on show")
            return to_jpeg(self._pictures(episode)[frame])

    def hear(self, message: Any) -> dict[str, Any]:
        """Take what was said about the present episode, or that it is to be left out; raises ValueError for anything else."""
        if not isinstance(message, dict):
            raise ValueError("accepted is a JSON object")
        with self._guard:
            if not self._waiting or message.get("episode") != self._waiting[0]:
                raise ValueError(f"episode={message.get('episode')!r} is not on show")
            frames = len(self._pictures(self._waiting[0]))
            answer = {} if message.get("leave_out") is True else self._heard({**message, "frames": frames})
            self.said = str(answer.get("said", self.said))
            self._waiting.pop(0)
            self._current = None
        return self.present()


class Marks:
    """What the page's marks become: looks in a file.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path, operator: str, enough: int, modes: Sequence[str]) -> None:
        self.path, self.operator, self.enough, self.modes = path, operator, enough, tuple(modes)
        self.looks = read_looks(path) if path.exists() else []

    def tally(self) -> Tally:
        return tally(self.looks, self.enough, self.modes)

    def told(self) -> str:
        now = self.tally()
        missing = "; ".join(now.missing)
        return f"{now.positives} frames of success, {now.negatives} without" + (
            f". Missing: {missing}" if missing else ". Enough."
        )

    def heard(self, message: dict[str, Any]) -> dict[str, Any]:
        mode = str(message.get("mode", ""))
        if mode and self.modes and mode not in self.modes:
            raise ValueError(f"mode={mode!r}: accepted are {', '.join(self.modes)}")
        try:
            if int(message["last"]) >= message["frames"]:
                raise ValueError(f"last={message['last']}: accepted are 0 to {message['frames'] - 1}")
            look = Look(
                message["episode"], int(message["first"]), int(message["last"]), tuple(message["success"]), mode, self.operator,
                time.time_ns(),
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ValueError(f"accepted are episode, first, last and success ({error})") from None
        append_look(self.path, look)
        self.looks.append(look)
        return {"said": self.told()}


class Readings:
    """What the page's slider becomes: one number an observation, NaN where nothing was said."""

    def __init__(self, hz: Callable[[str], float], seconds: float) -> None:
        self._hz, self.seconds, self.shown_s = hz, seconds, 0.0
        self.episodes: dict[str, np.ndarray] = {}

    def done(self) -> bool:
        return self.shown_s >= self.seconds

    def heard(self, message: dict[str, Any]) -> dict[str, Any]:
        rows = message.get("readings")
        if not isinstance(rows, list) or len(rows) != message["frames"]:
            raise ValueError(f"accepted are {message['frames']} readings: one number from -1 to 1, or null, a frame")
        try:
            values = np.array([np.nan if v is None else float(v) for v in rows])
        except (TypeError, ValueError) as error:
            raise ValueError(f"accepted are readings of numbers or null ({error})") from None
        if (np.abs(values[np.isfinite(values)]) > 1.0).any() or np.isinf(values).any():
            raise ValueError("accepted are readings from -1 to 1")
        self.episodes[message["episode"]] = values
        self.shown_s += len(values) / self._hz(message["episode"])
        return {"said": f"{min(self.shown_s, self.seconds):.0f} of {self.seconds:.0f} s"}


def make_app(reel: Reel, access: Access) -> Any:
    """The ASGI application of a reel."""

    async def index(request: Request) -> Response:
        return FileResponse(PAGE / "marking.html")

    async def present(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(reel.present))

    async def picture(request: Request) -> Response:
        given = request.path_params
        try:
            jpeg = await asyncio.to_thread(reel.picture, given["episode"], given["frame"])
        except KeyError as error:
            return JSONResponse({"error": str(error.args[0])}, 404)
        return Response(jpeg, media_type="image/jpeg")

    async def say(request: Request) -> Response:
        body = await read_body(request, MAX_BODY)
        if body is None:
            return JSONResponse({"error": "too large"}, 413)
        try:
            return JSONResponse(await asyncio.to_thread(reel.hear, json.loads(body)))
        except (ValueError, RecursionError) as error:
            return JSONResponse({"error": str(error)}, 400)

    routes = [
        Route("/", index),
        Route("/favicon.svg", lambda r: FileResponse(PAGE / "favicon.svg")),
        Route("/api/reel", present),
        Route("/api/reel", say, methods=["POST"]),
        Route("/api/reel/{episode}/{frame:int}.jpg", picture),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    return Gate(Starlette(routes=routes), access)
