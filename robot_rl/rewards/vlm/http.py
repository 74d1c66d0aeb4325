"""One HTTP/1.1 request on a connection of its own, over asyncio, with every part of the reply bounded.

A small client rather than a library: a cancelled request must free its socket at once, a reply that never ends must not fill
memory, and the machine beside the robot should need nothing more installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

LARGEST_REPLY = 4 << 20
LARGEST_HEAD = 64 << 10


class ConnectionFailed(Exception):
    """No usable reply came; ``sent`` says whether the server may have seen the request."""

    def __init__(self, message: str, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes


async def post(url: str, body: bytes, headers: Mapping[str, str], connect_s: float) -> Reply:
    """POST and read the whole reply; the caller bounds the time (``asyncio.wait_for``).

    Raises:
        ConnectionFailed: refused, cut off, or not HTTP.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    host = parts.hostname or ""
    context = ssl.create_default_context() if secure else None
    try:
        opening = asyncio.open_connection(host, port, ssl=context, limit=LARGEST_HEAD)
        reader, writer = await asyncio.wait_for(opening, connect_s)
    except (OSError, asyncio.TimeoutError) as error:
        raise ConnectionFailed(f"no connection to {host}:{port}: {error or 'timeout'}", sent=False) from error
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [f"POST {target} HTTP/1.1", f"Host: {host}:{port}", "Connection: close", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json", "Accept: application/json"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        await writer.drain()
        return await _read(reader)
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        raise ConnectionFailed(f"{host}:{port}: {type(error).__name__}: {error}", sent=True) from error
    finally:
        writer.transport.abort()  # nothing more is wanted of it, whatever state it is in
        with contextlib.suppress(Exception):
            await writer.wait_closed()


async def _read(reader: asyncio.StreamReader) -> Reply:
    status, headers = await _head(reader)
    while 100 <= status < 200:
        status, headers = await _head(reader)
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = await _chunks(reader)
    elif "content-length" in headers:
        length = int(headers["content-length"])
        if not 0 <= length <= LARGEST_REPLY:
            raise ValueError(f"a reply of {length} bytes: accepted are up to {LARGEST_REPLY}")
        body = await reader.readexactly(length)
    else:
        body = await _rest(reader)
    return Reply(status, headers, body)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head[:-4].split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError("the reply is no HTTP/1.x")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(rest.split(" ", 1)[0]), headers


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";", 1)[0], 16)
        if size < 0 or len(body) + size > LARGEST_REPLY:
            raise ValueError(f"a reply of more than {LARGEST_REPLY} bytes")
        if size == 0:
            while (await reader.readuntil(b"\r\n")) != b"\r\n":
                pass
            return bytes(body)
        body += await reader.readexactly(size)
        await reader.readexactly(2)


async def _rest(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while piece := await reader.read(65536):
        body += piece
        if len(body) > LARGEST_REPLY:
            raise ValueError(f"a reply of more than {LARGEST_REPLY} bytes")
    return bytes(body)
