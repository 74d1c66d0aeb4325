"""Which episodes of a store are meant: ``success=true,stratum=online,weights_version>=3``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from robot_rl.replay.store import EpisodeStore

_CONDITION = re.compile(r"\s*(?P<key>[a-z_]+)\s*(?P<sign>>=|<=|!=|=|>|<)\s*(?P<value>[^,]*?)\s*")
_SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_TRUTH = {"true": True, "false": False, "unknown": None}
KEYS = {
    "success": "true, false, unknown", "intervened": "true, false: a person acted in it", "recovered": "true, false: cut by a crash",
    "stratum": "online, demonstration, intervention, prior", "task": "text", "env_id": "text", "length": "steps",
    "weights_version": "of the head that acted (0: the base)", "seed": "of the start",
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """One of them, checked when it is written down."""

    key: str
    sign: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises ValueError that names what is wrong and what is accepted."""
        found = _CONDITION.fullmatch(text)
        if found is None or found["key"] not in KEYS:
            accepted = "; ".join(f"{k} ({v})" for k, v in KEYS.items())
            raise ValueError(f"condition {text!r}: accepted are KEY=VALUE, also with !=, <, <=, >, >=, where KEY is {accepted}")
        key, sign, value = found["key"], found["sign"], found["value"]
        ordered = key in ("length", "weights_version", "seed")
        if sign not in ("=", "!=") and not ordered:
            raise ValueError(f"condition {text!r}: {key} has no order; accepted are = and !=")
        if ordered:
            if not re.fullmatch(r"-?\d+", value):
                raise ValueError(f"condition {text!r}: accepted is an integer")
            return cls(key, sign, int(value))
        if key in ("success", "intervened", "recovered"):
            if value not in _TRUTH or (value == "unknown" and key != "success"):
                raise ValueError(f"condition {text!r}: accepted are {KEYS[key].split(':')[0]}")
            return cls(key, sign, _TRUTH[value])
        if key == "stratum" and value not in KEYS["stratum"].split(", "):
            raise ValueError(f"condition {text!r}: accepted are {KEYS['stratum']}")
        return cls(key, sign, value)

    def holds(self, found: Any) -> bool:
        return (
            found is not None and _SIGNS[self.sign](found, self.value)
            if self.sign[0] in "<>"
            else _SIGNS[self.sign](found, self.value)
        )


def select(store: EpisodeStore, conditions: Sequence[Condition]) -> list[str]:
    """Ids of the episodes for which all conditions hold, in commit order. Data are read only where a condition asks for them."""
    chosen = []
    for episode_id in store.episode_ids():
        meta = store.meta(episode_id)
        known = {
            "success": meta.success, "recovered": meta.recovered, "stratum": meta.stratum.value, "task": meta.task,
            "env_id": meta.env_id, "weights_version": meta.weights_version, "seed": meta.seed,
            "length": int(store.attributes(episode_id)["length"]),
        }  # fmt: skip
        if any(c.key == "intervened" for c in conditions):
            known["intervened"] = bool((store.read(episode_id).intervention_id >= 0).any())
        if all(c.holds(known[c.key]) for c in conditions):
            chosen.append(episode_id)
    return chosen
