"""The ASGI application: the page, two websockets (controls and pictures), and what the page reads of recorded episodes.

``/ws``         JSON both ways: drive, feel, ask; tick, state, answer
``/ws/frames``  binary to the page (:mod:`robot_rl.console.frames`), an acknowledgement back for every picture that was shown

A camera has at most two pictures on their way to a page; the next one is sent when one was acknowledged, and it is then the newest
there is. So a slow page never falls behind, and costs the others nothing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from robot_rl.console.access import COOKIE, Access
from robot_rl.console.library import gate_curve
from robot_rl.console.messages import Ask, Drive, Feel, MessageError, Seen, parse
from robot_rl.console.office import Office
from robot_rl.console.report import REPORT

PAGE = Path(__file__).parent / "page"
TICK_S = 0.05
WINDOW = 2
WATCHER_S = 0.1
"""Between two pictures of a camera for pages that only watch: the person at the controls comes first."""
WATCHER_REST = 3.0
"""And so many times what a page takes to show one: one that is slow (a phone, a sixth page of one computer) is busy a third of the time, not always."""
SMOOTH = 0.8
MAX_PAGES = 64
MAX_ASKS = 16
MAX_BODY = 4096
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
GOING_AWAY, POLICY, TOO_MANY = 1001, 1008, 1013


async def read_body(request: Request, most: int) -> bytes | None:
    """What a request carries; None as soon as it is more than ``most`` bytes."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            return None
    return body


class Gate:
    """Every request: a Host this server goes by, an Origin that is this server, and (but for the page itself) somebody let in."""

    OPEN = ("/", "/api/login", "/api/me", "/favicon.svg")

    def __init__(self, app: Any, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        path = scope["path"]
        known = self.access.own_page(connection.headers)
        # A page of somebody else cannot read what it asks for, but a socket it can: there an Origin is a must.
        if scope["type"] == "websocket":
            known = known and ("origin" in connection.headers or "authorization" in connection.headers)
        opened = path in self.OPEN or path.startswith("/page/")
        if known and (opened or self.access.lets_in(connection.cookies, connection.headers.get("authorization", ""))):
            await self.app(scope, receive, _with_headers(send, path))
            return
        self.access.refused += 1
        if scope["type"] == "websocket":
            await receive()  # its connect
            await send({"type": "websocket.close", "code": POLICY, "reason": "refused"})
            return
        response = JSONResponse({"error": "log in with the token" if known else "not from here"}, 401 if known else 403)
        await response(scope, receive, _with_headers(send, path))


def _with_headers(send: Callable[[Any], Awaitable[None]], path: str) -> Callable[[Any], Awaitable[None]]:
    extra = dict(HEADERS)
    if path == "/report":
        extra["content-security-policy"] = REPORT_POLICY
    if path.endswith(".jpg"):
        extra["cache-control"] = "private, max-age=300"

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            given = {k for k, _ in message.get("headers", [])}
            more = [(k.encode(), v.encode()) for k, v in extra.items() if k.encode() not in given]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return sending


def make_app(office: Office, access: Access) -> Any:
    """The ASGI application of one console."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.ensure_future(office.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        office.close()

    pages = _Pages(office, access)
    routes = [
        Route("/", pages.index),
        Route("/favicon.svg", lambda r: FileResponse(PAGE / "favicon.svg")),
        Route("/api/me", pages.me),
        Route("/api/login", pages.login, methods=["POST"]),
        Route("/api/episodes", pages.episodes),
        Route("/api/episodes/{episode}", pages.episode),
        Route("/api/episodes/{episode}/{camera}.jpg", pages.picture),
        Route("/api/pair", pages.pair),
        Route("/api/curve", pages.curve),
        Route("/api/gate", pages.gate),
        Route("/api/notes", pages.notes),
        Route("/report", pages.report),
        WebSocketRoute("/ws", pages.controls),
        WebSocketRoute("/ws/frames", pages.frames),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    return Gate(Starlette(routes=routes, lifespan=lifespan), access)


class _Pages:
    """The endpoints."""

    def __init__(self, office: Office, access: Access) -> None:
        self.office, self.access = office, access
        self._open = 0
        self._curve: tuple[float, Any] = (-1e9, [])

    # ---- plain requests

    async def index(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def me(self, request: Request) -> Response:
        inside = self.access.lets_in(request.cookies, request.headers.get("authorization", ""))
        return JSONResponse({"inside": inside, "token": self.access.token is not None})

    async def login(self, request: Request) -> Response:
        body = await read_body(request, MAX_BODY)
        if body is None:
            return JSONResponse({"error": "too large"}, 413)
        try:
            token = json.loads(body)["token"]
            if not isinstance(token, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            return JSONResponse({"error": 'accepted is {"token": "..."}'}, 400)
        session = self.access.login(token)
        if session is None:
            await asyncio.sleep(0.5)  # guessing takes time
            return JSONResponse({"error": "wrong token"}, 401)
        response = JSONResponse({"inside": True})
        response.set_cookie(COOKIE, session, httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/")
        return response

    async def _read(self, work: Callable[[], Any]) -> Response:
        try:
            return JSONResponse(await asyncio.to_thread(work))
        except KeyError as error:
            return JSONResponse({"error": str(error.args[0] if error.args else error)}, 404)
        except (ValueError, OSError, RuntimeError) as error:
            return JSONResponse({"error": str(error)}, 409)

    async def episodes(self, request: Request) -> Response:
        unlabelled, hide = request.query_params.get("show") == "unlabelled", self.office.blinded
        rows = lambda: [asdict(r) for r in self.office.library.rows(unlabelled=unlabelled, hide=hide)]  # noqa: E731
        return await self._read(rows)

    async def episode(self, request: Request) -> Response:
        identity, hide = request.path_params["episode"], self.office.blinded
        return await self._read(lambda: self.office.library.detail(identity, hide=hide))

    async def picture(self, request: Request) -> Response:
        given = request.path_params
        try:
            at = float(request.query_params.get("at", "0"))
            if not 0.0 <= at <= 1.0:
                raise ValueError
        except ValueError:
            return JSONResponse({"error": "at: accepted are numbers from 0 to 1"}, 400)
        try:
            jpeg = await asyncio.to_thread(self.office.library.picture, given["episode"], given["camera"], at)
        except (KeyError, ValueError, OSError, RuntimeError) as error:
            return JSONResponse({"error": str(error)}, 404)
        return Response(jpeg, media_type="image/jpeg")

    async def pair(self, request: Request) -> Response:
        def work() -> Any:
            pair = self.office.library.pair()
            if pair is None:
                return {"pair": None}
            lengths = {s.episode: self.office.library.detail(s.episode, hide=True)["steps"] for s in (pair.first, pair.second)}
            return {
                "pair": asdict(pair),
                "steps": lengths,
                "cameras": self.office.library.detail(pair.first.episode, hide=True)["cameras"],
            }

        return await self._read(work)

    async def curve(self, request: Request) -> Response:
        if self.office.blinded:
            return JSONResponse({"points": [], "hidden": True})
        at, known = self._curve
        if time.monotonic() - at > 2.0:
            known = await asyncio.to_thread(self.office.library.curve)
            self._curve = time.monotonic(), known
        return JSONResponse({"points": known, "hidden": False})

    async def gate(self, request: Request) -> Response:
        if self.office.blinded:
            return JSONResponse({"points": [], "hidden": True})
        return await self._read(lambda: {"points": gate_curve(self.office.folder), "hidden": False})

    async def notes(self, request: Request) -> Response:
        return JSONResponse([asdict(n) for n in self.office.notes.last()])

    async def report(self, request: Request) -> Response:
        path = self.office.folder / REPORT
        if not path.exists() or self.office.blinded:
            return JSONResponse({"error": "no report yet"}, 404)
        return FileResponse(path, media_type="text/html")

    # ---- controls

    async def controls(self, socket: WebSocket) -> None:
        if self._open >= MAX_PAGES:
            await socket.close(TOO_MANY)
            return
        self._open += 1
        await socket.accept()
        number = self.office.desk.join(f"page {self._open}", time.monotonic_ns())
        tell = asyncio.ensure_future(self._tell(socket, number))
        asks: set[asyncio.Task[None]] = set()
        try:
            await self._hear(socket, number, asks)
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            self.office.gone(number)  # first of all: whoever drove is silent from here on
            self._open -= 1
            tell.cancel()

    async def _tell(self, socket: WebSocket, number: int) -> None:
        """Ticks all the time, the state when it is another one."""
        told = -1
        with suppress(WebSocketDisconnect, RuntimeError, asyncio.CancelledError):
            await socket.send_text(json.dumps({"type": "hello", "connection": number}))
            while True:
                await socket.send_text(f'{{"type":"tick","t":{time.monotonic_ns()}}}')
                if told != self.office.number:
                    told = self.office.number
                    await socket.send_text(self.office.state)
                await asyncio.sleep(TICK_S)

    async def _hear(self, socket: WebSocket, number: int, asks: set[asyncio.Task[None]]) -> None:
        desk = self.office.desk
        while True:
            data = await _receive(socket)
            if not desk.admit(number, time.monotonic_ns()):
                continue  # too fast: dropped, and silence means hold
            try:
                message = parse(data)
            except MessageError as error:
                if desk.malformed(number):
                    await socket.close(POLICY)
                    return
                await socket.send_text(json.dumps({"type": "refused", "text": str(error)}))
                continue
            if isinstance(message, Drive):
                self.office.drive(number, message)
            elif isinstance(message, Feel):
                self.office.feel(number, message)
            elif isinstance(message, Ask):
                if len(asks) >= MAX_ASKS and message.name != "estop":
                    answer = {"type": "answer", "id": message.id, "ok": False, "text": "too many requests at once"}
                    await socket.send_text(json.dumps(answer))
                    continue
                task = asyncio.ensure_future(self._answer(socket, number, message))
                asks.add(task)
                task.add_done_callback(asks.discard)

    async def _answer(self, socket: WebSocket, number: int, ask: Ask) -> None:
        answer = await self.office.ask(number, ask)
        with suppress(WebSocketDisconnect, RuntimeError):
            await socket.send_text(json.dumps({"type": "answer", "id": ask.id, "ok": answer.ok, "text": answer.text}))

    # ---- pictures

    async def frames(self, socket: WebSocket) -> None:
        if self._open >= MAX_PAGES:
            await socket.close(TOO_MANY)
            return
        self._open += 1
        await socket.accept()
        loop, cameras = asyncio.get_running_loop(), self.office.bridge.cameras
        news = asyncio.Event()
        end = cameras.listen(lambda: loop.call_soon_threadsafe(news.set))
        flight = _Flight()
        page = socket.query_params.get("page", "")
        number = int(page) if page.isdecimal() and len(page) < 10 else 0
        send = asyncio.ensure_future(self._send_frames(socket, number, news, flight))
        try:
            while True:
                message = parse(await _receive(socket))
                if isinstance(message, Seen) and flight.seen(message):
                    news.set()
        except (WebSocketDisconnect, RuntimeError):
            pass
        except MessageError:
            with suppress(RuntimeError):
                await socket.close(POLICY)
        finally:
            end()
            send.cancel()
            self._open -= 1

    async def _send_frames(self, socket: WebSocket, page: int, news: asyncio.Event, flight: _Flight) -> None:
        sent: dict[str, int] = {}
        at: dict[str, float] = {}
        with suppress(WebSocketDisconnect, RuntimeError, asyncio.CancelledError):
            while True:
                news.clear()
                pause = 0.0 if self.office.desk.holds(page) else max(WATCHER_S, WATCHER_REST * flight.taken_s)
                for camera, frame in self.office.bridge.cameras.newest().items():
                    now = time.monotonic()
                    early = now - at.get(camera, -1e9) < 0.8 * pause
                    if frame.number != sent.get(camera) and flight.room(camera) and not early:
                        sent[camera], at[camera] = frame.number, now
                        flight.sent(camera)
                        await socket.send_bytes(frame.packed())
                await news.wait()


class _Flight:
    """A page's pictures that are on their way: at most :data:`WINDOW` a camera, and how long the page takes to show one.

    Attributes:
        taken_s: by the page's own clock, smoothed, for one picture of every camera. The network has no part in it.
    """

    def __init__(self) -> None:
        self._flying: dict[str, int] = {}
        self._taken: dict[str, float] = {}

    @property
    def taken_s(self) -> float:
        return sum(self._taken.values())

    def room(self, camera: str) -> bool:
        return self._flying.get(camera, 0) < WINDOW

    def sent(self, camera: str) -> None:
        self._flying[camera] = self._flying.get(camera, 0) + 1

    def seen(self, seen: Seen) -> bool:
        """An acknowledgement; False for one that nothing was sent for."""
        if not self._flying.get(seen.camera, 0):
            return False
        self._flying[seen.camera] -= 1
        taken = seen.took_ms / 1e3
        self._taken[seen.camera] = taken + SMOOTH * (self._taken.get(seen.camera, taken) - taken)
        return True


async def _receive(socket: WebSocket) -> str | bytes:
    """Text or bytes, whichever came. Raises WebSocketDisconnect at the end."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", GOING_AWAY))
    text = message.get("text")
    return text if text is not None else message.get("bytes") or b""
