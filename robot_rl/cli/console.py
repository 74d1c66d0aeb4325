"""``robot-rl console`` and ``robot-rl session``: the operator's page, and a session that it walks a person through."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robot_rl.cli.output import FAILED, OK, UsageError, emit


def _options(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; beyond loopback a token is needed")
    parser.add_argument("--port", type=int, default=port, help=f"0 takes a free one (default {port})")
    parser.add_argument("--token-file", default="", help="file with the token (mode 600); else ROBOT_RL_CONSOLE_TOKEN")
    parser.add_argument("--json", action="store_true", help="JSON lines on standard output")


def console(argv: Sequence[str]) -> int:
    """The page beside a graph that runs, or with a simulation of its own."""
    from robot_rl.console.hosting import PORT

    parser = argparse.ArgumentParser(
        "robot-rl console", allow_abbrev=False,
        description="Serve the operator's page. With --sim RUN it brings a simulated robot that acts with that run's policy; without, "
        "it joins the ROS graph that runs (robot-rl up session ... console:=true starts both).",
    )  # fmt: skip
    parser.add_argument(
        "--sim", default="", metavar="RUN", help="folder of a run: simulate its task in this process, without ROS"
    )
    parser.add_argument("--robot", default="", help="name in configs/robots/ or path, for a ROS graph")
    parser.add_argument("--run-dir", default="", help="folder of the running session: store, notes, clips")
    parser.add_argument("--namespace", default="", help="of the graph")
    parser.add_argument("--seed", type=int, default=0, help="of the first simulated start")
    parser.add_argument("--auto", action="store_true", help="simulated episodes start by themselves")
    _options(parser, PORT)
    given = parser.parse_args(argv)
    if bool(given.sim) == bool(given.robot):
        raise UsageError("accepted is either --sim RUN or --robot NAME (with --run-dir)")
    if given.robot:
        return _join(given)
    return _simulate(given, None)


def session(argv: Sequence[str]) -> int:
    """From "robot on" to "policy better": starts the graph and the page, and walks a person through it."""
    from robot_rl.console.hosting import PORT

    parser = argparse.ArgumentParser(
        "robot-rl session", allow_abbrev=False,
        description="Guide a session on the operator's page: pre-flight checks, baseline, training, a blind comparison of the old and the "
        "new policy, a report. Arguments are those of `robot-rl up session` (or sim_session with --graph sim_session); with --sim RUN a "
        "finished run is compared with its own base in a simulation in this process, without ROS.",
    )  # fmt: skip
    parser.add_argument("arguments", nargs="*", metavar="name:=value", help="arguments of the graph")
    parser.add_argument("--graph", default="session", choices=("session", "sim_session"))
    parser.add_argument("--sim", default="", metavar="RUN", help="folder of a run: simulate its task in this process")
    parser.add_argument("--seed", type=int, default=0, help="of the first simulated start")
    parser.add_argument("--baseline", type=int, default=20, help="episodes of the old policy before training; 0: none")
    parser.add_argument("--training", type=int, default=0, help="episodes of training; 0: when the operator ends it")
    parser.add_argument(
        "--until-driven", type=float, default=0.0, metavar="SHARE",
        help="end training once a person drove less than this share of the last --driven-steps; 0: that does not end it",
    )  # fmt: skip
    parser.add_argument("--driven-steps", type=int, default=1000, help="training steps that this share is taken over")
    parser.add_argument("--comparison", type=int, default=20, help="episodes of each policy in the blind comparison; 0: none")
    parser.add_argument("--reset-s", type=float, default=5.0, help="countdown between ready and the start of an episode")
    parser.add_argument("--hands-off", action="store_true", help="nobody resets or starts anything (simulation)")
    parser.add_argument("--print", action="store_true", dest="show", help="print the processes as JSON and end")
    _options(parser, PORT)
    given = parser.parse_args(argv)
    from robot_rl.console.flow import FlowConfig

    try:
        flow = FlowConfig(
            given.baseline, given.training, given.comparison, given.reset_s, given.hands_off,
            intervention_rate=given.until_driven, intervention_steps=given.driven_steps,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None
    if given.sim:
        if given.arguments:
            raise UsageError(f"{given.arguments[0]!r}: with --sim there is no graph to give arguments to")
        return _simulate(given, flow)
    from robot_rl.cli.graph import up

    words = [
        f"baseline_episodes:={given.baseline}", f"training_episodes:={given.training}",
        f"intervention_rate:={given.until_driven}", f"intervention_steps:={given.driven_steps}",
        f"comparison_episodes:={given.comparison}", f"reset_s:={given.reset_s}", f"hands_off:={str(given.hands_off).lower()}",
        f"console_bind:={given.host}", f"console_port:={given.port}",
        *([f"console_token_file:={given.token_file}"] if given.token_file else []),
    ]  # fmt: skip
    flags = [f for f, on in (("--print", given.show), ("--json", given.json)) if on]
    return up([given.graph, *given.arguments, "guide:=true", *words, *flags])


def _join(given: argparse.Namespace) -> int:
    if importlib.util.find_spec("rclpy") is None:
        raise UsageError(
            "rclpy is not installed: pip install 'robot_rl[ros]' (Linux x86-64), or source a ROS 2 Jazzy installation"
        )
    from robot_rl.ros.graph import NodeSpec
    from robot_rl.ros.starting import up

    params: dict[str, Any] = {
        "robot": given.robot, "run_dir": given.run_dir, "http_bind": given.host, "http_port": given.port,
        "token_file": given.token_file,
    }  # fmt: skip
    params = {k: v for k, v in params.items() if v != ""}
    return up([NodeSpec("console_node", "console_node", given.namespace.strip("/"), params, respawn=True)])


def _simulate(given: argparse.Namespace, flow: Any) -> int:
    """A run's task, base policy and newest head in this process."""
    from robot_rl.console.hosting import ConsoleServer, HostConfig
    from robot_rl.doctor import choose_gl

    choose_gl()
    if not 0 <= given.port < 65536:
        raise UsageError(f"--port={given.port}: accepted are 0 to 65535")
    run = Path(given.sim)
    if not (run / "config.yaml").is_file():
        raise UsageError(f"--sim={given.sim!r}: accepted is the folder of a run (config.yaml)")
    from robot_rl.console.flow import SessionFlow
    from robot_rl.console.office import Office

    folder = run / "sessions" / "simulated"
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    before = {n: signal.signal(n, lambda *_: stop.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    guided = None if flow is None else SessionFlow(flow, folder)
    simulated, versions = _simulated(run, folder, given.seed, auto=getattr(given, "auto", False))
    try:
        with simulated:
            office = Office(simulated, folder, folder / "store", flow=guided)
            with ConsoleServer(office, HostConfig(given.host, given.port, given.token_file)) as server:
                emit({"page": server.url, "run": str(run), "versions": versions}, given.json)
                while not stop.wait(0.5) and simulated.error is None and server.error is None:
                    pass
                failed = simulated.error or server.error
                if failed is not None:
                    raise RuntimeError(f"the session stopped: {failed!r}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if guided is not None:
        emit({"phase": guided.kept.phase, **guided.result()}, given.json)
        return OK if guided.done else FAILED
    return OK


def _simulated(run: Path, folder: Path, seed: int, *, auto: bool) -> tuple[Any, list[int]]:
    from robot_rl.config import load
    from robot_rl.console.simulated import SimulatedSession
    from robot_rl.ros.hosting import HostConfig, PolicyHost  # what a robot runs; it needs no ROS
    from robot_rl.runtime.weights import WeightChannel
    from robot_rl.training.config import PostTrainConfig

    config = load(PostTrainConfig, run / "config.yaml")
    host = PolicyHost(HostConfig(str(run), str(run), str(run), "cpu", explore=False, warmup_forwards=1), print)
    host.load()
    newest = WeightChannel(run / "weights").latest() or 0
    versions = [0, *([newest] if newest and host.fetch(newest) else [])]
    policies: Mapping[int, Any] = {v: host.policy(v) for v in versions}
    cameras = ("front", "wrist") if config.env.id.startswith("tabletop/") else ()
    made = SimulatedSession(
        lambda: _environment(config), policies, folder / "store", cameras=cameras, seed=seed, auto=auto,
        n_obs_steps=host.spec.n_obs_steps, n_action_steps=host.spec.n_action_steps,
        noise_shape=host.spec.noise_shape, chunk_horizon=host.spec.horizon,
    )  # fmt: skip
    return made, versions


def _environment(config: Any) -> Any:
    from robot_rl.sim.env import make_env

    return make_env(config.env.id, **config.env.options)
