"""What a page may say, strictly: one JSON object a message, known keys only, every number finite and within its range.

A message that is not one of these is refused with a sentence; nothing of it is used. Limits of size are checked before parsing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from types import MappingProxyType
from typing import Any, Literal

MAX_BYTES = 8192
MAX_TOOK_MS = 1e6
AXES = ("x", "y", "z", "roll", "pitch", "yaw")
_WORD = re.compile(r"[A-Za-z0-9_-]{8,64}")
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,120}")

Who = Literal["anyone", "operator"]


class MessageError(ValueError):
    """A message that is refused; the text says what would be accepted."""


@dataclass(frozen=True)
class Field:
    """One value of a command: its type and the largest size (characters of text, magnitude of an integer)."""

    kind: type
    most: int = 0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class CommandSpec:
    """One thing a page may ask for.

    Attributes:
        who: ``operator`` commands need the seat; what only reads, stops or notes is for everybody who is let in.
        fields: required values by name.
    """

    who: Who
    fields: Mapping[str, Field] = field(default_factory=dict)


_ON = {"on": Field(bool)}
_EPISODE = {"episode": Field(str, 120)}
COMMANDS: Mapping[str, CommandSpec] = MappingProxyType(
    {
        # the seat
        "take_seat": CommandSpec("anyone", {"operator": Field(str, 60)}),
        "leave_seat": CommandSpec("operator"),
        "hand_back": CommandSpec("operator"),
        # stopping is for everybody, going on is not
        "estop": CommandSpec("anyone"),
        "reset_estop": CommandSpec("operator"),
        "arm": CommandSpec("operator", _ON),
        "hold": CommandSpec("operator", _ON),
        # the episode
        "start_episode": CommandSpec("operator"),
        "success": CommandSpec("operator"),
        "failure": CommandSpec("operator"),
        "discard": CommandSpec("operator"),
        "undo_label": CommandSpec("operator"),
        "instruction": CommandSpec("operator", {"text": Field(str, 500)}),
        # learning
        "promote": CommandSpec("operator"),
        "rollback": CommandSpec("operator"),
        "pause_learning": CommandSpec("operator", _ON),
        # recorded data
        "label_episode": CommandSpec("operator", {**_EPISODE, "success": Field(bool)}),
        "prefer": CommandSpec(
            "operator", {"pair": Field(str, 64), "choice": Field(str, 8, ("first", "second", "neither", "skip"))}
        ),
        "note": CommandSpec("anyone", {"text": Field(str, 2000)}),
        # the steps of a session
        "ready": CommandSpec("operator"),
        "next_phase": CommandSpec("operator"),
    }
)


@dataclass(frozen=True)
class Drive:
    """One instant of the operator's controls.

    Attributes:
        seq: rises with every message of a connection; anything else is a replay.
        echo: the newest server tick the page has seen (ns); says how old the picture behind this command is.
        held: the dead-man is held.
        axes: x, y, z, roll, pitch, yaw as shares of full speed in [-1, 1].
        gripper: the gripper button is down.
    """

    seq: int
    echo: int
    held: bool
    axes: tuple[float, ...]
    gripper: bool = False

    @property
    def moves(self) -> bool:
        return self.held and any(self.axes)


@dataclass(frozen=True)
class Ask:
    """A request that is answered once. ``id`` is new for every request."""

    id: str
    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """A frame has reached the screen, ``took_ms`` after it reached the page; the next one of that camera may be sent."""

    camera: str
    number: int
    took_ms: float = 0.0


@dataclass(frozen=True)
class Feel:
    """How the person likes what they see, from -1 to 1; sent while the strip is touched."""

    value: float


Message = Drive | Ask | Seen | Feel


def parse(data: str | bytes) -> Message:
    """A message as its type.

    Raises:
        MessageError: it is too large, no JSON object, of an unknown type, has missing or unknown keys, or a value out of range.
    """
    size = len(data) if isinstance(data, bytes) else len(data.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise MessageError(f"message of {size} bytes: accepted are at most {MAX_BYTES}")
    try:
        found = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError, UnicodeDecodeError) as error:
        raise MessageError(f"no JSON: {str(error)[:80]}") from None
    if not isinstance(found, dict):
        raise MessageError(f"{type(found).__name__}: accepted is a JSON object")
    kind = found.pop("type", None)
    if kind == "drive":
        return _drive(found)
    if kind == "ask":
        return _ask(found)
    if kind == "seen":
        _keys(found, {"camera", "number"}, frozenset({"took"}))
        took = found.get("took", 0.0)
        if type(took) not in (int, float) or not 0.0 <= took <= MAX_TOOK_MS:
            raise MessageError(f"took: accepted are milliseconds from 0 to {MAX_TOOK_MS:g}")
        return Seen(_text(found, "camera", _NAME), _integer(found, "number"), float(took))
    if kind == "feel":
        _keys(found, {"value"})
        return Feel(_share(found["value"], "value"))
    raise MessageError(f"type={str(kind)[:40]!r}: accepted are drive, ask, seen, feel")


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _keys(found: Mapping[str, Any], wanted: set[str], optional: frozenset[str] = frozenset()) -> None:
    if missing := sorted(wanted - set(found)):
        raise MessageError(f"missing {', '.join(missing)}")
    if more := sorted(set(found) - wanted - optional):
        raise MessageError(f"unknown keys {', '.join(k[:40] for k in more[:5])}")


def _integer(found: Mapping[str, Any], key: str) -> int:
    value = found[key]
    if type(value) is not int or not 0 <= value < 2**63:
        raise MessageError(f"{key}: accepted is an integer from 0")
    return int(value)


def _share(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not -1.0 <= value <= 1.0 or not isfinite(value):
        raise MessageError(f"{key}: accepted are numbers from -1 to 1")
    return float(value)


def _flag(found: Mapping[str, Any], key: str) -> bool:
    value = found[key]
    if type(value) is not bool:
        raise MessageError(f"{key}: accepted are true, false")
    return value


def _text(found: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    value = found[key]
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise MessageError(f"{key}: accepted is text like {pattern.pattern}")
    return value


def _drive(found: Mapping[str, Any]) -> Drive:
    _keys(found, {"seq", "echo", "held", "axes"}, frozenset({"gripper"}))
    axes = found["axes"]
    if not isinstance(axes, list) or len(axes) != len(AXES):
        raise MessageError(f"axes: accepted are {len(AXES)} numbers: {', '.join(AXES)}")
    numbers = [_share(value, f"axes.{name}") for name, value in zip(AXES, axes, strict=True)]
    gripper = _flag(found, "gripper") if "gripper" in found else False
    return Drive(_integer(found, "seq"), _integer(found, "echo"), _flag(found, "held"), tuple(numbers), gripper)


def _ask(found: Mapping[str, Any]) -> Ask:
    _keys(found, {"id", "name"}, frozenset({"values"}))
    identity, name, values = _text(found, "id", _WORD), found["name"], found.get("values", {})
    spec = COMMANDS.get(name) if isinstance(name, str) else None
    if spec is None:
        raise MessageError(f"name={str(name)[:40]!r}: accepted are {', '.join(COMMANDS)}")
    if not isinstance(values, dict):
        raise MessageError("values: accepted is a JSON object")
    _keys(values, set(spec.fields))
    for key, spec_of in spec.fields.items():
        value = values[key]
        if type(value) is not spec_of.kind:
            raise MessageError(f"{name}.{key}: accepted is {spec_of.kind.__name__}")
        if isinstance(value, str):
            if len(value) > spec_of.most or any(ord(c) < 32 and c not in "\n\t" for c in value) or not _encodable(value):
                raise MessageError(f"{name}.{key}: accepted are at most {spec_of.most} printable characters")
            if spec_of.choices and value not in spec_of.choices:
                raise MessageError(f"{name}.{key}={value!r}: accepted are {', '.join(spec_of.choices)}")
    return Ask(identity, name, MappingProxyType(dict(values)))


def _encodable(text: str) -> bool:
    """Lone surrogates are no text: they could not be written down."""
    return not any(0xD800 <= ord(c) < 0xE000 for c in text)
