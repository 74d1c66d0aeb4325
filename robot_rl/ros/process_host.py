"""A policy in a child process: the same questions and answers as :class:`robot_rl.ros.hosting.PolicyHost`, without its GIL. No rclpy here.

The control process stays small: it sends an observation and gets a chunk. The child may hang or die at any moment; then decisions raise
:class:`HostGone`, the robot holds, and :meth:`ProcessHost.look` starts another child.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import robot_rl
from robot_rl.ros.frames import Line
from robot_rl.ros.hosting import HostConfig
from robot_rl.ros.inference import HostGone
from robot_rl.ros.inference_child import config_words, read_decision, request_message
from robot_rl.ros.versions import VersionChoice
from robot_rl.runtime.priority import at_normal_priority
from robot_rl.types import ActionSpec, Decision, FeatureSpec

if TYPE_CHECKING:
    from robot_rl.policies.base import PolicySpec
    from robot_rl.runtime.acting import DecisionRequest
    from robot_rl.wire import WeightsNotice

RESTART_S = (0.2, 5.0)  # first pause before another child, and the longest one
END_S = 3.0


@dataclass(frozen=True)
class Version:
    """What the child is told to act with."""

    version: int
    mode: str


@dataclass(frozen=True)
class Perception:
    """The child's own node: its name, and per camera topic what to subscribe to and how to show it.

    ``on_picture(topic, pixels, stamp_ns, arrived_ns, frozen)`` is called in a thread of its own.
    """

    name: str
    namespace: str
    cameras: Mapping[str, Mapping[str, Any]]
    on_picture: Callable[[str, np.ndarray, int, int, bool], None]


class _Child:
    """One child process and the two lines to it."""

    def __init__(self, host: ProcessHost, begin: Mapping[str, Any]) -> None:
        self._host = host
        self.questions, there = Line.pair()
        self.news, from_there = Line.pair()
        ends = (there.descriptor, from_there.descriptor)
        root = str(Path(robot_rl.__file__).resolve().parents[1])
        paths = dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
        with at_normal_priority():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "robot_rl.ros.inference_child", *map(str, ends), str(os.getpid())],
                stdin=subprocess.DEVNULL, pass_fds=ends, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
        there.close()
        from_there.close()
        with suppress(OSError):  # it died already; look() will see
            self.questions.send(begin)
        self._thread = threading.Thread(target=self._listen, name="host news", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            while True:
                self._host.heard(self, *self.news.receive())
        except (EOFError, OSError):
            self._host.lost(self)

    def close(self, patience_s: float = 0.0) -> None:
        """End the process, and the lines when nobody reads them any more."""
        if self.process.poll() is None:
            self.process.terminate() if patience_s else self.process.kill()
            try:
                self.process.wait(patience_s or END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0)
        self.questions.close()
        self.news.close()


class ProcessHost(VersionChoice):
    """See the module.

    Attributes:
        ready: a child is there and has loaded everything.
        restarts: children that were started after the first one.
    """

    acting: Version
    offered: Version | None

    def __init__(
        self, config: HostConfig, log: Callable[[str], None], perception: Perception | None = None, timeout_s: float = 60.0
    ) -> None:
        super().__init__()
        self.config, self._log, self._perception, self._timeout = config, log, perception, timeout_s
        self.ready = False
        self.restarts = 0
        self.last_error = self.cannot_continue = ""
        self.acting = Version(0, "base")
        self.spec: PolicySpec
        self._versions: frozenset[int] = frozenset()
        self._wanted = 0
        self._refused = self._refused_before = 0
        self._failure: tuple[str, bool] | None = None
        self._news = threading.Condition()
        self._child: _Child | None = None
        self._again_at, self._pause = 0.0, RESTART_S[0]
        self._closed = False

    # ---- configure

    def load(self) -> None:
        """Start the child and wait until it has loaded and warmed up.

        Raises:
            ValueError: what the child could not load, in its words, or that it took longer than it may.
        """
        import robot_rl.runtime.acting  # noqa: F401  (requests are made of its dataclass; its first import takes seconds)

        self._child = self._start()
        until = time.monotonic() + self._timeout
        with self._news:
            while not self.ready and self._failure is None and self._child.process.poll() is None:
                if not self._news.wait(min(0.2, max(0.0, until - time.monotonic()))) and time.monotonic() >= until:
                    break
        if self.ready:
            return
        failure, code = self._failure, self._child.process.poll()
        self.close()
        if failure is not None and not failure[1]:
            raise RuntimeError(failure[0])
        why = failure[0] if failure else f"not loaded within {self._timeout:g} s" if code is None else f"it ended with {code}"
        raise ValueError(f"the inference process: {why}" if failure is None else why)

    def _start(self) -> _Child:
        self._failure = None
        p = self._perception
        return _Child(
            self,
            {
                "config": config_words(self.config), "acting": self.acting.version, "name": p.name if p else "",
                "namespace": p.namespace if p else "", "cameras": {t: dict(c) for t, c in p.cameras.items()} if p else {},
            },
        )  # fmt: skip

    def start_watching(self) -> None:
        """The child has watched for versions since it loaded."""

    # ---- what it says about itself

    @property
    def features(self) -> dict[str, FeatureSpec]:
        return dict(self.spec.observation_features)

    @property
    def action(self) -> ActionSpec:
        return self.spec.action

    @property
    def refused(self) -> int:
        return self._refused_before + self._refused

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.process.pid

    # ---- deciding (inference thread)

    def decide(self, request: DecisionRequest) -> Decision:
        """Ask the child and wait. Raises HostGone when it dies meanwhile, or cannot decide."""
        child, acting = self._child, self.acting
        if child is None or not self.ready:
            raise HostGone("the inference process is not there")
        words, arrays = request_message(request)
        try:
            child.questions.send(
                words | {"version": acting.version, "explore": self.config.explore, "use_base": self.use_base}, arrays
            )
            words, arrays = child.questions.receive()
        except (EOFError, OSError) as error:
            raise HostGone("the inference process is gone") from error
        if "unavailable" in words:
            raise HostGone(words["unavailable"])
        if "error" in words:
            self.kill(f"it cannot decide: {words['error']}")
            raise HostGone(words["error"])
        return read_decision(words, arrays)

    # ---- versions

    @property
    def versions(self) -> Collection[int]:
        return self._versions

    def want(self, version: int) -> None:
        self._wanted = version
        if self._child is not None and self.ready:
            self._tell(self._child)

    def policy(self, version: int) -> Version:
        return Version(version, "base" if version == 0 else "explore" if self.config.explore else "eval")

    def notice(self, notices: Sequence[WeightsNotice]) -> None:
        super().notice(notices)
        if self._child is not None and self.ready:
            self._tell(self._child)

    def set_explore(self, explore: bool) -> None:
        """Whether heads sample or act deterministically, from now on."""
        if explore != self.config.explore:
            self.config = replace(self.config, explore=explore)
            self.acting = self.policy(self.acting.version)

    def _tell(self, child: _Child) -> None:
        with suppress(OSError):  # it is gone; its successor is told when it has loaded
            child.news.send({"notices": [asdict(n) for n in self._notices.values()], "wanted": self._wanted})

    # ---- news (a thread of the child's)

    def heard(self, child: _Child, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        kind = head["kind"]
        if kind == "picture" and self._perception is not None:
            self._perception.on_picture(
                head["topic"], arrays["picture"], head["stamp_ns"], head["arrived_ns"], bool(head["frozen"])
            )
        elif kind in ("log", "dropped"):
            self._log(head["text"])
        elif kind == "state":
            self._state(head["state"])
        elif kind == "loaded":
            self._loaded(child, head)
        elif kind == "failed":
            with self._news:
                self._failure = head["text"], head["expected"]
                self._news.notify_all()
            self.last_error = head["text"]

    def _state(self, state: Mapping[str, Any]) -> None:
        self._versions = frozenset(state["versions"])
        self._refused, self.last_error = state["refused"], state["last_error"]
        if state["offered"] is not None and not self._notices:
            self.offered = self.policy(state["offered"])

    def _loaded(self, child: _Child, head: Mapping[str, Any]) -> None:
        from robot_rl.policies.base import PolicySpec

        words, first = dict(head["spec"]), not hasattr(self, "spec")
        words["observation_features"] = {n: FeatureSpec.from_json(f) for n, f in words.pop("features").items()}
        words["action"] = ActionSpec.from_json(words["action"])
        words["noise_shape"] = None if words["noise_shape"] is None else tuple(words["noise_shape"])
        spec = PolicySpec(**words)
        if not first and spec != self.spec:
            self._log("the inference process came back with another policy: configure the node again")
            child.process.kill()
            return
        self.spec, self.cannot_continue = spec, str(head["cannot_continue"])
        self._refused_before += self._refused if not first else 0
        self._state(head["state"])
        acting = Version(head["acting"]["version"], head["acting"]["mode"])
        if first or not self.has(self.acting.version):
            self.acting = acting
        with self._news:
            self.ready, self._pause = True, RESTART_S[0]
            self._news.notify_all()
        if not first:
            self._log("the inference process is back")
        if self._notices or self._wanted:
            self._tell(child)

    def lost(self, child: _Child) -> None:
        if child is self._child and not self._closed:
            self.ready = False
            with self._news:
                self._news.notify_all()

    # ---- dying and living again (the node's thread)

    def kill(self, why: str) -> None:
        """End a child that hangs or talks nonsense; :meth:`look` starts another one."""
        child = self._child
        if child is not None and child.process.poll() is None:
            self._log(f"the inference process is killed: {why}")
            self.ready = False
            child.process.kill()

    def look(self) -> None:
        """Ten times a second: start another child when there is none. Waits for nothing."""
        child, now = self._child, time.monotonic()
        if self._closed or (child is not None and child.process.poll() is None):
            return
        if child is not None:
            self._log(
                f"the inference process ended with {child.process.returncode}; the robot holds until another one is ready"
            )
            self.ready, self._child = False, None
            child.close()
            self._again_at = now + self._pause
            self._pause = min(2.0 * self._pause, RESTART_S[1])
        elif now >= self._again_at:
            self.restarts += 1
            self._child = self._start()

    def close(self) -> None:
        self._closed, self.ready = True, False
        if self._child is not None:
            self._child.close(END_S)
            self._child = None
