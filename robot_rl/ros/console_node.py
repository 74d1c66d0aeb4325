"""``console_node``: the operator's page on a ROS graph.

What the page drives goes out as one more device of ``intervention_node`` (``console/joy``); everything else are the services that any
other client could call. No lifecycle: stopping a robot must not depend on a transition.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from sensor_msgs.msg import CompressedImage, Image, Joy
from std_srvs.srv import SetBool, Trigger

from robot_rl.console.bridge import Answer, EpisodeView, SessionView, TracePoint
from robot_rl.console.flow import FlowConfig, SessionFlow
from robot_rl.console.frames import Cameras
from robot_rl.console.hosting import ConsoleServer, HostConfig
from robot_rl.console.messages import Drive
from robot_rl.console.office import Office
from robot_rl.robots.description import load_robot
from robot_rl.ros import names, qos
from robot_rl.ros.base import OK, WARN, PlainNode, run
from robot_rl.ros.conversion import from_stamp, read_image, read_records, to_stamp
from robot_rl.ros.graph_names import CONSOLE_JOY, CONSOLE_NODE
from robot_rl.wire import EpisodeStatus, GuardState, InterventionState, SessionStatus, StepReward, WeightsNotice

ANSWER_S = 5.0
AFTER_RESET_S = 4.0
CLOCK_OFF_NS = 500_000_000
MAX_POINTS = 5000
LEARNER_FIGURES = ("state", "updates", "env_steps", "episodes")
DEADMAN, GRIPPER, ESTOP_BUTTON, BUTTONS = 5, 2, 8, 10

CALLS: Mapping[str, tuple[str, bool | None]] = {
    "success": (names.END_EPISODE, True),
    "failure": (names.END_EPISODE, False),
    "discard": (names.CANCEL_EPISODE, None),
    "undo_label": (names.UNDO_LABEL, None),
    "estop": (names.GUARD_ESTOP, None),
    "reset_estop": (names.RESET_ESTOP, None),
    "hand_back": (names.SET_INTERVENTION, False),
    "promote": ("learner_node/promote", None),
    "rollback": ("learner_node/rollback", None),
}
"""Command to the service that carries it out, and what is sent: nothing to a Trigger."""
SWITCHES = {
    "arm": names.ARM,
    "hold": names.HOLD,
    "pause_learning": "learner_node/pause",
}


class ConsoleNode(PlainNode):
    """A :class:`~robot_rl.console.bridge.Bridge` to the graph, with the page's server in a thread."""

    def __init__(self, **options: Any) -> None:
        super().__init__(CONSOLE_NODE, **options)
        p = self.parameters
        p.check()
        self.robot = load_robot(p["robot"])
        run_dir = Path(p["run_dir"] or ".").expanduser().resolve()
        store = Path(p["store"]).expanduser() if p["store"] else run_dir / "store"
        self._guard = threading.Lock()
        self._view = SessionView(robot=self.robot.name, run=run_dir.name)
        self._weights: dict[str, WeightsNotice] = {}
        self._joy = self.create_publisher(Joy, CONSOLE_JOY, qos.LATEST)
        self._calls = {
            service: self.create_client(Trigger if value is None else SetBool, service) for service, value in CALLS.values()
        } | {service: self.create_client(SetBool, service) for service in SWITCHES.values()}
        self._calls[names.START_EPISODE] = self.create_client(Trigger, names.START_EPISODE)
        if p["reset_service"]:
            self._calls[p["reset_service"]] = self.create_client(Trigger, p["reset_service"])
        self._setters = {
            n: self.create_client(SetParameters, f"{n}/set_parameters") for n in ("policy_node", "intervention_node")
        }
        self.cameras = Cameras(hz=p["camera_hz"], quality=p["jpeg_quality"], width=p["width"])
        self._listen()
        guided = (
            SessionFlow(
                FlowConfig(
                    p["baseline_episodes"], p["training_episodes"], p["comparison_episodes"], p["reset_s"], p["hands_off"],
                    intervention_rate=p["intervention_rate"], intervention_steps=p["intervention_steps"],
                ),
                run_dir,
            )
            if p["guide"]
            else None
        )  # fmt: skip
        self.office = Office(self, run_dir, store, flow=guided)
        host = HostConfig(p["http_bind"], p["http_port"], p["token_file"], p["certificate"], p["key"])
        self.server = ConsoleServer(self.office, host).start()
        self.add_check("page", self._check)
        self.get_logger().info(f"the operator's page is at {self.server.url}")

    # ---- what the graph says

    def _listen(self) -> None:
        self.listen(DiagnosticArray, names.EPISODE_STATUS, self._on_episode, qos.STATE)
        self.listen(DiagnosticArray, names.INTERVENTION_STATE, self._on_intervention, qos.STATE)
        self.listen(DiagnosticArray, names.GUARD_STATE, self._on_guard, qos.STATE)
        self.listen(DiagnosticArray, names.REWARD_EVENTS, self._on_reward, qos.EVENT)
        self.listen(DiagnosticArray, names.WEIGHTS, self._on_weights, qos.STATE)
        self.listen(DiagnosticArray, names.METRICS, self._on_metrics, qos.DIAG)
        self.listen(DiagnosticArray, names.SESSION_STATUS, self._on_session, qos.STATE)
        shown = []
        for feature, source in self.robot.images.items():
            camera = feature.rpartition(".")[2]
            shown.append(camera)
            packed = source.type.endswith("CompressedImage")
            take = partial(self._on_packed if packed else self._on_image, camera)
            profile = qos.profile(source.qos.reliability, source.qos.durability, 1)
            self.listen(CompressedImage if packed else Image, source.topic, take, profile)
        for topic in self.parameters["cameras"] or ():
            camera = topic.strip("/").removesuffix("/compressed").removesuffix("/image_raw").replace("/", "_")
            shown.append(camera)
            packed = topic.endswith("/compressed")
            take = partial(self._on_packed if packed else self._on_image, camera)
            self.listen(CompressedImage if packed else Image, topic, take, qos.SENSOR)
        self._say(cameras=tuple(sorted(shown)))

    def _say(self, **changes: Any) -> None:
        with self._guard:
            self._view = replace(self._view, clock_ns=time.time_ns(), **changes)

    @staticmethod
    def _acquired(message: Any) -> int:
        """The picture's own stamp where its clock is this machine's; otherwise now."""
        stamp, now = from_stamp(message.header.stamp), time.time_ns()
        return stamp if abs(now - stamp) < CLOCK_OFF_NS else now

    def _on_image(self, camera: str, message: Image) -> None:
        if self.cameras.due(camera):
            self.cameras.offer(camera, read_image(message), self._acquired(message))

    def _on_packed(self, camera: str, message: CompressedImage) -> None:
        if "jp" not in message.format.lower():
            raise ValueError(f"{camera}: format {message.format!r}; the page shows jpeg")
        if self.cameras.due(camera):
            self.cameras.offer(camera, bytes(message.data), self._acquired(message))

    def _on_episode(self, message: DiagnosticArray) -> None:
        for s in read_records(message, EpisodeStatus):
            before = self._view.episode
            seconds = (
                max(0.0, (self.now_ns() - s.started_ns) / 1e9)
                if s.started_ns and s.state in ("running", "paused")
                else before.seconds
            )
            detail = s.detail or (s.end_reason if s.end_reason not in (None, "task") else "") or ""
            episode = EpisodeView(
                s.episode_id, s.state, s.index, s.step, s.control or "", s.task or "", s.outcome or "", detail, seconds,
                s.intervention_steps or 0,
            )  # fmt: skip
            fresh = s.episode_id != before.id
            acting = replace(self._view.weights, acting=s.weights_version or 0)
            self._say(episode=episode, weights=acting, task=s.task or self._view.task, **({"traces": {}} if fresh else {}))

    def _on_intervention(self, message: DiagnosticArray) -> None:
        for s in read_records(message, InterventionState):
            self._say(control=s.state, device=s.device or "")

    def _on_guard(self, message: DiagnosticArray) -> None:
        for s in read_records(message, GuardState):
            self._say(guard=s.level, guard_reason=s.reason, armed=s.armed)

    def _on_reward(self, message: DiagnosticArray) -> None:
        for r in read_records(message, StepReward):
            if r.valid and r.episode_id == self._view.episode.id:
                known = self._view.traces
                points = (*known.get(r.source, ()), TracePoint(r.step, r.value, r.kind))[-MAX_POINTS:]
                self._say(traces={**known, r.source: points})

    def _on_weights(self, message: DiagnosticArray) -> None:
        notices = {n.which: n for n in read_records(message, WeightsNotice)}
        if "promoted" not in notices and "promoted" in self._weights:
            notices["promoted"] = self._weights["promoted"]
        self._weights = notices
        promoted, candidate = notices.get("promoted"), notices.get("candidate")
        weights = replace(
            self._view.weights, promoted=promoted.version if promoted else 0, candidate=candidate.version if candidate else 0,
            share=(candidate.share or 0.0) if candidate else 0.0,
            newest=max([self._view.weights.newest, *(n.version for n in notices.values())]),
            state=(candidate.gate or "") if candidate else (promoted.gate or "") if promoted else "",
        )  # fmt: skip
        self._say(weights=weights)

    def _on_metrics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            values = {v.key: v.value for v in status.values}
            newest = values.get("version", "")
            weights = self._view.weights
            if newest.isdigit():
                weights = replace(weights, newest=max(weights.newest, int(newest)))
            figures = {k: values[k] for k in LEARNER_FIGURES if k in values}
            self._say(learner=figures, weights=weights, learning_paused=values.get("state") == "paused")

    def _on_session(self, message: DiagnosticArray) -> None:
        for s in read_records(message, SessionStatus):
            problems = (s.line,) if s.phase in ("degraded", "stopped") else ()
            self._say(
                phase=s.phase or "",
                line=s.line,
                nodes=dict(s.nodes),
                problems=problems,
                episodes=s.episodes or 0,
                successes=s.successes or 0,
            )

    # ---- the bridge: called in the server's thread

    def view(self) -> SessionView:
        view = self._view
        if view.guard == "estop" and view.control != "estop":
            return replace(view, control="estop")
        return view

    def drive(self, sample: Drive, operator: str) -> None:
        buttons = [0] * BUTTONS
        buttons[DEADMAN], buttons[GRIPPER] = int(sample.held), int(sample.gripper and sample.held)
        message = Joy(axes=list(sample.axes), buttons=buttons)
        message.header.stamp = to_stamp(time.time_ns())
        self._joy.publish(message)

    def _press(self, button: int) -> None:
        buttons = [0] * BUTTONS
        buttons[button] = 1
        message = Joy(axes=[0.0] * 6, buttons=buttons)
        message.header.stamp = to_stamp(time.time_ns())
        self._joy.publish(message)

    async def ask(self, name: str, values: Mapping[str, Any], operator: str) -> Answer:
        if name in CALLS:
            service, value = CALLS[name]
            answer = await self._call(service, value)
            if name == "estop" and not answer.ok:  # the device's button is another way to the guard
                self._press(ESTOP_BUTTON)
                return Answer(False, f"{answer.text}; asked for through intervention_node too. Use the hardware stop")
            return answer
        if name in SWITCHES:
            return await self._call(SWITCHES[name], bool(values["on"]))
        if name == "start_episode":
            return await self._start()
        if name == "instruction":
            answer = await self._set("policy_node", "task", values["text"])
            if answer.ok:
                self._say(task=values["text"])
            return answer
        if name == "act_with":
            return await self._set("policy_node", "pin_version", int(values["version"]))
        if name == "explore":
            return await self._set("policy_node", "explore", bool(values["on"]))
        if name == "operator":
            return await self._set("intervention_node", "operator", operator)
        return Answer(False, f"{name}: this session cannot")

    async def _start(self) -> Answer:
        """Reset first, where a service does that; then until observations of the new scene are there."""
        reset = self.parameters["reset_service"]
        if reset:
            answer = await self._call(reset, None)
            if not answer.ok:
                return answer
            await asyncio.sleep(0.3)
        until = time.monotonic() + AFTER_RESET_S
        while True:
            answer = await self._call(names.START_EPISODE, None)
            if answer.ok or not reset or "running" in answer.text or time.monotonic() > until:
                return answer
            await asyncio.sleep(0.2)

    async def _call(self, service: str, value: bool | None) -> Answer:
        request = Trigger.Request() if value is None else SetBool.Request(data=value)
        found = await self._send(self._calls[service], request, service)
        if isinstance(found, str):
            return Answer(False, found)
        return Answer(bool(found.success), str(found.message))

    async def _set(self, node: str, name: str, value: bool | int | str) -> Answer:
        if isinstance(value, bool):
            wanted = ParameterValue(type=ParameterType.PARAMETER_BOOL, bool_value=value)
        elif isinstance(value, int):
            wanted = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)
        else:
            wanted = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)
        request = SetParameters.Request(parameters=[ParameterMessage(name=name, value=wanted)])
        found = await self._send(self._setters[node], request, f"{node}/set_parameters")
        if isinstance(found, str):
            return Answer(False, found)
        result = found.results[0]
        return Answer(bool(result.successful), str(result.reason) or f"{name}: {value}")

    async def _send(self, client: Any, request: Any, service: str) -> Any:
        """The response, or why there is none, in words. The answer comes in rclpy's thread and is carried over."""
        if not client.service_is_ready():
            return f"{service} is not there: is its node running?"
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Any] = loop.create_future()

        def done(future: Any) -> None:
            def carry() -> None:
                if not answered.done():
                    answered.set_result(future.result() if future.exception() is None else str(future.exception()))

            loop.call_soon_threadsafe(carry)

        sent = client.call_async(request)
        sent.add_done_callback(done)
        try:
            return await asyncio.wait_for(answered, ANSWER_S)
        except (asyncio.TimeoutError, TimeoutError):
            client.remove_pending_request(sent)
            return f"{service} has not answered within {ANSWER_S:.0f} s"

    # ---- figures

    def _check(self) -> tuple[int, str, dict[str, Any]]:
        desk, seat = self.office.desk, self.office.desk.seat
        values = {
            "url": self.server.url, "pages": desk.watchers, "operator": seat.name if seat else "", "seats_lost": desk.counts.lost,
            "replayed": desk.counts.replayed, "late": desk.counts.late, "malformed": desk.counts.malformed,
            "refused_logins": self.server.access.refused, "frames_skipped": self.cameras.skipped,
        }  # fmt: skip
        problem = str(self.server.error or "") or self.office.problem
        return (WARN if problem else OK), problem or self.server.url, values

    def close(self) -> None:
        self.server.close()
        self.cameras.close()


def main(argv: Sequence[str] | None = None) -> int:
    return run(ConsoleNode, list(argv) if argv is not None else None)


if __name__ == "__main__":
    sys.exit(main())
