"""Between machines without a shared folder: a small HTTP/1.1 endpoint beside the learner, and clients that verify.

==========================================  ==================================================================
``GET /v1/weights``                         ``{"latest": 7, "versions": [5, 6, 7]}``
``GET /v1/weights/<version>/manifest.json`` the manifest
``GET /v1/weights/<version>/weights.safetensors`` the bytes; ``Range`` resumes, ``ETag`` is the sha256
==========================================  ==================================================================

Episodes and rewards come in through the same port, see ``runtime/inbox.py`` and ``runtime/shipping.py``.

Standard library only. The endpoint binds to loopback unless told otherwise, and beyond loopback it refuses to start without a
bearer token. It does not encrypt: where the network is not trusted, put a tunnel or a reverse proxy in front.
"""

from __future__ import annotations

import hmac
import http.client
import json
import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from robot_rl import tokens
from robot_rl.runtime.weights import MANIFEST, MAX_MANIFEST_BYTES, WEIGHTS, Manifest, VerificationError, WeightChannel

if TYPE_CHECKING:
    from torch import Tensor

    from robot_rl.runtime.inbox import EpisodeInbox

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "ROBOT_RL_WEIGHTS_TOKEN"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PART = 1 << 18
CONNECTIONS = 64


class TransferError(OSError):
    """The other machine could not be reached or did not answer as agreed; trying again later is reasonable."""


def read_token(environment: Mapping[str, str] | None = None, token_file: str | Path | None = None) -> str | None:
    """The learner's token, see :func:`robot_rl.tokens.read_token`."""
    return tokens.read_token(TOKEN_VARIABLE, token_file, environment)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # a peer that stops reading or writing does not keep a thread for ever
    server: _Server

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_PATCH(self) -> None:
        self._receive()

    def do_POST(self) -> None:
        self._receive()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("weights endpoint: " + format, *args)

    def version_string(self) -> str:
        return "robot_rl"

    def _receive(self) -> None:
        """Take in what a robot sends. A body that is not read whole ends the connection."""
        if not self._authorized():
            self.close_connection = True
            return self._plain(401, {"error": "a bearer token is needed"}, True)
        inbox, parts = self.server.inbox, urlsplit(self.path).path.split("/")
        if inbox is None or parts[:2] != ["", "v1"]:
            self.close_connection = True
            return self._plain(404, {"error": "not found"}, True)
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            self.close_connection = True
            return self._plain(411, {"error": "Content-Length is needed"}, True)
        limit = inbox.body_limit(self.command, parts[2:])
        if int(length) > limit:
            self.close_connection = True
            return self._plain(413, {"error": f"accepted are at most {limit} bytes"}, True)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = inbox.answer(self.command, parts[2:], headers, body)
        self._plain(answer.status, answer.body, True, answer.headers)

    def _plain(self, status: int, body: dict[str, Any], send_body: bool, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if send_body:
            self.wfile.write(data)

    def _authorized(self) -> bool:
        if self.server.token is None:
            return True
        given = self.headers.get("Authorization", "")
        wanted = f"Bearer {self.server.token}"
        return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())

    def _answer(self, send_body: bool) -> None:
        if not self._authorized():
            self.close_connection = True
            return self._plain(401, {"error": "a bearer token is needed"}, send_body)
        parts = urlsplit(self.path).path.split("/")
        if self.server.inbox is not None and parts[:2] == ["", "v1"] and parts[2:3] != ["weights"]:
            answer = self.server.inbox.answer(self.command, parts[2:], {}, b"")
            return self._plain(answer.status, answer.body, send_body, answer.headers)
        if parts[:3] != ["", "v1", "weights"] or any(not _NAME.fullmatch(p) or ".." in p for p in parts[1:]):
            return self._plain(404, {"error": "not found"}, send_body)
        channel = self.server.channel
        if len(parts) == 3:
            return self._plain(200, {"latest": channel.latest(), "versions": channel.versions()}, send_body)
        # Only a whole version number and two fixed names ever reach the file system.
        if len(parts) != 5 or not re.fullmatch(r"[1-9][0-9]{0,17}", parts[3]) or parts[4] not in (MANIFEST, WEIGHTS):
            return self._plain(404, {"error": "not found"}, send_body)
        version = int(parts[3])
        try:
            manifest = channel.manifest(version)
            file = open(channel.path(version) / parts[4], "rb")  # noqa: SIM115  (closed below, after the headers)
        except (VerificationError, OSError) as error:
            logger.debug("weights endpoint: version %d: %s", version, error)
            return self._plain(404, {"error": f"no version {version}"}, send_body)
        with file:
            size = os.fstat(file.fileno()).st_size
            tag = f'"{manifest.sha256}"' if parts[4] == WEIGHTS else f'"manifest-{manifest.sha256}"'
            first = self._first_byte(size, tag)
            if first is None:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if first else 200)
            self.send_header("Content-Type", "application/json" if parts[4] == MANIFEST else "application/octet-stream")
            self.send_header("Content-Length", str(size - first))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", tag)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
            self.end_headers()
            if not send_body:
                return
            file.seek(first)
            left = size - first
            while left:
                part = file.read(min(_PART, left))
                if not part:  # shrank under us: end the connection, so that the reader sees a short body
                    self.close_connection = True
                    return
                self.wfile.write(part)
                left -= len(part)

    def _first_byte(self, size: int, tag: str) -> int | None:
        """Start of an open-ended range (``bytes=N-``), 0 for everything, None for a range outside the file."""
        match = re.fullmatch(r"bytes=([0-9]{1,18})-", self.headers.get("Range", ""))
        if match is None or self.headers.get("If-Range", tag) != tag:
            return 0
        first = int(match[1])
        return first if first < size else None


class _Server(ThreadingHTTPServer):
    """A thread a connection, ``CONNECTIONS`` at most: whoever opens more waits for nothing, so that memory stays bounded."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 32
    channel: WeightChannel
    token: str | None
    inbox: EpisodeInbox | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(*arguments, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            logger.warning("endpoint: %d connections are open; one from %s is closed", CONNECTIONS, client_address)
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("weights endpoint: connection from %s ended early", client_address, exc_info=True)


class WeightServer:
    """Serves one :class:`WeightChannel`, and takes episodes into ``inbox``, from a thread of its own.

    Use as a context manager, or ``close`` it.

    Raises:
        ValueError: ``host`` is not loopback and there is no token.
    """

    def __init__(
        self,
        channel: WeightChannel,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        inbox: EpisodeInbox | None = None,
    ) -> None:
        token = read_token() if token is None else read_token({TOKEN_VARIABLE: token})
        if token is None and not tokens.is_loopback(host):
            raise ValueError(
                f"host={host!r} is reachable from other machines: accepted is loopback, or a token in {TOKEN_VARIABLE}"
            )
        server_class = type("_Server6", (_Server,), {"address_family": 10}) if ":" in host else _Server
        self._server = server_class((host, port), _Handler)
        self._server.channel, self._server.token, self._server.inbox = channel, token, inbox
        self._thread = threading.Thread(target=self._server.serve_forever, name="weights-endpoint", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        name = host.decode() if isinstance(host, (bytes, bytearray)) else str(host)
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def __enter__(self) -> WeightServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Client:
    """One request at a time; no redirects, because a token must not follow them."""

    def __init__(self, url: str, token: str | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r}: accepted are http://host:port and https://host:port")
        self.secure, self.host, self.port, self.timeout_s = parts.scheme == "https", parts.hostname, parts.port, timeout_s
        self.prefix = parts.path.rstrip("/")
        self.headers = {"Connection": "close"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def get(
        self, path: str, headers: Mapping[str, str] | None = None, method: str = "GET", body: bytes | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout_s)
        try:
            connection.request(method, self.prefix + path, body, headers={**self.headers, **(headers or {})})
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise TransferError(f"{self.host}:{self.port}{path}: {error or type(error).__name__}") from error

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any], Mapping[str, str]]:
        """(status, JSON body, headers with lower-case names) of one exchange.

        Raises:
            TransferError: no answer, half of one, or one that is not ours.
        """
        connection, response = self.get(path, headers, method, body)
        try:
            data = response.read(MAX_MANIFEST_BYTES)
            told = json.loads(data) if data else {}
            return response.status, dict(told), {k.lower(): v for k, v in response.getheaders()}
        except (OSError, http.client.HTTPException, ValueError, TypeError) as error:
            raise TransferError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()

    def small(self, path: str, limit: int = MAX_MANIFEST_BYTES) -> bytes:
        connection, response = self.get(path)
        try:
            if response.status == 404:
                raise VerificationError(f"{path}: the learner does not have it")
            if response.status != 200:
                raise TransferError(f"{path}: status {response.status} {response.reason}")
            data = response.read(limit + 1)
            promised = response.getheader("Content-Length")
            if promised is not None and len(data) < min(int(promised), limit + 1):
                raise TransferError(f"{path}: {len(data)} of {promised} bytes, then the connection ended")
        except http.client.HTTPException as error:
            raise TransferError(f"{path}: {error!r}") from error
        finally:
            connection.close()
        if len(data) > limit:
            raise VerificationError(f"{path}: more than {limit} bytes")
        return data


def fetch(
    url: str,
    version: int,
    into: WeightChannel,
    *,
    token: str | None = None,
    timeout_s: float = 10.0,
    retries: int = 5,
    max_bytes: int = 4 << 30,
) -> Manifest:
    """Fetch one version into the local channel ``into``, resuming a broken download, and verify it before it appears there.

    Args:
        timeout_s: of one connection attempt and of one read; ``retries`` are spent only on attempts that brought no bytes.

    Raises:
        TransferError: the learner cannot be reached, or the link kept breaking. What was received stays for the next call.
        VerificationError: what was received is wrong; it was deleted.
    """
    client = _Client(url, read_token() if token is None else token, timeout_s)
    base = f"/v1/weights/{version}"
    manifest = Manifest.decode(client.small(f"{base}/{MANIFEST}"), f"weights version {version} of {url}")
    if manifest.version != version:
        raise VerificationError(f"asked for weights version {version}, was sent version {manifest.version}")
    if manifest.size > max_bytes:
        raise VerificationError(f"weights version {version}: {manifest.size} bytes, accepted are at most {max_bytes}")
    if version in into.versions() and into.manifest(version).sha256 == manifest.sha256:
        return manifest
    into.folder.mkdir(parents=True, exist_ok=True)
    part = into.folder / f".part-{version:08d}-{manifest.sha256[:16]}"
    delay, left = 0.05, retries
    while True:
        before = part.stat().st_size if part.exists() else 0
        if before >= manifest.size:
            break
        problem = _download(client, f"{base}/{WEIGHTS}", part, before, manifest)
        got = part.stat().st_size if part.exists() else 0
        if got >= manifest.size:
            break
        if got > before:
            delay, left = 0.05, retries
            continue
        if left == 0:
            raise TransferError(f"weights version {version}: {got} of {manifest.size} bytes, then {problem}")
        left -= 1
        time.sleep(delay * random.uniform(0.5, 1.0))  # jitter: many robots lose one learner at the same moment
        delay = min(2 * delay, 2.0)
    try:
        into.adopt(manifest, part)
    except VerificationError:
        part.unlink(missing_ok=True)
        raise
    for stale in into.folder.glob(".part-*"):
        if stale.name < part.name:
            stale.unlink(missing_ok=True)
    return manifest


def _download(client: _Client, path: str, part: Path, offset: int, manifest: Manifest) -> str:
    """Append what one connection gives to ``part``; returns why it ended early (empty when it did not)."""
    headers = {"Range": f"bytes={offset}-", "If-Range": f'"{manifest.sha256}"'} if offset else {}
    try:
        connection, response = client.get(path, headers)
    except TransferError as error:
        return str(error)
    try:
        if response.status not in (200, 206):
            return f"status {response.status} {response.reason}"
        if response.status == 200:
            offset = 0  # the server starts from the beginning, so do we
        with open(part, "r+b" if part.exists() else "w+b") as file:
            file.truncate(offset)
            file.seek(offset)
            while offset < manifest.size:
                data = response.read(min(_PART, manifest.size - offset))
                if not data:
                    return "the connection ended"
                file.write(data)
                offset += len(data)
            file.flush()
            os.fsync(file.fileno())
        return ""
    except (OSError, http.client.HTTPException) as error:
        return repr(error)
    finally:
        connection.close()


class RemoteWeights:
    """A learner's channel as seen from another machine: fetches into a local mirror, then reads and verifies there.

    Give it to :class:`~robot_rl.runtime.weights.WeightSubscriber` as its source, and poll from a side thread.
    """

    def __init__(
        self,
        url: str,
        mirror: WeightChannel | str | Path | None = None,
        *,
        token: str | None = None,
        timeout_s: float = 10.0,
        keep: int = 4,
    ) -> None:
        """``mirror`` is a local folder (a temporary one by default) that keeps the newest ``keep`` versions."""
        self.url, self.timeout_s, self.keep = url, timeout_s, keep
        self.token = read_token() if token is None else token
        if mirror is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="robot_rl_weights_")
            mirror = self._temporary.name
        self.mirror = mirror if isinstance(mirror, WeightChannel) else WeightChannel(mirror)

    def latest(self) -> int | None:
        """Raises TransferError when the learner cannot be reached."""
        data = _Client(self.url, self.token, self.timeout_s).small("/v1/weights")
        try:
            latest = json.loads(data)["latest"]
            return None if latest is None else int(latest)
        except (ValueError, KeyError, TypeError) as error:
            raise TransferError(f"{self.url}/v1/weights: unexpected answer") from error

    def manifest(self, version: int) -> Manifest:
        where = f"weights version {version} of {self.url}"
        client = _Client(self.url, self.token, self.timeout_s)
        return Manifest.decode(client.small(f"/v1/weights/{version}/{MANIFEST}"), where)

    def load(self, version: int, expected_shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
        fetch(self.url, version, self.mirror, token=self.token, timeout_s=self.timeout_s)
        tensors = self.mirror.load(version, expected_shapes)
        self.mirror.prune(self.keep, protect=(version,))
        return tensors
