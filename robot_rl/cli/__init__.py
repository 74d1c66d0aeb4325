"""``robot-rl <verb>``: every verb is a thin function over a room that can be called from Python just as well."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

VERBS = {
    "train": ("robot_rl.cli.runs:train", "post-train a policy: demonstrations, base policy, RL head, evaluation, report"),
    "practice": ("robot_rl.cli.runs:practice", "two policies that undo each other practise by themselves, without resets"),
    "bc": ("robot_rl.cli.runs:bc", "train a base policy by behaviour cloning from an episode store"),
    "collect": ("robot_rl.cli.runs:collect", "collect scripted demonstrations of chosen skill into an episode store"),
    "eval": ("robot_rl.cli.runs:evaluate", "evaluate a policy on held-out starts, with intervals"),
    "report": ("robot_rl.cli.runs:report", "write the one-page HTML report of a run"),
    "import": ("robot_rl.cli.data:import_", "LeRobot, robomimic, diffusion_policy and other recordings into an episode store"),
    "export": ("robot_rl.cli.data:export", "episodes to a LeRobot dataset and others; a finished run to a policy or ONNX"),
    "store": ("robot_rl.cli.data:store", "list, show, verify, recover and clean an episode store"),
    "serve": ("robot_rl.cli.serve:serve", "serve a policy to robots: batched, with noise and a token"),
    "reward": ("robot_rl.cli.rewards:reward", "label a store's episodes with a reward source, report on one, train one"),
    "up": ("robot_rl.cli.graph:up", "start a ROS graph: session, sim_session, teleop_session, fleet"),
    "session": ("robot_rl.cli.console:session", 'guide a person from "robot on" to "policy better", with a blind comparison'),
    "console": ("robot_rl.cli.console:console", "serve the operator's page: cameras, take-over, labels, weights"),
    "doctor": ("robot_rl.cli.data:doctor", "check this machine, or say which heads a policy supports"),
}


def usage() -> str:
    lines = ["usage: robot-rl <verb> [arguments]   (robot-rl <verb> --help lists everything a verb takes)", ""]
    lines += [f"  {name:8} {summary}" for name, (_, summary) in VERBS.items()]
    lines += ["", "Every verb takes --json for machines. Exit codes: 0 done, 1 failed, 2 refused, 130 interrupted."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. No traceback unless ``ROBOT_RL_TRACEBACK=1``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # robot-rl store ls | head: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from robot_rl import __version__

        print(f"robot_rl {__version__}")
        return 0
    from robot_rl.cli.output import UsageError, report_error

    verb, *rest = arguments
    try:
        if verb not in VERBS:
            import difflib

            near = difflib.get_close_matches(verb, VERBS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"unknown verb {verb!r}: accepted are {', '.join(VERBS)}{hint}")
        module, function = VERBS[verb][0].split(":")
        return getattr(importlib.import_module(module), function)(rest)
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, "--json" in rest)
