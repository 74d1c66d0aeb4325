"""``reward_node``: hosts any reward source (``robot_rl.rewards``), away from the control loop.

Frames are scored as they come, a whole episode when it is committed. Answers are written into the episode's store where it can
be reached from here (``recorded=true``), and published; nobody waits for them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from std_msgs.msg import Float64
from std_srvs.srv import Trigger

from robot_rl.rewards.source import EpisodeTrace, FrameBatch, RewardSource, ScoreBatch, SourceCounts
from robot_rl.ros import qos
from robot_rl.ros.base import OK, WARN, ManagedNode, run
from robot_rl.ros.conversion import read_records, records_message
from robot_rl.ros.graph_names import REWARD_NODE
from robot_rl.ros.names import EPISODE_STATUS, REWARD_EVENTS, REWARD_VALUE, TASK_STATE, NodeTable
from robot_rl.types import RewardEvent
from robot_rl.wire import EpisodeStatus, RewardClose, StepReward, TaskState
from robot_rl.wire.codec import MAX_STATUSES

LABEL = "label"
READ_PATIENCE_S = 10.0


@dataclass
class Job:
    """One question for the source; exactly one of ``frames`` and ``episode`` is set."""

    asked: float
    status: EpisodeStatus
    frames: FrameBatch | None = None


class RewardNode(ManagedNode):
    """See the module."""

    def __init__(self, table: NodeTable = REWARD_NODE, **options: Any) -> None:
        super().__init__(table, **options)
        self._events = self.create_publisher(DiagnosticArray, REWARD_EVENTS, qos.EVENT)
        self._values = self.create_publisher(Float64, REWARD_VALUE, qos.EVENT)
        self.create_service(Trigger, "~/score_last", self._on_score_last)
        self.source: RewardSource | None = None
        self.counts = SourceCounts()
        self._latencies: deque[float] = deque(maxlen=200)
        self._worker: threading.Thread | None = None
        self._stop = threading.Event()
        self._listening: list[Any] = []
        self._timer: Any = None
        self._synchroniser: Any = None
        self._running: EpisodeStatus | None = None
        self._last: EpisodeStatus | None = None
        self._scored: set[str] = set()
        self._live: dict[str, list[str]] = {}  # episode to ids of events said while it ran
        self._outbox: queue.SimpleQueue[tuple[list[Any], list[float]]] = queue.SimpleQueue()
        self.add_check("source", self._check)

    # ---- lifecycle

    def load(self) -> RewardSource:
        from robot_rl.rewards import load_source

        return load_source(self.parameters["source"])

    def configure(self) -> None:
        p = self.parameters
        self.source = self.load()
        self.counts = SourceCounts()
        self._queue: deque[Job] = deque()
        self._wake = threading.Condition()
        self._listening = [self.listen(DiagnosticArray, EPISODE_STATUS, self._on_episode, qos.STATE)]
        if hasattr(self.source, "feed"):  # ground truth of a simulator
            self._listening.append(self.listen(DiagnosticArray, TASK_STATE, self._on_task, qos.EVENT))
        wants = {n for n in self.source.needs if n.startswith("observation.")}
        self._robot: Any = None
        if p["robot"]:
            from robot_rl.robots.description import load_robot

            self._robot = load_robot(p["robot"])
        if wants and p["score"] == "frame":
            if self._robot is None:
                raise ValueError(
                    f"robot is empty: source {p['source']!r} reads {', '.join(sorted(wants))}; accepted is a robot description"
                )
            absent = sorted(wants - set(self._robot.features))
            if absent:
                raise ValueError(
                    f"source={p['source']!r} reads {absent}; robot {p['robot']!r} has {sorted(self._robot.features)}"
                )
            from robot_rl.ros.synchroniser import Synchroniser

            self._synchroniser = Synchroniser(self, self._robot, time.monotonic_ns)
        self._stop.clear()
        self._worker = threading.Thread(target=self._work, name="reward-source", daemon=True)
        self._worker.start()
        self._timer = self.create_timer(0.02, self._flush)
        self._frames_at = 0.0
        info = self.source.describe()
        self.get_logger().info(f"source {self.source.name} ({info.model_id}), kind {self.source.kind.value}")

    def deactivate(self) -> None:
        with self._wake:
            self._queue.clear()

    def release(self) -> None:
        self._stop.set()
        if self._worker is not None:
            with self._wake:
                self._wake.notify_all()
            self._worker.join(2.0)
        for subscription in self._listening:
            self.destroy_subscription(subscription)
        if self._timer is not None:
            self.destroy_timer(self._timer)
        if self._synchroniser is not None:
            self._synchroniser.close()
        if (close := getattr(self.source, "close", None)) is not None:  # of a connection, say
            close()
        self._listening, self._timer, self._worker, self._synchroniser, self.source = [], None, None, None, None

    # ---- what comes in

    def _on_episode(self, message: DiagnosticArray) -> None:
        for status in read_records(message, EpisodeStatus):
            self._running = status if status.state == "running" else None
            if status.state == "committed" and status.episode_id not in self._scored:
                self._last = status
                self._ask(Job(time.monotonic(), status))

    def _on_task(self, message: DiagnosticArray) -> None:
        from robot_rl.rewards.environment import TaskSample

        for truth in read_records(message, TaskState):
            stamp = truth.stamp_ns
            self.source.feed(TaskSample(stamp, success=truth.success, terminated=truth.terminated))  # type: ignore[union-attr]
            running = self._running
            if truth.success and running is not None and running.episode_id not in self._live:
                step = self._step_of(running, stamp)
                frames = FrameBatch({}, np.array([step]), np.array([stamp]), running.task or "", running.episode_id)
                self._live[running.episode_id] = []
                self._ask(Job(time.monotonic(), running, frames))

    def _step_of(self, running: EpisodeStatus, stamp: int) -> int:
        """Which control step a stamp belongs to, by the clock; what the store says later replaces it."""
        if running.started_ns is None or self._robot is None:
            return max(running.step, 1)
        return max(1, round((stamp - running.started_ns) * 1e-9 * self._robot.rates.control_hz))

    def _ask(self, job: Job) -> None:
        if not self.active:
            return
        with self._wake:
            while len(self._queue) >= self.parameters["queue"]:
                self._queue.popleft()
                self.counts.dropped += 1
            self._queue.append(job)
            self._wake.notify()

    def _look_at_frames(self) -> None:
        """At most ``rate_hz`` frames a second of the running episode."""
        running, now = self._running, time.monotonic()
        if self._synchroniser is None or running is None or now - self._frames_at < 1.0 / self.parameters["rate_hz"]:
            return
        self._frames_at = now
        snapshot = self._synchroniser.snapshot()
        if snapshot.observation:
            stacked = {n: np.asarray(v)[None] for n, v in snapshot.observation.items()}
            step = self._step_of(running, snapshot.stamp_ns)
            batch = FrameBatch(stacked, np.array([step]), np.array([snapshot.stamp_ns]), running.task or "", running.episode_id)
            self._ask(Job(now, running, batch))

    # ---- the worker

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._wake:
                while not self._queue and not self._stop.is_set():
                    self._wake.wait(0.5)
                if self._stop.is_set():
                    return
                job = self._queue.popleft()
            try:
                self._score(job)
            except Exception as error:  # a source that raises scores nothing, and stops nothing
                self.counts.invalid["error"] = self.counts.invalid.get("error", 0) + 1
                self.report_problem("source", f"{self.parameters['source']}: {type(error).__name__}: {error}")

    def _score(self, job: Job) -> None:
        source = self.source
        if source is None:
            return
        began = time.monotonic()
        if job.frames is not None:
            scores = source.score(job.frames)
            if began - job.asked > self.parameters["max_age_s"]:
                scores = ScoreBatch.failed(scores.steps, "stale")
            store, stamps = None, {int(s): int(t) for s, t in zip(job.frames.steps, job.frames.stamps_ns, strict=True)}
        else:
            store = self._store(job.status)
            if store is None:
                return
            trace = self._trace(store, job.status.episode_id)
            if trace is None:
                return
            scores = source.score_episode(trace)
            stamps = {i: int(t) for i, t in enumerate(trace.stamps_ns[:-1])}
        taken = time.monotonic() - began
        self._latencies.append(taken * 1e3)
        if taken > self.parameters["deadline_s"]:
            scores = ScoreBatch.failed(scores.steps, "timeout")
        self._say(job, scores, store, stamps, (time.monotonic() - job.asked) * 1e3)
        self.report_problem("source", None)

    def _reachable(self, status: EpisodeStatus) -> Path | None:
        given = self.parameters["store"]
        uri = urlsplit(status.store_uri or "")
        folder = Path(given).expanduser() if given else Path(unquote(uri.path)) if uri.scheme == "file" else None
        return folder if folder is not None and (folder / "store.json").exists() else None

    def _store(self, status: EpisodeStatus) -> Path | None:
        folder = self._reachable(status)
        if folder is None:
            self.report_problem(
                "store", f"episode {status.episode_id}: its store {status.store_uri!r} cannot be read from here"
            )
            return None
        self.report_problem("store", None)
        return folder

    def _trace(self, folder: Path, episode_id: str) -> EpisodeTrace | None:
        from robot_rl.replay.store import EpisodeStore

        assert self.source is not None
        until = time.monotonic() + READ_PATIENCE_S
        with EpisodeStore.open(folder) as store:
            keys = [n for n in store.observation_features if n in self.source.needs]
            while True:
                try:
                    episode = store.read(episode_id, keys)
                    break
                except KeyError:
                    if time.monotonic() > until or self._stop.is_set():
                        self.report_problem("store", f"episode {episode_id} never appeared in {folder}")
                        return None
                    time.sleep(0.05)
        stamps = np.asarray(episode.stamp_ns, np.int64)
        period = int(np.median(np.diff(stamps))) if len(stamps) > 1 else int(1e9 / (episode.meta.control_hz or 10.0))
        # The last observation has no stamp of its own; what happened within one and a half periods still belongs to it.
        return EpisodeTrace(
            episode_id, episode.observations, np.append(stamps, stamps[-1] + period * 3 // 2), episode.meta.task
        )

    # ---- what goes out

    def _say(self, job: Job, scores: ScoreBatch, store: Path | None, stamps: dict[int, int], latency_ms: float) -> None:
        from robot_rl.replay.ulid import new_ulid
        from robot_rl.rewards.labelling import closing

        source = self.source
        assert source is not None
        info, episode_id = source.describe(), job.status.episode_id
        # What is said while an episode runs is not written down where its exact form will be, once it is committed.
        recorded = store is not None or self._reachable(job.status) is not None
        common: dict[str, Any] = {
            "episode_id": episode_id, "recorded": recorded, "latency_ms": latency_ms, "model_id": info.model_id,
            "prompt_hash": info.prompt_hash or None,
        }  # fmt: skip
        earlier = list(self._live.pop(episode_id, [])) if store is not None else []
        rewards: list[StepReward] = []
        for i, step in enumerate(scores.steps.tolist()):
            valid = bool(scores.valid[i])
            reason = scores.reason[i] if i < len(scores.reason) else ""
            if not valid:
                self.counts.invalid[reason or "error"] = self.counts.invalid.get(reason or "error", 0) + 1
            else:
                self.counts.scored += 1
            rewards.append(StepReward(
                source=source.name, event_id=new_ulid(), step=int(step), stamp_ns=stamps.get(int(step), 0), kind=source.kind.value,
                value=float(scores.value[i]), valid=valid, reason=reason or None, terminal=scores.terminal or None,
                revokes=earlier.pop() if earlier and valid else None, **common,
            ))  # fmt: skip
        if job.frames is not None and episode_id in self._live:
            self._live[episode_id] += [r.event_id for r in rewards]
        # An episode that was cut from outside has not failed; nobody knows how it would have ended.
        cut = job.status.end_reason not in (None, "task", "timeout")
        if store is not None and scores.success is not None and (scores.success or not cut):
            step = scores.success_step if scores.success and scores.success_step > 0 else len(stamps)
            rewards.append(StepReward(
                source=LABEL, event_id=new_ulid(), step=step, stamp_ns=0, kind="success", value=float(scores.success), valid=True,
                **common,
            ))  # fmt: skip
        if store is not None:
            told = {
                "episode_id": episode_id,
                "model_id": info.model_id,
                "prompt_hash": info.prompt_hash,
                "latency_ms": latency_ms,
            }
            self._write(store, [*(r.to_event() for r in rewards), *closing(source.name, len(stamps), scores, told)])
            self._scored.add(episode_id)
        records: list[Any] = list(rewards)
        if store is not None:
            share = float(np.mean(scores.valid)) if len(scores.valid) else 1.0
            records.append(RewardClose(source.name, episode_id, len(stamps), len(rewards), share))
        self._outbox.put((records, [r.value for r in rewards if r.valid and r.source != LABEL]))

    def _write(self, folder: Path, events: list[RewardEvent]) -> None:
        from robot_rl.replay.store import EpisodeStore

        if events:
            with EpisodeStore.open(folder, mode="a", recover=False) as store:
                store.append_reward(*events)

    def _flush(self) -> None:
        """Publications happen in the executor's thread."""
        self._look_at_frames()
        while not self._outbox.empty():
            records, values = self._outbox.get()
            for first in range(0, len(records), MAX_STATUSES):
                self._events.publish(
                    records_message(records[first : first + MAX_STATUSES], self.now_ns(), hardware_id=self.robot_id)
                )
            for value in values:
                self._values.publish(Float64(data=float(value)))

    def _on_score_last(self, _: Any, response: Any) -> Any:
        if self._last is None or not self.active:
            response.success, response.message = False, "no committed episode has been seen, or the node is not active"
        else:
            self._ask(Job(time.monotonic(), self._last))
            response.success, response.message = True, f"episode {self._last.episode_id} is scored again"
        return response

    def _check(self) -> tuple[int, str, dict[str, Any]]:
        if self.source is None:
            return OK, "not configured", {}
        c = self.counts
        values: dict[str, Any] = {
            "scored": c.scored, "dropped": c.dropped, "queue": len(self._queue), "invalid_share": c.invalid_share,
            "latency_p95_ms": float(np.percentile(self._latencies, 95)) if self._latencies else 0.0,
            **{f"invalid.{k}": v for k, v in c.invalid.items()}, **self.more_figures(),
        }  # fmt: skip
        return (WARN if c.dropped else OK), f"{self.source.name}: {c.scored} scored", values

    def more_figures(self) -> dict[str, Any]:
        """Figures a kind of node adds."""
        figures = getattr(self.source, "figures", None)
        return dict(figures()) if callable(figures) else {}


def main(argv: list[str] | None = None) -> int:
    return run(RewardNode, argv)


if __name__ == "__main__":
    raise SystemExit(main())
