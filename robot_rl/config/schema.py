"""What configuration dataclasses are made of: their fields, limits, and the words for what a type accepts."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from robot_rl.config.text import Text

UNIONS = (Union, types.UnionType)

LIMITS = {
    "ge": (">=", lambda x, y: x >= y),
    "gt": (">", lambda x, y: x > y),
    "le": ("<=", lambda x, y: x <= y),
    "lt": ("<", lambda x, y: x < y),
}


@dataclass(frozen=True)
class Finding:
    """One mistake: where, what was given, what would be accepted."""

    key: str
    value: Any
    accepted: str

    def __str__(self) -> str:
        if self.value is MISSING:
            return f"{self.key or 'configuration'}: {self.accepted}"
        shown = self.value if isinstance(self.value, Text) else json.dumps(plain(self.value), default=str)
        shown = str(shown)
        return f"{self.key or 'configuration'} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {self.accepted}"


class ConfigError(ValueError):
    """The configuration is refused. ``findings`` holds every mistake that was found."""

    def __init__(self, findings: Sequence[Finding], where: str = "") -> None:
        self.findings = list(findings)
        count = "1 problem" if len(self.findings) == 1 else f"{len(self.findings)} problems"
        super().__init__("\n  ".join([f"{count} in {where or 'the configuration'}:", *map(str, self.findings)]))


def option(default: Any = MISSING, *, help: str = "", factory: Any = MISSING, hash: bool = True, **limits: float) -> Any:
    """A dataclass field with help text and limits: ``option(256, help="...", ge=1)``.

    Args:
        default, factory: as in ``dataclasses.field``; a list, dict or dataclass instance may be given as ``default``.
        hash: False for keys that do not change results (folders, logging); they are left out of ``config_hash``.
        limits: ``ge``, ``gt``, ``le``, ``lt``; they hold for the number or for each number of a list.
    """
    if unknown := set(limits) - set(LIMITS):
        raise TypeError(f"option() limits {sorted(unknown)}: accepted are {', '.join(LIMITS)}")
    metadata = {"help": help, "hash": hash, **limits}
    if factory is not MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if isinstance(default, (list, dict, set)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def hints_of(cls: Any) -> dict[str, Any]:
    """Field name to type, with the strings of ``from __future__ import annotations`` resolved."""
    return _hints(cls)


@functools.cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def members_of(tp: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if get_origin(tp) is Annotated:
        return members_of(get_args(tp)[0])
    return sum((members_of(m) for m in get_args(tp)), ()) if get_origin(tp) in UNIONS else (tp,)


def fields_of(cls: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if f.init]


def discriminator(classes: Sequence[Any]) -> str | None:
    """The key whose Literal value tells the classes of a union apart (``kind: Literal["residual"] = "residual"``)."""
    for name, hint in hints_of(classes[0]).items():
        if get_origin(hint) is Literal and all(get_origin(hints_of(c).get(name)) is Literal for c in classes):
            return name
    return None


def type_at(cls: Any, key: str) -> Any:
    """The type of a dotted key, or None where there is no such key."""
    tp = cls
    for part in key.split("."):
        for member in members_of(tp):
            if dataclasses.is_dataclass(member) and part in hints_of(member):
                tp = hints_of(member)[part]
                break
            origin, args = get_origin(member), get_args(member)
            if origin in (dict, Mapping) and args:
                tp = args[1]
                break
            if origin in (list, tuple, Sequence) and part.isdigit() and args:
                tp = args[0]
                break
        else:
            return None
    return tp


def join_key(key: str, part: Any) -> str:
    return f"{key}.{part}" if key else str(part)


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def is_enum(tp: Any) -> bool:
    return isinstance(tp, type) and issubclass(tp, Enum)


def choices_of(tp: Any) -> list[str]:
    if get_origin(tp) is Literal:
        return [str(a) for a in get_args(tp)]
    return [str(m.value) for m in tp] if is_enum(tp) else []


def words(tp: Any, limits: Mapping[str, Any] = {}) -> str:
    """What a type accepts, in words."""
    bounds = " and ".join(f"{LIMITS[k][0]} {v}" for k, v in limits.items() if k in LIMITS)
    names: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    names |= {type(None): "null", None: "null", Any: "any value"}
    args, origin = get_args(tp), get_origin(tp)
    if origin is Annotated:
        return words(args[0], limits)
    if origin in UNIONS:
        return " or ".join(words(m, limits) for m in members_of(tp))
    if choices := choices_of(tp):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else repr(choices[0])
    if (origin or tp) in (dict, Mapping):
        return f"a mapping of {words(args[0])} to {words(args[1], limits)}" if args else "a mapping"
    if (origin or tp) in (list, tuple, set, frozenset, Sequence, AbstractSet):
        if origin is tuple and Ellipsis not in args:
            return f"a list of {len(args)} ({', '.join(words(a, limits) for a in args)})"
        return f"a list of {words(args[0], limits)}" if args else "a list"
    word = names.get(tp, getattr(tp, "__name__", str(tp)))
    return f"{word} {bounds}" if bounds and tp in (int, float) else word


def nearest(value: Any, choices: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], 1, 0.5) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def plain(value: Any, only_hashed: bool = False) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in fields_of(value) if not only_hashed or f.metadata.get("hash", True)]
        return {f.name: plain(getattr(value, f.name), only_hashed) for f in fields}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(plain(k)): plain(v, only_hashed) for k, v in value.items()}
    if isinstance(value, AbstractSet):
        return sorted((plain(v, only_hashed) for v in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [plain(v, only_hashed) for v in value]
    if isinstance(value, Text):
        return str(value)
    return value
