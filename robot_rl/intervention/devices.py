"""What a device says about the person who holds it, and how raw input becomes that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

STALE_S = 0.10
"""Older input is no input (MoveIt Servo's command time-out)."""
SLOW_STALE_S = 0.15
"""The same for input below ``SLOW_HZ``; never more."""
SLOW_HZ = 30.0


@dataclass(frozen=True)
class DeviceProfile:
    """How one kind of device is treated.

    Attributes:
        mode: ``rate`` (twists, increments) or ``absolute`` (positions; needs alignment before it may drive).
        deadman: drives only while a button is held.
        latch_s: a person stays in control so long after the last input; the robot is held meanwhile.
        stale_s: input older than this is no input; 0.02 to 0.15 s.
        clutch: an absolute device that is re-referenced where it engages instead of being aligned first.
    """

    mode: Literal["rate", "absolute"] = "rate"
    deadman: bool = True
    latch_s: float = 0.0
    stale_s: float = STALE_S
    clutch: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("rate", "absolute"):
            raise ValueError(f"DeviceProfile.mode={self.mode!r}: accepted are rate, absolute")
        if not 0.02 <= self.stale_s <= SLOW_STALE_S:
            raise ValueError(f"DeviceProfile.stale_s={self.stale_s}: accepted are 0.02 to {SLOW_STALE_S} s")
        if not 0.0 <= self.latch_s <= 1.0:
            raise ValueError(f"DeviceProfile.latch_s={self.latch_s}: accepted are 0 to 1 s")
        if self.clutch and self.mode != "absolute":
            raise ValueError("DeviceProfile.clutch=True with mode='rate': accepted with mode='absolute'")


PROFILES: Mapping[str, DeviceProfile] = {
    "joy": DeviceProfile("rate", deadman=True),
    "spacemouse": DeviceProfile("rate", deadman=False, latch_s=0.5),
    "leader": DeviceProfile("absolute", deadman=False, latch_s=0.5),
    "keyboard": DeviceProfile("rate", deadman=False),
    "console": DeviceProfile("rate", deadman=True),
    "replay": DeviceProfile("absolute", deadman=False),
}
"""One for each device of the intervention node."""


def profile(device: str, latch_s: float = -1.0, stale_s: float = STALE_S) -> DeviceProfile:
    """The profile of a device; a negative ``latch_s`` keeps the device's own.

    Raises:
        ValueError: no such device.
    """
    if device not in PROFILES:
        raise ValueError(f"device={device!r}: accepted are {', '.join(PROFILES)}")
    found = replace(PROFILES[device], stale_s=stale_s)
    return found if latch_s < 0.0 else replace(found, latch_s=latch_s)


@dataclass(frozen=True)
class DeviceSample:
    """One atomic reading: events and motion of the same instant come together.

    Attributes:
        received_ns: on the clock of the control loop; freshness is judged by it alone.
        stamp_ns: on the device's clock; recorded.
        engaged: the person wants control now (button held, motion past the dead-band, toggled on and aligned).
        deadman: the hold button is down.
        action: (A,) in the robot's action space, physical units; None when there is nothing to drive with.
        neutral: nothing is pressed or deflected.
    """

    received_ns: int
    stamp_ns: int = 0
    device: str = "joy"
    profile: DeviceProfile = PROFILES["joy"]
    engaged: bool = False
    deadman: bool = False
    action: np.ndarray | None = None
    neutral: bool = True
    operator: str = ""

    @property
    def wants(self) -> bool:
        return self.engaged and (self.deadman or not self.profile.deadman)

    def fresh(self, now_ns: int) -> bool:
        """Neither older than ``stale_s`` nor from the future by as much (a clock that jumped)."""
        return abs(now_ns - self.received_ns) <= int(self.profile.stale_s * 1e9)


class Hysteresis:
    """Motion past a threshold engages, motion below half of it releases."""

    def __init__(self, threshold: float = 0.1) -> None:
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"deadband={threshold}: accepted are numbers from 0 to below 1")
        self.threshold, self.engaged = threshold, False

    def __call__(self, norm: float) -> bool:
        self.engaged = norm > (0.5 * self.threshold if self.engaged else self.threshold)
        return self.engaged


def deflection(axes: Sequence[float], deadband: float) -> np.ndarray:
    """Axes in [-1, 1] without their dead-band, continuous at its edge.

    Raises:
        ValueError: an axis is not finite.
    """
    values = np.asarray(axes, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"axes={values.tolist()}: accepted are finite numbers")
    values = np.clip(values, -1.0, 1.0)
    size = np.abs(values)
    return np.where(size <= deadband, 0.0, np.sign(values) * (size - deadband) / (1.0 - deadband))


class RateMeter:
    """How often input arrives, and how long one may wait for it before the person counts as gone."""

    def __init__(self, window: int = 20) -> None:
        self._stamps: list[int] = []
        self._window = window

    def tick(self, now_ns: int) -> None:
        self._stamps = [*self._stamps[-self._window :], now_ns]

    @property
    def hz(self) -> float:
        """0 before two messages arrived."""
        span = self._stamps[-1] - self._stamps[0] if len(self._stamps) > 1 else 0
        return (len(self._stamps) - 1) * 1e9 / span if span else 0.0

    @property
    def slow(self) -> bool:
        """Below 30 Hz, where two messages fit into the usual limit and one lost message would hold the robot."""
        return 0.0 < self.hz < SLOW_HZ

    @property
    def stale_s(self) -> float:
        return SLOW_STALE_S if self.slow else STALE_S


def joint_gap(leader: Mapping[str, float], follower: Mapping[str, float]) -> tuple[float, str]:
    """The largest distance between two arms and the joint it is at.

    Raises:
        ValueError: the leader lacks a joint of the follower; both sets of names are in the message.
    """
    missing = sorted(set(follower) - set(leader))
    if missing:
        raise ValueError(f"leader lacks joints {missing}; it has {sorted(leader)}, the follower {sorted(follower)}")
    gaps = {name: abs(leader[name] - value) for name, value in follower.items()}
    name = max(gaps, key=lambda n: gaps[n])
    return gaps[name], name


def align_step(leader: Mapping[str, float], follower: Mapping[str, float], left_s: float, period_s: float) -> dict[str, float]:
    """The next increment that brings an actuated leader to the follower within ``left_s``; call it once a tick."""
    share = 1.0 if left_s <= period_s else period_s / left_s
    return {name: leader[name] + share * (value - leader[name]) for name, value in follower.items()}
