"""A recorded operator: what a gamepad said in a bag, played again at its own pace. For tests and studies, where the same person must act twice."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from robot_rl.intervention.teleop import Gamepad

JOY_TYPE = "sensor_msgs/msg/Joy"


@dataclass(frozen=True)
class Tape:
    """Messages of one gamepad.

    Attributes:
        times_ns: since the first message, rising.
        axes, buttons: of each message.
    """

    times_ns: tuple[int, ...]
    axes: tuple[tuple[float, ...], ...]
    buttons: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str], topic: str = "/joy") -> Tape:
        """From an MCAP file (``ros2 bag record``).

        Raises:
            ValueError: no such file, or it has no gamepad of that name.
        """
        from robot_rl.replay.importers.mcap import Bag

        path = Path(path)
        if not path.is_file():
            raise ValueError(f"replay_bag={str(path)!r}: accepted is an MCAP file")
        bag = Bag(path)
        pads = sorted(t for t, kind in bag.topics.items() if kind == JOY_TYPE)
        if topic not in pads:
            raise ValueError(f"replay_topic={topic!r}: {path.name} has {', '.join(pads) or 'no topic'} of type {JOY_TYPE}")
        found = [(at, m) for _, at, m in bag.messages([topic])]
        if not found:
            raise ValueError(f"replay_topic={topic!r}: {path.name} has no message of it")
        first = found[0][0]
        return cls(
            tuple(at - first for at, _ in found),
            tuple(tuple(float(a) for a in m.axes) for _, m in found),
            tuple(tuple(int(b) for b in m.buttons) for _, m in found),
        )


class TapePlayer:
    """Feeds a :class:`Gamepad` from a tape, from its beginning at every :meth:`start`. At the tape's end the person lets go."""

    def __init__(self, tape: Tape, pad: Gamepad) -> None:
        self.tape, self.pad = tape, pad
        self._began: int | None = None
        self._next = 0

    @property
    def playing(self) -> bool:
        return self._began is not None

    def start(self, now_ns: int) -> None:
        self._began, self._next = now_ns, 0

    def stop(self, now_ns: int) -> None:
        """Let go, whatever the tape had held."""
        if self._began is not None:
            self._began = None
            self.pad.feed([0.0] * len(self.tape.axes[-1]), [0] * len(self.tape.buttons[-1]), now_ns, now_ns)

    def feed(self, now_ns: int) -> None:
        """Pass on what is due; call it as often as the device is polled."""
        if self._began is None:
            return
        while self._next < len(self.tape.times_ns) and self.tape.times_ns[self._next] <= now_ns - self._began:
            self.pad.feed(self.tape.axes[self._next], self.tape.buttons[self._next], now_ns, now_ns)
            self._next += 1
        if self._next == len(self.tape.times_ns):
            self.stop(now_ns)
