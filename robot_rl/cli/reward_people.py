"""``robot-rl reward record`` and ``calibrate-delay``: what people see on a page, and what comes of it."""

from __future__ import annotations

import argparse
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.cli.output import FAILED, OK, UsageError, emit

PORT = 8781


def add_people(record: argparse.ArgumentParser, delay: argparse.ArgumentParser) -> None:
    """Their flags."""
    record.add_argument("--out", required=True, help="file of the marks; an existing one is added to")
    record.add_argument("--positives", type=int, default=200, help="frames of success that are enough")
    record.add_argument("--failures", default="", metavar="NAME,NAME", help="ways of failing that must each be covered")
    record.add_argument("--operator", default="operator", help="who marks")
    record.add_argument("--count", action="store_true", help="only say what was marked, and what is missing")
    delay.add_argument(
        "--signal",
        required=True,
        metavar="NAME",
        help="what is known: observation.state[8], action[4], or a source of the reward log",
    )
    delay.add_argument("--seconds", type=float, default=60.0, help="how long to watch")
    delay.add_argument(
        "--recorded", default="", metavar="SOURCE", help="feedback recorded earlier instead of a page, such as human"
    )
    delay.add_argument("--moved", type=int, default=0, help="delay_steps with which it was recorded")
    delay.add_argument("--most", type=int, default=12, help="steps of delay to look among")
    for parser in (record, delay):
        parser.add_argument("--camera", default="", help="image feature to show")
        parser.add_argument("--port", type=int, default=PORT, help="of the page on this machine; 0 takes a free one")


def episodes_of(arguments: argparse.Namespace) -> list[str] | None:
    """The episodes that ``--episodes`` names; None for all."""
    return [e for e in arguments.episodes.split(",") if e] or None


def record(arguments: argparse.Namespace) -> int:
    from robot_rl.replay import EpisodeStore
    from robot_rl.rewards.marks import read_looks, tally

    modes = [m for m in arguments.failures.split(",") if m]
    if arguments.positives < 1:
        raise UsageError(f"--positives={arguments.positives}: accepted are integers >= 1")
    path = Path(arguments.out)
    if arguments.count:
        found = tally(read_looks(path), arguments.positives, modes)
    else:
        marking = _marking()
        marks = marking.Marks(path, arguments.operator, arguments.positives, modes)
        with EpisodeStore.open(arguments.store) as store:
            reel = marking.Reel(
                store, _camera(arguments, store), "mark", marks.heard, lambda: not marks.tally().missing,
                episodes=episodes_of(arguments), skip=[look.episode for look in marks.looks], modes=modes, said=marks.told(),
            )  # fmt: skip
            _serve(reel, arguments, {"out": str(path), **marks.tally().to_json()})
        found = marks.tally()
    emit({"out": str(path), **found.to_json()}, arguments.json)
    return FAILED if found.missing else OK


def calibrate_delay(arguments: argparse.Namespace) -> int:
    from robot_rl.replay import EpisodeStore
    from robot_rl.rewards.delay import estimate_delay, read_signal, recorded_readings

    if not 0 <= arguments.most <= 100:
        raise UsageError(f"--most={arguments.most}: accepted are 0 to 100")
    with EpisodeStore.open(arguments.store) as store:
        chosen = episodes_of(arguments)
        names = store.episode_ids() if chosen is None else chosen
        if not names:
            raise UsageError(f"{arguments.store}: the store has no episodes to watch")
        hz = store.meta(names[0]).control_hz or 10.0
        wanted = [arguments.signal.partition("[")[0]] if arguments.signal.startswith("observation.") else []
        if arguments.recorded:
            said = {e.source for n in names for e in store.rewards(n)}
            if arguments.recorded not in said:
                raise UsageError(
                    f"--recorded={arguments.recorded!r}: accepted are {', '.join(sorted(said)) or 'none: nothing is recorded'}"
                )
            heard = {}
            for name in names:
                if any(e.source == arguments.recorded and e.valid for e in store.rewards(name)):
                    heard[name] = recorded_readings(store, store.read(name, wanted), arguments.recorded, arguments.moved)
        else:
            marking = _marking()
            read_signal(
                store, store.read(names[0], wanted), arguments.signal
            )  # refused before anybody has watched for a minute
            readings = marking.Readings(lambda e: store.meta(e).control_hz or 10.0, arguments.seconds)
            reel = marking.Reel(store, _camera(arguments, store), "feedback", readings.heard, readings.done, episodes=chosen)
            _serve(reel, arguments, {"seconds": arguments.seconds})
            heard = readings.episodes
        if not heard:
            raise UsageError("nobody said anything: there is no feedback to measure")
        signals = [read_signal(store, store.read(name, wanted), arguments.signal) for name in heard]
        found = estimate_delay(signals, [np.asarray(h) for h in heard.values()], hz, arguments.most)
    emit({"delay_steps": found.steps, **found.to_json(), "episodes": len(heard)}, arguments.json)
    return OK


def _camera(arguments: argparse.Namespace, store: Any) -> str:
    from robot_rl.types import OBSERVATION_IMAGES

    cameras = sorted(k for k in store.observation_features if k.startswith(OBSERVATION_IMAGES))
    if arguments.camera and arguments.camera not in cameras:
        raise UsageError(f"--camera={arguments.camera!r}: the store has {', '.join(cameras) or 'no cameras'}")
    if not arguments.camera and len(cameras) != 1:
        raise UsageError(f"--camera is needed: the store has {', '.join(cameras) or 'no cameras'}")
    return arguments.camera or cameras[0]


def _marking() -> Any:
    from robot_rl.console.hosting import INSTALL

    try:
        from robot_rl.console import marking
    except ImportError as error:
        raise ImportError(INSTALL, name=error.name) from error
    return marking


def _serve(reel: Any, arguments: argparse.Namespace, told: dict[str, Any]) -> None:
    """The page on this machine, until enough was said or somebody interrupts."""
    from robot_rl.console.hosting import HostConfig, PageServer

    if not 0 <= arguments.port < 65536:
        raise UsageError(f"--port={arguments.port}: accepted are 0 to 65535")
    stop = threading.Event()
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, lambda *_: stop.set()))
        server = stack.enter_context(
            PageServer(lambda access: _marking().make_app(reel, access), HostConfig(port=arguments.port))
        )
        emit({"page": server.url, **told}, arguments.json)
        while not (stop.wait(0.2) or reel.finished.is_set()):
            if server.error is not None:
                raise RuntimeError(f"the page's server stopped: {server.error}")
        if reel.finished.is_set():
            stop.wait(1.0)  # the page learns that it is done
