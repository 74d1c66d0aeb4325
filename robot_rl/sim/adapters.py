"""What the adapters of other people's simulators share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from robot_rl.sim.env import Environment


def checked_factory(cls: Callable[..., Environment]) -> Callable[..., Environment]:
    """``cls`` as an environment factory that refuses an unknown option by name instead of with a TypeError."""
    accepted = [p for p in inspect.signature(cls).parameters if p != "env_id"]

    @functools.wraps(cls, updated=())
    def make(env_id: str, **options: Any) -> Environment:
        for name in options:
            if name not in accepted:
                raise ValueError(f"option {name}={options[name]!r} of {env_id}: accepted are {', '.join(accepted)}")
        return cls(env_id, **options)

    return make
