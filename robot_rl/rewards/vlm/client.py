"""The VLM client: ask without waiting, get a checked answer or a reason. It never raises for what a server did.

One thread runs an event loop; whoever asks only puts a question into a bounded queue. A question ends as exactly one
:class:`Answer`, at the latest after its deadline.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from robot_rl.rewards.vlm.cache import ReplyCache, open_database, question_key
from robot_rl.rewards.vlm.config import VlmConfig
from robot_rl.rewards.vlm.http import ConnectionFailed, Reply, post
from robot_rl.rewards.vlm.limits import Breaker, Budget, TokenBucket
from robot_rl.rewards.vlm.parsing import parse
from robot_rl.rewards.vlm.questions import Answer, Question

PATH = "/v1/chat/completions"


@dataclass
class VlmFigures:
    """What a client has done; counts since it started."""

    asked: int = 0
    answered: int = 0
    requests: int = 0
    retries: int = 0
    cached: int = 0
    dropped: int = 0
    http: Counter[str] = field(default_factory=Counter)  # outcome of each request: 200, 429, 500, connection, deadline
    invalid: Counter[str] = field(default_factory=Counter)
    rungs: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    def to_json(self) -> dict[str, Any]:
        quantiles = np.percentile(self.latencies_ms, [50, 95, 99]).tolist() if self.latencies_ms else [0.0] * 3
        return {
            "asked": self.asked, "answered": self.answered, "valid": self.answered - sum(self.invalid.values()),
            "invalid": dict(self.invalid), "requests": self.requests, "retries": self.retries, "cached": self.cached,
            "dropped": self.dropped, "http": dict(self.http), "rungs": dict(self.rungs), "tokens": self.tokens,
            **dict(zip(("latency_p50_ms", "latency_p95_ms", "latency_p99_ms"), quantiles, strict=True)),
        }  # fmt: skip


@dataclass
class _Waiting:
    question: Question
    asked: float
    future: Future[Answer]


class VlmClient:
    """Questions in, answers out.

    Args:
        config: server, budget and limits.
        clock: monotonic seconds, for the breaker and the rate; tests give their own.

    Raises:
        ValueError: the key's environment variable is not set.
    """

    def __init__(self, config: VlmConfig, *, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time):
        self.config = config
        self._url = config.base_url.rstrip("/").removesuffix("/v1") + PATH
        key = "" if config.cache == "replay" else config.api_key()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.figures = VlmFigures()
        self.breaker = Breaker(config.open_after, config.open_share, config.open_s, clock)
        self._bucket = TokenBucket(config.rate_per_s, clock)
        self._random = random.Random(config.seed)
        self._database: sqlite3.Connection = open_database(config.state)
        self.budget = Budget(config, self._database, now)
        self.cache = ReplyCache(self._database)
        self._queue: deque[_Waiting] = deque()
        self._guard = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="vlm-client", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"VlmClient({self.config.model_id} at {self.config.base_url})"

    def __enter__(self) -> VlmClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- asking

    def submit(self, question: Question) -> Future[Answer]:
        """Put a question into the queue and return at once; a full queue drops its oldest question (``queue_dropped``)."""
        waiting = _Waiting(question, time.monotonic(), Future())
        dropped = None
        with self._guard:
            if self._closed:
                raise RuntimeError("this VLM client is closed")
            self.figures.asked += 1
            if len(self._queue) >= self.config.queue:
                dropped = self._queue.popleft()
                self.figures.dropped += 1
            self._queue.append(waiting)
        if dropped is not None:
            self._finish(dropped, Answer(reason="queue_dropped"))
        self._loop.call_soon_threadsafe(self._wake.set)
        return waiting.future

    def ask(self, question: Question) -> Answer:
        """Wait for the answer. For labelling, never for a control loop."""
        return self.submit(question).result()

    def ask_all(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Answers in order, never more in the queue than it holds: for labelling without drops."""
        pending: deque[Future[Answer]] = deque()
        room = min(self.config.queue, 4 * self.config.in_flight)
        for question in questions:
            if len(pending) >= room:
                yield pending.popleft().result()
            pending.append(self.submit(question))
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """Answer what waits with ``error`` and stop; a running request is cut off."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
        self._loop.call_soon_threadsafe(self._wake.set)
        self._thread.join(5.0)
        self._database.close()

    def state(self) -> dict[str, Any]:
        """For diagnostics: figures, queue, breaker and what is left of the budget."""
        return {
            **self.figures.to_json(), "queue": len(self._queue), "in_flight": len(self._running),
            "breaker": self.breaker.state, "breaker_opened": self.breaker.opened,
        }  # fmt: skip

    # ---- the worker's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        room = asyncio.Semaphore(self.config.in_flight)
        while True:
            await room.acquire()
            while not self._queue and not self._closed:
                self._wake.clear()
                if not self._queue and not self._closed:  # asked between the look and the clearing
                    await self._wake.wait()
            if self._closed:
                break
            with self._guard:
                if not self._queue:
                    room.release()
                    continue
                waiting = self._queue.popleft()
            task = self._loop.create_task(self._answer(waiting))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            task.add_done_callback(lambda _: room.release())
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        with self._guard:
            left, self._queue = list(self._queue), deque()
        for waiting in left:
            self._finish(waiting, Answer(reason="error"))

    async def _answer(self, waiting: _Waiting) -> None:
        try:
            answer = await self._find(waiting)
        except asyncio.CancelledError:
            answer = Answer(reason="error")
        except Exception as error:  # whatever happens, the one who asked is told
            self.figures.http[type(error).__name__] += 1
            answer = Answer(reason="error")
        self._finish(waiting, answer)

    def _finish(self, waiting: _Waiting, answer: Answer) -> None:
        answer = replace(answer, latency_ms=(time.monotonic() - waiting.asked) * 1e3)
        with self._guard:
            f = self.figures
            f.answered += 1
            f.latencies_ms.append(answer.latency_ms)
            if answer.reason:
                f.invalid[answer.reason] += 1
            if answer.rung:
                f.rungs[answer.rung] += 1
        if not waiting.future.cancelled():
            waiting.future.set_result(answer)

    async def _find(self, waiting: _Waiting) -> Answer:
        question, mode = waiting.question, self.config.cache
        if mode != "replay" and time.monotonic() - waiting.asked > self.config.max_age_s:
            return Answer(reason="stale")
        key = question_key(self.config, question)
        known = self.cache.get(key) if mode != "off" else None
        if known is not None:
            raw, finish, top = known
            self.figures.cached += 1
            return replace(_answer(question, raw, finish, top), cached=True)
        if mode == "replay":
            return Answer(reason="cache_miss")
        body = json.dumps(request_body(self.config, question)).encode()
        try:
            return await asyncio.wait_for(self._attempts(question, key, body), self.config.deadline_s)
        except asyncio.TimeoutError:
            return Answer(reason="timeout")

    async def _attempts(self, question: Question, key: str, body: bytes) -> Answer:
        """Requests until one says something, or until there is a reason to stop."""
        reason = "error"
        for attempt in range(self.config.retries + 1):
            if attempt:
                self.figures.retries += 1
            wait = self._bucket.wait()
            if wait:
                await asyncio.sleep(wait)
            if not self.breaker.allows():
                return Answer(reason="circuit_open" if not attempt else reason, attempts=attempt)
            if not self.budget.take():
                self.breaker.abandon()
                return Answer(reason="budget", attempts=attempt)
            least = 0.0
            began = time.monotonic()
            try:
                reply = await self._request(body)
            except ConnectionFailed as failure:
                if not failure.sent:
                    self.budget.give_back()
                self.figures.http["connection"] += 1
                self.breaker.failure()
                reason = "error"
            else:
                self.figures.http[str(reply.status)] += 1
                if reply.status == 200:
                    answer = self._read(question, key, reply, (time.monotonic() - began) * 1e3)
                    return replace(answer, attempts=attempt + 1)
                retryable = reply.status == 429 or reply.status >= 500
                reason = "http_5xx" if reply.status >= 500 else "http_4xx"
                if not retryable:  # the server lives; the question is what it does not like
                    self.breaker.success()
                    return Answer(reason=reason, attempts=attempt + 1)
                self.breaker.failure()
                least = _retry_after(reply)
            if attempt < self.config.retries:
                most = min(self.config.backoff_s * 2**attempt, self.config.backoff_most_s)
                await asyncio.sleep(max(least, self._random.uniform(0.0, most)))
        return Answer(reason=reason, attempts=self.config.retries + 1)

    async def _request(self, body: bytes) -> Reply:
        self.figures.requests += 1
        try:
            return await post(self._url, body, self._headers, self.config.connect_s)
        except asyncio.CancelledError:  # the deadline
            self.figures.http["deadline"] += 1
            self.breaker.failure()
            raise

    def _read(self, question: Question, key: str, reply: Reply, latency_ms: float) -> Answer:
        """The answer in a 200 reply. A server that sends no chat completion counts as failing."""
        try:
            data = json.loads(reply.body)
            choice = data["choices"][0]
            raw, finish = choice["message"]["content"], choice.get("finish_reason") or "stop"
            if not isinstance(raw, str):
                raise TypeError("content is no text")
            top = _alternatives(choice) if question.logprobs else {}
            usage = data.get("usage") or {}
            tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            self.breaker.failure()
            return Answer(reason="parse")
        self.breaker.success()
        self.figures.tokens += sum(tokens)
        self.budget.spend(*tokens)
        if self.config.cache == "readwrite":
            self.cache.put(key, self.config, question, raw, finish, top, tokens, latency_ms)
        return _answer(question, raw, finish, top)


def _answer(question: Question, raw: str, finish: str, top: dict[str, float]) -> Answer:
    value, reason, rung = parse(question, raw, finish)
    return Answer(value, reason, rung, raw, top)


def _retry_after(reply: Reply) -> float:
    try:
        return max(0.0, float(reply.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0


def _alternatives(choice: dict[str, Any]) -> dict[str, float]:
    content = (choice.get("logprobs") or {}).get("content") or []
    return (
        {str(t["token"]).strip(): float(t["logprob"]) for t in reversed(content[0].get("top_logprobs") or [])}
        if content
        else {}
    )


def request_body(config: VlmConfig, question: Question) -> dict[str, Any]:
    """The chat completion request: fixed words first, so that a server's prefix cache helps."""
    content: list[dict[str, Any]] = []
    for part in question.content:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image_url", "image_url": {"url": data_url(part, config)}})
    body: dict[str, Any] = {
        "model": config.model, "temperature": 0, "seed": config.seed,
        "max_tokens": 4 if question.logprobs else config.max_tokens,
        "messages": [{"role": "system", "content": question.system}, {"role": "user", "content": content}],
    }  # fmt: skip
    if question.schema and config.schema:
        schema = {"name": question.schema_name, "strict": True, "schema": question.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if question.logprobs:
        body |= {"logprobs": True, "top_logprobs": 10}
    return body


def data_url(image: np.ndarray, config: VlmConfig) -> str:
    """A picture as a data URL, its short side at most ``short_side``. Raises ValueError when it is not (H, W, 3) uint8."""
    from PIL import Image

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture is {image.dtype} {image.shape}: accepted is uint8 (H, W, 3) RGB")
    picture = Image.fromarray(image)
    scale = config.short_side / min(picture.size)
    if scale < 1.0:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if config.image_format == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=config.jpeg_quality, subsampling=0)
    return f"data:image/{config.image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
