"""A quick simulated session for the page's tests: a point that is to be pushed to a goal, two painted cameras, a clumsy and a good policy."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.console.control import DeskConfig
from robot_rl.console.flow import FlowConfig, SessionFlow
from robot_rl.console.hosting import ConsoleServer, HostConfig
from robot_rl.console.office import Office
from robot_rl.console.simulated import SimulatedSession
from robot_rl.runtime.safety import SafetyConfig
from robot_rl.sim.env import EnvSpec
from robot_rl.types import ActionSpec, Decision, FeatureSpec, Observation

STATE = "observation.state"
ACTION = ActionSpec(
    (-0.02, -0.02, -0.02, -0.1, 0.0), (0.02, 0.02, 0.02, 0.1, 0.08),
    names=("delta_x", "delta_y", "delta_z", "delta_yaw", "gripper_width"),
    kind=("continuous",) * 4 + ("gripper_continuous",), mode=("delta",) * 4 + ("absolute",),
)  # fmt: skip
LIMITS = SafetyConfig(velocity=(0.4, 0.4, 0.4, 2.0, float("inf")))


class PushEnv:
    """The point succeeds within 2 cm of the goal. State: x, y, z, yaw, goal x, goal y."""

    def __init__(self, steps: int = 200, hz: float = 20.0) -> None:
        self.spec = EnvSpec("test/Push", "Push the block to the mark", {STATE: FeatureSpec((6,))}, ACTION, hz, steps)
        self.at, self.goal, self.count, self.over = np.zeros(4), np.zeros(2), 0, True
        self.commands: list[np.ndarray] = []

    def _seen(self) -> Observation:
        return {STATE: np.concatenate([self.at, self.goal]).astype(np.float32)}

    def reset(self, *, seed: int) -> tuple[Observation, dict[str, Any]]:
        rng = np.random.default_rng(seed)
        self.at, self.goal, self.count, self.over = np.zeros(4), rng.uniform(0.1, 0.2, 2), 0, False
        return self._seen(), {"success": False, "start": {"seed": float(seed)}}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        assert not self.over
        self.commands.append(np.array(action))
        self.at = np.clip(self.at + action[:4], -0.3, 0.3)
        self.count += 1
        success = bool(np.abs(self.at[:2] - self.goal).max() < 0.02)
        cut = not success and self.count >= self.spec.max_episode_steps
        self.over = success or cut
        reward = 1.0 - float(np.abs(self.at[:2] - self.goal).max()) / 0.3
        return self._seen(), reward, success, cut, {"success": success}

    def render(self, camera: str = "", width: int = 320, height: int = 240) -> np.ndarray:
        import cv2

        picture = np.full((height, width, 3), (46, 52, 64) if camera == "front" else (59, 66, 82), np.uint8)
        place = lambda p: (int(width * (0.5 + 1.4 * p[1])), int(height * (0.8 - 1.8 * p[0])))  # noqa: E731
        cv2.circle(picture, place(self.goal), width // 22, (163, 190, 140), 2)
        cv2.circle(picture, place(self.at), width // 30, (235, 203, 139), -1)
        return picture

    def get_state(self) -> Any:
        return self.at.copy(), self.goal.copy(), self.count, self.over

    def set_state(self, state: Any) -> None:
        self.at, self.goal, self.count, self.over = state

    def close(self) -> None: ...


@dataclass
class Pusher:
    """Goes to the goal; where ``skill`` is below a draw of the episode's key, it goes past it."""

    skill: float
    speed: float = 0.02
    seen: list[Any] = field(default_factory=list)

    def decide(self, requests: Any) -> list[Decision]:
        out = []
        for r in requests:
            state = r.observation[STATE][-1]
            draw = np.random.default_rng(abs(hash(r.key)) % 2**32).random()
            target = state[4:6] if draw < self.skill else -state[4:6]
            row = np.zeros(5, np.float32)
            row[:2] = np.clip(target - state[:2], -self.speed, self.speed)
            row[4] = 0.08
            out.append(Decision(r.step, None, row[None], row[None]))
        return out


@dataclass
class Live:
    """A running console."""

    session: SimulatedSession
    office: Office
    server: ConsoleServer
    folder: Path

    @property
    def url(self) -> str:
        return self.server.url


@contextmanager
def live(
    folder: Path, *, skills: tuple[float, ...] = (0.5, 1.0), steps: int = 200, rate_hz: float = 20.0, auto: bool = False,
    flow: FlowConfig | None = None, host: HostConfig | None = None, speed: float = 0.02, size: tuple[int, int] = (320, 240),
    desk: DeskConfig | None = None, cameras: tuple[str, ...] = ("front", "wrist"), env: Callable[[], Any] | None = None,
) -> Iterator[Live]:  # fmt: skip
    """A simulated session with its page, on a free port."""
    policies = {i: Pusher(s, speed) for i, s in enumerate(skills)}
    session = SimulatedSession(
        env or (lambda: PushEnv(steps)), policies, folder / "store", cameras=cameras, rate_hz=rate_hz, auto=auto, safety=LIMITS,
        size=size,
    )  # fmt: skip
    with session:
        steps_of = None if flow is None else SessionFlow(flow, folder)
        office = Office(session, folder, folder / "store", flow=steps_of, desk=desk)
        with ConsoleServer(office, host or HostConfig(port=0)) as server:
            yield Live(session, office, server, folder)


class Page:
    """The page's side of the protocol, for tests without a browser."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.tick, self.seq, self.state, self.connection = socket, 0, 0, {}, 0
        self.answers: dict[str, Any] = {}
        self.refused: list[str] = []
        self._asked = 0

    async def hear(self, seconds: float = 0.05) -> None:
        """Read what has come."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                self.take(json.loads(await asyncio.wait_for(self.socket.recv(), left)))
            except (asyncio.TimeoutError, TimeoutError):
                return

    def take(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "tick":
            self.tick = message["t"]
        elif kind == "state":
            self.state = message
        elif kind == "hello":
            self.connection = message["connection"]
        elif kind == "answer":
            self.answers[message["id"]] = message
        elif kind == "refused":
            self.refused.append(message["text"])

    async def ask(self, name: str, identity: str = "", **values: Any) -> dict[str, Any]:
        self._asked += 1
        identity = identity or f"{id(self)}-{self._asked}"
        self.answers.pop(identity, None)
        await self.socket.send(json.dumps({"type": "ask", "id": identity, "name": name, "values": values}))
        until = time.monotonic() + 60.0
        while identity not in self.answers:
            assert time.monotonic() < until, f"no answer to {name}"
            await self.hear(0.05)
        return self.answers.pop(identity)

    async def drive(self, axes: list[float], held: bool = True, gripper: bool = False, **changes: Any) -> str:
        self.seq += 1
        message = {
            "type": "drive",
            "seq": self.seq,
            "echo": self.tick,
            "held": held,
            "axes": axes,
            "gripper": gripper,
            **changes,
        }
        text = json.dumps(message)
        await self.socket.send(text)
        return text

    async def until(self, condition: Callable[[dict[str, Any]], Any], what: str, patience_s: float = 60.0) -> dict[str, Any]:
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            await self.hear(0.05)
            if self.state and condition(self.state):
                return self.state
        raise AssertionError(f"{what}: not within {patience_s:.0f} s; the state is {json.dumps(self.state)[:1500]}")


def connect(url: str, **options: Any) -> Any:
    """A websocket to the console's controls, with the Origin a browser would send.

    As in a browser, what nobody has read yet does not stop it from reading: closing would wait ten seconds for an answer that is in the queue.
    """
    import websockets

    return websockets.connect(url.replace("http", "ws", 1) + "/ws", origin=url, **{"max_queue": None, **options})
