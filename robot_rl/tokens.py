"""Bearer tokens of servers that other machines reach: where one comes from, and when one is needed."""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Mapping
from pathlib import Path


def read_token(variable: str, token_file: str | Path | None = None, environment: Mapping[str, str] | None = None) -> str | None:
    """From a file that only its owner can read, or else from the environment's ``variable``; None where neither is given.

    Raises:
        PermissionError: the file can be read by others.
        ValueError: the token is shorter than 16 characters or not printable ASCII.
    """
    if token_file:
        path = Path(token_file).expanduser()
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise PermissionError(f"token file {path} can be read by others: chmod 600 it")
        token: str | None = path.read_text(encoding="utf-8").strip()
        origin = f"token file {path}"
    else:
        token = (os.environ if environment is None else environment).get(variable) or None
        origin = f"environment variable {variable}"
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise ValueError(f"{origin}: accepted are at least 16 printable ASCII characters without spaces")
    return token


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
