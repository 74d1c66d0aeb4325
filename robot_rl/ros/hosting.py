"""What acts: a frozen base policy, the head on it, and new versions of the head as they are published. No rclpy here.

Everything slow happens in :meth:`PolicyHost.load` (configure) and in the weights thread; the control side only takes references.
With ``inference: process`` the host lives in a child process (:mod:`robot_rl.ros.inference_child`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import numpy as np

from robot_rl.ros.inference import HostGone
from robot_rl.ros.versions import VersionChoice
from robot_rl.runtime.chunk_scheduler import RunningChunk
from robot_rl.runtime.weights import VerificationError, WeightChannel, WeightSource, WeightSubscriber
from robot_rl.types import ActionSpec, Decision, FeatureSpec

if TYPE_CHECKING:
    from robot_rl.heads.base import Head
    from robot_rl.policies.base import BasePolicy, PolicySpec
    from robot_rl.runtime.acting import ActingPolicy, DecisionRequest
    from robot_rl.wire import WeightsNotice

KEEP_HEADS = 4
POLL_S = 0.5
LOOKED_FOR_S = 60.0
LOOKED_FOR = "looked for in "


@dataclass(frozen=True)
class HostConfig:
    """As the parameters of policy_node; ``policy`` and ``head`` are folders."""

    policy: str
    head: str = ""
    run_dir: str = ""
    device: str = "auto"
    explore: bool = True
    weights_url: str = ""
    token_file: str = ""
    warmup_forwards: int = 10
    seed: int = 0


def policy_folder(text: str) -> str:
    """What ``load_policy`` takes: ``base/`` of a run folder, else the policy, LeRobot checkpoint or ``remote:HOST:PORT`` as given."""
    base = Path(text).expanduser() / "base"
    return (
        str(base) if (base / "policy.json").is_file() else text if text.startswith("remote:") else str(Path(text).expanduser())
    )


class PolicyHost(VersionChoice):
    """Loads once, decides on request, and swaps to a verified version when it is told that it may.

    Attributes:
        ready: whether it can decide; a host in this process always can.
        cannot_continue: why chunks cannot continue a running one, of base or head; empty where they can.
        refused: counted for diagnostics; ``last_error`` says why the last version was refused.
        on_change: called in the weights thread after it has looked for versions.
    """

    acting: ActingPolicy
    offered: ActingPolicy | None
    ready = True
    cannot_continue = ""

    def __init__(self, config: HostConfig, log: Callable[[str], None]) -> None:
        super().__init__()
        self.config, self._log = config, log
        self.last_error = ""
        self.on_change: Callable[[], None] = lambda: None
        self._heads: dict[int, Head] = {}
        self._wanted, self._wanted_until = 0, 0.0
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._subscribers: dict[str, WeightSubscriber] = {}

    # ---- configure

    def load(self) -> None:
        """Model, head, newest verified weights, warm-up.

        Raises:
            FileNotFoundError, ValueError: a folder, file or device that the user can put right.
        """
        import torch

        from robot_rl.policies.loading import load_policy
        from robot_rl.training.build import pick_device

        torch.set_num_threads(1)  # the control loop beside it needs the other cores more than a small policy does
        self.device = pick_device(self.config.device)
        self.base: BasePolicy = load_policy(policy_folder(self.config.policy), self.device)
        self._head_config: Any = self._read_head()
        self.acting = self.policy(0)
        self.cannot_continue = self.acting.cannot_continue()
        if self._head_config is not None:
            head = self._build_head()  # one that does not fit the base is refused here
            self.cannot_continue = replace(self.acting, head=head, mode="eval").cannot_continue()
            if source := self._local():
                self._poll(source, None)
                if self.offered is not None:
                    self.acting, self.offered = self.offered, None
        requests = [self._blank_request()]
        if not self.cannot_continue:  # it takes a gradient, whose first one costs more than all others
            rows = np.zeros((1, self.action.dim), np.float32)
            requests.append(replace(requests[0], running=RunningChunk(rows, rows, 0)))
        for _ in range(self.config.warmup_forwards):
            for request in requests:
                self.acting.decide([request])

    def _read_head(self) -> Any:
        from robot_rl.config import load
        from robot_rl.training.config import PostTrainConfig

        if not self.config.head:
            return None
        path = Path(self.config.head).expanduser()
        file = path / "config.yaml" if path.is_dir() else path
        if not file.is_file() and not path.suffix:
            file = Path("recipes") / f"{path.name}.yaml"
        return load(PostTrainConfig, file)

    def _build_head(self) -> Head:
        from robot_rl.training.build import build_head

        head = build_head(self.base, self._head_config.head, self._head_config.seed, self._head_config.learner)
        return head.to(self.device)

    def _blank_request(self) -> DecisionRequest:
        from robot_rl.runtime.acting import DecisionRequest

        n = self.base.spec.n_obs_steps
        blank = {k: np.zeros((n, *f.shape), f.dtype) for k, f in self.base.spec.observation_features.items()}
        return DecisionRequest(blank, ("warm-up",), 0, 0)

    # ---- what it says about itself

    @property
    def features(self) -> dict[str, FeatureSpec]:
        return dict(self.base.spec.observation_features)

    @property
    def action(self) -> ActionSpec:
        return self.base.spec.action

    @property
    def spec(self) -> PolicySpec:
        return self.base.spec

    @property
    def versions(self) -> list[int]:
        """Versions of the head that are ready to act."""
        return sorted(self._heads)

    @property
    def refused(self) -> int:
        return sum(s.refused for s in self._subscribers.values())

    # ---- deciding (inference thread)

    def decide(self, request: DecisionRequest) -> Decision:
        from robot_rl.policies.remote.errors import PolicyUnavailable

        policy = self.policy(0) if self.deciding != self.acting.version else self.acting
        try:
            return policy.decide([request])[0]
        except PolicyUnavailable as error:  # the next request tries again
            raise HostGone(str(error)) from error

    # ---- versions

    def start_watching(self) -> None:
        """Look for new versions in a thread of its own: when a notice comes, and every half second in a local folder."""
        if self._head_config is None or self._thread is not None:
            return
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="weights", daemon=True)
        self._thread.start()

    def notice(self, notices: Sequence[WeightsNotice]) -> None:
        super().notice(notices)
        self._wake.set()

    def want(self, version: int) -> None:
        self._wanted, self._wanted_until = version, time.monotonic() + LOOKED_FOR_S
        self._wake.set()

    def fetch(self, version: int) -> bool:
        """Load exactly this version from the local folder, if it is there (what acted before a restart). For configure."""
        if version > 0 and self._head_config is not None and version not in self._heads and (source := self._local()):
            self._poll(source, version)
        return self.has(version)

    def set_explore(self, explore: bool) -> None:
        """Whether heads sample or act deterministically, from now on."""
        if explore != self.config.explore:
            self.config = replace(self.config, explore=explore)
            if self.acting.version in self._heads:
                self.acting = self.policy(self.acting.version)

    def policy(self, version: int) -> ActingPolicy:
        from robot_rl.runtime.acting import ActingPolicy

        if version == 0:
            return ActingPolicy(self.base, mode="base", device=self.device)
        mode = "explore" if self.config.explore else "eval"
        return ActingPolicy(self.base, self._heads[version], mode, version, device=self.device)  # type: ignore[arg-type]

    def _local(self) -> WeightSource | None:
        if not self.config.run_dir:
            return None
        return WeightChannel(Path(self.config.run_dir) / "weights")

    def _source(self, uri: str) -> tuple[str, WeightSource]:
        """Where a notice's bytes are: a shared folder, or the learner's endpoint."""
        if self.config.weights_url:
            uri = self.config.weights_url
        parts = urlsplit(uri)
        if parts.scheme in ("http", "https"):
            from robot_rl.runtime.transfer import RemoteWeights, read_token

            address = f"{parts.scheme}://{parts.netloc}"
            if address in self._subscribers:
                return address, self._subscribers[address].source
            mirror = Path(self.config.run_dir) / "weights_mirror" if self.config.run_dir else None
            return address, RemoteWeights(address, mirror, token=read_token(token_file=self.config.token_file or None) or "")
        folder = Path(unquote(parts.path) if parts.scheme == "file" else uri)
        while folder.name and folder.name.isdigit():
            folder = folder.parent
        return str(folder), WeightChannel(folder)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(POLL_S)
            self._wake.clear()
            try:
                notices = dict(self._notices)
                if notices:
                    for notice in notices.values():
                        if notice.version > 0 and notice.version not in self._heads:
                            key, source = self._source(notice.uri)
                            self._poll(source, notice.version, key)
                elif (source_ := self._local()) is not None:
                    self._poll(source_, None)
                if not self.has(self._wanted) and time.monotonic() < self._wanted_until:
                    self._look_for(self._wanted)
            except Exception as error:  # whatever is wrong with new weights, the acting version goes on
                self.last_error = str(error)
                self._log(f"weights: {error}")
                self._stop.wait(POLL_S)
            self.on_change()

    def _look_for(self, version: int) -> None:
        """A version that nobody announces any more: in the local folder, then wherever versions have come from.

        With subscribers of its own: one that was asked for two versions in turns would verify both anew each time.
        """
        local = self._local()
        sources = {} if local is None else {"local": local}
        sources |= {k: s.source for k, s in self._subscribers.items() if not k.startswith(LOOKED_FOR)}
        for key, source in sources.items():
            if not self.has(version):
                self._poll(source, version, f"{LOOKED_FOR}{key}")

    def _poll(self, source: WeightSource, version: int | None, key: str = "local") -> None:
        subscriber = self._subscribers.get(key)
        if subscriber is None:
            spec = self.base.spec
            shapes = {n: tuple(t.shape) for n, t in self._build_head().state_dict().items()}
            subscriber = self._subscribers[key] = WeightSubscriber(
                source, expected_shapes=shapes, base_hash=spec.base_hash, stats_hash=spec.stats_hash, dry_forward=self._dry
            )
        manifest = subscriber.poll(version)
        self.last_error = subscriber.last_error
        if manifest is None:
            return
        wanted = {self.acting.version, self._wanted, self.pinned, *(n.version for n in self._notices.values())}
        for old in sorted(self._heads)[: max(0, len(self._heads) - KEEP_HEADS)]:
            if old not in wanted:
                self._heads.pop(old)
        assert subscriber.tensors is not None
        head = self._build_head()
        head.load_state_dict(subscriber.tensors)
        head.eval()
        self._heads[manifest.version] = head
        if not self._notices and version is None:
            self.offered = self.policy(manifest.version)

    def _dry(self, tensors: dict[str, Any]) -> bool:
        """One decision of a head with these tensors on a blank observation: finite, and of the right shape."""
        from robot_rl.runtime.acting import ActingPolicy

        head = self._build_head()
        head.load_state_dict(tensors)
        mode = "explore" if self.config.explore else "eval"
        decision = ActingPolicy(self.base, head, mode, 1, device=self.device).decide([self._blank_request()])[0]  # type: ignore[arg-type]
        if not np.isfinite(decision.chunk).all():
            raise VerificationError("the dry forward gives values that are not finite")
        return decision.chunk.shape == (self.base.spec.horizon, self.action.dim)

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(5.0)
            self._thread = None
