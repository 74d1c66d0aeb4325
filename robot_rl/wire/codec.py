"""Dataclasses to named key/value texts and back, exactly, with limits that are checked before anything is parsed.

Values: integers decimal, floats ``repr`` (exact; ``nan``, ``inf``, ``-inf``), ``true``/``false``, strings as they are. A field
that is None is left out; a mapping field ``m`` is written as ``m.<name>``. Unknown keys are ignored, so adding one needs no
new schema number; another schema number is refused.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

SCHEMA = 1
MAX_STATUSES = 256
MAX_VALUES = 64
MAX_KEY_BYTES = 256
MAX_VALUE_BYTES = 4096
_INTEGER = re.compile(r"-?[0-9]{1,20}")
T = TypeVar("T")


class WireError(ValueError):
    """A message that must be dropped; the text names the key, the value and what would be accepted."""


@dataclass(frozen=True)
class Status:
    """The plain content of one ``DiagnosticStatus``. ``level`` is for people: 0 ok, 1 warn, 2 error, 3 stale."""

    name: str
    message: str
    values: tuple[tuple[str, str], ...]
    hardware_id: str = ""
    level: int = 0


class WireSchemaError(WireError):
    """A peer of another version of these records."""


def key(default: Any = MISSING, *, place: str = "key", choices: tuple[str, ...] = ()) -> Any:
    """A field of a record. ``place``: ``key`` (a value), ``name`` (end of the status name) or ``message``."""
    metadata = {"place": place, "choices": choices}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class _Field:
    name: str
    kind: type
    optional: bool  # None means absent
    mapping: bool
    required: bool
    place: str
    choices: tuple[str, ...]


_FIELDS: dict[type, tuple[_Field, ...]] = {}


def _fields(cls: type) -> tuple[_Field, ...]:
    known = _FIELDS.get(cls)
    if known is None:
        known = _FIELDS[cls] = _read_fields(cls)
    return known


def _read_fields(cls: Any) -> tuple[_Field, ...]:
    hints, out = get_type_hints(cls), []
    for f in dataclasses.fields(cls):
        hint, optional, mapping = hints[f.name], False, False
        if get_origin(hint) in (Union, types.UnionType):
            members = [a for a in get_args(hint) if a is not type(None)]
            hint, optional = members[0], True
        if get_origin(hint) in (dict, Mapping):
            hint, mapping = get_args(hint)[1], True
        required = f.default is MISSING and f.default_factory is MISSING
        out.append(
            _Field(f.name, hint, optional, mapping, required, f.metadata.get("place", "key"), f.metadata.get("choices", ()))
        )
    return tuple(out)


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    text = str(value)
    if len(text.encode("utf-8", "replace")) > MAX_VALUE_BYTES:
        raise WireError(f"{where}: {len(text)} characters; accepted are at most {MAX_VALUE_BYTES} bytes")
    return text


def _parse(text: str, kind: type, where: str) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text in ("true", "false"):
            return text == "true"
        raise WireError(f"{where}={text[:80]!r}: accepted are true, false")
    if kind is int:
        if not _INTEGER.fullmatch(text):
            raise WireError(f"{where}={text[:80]!r}: accepted are decimal integers of at most 20 digits")
        return int(text)
    try:
        return float(text)
    except ValueError as error:
        raise WireError(f"{where}={text[:80]!r}: accepted are numbers, nan, inf, -inf") from error


def encode(record: Any, *, hardware_id: str = "", level: int = 0) -> Status:
    """One record as a status. Raises WireError where it would not fit the limits."""
    cls = type(record)
    if not hasattr(cls, "NAME"):
        raise TypeError(f"{cls.__name__} is no wire record")
    name, message, values = cls.NAME, "", [("schema", str(SCHEMA))]
    for f in _fields(cls):
        value = getattr(record, f.name)
        where = f"{cls.__name__}.{f.name}"
        if value is None:
            continue
        if f.choices and value not in f.choices:
            raise WireError(f"{where}={value!r}: accepted are {', '.join(f.choices)}")
        if f.mapping:
            for k, v in value.items():
                values.append((f"{f.name}.{k}", _text(float(v) if f.kind is float else v, where)))
            continue
        text = _text(float(value) if f.kind is float else value, where)
        if f.place == "name":
            name = cls.NAME.replace("*", text)
        elif f.place == "message":
            message = text
        else:
            values.append((f.name, text))
    if len(values) > MAX_VALUES:
        raise WireError(f"{cls.__name__}: {len(values)} values; accepted are at most {MAX_VALUES}")
    return Status(name, message, tuple(values), hardware_id, level)


def _checked(status: Status) -> dict[str, str]:
    if len(status.values) > MAX_VALUES:
        raise WireError(f"status {status.name[:80]!r}: {len(status.values)} values; accepted are at most {MAX_VALUES}")
    for text, limit in ((status.name, MAX_KEY_BYTES), (status.message, MAX_VALUE_BYTES)):
        if len(text) > limit:
            raise WireError(f"status name or message of {len(text)} characters; accepted are at most {limit}")
    values: dict[str, str] = {}
    for k, v in status.values:
        if len(k) > MAX_KEY_BYTES or len(v) > MAX_VALUE_BYTES:
            raise WireError(f"status {status.name!r}: a key of {len(k)} or value of {len(v)} characters is over the limits")
        if k in values:
            raise WireError(f"status {status.name!r}: key {k!r} comes twice; accepted are unique keys")
        values[k] = v
    return values


def decode(status: Status, cls: type[T]) -> T:
    """The record in ``status``.

    Raises:
        WireError: another kind of record, another schema, a required key missing, a value that cannot be parsed; nothing else.
    """
    values = _checked(status)
    template: str = cls.NAME  # type: ignore[attr-defined]
    head, star, tail = template.partition("*")
    if not (status.name == template if not star else status.name.startswith(head) and status.name.endswith(tail)):
        raise WireError(f"status {status.name!r} is no {cls.__name__}; accepted are names like {template!r}")
    schema = _parse(values.pop("schema", ""), int, f"{cls.__name__}.schema")
    if schema != SCHEMA:
        raise WireSchemaError(f"{cls.__name__}.schema={schema}: peer speaks schema {schema}; accepted is {SCHEMA}")
    arguments: dict[str, Any] = {}
    for f in _fields(cls):
        where = f"{cls.__name__}.{f.name}"
        if f.mapping:
            prefix = f"{f.name}."
            arguments[f.name] = {k[len(prefix) :]: _parse(v, f.kind, where) for k, v in values.items() if k.startswith(prefix)}
            continue
        if f.place == "name":
            text: str | None = status.name[len(head) : len(status.name) - len(tail)] if star else status.name
        elif f.place == "message":
            text = status.message
        else:
            text = values.get(f.name)
        if text is None:
            if f.required:
                raise WireError(f"{where} is missing")
            continue
        value = _parse(text, f.kind, where)
        if f.choices and value not in f.choices:
            raise WireError(f"{where}={value[:80]!r}: accepted are {', '.join(f.choices)}")
        arguments[f.name] = value
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise WireError(f"{cls.__name__}: {error}") from error
