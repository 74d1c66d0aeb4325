"""Typed configuration: dataclasses, YAML files, dotted overrides; every mistake is reported at once, before anything starts.

``load(PostTrainConfig, "quickstart.yaml", ["--train.utd=4"])`` reads the file (and what it ``extends``), puts the overrides
on top, and builds the dataclass. Override syntax is LeRobot's (draccus): ``--key.path=value`` or ``--key.path value``; a
bare ``--flag`` sets a boolean. Values are YAML 1.2 scalars, lists or mappings (``on`` and ``no`` are text, ``1e-3`` is a
number). Decoding is done here rather than by draccus because draccus stops at the first mistake.

This module imports the standard library and PyYAML only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, dataclass
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

T = TypeVar("T")
_BAD: Any = object()
_UNIONS = (Union, types.UnionType)


@dataclass(frozen=True)
class Finding:
    """One mistake: where, what was given, what would be accepted."""

    key: str
    value: Any
    accepted: str

    def __str__(self) -> str:
        if self.value is MISSING:
            return f"{self.key or 'configuration'}: {self.accepted}"
        shown = self.value if isinstance(self.value, _Text) else json.dumps(_plain(self.value), default=str)
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
    if unknown := set(limits) - set(_LIMITS):
        raise TypeError(f"option() limits {sorted(unknown)}: accepted are {', '.join(_LIMITS)}")
    metadata = {"help": help, "hash": hash, **limits}
    if factory is not MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if isinstance(default, (list, dict, set)) or dataclasses.is_dataclass(default):
        import copy

        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_LIMITS = {
    "ge": (">=", lambda x, y: x >= y),
    "gt": (">", lambda x, y: x > y),
    "le": ("<=", lambda x, y: x <= y),
    "lt": ("<", lambda x, y: x < y),
}


# ---------------------------------------------------------------------------------------------------------------- loading


def load(cls: type[T], path: str | PathLike[str] | None = None, overrides: Sequence[str] = ()) -> T:
    """Build ``cls`` from a YAML file (or shipped configuration name) and command-line overrides.

    A file may say ``extends: other.yaml`` (or a list; relative to itself, or a shipped name); later layers win key by key.
    Lists are replaced as a whole; ``--some.list.0=value`` changes one element.

    Raises:
        ConfigError: all unknown keys, wrong values and missing keys together.
        FileNotFoundError: no such file.
    """
    findings: list[Finding] = []
    data: Any = {}
    where = "the command line"
    if path is not None:
        data = read_yaml(path, cls)
        where = f"{path} and the command line" if overrides else str(path)
    patch = parse_overrides(overrides, cls, findings)
    data = _merge(cls, data, patch)
    return decode(cls, data, where=where, findings=findings)


def decode(cls: type[T], data: Any, *, where: str = "", findings: Sequence[Finding] = ()) -> T:
    """Build ``cls`` from plain data (what YAML or JSON gives). Raises ConfigError with every mistake."""
    found = list(findings)
    value = _decode(cls, data, "", found, MISSING)
    if found:
        raise ConfigError(found, where)
    return value


def read_yaml(path: str | PathLike[str], cls: Any = Any, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file with everything it extends, as plain data."""
    from robot_rl import paths

    file = paths.find_config(path).resolve()
    if file in _seen:
        raise ConfigError([Finding("extends", str(path), "a chain of files without a circle")], str(file))
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError([Finding("", MISSING, f"not valid YAML: {error}")], str(file)) from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError([Finding("", data, "a mapping of keys to values")], str(file))
    parents = data.pop("extends", ())
    merged: Any = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        if not isinstance(parent, str):
            raise ConfigError([Finding("extends", parents, "a file name or a list of file names")], str(file))
        beside = file.parent / parent
        merged = _merge(cls, merged, read_yaml(beside if beside.is_file() else parent, cls, (*_seen, file)))
    return _merge(cls, merged, data)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, and a key that is given twice is refused (PyYAML would keep the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# Keep every implicit type of YAML 1.1 except its many booleans, its exponents that need a dot, base 60 and dates.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rsplit(":", 1)[1] in ("null", "merge", "value")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))


class _Text(str):
    """A value as typed on the command line; what it means depends on the type of its key."""

    __slots__ = ()

    def parse(self) -> Any:
        try:
            return yaml.load(self, Loader=_Loader)
        except yaml.YAMLError:
            return str(self)


class _Patch(dict):
    """A mapping that came from dotted keys: it changes single entries of what is below, rather than replacing it."""


def parse_overrides(overrides: Sequence[str], cls: Any = Any, findings: list[Finding] | None = None) -> dict[str, Any]:
    """``["--a.b=1", "--a.c", "2"]`` to nested plain data. Mistakes are appended to ``findings`` (or raised without it)."""
    found: list[Finding] = [] if findings is None else findings
    tree = _Patch()
    tokens = list(overrides)
    while tokens:
        token = tokens.pop(0)
        name, equals, text = token.partition("=")
        key = name[2:] if name.startswith("--") else name
        if not equals:
            if not name.startswith("--"):
                found.append(Finding(token, MISSING, "an override is --key.path=value or --key.path value"))
                continue
            if tokens and not tokens[0].startswith("--"):
                text = tokens.pop(0)
            else:
                text = "true"
                if cls is not Any and (key_type := _type_at(cls, key)) is not None and bool not in _members(key_type):
                    found.append(Finding(key, MISSING, f"a value is missing: --{key}=<{_name(key_type)}>"))
                    continue
        *above, last = key.split(".")
        node = tree
        for part in above:
            child = node.get(part)
            if isinstance(child, _Text):
                child = child.parse()
            node[part] = child if isinstance(child, dict) else _Patch()
            node = node[part]
        node[last] = _Text(text)
    if findings is None and found:
        raise ConfigError(found, "the command line")
    return tree


def _merge(tp: Any, base: Any, over: Any) -> Any:
    """``over`` on top of ``base``; where a mapping picks another member of a union, the old member's keys go."""
    if isinstance(base, _Text):
        base = base.parse()
    if isinstance(base, list) and isinstance(over, _Patch):
        merged = list(base)
        for key, value in over.items():
            if not (key.isdigit() and int(key) < len(base)):
                return over  # refused when decoded, with the key's path
            merged[int(key)] = _merge(Any, base[int(key)], value)
        return merged
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    classes = [m for m in _members(tp) if dataclasses.is_dataclass(m)]
    if len(classes) > 1 and (tag := _discriminator(classes)) and tag in over and str(over[tag]) != str(base.get(tag)):
        return over
    hints: dict[str, Any] = {}
    for member in classes:
        hints.update(_hints(member))
    out = type(base)(base)
    for key, value in over.items():
        out[key] = _merge(hints.get(key, Any), base[key], value) if key in base else value
    return out


# --------------------------------------------------------------------------------------------------------------- decoding


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _members(tp: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if get_origin(tp) is Annotated:
        return _members(get_args(tp)[0])
    return sum((_members(m) for m in get_args(tp)), ()) if get_origin(tp) in _UNIONS else (tp,)


def _fields(cls: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if f.init]


def _discriminator(classes: Sequence[Any]) -> str | None:
    """The key whose Literal value tells the classes of a union apart (``kind: Literal["residual"] = "residual"``)."""
    for name, hint in _hints(classes[0]).items():
        if get_origin(hint) is Literal and all(get_origin(_hints(c).get(name)) is Literal for c in classes):
            return name
    return None


def _type_at(cls: Any, key: str) -> Any:
    """The type of a dotted key, or None where there is no such key."""
    tp = cls
    for part in key.split("."):
        for member in _members(tp):
            if dataclasses.is_dataclass(member) and part in _hints(member):
                tp = _hints(member)[part]
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


def _join(key: str, part: Any) -> str:
    return f"{key}.{part}" if key else str(part)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _decode(tp: Any, value: Any, key: str, found: list[Finding], default: Any, limits: Mapping[str, Any] = {}) -> Any:
    """``value`` as ``tp``, or ``_BAD`` after appending what is wrong. ``default`` fills what a mapping leaves open."""
    if get_origin(tp) is Annotated:
        tp = get_args(tp)[0]
    members = _members(tp)
    if len(members) > 1:
        return _decode_union(tp, members, value, key, found, default, limits)
    if isinstance(value, _Text) and tp not in (str, Path) and get_origin(tp) is not Literal and not _is_enum(tp):
        value = value.parse()
    if dataclasses.is_dataclass(tp):
        return _decode_dataclass(tp, value, key, found, default)
    origin = get_origin(tp) or tp
    if origin in (list, tuple, set, frozenset, Sequence, AbstractSet):
        return _decode_sequence(tp, origin, value, key, found, limits)
    if origin in (dict, Mapping):
        return _decode_dict(tp, value, key, found, default, limits)
    result = _scalar(tp, value)
    wrong = result is _BAD or any(
        not _LIMITS[k][1](result, v) for k, v in limits.items() if k in _LIMITS and result is not None
    )
    if wrong:
        found.append(Finding(key, value, f"accepted is {_name(tp, limits)}{_nearest(value, _choices(tp))}"))
        return _BAD
    return result


def _is_enum(tp: Any) -> bool:
    return isinstance(tp, type) and issubclass(tp, Enum)


def _choices(tp: Any) -> list[str]:
    if get_origin(tp) is Literal:
        return [str(a) for a in get_args(tp)]
    return [str(m.value) for m in tp] if _is_enum(tp) else []


def _scalar(tp: Any, value: Any) -> Any:
    if tp in (Any, object):
        return value.parse() if isinstance(value, _Text) else value
    if tp in (None, type(None)):
        return None if value is None else _BAD
    if get_origin(tp) is Literal:
        for choice in get_args(tp):
            same = str(choice) == value if isinstance(value, _Text) else choice == value and type(choice) is type(value)
            if same:
                return choice
        return None if None in get_args(tp) and str(value) == "null" else _BAD
    if _is_enum(tp):
        for member in tp:
            if (
                value is member
                or value == member.value
                or str(value).lower() in (str(member.value).lower(), member.name.lower())
            ):
                return member
        return _BAD
    if tp is str:
        return str(value) if isinstance(value, str) else _BAD
    if tp is Path:
        return Path(value) if isinstance(value, (str, Path)) and str(value) else _BAD
    if tp is bool:
        return value if isinstance(value, bool) else _BAD
    if tp in (int, float):
        if isinstance(value, str):
            value = _number(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return _BAD
        if tp is float:
            return float(value)
        return int(value) if float(value).is_integer() else _BAD
    return value if isinstance(value, tp) else _BAD


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return _BAD


def _decode_union(
    tp: Any, members: Sequence[Any], value: Any, key: str, found: list[Finding], default: Any, limits: Mapping[str, Any]
) -> Any:
    if isinstance(value, _Text) and type(None) in members and value.lower() in ("null", "none", "~"):
        return None
    parsed = value.parse() if isinstance(value, _Text) else value
    classes = [m for m in members if dataclasses.is_dataclass(m)]
    if isinstance(parsed, Mapping) and classes:
        chosen = classes
        if len(classes) > 1:
            tag = _discriminator(classes)
            given = parsed.get(tag, getattr(default, tag, None)) if tag else None
            if tag and given is not None:
                chosen = [c for c in classes if _scalar(_hints(c)[tag], given) is not _BAD]
                if not chosen:
                    options = [a for c in classes for a in get_args(_hints(c)[tag])]
                    accepted = ", ".join(map(repr, options))
                    found.append(Finding(_join(key, tag), given, f"accepted are {accepted}{_nearest(given, options)}"))
                    return _BAD
            elif tag:
                options = [repr(a) for c in classes for a in get_args(_hints(c)[tag])]
                found.append(Finding(_join(key, tag), MISSING, f"a value is needed: one of {', '.join(options)}"))
                return _BAD
        if len(chosen) == 1:
            return _decode_dataclass(chosen[0], parsed, key, found, default)
    # The most exact member first: 3 is an int before it is a float, and text only when it is nothing else.
    order = sorted(members, key=lambda m: (m is str or m is Path, m is not type(parsed)))
    for member in order:
        trial: list[Finding] = []
        result = _decode(member, value, key, trial, default, limits)
        if not trial:
            return result
    found.append(
        Finding(key, value, f"accepted is {_name(tp, limits)}{_nearest(value, [c for m in members for c in _choices(m)])}")
    )
    return _BAD


def _decode_sequence(tp: Any, origin: Any, value: Any, key: str, found: list[Finding], limits: Mapping[str, Any]) -> Any:
    args = get_args(tp)
    if isinstance(value, (str, Mapping)) or not isinstance(value, (Sequence, AbstractSet)):
        found.append(Finding(key, value, f"accepted is {_name(tp, limits)}"))
        return _BAD
    items = list(value)
    fixed = origin is tuple and args and Ellipsis not in args and args != ((),)
    if fixed and len(items) != len(args):
        found.append(Finding(key, value, f"accepted is {_name(tp, limits)}; {len(items)} values were given"))
        return _BAD
    types_ = args if fixed else [args[0] if args else Any] * len(items)
    out = [_decode(t, v, _join(key, i), found, MISSING, limits) for i, (t, v) in enumerate(zip(types_, items, strict=True))]
    return {list: list, set: set, frozenset: frozenset, AbstractSet: frozenset}.get(origin, tuple)(out)


def _decode_dict(tp: Any, value: Any, key: str, found: list[Finding], default: Any, limits: Mapping[str, Any]) -> Any:
    if not isinstance(value, Mapping):
        found.append(Finding(key, value, f"accepted is {_name(tp, limits)}"))
        return _BAD
    key_type, value_type = get_args(tp) or (Any, Any)
    below = default if isinstance(default, Mapping) else {}
    out = dict(below) if isinstance(value, _Patch) else {}
    for name, item in value.items():
        wanted = _decode(key_type, _Text(name) if key_type is not Any else name, _join(key, name), found, MISSING)
        out[wanted] = _decode(value_type, item, _join(key, name), found, below.get(wanted, MISSING), limits)
    return out


def _decode_dataclass(cls: Any, value: Any, key: str, found: list[Finding], default: Any) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        found.append(Finding(key, value, f"accepted is a mapping with the keys {', '.join(f.name for f in _fields(cls))}"))
        return _BAD
    below = default if type(default) is cls else MISSING
    fields, hints, before = _fields(cls), _hints(cls), len(found)
    names = [f.name for f in fields]
    for name, item in value.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.6)
            hint = f"did you mean {_join(key, near[0])}?" if near else ""
            found.append(Finding(_join(key, name), item, f"no such key; {hint or 'accepted are ' + ', '.join(names)}"))
    arguments: dict[str, Any] = {}
    for field in fields:
        start = getattr(below, field.name) if below is not MISSING else _default_of(field)
        if field.name in value:
            item_key = _join(key, field.name)
            arguments[field.name] = _decode(hints[field.name], value[field.name], item_key, found, start, field.metadata)
        elif start is not MISSING:
            arguments[field.name] = start
        else:
            found.append(
                Finding(_join(key, field.name), MISSING, f"a value is needed: {_name(hints[field.name], field.metadata)}")
            )
    if len(found) > before:
        return _BAD
    try:
        return cls(**arguments)
    except ConfigError as error:
        found.extend(Finding(_join(key, f.key) if f.key else key, f.value, f.accepted) for f in error.findings)
    except ValueError as error:
        found.append(Finding(key, MISSING, str(error)))
    return _BAD


# ------------------------------------------------------------------------------------------------------------ saying it


def _name(tp: Any, limits: Mapping[str, Any] = {}) -> str:
    """What a type accepts, in words."""
    bounds = " and ".join(f"{_LIMITS[k][0]} {v}" for k, v in limits.items() if k in _LIMITS)
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    words |= {type(None): "null", None: "null", Any: "any value"}
    args, origin = get_args(tp), get_origin(tp)
    if origin is Annotated:
        return _name(args[0], limits)
    if origin in _UNIONS:
        return " or ".join(_name(m, limits) for m in _members(tp))
    if choices := _choices(tp):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else repr(choices[0])
    if (origin or tp) in (dict, Mapping):
        return f"a mapping of {_name(args[0])} to {_name(args[1], limits)}" if args else "a mapping"
    if (origin or tp) in (list, tuple, set, frozenset, Sequence, AbstractSet):
        if origin is tuple and Ellipsis not in args:
            return f"a list of {len(args)} ({', '.join(_name(a, limits) for a in args)})"
        return f"a list of {_name(args[0], limits)}" if args else "a list"
    word = words.get(tp, getattr(tp, "__name__", str(tp)))
    return f"{word} {bounds}" if bounds and tp in (int, float) else word


def _nearest(value: Any, choices: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], 1, 0.5) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def _plain(value: Any, only_hashed: bool = False) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in _fields(value) if not only_hashed or f.metadata.get("hash", True)]
        return {f.name: _plain(getattr(value, f.name), only_hashed) for f in fields}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(_plain(k)): _plain(v, only_hashed) for k, v in value.items()}
    if isinstance(value, AbstractSet):
        return sorted((_plain(v, only_hashed) for v in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [_plain(v, only_hashed) for v in value]
    if isinstance(value, _Text):
        return str(value)
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The whole configuration as plain data that ``decode`` turns back into an equal one."""
    return _plain(config)


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML that ``load`` reads back into an equal one."""
    data = _plain(config)
    # PyYAML writes these three line breaks of Unicode raw and reads them back as blanks; escaping everything keeps them.
    readable = not re.search("[\x85\u2028\u2029]", json.dumps(data, ensure_ascii=False, default=str))
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=readable, width=120, default_flow_style=None)


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(float, lambda dumper, x: dumper.represent_scalar("tag:yaml.org,2002:float", _float_text(x)))


def _float_text(x: float) -> str:
    return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(x), repr(x))


def config_hash(config: Any) -> str:
    """12 hex digits that change when, and only when, a key that can change results changes.

    Independent of key order and of where a value was set; fields made with ``hash=False`` (metadata) do not count.
    """
    text = json.dumps(_plain(config, only_hashed=True), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class KeyInfo:
    """One settable key for ``--help``. ``default`` is MISSING for a required key."""

    key: str
    accepted: str
    default: Any
    help: str


def describe(cls: Any, _key: str = "", _default: Any = MISSING) -> Iterator[KeyInfo]:
    """Every key of ``cls`` with what it accepts and its default, nested dataclasses flattened to dotted keys."""
    hints = _hints(cls)
    for field in _fields(cls):
        key = _join(_key, field.name)
        start = _default_of(field) if _default is MISSING else getattr(_default, field.name)
        classes = [m for m in _members(hints[field.name]) if dataclasses.is_dataclass(m)]
        if not classes or start is None:
            yield KeyInfo(key, _name(hints[field.name], field.metadata), start, field.metadata.get("help", ""))
        for member in classes:
            yield from describe(member, key, start if type(start) is member else MISSING)


def help_text(cls: Any) -> str:
    """One line a key: ``--train.utd  an integer >= 1  [1]  updates for each environment step``."""
    lines = []
    for info in describe(cls):
        default = "required" if info.default is MISSING else json.dumps(_plain(info.default), default=str)
        lines.append(f"  --{info.key}  {info.accepted}  [{default}]" + (f"\n        {info.help}" if info.help else ""))
    return "\n".join(lines)
