"""A configuration as data, as YAML, as a hash, and as help text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, is_dataclass
from typing import Any

import yaml

from robot_rl.config.schema import default_of, fields_of, hints_of, join_key, members_of, plain, words
from robot_rl.config.text import Dumper


def to_dict(config: Any) -> dict[str, Any]:
    """The whole configuration as plain data that ``decode`` turns back into an equal one."""
    return plain(config)


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML that ``load`` reads back into an equal one."""
    data = plain(config)
    # PyYAML writes these three line breaks of Unicode raw and reads them back as blanks; escaping everything keeps them.
    readable = not re.search("[\x85\u2028\u2029]", json.dumps(data, ensure_ascii=False, default=str))
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=readable, width=120, default_flow_style=None)


def config_hash(config: Any) -> str:
    """12 hex digits that change when, and only when, a key that can change results changes.

    Independent of key order and of where a value was set; fields made with ``hash=False`` (metadata) do not count.
    """
    text = json.dumps(plain(config, only_hashed=True), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
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
    hints = hints_of(cls)
    for field in fields_of(cls):
        key = join_key(_key, field.name)
        start = default_of(field) if _default is MISSING else getattr(_default, field.name)
        classes = [m for m in members_of(hints[field.name]) if is_dataclass(m)]
        if not classes or start is None:
            yield KeyInfo(key, words(hints[field.name], field.metadata), start, field.metadata.get("help", ""))
        for member in classes:
            yield from describe(member, key, start if type(start) is member else MISSING)


def help_text(cls: Any) -> str:
    """One line a key: ``--train.utd  an integer >= 1  [1]  updates for each environment step``."""
    lines = []
    for info in describe(cls):
        default = "required" if info.default is MISSING else json.dumps(plain(info.default), default=str)
        lines.append(f"  --{info.key}  {info.accepted}  [{default}]" + (f"\n        {info.help}" if info.help else ""))
    return "\n".join(lines)
