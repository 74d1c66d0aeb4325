"""openpi's websocket server (pi0, pi0.5) as a base policy.

The protocol as its own client speaks it: the server sends one msgpack frame of metadata after the handshake, then every frame with
an observation is answered by one with ``actions`` (H, D), physical; a text frame is an error. Arrays are maps of ``__ndarray__``.

openpi's server draws its noise itself and hands out no features, so it is a base for residual and edit heads: a chunk is asked for
once an observation and travels in the conditioning behind the vectors that heads read. A server that was patched to read ``noise``
from the observation takes it (option ``noise``), and is then deterministic in it, as latent-noise heads need.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.policies.base import PolicySpec
from robot_rl.policies.prefix_memory import Prefix, PrefixMemory
from robot_rl.policies.remote.errors import PolicyUnavailable
from robot_rl.policies.remote.words import read_token
from robot_rl.types import ActionSpec, FeatureSpec

MAX_BYTES = 64 << 20
_MISSING = "openpi's protocol needs two packages: pip install 'msgpack>=1' 'websockets>=13'"


@dataclass(frozen=True)
class OpenPIOptions:
    """What openpi's protocol does not tell.

    Attributes:
        observation: openpi's key to the recorded feature, e.g. ``observation/image: observation.images.front``.
        features: recorded feature to its shape; (H, W, 3) are pictures.
        action: low, high, names, kind, mode of the executed action; openpi's chunk may be wider, its first columns are taken.
        horizon, n_action_steps: rows of a chunk, and how many run before it is asked again.
        prompt: the instruction.
        noise: (rows, columns) where the server reads ``noise`` from the observation, else left out.
        timeout_s, connect_s: longest waits.
        token_file: an API key, sent as openpi's client sends it.
        input_cache_mb: observations that are remembered to be asked about again (with ``noise`` only).
    """

    observation: Mapping[str, str]
    features: Mapping[str, Any]
    action: Mapping[str, Any]
    horizon: int
    n_action_steps: int
    prompt: str = ""
    noise: tuple[int, int] | None = None
    timeout_s: float = 5.0
    connect_s: float = 2.0
    token_file: str | None = None
    input_cache_mb: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.n_action_steps <= self.horizon:
            raise ValueError(f"n_action_steps={self.n_action_steps}: accepted are 1 to horizon ({self.horizon})")
        unknown = [n for n in self.observation.values() if n not in self.features]
        if unknown:
            raise ValueError(f"observation: {unknown} are not in features, which are {sorted(self.features)}")
        if self.noise is not None and (len(self.noise) != 2 or min(self.noise) < 1):
            raise ValueError(f"noise={self.noise!r}: accepted are null or [rows, columns]")


def read_options(given: Mapping[str, Any]) -> OpenPIOptions:
    """Raises ValueError for what is missing or unknown."""
    known = [f.name for f in fields(OpenPIOptions)]
    needed = known[:5]
    for name in given:
        if name not in known:
            raise ValueError(f"base.options: unknown option {name!r} for openpi; accepted are {', '.join(known)}")
    if missing := [n for n in needed if n not in given]:
        raise ValueError(
            f"base.options: openpi's server does not tell {', '.join(missing)}; accepted are options with {', '.join(needed)}"
        )
    noise = given.get("noise")
    return OpenPIOptions(**{**given, "noise": None if noise is None else tuple(noise)})


class OpenPIPolicy:
    """See the module. One line to the server, one observation at a time: openpi does not batch.

    Raises:
        PolicyUnavailable: nobody answers, now or later; the next call connects anew.
    """

    def __init__(self, host: str, port: int, options: OpenPIOptions, device: str = "cpu") -> None:
        try:
            import msgpack  # noqa: F401
            import websockets.sync.client  # noqa: F401
        except ImportError:
            raise ImportError(_MISSING) from None
        self.options, self.device = options, device
        self._where = f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
        self._lock = threading.Lock()
        self._line: Any = None
        self._open_line = contextlib.ExitStack()
        self._action = ActionSpec(**{k: tuple(v) for k, v in options.action.items()})
        low, high = torch.tensor(self._action.low), torch.tensor(self._action.high)
        self._offset, self._scale = (low + high) / 2, (high - low) / 2
        with self._lock:
            self.metadata = self._open()
        features = {n: FeatureSpec(tuple(s), "uint8" if len(s) == 3 else "float32") for n, s in options.features.items()}
        self._vectors = [n for n, f in features.items() if f.dtype != "uint8"]
        self._width = sum(features[n].shape[0] for n in self._vectors)
        identity = json.dumps([asdict(options), str(self.metadata)], sort_keys=True, default=str)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        chunk = 0 if options.noise else options.horizon * self._action.dim
        self.spec = PolicySpec(
            observation_features=features, action=self._action, horizon=options.horizon, n_action_steps=options.n_action_steps,
            n_obs_steps=1, noise_shape=options.noise, conditioning_dim=self._width + chunk, sampler="openpi", num_steps=1,
            stats_hash=digest[:12], base_hash=digest[:16],
        )  # fmt: skip
        self._memory = PrefixMemory(self._kept, options.input_cache_mb << 20, options.input_cache_mb << 20, "cpu")
        self.notes = (
            f"served by openpi at {self._where}; its weights are not known here, only what it says of itself",
            "heads read the vector features; pictures are for the policy alone",
        )

    # ---- the contract

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        missing = [n for n in self.spec.observation_features if n not in observation]
        if missing:
            raise KeyError(f"observation lacks {missing}; it has {sorted(observation)}")
        now = {n: observation[n][:, -1].cpu() for n in self.spec.observation_features}
        vectors = torch.cat([now[n].float() for n in self._vectors], dim=-1)
        if self.options.noise is not None:
            self._memory.add(vectors, self._kept(now), now)
            return vectors.to(self.device)
        chunk = self._chunks(now, [None] * len(vectors))
        return torch.cat([vectors, chunk.flatten(1)], dim=-1).to(self.device)

    def sample(self, conditioning: Tensor, noise: Tensor | None, *, grad: bool = False) -> Tensor:
        if grad:
            raise NotImplementedError("no gradient comes over a network: use an algorithm that only calls the sampler")
        if self.options.noise is None:
            return conditioning[:, self._width :].unflatten(1, (self.spec.horizon, self._action.dim))
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

    def normalize_action(self, action: Tensor) -> Tensor:
        return (action - self._offset.to(action.device)) / self._scale.to(action.device)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        return self._offset.to(action.device) + self._scale.to(action.device) * action

    # ---- the server

    @staticmethod
    def _kept(observation: Mapping[str, Tensor]) -> Prefix:
        return Prefix({n: v.clone() for n, v in observation.items()})

    def _chunks(self, observation: Mapping[str, Tensor], noise: list[np.ndarray | None]) -> Tensor:
        """(B, H, A) in the unit cube."""
        out = []
        for i, w in enumerate(noise):
            asked: dict[str, Any] = {key: observation[name][i].numpy() for key, name in self.options.observation.items()}
            if self.options.prompt:
                asked["prompt"] = self.options.prompt
            if w is not None:
                asked["noise"] = w
            answer = self._infer(asked)
            actions = np.asarray(answer.get("actions") if isinstance(answer, dict) else None, np.float32)
            h, a = self.spec.horizon, self._action.dim
            if actions.ndim != 2 or actions.shape[0] < h or actions.shape[1] < a or not np.isfinite(actions[:h, :a]).all():
                raise PolicyUnavailable(
                    f"openpi server {self._where}: actions of shape {actions.shape}; needed are finite ({h}, {a})"
                )
            out.append(torch.from_numpy(actions[:h, :a].copy()))
        return self.normalize_action(torch.stack(out)).clamp(-1.0, 1.0)

    def _infer(self, observation: dict[str, Any]) -> Any:
        with self._lock:
            if self._line is None:
                said = self._open()
                if said != self.metadata:
                    self._drop()
                    raise PolicyUnavailable(f"openpi server {self._where}: another policy is served now; it says {said!r}")
            try:
                self._line.send(packb(observation))
                answer = self._line.recv(timeout=self.options.timeout_s)
            except Exception as error:  # websockets has many; none of them may reach the control loop as anything else
                self._drop()
                raise PolicyUnavailable(f"openpi server {self._where}: {type(error).__name__}: {error}") from error
        if isinstance(answer, str):
            last = answer.strip().splitlines()[-1] if answer.strip() else "an empty error"
            raise PolicyUnavailable(f"openpi server {self._where}: {last[:400]}")
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
            raise PolicyUnavailable(f"openpi server {self._where}: {type(error).__name__}: {error}") from error
        return self._read(first)

    def _read(self, frame: Any) -> Any:
        try:
            return unpackb(frame)
        except Exception as error:
            self._drop()
            raise PolicyUnavailable(f"openpi server {self._where}: a frame that is no msgpack ({error})") from error

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
