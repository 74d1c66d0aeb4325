"""A model server for tests: the same HTTP, judges that look at pixels, and every way of going wrong.

``robot-rl reward fake-vlm`` runs one by hand. A judge gives a picture a number in [0, 1], larger meaning closer to the goal; every
kind of question is answered from those numbers, so the right answer is always known.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

Judge = Callable[[np.ndarray], float]
LARGEST_REQUEST = 64 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class Knobs:
    """Chances of each fault per request (the rest is answered well), and how answers are bent.

    Attributes:
        latency_ms, jitter_ms: before every answer. ``hang_s``: how long a hanging request stays open.
        p_trickle: the reply comes a byte at a time, slower than any deadline.
        p_garbage: 200 with a body that is no JSON. ``p_malformed``: a chat completion whose content is wrong in one of six ways.
        position_bias: chance that a pair is answered "first image" whatever it shows. ``label_noise``: that it is flipped.
        quota: requests answered before everything is 429; negative for none.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    p_429: float = 0.0
    retry_after: float = 0.0
    p_500: float = 0.0
    p_400: float = 0.0
    p_malformed: float = 0.0
    p_garbage: float = 0.0
    p_disconnect: float = 0.0
    p_hang: float = 0.0
    p_trickle: float = 0.0
    hang_s: float = 3600.0
    position_bias: float = 0.0
    label_noise: float = 0.0
    logprobs: bool = True
    quota: int = -1

    FAULTS = ("429", "500", "400", "malformed", "garbage", "disconnect", "hang", "trickle")

    def set(self, values: dict[str, Any]) -> None:
        """Raises ValueError for an unknown knob."""
        known = {f.name: f.type for f in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"knob {name!r} is unknown; accepted are {', '.join(known)}")
            setattr(self, name, type(getattr(self, name))(value))


def brightness(image: np.ndarray) -> float:
    return float(image.mean()) / 255.0


def pixel_threshold(image: np.ndarray) -> float:
    """Share of pixels brighter than half."""
    return float((image.mean(-1) > 127.5).mean())


def goal_distance(goal: np.ndarray) -> Judge:
    """One minus the mean difference to a goal picture."""
    wanted = goal.astype(np.float32)

    def judge(image: np.ndarray) -> float:
        if image.shape != goal.shape:
            raise ValueError(f"a picture of shape {image.shape}: accepted is the goal's {goal.shape}")
        return 1.0 - float(np.abs(image.astype(np.float32) - wanted).mean()) / 255.0

    return judge


def scripted(scores: dict[str, float]) -> Judge:
    """Scores by :func:`~robot_rl.rewards.vlm.cache.pixel_hash`; an unknown picture has none."""
    from robot_rl.rewards.vlm.cache import pixel_hash

    return lambda image: scores.get(pixel_hash(image), math.nan)


JUDGES: dict[str, Judge] = {"brightness": brightness, "pixel_threshold": pixel_threshold}


class FakeVlmServer:
    """Serves on a thread of its own until closed; ``url`` is what a client is given.

    Args:
        judge: what knows the right answer.
        host: anything but loopback is refused unless ``anywhere``.
    """

    def __init__(
        self, judge: Judge = brightness, *, knobs: Knobs | None = None, host: str = "127.0.0.1", port: int = 0, seed: int = 0,
        anywhere: bool = False,
    ) -> None:  # fmt: skip
        if host not in LOOPBACK and not anywhere:
            raise ValueError(f"host={host!r}: accepted are {', '.join(LOOPBACK)} (or anywhere=True): it checks no keys")
        self.judge, self.knobs = judge, knobs or Knobs()
        self.stats: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._host, self._port = host, port
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._failed: OSError | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="fake-vlm", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    def __enter__(self) -> FakeVlmServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._thread.is_alive() and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(5.0)

    # ---- serving

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        try:
            server = await asyncio.start_server(self._connection, self._host, self._port, limit=1 << 20, backlog=1024)
        except OSError as error:
            self._failed = error
            self._ready.set()
            return
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, path, _ = head.split("\r\n", 1)[0].split(" ", 2)
            found = re.search(r"(?i)\r\ncontent-length: *(\d+)", head)
            length = int(found.group(1)) if found else 0
            if length > LARGEST_REQUEST:
                await self._send(writer, 413, {"error": "too large"})
                return
            body = await reader.readexactly(length)
            await self._route(method, path, body, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError, asyncio.LimitOverrunError):
            self.stats["broken"] += 1
        finally:
            writer.close()

    async def _route(
        self, method: str, path: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if method == "GET" and path == "/_stats":
            await self._send(writer, 200, dict(self.stats))
        elif method == "POST" and path == "/_knobs":
            try:
                self.knobs.set(json.loads(body))
            except ValueError as error:
                await self._send(writer, 400, {"error": str(error)})
                return
            await self._send(writer, 200, {})
        elif method == "GET" and path == "/v1/models":
            await self._send(writer, 200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})
        elif method == "POST" and path == "/v1/chat/completions":
            await self._completion(json.loads(body), reader, writer)
        else:
            await self._send(writer, 404, {"error": f"no {method} {path}"})

    async def _completion(self, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        knobs = self.knobs
        self.stats["requests"] += 1
        if 0 <= knobs.quota < self.stats["requests"]:
            self.stats["429"] += 1
            await self._send(writer, 429, {"error": "quota"}, {"Retry-After": f"{knobs.retry_after:g}"})
            return
        fault = self._fault()
        self.stats[fault or "ok"] += 1
        if knobs.latency_ms or knobs.jitter_ms:
            await asyncio.sleep(max(0.0, knobs.latency_ms + knobs.jitter_ms * self._random.uniform(-1, 1)) / 1e3)
        if fault == "429":
            await self._send(writer, 429, {"error": "slow down"}, {"Retry-After": f"{knobs.retry_after:g}"})
        elif fault in ("500", "400"):
            await self._send(writer, int(fault), {"error": "no"})
        elif fault == "disconnect":
            if self._random.random() < 0.5:  # in the middle of a reply, or before one
                writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n{"choices": [{"mess')
                await writer.drain()
            writer.transport.abort()
        elif fault == "hang":
            await self._idle(reader, knobs.hang_s)
        elif fault == "trickle":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            await self._idle(reader, knobs.hang_s, writer)
        elif fault == "garbage":
            await self._send(writer, 200, b"<html>502 but friendly</html>")
        else:
            text, top = self._content(asked)
            finish = "stop"
            if fault == "malformed":
                text, finish = self._malformed(text)
            await self._send(
                writer, 200, completion(asked, text, top if asked.get("logprobs") and knobs.logprobs else [], finish)
            )

    async def _idle(self, reader: asyncio.StreamReader, seconds: float, writer: asyncio.StreamWriter | None = None) -> None:
        """Say nothing (or a byte now and then) until the client goes or time is up."""
        until = self._loop.time() + seconds
        while self._loop.time() < until:
            try:
                if await asyncio.wait_for(reader.read(1), 0.05) == b"":
                    return
            except asyncio.TimeoutError:
                if writer is not None:
                    writer.write(b" ")

    def _fault(self) -> str:
        draw = self._random.random()
        for name in Knobs.FAULTS:
            draw -= getattr(self.knobs, f"p_{name}")
            if draw < 0:
                return name
        return ""

    async def _send(self, writer: asyncio.StreamWriter, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}", f"Content-Length: {len(body)}", "Connection: close"]
        lines += ["Content-Type: application/json", *(f"{k}: {v}" for k, v in (headers or {}).items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()

    # ---- answers

    def _content(self, asked: dict[str, Any]) -> tuple[str, list[tuple[str, float]]]:
        scores = [self.judge(image) for image in pictures(asked)]
        form = asked.get("response_format", {}).get("json_schema", {}).get("name", "")
        value: Any
        if form == "pair":
            value = {"analysis": "The pictures differ.", "label": self._pair(scores)}
        elif form == "progress":
            rows = [{"i": k + 2, "seen": "a picture", "progress": round(100 * s, 3)} for k, s in enumerate(scores[1:])]
            value = {"frames": rows}
        elif form == "done":
            value = {"success": scores[-1] > 0.5, "confidence": round(abs(scores[-1] - 0.5) * 2, 3)}
        elif form == "delta":
            before, after = scores[0], scores[1]
            share = (
                100 * (after - before) / max(1 - before, 1e-6)
                if after >= before
                else 100 * (after - before) / max(before, 1e-6)
            )
            value = {"analysis": "Something moved.", "delta": min(100.0, max(-99.0, round(share, 6)))}
        elif form == "rubric":
            value = {"analysis": "The last picture.", "score": 1 + min(4, int(scores[-1] * 5))}
        elif form == "trend":
            change = scores[-1] - scores[0]
            value = {
                "analysis": "A change.",
                "trend": "unclear" if abs(change) < 0.02 else "positive" if change > 0 else "negative",
            }
        else:
            p = min(max(scores[-1], 1e-4), 1 - 1e-4)
            return ("True" if p > 0.5 else "False"), [("True", math.log(p)), ("False", math.log(1 - p))]
        return json.dumps(value), []

    def _pair(self, scores: list[float]) -> int:
        half = len(scores) // 2
        if any(math.isnan(s) for s in scores):
            return -1
        first, second = float(np.mean(scores[:half])), float(np.mean(scores[half:]))
        if self._random.random() < self.knobs.position_bias:
            return 0
        label = -1 if first == second else int(second > first)
        return 1 - label if label >= 0 and self._random.random() < self.knobs.label_noise else label

    def _malformed(self, text: str) -> tuple[str, str]:
        """Six kinds; prose around a right answer stays right, everything else must be refused."""
        kind = self._random.randrange(6)
        if kind == 0:
            return text[: len(text) * 2 // 3], "stop"  # cut off, and the server does not say so
        if kind == 1:
            return f"Here is what I think: {text}\nI hope that helps!", "stop"
        if kind == 2:
            return re.sub(r'("label"|"progress"|"delta"|"score"|"confidence"): *-?[\d.]+', r"\1: 777", text), "stop"
        if kind == 3:
            return re.sub(r'"(label|frames|success|delta|score|trend)"', r'"verdict"', text), "stop"
        if kind == 4:
            return text, "length"
        return "I am sorry, I cannot say which label that would be.", "stop"


def completion(asked: dict[str, Any], text: str, top: list[tuple[str, float]], finish: str) -> dict[str, Any]:
    """An OpenAI chat completion."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if top:
        alternatives = [{"token": t, "logprob": p} for t, p in top]
        choice["logprobs"] = {"content": [{"token": text, "logprob": max(p for _, p in top), "top_logprobs": alternatives}]}
    tokens = {"prompt_tokens": 100 * max(1, len(pictures_of(asked))), "completion_tokens": max(1, len(text) // 4)}
    return {
        "id": "fake", "object": "chat.completion", "created": 0, "model": asked.get("model", "fake"), "choices": [choice],
        "usage": {**tokens, "total_tokens": sum(tokens.values())},
    }  # fmt: skip


def pictures_of(asked: dict[str, Any]) -> list[str]:
    """Data URLs of a request, in order."""
    urls = []
    for message in asked.get("messages", []):
        if isinstance(message.get("content"), list):
            urls += [part["image_url"]["url"] for part in message["content"] if part.get("type") == "image_url"]
    return urls


def pictures(asked: dict[str, Any]) -> list[np.ndarray]:
    """Decoded pictures of a request."""
    from PIL import Image

    out = []
    for url in pictures_of(asked):
        data = base64.b64decode(url.partition(",")[2])
        out.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    return out
