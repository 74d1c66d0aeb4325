"""LeRobot's teleoperators as devices, through their own API: a leader arm (SO-101, Koch, GELLO ports) or a gamepad.

A teleoperator is described by a YAML file::

    type: so101_leader            # LeRobot's name of it
    options: {port: /dev/ttyACM0, id: left, use_degrees: true}
    joints:                       # a leader: robot joint to the teleoperator's key; value * scale + offset is in rad (or m)
      shoulder_pan: {key: shoulder_pan.pos, scale: 0.0174533}
    # axes: {delta_x: x, delta_y: y, delta_z: z}      instead of joints, for a teleoperator that gives deltas in [-1, 1]

Every key of the teleoperator's action must be named here or under ``ignore``: an unknown one is an error, never zeros.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from robot_rl.intervention.teleop import Gamepad, Leader

AXES = ("x", "y", "z", "roll", "pitch", "yaw")
DEADMAN, SUCCESS, FAILURE, GRIPPER = 5, 0, 1, 2
RATE_HZ = 60.0
MODULES = {"so100_leader": "so_leader", "so101_leader": "so_leader"}


@dataclass(frozen=True)
class JointMap:
    """One joint of the robot out of one value of the teleoperator."""

    key: str
    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not isfinite(self.scale) or self.scale == 0.0 or not isfinite(self.offset):
            raise ValueError(
                f"joints.{self.key}: scale={self.scale}, offset={self.offset}: accepted are finite numbers, scale not 0"
            )


@dataclass(frozen=True)
class LeRobotConfig:
    """See the module. Either ``joints`` (a leader) or ``axes`` (a gamepad) is given."""

    type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    joints: Mapping[str, JointMap] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.joints) == bool(self.axes):
            raise ValueError(f"teleoperator {self.type!r}: accepted are either joints (a leader) or axes (a gamepad)")
        if wrong := sorted(set(self.axes.values()) - set(AXES)):
            raise ValueError(f"axes={wrong}: accepted are {', '.join(AXES)}")

    @property
    def keys(self) -> set[str]:
        return {j.key for j in self.joints.values()} | set(self.axes)

    @classmethod
    def load(cls, path: str | Path) -> LeRobotConfig:
        """Raises ValueError for unknown keys and values, with what is accepted."""
        import yaml

        data = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("type"), str):
            raise ValueError(f"{path}: accepted is a mapping with type, and joints or axes")
        if more := sorted(set(data) - {"type", "options", "joints", "axes", "ignore"}):
            raise ValueError(f"{path}: unknown keys {', '.join(more)}; accepted are type, options, joints, axes, ignore")
        try:
            joints = {name: JointMap(**given) for name, given in (data.get("joints") or {}).items()}
        except TypeError as error:
            raise ValueError(f"{path}: joints: {error}; accepted are key, scale, offset") from None
        return cls(data["type"], data.get("options") or {}, joints, data.get("axes") or {}, tuple(data.get("ignore") or ()))


def make_teleoperator(config: LeRobotConfig) -> Any:
    """LeRobot's own object, not connected yet.

    Raises:
        ImportError: LeRobot is not installed.
        ValueError: it has no such teleoperator, or other options.
    """
    import importlib

    try:
        from lerobot.teleoperators.config import TeleoperatorConfig
        from lerobot.teleoperators.utils import make_teleoperator_from_config
    except ImportError as error:
        raise ImportError(
            "LeRobot teleoperators need lerobot: python -m pip install 'lerobot>=0.4.4'", name="lerobot"
        ) from error
    module = MODULES.get(config.type, config.type.removesuffix("_ee"))
    try:
        importlib.import_module(f"lerobot.teleoperators.{module}")
        kind = TeleoperatorConfig.get_choice_class(config.type)
        return make_teleoperator_from_config(kind(**config.options))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lerobot"):
            raise ValueError(f"teleoperator type={config.type!r}: LeRobot has none of that name") from error
        raise ImportError(
            f"teleoperator type={config.type!r} needs {error.name}: install LeRobot's extra for its motors", name=error.name
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"teleoperator type={config.type!r} options={dict(config.options)}: {error}") from error


class LeRobotReader:
    """Feeds a :class:`Leader` or a :class:`Gamepad` from a teleoperator, in a thread of its own (reading one takes milliseconds).

    A reading that fails or lacks a key is no input: the device goes stale and the robot holds. ``problem`` says why.

    Raises:
        ValueError: the teleoperator gives other keys than the configuration names.
        ConnectionError, OSError: it cannot be connected.
    """

    def __init__(
        self, config: LeRobotConfig, device: Leader | Gamepad, teleoperator: Any = None, *,
        clock: Callable[[], int] = time.monotonic_ns, rate_hz: float = RATE_HZ,
    ) -> None:  # fmt: skip
        if isinstance(device, Leader) != bool(config.joints):
            raise ValueError(
                f"device {device.name!r} with {'joints' if config.joints else 'axes'}: joints are a leader's, axes a gamepad's"
            )
        self.config, self.device, self._clock, self._period = config, device, clock, 1.0 / rate_hz
        self.teleoperator = teleoperator if teleoperator is not None else make_teleoperator(config)
        self.problem = ""
        self._engaged = False
        self.teleoperator.connect()
        try:
            self.read()
        except BaseException:
            self.teleoperator.disconnect()
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lerobot", daemon=True)
        self._thread.start()

    def read(self) -> None:
        """One reading to the device. Raises ValueError for keys or values that are not as configured."""
        action = dict(self.teleoperator.get_action())
        gripper = action.pop("gripper", None) if self.config.axes else None
        if missing := sorted(self.config.keys - set(action)):
            raise ValueError(
                f"teleoperator {self.config.type!r} gives no {', '.join(missing)}; it gives {', '.join(sorted(action))}"
            )
        if more := sorted(set(action) - self.config.keys - set(self.config.ignore)):
            raise ValueError(
                f"teleoperator {self.config.type!r} gives {', '.join(more)} too: name them in joints, axes or ignore"
            )
        events = self._events()
        now = self._clock()
        if isinstance(self.device, Leader):
            joints = {n: float(action[j.key]) * j.scale + j.offset for n, j in self.config.joints.items()}
            engaged = bool(events.get("is_intervention", self._engaged))
            if "is_intervention" in events and engaged != self._engaged:
                self.device.toggled = self._engaged = engaged
            self.device.feed(joints, now)
            return
        axes = [0.0] * len(AXES)
        for key, axis in self.config.axes.items():
            axes[AXES.index(axis)] = float(action[key])
        buttons = [0] * (DEADMAN + 1)
        buttons[DEADMAN] = int(bool(events.get("is_intervention")))
        buttons[SUCCESS], buttons[FAILURE] = int(bool(events.get("success"))), int(bool(events.get("failure")))
        # LeRobot's gamepad says 0 close, 1 stay, 2 open.
        if gripper is not None and float(gripper) != 1.0:
            self.device.set_gripper(open_=float(gripper) > 1.0)
        self.device.feed(axes, buttons, now)

    def _events(self) -> dict[str, Any]:
        asked = getattr(self.teleoperator, "get_teleop_events", None)
        return {} if asked is None else {getattr(k, "value", k): v for k, v in asked().items()}

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            try:
                self.read()
                self.problem = ""
            except Exception as error:  # whatever a driver raises: no input, and the robot holds
                self.problem = f"{type(error).__name__}: {error}"

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2.0)
        self.teleoperator.disconnect()
