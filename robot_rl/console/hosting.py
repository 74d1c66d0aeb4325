"""Runs the page's server in a thread of its own, so that a ROS node or a simulation can have the main one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from robot_rl.console.access import Access
from robot_rl.console.office import Office
from robot_rl.tokens import is_loopback, read_token

TOKEN = "ROBOT_RL_CONSOLE_TOKEN"
PORT = 8780
MAX_MESSAGE = 16384
S = TypeVar("S", bound="PageServer")
INSTALL = "the operator's page needs starlette, uvicorn and websockets: python -m pip install 'robot_rl[console]'"


@dataclass(frozen=True)
class HostConfig:
    """Where the page is served.

    Attributes:
        bind, port: loopback by default; 0 takes a free port.
        token_file: file of mode 0600; else the environment's ``ROBOT_RL_CONSOLE_TOKEN``. Needed beyond loopback.
        certificate, key: PEM files for https. Browsers give gamepads to https pages and to this machine's own only.
        names: further host names of this server.
    """

    bind: str = "127.0.0.1"
    port: int = PORT
    token_file: str = ""
    certificate: str = ""
    key: str = ""
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"http_port={self.port}: accepted are 0 to 65535")
        if bool(self.certificate) != bool(self.key):
            raise ValueError("certificate and key: accepted are both or neither")


class PageServer:
    """A running server of one ASGI application; use as a context manager.

    Args:
        build: makes the application, which lets in whom ``Access`` lets in.

    Raises:
        ImportError: the extra ``console`` is not installed.
        ValueError: it is to be reached by other machines and there is no token.
        OSError: the port is taken.
    """

    def __init__(self, build: Callable[[Access], Any], config: HostConfig | None = None) -> None:
        try:
            import uvicorn
        except ImportError as error:
            raise ImportError(INSTALL, name=error.name) from error
        self.config = config or HostConfig()
        self.access = Access(self.config.bind, read_token(TOKEN, self.config.token_file or None), self.config.names)
        family = socket.AF_INET6 if ":" in self.config.bind else socket.AF_INET
        self._socket = socket.socket(family)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((self.config.bind, self.config.port))
        except OSError as error:
            self._socket.close()
            raise OSError(f"http_bind={self.config.bind!r} http_port={self.config.port}: {error.strerror or error}") from error
        self.port: int = self._socket.getsockname()[1]
        try:
            app = build(self.access)
        except ImportError as error:
            self._socket.close()
            raise ImportError(INSTALL, name=error.name) from error
        tls: dict[str, Any] = {}
        if self.config.certificate:
            tls = {"ssl_certfile": self.config.certificate, "ssl_keyfile": self.config.key}
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                ws_max_size=MAX_MESSAGE,
                ws_ping_interval=5.0,
                ws_ping_timeout=5.0,
                timeout_graceful_shutdown=2,
                server_header=False,
                ws_per_message_deflate=False,
                **tls,
            )
        )
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self.error: BaseException | None = None

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except BaseException as error:  # told to whoever asks; a thread's own traceback helps nobody
            self.error = error

    @property
    def url(self) -> str:
        scheme = "https" if self.config.certificate else "http"
        host = self.config.bind
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        elif is_loopback(host):
            host = "localhost" if host == "localhost" else host
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    def start(self: S) -> S:
        """Raises RuntimeError when it does not come up."""
        self._thread.start()
        until = time.monotonic() + 20.0
        while not self._server.started:
            if self.error is not None or not self._thread.is_alive() or time.monotonic() > until:
                raise RuntimeError(f"the page's server did not start: {self.error}")
            time.sleep(0.01)
        return self

    def close(self) -> None:
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(5.0)
        with suppress(OSError):
            self._socket.close()

    def __enter__(self: S) -> S:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()


class ConsoleServer(PageServer):
    """The operator's page of an office."""

    def __init__(self, office: Office, config: HostConfig | None = None) -> None:
        def build(access: Access) -> Any:
            from robot_rl.console.server import make_app

            return make_app(office, access)

        super().__init__(build, config)
