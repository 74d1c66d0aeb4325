"""``remote:...`` to a client of the right kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robot_rl.policies.base import BasePolicy

ACCEPTED = "remote:HOST:PORT (robot-rl serve), remote:openpi:HOST:PORT or remote:lerobot:HOST:PORT"
_ADDRESS = re.compile(r"(?:(?P<kind>[a-z]+):)?(?P<host>\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):(?P<port>\d{1,5})")


def parse(source: str) -> tuple[str, str, int]:
    """(kind, host, port); kind is ``robot_rl``, ``openpi`` or ``lerobot``. Raises ValueError for anything else."""
    text = source.removeprefix("remote:")
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 65536 or found["kind"] not in (None, "openpi", "lerobot"):
        raise ValueError(f"{source!r}: accepted is {ACCEPTED}")
    return found["kind"] or "robot_rl", found["host"].strip("[]"), int(found["port"])


def connect(source: str, device: str, options: Mapping[str, Any] | None = None) -> BasePolicy:
    """A client of the server at ``source``.

    Raises:
        ValueError: no such address, or options that it does not take. PolicyUnavailable: nobody answers there.
    """
    kind, host, port = parse(source)
    given = dict(options or {})
    if kind == "openpi":
        from robot_rl.policies.remote.openpi import OpenPIPolicy, read_options

        return OpenPIPolicy(host, port, read_options(given), device)
    if kind == "lerobot":
        from robot_rl.policies.remote.lerobot_async import LeRobotAsyncPolicy
        from robot_rl.policies.remote.lerobot_async import read_options as read_lerobot_options

        return LeRobotAsyncPolicy(host, port, read_lerobot_options(given), device)
    from robot_rl.policies.remote.client import RemotePolicy

    known = ("timeout_s", "connect_s", "token_file")
    for name in given:
        if name not in known:
            raise ValueError(f"base.options: unknown option {name!r} for a policy server; accepted are {', '.join(known)}")
    return RemotePolicy(host, port, device, **given)
