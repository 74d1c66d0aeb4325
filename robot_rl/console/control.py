"""Who is in control: one seat, bound to one connection, kept by fresh messages only.

Pure bookkeeping on a given clock, so that races, replays and losses can be tested without a socket. Nothing here moves a robot:
what :meth:`Desk.drive` lets through is a device's sample, which still has arbiter, safety filter and guard ahead of it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from robot_rl.console.messages import COMMANDS, Ask, Drive

S = 1_000_000_000


@dataclass(frozen=True)
class DeskConfig:
    """Attributes:
    seat_s: without a message for so long the seat is free again; motion has ended long before (the device is stale after 0.1 s).
    round_trip_s: a command whose page has not seen a tick of the server for so long comes from the past: it does not move.
    rate, burst: messages a second a connection may send, and how many at once.
    asks: how many request ids are remembered against replays.
    strikes: so many refused messages end a connection.
    """

    seat_s: float = 2.0
    round_trip_s: float = 0.4
    rate: float = 150.0
    burst: float = 60.0
    asks: int = 20_000
    strikes: int = 50

    def __post_init__(self) -> None:
        for name, low, high in (("seat_s", 0.2, 60.0), ("round_trip_s", 0.05, 2.0), ("rate", 10.0, 1000.0)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"DeskConfig.{name}={value}: accepted are numbers from {low} to {high}")


class Refused(Exception):
    """A request that is not granted; the text is for the person."""


@dataclass
class _Connection:
    name: str
    seq: int = -1
    allowance: float = 0.0
    filled_ns: int = 0
    heard_ns: int = 0
    strikes: int = 0


@dataclass
class DeskCounts:
    """For diagnostics and tests."""

    taken: int = 0
    lost: int = 0
    replayed: int = 0
    late: int = 0
    without_seat: int = 0
    too_many: int = 0
    malformed: int = 0


@dataclass(frozen=True)
class Seat:
    """Who holds the seat; ``driving`` while the dead-man is held."""

    connection: int
    name: str
    since_ns: int
    driving: bool = False


@dataclass
class Desk:
    """The one seat, and what each connection may do. Every method takes the present (monotonic ns); any thread."""

    config: DeskConfig = field(default_factory=DeskConfig)

    def __post_init__(self) -> None:
        self._guard = threading.RLock()
        self._connections: dict[int, _Connection] = {}
        self._asked: OrderedDict[str, None] = OrderedDict()
        self._next = 1
        self._seat: Seat | None = None
        self.counts = DeskCounts()

    # ---- connections

    def join(self, name: str, now_ns: int) -> int:
        """A page is there; its number, which is never used again."""
        with self._guard:
            number, self._next = self._next, self._next + 1
            self._connections[number] = _Connection(name, allowance=self.config.burst, filled_ns=now_ns, heard_ns=now_ns)
            return number

    def part(self, number: int) -> bool:
        """A page is gone; True when it had the seat."""
        with self._guard:
            self._connections.pop(number, None)
            return self._free(number, lost=True)

    @property
    def watchers(self) -> int:
        with self._guard:
            return len(self._connections)

    @property
    def seat(self) -> Seat | None:
        with self._guard:
            return self._seat

    def holds(self, number: int) -> bool:
        with self._guard:
            return self._seat is not None and self._seat.connection == number

    def name(self, number: int) -> str:
        """What the person at a connection calls themselves; ``page <n>`` before they said."""
        with self._guard:
            c = self._connections.get(number)
            return c.name if c is not None else "page"

    def admit(self, number: int, now_ns: int) -> bool:
        """Whether a connection may send one more message now (a token bucket)."""
        with self._guard:
            c = self._connections.get(number)
            if c is None:
                return False
            earned = max(now_ns - c.filled_ns, 0) / S * self.config.rate
            c.allowance, c.filled_ns = min(c.allowance + earned, self.config.burst), now_ns
            if c.allowance < 1.0:
                self.counts.too_many += 1
                return False
            c.allowance -= 1.0
            return True

    def malformed(self, number: int) -> bool:
        """Count a refused message; True when the connection has to end."""
        with self._guard:
            self.counts.malformed += 1
            c = self._connections.get(number)
            if c is None:
                return True
            c.strikes += 1
            return c.strikes >= self.config.strikes

    # ---- the seat

    def take(self, number: int, name: str, now_ns: int) -> Seat:
        """Sit down under a name. Raises Refused while somebody else is there and alive."""
        with self._guard:
            self.sweep(now_ns)
            c = self._connections.get(number)
            if c is None:
                raise Refused("this connection is closed")
            if self._seat is not None and self._seat.connection != number:
                raise Refused(f"{self._seat.name} is in control")
            c.name = name.strip() or c.name
            if self._seat is None:
                self._seat = Seat(number, c.name, now_ns)
                self.counts.taken += 1
                c.heard_ns = now_ns
            return self._seat

    def leave(self, number: int) -> bool:
        """Stand up; True when this connection had the seat."""
        with self._guard:
            return self._free(number, lost=False)

    def sweep(self, now_ns: int) -> int | None:
        """Free a seat nobody has been heard from; the number of the connection that lost it."""
        with self._guard:
            seat = self._seat
            if seat is None:
                return None
            c = self._connections.get(seat.connection)
            if c is not None and now_ns - c.heard_ns <= int(self.config.seat_s * S):
                return None
            self._free(seat.connection, lost=True)
            return seat.connection

    def _free(self, number: int, *, lost: bool) -> bool:
        if self._seat is None or self._seat.connection != number:
            return False
        self._seat = None
        self.counts.lost += int(lost)
        return True

    # ---- what may pass

    def drive(self, number: int, drive: Drive, now_ns: int) -> Drive | None:
        """The sample to hand to the device, or None: nothing then reaches the robot, and silence means hold.

        A page without the seat, a number that does not rise and a page that has not seen the server for too long are no input.
        """
        with self._guard:
            c = self._connections.get(number)
            if c is None:
                return None
            if drive.seq <= c.seq:
                self.counts.replayed += 1
                return None
            c.seq = drive.seq
            if not self.holds(number):
                self.counts.without_seat += int(drive.held)
                return None
            age = now_ns - drive.echo
            if not 0 <= age <= int(self.config.round_trip_s * S):
                self.counts.late += 1
                return None
            c.heard_ns = now_ns
            assert self._seat is not None
            if self._seat.driving != drive.held:
                self._seat = Seat(number, self._seat.name, self._seat.since_ns, drive.held)
            return drive

    def allow(self, number: int, ask: Ask, now_ns: int) -> None:
        """Whether a request may be carried out.

        Raises:
            Refused: it was made before, or needs the seat that somebody else (or nobody) has.
        """
        with self._guard:
            if number not in self._connections:
                raise Refused("this connection is closed")
            if ask.id in self._asked:
                self.counts.replayed += 1
                raise Refused("this request was made before")
            self._asked[ask.id] = None
            while len(self._asked) > self.config.asks:
                self._asked.popitem(last=False)
            self.sweep(now_ns)
            if COMMANDS[ask.name].who == "operator" and not self.holds(number):
                self.counts.without_seat += 1
                seat = self._seat
                raise Refused(f"{seat.name} is in control" if seat else "take the controls first")
