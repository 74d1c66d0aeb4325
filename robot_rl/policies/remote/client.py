"""A policy on another computer as a base policy here."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.policies.base import PolicySpec
from robot_rl.policies.remote.batching import CHUNK, CONDITIONING, NOISE
from robot_rl.policies.remote.errors import MessageError, PolicyUnavailable
from robot_rl.policies.remote.messages import PROTOCOL, Arrays, pack, receive
from robot_rl.policies.remote.words import check_seconds, read_token, spec_from_json


class RemotePolicy:
    """Asks a :class:`robot_rl.policies.remote.server.PolicyServer`. Noise goes there, so heads that choose it work as they do here.

    Every failure of network or server is a :class:`PolicyUnavailable`; the call after it connects anew. A server that comes back
    with another policy stays unavailable: a head was made for one base.

    Args:
        timeout_s: longest wait for an answer.
        connect_s: longest wait for a connection.

    Raises:
        PolicyUnavailable: nobody answers at this address now.
    """

    spec: PolicySpec

    def __init__(
        self,
        host: str,
        port: int,
        device: str = "cpu",
        *,
        timeout_s: float = 2.0,
        connect_s: float = 1.0,
        token_file: str | None = None,
    ) -> None:
        check_seconds(timeout_s=timeout_s, connect_s=connect_s)
        self.host, self.port, self.device = host, port, device
        self._timeout_s, self._connect_s, self._token_file = timeout_s, connect_s, token_file
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        with self._lock:
            self._open()
        self.notes = (f"served by {host}:{port}",)

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Each vector feature (B, n_obs, dim), each picture (B, n_obs, H, W, 3) uint8; returns (B, C)."""
        missing = [n for n in self.spec.observation_features if n not in observation]
        if missing:
            raise KeyError(f"observation lacks {missing}; it has {sorted(observation)}")
        asked = {n: _array(observation[n], f.dtype) for n, f in self.spec.observation_features.items()}
        return self._tensor(self._ask("encode", asked)[CONDITIONING])

    def sample(self, conditioning: Tensor, noise: Tensor | None, *, grad: bool = False) -> Tensor:
        """(B, C) and (B, H_w, A_w) to (B, H, A) in [-1, 1]."""
        if grad:
            raise NotImplementedError("no gradient comes over a network: use an algorithm that only calls the sampler")
        asked = {CONDITIONING: _array(conditioning)}
        if noise is not None:
            asked[NOISE] = _array(noise)
        return self._tensor(self._ask("sample", asked)[CHUNK])

    def normalize_action(self, action: Tensor) -> Tensor:
        return (action - self._offset.to(action.device)) / self._scale.to(action.device)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        return self._offset.to(action.device) + self._scale.to(action.device) * action

    def status(self) -> dict[str, Any]:
        """The server's counts of questions, batches and cached encodings."""
        with self._lock:
            return self._exchange({"op": "status"}, {})[0]["counts"]

    def close(self) -> None:
        with self._lock:
            self._drop()

    # ---- the line

    def _ask(self, operation: str, arrays: Arrays) -> Arrays:
        with self._lock:
            return self._exchange({"op": operation}, arrays)[1]

    def _exchange(self, head: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        connection = self._socket or self._open()
        try:
            connection.sendall(pack(head, arrays))
            answer, result = receive(connection)
        except (OSError, EOFError, MessageError) as error:
            self._drop()  # an answer that comes later must not be taken for that to the next question
            raise self._unavailable(error) from error
        if "error" in answer:
            raise self._unavailable(str(answer["error"]))
        return answer, result

    def _open(self) -> socket.socket:
        token = read_token(self._token_file)
        try:
            connection = socket.create_connection((self.host, self.port), self._connect_s)
        except OSError as error:
            raise self._unavailable(error) from error
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(self._timeout_s)
            connection.sendall(pack({"protocol": PROTOCOL} | ({} if token is None else {"token": token})))
            welcome, _ = receive(connection)
            if "error" in welcome:
                raise self._unavailable(str(welcome["error"]))
            spec = spec_from_json(welcome["spec"])
            offset, scale = (torch.tensor(welcome[n], dtype=torch.float32) for n in ("offset", "scale"))
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            connection.close()
            raise error if isinstance(error, PolicyUnavailable) else self._unavailable(error) from error
        before = getattr(self, "spec", spec)
        if spec.base_hash != before.base_hash:
            connection.close()
            raise self._unavailable(f"it now serves policy {spec.base_hash}, and this session began with {before.base_hash}")
        self.spec, self._offset, self._scale, self._socket = spec, offset, scale, connection
        return connection

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _unavailable(self, why: object) -> PolicyUnavailable:
        text = str(why) or type(why).__name__
        return PolicyUnavailable(f"policy server {self.host}:{self.port}: {text}")

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.device)


def _array(value: Tensor, dtype: str = "float32") -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy(), np.dtype(dtype))
