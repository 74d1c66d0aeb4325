"""Verbs that take a configuration: ``train``, ``bc``, ``collect``, ``eval``; and ``report``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robot_rl import config as configuration
from robot_rl.cli.output import OK, UsageError, emit
from robot_rl.cli.progress import Mode, ProgressDisplay


@dataclass(frozen=True)
class Flags:
    """The few flags that are not configuration keys. ``rest`` holds the overrides."""

    config: str | None
    json: bool
    quiet: bool
    help: bool
    print_config: bool
    values: dict[str, str]
    rest: list[str]

    @property
    def mode(self) -> Mode:
        return "json" if self.json else "silent" if self.quiet else "auto"


def parse(arguments: Sequence[str], valued: Sequence[str] = ()) -> Flags:
    """Take the flags out; what is left is ``--key.path=value`` overrides.

    Raises:
        UsageError: a flag without its value, or given twice.
    """
    switches = dict.fromkeys(("--json", "--quiet", "--help", "-h", "--print-config"), False)
    values: dict[str, str] = {}
    rest: list[str] = []
    tokens = list(arguments)
    while tokens:
        token = tokens.pop(0)
        name, equals, text = token.partition("=")
        if token in switches:
            switches[token] = True
        elif name in ("--config", *valued):
            if not equals:
                if not tokens or tokens[0].startswith("--"):
                    raise UsageError(f"{name} needs a value: {name}=<path>")
                text = tokens.pop(0)
            if name in values:
                raise UsageError(f"{name} is given twice: {values[name]!r} and {text!r}")
            values[name] = text
        else:
            rest.append(token)
    return Flags(
        config=values.pop("--config", None),
        json=switches["--json"],
        quiet=switches["--quiet"],
        help=switches["--help"] or switches["-h"],
        print_config=switches["--print-config"],
        values=values,
        rest=rest,
    )


def look_up(target: str) -> Any:
    """``module:name``, imported now rather than when the command starts."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def configured(verb: str, cls: Any, flags: Flags, extra: str = "") -> Any:
    """The configuration of a verb, or None when only help or the resolved configuration was asked for."""
    if flags.help:
        print(f"usage: robot-rl {verb} [--config FILE] {extra}[--key.path=value ...] [--json] [--quiet] [--print-config]")
        print(f"\nKeys, what each accepts, and its default:\n{configuration.help_text(cls)}")
        return None
    loaded = configuration.load(cls, flags.config, flags.rest)
    if flags.print_config:
        print(configuration.to_yaml(loaded), end="")
        return None
    return loaded


def train(arguments: Sequence[str]) -> int:
    return _run("train", "robot_rl.training.config:PostTrainConfig", "robot_rl.training.posttrain:run", arguments)


def practice(arguments: Sequence[str]) -> int:
    return _run("practice", "robot_rl.training.practice:PracticeRunConfig", "robot_rl.training.practice:run", arguments)


def bc(arguments: Sequence[str]) -> int:
    return _run("bc", "robot_rl.training.config:BCRunConfig", "robot_rl.training.bc:run", arguments)


def evaluate(arguments: Sequence[str]) -> int:
    return _run("eval", "robot_rl.training.config:EvalConfig", "robot_rl.training.evaluate:run", arguments)


def _run(verb: str, config: str, function: str, arguments: Sequence[str]) -> int:
    flags = parse(arguments)
    loaded = configured(verb, look_up(config), flags)
    if loaded is None:
        return OK
    _choose_gl()
    with ProgressDisplay(flags.mode) as progress:
        result = look_up(function)(loaded, progress=progress)
    emit(result, flags.json)
    return OK


def collect(arguments: Sequence[str]) -> int:
    from robot_rl.sim.collect import CollectConfig
    from robot_rl.sim.collect import collect as demonstrate

    flags = parse(arguments, valued=("--store",))
    config = configured("collect", CollectConfig, flags, "--store FOLDER ")
    if config is None:
        return OK
    if "--store" not in flags.values:
        raise UsageError("--store is missing: the folder of the episode store to write to")
    _choose_gl()
    from robot_rl.sim.env import make_env

    env = make_env(config.env_id, **config.env_options)
    spec = env.spec
    env.close()
    opened = open_or_create(flags.values["--store"], spec.observation_features, spec.action)
    with opened as store, ProgressDisplay(flags.mode) as progress:
        progress.start("collect", config.episodes)

        def report_attempt(written: int, attempts: int, successes: int) -> None:
            progress.advance(written - progress.done)
            progress.status(success=successes / max(attempts, 1), attempts=attempts)

        result = demonstrate(config, store, report_attempt)
    emit(result, flags.json)
    return OK


def report(arguments: Sequence[str]) -> int:
    flags = parse(arguments)
    if flags.help or len(flags.rest) != 1:
        print("usage: robot-rl report RUN [--json]\n\nWrites RUN/report.html, one self-contained page.")
        return OK if flags.help else 2
    run = Path(flags.rest[0])
    if not run.is_dir():
        raise UsageError(f"run {str(run)!r} is not a folder")
    written = look_up("robot_rl.evaluation.report:write_report")(run)
    emit({"report": str(written)}, flags.json)
    return OK


def open_or_create(path: str | Path, observation_features: Any, action: Any) -> Any:
    """The store at ``path`` for appending; made with these features where there is none."""
    from robot_rl.replay import EpisodeStore

    if (Path(path) / "store.json").exists():
        return EpisodeStore.open(path, mode="a")
    return EpisodeStore.create(path, observation_features=observation_features, action=action)


def _choose_gl() -> None:
    from robot_rl.doctor import choose_gl

    choose_gl()
