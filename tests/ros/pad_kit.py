"""A person at a gamepad: what its driver publishes, at once when something changes and 50 times a second else."""

from __future__ import annotations

import threading
import time
from typing import Any

from fault_watch import Watch
from sensor_msgs.msg import Joy

from robot_rl.ros import qos
from robot_rl.ros.conversion import to_stamp
from robot_rl.ros.graph_names import JOY

DEADMAN, GRIPPER = 5, 2
X, Y, Z = 1, 0, 4
"""Which axis of the pad moves the hand along which axis."""


class Pad:
    """A context manager; whatever its methods do is on its way when they return, and they give the wall clock (ns) right before.

    Args:
        hz: how often a driver repeats itself.
    """

    def __init__(self, watch: Watch, hz: float = 50.0) -> None:
        self._watch, self._period = watch, 1.0 / hz
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._axes, self._down = [0.0] * 6, set[int]()
        self._silent = False

    def __enter__(self) -> Pad:
        self._joy = self._watch.node.create_publisher(Joy, f"{self._watch.prefix}/{JOY}", qos.COMMAND)
        self._thread = threading.Thread(target=self._repeat, name="pad", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(1.0)
        self._watch.node.destroy_publisher(self._joy)

    def drive(self, x: float, y: float, z: float, *, gripper: bool = False) -> int:
        """Hold the dead-man button and deflect the sticks, each from -1 to 1."""
        with self._lock:
            self._axes[X], self._axes[Y], self._axes[Z] = x, y, z
            self._down = {DEADMAN, GRIPPER} if gripper else {DEADMAN}
            return self._say()

    def release(self) -> int:
        with self._lock:
            self._axes, self._down = [0.0] * 6, set()
            return self._say()

    def silence(self, on: bool) -> int:
        """Nothing comes from the pad any more (unplugged, out of battery), or it is back with whatever is held on it."""
        with self._lock:
            now, self._silent = time.time_ns(), on
            return now if on else self._say()

    def _say(self) -> int:
        now = time.time_ns()
        if not self._silent:
            message = Joy(axes=self._axes, buttons=[int(k in self._down) for k in range(12)])
            message.header.stamp = to_stamp(now)
            self._joy.publish(message)
        return now

    def _repeat(self) -> None:
        while not self._stop.wait(self._period):
            with self._lock:
                self._say()
