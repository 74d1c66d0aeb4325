"""Verbs over episode stores and this machine: ``import``, ``export``, ``store``, ``doctor``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from robot_rl.cli.output import FAILED, OK, UsageError, emit
from robot_rl.cli.progress import ProgressDisplay


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"robot-rl {verb}", description=description, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="JSON lines on standard output")
    return parser


def _display(arguments: argparse.Namespace) -> ProgressDisplay:
    return ProgressDisplay("json" if arguments.json else "auto")


def _counter(progress: ProgressDisplay, stage: str) -> Any:
    def count(done: int, total: int) -> None:
        if progress.stage != stage:
            progress.start(stage, total)
        progress.advance(done - progress.done)

    return count


def json_option(flag: str, text: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f"{flag}={text!r}: accepted is a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{flag}={text!r}: accepted is a JSON object")
    return value


def _listing(formats: dict[str, str]) -> str:
    return "; ".join(f"{name}: {summary}" for name, summary in formats.items())


def import_(argv: Sequence[str]) -> int:
    from robot_rl.cli.runs import open_or_create
    from robot_rl.replay import importers

    parser = _parser("import", "Read a recording into an episode store (made when it is not there).")
    parser.add_argument("path", help="file or folder of the recording")
    parser.add_argument("store", help="folder of the episode store")
    parser.add_argument("--format", default="auto", help=f"auto, or one of: {_listing(importers.formats())}".replace("%", "%%"))
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the format")
    arguments = parser.parse_args(argv)
    options = importers.parse_option_strings(arguments.option)
    source = importers.open_dataset(arguments.path, arguments.format, **options).describe()
    opened = open_or_create(arguments.store, source.observation_features, source.action)
    with opened as store, _display(arguments) as progress:
        count = _counter(progress, "import")
        result = importers.import_into(store, arguments.path, arguments.format, progress=count, **options)
    emit(result, arguments.json)
    return OK


def export(argv: Sequence[str]) -> int:
    from pathlib import Path

    from robot_rl.replay import EpisodeStore, exporters
    from robot_rl.replay.exporters.selection import Condition, select
    from robot_rl.replay.importers import parse_option_strings

    parser = _parser("export", "Write episodes of a store in another format, or what a finished run has made as a policy.")
    parser.add_argument("store", help="folder of the episode store, or of a finished run")
    parser.add_argument("path", help="file or folder to write")
    episodes, policies = _listing(exporters.formats()), "policy, lerobot, openvla, onnx"
    parser.add_argument(
        "--format",
        default="",
        help=f"of episodes (lerobot_v3 by default): {episodes}. Of a run (policy by default): {policies}".replace("%", "%%"),
    )
    parser.add_argument("--episodes", default="", metavar="ID,ID", help="only these episodes")
    parser.add_argument(
        "--where",
        default="",
        metavar="CONDITIONS",
        help="only episodes like these, e.g. success=true,stratum=online,length>=20",
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the format")
    parser.add_argument(
        "--distil", type=int, default=0, metavar="STEPS",
        help="of a run as lerobot: train the LeRobot policy's own network so long to do what a head in front of it does (e.g. 3000)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if (Path(arguments.store) / "config.yaml").exists():
        from robot_rl.training.artifact import export_run

        if arguments.episodes or arguments.option or arguments.where:
            raise UsageError(f"--episodes, --where, --option: {arguments.store} is a run; accepted is --format {policies}")
        manifest = export_run(Path(arguments.store), Path(arguments.path), arguments.format or "policy", arguments.distil)
        emit({"path": arguments.path, **{k: v for k, v in manifest.items() if k != "files"}}, arguments.json)
        return OK
    if arguments.distil:
        raise UsageError(f"--distil={arguments.distil}: {arguments.store} is no run; accepted is 0")
    wanted = [e for e in arguments.episodes.split(",") if e] or None
    options = parse_option_strings(arguments.option)
    conditions = [Condition.parse(c) for c in arguments.where.split(",") if c.strip()]
    if wanted and conditions:
        raise UsageError("--episodes with --where: accepted is one of them")
    with EpisodeStore.open(arguments.store) as store, _display(arguments) as progress:
        count = _counter(progress, "export")
        if conditions:
            wanted = select(store, conditions)
            if not wanted:
                raise UsageError(f"--where={arguments.where!r}: none of the {len(store)} episodes is like that")
        result = exporters.export_from(
            store, arguments.path, arguments.format or "lerobot_v3", episode_ids=wanted, progress=count, **options
        )
    emit(result, arguments.json)
    return OK


def store(argv: Sequence[str]) -> int:
    from robot_rl.replay import maintenance

    parser = _parser("store", "Look after an episode store.")
    verbs = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("ls", "one line an episode"),
        ("show", "everything known about one episode"),
        ("verify", "read every episode and check it; exit code 1 when something is damaged"),
        ("recover", "commit what dead writers left behind, as truncated episodes"),
        ("people", "how much a person drove, took over and helped; demonstrations are left out"),
        ("gc", "remove leftovers that no episode and no running writer needs"),
    ):
        action = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.add_argument("store", help="folder of the episode store")
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="JSON on standard output")
        if name == "show":
            action.add_argument("episode", help="episode id")
        if name == "people":
            action.add_argument(
                "--window", type=int, default=1000, metavar="STEPS", help="that a point of the curve is taken over"
            )
        if name == "gc":
            action.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    arguments = parser.parse_args(argv)
    path = arguments.store
    result: Any
    if arguments.action == "show":
        result = maintenance.show(path, arguments.episode)
    elif arguments.action == "people":
        from robot_rl.intervention.metrics import of_store

        result = of_store(path, arguments.window)
    elif arguments.action == "gc":
        result = maintenance.collect_garbage(path, dry_run=arguments.dry_run)
    else:
        actions = {"ls": maintenance.list_episodes, "verify": maintenance.verify, "recover": maintenance.recover}
        result = actions[arguments.action](path)
    emit(result, arguments.json)
    return OK if getattr(result, "ok", True) else FAILED


def doctor(argv: Sequence[str]) -> int:
    from robot_rl import doctor as doctor_

    parser = _parser(
        "doctor", "Check this machine: Python, packages, CUDA, GL, ROS, disk. With POLICY: which heads it supports, and why."
    )
    parser.add_argument("policy", nargs="?", help="a policy: folder, run, LeRobot checkpoint, remote:HOST:PORT")
    parser.add_argument("--options", default="", metavar="JSON", help="base.options of that policy")
    parser.add_argument("--fix", action="store_true", help="carry out the fixes that need no rights (links for ros2 run)")
    parser.add_argument("--path", default=".", help="where runs will be written (disk checks)")
    arguments = parser.parse_args(argv)
    if arguments.policy is not None:
        from robot_rl.cli.policy_report import examine_policy, render_policy

        report = examine_policy(arguments.policy, json_option("--options", arguments.options))
        emit(report, True) if arguments.json else print(render_policy(report))
        return OK if report.ok else FAILED
    findings = doctor_.examine(arguments.path, fix=arguments.fix)
    if arguments.json:
        emit({"findings": findings, "ok": not any(f.level == "error" for f in findings)}, True)
    else:
        print(doctor_.render(findings))
    return FAILED if any(f.level == "error" for f in findings) else OK
