"""Sessions to break: the graph as ``robot-rl up`` starts it, an observer, and the questions that every fault is judged by."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fault_net as net
from fault_watch import Watch
from graph_kit import own_domain
from policy_kit import write_run
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from std_srvs.srv import SetBool, Trigger

from robot_rl.replay import EpisodeStore
from robot_rl.ros import starting
from robot_rl.ros.graph import NodeSpec, graph
from robot_rl.ros.starting import Supervisor

START_S, RECOVER_S = 400.0, 120.0
SAID_AFTER_NS = 5_000_000
RECIPE = """
extends: {quickstart}
demos: {{prefill: false}}
threads: 1
schedule: {{warmup_steps: 400, return_updates: 5, warmup_updates: 5, batch_size: 32, updates_per_step: 0.05}}
learner_process: {{threads: 1}}
"""
PARAMETERS = """
/**/policy_node:
  ros__parameters: {configure_timeout_s: 300.0, warmup_forwards: 1}
/**/monitor_node:
  ros__parameters: {configure_timeout_s: 300.0, silence_s: 30.0, max_restarts: 100}
/**/sim_node:
  ros__parameters: {rt_priority: %d}
/**/learner_node:
  ros__parameters: {publish_period_s: 5.0, checkpoint_period_s: 15.0, min_free_gb: 0.1}
"""
SIM_PRIORITY = 5
"""Drivers of a real arm run with real-time priority or on a computer of their own; below the guard's and the policy's."""
CAMERA = """
extends: {sim_arm}
name: sim_arm_faults
observations:
  observation.images.front:
    {{topic: front/image_raw, type: sensor_msgs/msg/Image, size: [240, 320], resize: [60, 80], camera_info: front/camera_info, hz: 30,
     max_age_s: 0.2}}
sync: {{anchor: state, state: newest, frozen_check: true}}
"""
VLM = """
kind: vlm
name: vlm.progress
camera: observation.images.front
goal: lift the block
method: shuffled
frames: 5
vlm: {{base_url: "{url}", model: fake, requests_per_day: 20000, tokens_per_day: 200000000, money_per_day: 0}}
"""
TOKEN = "a-token-for-the-fault-harness"


@dataclass
class Run:
    """One injection of one fault, and what came of it. Times in milliseconds from the injection."""

    variant: str
    hold_ms: float | None = None
    bar_ms: float | None = None
    problems: list[str] = field(default_factory=list)
    weaker: str = ""
    recovered_s: float | None = None
    person: bool = False
    figures: dict[str, float] = field(default_factory=dict)

    def check(self, right: object, problem: str) -> None:
        if not right:
            self.problems.append(problem)


class Processes(Supervisor):
    """A supervisor that looks after its processes by itself, and starts some of them in other ways.

    Args:
        prefix: words before a process' own command (another network namespace).
    """

    def __init__(self, specs: Sequence[NodeSpec], say: Callable[[str], None], env: Mapping[str, str],
                 prefix: Callable[[NodeSpec], list[str]] = lambda spec: []) -> None:  # fmt: skip
        super().__init__(specs, say=say, env=env)
        self._prefix = prefix
        self.schema: dict[str, int] = {}
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        super().start()
        self._watcher.start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for p in self.processes.values():
                p.crashes.clear()  # we kill more often than any process fails: the limit of restarts has tests of its own
            self.look()

    def _launch(self, spec: NodeSpec) -> Any:
        original = starting.command

        def command(spec: NodeSpec, folder: Path) -> list[str]:
            words = original(spec, folder)
            if (
                schema := self.schema.get(spec.full_name)
            ) is not None:  # a peer of another time: its encoder says another number
                code = (
                    f"import sys; sys.argv = ['{spec.name}', *sys.argv[1:]]; import robot_rl.wire.codec as codec; "
                    f"codec.SCHEMA = {schema}; from {spec.module} import main; raise SystemExit(main())"
                )
                words = [sys.executable, "-c", code, *words[3:]]
            return [*self._prefix(spec), *words]

        starting.command = command
        try:
            return super()._launch(spec)
        finally:
            starting.command = original

    def revive(self, name: str) -> None:
        """Start again what its graph does not respawn: a driver, by its own supervisor."""
        p = self.processes[name]
        p.popen.wait()
        p.popen, p.given_up, p.restart_at, p.started = self._launch(p.spec), False, 0.0, time.monotonic()
        p.crashes.clear()

    def stop(self) -> dict[str, int]:
        self._over.set()
        if self._watcher.ident is not None:
            self._watcher.join(5.0)
        return super().stop()


class Bench:
    """One session. ``rate`` below 1: slow motion, all nodes live by ``/clock``, and times are simulated ones. ``kind``: ``main``, ``camera``, ``two`` (robot and learner on two machines), ``wall`` (its wall clock can be
    moved), ``simtime`` (it lives by ``/clock``).

    Attributes:
        weaker: what this machine does not allow, by name.
    """

    def __init__(self, folder: Path, kind: str, seed: int, *, episode_s: float = 8.0, rate: float = 1.0) -> None:
        self.rate = rate
        self.folder, self.kind, self.rng = folder, kind, random.Random(seed)
        self.episode_s = episode_s
        self.weaker: dict[str, str] = {}
        self.lines: list[str] = []
        self.stack = ExitStack()
        self.network: net.NetworkPair | None = None
        self.proxy: net.Proxy | None = None
        self.clock: net.WallClock | None = None
        self.disks: dict[str, net.SmallDisk] = {}
        self.run = folder / "run"
        self.store = self.run / "store"
        self.robot = "sim_arm"
        self.stopped = 0

    # ---- up and down

    def start(self) -> Bench:
        from robot_rl.paths import find_config

        self.folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "main":
            self._disks()
        self.policy = write_run(self.folder / "base") / "base"
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(quickstart=find_config("quickstart")))
        drawn = (
            self.kind in ("camera", "simtime") or self.rate < 1.0
        )  # pictures take too long; simulated time waits for everybody
        (self.folder / "parameters.yaml").write_text(PARAMETERS % (0 if drawn else SIM_PRIORITY))
        env: dict[str, str] = {}
        if self.kind == "wall":
            self.clock = net.WallClock(self.folder)
            env |= self.clock.env
        given = {
            "policy": str(self.policy), "run_dir": str(self.run), "recipe": str(recipe), "operator": "joy", "gate": "false",
            "http_port": "0", "params_file": str(self.folder / "parameters.yaml"), "max_episode_s": f"{self.episode_s:g}",
            "use_sim_time": "true" if self.kind == "simtime" or self.rate < 1.0 else "false", "realtime_factor": f"{self.rate:g}",
            "swap_at": "chunk",
        }  # fmt: skip
        specs = self._two(given, env) if self.kind == "two" else self._one(given, env)
        if self.rate < 1.0:  # nothing is measured: no need to take a busy machine's processors by force
            specs = [s if s.executable == "shipper" else replace(s, params={**s.params, "rt_priority": 0}) for s in specs]
        self.supervisor = Processes(specs, self._say, env, self._prefix)
        self.stack.callback(self.supervisor.stop)
        self.stack.enter_context(own_domain())
        os.environ.pop("ROS_AUTOMATIC_DISCOVERY_RANGE", None)
        if self.network is None:
            os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        os.environ |= {k: v for k, v in env.items() if k.startswith(("FASTDDS", "ROS_"))}
        if self.network is not None:
            self.network.enter()
        stamps = self.kind != "simtime" and self.rate == 1.0
        self.watch = Watch(
            self.robot, sender_clock=self.kind != "wall", wall_stamps=stamps and self.kind != "wall", rate=self.rate
        )
        self.stack.callback(self.watch.close)
        self.supervisor.start()
        if self.watch.until(self.watch.moving, START_S / self.rate) is None:
            text = "\n".join(self.lines[-60:])
            self.close()
            raise RuntimeError(f"the session did not begin to move within {START_S / self.rate:.0f} s\n{text}")
        return self

    def _one(self, given: dict[str, str], env: dict[str, str]) -> list[NodeSpec]:
        if self.kind == "camera":
            from robot_rl.paths import find_config

            self.robot = str(self.folder / "robot.yaml")
            Path(self.robot).write_text(CAMERA.format(sim_arm=find_config("robots/sim_arm")))
            given |= {"robot": self.robot, "images": "raw", "recipe": "", "vlm_rewards": self._vlm()}
            env["MUJOCO_GL"] = os.environ.get("MUJOCO_GL", "egl")
        return list(graph("sim_session").build(given))

    def _vlm(self) -> str:
        """A reward source that asks a model server of ours; the path of its settings."""
        from robot_rl.rewards.vlm.fake_server import FakeVlmServer

        server = FakeVlmServer(seed=self.rng.randrange(1 << 30))
        self.stack.callback(server.close)
        path = self.folder / "vlm.yaml"
        path.write_text(VLM.format(url=server.url))
        return str(path)

    def _two(self, given: dict[str, str], env: dict[str, str]) -> list[NodeSpec]:
        host = "127.0.0.1"
        try:
            self.network = net.NetworkPair()
            self.stack.callback(self.network.close)
            host = net.LEARNER_IP
            env |= {"FASTDDS_BUILTIN_TRANSPORTS": "UDPv4", "ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET"}
            self.network.enter()
        except OSError as error:
            self.weaker["partition"] = str(error)
        token = self.folder / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        port = 20_000 + os.getpid() % 20_000
        self.proxy = net.Proxy(host, port, self.rng)
        self.stack.callback(self.proxy.close)
        self.learner_run = self.folder / "learner"
        there = {k: given[k] for k in ("policy", "recipe", "gate", "params_file")} | {
            "run_dir": str(self.learner_run), "http_port": str(port), "token_file": str(token), "robots": "robot",
            "http_bind": "0.0.0.0" if self.network is not None else "127.0.0.1", "fastdds_profile": "none",
        }  # fmt: skip
        here = given | {"learner_url": self.proxy.url, "token_file": str(token), "fastdds_profile": "none"}
        far = [
            replace(s, name=f"learner_{s.name}" if s.executable == "monitor_node" else s.name)
            for s in graph("learner").build(there)
        ]
        return [*graph("sim_session").build(here), *far]

    def _prefix(self, spec: NodeSpec) -> list[str]:
        if self.network is None:
            return []
        far = spec.executable == "learner_node" or spec.name == "learner_monitor_node"
        return self.network.learner if far else self.network.robot

    def _disks(self) -> None:
        try:
            for name, where, size in (("learner", self.run, 200), ("robot", self.store, 560)):
                self.disks[name] = net.SmallDisk(where, size)
                self.stack.callback(self.disks[name].close)
        except OSError as error:
            self.weaker["disk"] = str(error)

    def _say(self, line: str) -> None:
        text = f"{time.strftime('%H:%M:%S')} {line}"
        self.lines.append(text)
        with open(self.folder / "session.log", "a") as log:
            log.write(f"{text}\n")

    def close(self) -> None:
        for name in list(self.supervisor.processes) if hasattr(self, "supervisor") else []:
            with suppress(ProcessLookupError):
                os.kill(self.supervisor.processes[name].pid, signal.SIGCONT)
        self.stack.close()

    # ---- doing things

    def pid(self, name: str) -> int:
        return self.supervisor.processes[f"/{name}"].pid

    def set_parameter(self, node: str, name: str, value: str) -> int:
        """Set a string parameter; the wall clock (ns) right before. Raises RuntimeError where it is refused."""
        asked = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)
        request = SetParameters.Request(parameters=[Parameter(name=name, value=asked)])
        now = time.time_ns()
        [result] = self.watch.call(SetParameters, f"{node}/set_parameters", request).results
        if not result.successful:
            raise RuntimeError(f"{node}: {name}={value!r} is refused: {result.reason}")
        return now

    def trigger(self, service: str) -> bool:
        return bool(self.watch.call(Trigger, service, Trigger.Request()).success)

    def set_bool(self, service: str, data: bool) -> bool:
        return bool(self.watch.call(SetBool, service, SetBool.Request(data=data)).success)

    # ---- waiting and judging

    def await_motion(self) -> None:
        """Return at a random instant of an episode in motion. Raises RuntimeError when there is none any more."""
        end = time.monotonic() + RECOVER_S / self.rate
        while time.monotonic() < end:
            if self.watch.until(self.watch.moving, 5.0) is None:
                continue
            time.sleep(self.rng.uniform(0.1, 0.5 * self.episode_s) / self.rate)
            began = next((s.sent_ns for s in reversed(self.watch.episodes) if s.value.state == "running"), 0)
            same = [s for s in self.watch.episodes if s.value.episode_id == self.watch.episodes[-1].value.episode_id]
            began = min((s.received_ns for s in same), default=began)
            if self.watch.moving() and (time.time_ns() - began) / 1e9 < 0.8 * self.episode_s / self.rate:
                return
        raise RuntimeError("the robot does not move any more")

    def recovered(self, run: Run, since_ns: int, *, new_episode: bool = True) -> None:
        """Wait until the session goes on by itself: another episode in motion (or, for small faults, the same one)."""
        before = {s.value.episode_id for s in list(self.watch.episodes) if s.received_ns <= since_ns}

        def on() -> bool:
            episode = self.watch.episode()
            return self.watch.moving() and episode is not None and (not new_episode or episode.episode_id not in before)

        began = time.monotonic()
        if self.watch.until(on, RECOVER_S / self.rate) is None:
            run.person = True
            run.problems.append(f"the session did not go on by itself within {RECOVER_S:.0f} s")
        else:
            run.recovered_s = round(time.monotonic() - began, 2)

    def held(self, run: Run, since_ns: int, bar_ms: float, *, patience_s: float = 10.0) -> None:
        """The guard holds, and nothing moves any more ``bar_ms`` after the injection."""
        found = self.watch.until(lambda: self.watch.first_guard(since_ns, "hold", "stop", "estop"), patience_s)
        run.check(found is not None, "the guard did not hold")
        if found is None:
            return
        time.sleep(0.3)
        again = self.watch.first_guard(found.sent_ns, "ok", "clamp")
        # A guard sends the first command of going on before it says that it goes on.
        self._still(run, since_ns, None if again is None else again.sent_ns - SAID_AFTER_NS, bar_ms)
        run.figures["guard_hold_ms"] = round((found.sent_ns - since_ns) / 1e6 * self.rate, 1)

    def still(self, run: Run, since_ns: int, until_ns: int | None, bar_ms: float) -> None:
        """Nothing moves any more ``bar_ms`` after the injection, until the given time."""
        self._still(run, since_ns, until_ns, bar_ms)

    def _still(self, run: Run, since_ns: int, until_ns: int | None, bar_ms: float) -> None:
        moves = self.watch.moves(since_ns, until_ns)
        run.hold_ms = round((moves[-1].sent_ns - since_ns) / 1e6 * self.rate, 1) if moves else 0.0
        run.bar_ms = bar_ms
        run.check(run.hold_ms <= bar_ms, f"moved until {run.hold_ms:.0f} ms after the injection; accepted are {bar_ms:.0f} ms")

    def went_on(self, run: Run, since_ns: int, seconds: float = 2.0) -> None:
        """Nothing holds within the next seconds, unless an episode ends as it would have."""
        time.sleep(max(0.0, seconds - (time.time_ns() - since_ns) / 1e9))
        now = time.time_ns()
        bad = [
            s.value.rule
            for s in list(self.watch.guards)
            if since_ns < s.sent_ns <= now
            and s.value.level != "ok"
            and s.value.rule not in ("idle", "armed", "velocity", "workspace")
        ]
        run.check(
            not [b for b in bad if b not in ("position", "acceleration", "jerk", "gripper_rate")], f"the guard held: {bad}"
        )
        run.figures["longest_gap_ms"] = round(self.watch.longest_gap_s(since_ns, now) * 1e3, 1)

    def lost_episodes(self) -> list[str]:
        """Episodes that were said to be committed and cannot be read."""
        lost = []
        if not self.watch.committed:
            return []
        with EpisodeStore.open(self.store) as store:
            for episode_id in list(self.watch.committed):
                try:
                    if not len(store.read(episode_id)):
                        lost.append(episode_id)
                except Exception as error:
                    lost.append(f"{episode_id}: {error!r}")
        return lost
