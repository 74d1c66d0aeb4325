"""What options of every kind of foreign checkpoint share: the action they name, what identifies a base, and the file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from robot_rl.types import ActionSpec

OPTIONS_FILE = "robot_rl.json"


class CheckpointOptions:
    """Base of the data classes; ``action`` is one of their fields."""

    action: Mapping[str, Any] | None

    def action_spec(self) -> ActionSpec | None:
        if self.action is None:
            return None
        try:
            return ActionSpec(**{k: tuple(v) for k, v in self.action.items()})
        except TypeError as error:
            raise ValueError(f"action={dict(self.action)!r}: accepted are low, high, names, kind, mode ({error})") from None

    def identity(self) -> dict[str, Any]:
        """What changes actions (cache sizes do not)."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("_mb")}  # type: ignore[arg-type]


def given_options(kind: Any, folder: Path, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of the data class ``kind`` beside a checkpoint, overridden by ``given``. Raises ValueError for an unknown one."""
    file = folder / OPTIONS_FILE
    beside = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = [f.name for f in fields(kind)]
    for origin, values in ((str(file), beside), ("base.options", given or {})):
        for name in values:
            if name not in known:
                raise ValueError(f"{origin}: unknown option {name!r}; accepted are {', '.join(known)}")
    return {**beside, **(given or {})}
