"""``robot-rl up``: the ROS graph without the ``launch`` packages."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from robot_rl.cli.output import OK, UsageError, emit


def up(argv: Sequence[str]) -> int:
    from robot_rl.ros.graph import GRAPHS, GraphError, graph

    parser = argparse.ArgumentParser(
        "robot-rl up", description="Start a ROS graph: " + "; ".join(f"{g.name}: {g.summary}" for g in GRAPHS.values()),
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("graph", help=", ".join(GRAPHS))
    parser.add_argument("arguments", nargs="*", metavar="name:=value", help="arguments of the graph")
    parser.add_argument("--show-args", action="store_true", help="list the arguments and end")
    parser.add_argument("--print", action="store_true", dest="show", help="print the processes as JSON and end")
    parser.add_argument("--for", type=float, default=0.0, dest="seconds", metavar="SECONDS", help="stop after so long")
    parser.add_argument("--json", action="store_true", help="JSON lines on standard output")
    given = parser.parse_args(argv)
    try:
        spec = graph(given.graph)
        if given.show_args:
            rows = [
                {"argument": a.name, "default": a.default, "accepted": a.accepted, "description": a.description}
                for a in spec.args
            ]
            emit(rows, given.json)
            return OK
        words = {}
        for word in given.arguments:
            name, assigned, value = word.partition(":=")
            if not assigned:
                raise UsageError(f"{word!r}: accepted is name:=value")
            words[name] = value
        nodes = spec.build(words)
    except GraphError as error:
        raise UsageError(str(error)) from None
    from robot_rl.ros.starting import describe

    if given.show:
        emit(describe(nodes), True)
        return OK
    import importlib.util

    if importlib.util.find_spec("rclpy") is None:
        raise UsageError(
            "rclpy is not installed: pip install 'robot_rl[ros]' (Linux x86-64), or source a ROS 2 Jazzy installation"
        )
    from robot_rl.ros.starting import up as run

    return run(nodes, seconds=given.seconds)
