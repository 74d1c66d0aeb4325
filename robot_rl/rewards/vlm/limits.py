"""What keeps a model server from costing more, or being asked oftener, than somebody said: budget, rate, circuit breaker."""

from __future__ import annotations

import datetime
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from robot_rl.rewards.vlm.config import VlmConfig

Clock = Callable[[], float]


class Budget:
    """Requests, tokens and money of a day, kept in SQLite: restarts and several processes share one count.

    A request is taken before it is sent, in one transaction, so the day's count can never pass the limit. Tokens and money are
    known afterwards: the request that crosses their limit is the last.
    """

    def __init__(self, config: VlmConfig, database: sqlite3.Connection, now: Clock = time.time) -> None:
        self.config, self._db, self._now = config, database, now
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS budget (day TEXT, model TEXT, requests INTEGER, tokens INTEGER, money REAL, "
                "PRIMARY KEY (day, model))"
            )

    @property
    def day(self) -> str:
        moment = datetime.datetime.fromtimestamp(self._now(), datetime.timezone.utc)
        return str((moment - datetime.timedelta(hours=self.config.reset_hour)).date())

    def take(self) -> bool:
        """Count one request; False when the day's budget is used up."""
        c = self.config
        key = (self.day, c.model_id)
        with self._db:
            self._db.execute("INSERT OR IGNORE INTO budget VALUES (?, ?, 0, 0, 0)", key)
            done = self._db.execute(
                "UPDATE budget SET requests = requests + 1 WHERE day = ? AND model = ? AND requests < ? AND tokens < ? "
                "AND (money < ? OR ?)",
                (*key, c.requests_per_day, c.tokens_per_day, c.money_per_day, not (c.price_in or c.price_out)),
            )
        return done.rowcount == 1

    def give_back(self) -> None:
        """A request that was taken could not be sent: no connection was made."""
        with self._db:
            self._db.execute(
                "UPDATE budget SET requests = requests - 1 WHERE day = ? AND model = ? AND requests > 0",
                (self.day, self.config.model_id),
            )

    def spend(self, tokens_in: int, tokens_out: int) -> None:
        money = (tokens_in * self.config.price_in + tokens_out * self.config.price_out) / 1e6
        with self._db:
            self._db.execute(
                "UPDATE budget SET tokens = tokens + ?, money = money + ? WHERE day = ? AND model = ?",
                (tokens_in + tokens_out, money, self.day, self.config.model_id),
            )

    def spent(self) -> tuple[int, int, float]:
        """Requests, tokens and money of today."""
        row = self._db.execute(
            "SELECT requests, tokens, money FROM budget WHERE day = ? AND model = ?", (self.day, self.config.model_id)
        ).fetchone()
        return (int(row[0]), int(row[1]), float(row[2])) if row else (0, 0, 0.0)


class TokenBucket:
    """At most ``rate`` starts a second on average, at most one second's worth at once."""

    def __init__(self, rate: float, clock: Clock = time.monotonic) -> None:
        self.rate, self._clock = rate, clock
        self._tokens, self._at = max(1.0, rate), clock()

    def wait(self) -> float:
        """Take a token; gives how many seconds to wait before using it."""
        if self.rate <= 0:
            return 0.0
        now = self._clock()
        self._tokens = min(max(1.0, self.rate), self._tokens + (now - self._at) * self.rate)
        self._at = now
        self._tokens -= 1.0
        return max(0.0, -self._tokens / self.rate)


class Breaker:
    """Stops asking a server that fails, then lets one probe through."""

    RECENT = 20

    def __init__(self, after: int, share: float, open_s: float, clock: Clock = time.monotonic) -> None:
        self.after, self.share, self.open_s, self._clock = after, share, open_s, clock
        self.state: Literal["closed", "open", "probing"] = "closed"
        self.opened = 0
        self._row = 0
        self._recent: deque[bool] = deque(maxlen=self.RECENT)
        self._until = 0.0

    def allows(self) -> bool:
        """Whether a request may be sent now. After the pause exactly one may, until its outcome is known."""
        if self.state == "open" and self._clock() >= self._until:
            self.state = "probing"
            return True
        return self.state == "closed"

    def success(self) -> None:
        if self.state == "probing":
            self.state = "closed"
            self._recent.clear()
        if self.state == "closed":
            self._row = 0
            self._recent.append(True)

    def failure(self) -> None:
        if self.state == "open":  # sent before it opened
            return
        self._row += 1
        self._recent.append(False)
        many = len(self._recent) == self.RECENT and self._recent.count(False) >= self.share * self.RECENT
        if self.state == "probing" or self._row >= self.after or many:
            self.state, self._until = "open", self._clock() + self.open_s
            self.opened += 1
            self._row = 0
            self._recent.clear()

    def abandon(self) -> None:
        """A probe ended without telling anything about the server."""
        if self.state == "probing":
            self.state, self._until = "open", self._clock()
