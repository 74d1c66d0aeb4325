"""Real processes on real DDS: a domain of one's own, processes of a graph description, and a probe that listens and calls."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from robot_rl.ros.graph import NodeSpec
from robot_rl.ros.starting import Supervisor

PATIENCE_S = 90.0  # machines that test are busy; what is waited for usually comes within seconds


@contextmanager
def own_domain() -> Iterator[int]:
    """A ROS domain nobody else on this machine tests in."""
    for number in range(41, 100):
        with open(Path(tempfile.gettempdir()) / f"robot_rl_test_domain_{number}.lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            before = dict(os.environ)
            for name in ("ROS_LOCALHOST_ONLY", "ROS_STATIC_PEERS", "ROS_NAMESPACE"):
                os.environ.pop(name, None)
            os.environ |= {"ROS_DOMAIN_ID": str(number), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
            try:
                yield number
            finally:
                os.environ.clear()
                os.environ |= before
            return
    raise RuntimeError("no free ROS domain")


class Probe:
    """One node of the test: records topics, calls services."""

    def __init__(self) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.signals import SignalHandlerOptions

        self.context = rclpy.Context()
        rclpy.init(context=self.context, signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node("probe", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.heard: dict[str, list[Any]] = {}

    def listen(self, kind: type, topic: str, profile: Any) -> list[Any]:
        box = self.heard.setdefault(topic, [])
        self.node.create_subscription(kind, topic, box.append, profile)
        return box

    def records(self, topic: str, cls: type) -> list[Any]:
        from robot_rl.ros.conversion import read_records

        return [r for m in self.heard.get(topic, []) for r in read_records(m, cls)]

    def spin(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.executor.spin_once(timeout_sec=0.05)

    def until(
        self, condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S, also: Callable[[], Any] = lambda: None
    ) -> Any:
        """Listen until the condition holds; one that looks at a message nobody has sent yet does not hold."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            with suppress(IndexError):
                if found := condition():
                    return found
            self.executor.spin_once(timeout_sec=0.05)
            with suppress(IndexError):
                also()
        raise AssertionError(f"{what}: not within {patience_s:.0f} s; {self._last_words()}")

    def _last_words(self) -> str:
        """What each topic said last, for whoever reads why a test waited in vain."""
        words = {}
        for topic, messages in self.heard.items():
            last = messages[-1] if messages else None
            statuses = getattr(last, "status", ())
            said = "; ".join(f"{s.name}: {s.message}" for s in statuses) or getattr(last, "frame_id", "")
            words[topic] = f"{len(messages)} messages" + (f", the last one {said!r}" if said else "")
        return f"heard: {words}"

    def call(self, kind: type, service: str, request: Any, patience_s: float = PATIENCE_S) -> Any:
        client = self.node.create_client(kind, service)
        self.until(client.service_is_ready, f"service {service}", patience_s)
        future = client.call_async(request)
        self.until(future.done, f"answer of {service}", patience_s)
        self.node.destroy_client(client)
        return future.result()

    def close(self) -> None:
        import rclpy

        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@contextmanager
def running(specs: Sequence[NodeSpec]) -> Iterator[tuple[Supervisor, Probe, list[str]]]:
    """Processes, a probe beside them, and their output; every process must end cleanly."""
    lines: list[str] = []
    supervisor = Supervisor(specs, say=lines.append)
    with own_domain():
        probe = Probe()
        try:
            supervisor.start()
            yield supervisor, probe, lines
        except BaseException:
            print("\n".join(lines[-80:]))
            raise
        finally:
            probe.close()
            codes = supervisor.stop()
    assert not {n: c for n, c in codes.items() if c != 0}, "\n".join([str(codes), *lines[-40:]])
