"""openpi's websocket server (pi0, pi0.5) as a base policy.

The protocol as its own client speaks it: the server sends one msgpack frame of metadata after the handshake, then every frame with
an observation is answered by one with ``actions`` (H, D), physical; a text frame is an error. Arrays are maps of ``__ndarray__``.

A base for residual and edit heads (see :mod:`robot_rl.policies.remote.served_chunks`). A server that was patched to read ``noise``
from the observation takes it (option ``noise``), and is then deterministic in it, as latent-noise heads need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.policies.prefix_memory import Prefix, PrefixMemory
from robot_rl.policies.remote.served_chunks import ServedChunks, ServedOptions, read_served
from robot_rl.policies.remote.words import read_token

MAX_BYTES = 64 << 20
_MISSING = "openpi's protocol needs two packages: pip install 'msgpack>=1' 'websockets>=13'"


@dataclass(frozen=True, kw_only=True)
class OpenPIOptions(ServedOptions):
    """What openpi's protocol does not tell.

    Attributes:
        observation: openpi's key to the recorded feature, e.g. ``observation/image: observation.images.front``.
        action: of the executed action; openpi's chunk may be wider, its first columns are taken.
        prompt: the instruction.
        noise: (rows, columns) where the server reads ``noise`` from the observation, else left out.
        token_file: an API key, sent as openpi's client sends it.
        input_cache_mb: observations that are remembered to be asked about again (with ``noise`` only).
    """

    prompt: str = ""
    noise: tuple[int, int] | None = None
    token_file: str | None = None
    input_cache_mb: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise is not None and (len(self.noise) != 2 or min(self.noise) < 1):
            raise ValueError(f"noise={self.noise!r}: accepted are null or [rows, columns]")


def read_options(given: Mapping[str, Any]) -> OpenPIOptions:
    """Raises ValueError for what is missing or unknown."""
    noise = given.get("noise")
    return read_served(OpenPIOptions, "openpi", given if noise is None else {**given, "noise": tuple(noise)})


class OpenPIPolicy(ServedChunks):
    """See the module. One line to the server, one observation at a time: openpi does not batch.

    Raises:
        PolicyUnavailable: nobody answers, now or later; the next call connects anew.
    """

    server = "openpi"
    options: OpenPIOptions

    def __init__(self, host: str, port: int, options: OpenPIOptions, device: str = "cpu") -> None:
        try:
            import msgpack  # noqa: F401
            import websockets.sync.client  # noqa: F401
        except ImportError:
            raise ImportError(_MISSING) from None
        super().__init__(options, f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}", device)
        self._line: Any = None
        self._open_line = contextlib.ExitStack()
        with self._lock:
            self.metadata = self._open()
        self._describe([asdict(options), str(self.metadata)], options.noise)
        self._memory = PrefixMemory(self._kept, options.input_cache_mb << 20, options.input_cache_mb << 20, "cpu")

    # ---- the contract

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        if self.options.noise is None:
            return super().encode(observation)
        now, vectors = self._now(observation)
        self._memory.add(vectors, self._kept(now), now)
        return vectors.to(self.device)

    def sample(self, conditioning: Tensor, noise: Tensor | None, *, grad: bool = False) -> Tensor:
        if self.options.noise is None or grad:
            return super().sample(conditioning, noise, grad=grad)
        if noise is None:
            raise ValueError(f"openpi: noise is missing; accepted is (B, {self.options.noise[0]}, {self.options.noise[1]})")
        rows = conditioning.cpu()
        if not rows.any():  # a head that is proved before it acts
            blank = {n: torch.zeros((len(rows), *f.shape)) for n, f in self.spec.observation_features.items()}
            known = {
                n: v.to(torch.uint8) if self.spec.observation_features[n].dtype == "uint8" else v for n, v in blank.items()
            }
        else:
            known = self._memory.find(rows).tensors
        return self._chunks(known, list(noise.detach().float().cpu().numpy())).to(self.device)

    # ---- the server

    @staticmethod
    def _kept(observation: Mapping[str, Tensor]) -> Prefix:
        return Prefix({n: v.clone() for n, v in observation.items()})

    def _ask(self, observation: Mapping[str, Tensor], noise: np.ndarray | None) -> np.ndarray:
        asked: dict[str, Any] = {key: observation[name].numpy() for key, name in self.options.observation.items()}
        if self.options.prompt:
            asked["prompt"] = self.options.prompt
        if noise is not None:
            asked["noise"] = noise
        answer = self._infer(asked)
        return np.asarray(answer.get("actions") if isinstance(answer, dict) else None, np.float32)

    def _infer(self, observation: dict[str, Any]) -> Any:
        with self._lock:
            if self._line is None:
                said = self._open()
                if said != self.metadata:
                    self._drop()
                    raise self._unavailable(f"another policy is served now; it says {said!r}")
            try:
                self._line.send(packb(observation))
                answer = self._line.recv(timeout=self.options.timeout_s)
            except Exception as error:  # websockets has many; none of them may reach the control loop as anything else
                self._drop()
                raise self._unavailable(f"{type(error).__name__}: {error}") from error
        if isinstance(answer, str):
            last = answer.strip().splitlines()[-1] if answer.strip() else "an empty error"
            raise self._unavailable(f"{last[:400]}")
        return self._read(answer)

    def _open(self) -> Any:
        from websockets.sync.client import connect

        token = read_token(self.options.token_file)
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        try:
            line = connect(
                self._where,
                compression=None,
                max_size=MAX_BYTES,
                additional_headers=headers,
                open_timeout=self.options.connect_s,
            )
            self._line = self._open_line.enter_context(line)
            first = self._line.recv(timeout=self.options.timeout_s)
        except Exception as error:
            self._drop()
            raise self._unavailable(f"{type(error).__name__}: {error}") from error
        return self._read(first)

    def _read(self, frame: Any) -> Any:
        try:
            return unpackb(frame)
        except Exception as error:
            self._drop()
            raise self._unavailable(f"a frame that is no msgpack ({error})") from error

    def _drop(self) -> None:
        self._line = None
        with contextlib.suppress(Exception):  # a line that is broken may not even be closed without one
            self._open_line.close()
        self._open_line = contextlib.ExitStack()

    def close(self) -> None:
        with self._lock:
            self._drop()


def packb(value: Any) -> bytes:
    """msgpack with openpi's way of writing arrays."""
    import msgpack

    def words(x: Any) -> Any:
        if isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
            return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": list(x.shape)}
        if isinstance(x, np.generic) and x.dtype.kind in "biuf":
            return {b"__npgeneric__": True, b"data": x.item(), b"dtype": x.dtype.str}
        raise TypeError(f"{type(x).__name__} does not travel to openpi")

    return msgpack.packb(value, default=words)


def unpackb(data: bytes) -> Any:
    """Its inverse. Raises ValueError for arrays of anything but numbers."""
    import msgpack

    def read(x: dict[Any, Any]) -> Any:
        kind = np.dtype(x[b"dtype"]) if b"__ndarray__" in x or b"__npgeneric__" in x else None
        if kind is None:
            return x
        if kind.kind not in "biuf":
            raise ValueError(f"an array of {kind}")
        if b"__npgeneric__" in x:
            return kind.type(x[b"data"])
        return np.frombuffer(x[b"data"], kind).reshape(x[b"shape"])

    return msgpack.unpackb(data, object_hook=read, strict_map_key=False)
