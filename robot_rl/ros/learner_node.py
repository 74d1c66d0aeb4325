"""``learner_node``: hosts a learner that lives on episode stores alone.

Training runs in a child process; this node starts it, watches it, serves weights, receives episodes from robots elsewhere,
runs the gate on recorded outcomes and says on ``weights`` which version acts. Nothing on a robot waits for it.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from std_srvs.srv import SetBool, Trigger

from robot_rl.ros import qos
from robot_rl.ros.base import ERROR, OK, WARN, ManagedNode, _status, run
from robot_rl.ros.conversion import read_records, records_message, statuses_message
from robot_rl.ros.graph_names import LEARNER_NODE
from robot_rl.ros.names import EPISODE_STATUS, METRICS, REWARD_EVENTS, WEIGHTS
from robot_rl.wire import EpisodeStatus, StepReward, WeightsNotice

LOOK_S = 0.25
RECONCILE_S = 1.0
ADOPT_S = 2.0
MAX_ORPHANS = 10_000
GIVEN_UP_S = 60.0


class LearnerNode(ManagedNode):
    """See the module."""

    def __init__(self, **options: Any) -> None:
        super().__init__(LEARNER_NODE, **options)
        self._weights = self.create_publisher(DiagnosticArray, WEIGHTS, qos.STATE)
        self._metrics = self.create_publisher(DiagnosticArray, METRICS, qos.DIAG)
        for name, kind, callback in (
            ("checkpoint", Trigger, self._on_checkpoint),
            ("promote", Trigger, self._on_promote),
            ("rollback", Trigger, self._on_rollback),
            ("pause", SetBool, self._on_pause),
        ):
            self.create_service(kind, f"~/{name}", callback)
        self.process: Any = None
        self.server: Any = None
        self._timer: Any = None
        self._listening: list[Any] = []
        self._paused = False
        self._checkpoints = 0
        self._notice: tuple[Any, ...] = ()
        self._orphans: dict[str, tuple[float, Any]] = {}
        self._gave_up_at: float | None = None
        self.add_check("learner", self._check_learner)
        self.add_check("gate", self._check_gate)
        self.add_check("endpoint", self._check_endpoint)

    # ---- lifecycle

    def configure(self) -> None:
        from robot_rl.config import load
        from robot_rl.paths import find_config
        from robot_rl.runtime.inbox import EpisodeInbox
        from robot_rl.runtime.live_gate import LiveGate, OutcomeReader
        from robot_rl.runtime.transfer import WeightServer, read_token
        from robot_rl.runtime.weights import WeightChannel
        from robot_rl.training.config import PostTrainConfig
        from robot_rl.training.run_folder import RunFolder

        p = self.parameters
        if not p["run_dir"]:
            raise ValueError("run_dir is empty: accepted is the folder of the run (base policy, store, weights, checkpoints)")
        run_dir = Path(p["run_dir"]).expanduser().resolve()
        config = load(PostTrainConfig, find_config(p["recipe"]))
        base = Path(p["policy"]).expanduser().resolve() if p["policy"] else run_dir / "base"
        if (base / "base" / "policy.json").exists():
            base = base / "base"  # a run folder
        if not (base / "policy.json").exists():
            raise ValueError(f"policy={p['policy']!r}: no base policy in {base} (policy.json)")
        config = replace(
            config, run_dir=run_dir, device=p["device"], base=replace(config.base, path=base),
            schedule=replace(config.schedule, learner="process"),
        )  # fmt: skip
        if config.demos.prefill and config.demos.source == "expert" and not (run_dir / "demos").exists():
            raise ValueError(f"recipe={p['recipe']!r}: demos.prefill=true, and {run_dir} has no demos; accepted is a recipe with "
                             "demos.prefill: false, or with demos.source store or dataset")  # fmt: skip
        self.folder = RunFolder(run_dir)
        claim(self.folder, config)
        inbox = EpisodeInbox(run_dir / "inbox", min_free_bytes=int(p["min_free_gb"] * 1e9))
        robots = [r.strip("/").replace("/", ".") for r in (p["robots"] or ("",))]
        remote = [inbox.store(r) for r in robots if r]
        self.stores = list(dict.fromkeys([self.folder.store, *remote, *(Path(s).expanduser().resolve() for s in p["stores"])]))
        self.channel = WeightChannel(self.folder.weights)
        self.inbox = inbox
        token = read_token(token_file=p["token_file"] or None)
        self.server = WeightServer(self.channel, p["http_bind"], p["http_port"], token, inbox)
        self.live = LiveGate(config.gate, self.folder.path / "gate.json", enabled=p["gate"])
        self.outcomes = OutcomeReader(self.stores)
        self._learner_config = config
        self._paused = False
        self._write_control(paused=True)
        self._start_learner()
        for robot in p["robots"] or ("",):
            prefix = f"{robot.strip('/')}/" if robot else ""
            # Absolute where a robot lives in a namespace of its own: the learner's namespace is not above it.
            where = f"/{prefix}" if prefix else ""
            self._listening += [
                self.listen(DiagnosticArray, f"{where}{EPISODE_STATUS}", self._on_status, qos.STATE),
                self.listen(DiagnosticArray, f"{where}{REWARD_EVENTS}", self._on_rewards, qos.EVENT),
            ]
        self._reconciled = -1e9
        self._timer = self.create_timer(LOOK_S, self._look)
        self.get_logger().info(f"endpoint {self.server.url}, following {', '.join(map(str, self.stores))}")

    def activate(self) -> None:
        self._write_control()

    def deactivate(self) -> None:
        self._write_control(paused=True)

    def release(self) -> None:
        for timer in (self._timer,) if self._timer is not None else ():
            self.destroy_timer(timer)
        self._timer = None
        for subscription in self._listening:
            self.destroy_subscription(subscription)
        self._listening = []
        if self.server is not None:
            self.server.close()
        if self.process is not None:
            self.process.stop(patience_s=5.0, kill=False)
        self.server = self.process = None

    # ---- work

    def _write_control(self, *, paused: bool = False) -> None:
        from robot_rl.training.learner_control import LearnerControl

        p = self.parameters
        LearnerControl(
            paused or self._paused or not self.active, p["publish_period_s"], p["checkpoint_period_s"], p["update_ratio"],
            self._checkpoints,
        ).write(self.folder.learner)  # fmt: skip
        self._controlled = (p["publish_period_s"], p["checkpoint_period_s"], p["update_ratio"])

    def _look(self) -> None:
        """Watch the learner, tell who acts. A disk that is full or away is named, and asked again at the next look."""
        from robot_rl.replay.errors import StoreError

        if self.process is None:
            return
        try:
            self._work_on()
        except (OSError, StoreError) as error:
            self.report_problem("disk", f"run folder or stores cannot be used: {error}")
        else:
            self.report_problem("disk", None)

    def _start_learner(self) -> None:
        from robot_rl.training.learner_process import LearnerProcess

        self.process = LearnerProcess(
            self.folder, self._learner_config.learner_process, _Log(self), self.stores, self.parameters["nice"]
        )
        self.process.start()

    def _try_again(self) -> None:
        """A learner that was given up is tried again once a minute: what it died of may be over (a full disk)."""
        now = time.monotonic()
        if not self.process.given_up:
            self._gave_up_at = None
        elif self._gave_up_at is None:
            self._gave_up_at = now
        elif now - self._gave_up_at > GIVEN_UP_S:
            self._gave_up_at = None
            self._start_learner()

    def _work_on(self) -> None:
        p = self.parameters
        self.process.look()
        self._try_again()
        if self._controlled != (p["publish_period_s"], p["checkpoint_period_s"], p["update_ratio"]):
            self._write_control()
        self.inbox.min_free_bytes = int(p["min_free_gb"] * 1e9)
        now = time.monotonic()
        if now - self._reconciled >= RECONCILE_S:
            self._reconciled = now
            for episode_id, version, success in self.outcomes.poll():
                self._log_gate(self.live.record(episode_id, version, success))
            self._adopt_orphans(now)
            self._publish_metrics()
        self._announce()

    def _announce(self) -> None:
        """Tell who acts, whenever that changes; the topic keeps the last word for whoever joins later."""
        newest = self.channel.latest()
        if newest is not None and newest > self.live.newest:
            self._log_gate(self.live.offer(newest, self.channel.manifest(newest).sha256))
        standing = self.live.standing
        key = (standing, self.live.newest if standing.candidate else 0)
        if key == self._notice:
            return
        records = [self._record("promoted", standing.promoted, "promoted", None)]
        if standing.candidate:
            records.append(self._record("candidate", standing.candidate, standing.state or "candidate", standing.share))
        known = [r for r in records if r is not None]
        self._keep(standing)
        if known:
            self._weights.publish(records_message(known, self.now_ns(), hardware_id=self.robot_id))
        self._notice = key

    def _record(self, which: str, version: int, gate: str, share: float | None) -> WeightsNotice | None:
        from robot_rl.runtime.weights import MANIFEST, VerificationError

        if version == 0:
            if not self._notice:
                return None  # the base acts from the start: nothing to tell
            empty = hashlib.sha256(b"").hexdigest()
            return WeightsNotice(which, 0, 0, "", empty, empty, 0, "", "", "", 0, time.time_ns(), gate, share)
        try:
            m = self.channel.manifest(version)
            data = (self.channel.path(version) / MANIFEST).read_bytes()
        except (VerificationError, OSError) as error:
            self.report_problem("weights", f"version {version} cannot be announced: {error}")
            return None
        self.report_problem("weights", None)
        return WeightsNotice(
            which, version, m.parent, self._uri(version), hashlib.sha256(data).hexdigest(), m.sha256, m.size, m.base_hash,
            m.stats_hash, m.config_hash, int(m.metrics.get("updates") or 0), m.created_ns, gate, share,
        )  # fmt: skip

    def _uri(self, version: int) -> str:
        bind = self.parameters["http_bind"]
        if bind in ("127.0.0.1", "::1", "localhost"):
            return self.channel.path(version).as_uri()
        host = socket.gethostname() if bind in ("0.0.0.0", "::", "") else bind
        return f"http://{host}:{self.server.url.rsplit(':', 1)[1]}/v1/weights/{version}"

    def _keep(self, standing: Any) -> None:
        """Tell the learner which versions must stay on disk."""
        from robot_rl.replay.files import replace_json
        from robot_rl.training.learner_control import IN_USE

        versions = {
            standing.promoted,
            standing.candidate,
            self.live.gate.acting,
            self.live.gate.waiting or 0,
            *self.live.forced,
        }
        self.folder.learner.mkdir(parents=True, exist_ok=True)
        replace_json(self.folder.learner / IN_USE, {"versions": sorted(v for v in versions if v)}, sync=False)

    def _log_gate(self, events: list[Any]) -> None:
        for event in events:
            self.folder.append("gate.jsonl", event.to_json(env_steps=self.outcomes.steps))
            self.get_logger().info(f"gate: version {event.version} {event.event} ({event.successes} of {event.n})")

    def _publish_metrics(self) -> None:
        status = self.process.status
        values: dict[str, Any] = {} if status is None else {k: v for k, v in asdict(status).items() if k != "error"}
        try:
            with open(self.folder.path / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, 2) - 8192))
                lines = [line for line in file.read().split(b"\n") if line.endswith(b"}")]
            last = json.loads(lines[-1]) if lines else {}
            values |= {str(k): v for k, v in last.items() if isinstance(v, (int, float))}
        except (OSError, ValueError):
            pass
        pairs = dict(list(values.items())[:60])
        self._metrics.publish(
            statuses_message([_status("learner", OK, self.process.describe(), pairs, self.robot_id)], self.now_ns())
        )

    # ---- what robots say

    def _on_status(self, message: DiagnosticArray) -> None:
        for status in read_records(message, EpisodeStatus):
            if status.state == "committed":
                self._reconciled = -1e9

    def _on_rewards(self, message: DiagnosticArray) -> None:
        """Events nobody has written down: the policy node does, and this node if that one is away."""
        for reward in read_records(message, StepReward):
            if not reward.recorded and len(self._orphans) < MAX_ORPHANS:
                self._orphans[reward.event_id] = (time.monotonic(), reward)

    def _adopt_orphans(self, now: float) -> None:
        from robot_rl.replay.store import EpisodeStore

        due = [r for at, r in self._orphans.values() if now - at >= ADOPT_S]
        if not due:
            return
        for path in self.stores:
            if not (path / "store.json").exists():
                continue
            with EpisodeStore.open(path, mode="a", recover=False) as store:
                for reward in due:
                    if reward.episode_id not in store:
                        continue
                    if all(e.event_id != reward.event_id for e in store.reward_history(reward.episode_id)):
                        store.append_reward(reward.to_event())
                    self._orphans.pop(reward.event_id, None)
        self._orphans = {i: (at, r) for i, (at, r) in self._orphans.items() if now - at < 600.0}

    # ---- services

    def _answer(self, response: Any, work: Any) -> Any:
        try:
            if self.process is None:
                raise ValueError("the node is not configured")
            response.success, response.message = True, str(work())
        except (ValueError, OSError) as error:
            response.success, response.message = False, str(error)
        return response

    def _on_checkpoint(self, _: Any, response: Any) -> Any:
        def work() -> str:
            self._checkpoints += 1
            self._write_control()
            return "asked for; learner_node/metrics says when (checkpoint_ns)"

        return self._answer(response, work)

    def _on_promote(self, _: Any, response: Any) -> Any:
        return self._answer(response, lambda: f"version {self.live.promote()} acts from the next swap on")

    def _on_rollback(self, _: Any, response: Any) -> Any:
        return self._answer(response, lambda: f"version {self.live.rollback()} acts from the next swap on")

    def _on_pause(self, request: Any, response: Any) -> Any:
        def work() -> str:
            self._paused = bool(request.data)
            self._write_control()
            return "paused" if self._paused else "learning goes on"

        return self._answer(response, work)

    # ---- diagnostics

    def _check_learner(self) -> tuple[int, str, dict[str, Any]]:
        if self.process is None:
            return OK, "not configured", {}
        status, level = self.process.status, OK
        values: dict[str, Any] = {"restarts": self.process.restarts, "pid": self.process.pid or 0}
        if status is not None:
            age = (time.time_ns() - status.published_ns) / 1e9 if status.published_ns else -1.0
            values |= {
                "state": status.state, "updates": status.updates, "env_steps": status.env_steps, "episodes": status.episodes,
                "store_lag": max(0, self.outcomes.episodes - status.episodes), "publication_age_s": age,
                "updates_owed": status.updates_owed, "refused": status.episodes_refused,
            }  # fmt: skip
        if self.process.given_up:
            level = ERROR
        elif self.process.dead_since is not None:
            level = WARN
        return level, self.process.describe(), values

    def _check_gate(self) -> tuple[int, str, dict[str, Any]]:
        if self.process is None:
            return OK, "not configured", {}
        s = self.live.standing
        values = {
            "promoted": s.promoted, "candidate": s.candidate, "share": s.share, "newest": self.live.newest,
            "base_successes": self.live.base[0], "base_episodes": self.live.base[1], "enabled": self.live.enabled,
        }  # fmt: skip
        return OK, f"version {s.promoted} acts" if s.promoted else "the base acts", values

    def _check_endpoint(self) -> tuple[int, str, dict[str, Any]]:
        if self.server is None:
            return OK, "not configured", {}
        return OK, self.server.url, dict(asdict(self.inbox.counts))


class _Log:
    """What the learner's watcher says goes to rosout."""

    def __init__(self, node: LearnerNode) -> None:
        self._node = node

    def log(self, text: str) -> None:
        self._node.get_logger().warning(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *a, **k: None


def claim(folder: Any, config: Any) -> None:
    """Write the resolved configuration; where there is one, refuse another run.

    Raises:
        ValueError: run_dir holds a run of another configuration.
    """
    from robot_rl.config import config_hash, load, to_yaml
    from robot_rl.training.config import PostTrainConfig

    if folder.config.exists():
        before = load(PostTrainConfig, folder.config)
        if config_hash(before) != config_hash(config):
            raise ValueError(
                f"run_dir={str(folder.path)!r} holds a run of another configuration ({config_hash(before)}, this one is "
                f"{config_hash(config)}); accepted are the same recipe and policy, which resumes it, or another run_dir"
            )
    folder.write_text("config.yaml", to_yaml(config))


def main(argv: list[str] | None = None) -> int:
    return run(LearnerNode, argv)


if __name__ == "__main__":
    raise SystemExit(main())
