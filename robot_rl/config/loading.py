"""Files and overrides to plain data, layer by layer, and plain data to the dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import yaml

from robot_rl.config.decoding import decode_value
from robot_rl.config.schema import ConfigError, Finding, discriminator, hints_of, members_of, type_at, words
from robot_rl.config.text import Loader, Patch, Text

T = TypeVar("T")


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
    data = merge(cls, data, patch)
    return decode(cls, data, where=where, findings=findings)


def decode(cls: type[T], data: Any, *, where: str = "", findings: Sequence[Finding] = ()) -> T:
    """Build ``cls`` from plain data (what YAML or JSON gives). Raises ConfigError with every mistake."""
    found = list(findings)
    value = decode_value(cls, data, "", found, MISSING)
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
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=Loader)
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
        merged = merge(cls, merged, read_yaml(beside if beside.is_file() else parent, cls, (*_seen, file)))
    return merge(cls, merged, data)


def parse_overrides(overrides: Sequence[str], cls: Any = Any, findings: list[Finding] | None = None) -> dict[str, Any]:
    """``["--a.b=1", "--a.c", "2"]`` to nested plain data. Mistakes are appended to ``findings`` (or raised without it)."""
    found: list[Finding] = [] if findings is None else findings
    tree = Patch()
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
                if cls is not Any and (key_type := type_at(cls, key)) is not None and bool not in members_of(key_type):
                    found.append(Finding(key, MISSING, f"a value is missing: --{key}=<{words(key_type)}>"))
                    continue
        *above, last = key.split(".")
        node = tree
        for part in above:
            child = node.get(part)
            if isinstance(child, Text):
                child = child.parse()
            node[part] = child if isinstance(child, dict) else Patch()
            node = node[part]
        node[last] = Text(text)
    if findings is None and found:
        raise ConfigError(found, "the command line")
    return tree


def merge(tp: Any, base: Any, over: Any) -> Any:
    """``over`` on top of ``base``; where a mapping picks another member of a union, the old member's keys go."""
    if isinstance(base, Text):
        base = base.parse()
    if isinstance(base, list) and isinstance(over, Patch):
        merged = list(base)
        for key, value in over.items():
            if not (key.isdigit() and int(key) < len(base)):
                return over  # refused when decoded, with the key's path
            merged[int(key)] = merge(Any, base[int(key)], value)
        return merged
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    classes = [m for m in members_of(tp) if dataclasses.is_dataclass(m)]
    if len(classes) > 1 and (tag := discriminator(classes)) and tag in over and str(over[tag]) != str(base.get(tag)):
        return over
    hints: dict[str, Any] = {}
    for member in classes:
        hints.update(hints_of(member))
    out = type(base)(base)
    for key, value in over.items():
        out[key] = merge(hints.get(key, Any), base[key], value) if key in base else value
    return out
