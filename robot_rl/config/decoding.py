"""Plain data to typed values; what is wrong is collected rather than raised."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from robot_rl.config.schema import (
    LIMITS,
    ConfigError,
    Finding,
    choices_of,
    default_of,
    discriminator,
    fields_of,
    hints_of,
    is_enum,
    join_key,
    members_of,
    nearest,
    words,
)
from robot_rl.config.text import Patch, Text

BAD: Any = object()


def decode_value(tp: Any, value: Any, key: str, found: list[Finding], default: Any, limits: Mapping[str, Any] = {}) -> Any:
    """``value`` as ``tp``, or ``BAD`` after appending what is wrong. ``default`` fills what a mapping leaves open."""
    if get_origin(tp) is Annotated:
        tp = get_args(tp)[0]
    members = members_of(tp)
    if len(members) > 1:
        return decode_union(tp, members, value, key, found, default, limits)
    if isinstance(value, Text) and tp not in (str, Path) and get_origin(tp) is not Literal and not is_enum(tp):
        value = value.parse()
    if dataclasses.is_dataclass(tp):
        return decode_dataclass(tp, value, key, found, default)
    origin = get_origin(tp) or tp
    if origin in (list, tuple, set, frozenset, Sequence, AbstractSet):
        return decode_sequence(tp, origin, value, key, found, limits)
    if origin in (dict, Mapping):
        return decode_dict(tp, value, key, found, default, limits)
    result = decode_scalar(tp, value)
    wrong = result is BAD or any(not LIMITS[k][1](result, v) for k, v in limits.items() if k in LIMITS and result is not None)
    if wrong:
        found.append(Finding(key, value, f"accepted is {words(tp, limits)}{nearest(value, choices_of(tp))}"))
        return BAD
    return result


def decode_scalar(tp: Any, value: Any) -> Any:
    if tp in (Any, object):
        return value.parse() if isinstance(value, Text) else value
    if tp in (None, type(None)):
        return None if value is None else BAD
    if get_origin(tp) is Literal:
        for choice in get_args(tp):
            same = str(choice) == value if isinstance(value, Text) else choice == value and type(choice) is type(value)
            if same:
                return choice
        return None if None in get_args(tp) and str(value) == "null" else BAD
    if is_enum(tp):
        for member in tp:
            if (
                value is member
                or value == member.value
                or str(value).lower() in (str(member.value).lower(), member.name.lower())
            ):
                return member
        return BAD
    if tp is str:
        return str(value) if isinstance(value, str) else BAD
    if tp is Path:
        return Path(value) if isinstance(value, (str, Path)) and str(value) else BAD
    if tp is bool:
        return value if isinstance(value, bool) else BAD
    if tp in (int, float):
        if isinstance(value, str):
            value = number_from(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return BAD
        if tp is float:
            return float(value)
        return int(value) if float(value).is_integer() else BAD
    return value if isinstance(value, tp) else BAD


def number_from(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return BAD


def decode_union(
    tp: Any, members: Sequence[Any], value: Any, key: str, found: list[Finding], default: Any, limits: Mapping[str, Any]
) -> Any:
    if isinstance(value, Text) and type(None) in members and value.lower() in ("null", "none", "~"):
        return None
    parsed = value.parse() if isinstance(value, Text) else value
    classes = [m for m in members if dataclasses.is_dataclass(m)]
    if isinstance(parsed, Mapping) and classes:
        chosen = classes
        if len(classes) > 1:
            tag = discriminator(classes)
            own = getattr(default, tag, None) if tag else None
            given = parsed.get(tag, own) if tag else None
            if given is not None and str(given) != str(own):
                default = MISSING  # of another kind, even where the class is the same: its values are not this one's
            if tag and given is not None:
                chosen = [c for c in classes if decode_scalar(hints_of(c)[tag], given) is not BAD]
                if not chosen:
                    options = [a for c in classes for a in get_args(hints_of(c)[tag])]
                    accepted = ", ".join(map(repr, options))
                    found.append(Finding(join_key(key, tag), given, f"accepted are {accepted}{nearest(given, options)}"))
                    return BAD
            elif tag:
                options = [repr(a) for c in classes for a in get_args(hints_of(c)[tag])]
                found.append(Finding(join_key(key, tag), MISSING, f"a value is needed: one of {', '.join(options)}"))
                return BAD
        if len(chosen) == 1:
            return decode_dataclass(chosen[0], parsed, key, found, default)
    # The most exact member first: 3 is an int before it is a float, and text only when it is nothing else.
    order = sorted(members, key=lambda m: (m is str or m is Path, m is not type(parsed)))
    for member in order:
        trial: list[Finding] = []
        result = decode_value(member, value, key, trial, default, limits)
        if not trial:
            return result
    found.append(
        Finding(key, value, f"accepted is {words(tp, limits)}{nearest(value, [c for m in members for c in choices_of(m)])}")
    )
    return BAD


def decode_sequence(tp: Any, origin: Any, value: Any, key: str, found: list[Finding], limits: Mapping[str, Any]) -> Any:
    args = get_args(tp)
    if isinstance(value, (str, Mapping)) or not isinstance(value, (Sequence, AbstractSet)):
        found.append(Finding(key, value, f"accepted is {words(tp, limits)}"))
        return BAD
    items = list(value)
    fixed = origin is tuple and args and Ellipsis not in args and args != ((),)
    if fixed and len(items) != len(args):
        found.append(Finding(key, value, f"accepted is {words(tp, limits)}; {len(items)} values were given"))
        return BAD
    types_ = args if fixed else [args[0] if args else Any] * len(items)
    out = [
        decode_value(t, v, join_key(key, i), found, MISSING, limits) for i, (t, v) in enumerate(zip(types_, items, strict=True))
    ]
    return {list: list, set: set, frozenset: frozenset, AbstractSet: frozenset}.get(origin, tuple)(out)


def decode_dict(tp: Any, value: Any, key: str, found: list[Finding], default: Any, limits: Mapping[str, Any]) -> Any:
    if not isinstance(value, Mapping):
        found.append(Finding(key, value, f"accepted is {words(tp, limits)}"))
        return BAD
    key_type, value_type = get_args(tp) or (Any, Any)
    below = default if isinstance(default, Mapping) else {}
    out = dict(below) if isinstance(value, Patch) else {}
    for name, item in value.items():
        wanted = decode_value(key_type, Text(name) if key_type is not Any else name, join_key(key, name), found, MISSING)
        out[wanted] = decode_value(value_type, item, join_key(key, name), found, below.get(wanted, MISSING), limits)
    return out


def decode_dataclass(cls: Any, value: Any, key: str, found: list[Finding], default: Any) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        found.append(Finding(key, value, f"accepted is a mapping with the keys {', '.join(f.name for f in fields_of(cls))}"))
        return BAD
    below = default if type(default) is cls else MISSING
    fields, hints, before = fields_of(cls), hints_of(cls), len(found)
    names = [f.name for f in fields]
    for name, item in value.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.6)
            hint = f"did you mean {join_key(key, near[0])}?" if near else ""
            found.append(Finding(join_key(key, name), item, f"no such key; {hint or 'accepted are ' + ', '.join(names)}"))
    arguments: dict[str, Any] = {}
    for field in fields:
        start = getattr(below, field.name) if below is not MISSING else default_of(field)
        if field.name in value:
            item_key = join_key(key, field.name)
            arguments[field.name] = decode_value(hints[field.name], value[field.name], item_key, found, start, field.metadata)
        elif start is not MISSING:
            arguments[field.name] = start
        else:
            found.append(
                Finding(join_key(key, field.name), MISSING, f"a value is needed: {words(hints[field.name], field.metadata)}")
            )
    if len(found) > before:
        return BAD
    try:
        return cls(**arguments)
    except ConfigError as error:
        found.extend(Finding(join_key(key, f.key) if f.key else key, f.value, f.accepted) for f in error.findings)
    except ValueError as error:
        found.append(Finding(key, MISSING, str(error)))
    return BAD
