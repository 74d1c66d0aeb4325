"""Raw device input to what a person wants, without ROS: gamepad, SpaceMouse, leader arm, terminal keyboard.

Every device gives one atomic :class:`Reading` a tick; presses are delivered once.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from robot_rl.intervention.devices import DeviceProfile, Hysteresis, RateMeter, deflection, profile

PRESSES = ("success", "failure", "estop", "release")


@dataclass(frozen=True)
class Reading:
    """One instant of a device.

    Attributes:
        twist: (6,) linear and angular velocity as shares of full speed, or None for a device that gives joints.
        joints: position by joint name, or None.
        gripper_open: wanted state of the gripper, or None to leave it.
        presses: of :data:`PRESSES`, since the last reading.
        received_ns: when the newest input arrived; ``stamp_ns`` is the device's own time.
    """

    received_ns: int
    stamp_ns: int = 0
    engaged: bool = False
    deadman: bool = False
    neutral: bool = True
    twist: np.ndarray | None = None
    joints: Mapping[str, float] | None = None
    gripper_open: bool | None = None
    presses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Buttons:
    """Which button does what."""

    deadman: int = 5
    success: int = 0
    failure: int = 1
    estop: int = 8
    gripper: int = 2


@dataclass
class TeleopDevice:
    """What all devices share. ``profile_`` says how the arbiter treats it."""

    name: str
    deadband: float = 0.1
    latch_s: float = -1.0
    meter: RateMeter = field(default_factory=RateMeter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._presses: list[str] = []
        self._gripper: bool | None = None
        self._received = self._stamp = 0

    @property
    def profile(self) -> DeviceProfile:
        return profile(self.name, self.latch_s, self.meter.stale_s)

    def _arrived(self, now_ns: int, stamp_ns: int) -> None:
        self.meter.tick(now_ns)
        self._received, self._stamp = now_ns, stamp_ns

    def _taken(self) -> tuple[str, ...]:
        presses, self._presses = tuple(self._presses), []
        return presses

    def present(self, now_ns: int) -> bool:
        """Whether anything arrived within the last second."""
        return bool(self._received) and now_ns - self._received < 1_000_000_000

    def poll(self, now_ns: int) -> Reading:
        raise NotImplementedError


class Gamepad(TeleopDevice):
    """Sticks to a twist, one button to hold, buttons for the rest. Also what a browser console sends.

    ``axes`` are those of x, y, z, roll, pitch, yaw in the message; -1 for none.
    """

    def __init__(
        self, name: str = "joy", buttons: Buttons | None = None, axes: Sequence[int] = (1, 0, 4, -1, -1, 3), **more: Any
    ):
        super().__init__(name, **more)
        self.buttons, self.axes = buttons or Buttons(), tuple(axes)
        self._down: set[int] = set()
        self._twist = np.zeros(6)

    def feed(self, axes: Sequence[float], pressed: Sequence[int], now_ns: int, stamp_ns: int = 0) -> bool:
        """A message of the device; True when a button went down or up. Raises ValueError for axes that are not finite."""
        moved = deflection(axes, self.deadband)
        twist = np.array([moved[i] if 0 <= i < len(moved) else 0.0 for i in self.axes])
        down = {i for i, b in enumerate(pressed) if b}
        with self._lock:
            fresh, changed = down - self._down, down != self._down
            self._down, self._twist = down, twist
            self._arrived(now_ns, stamp_ns)
            for word in ("success", "failure", "estop"):
                if getattr(self.buttons, word) in fresh:
                    self._presses.append(word)
            if self.buttons.gripper in fresh:
                self._gripper = not self._gripper if self._gripper is not None else False
        return changed

    def set_gripper(self, *, open_: bool) -> None:
        """For a device that says which way, instead of toggling."""
        with self._lock:
            self._gripper = open_

    def poll(self, now_ns: int) -> Reading:
        with self._lock:
            held = self.buttons.deadman in self._down
            fresh = now_ns - self._received <= int(self.profile.stale_s * 1e9)
            return Reading(
                self._received, self._stamp, held and fresh, held and fresh, not self._down and not self._twist.any(),
                self._twist.copy(), gripper_open=self._gripper, presses=self._taken(),
            )  # fmt: skip


class SpaceMouse(TeleopDevice):
    """Motion past the dead-band engages. A device that only ever says zero fails its self-test."""

    def __init__(self, name: str = "spacemouse", **more: Any) -> None:
        super().__init__(name, **more)
        self._twist = np.zeros(6)
        self._engage = Hysteresis(self.deadband)
        self.ever_moved = False

    def feed(self, twist: Sequence[float], now_ns: int, stamp_ns: int = 0) -> None:
        moved = deflection(twist, 0.0)
        if moved.shape != (6,):
            raise ValueError(f"{moved.shape[0]} axes: accepted are 6")
        with self._lock:
            self._twist = moved
            self._engage(float(np.abs(moved).max()))
            self.ever_moved |= bool(np.abs(moved).max() > 0)
            self._arrived(now_ns, stamp_ns)

    def press(self, word: str) -> None:
        with self._lock:
            if word == "gripper":
                self._gripper = not self._gripper if self._gripper is not None else False
            else:
                self._presses.append(word)

    def poll(self, now_ns: int) -> Reading:
        with self._lock:
            fresh = now_ns - self._received <= int(self.profile.stale_s * 1e9)
            engaged = fresh and self._engage.engaged
            return Reading(
                self._received, self._stamp, engaged, False, not self._engage.engaged, self._twist.copy(),
                gripper_open=self._gripper, presses=self._taken(),
            )  # fmt: skip


class Leader(TeleopDevice):
    """A leader arm: absolute joints by name; engaged by toggle (a service, a pedal)."""

    def __init__(self, name: str = "leader", **more: Any) -> None:
        super().__init__(name, **more)
        self._joints: dict[str, float] = {}
        self.toggled = False

    def feed(self, joints: Mapping[str, float], now_ns: int, stamp_ns: int = 0) -> None:
        if not np.isfinite(list(joints.values())).all():
            raise ValueError(f"joints {dict(joints)}: accepted are finite positions")
        with self._lock:
            self._joints = dict(joints)
            self._arrived(now_ns, stamp_ns)

    def poll(self, now_ns: int) -> Reading:
        with self._lock:
            fresh = now_ns - self._received <= int(self.profile.stale_s * 1e9)
            engaged = self.toggled and fresh
            return Reading(
                self._received, self._stamp, engaged, False, not self.toggled, joints=dict(self._joints) or None,
                presses=self._taken(),
            )  # fmt: skip


class Keyboard(TeleopDevice):
    """A terminal: space toggles control, keys move in steps. There is no key-up on a terminal, so it lets go after 1 s.

    w/s forward and back, a/d left and right, r/f up and down, q/e turn, g gripper, y success, n failure, x e-stop.
    """

    KEYS: ClassVar[dict[str, tuple[int, float]]] = {
        "w": (0, 1.0),
        "s": (0, -1.0),
        "a": (1, 1.0),
        "d": (1, -1.0),
        "r": (2, 1.0),
        "f": (2, -1.0),
        "q": (5, 1.0),
        "e": (5, -1.0),
    }
    RELEASE_S = 1.0
    STEP_S = 0.15
    DEBOUNCE_S = 0.2

    def __init__(self, name: str = "keyboard", **more: Any) -> None:
        super().__init__(name, **more)
        self.on = False
        self._moves: dict[int, tuple[float, int]] = {}
        self._last: dict[str, int] = {}

    def feed(self, key: str, now_ns: int) -> None:
        with self._lock:
            repeated = now_ns - self._last.get(key, -(10**18)) < int(self.DEBOUNCE_S * 1e9)
            self._last[key] = now_ns
            self._arrived(now_ns, now_ns)
            if key in self.KEYS:
                axis, sign = self.KEYS[key]
                self._moves[axis] = (sign, now_ns)
            elif not repeated and key == " ":
                self.on = not self.on
            elif not repeated and key == "g":
                self._gripper = not self._gripper if self._gripper is not None else False
            elif not repeated and key in "ynx" and key:
                self._presses.append({"y": "success", "n": "failure", "x": "estop"}[key])

    def poll(self, now_ns: int) -> Reading:
        with self._lock:
            if self.on and now_ns - self._received > int(self.RELEASE_S * 1e9):
                self.on = False
            twist = np.zeros(6)
            for axis, (sign, at) in self._moves.items():
                if now_ns - at <= int(self.STEP_S * 1e9):
                    twist[axis] = sign
            # The terminal itself is the heartbeat: it is alive as long as this process reads it.
            return Reading(
                now_ns, self._received, self.on, False, not self.on, twist, gripper_open=self._gripper, presses=self._taken(),
            )  # fmt: skip


class TerminalReader:
    """Feeds a :class:`Keyboard` from a terminal in raw mode, which it puts back when closed.

    Raises:
        OSError: the input is no terminal.
    """

    def __init__(self, keyboard: Keyboard, clock: Any = time.monotonic_ns, stream: Any = None) -> None:
        import termios
        import tty

        self._fd = (stream or sys.stdin).fileno()
        if not os.isatty(self._fd):
            raise OSError("devices=['keyboard']: the input is no terminal; start the node in one, or choose another device")
        self._before = termios.tcgetattr(self._fd)
        tty.setcbreak(self._fd)
        self._keyboard, self._clock, self._stop = keyboard, clock, threading.Event()
        self._thread = threading.Thread(target=self._read, name="keyboard", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._stop.is_set():
            if select.select([self._fd], [], [], 0.1)[0]:
                for key in os.read(self._fd, 64).decode(errors="ignore"):
                    self._keyboard.feed(key.lower(), self._clock())

    def close(self) -> None:
        import termios

        self._stop.set()
        self._thread.join(1.0)
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
