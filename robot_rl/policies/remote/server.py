"""A policy for several robots: one model on one computer, asked over TCP, answered in batches.

The server knows the policy alone; heads, weights and everything that learns stay with the robot and its learner. It binds to
loopback unless told otherwise, and beyond loopback it refuses to start without a token. It does not encrypt: where the network
is not trusted, put a tunnel in front.
"""

from __future__ import annotations

import hmac
import logging
import socket
import threading
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from robot_rl.policies.base import BasePolicy
from robot_rl.policies.remote.batching import Batcher
from robot_rl.policies.remote.errors import MessageError
from robot_rl.policies.remote.messages import PROTOCOL, pack, receive
from robot_rl.policies.remote.words import TOKEN_VARIABLE, ActionMap, spec_to_json
from robot_rl.tokens import is_loopback

logger = logging.getLogger(__name__)

PORT = 8765
CONNECTIONS = 64
HELLO_S = 5.0
HELLO_BYTES = 4096
ANSWER_S = 60.0


class PolicyServer:
    """Serves ``base`` until :meth:`close`.

    Args:
        host, port: where to listen; port 0 takes a free one (see :attr:`address`).
        token: asked of every client; needed beyond loopback.
        max_rows, cache_rows: see :class:`robot_rl.policies.remote.batching.Batcher`.

    Raises:
        ValueError: a host beyond loopback without a token, or a policy that cannot be served.
        OSError: the port is taken.
    """

    def __init__(
        self,
        base: BasePolicy,
        *,
        device: str = "cpu",
        host: str = "127.0.0.1",
        port: int = PORT,
        token: str | None = None,
        max_rows: int = 64,
        cache_rows: int = 1024,
    ) -> None:
        if token is None and not is_loopback(host):
            raise ValueError(
                f"host={host!r} without a token: beyond loopback whoever reaches the port could ask. Accepted are 127.0.0.1, or a "
                f"token in {TOKEN_VARIABLE} or a token file"
            )
        actions = ActionMap.of(base, device)
        self.base, self._token = base, token
        self._welcome: dict[str, Any] = {
            "spec": spec_to_json(base.spec), "offset": actions.offset.tolist(), "scale": actions.scale.tolist(), "protocol": PROTOCOL,
        }  # fmt: skip
        self.batcher = Batcher(base, device, max_rows=max_rows, cache_rows=cache_rows)
        self._connections: set[socket.socket] = set()
        self._lock, self._closed = threading.Lock(), False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=CONNECTIONS)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name="policy server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        self._socket.close()
        for connection in connections:
            _hang_up(connection)
        self.batcher.close()
        self._thread.join(2.0)

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, seconds: float | None = None) -> None:
        """Until :meth:`close`, or so long."""
        self._thread.join(seconds)

    def _accept(self) -> None:
        self._socket.settimeout(0.5)  # a close of the socket alone does not wake a thread in accept
        while not self._closed:
            try:
                connection, peer = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            with self._lock:
                if len(self._connections) >= CONNECTIONS:
                    logger.warning("policy server: %s turned away, %d connections are open", peer, CONNECTIONS)
                    connection.close()
                    continue
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection, peer), name=f"robot {peer}", daemon=True).start()

    def _serve(self, connection: socket.socket, peer: Any) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(HELLO_S)
            hello, _ = receive(connection, HELLO_BYTES)
            if not self._known(hello):
                logger.warning("policy server: %s has no valid token", peer)
                connection.sendall(pack({"error": "a token is needed", "final": True}))
                return
            if hello.get("protocol") != PROTOCOL:
                connection.sendall(pack({"error": f"protocol {PROTOCOL} is spoken here", "final": True}))
                return
            connection.sendall(pack(self._welcome))
            connection.settimeout(None)  # a robot that holds asks nothing for hours
            while True:
                head, arrays = receive(connection)
                connection.sendall(self._answer(head, arrays))
        except (EOFError, OSError):
            pass
        except MessageError as error:
            logger.warning("policy server: %s: %s", peer, error)
        finally:
            _hang_up(connection)
            with self._lock:
                self._connections.discard(connection)

    def _known(self, hello: dict[str, Any]) -> bool:
        if self._token is None:
            return True
        return hmac.compare_digest(str(hello.get("token", "")).encode(), self._token.encode())

    def _answer(self, head: dict[str, Any], arrays: Any) -> bytes:
        if head.get("op") == "status":
            return pack({"counts": vars(self.batcher.counts)})
        try:
            return pack({}, self.batcher.ask(head.get("op"), arrays).result(ANSWER_S))  # type: ignore[arg-type]
        except ValueError as error:
            return pack({"error": str(error)})
        except FutureTimeout:
            return pack({"error": f"no answer of the policy within {ANSWER_S:g} s"})
        except Exception as error:
            logger.exception("policy server: the policy failed")
            return pack({"error": f"the policy failed: {type(error).__name__}: {error}"})


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        connection.close()
