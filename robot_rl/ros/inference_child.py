"""The child process of policy_node with ``inference: process``: model, head, weights, and the cameras' decoding.

Started by :class:`robot_rl.ros.process_host.ProcessHost` with two inherited descriptors: questions come on the first, news (versions,
pictures, log lines) go out on the second. It ends when its parent does, however that happens.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from robot_rl.ros.frames import Line
from robot_rl.ros.hosting import HostConfig, PolicyHost
from robot_rl.ros.inference import HostGone
from robot_rl.runtime.chunk_scheduler import RunningChunk
from robot_rl.types import Decision

if TYPE_CHECKING:
    from robot_rl.runtime.acting import DecisionRequest

FROZEN_NS = 1_000_000_000
_PR_SET_PDEATHSIG = 1


def spec_words(host: PolicyHost) -> dict[str, Any]:
    spec = host.spec
    return {
        "features": {n: f.to_json() for n, f in spec.observation_features.items()}, "action": spec.action.to_json(),
        "horizon": spec.horizon, "n_action_steps": spec.n_action_steps, "n_obs_steps": spec.n_obs_steps,
        "noise_shape": None if spec.noise_shape is None else list(spec.noise_shape), "conditioning_dim": spec.conditioning_dim,
        "sampler": spec.sampler, "num_steps": spec.num_steps, "stats_hash": spec.stats_hash, "base_hash": spec.base_hash,
    }  # fmt: skip


def state_words(host: PolicyHost) -> dict[str, Any]:
    """What the parent must know to choose versions."""
    return {
        "versions": host.versions, "offered": None if host.offered is None else host.offered.version,
        "refused": host.refused, "last_error": host.last_error,
    }  # fmt: skip


class Child:
    """Answers questions in the main thread; news of weights and cameras come from other threads."""

    def __init__(self, questions: Line, news: Line) -> None:
        self.questions, self.news = questions, news
        self._told: dict[str, Any] = {}
        self.cameras: Cameras | None = None

    def say(self, kind: str, arrays: dict[str, np.ndarray] | None = None, **words: Any) -> None:
        try:
            self.news.send({"kind": kind, **words}, arrays)
        except OSError:
            os._exit(0)  # the parent is gone

    def log(self, text: str) -> None:
        self.say("log", text=text)

    def run(self) -> int:
        begin, _ = self.questions.receive()
        self.host = host = PolicyHost(HostConfig(**begin["config"]), self.log)
        try:
            host.load()
            host.fetch(begin["acting"])
            if begin["cameras"]:
                self.cameras = Cameras(self, begin["name"], begin["namespace"], begin["cameras"])
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError, ImportError))
            self.say("failed", text=str(error), expected=expected, error=type(error).__name__)
            return 1
        self._told = state_words(host)
        acting = {"version": host.acting.version, "mode": host.acting.mode}
        self.say("loaded", spec=spec_words(host), acting=acting, state=self._told, cannot_continue=host.cannot_continue)
        host.on_change = self._changed
        host.start_watching()
        threading.Thread(target=self._notices, name="notices", daemon=True).start()
        while True:
            head, arrays = self.questions.receive()
            self._answer(head, arrays)

    def _changed(self) -> None:
        now = state_words(self.host)
        if now != self._told:
            self._told = now
            self.say("state", state=now)

    def _notices(self) -> None:
        from robot_rl.wire import WeightsNotice

        try:
            while True:
                head, _ = self.news.receive()
                self.host.notice([WeightsNotice(**n) for n in head["notices"]])
                self.host.want(head["wanted"])
        except (EOFError, OSError):
            os._exit(0)

    def _answer(self, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        host = self.host
        try:
            host.set_explore(head["explore"])
            if head["version"] != host.acting.version:
                host.acting = host.policy(head["version"])
            host.use_base = head["use_base"]
            decision = host.decide(read_request(head, arrays))
        except HostGone as error:  # a policy server that is away: this process is well and asks again
            self.questions.send({"unavailable": str(error)})
            return
        except Exception as error:
            self.questions.send({"error": f"{type(error).__name__}: {error}"})
            return
        self.questions.send(*decision_message(decision))


RUNNING = ("running chunk: rows", "running chunk: base")
"""Arrays beside an observation's features, which have no such names."""


def request_message(request: DecisionRequest) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    words: dict[str, Any] = {"key": list(request.key), "index": request.index, "step": request.step}
    if (running := request.running) is None:
        return words, request.observation
    return words | {"frozen": running.frozen}, request.observation | dict(
        zip(RUNNING, (running.rows, running.base), strict=True)
    )


def read_request(words: dict[str, Any], arrays: dict[str, np.ndarray]) -> DecisionRequest:
    from robot_rl.runtime.acting import DecisionRequest

    running = None
    if "frozen" in words:
        running = RunningChunk(arrays.pop(RUNNING[0]), arrays.pop(RUNNING[1]), words["frozen"])
    return DecisionRequest(arrays, tuple(words["key"]), words["index"], words["step"], running)


def decision_message(d: Decision) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays = {"chunk": d.chunk, "chunk_base": d.chunk_base}
    if d.noise is not None:
        arrays["noise"] = d.noise
    words = {
        "step": d.step, "log_prob": d.log_prob, "candidate_index": d.candidate_index, "weights_version": d.weights_version,
        "explored": d.explored, "continues": d.continues,
    }  # fmt: skip
    return words, arrays


def read_decision(words: dict[str, Any], arrays: dict[str, np.ndarray]) -> Decision:
    return Decision(noise=arrays.get("noise"), chunk_base=arrays["chunk_base"], chunk=arrays["chunk"], **words)


class Cameras:
    """Subscribes to the robot's cameras with a node of its own, decodes, and sends small pictures to the parent."""

    def __init__(self, child: Child, name: str, namespace: str, cameras: dict[str, Any]) -> None:
        import rclpy
        from rclpy.event_handler import SubscriptionEventCallbacks
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.signals import SignalHandlerOptions
        from sensor_msgs.msg import CompressedImage, Image

        from robot_rl.ros import qos

        self._child = child
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node(name, namespace=namespace, use_global_arguments=False, start_parameter_services=False)
        self._digests: dict[str, tuple[int, int]] = {}
        types = {"sensor_msgs/msg/Image": Image, "sensor_msgs/msg/CompressedImage": CompressedImage}
        for topic, camera in cameras.items():
            events = SubscriptionEventCallbacks(
                incompatible_qos=lambda _, t=topic: child.log(
                    f"{t}: a publisher offers an incompatible QoS; no data will arrive"
                )
            )
            profile = qos.profile(*camera["qos"])
            self.node.create_subscription(
                types[camera["type"]], camera["resolved"], lambda m, t=topic, c=camera: self._on(t, c, m), profile,
                event_callbacks=events,
            )  # fmt: skip
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        threading.Thread(target=self._spin, name="cameras", daemon=True).start()

    def _spin(self) -> None:
        while True:
            self._executor.spin_once(timeout_sec=0.5)

    def _on(self, topic: str, camera: dict[str, Any], message: Any) -> None:
        from robot_rl.robots.pictures import shown
        from robot_rl.ros import conversion
        from robot_rl.wire import WireError

        arrived = time.monotonic_ns()
        size = tuple(camera["size"])
        try:
            if camera["type"].endswith("CompressedImage"):
                picture = conversion.read_compressed(message, size)
            elif (message.height, message.width) != size:
                raise WireError(f"{message.height}x{message.width}, the robot description says {size}")
            else:
                picture = conversion.read_image(message)
            small = shown(picture, camera["crop"], camera["shown_size"])
        except (WireError, ValueError, OverflowError) as error:
            self._child.say("dropped", topic=topic, text=f"{topic}: message dropped: {error}")
            return
        frozen = camera["frozen_check"] and self._frozen(topic, picture, arrived)
        stamp = conversion.from_stamp(message.header.stamp)
        self._child.say("picture", {"picture": small}, topic=topic, stamp_ns=stamp, arrived_ns=arrived, frozen=frozen)

    def _frozen(self, topic: str, picture: np.ndarray, arrived_ns: int) -> bool:
        digest = zlib.crc32(picture[::64].tobytes())
        known = self._digests.get(topic)
        if known is None or known[0] != digest:
            self._digests[topic] = (digest, arrived_ns)
            return False
        return arrived_ns - known[1] > FROZEN_NS


def config_words(config: HostConfig) -> dict[str, Any]:
    return asdict(config)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m robot_rl.ros.inference_child QUESTIONS NEWS PARENT``: descriptors and the process that must be alive."""
    arguments = [int(a) for a in (sys.argv[1:] if argv is None else argv)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the parent decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != arguments[2]:
            return 0  # it died before we asked to die with it
    child = Child(Line.of(arguments[0]), Line.of(arguments[1]))
    try:
        return child.run()
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone; threads of torch and DDS need no farewell


if __name__ == "__main__":
    sys.exit(main())
