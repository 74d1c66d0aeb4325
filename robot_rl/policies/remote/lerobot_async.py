"""LeRobot's asynchronous inference server as a base policy.

The protocol as LeRobot 0.4's own client speaks it, over gRPC: ``Ready``, then ``SendPolicyInstructions`` with what the server is to
load, then for every observation ``SendObservations`` (a stream of pieces) and ``GetActions``, which answers with the chunk or with
nothing. What is sent are pickles of LeRobot's own classes, as its server loads them. What comes back are pickles, too, and those are
never loaded: :mod:`robot_rl.policies.remote.lerobot_replies` reads them as data.

A base for residual and edit heads (see :mod:`robot_rl.policies.remote.served_chunks`). Every observation must go (``must_go``) and
has a number of its own, which counts on from a random one: a chunk with another number is not its answer.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from robot_rl.policies.remote.lerobot_replies import MAX_BYTES, read_chunk
from robot_rl.policies.remote.served_chunks import ServedChunks, ServedOptions, read_served
from robot_rl.policies.remote.words import check_seconds
from robot_rl.types import OBSERVATION_IMAGES, OBSERVATION_STATE

_MISSING = "LeRobot's asynchronous inference needs LeRobot 0.4.4 and grpcio: pip install 'robot_rl[lerobot-async]'"
_WAITS = ("timeout_s", "connect_s", "load_s")
_CHANNEL = [
    ("grpc.max_receive_message_length", MAX_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),  # what failed is told at once
    ("grpc.enable_http_proxy", 0),  # a robot's server is reached directly
    ("grpc.use_local_subchannel_pool", 1),  # a new connection does not wait because former ones failed
]


@dataclass(frozen=True, kw_only=True)
class LeRobotAsyncOptions(ServedOptions):
    """What LeRobot's asynchronous protocol does not tell.

    Attributes:
        observation: the checkpoint's feature to the recorded one: ``observation.state``, and ``observation.images.NAME`` as the
            checkpoint calls its cameras. Its server hands a policy nothing else.
        action: of the executed action; the checkpoint's is as wide.
        horizon: rows of a chunk; sent as ``actions_per_chunk``.
        policy_type: of the checkpoint, e.g. ``act``, ``smolvla``.
        pretrained_name_or_path: as the server sees it.
        server_device: where the server puts the policy.
        names: one for each number of the state, as LeRobot's robots have them (``shoulder_pan.pos``). The server finds the numbers
            by them and the policy never sees them; made up where left out.
        task: the instruction.
        rename_map: of observations, before the checkpoint's own processors.
        load_s: longest wait for the server to load the checkpoint, which it does at every connection.
    """

    policy_type: str
    pretrained_name_or_path: str
    server_device: str = "cpu"
    names: tuple[str, ...] = ()
    task: str = ""
    rename_map: Mapping[str, str] = field(default_factory=dict)
    load_s: float = 120.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seconds(load_s=self.load_s)
        for name in ("policy_type", "pretrained_name_or_path", "server_device"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted is a text that is not empty")
        if not isinstance(self.rename_map, Mapping):
            raise ValueError(f"rename_map={self.rename_map!r}: accepted is a mapping of names")
        if OBSERVATION_STATE not in self.observation:
            raise ValueError(f"observation: {OBSERVATION_STATE} is missing, which LeRobot's server asks for")
        for key, name in self.observation.items():
            picture = key.startswith(OBSERVATION_IMAGES) and "/" not in key and len(key) > len(OBSERVATION_IMAGES)
            if not picture and key != OBSERVATION_STATE:
                raise ValueError(
                    f"observation.{key}: LeRobot's server hands a policy {OBSERVATION_STATE} and {OBSERVATION_IMAGES}NAME alone"
                )
            wanted = "a picture, [height, width, 3]" if picture else "a vector, [numbers]"
            if (len(self.features[name]) == 3) != picture:
                raise ValueError(f"observation.{key}: {name} is {list(self.features[name])}; accepted is {wanted}")
        names, width, cameras = self.names, self.features[self.observation[OBSERVATION_STATE]][0], self.cameras
        if names and (len(names) != width or len({*names, *cameras, "task"}) != len(names) + len(cameras) + 1):
            raise ValueError(f"names={list(names)}: accepted are {width} different ones, none of them a camera's or 'task'")
        if any("/" in n for n in names):
            raise ValueError(f"names={list(names)}: LeRobot takes no '/' in a name")

    @property
    def cameras(self) -> dict[str, str]:
        """LeRobot's name of a camera to the recorded feature."""
        pictures = {k: n for k, n in self.observation.items() if k != OBSERVATION_STATE}
        return {k.removeprefix(OBSERVATION_IMAGES): n for k, n in pictures.items()}

    @property
    def state_names(self) -> tuple[str, ...]:
        width = self.features[self.observation[OBSERVATION_STATE]][0]
        return self.names or tuple(f"{OBSERVATION_STATE}.{i}" for i in range(width))

    def identity(self) -> dict[str, Any]:
        return {n: v for n, v in super().identity().items() if n not in _WAITS}


def read_options(given: Mapping[str, Any]) -> LeRobotAsyncOptions:
    """Raises ValueError for what is missing or unknown."""
    names = given.get("names")
    return read_served(LeRobotAsyncOptions, "LeRobot", {**given, "names": tuple(names)} if names else given)


class _Line(NamedTuple):
    channel: Any
    stub: Any


class LeRobotAsyncPolicy(ServedChunks):
    """See the module. The server serves one robot at a time, and an observation at a time.

    Raises:
        PolicyUnavailable: nobody answers, now or later, or with something else than this robot's actions; the next call connects
            anew, and has the server load the checkpoint again.
        ValueError: a kind of policy that LeRobot's server does not serve.
    """

    server = "LeRobot"
    options: LeRobotAsyncOptions

    def __init__(self, host: str, port: int, options: LeRobotAsyncOptions, device: str = "cpu") -> None:
        try:
            import grpc  # noqa: F401
            from lerobot.async_inference.constants import SUPPORTED_POLICIES
            from lerobot.async_inference.helpers import RemotePolicyConfig
            from lerobot.datasets.utils import hw_to_dataset_features
            from lerobot.transport import services_pb2_grpc  # noqa: F401
            from lerobot.transport.utils import python_object_to_bytes
        except Exception as error:  # generated code refuses older packages with errors of its own
            raise ImportError(f"{_MISSING} ({type(error).__name__}: {error})") from None
        if options.policy_type not in SUPPORTED_POLICIES:
            raise ValueError(f"policy_type={options.policy_type!r}: LeRobot's server serves {', '.join(SUPPORTED_POLICIES)}")
        super().__init__(options, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", device)
        raw: dict[str, Any] = dict.fromkeys(options.state_names, float)
        raw |= {camera: tuple(options.features[name]) for camera, name in options.cameras.items()}
        self._instructions: bytes = python_object_to_bytes(
            RemotePolicyConfig(
                policy_type=options.policy_type,
                pretrained_name_or_path=options.pretrained_name_or_path,
                lerobot_features=hw_to_dataset_features(raw, "observation", use_video=False),
                actions_per_chunk=options.horizon,
                device=options.server_device,
                rename_map=dict(options.rename_map),
            )
        )
        self._number = secrets.randbelow(1 << 40)
        self._line: _Line | None = None
        with self._lock:
            self._open()
        self._describe([options.identity()])

    def close(self) -> None:
        with self._lock:
            self._drop()

    # ---- the server

    def _ask(self, observation: Mapping[str, Tensor], noise: np.ndarray | None) -> np.ndarray:
        options = self.options
        state = observation[options.observation[OBSERVATION_STATE]].tolist()
        raw: dict[str, Any] = dict(zip(options.state_names, state, strict=True))
        raw |= {camera: observation[name].numpy() for camera, name in options.cameras.items()}
        if options.task:
            raw["task"] = options.task
        with self._lock:
            line = self._line or self._open()
            try:
                actions = self._exchange(line, raw)
                if actions.shape[1] != self._action.dim:
                    raise self._unavailable(f"actions {actions.shape[1]} wide; this robot's is {self._action.dim} wide")
            except Exception:
                self._drop()  # an answer that comes later must not be taken for that to the next question
                raise
        return actions

    def _exchange(self, line: _Line, raw: dict[str, Any]) -> np.ndarray:
        """The chunk for one raw observation, as LeRobot's robots give them."""
        from grpc import RpcError
        from lerobot.async_inference.helpers import TimedObservation
        from lerobot.transport import services_pb2
        from lerobot.transport.utils import python_object_to_bytes, send_bytes_in_chunks

        self._number += 1
        timed = TimedObservation(timestamp=time.time(), timestep=self._number, observation=raw, must_go=True)
        pieces = send_bytes_in_chunks(python_object_to_bytes(timed), services_pb2.Observation)
        until, others = time.monotonic() + self.options.timeout_s, 0
        try:
            line.stub.SendObservations(pieces, timeout=self.options.timeout_s)
            while (left := until - time.monotonic()) > 0:
                reply = line.stub.GetActions(services_pb2.Empty(), timeout=left).data
                if not reply:
                    raise self._unavailable(
                        "no actions for this observation: it failed (its log says why), was started anew, or serves another robot"
                    )
                number, actions = read_chunk(reply)
                if number == self._number:
                    return actions
                others += 1
            why = _late(f"timeout_s={self.options.timeout_s:g}")
        except RpcError as error:
            why = _said(error, f"timeout_s={self.options.timeout_s:g}")
        except ValueError as error:
            why = f"an answer that is not LeRobot's timed actions: {error}"
        raise self._unavailable(f"{why}; {others} to other observations were dropped" if others else why)

    def _open(self) -> _Line:
        import grpc
        from lerobot.transport import services_pb2
        from lerobot.transport.services_pb2_grpc import AsyncInferenceStub

        channel = grpc.insecure_channel(self._where, _CHANNEL)
        stub, waits = AsyncInferenceStub(channel), f"connect_s={self.options.connect_s:g}"
        try:
            stub.Ready(services_pb2.Empty(), timeout=self.options.connect_s)
            waits = f"load_s={self.options.load_s:g}"
            stub.SendPolicyInstructions(services_pb2.PolicySetup(data=self._instructions), timeout=self.options.load_s)
        except grpc.RpcError as error:
            channel.close()
            raise self._unavailable(_said(error, waits)) from error
        self._line = _Line(channel, stub)
        return self._line

    def _drop(self) -> None:
        if self._line is not None:
            self._line.channel.close()
            self._line = None


def _said(error: Any, waited: str) -> str:
    code = error.code().name
    if code == "DEADLINE_EXCEEDED":
        return _late(waited)
    return f"{code}: {error.details() or ''}"


def _late(waited: str) -> str:
    return f"no answer within {waited}"
