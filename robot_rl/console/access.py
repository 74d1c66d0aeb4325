"""Who is let in: a token beyond loopback, pages of this server only, and answers to its own names only.

A browser at the robot visits other pages too. Their scripts can open sockets to this machine, so every request must carry an Origin
that is this server, and a Host that this server goes by (a name that somebody else resolves to it is none).
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from robot_rl.tokens import is_loopback

COOKIE = "robot_rl_console"
MAX_SESSIONS = 256


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    return (urlsplit(f"//{host}").hostname or "").lower()


@dataclass
class Access:
    """Attributes:
    bind: address the server listens at.
    token: what a browser must know once; None: everybody on this machine is let in.
    names: further host names people may use for this server.
    """

    bind: str = "127.0.0.1"
    token: str | None = None
    names: tuple[str, ...] = ()
    _sessions: dict[str, None] = field(default_factory=dict, repr=False)
    refused: int = 0

    def __post_init__(self) -> None:
        if not is_loopback(self.bind) and self.token is None:
            raise ValueError(
                f"http_bind={self.bind!r} is reached by other machines: accepted with a token (token_file, or ROBOT_RL_CONSOLE_TOKEN)"
            )

    def knows_host(self, host: str) -> bool:
        """Whether a Host header names this server."""
        try:
            name = host_name(host)
        except ValueError:
            return False
        if is_loopback(name) or name in self.names:
            return True
        if is_loopback(self.bind):
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in (socket.gethostname().lower(), socket.getfqdn().lower(), f"{socket.gethostname().lower()}.local")
        return True  # an address cannot be rebound by somebody's name server

    def own_page(self, headers: Mapping[str, str]) -> bool:
        """Whether a request comes from a page of this server: Host is known and Origin, where given, is that Host."""
        host = headers.get("host", "")
        if not self.knows_host(host):
            return False
        origin = headers.get("origin")
        try:
            return origin is None or urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            return False

    def login(self, token: str) -> str | None:
        """A new cookie for the right token, else None; the comparison takes as long either way."""
        if self.token is None or not hmac.compare_digest(token.encode(errors="replace"), self.token.encode()):
            self.refused += 1
            return None
        session = secrets.token_urlsafe(32)
        self._sessions[session] = None
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.pop(next(iter(self._sessions)))
        return session

    def lets_in(self, cookies: Mapping[str, str], authorization: str = "") -> bool:
        """By cookie, or by ``Authorization: Bearer`` for programs."""
        if self.token is None:
            return True
        if cookies.get(COOKIE, "") in self._sessions:
            return True
        scheme, _, given = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(errors="replace"), self.token.encode())
