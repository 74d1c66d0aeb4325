"""What policy_node's ``configure`` builds and a tick of its play-out does: observe, decide, command, record.

Everything here runs under the node's lock, in the play-out's thread or in a service's callback.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from robot_rl import seeding
from robot_rl.intervention.arbiter import ArbiterConfig, OperatorArbiter
from robot_rl.intervention.states import State
from robot_rl.robots.description import load_robot
from robot_rl.robots.validation import warnings
from robot_rl.ros import conversion, names, qos
from robot_rl.ros.base import set_priority
from robot_rl.ros.commands import Hop
from robot_rl.ros.deciding import Deciding, refusal
from robot_rl.ros.hosting import HostConfig, PolicyHost
from robot_rl.ros.operator_input import OperatorInput
from robot_rl.ros.playout import IntervalStatistics, Playout
from robot_rl.ros.process_host import Perception, ProcessHost
from robot_rl.ros.recording import Recording
from robot_rl.ros.synchroniser import Feedback, Synchroniser
from robot_rl.runtime.robot_loop import RobotLoop
from robot_rl.types import Observation, SafetyFlag, Source
from robot_rl.wire import GuardEvent, GuardState, OperatorState, PolicyHealth, StepReward

if TYPE_CHECKING:
    from robot_rl.ros.policy_node import PolicyNode

S = 1_000_000_000
GUARD_SILENT_S = 0.10
ONE_PROCESS_HZ = 10.0  # commands a second up to which inference beside them in one process is quick enough
ALIGN_OFFSET_S = 0.002
LEAD = 0.15  # of a command period: so long before a command is due its control step begins
LEAD_S = (0.0015, 0.006)
CONTROL_COST_S = 0.0015
"""Of the time before a command is due, so much is left to working it out; only the rest may be spent on waiting."""


class Session:
    """One configured policy on one robot."""

    def __init__(self, node: PolicyNode) -> None:
        self.node, self.p = node, node.parameters
        self.host: PolicyHost | ProcessHost | None = None
        self.deciding: Deciding | None = None
        self.recording: Recording
        self._closers: list[Any] = []
        self._playout: Playout | None = None
        self._process_priority = ""
        self._timer: Any = None
        self.running = False
        self.holding = False
        self.problems: list[str] = []
        self.ended_at: float | None = None
        self._sent_since: int | None = None
        self._ending: tuple[str, bool, float, bool | None] | None = None
        self._last_state = State.AUTONOMOUS
        self._stamp = self._last_command = 0
        self._due = self._prepared = False
        self._starts_at = 0.0  # steady seconds: an episode that has begun waits for its first control step until then

    # ---- configure

    def build(self) -> None:
        """Everything slow. Raises ValueError or OSError with what the user can put right."""
        p, node = self.p, self.node
        described = load_robot(p["robot"])
        self.robot_hash = described.hash  # of the file: the guard has no part in rates that were overridden here
        self.robot = described.with_rates(p["control_hz"], p["command_hz"])
        for text in warnings(self.robot):
            node.get_logger().warning(text)
        if p["policy"] != "none":
            self.host = self._make_host()
            self._closers.append(self.host.close)
            self.host.load()
            if findings := self.robot.policy_findings(self.host.features, self.host.action):
                raise ValueError("; ".join(findings))
            spec = self.host.spec
            self.features, action = self.host.features, self.host.action
            n_obs, n_rows, horizon, noise = spec.n_obs_steps, spec.n_action_steps, spec.horizon, spec.noise_shape
            base_hash, stats_hash = spec.base_hash, spec.stats_hash
        else:
            self.features, action = self.robot.features, self.robot.action_spec()
            n_obs, n_rows, horizon, noise, base_hash, stats_hash = 1, 1, None, None, "", ""
        if reason := refusal(
            self.host, {name: p[name] for name in ("n_action_steps", "blend")}
        ):  # a pinned version may yet come
            raise ValueError(reason)
        self.arbiter = OperatorArbiter(action, ArbiterConfig(handback_s=p["handback_blend_s"]))
        self.loop = RobotLoop(self.robot, action, n_obs_steps=n_obs, n_action_steps=n_rows, arbiter=self.arbiter)
        self.operator = OperatorInput(self.loop, self.arbiter, lambda: p["operator_timeout_s"], node.clock_ns)
        self.hops = {c.name: Hop(c.command, self.robot) for c in self.loop.channels}
        self.recording = Recording(
            node.publish_status, node.folder_of_store(), features=self.features, action=action, noise_shape=noise,
            chunk_horizon=horizon, base_hash=base_hash, stats_hash=stats_hash, robot_hash=self.robot_hash, flush_s=p["wal_flush_s"],
            warn=node.get_logger().error,
        )  # fmt: skip
        self._closers.append(self.recording.close)
        self.sync = Synchroniser(node, self.robot, node.clock_ns, pictures_elsewhere=self.in_process)
        self._closers.append(self.sync.close)
        self.feedback = Feedback(node, self.robot, node.clock_ns)
        self._closers.append(self.feedback.close)
        self._actions = {
            c: node.create_lifecycle_publisher(h.type, f"{names.ACTION}/{c}", qos.COMMAND) for c, h in self.hops.items()
        }
        from trajectory_msgs.msg import JointTrajectory

        self._chunks = node.create_lifecycle_publisher(JointTrajectory, "~/action_chunk", qos.COMMAND)
        for publisher in (*self._actions.values(), self._chunks):
            self._closers.append(lambda publisher=publisher: node.destroy_lifecycle_publisher(publisher))
        self.period_s = 1.0 / self.robot.rates.command_hz
        self.control_s = 1.0 / self.robot.rates.control_hz
        # How long a control step may wait for a chunk when it has none. Simulated time waits for nobody's processor.
        grace_s = 2.0 * self.control_s if node.sim_time else min(0.4 * self.control_s, 0.4 * self.period_s)
        self.lead_s = float(np.clip(LEAD * self.period_s, *LEAD_S))
        self.intervals = IntervalStatistics(self.period_s)
        if self.host is not None:
            self.deciding = Deciding(
                self.host,
                self.loop.loop,
                p,
                control_s=self.control_s,
                grace_s=grace_s,
                waits=node.sim_time,
                warn=node.log_sometimes,
            )
            self._closers.append(self.deciding.close)
            self.host.start_watching()

    @property
    def in_process(self) -> bool:
        """Whether inference and cameras live in a process of their own."""
        return isinstance(self.host, ProcessHost)

    def _make_host(self) -> PolicyHost | ProcessHost:
        """In this process or in another one: a slow rate leaves time for Python's lock, and simulated time waits for everybody."""
        p, node, robot = self.p, self.node, self.robot
        config = HostConfig(
            p["policy"], p["head"], p["run_dir"], p["device"], p["explore"], p["weights_url"], p["token_file"],
            p["warmup_forwards"], p["seed"],
        )  # fmt: skip
        log = lambda text: node.log_sometimes(f"host {text[:24]}", text)  # noqa: E731
        alone = robot.rates.command_hz > ONE_PROCESS_HZ and not node.sim_time
        if p["inference"] == "thread" or (p["inference"] == "auto" and not alone):
            return PolicyHost(config, log)
        cameras = {
            image.topic: {
                "resolved": node.resolve_topic_name(image.topic), "type": image.type, "size": list(image.size),
                "crop": image.crop, "shown_size": image.shown_size, "frozen_check": robot.sync.frozen_check,
                "qos": [image.qos.reliability, image.qos.durability, image.qos.depth],
            }
            for image in robot.images.values()
        }  # fmt: skip
        perception = Perception(f"{node.get_name()}_perception", node.get_namespace(), cameras, self._on_picture)
        return ProcessHost(config, log, perception, p["configure_timeout_s"])

    def _on_picture(self, topic: str, pixels: np.ndarray, stamp_ns: int, arrived_ns: int, frozen: bool) -> None:
        """From the child's cameras, which see before there is anything here to see for."""
        if hasattr(self, "sync"):
            arrived_ns = self.node.clock_ns() if self.node.sim_time else arrived_ns
            self.sync.on_picture(topic, pixels, stamp_ns, arrived_ns, frozen)

    def look(self) -> None:
        """Ten times a second, in the node's thread: an inference process that hangs is killed, one that is gone starts again."""
        if isinstance(self.host, ProcessHost) and self.deciding is not None:
            if taken := self.deciding.worker.hung():
                self.host.kill(f"a decision has taken {taken:.1f} s so far")
            self.host.look()

    def start_playout(self, tick: Any) -> None:
        if self.node.sim_time:
            self._timer = self.node.create_timer(self.period_s, lambda: self._on_node_time(tick))
            self.sync.on_anchor = lambda: self._on_anchor(tick)
        else:
            if self.in_process and self.p["rt_priority"]:
                # The whole process, because a thread that may be preempted while it holds Python's lock makes the play-out wait.
                self._process_priority = set_priority(self.p["rt_priority"], 0)
                if not self._process_priority.startswith("SCHED"):
                    self.node.get_logger().warning(self._process_priority)
            # A full collection of garbage walks over everything that torch and ROS have made and would miss deadlines.
            gc.collect()
            gc.freeze()
            self._closers.append(gc.unfreeze)
            self._playout = Playout(
                self.period_s, tick, prepare=self.node.prepare, lead_s=self.lead_s, rt_priority=self.p["rt_priority"]
            )
            self._playout.start()

    def _on_node_time(self, tick: Any) -> None:
        """A control step whose anchor is still on its way (``/clock`` may overtake it) waits for it."""
        anchor = self.sync.streams[self.sync.anchor].newest
        late = anchor is not None and self.node.now_ns() - anchor.stamp_ns > 0.5 * self.control_s * S
        if self.running and self._part == 0 and late and not self._due:
            self._due = True
            return
        self._due = False
        tick()

    def _on_anchor(self, tick: Any) -> None:
        if self._due:
            self._due = False
            tick()

    def stop_playout(self) -> None:
        if self._playout is not None:
            self._playout.close()
        if self._timer is not None:
            self.node.destroy_timer(self._timer)
            self._timer = None

    @property
    def playout_error(self) -> BaseException | None:
        return self._playout.error if self._playout is not None else None

    @property
    def granted(self) -> str:
        if self._playout is None:
            return "node time"
        return f"process: {self._process_priority}" if self._process_priority else f"play-out: {self._playout.granted}"

    def close(self) -> None:
        for closer in reversed(self._closers):
            closer()
        self._closers.clear()

    # ---- episodes

    def guard_hash_matches(self, guard: GuardState) -> bool:
        return guard.robot_hash == self.robot_hash

    def reset_answered(self, future: Any) -> int | None:
        """Observations from before the answer of a reset belong to the old start."""
        if not hasattr(future, "answered_ns"):
            future.answered_ns = self.node.clock_ns()
        return int(future.answered_ns)

    def begin(self, after_ns: int | None = None) -> str:
        """Start an episode; the id. Raises ValueError or OSError with the reason why not."""
        node, guard = self.node, self.node.guard
        if self.running:
            raise ValueError(f"episode {self.recording.status.episode_id} is running: end or cancel it first")
        if guard is None:
            raise ValueError("the guard has not been heard of: start guard_node")
        if not node.count_publishers(names.GUARD_STATE):  # its last state outlives it
            raise ValueError("guard_node is gone: start it")
        if not self.guard_hash_matches(guard):
            raise ValueError(f"guard_node runs another robot description (hash {guard.robot_hash}, here {self.robot_hash})")
        if not guard.armed:
            raise ValueError(f"the guard is not armed ({guard.reason}): call guard_node/arm")
        snapshot = self.sync.snapshot()
        if snapshot.observation is None or snapshot.problems:
            raise ValueError("; ".join(snapshot.problems) or "no observation yet")
        anchor = self.sync.streams[self.sync.anchor].newest
        if after_ns is not None and (anchor is None or anchor.arrived_ns <= after_ns):
            raise ValueError("no observation since the reset")
        measured = {c.name: self.feedback.measured(c) for c in self.loop.channels}
        self._tune()
        if self.p["record"] and self.recording.store is None:
            raise ValueError("record=true: it was false in configure, so there is no store; configure again")
        index = self.recording.index
        if self.host is not None:
            self.host.set_explore(self.p["explore"])
            self.host.pin(None if self.p["pin_version"] < 0 else self.p["pin_version"])
            draw = float(seeding.rng("candidate", self.robot.name, self.p["seed"], index).random())
            self.host.take(candidate_draw=draw)
        version = 0 if self.host is None else self.host.deciding
        extra = {"robot": self.robot.name, "robot_hash": self.robot_hash, "parameters": self._recorded_parameters()}
        if self.host is not None:
            extra |= {"mode": self.host.acting.mode, "head": self.p["head"]}
        writer = self.recording.begin(
            task=self.p["task"], robot=self.robot.name, control_hz=self.robot.rates.control_hz, version=version, extra=extra,
            now_ns=node.now_ns(), record=self.p["record"],
        )  # fmt: skip
        try:
            self.loop.begin(
                self._seen(snapshot.observation), measured, key=("robot", self.p["seed"], self.recording.status.episode_id),
                recorder=writer, now_ns=node.clock_ns(), stamp_ns=snapshot.stamp_ns,
            )  # fmt: skip
        except ValueError:
            if writer is not None:
                writer.abort()
            self.recording.aborted(end_reason="safety", detail="the robot's state is unknown")
            raise
        if self.deciding is not None:
            self.deciding.worker.forget()
        self._stamp, self._part, self._first, self._sent_since = snapshot.stamp_ns, 0, True, None
        self._ending, self.holding, self._steps_human = None, False, 0
        self._prepared = False
        self.running = True
        self.intervals.pause()
        self._align()
        return self.recording.status.episode_id

    def _recorded_parameters(self) -> dict[str, Any]:
        keep = (
            "n_action_steps",
            "replan_margin",
            "blend_steps",
            "swap_at",
            "explore",
            "max_episode_s",
            "seed",
            "policy",
        )
        return {k: self.p[k] for k in keep} | ({} if self.deciding is None else {"blend": self.deciding.joining})

    def _align(self) -> None:
        """Control steps fall right behind the anchor's messages where these come at the control rate, so that they see fresh ones."""
        stream = self.sync.streams.get(self.sync.anchor)
        if self._playout is None or stream is None or stream.newest is None:
            return
        first = stream.newest.arrived_ns / 1e9 + self.control_s + ALIGN_OFFSET_S + self.lead_s
        self._starts_at = first - self.lead_s - 0.5 * self.period_s
        self._playout.realign(first)

    def _seen(self, observation: Observation) -> Observation:
        return {name: observation[name] for name in self.features}

    def end_with(self, success: bool) -> str:
        """A person says how it went. Raises ValueError without a running episode."""
        if not self.running:
            raise ValueError("no episode is running")
        self._ending = ("task", True, float(success), success)
        return self.recording.status.episode_id

    def finish(self, reason: str, *, truncated: bool = False, success: bool | None = None, detail: str | None = None) -> None:
        """End now; an open step is closed with what was seen last."""
        loop = self.loop.loop
        terminated = self._ending is not None and self._ending[1]
        self.running = False
        self.ended_at = time.monotonic()
        status = self.recording.status
        if loop.step == 0 and loop._pending is None:
            loop.abort()
            self.recording.aborted(end_reason=reason, detail=detail, ended_ns=self.node.now_ns())
            return
        if loop._pending is not None:
            self.loop.close_step(loop._frames[-1], float("nan"), False, True, self._stamp + 1)
            truncated = True
        recorded = loop._recorder is not None
        steps = loop.step
        loop.finish(success=success, background=True)
        outcome = "none" if success is None else "success" if success else "failure"
        self.recording.ended(
            recorded=recorded, label=success if reason == "task" else None, step=steps, outcome=outcome, end_reason=reason,
            terminated=terminated, truncated=truncated and not terminated, ended_ns=self.node.now_ns(), detail=detail,
            intervention_steps=self._steps_human, weights_version=status.weights_version,
        )  # fmt: skip

    def abort(self, reason: str, detail: str) -> str:
        """End now and throw the recording away. Raises ValueError without a running episode."""
        if not self.running:
            raise ValueError("no episode is running")
        self.running = False
        self.ended_at = time.monotonic()
        self.loop.loop.abort()
        self.recording.aborted(end_reason=reason, detail=detail, ended_ns=self.node.now_ns(), step=self.loop.loop.step)
        return self.recording.status.episode_id

    def clock_jumped(self) -> None:
        self.sync.forget()
        self._last_command = 0  # stamps go on from the clock as it is now, not from where it was
        if self.running:
            self.loop.scheduler.clear()
            self.finish("clock_jump", truncated=True)

    def hold(self, wanted: bool) -> str:
        self.holding = wanted
        if not wanted:
            self._drop_chunk()
        return "holding" if wanted else "going on"

    def use_base(self, wanted: bool) -> str:
        if self.host is None:
            raise ValueError("policy is none: there is no base policy")
        self.host.use_base = wanted
        self._drop_chunk()
        if self.running:
            self.recording.say(weights_version=self.host.deciding)
        return "the base policy acts" if wanted else "the head acts"

    def _drop_chunk(self) -> None:
        self.loop.scheduler.clear()
        if self.deciding is not None:
            self.deciding.worker.forget()

    # ---- a tick

    def prepare(self) -> None:
        """A little before a command is due: the control step that it comes from."""
        if self._part == 0 and not self._prepared and self._may_start():
            self._prepared = self._control()

    def _may_start(self) -> bool:
        """False while an episode that has begun waits for its first control step."""
        return time.monotonic() >= self._starts_at and not (self._playout is not None and self._playout.realigning)

    def tick(self) -> None:
        """One command period."""
        self.prepare()
        if self._part == 0 and not self._prepared:
            return
        self._prepared = False
        stamp = self._last_command = max(self.node.now_ns(), self._last_command + 1)
        for channel, vector in self.loop.vectors(self._part, stamp).items():
            self._actions[channel].publish(self.hops[channel].message(vector, stamp))
        if self._sent_since is None:
            self._sent_since = self.node.clock_ns()
        self._part = (self._part + 1) % self.loop.per_step
        self.intervals.tick(time.monotonic())

    def _control(self) -> bool:
        """One control step; False when the episode ended in it."""
        node, loop = self.node, self.loop.loop
        now = node.clock_ns()
        if not node.sim_time:
            self.sync.wait_for_anchor(int(0.9 * self.control_s * S), min(0.2 * self.control_s, self._time_left()))
            now = node.clock_ns()
        snapshot = self.sync.snapshot()
        self.problems = snapshot.problems
        observation = loop._frames[-1] if snapshot.observation is None else self._seen(snapshot.observation)
        if not self._first and not self._close(observation, max(snapshot.stamp_ns, self._stamp + 1)):
            return False
        self._first = False
        self._tune()
        if self._guard_silent():
            self.finish("safety", truncated=True, detail="the guard is silent")
            return False
        stale = bool(snapshot.problems)
        if self.deciding is not None:
            self._decide(self.deciding, not stale and not self.holding)
        hold = SafetyFlag.STALE_OBSERVATION if stale else SafetyFlag.WATCHDOG if self.holding else SafetyFlag.NONE
        measured = {c.name: self.feedback.measured(c) for c in self.loop.channels}
        self.loop.step(now, measured, hold)
        if self.holding and not stale:
            loop.correct(source=Source.HOLD)
        pending = loop._pending
        if pending is not None and pending.source in (Source.HUMAN, Source.LATCHED, Source.BLEND):
            self._steps_human += 1
        if loop.step % max(1, round(self.robot.rates.control_hz)) == 0 and loop.step:
            control = pending.source.name.lower() if pending is not None else "hold"
            self.recording.say(step=loop.step, control=control)
        return True

    def _close(self, observation: Observation, stamp_ns: int) -> bool:
        """Close the open step with what it led to; False when the episode ended."""
        loop = self.loop.loop
        limit = round(self.p["max_episode_s"] * self.robot.rates.control_hz)
        timeout = self._ending is None and loop.step + 1 >= limit
        if self.arbiter.end_requested and self._ending is None:
            self._ending = ("operator", False, float("nan"), None)
        reason, terminated, reward, success = self._ending or ("timeout", False, 0.0, None)
        ending = timeout or self._ending is not None
        self.loop.close_step(observation, reward if ending else 0.0, ending and terminated, ending and not terminated, stamp_ns)
        self._stamp = stamp_ns
        if not ending:
            return True
        if timeout and self.p["end_on_reward"]:
            success = False  # whoever would have ended it with a success has not
        self.finish(reason, truncated=not terminated, success=success)
        return False

    def _guard_silent(self) -> bool:
        if self._sent_since is None:
            return False
        limit = max(GUARD_SILENT_S, 2.5 * self.period_s)
        heard = self.loop.executed_ns
        now = self.node.clock_ns()
        return now - self._sent_since > limit * S and (heard < 0 or now - heard > limit * S)

    def _tune(self) -> None:
        """Parameters that may change at run time."""
        blend_s = self.p["handback_blend_s"]
        if self.arbiter.config.handback_s != blend_s:
            self.arbiter.config = replace(self.arbiter.config, handback_s=blend_s)

    def _decide(self, deciding: Deciding, asks: bool) -> None:
        swaps = self.arbiter.state is State.AUTONOMOUS and deciding.host.pinned is None
        decisions, swapped = deciding.step(asks=asks, swaps=swaps, time_left=self._time_left)
        if swapped:
            self.recording.say(weights_version=deciding.host.deciding)
        if decisions and self._chunks.get_subscription_count():
            for decision in decisions:
                self._chunks.publish(
                    conversion.chunk_message(decision.chunk, self.loop.loop.action.names, self._stamp, self.control_s)
                )

    @property
    def undecided(self) -> str:
        """Why there is no decision, while a policy server or the inference process is away."""
        return "" if self.deciding is None else self.deciding.undecided

    def _time_left(self) -> float:
        """Seconds that this control step may wait; without a play-out of its own nothing is due at an instant."""
        if self._playout is None:
            return float("inf")
        return max(0.0, self._playout.deadline - CONTROL_COST_S - time.monotonic())

    # ---- what is heard

    def on_executed(self, channel: str, vector: np.ndarray, stamp_ns: int) -> None:
        self.loop.on_executed(channel, vector, stamp_ns, self.node.clock_ns())

    def on_guard(self, state: GuardState) -> None:
        self.loop.guard_moving = state.level in ("ok", "clamp") and state.source == "policy"
        self.loop.guard_holding = (
            state.level in ("hold", "stop", "estop") and state.armed and state.rule not in ("idle", "armed")
        )
        if self.running and not state.armed:
            self.finish("safety", truncated=True, detail=state.reason)

    def on_guard_event(self, event: GuardEvent) -> None:
        early = self.running and self.loop.loop.step * self.control_s < 2.0
        if event.rule == "start_jump" and early and not self.loop.guard_moving:
            self.abort("safety", event.text or "the first command would jump")

    def on_operator_action(self, channel: str, vector: np.ndarray, stamp_ns: int) -> None:
        self.operator.on_action(channel, vector)

    def on_operators(self, states: Sequence[OperatorState], stamp_ns: int) -> None:
        self.operator.on_states(states, stamp_ns, running=self.running)

    def on_reward(self, reward: StepReward) -> None:
        self.recording.note(reward)
        if not self.running or reward.episode_id != self.recording.status.episode_id or not reward.terminal or not reward.valid:
            return
        if reward.source in self.p["end_on_reward"] and self._ending is None:
            success = reward.value > 0.5
            self._ending = ("task", True, float(reward.value), success)

    # ---- figures

    def state_word(self, active: bool) -> str:
        """The heartbeat."""
        if not active:
            return "inactive"
        if not self.running:
            return "idle"
        state = self.arbiter.state
        away = self.host is not None and (not self.host.ready or bool(self.undecided))
        starved = away and self.loop.scheduler.rows_left(self.loop.loop.step) == 0
        if self.holding or self.problems or starved:
            return "hold"
        return "human" if state is State.HUMAN else "blend" if state is State.HANDBACK else "policy"

    def intervention_change(self) -> tuple[str, str, int] | None:
        """(state, device, intervention id) when the arbiter's state changed since the last call."""
        state = self.arbiter.state
        if state is self._last_state:
            return None
        self._last_state = state
        sample = self.arbiter._sample
        pending = self.loop.loop._pending
        return state.value, sample.device if sample is not None else "", -1 if pending is None else pending.intervention_id

    def health(self, name: str, active: bool) -> PolicyHealth:
        loop, now = self.loop.loop, self.node.clock_ns()
        worker, host = None if self.deciding is None else self.deciding.worker, self.host
        ages = {t: s.age_ns(now) for t, s in self.sync.streams.items()}
        word = self.state_word(active)
        pending = loop._pending
        why = f": {self.undecided}" if self.undecided else ""
        return PolicyHealth(
            node=name, message=f"{word}, episode {self.recording.index}, step {loop.step}{why}", state=word,
            control=None if pending is None else pending.source.name.lower(), step=loop.step,
            chunk_rows_left=self.loop.scheduler.rows_left(loop.step), chunk_late=self.loop.scheduler.late_chunks,
            replans=loop.decisions, inference_p50_ms=worker.quantile(0.5) * 1e3 if worker else None,
            inference_p95_ms=worker.quantile(0.95) * 1e3 if worker else None, command_hz=self.intervals.hz(),
            jitter_p99_ms=self.intervals.p99_ms(), deadline_misses=self.intervals.misses,
            obs_age_ms={t: a / 1e6 for t, a in list(ages.items())[:12] if a is not None},
            camera_skew_ms=max(self.sync.skews, default=0) / 1e6 if self.robot.images else None,
            weights_version=host.acting.version if host else None, swaps=host.swaps if host else None,
            swaps_refused=host.refused if host else None, filter_changed=self.loop.changed, disk_free_gb=self.recording.free_gb(),
        )  # fmt: skip
