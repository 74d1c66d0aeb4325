"""``robot-rl serve``: a policy for robots whose own computer is too small for it."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from robot_rl.cli.data import json_option
from robot_rl.cli.output import OK, UsageError, emit
from robot_rl.runtime.priority import LATENCY, REMEDY, KeepAwake, set_fifo

PRIORITIES = ("normal", "rt")
FIFO = 20
"""Below the guard's (``rt_priority``), which shares a machine with a server only where there is one computer."""
SWITCH_S = 0.0005
"""After so long a thread asks for Python's lock: a question that arrives must not wait the usual 5 ms for the policy's thread."""


def serve(argv: Sequence[str]) -> int:
    from robot_rl.policies.remote.server import PORT

    parser = argparse.ArgumentParser(
        "robot-rl serve", allow_abbrev=False,
        description="Serve a policy to robots (policy: remote:HOST:PORT). Several robots are answered in batches.",
    )  # fmt: skip
    parser.add_argument("policy", help="a policy folder, a run (its base), or a LeRobot checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; beyond loopback a token is needed")
    parser.add_argument("--port", type=int, default=PORT, help=f"0 takes a free one (default {PORT})")
    parser.add_argument("--token-file", default="", help="file with the token (mode 600); else ROBOT_RL_POLICY_TOKEN")
    parser.add_argument("--device", default="auto", help="cpu, cuda, auto")
    parser.add_argument("--options", default="", metavar="JSON", help="base.options of the policy")
    parser.add_argument(
        "--max-rows", type=int, default=64, help="observations in one call; 1 answers each robot alone, to the last bit"
    )
    parser.add_argument("--cache-rows", type=int, default=1024, help="encoded observations that are kept")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own choice")
    parser.add_argument(
        "--priority", default="normal", choices=PRIORITIES,
        help="rt: SCHED_FIFO, and processors that do not sleep while it serves (needs the rights to it; costs power)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="JSON lines on standard output")
    given = parser.parse_args(argv)
    if not 0 <= given.port < 65536:
        raise UsageError(f"--port={given.port}: accepted are 0 to 65535")
    for name in ("max_rows", "cache_rows"):
        if getattr(given, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}={getattr(given, name)}: accepted are integers >= 1")
    return _serve(given)


def _serve(given: argparse.Namespace) -> int:
    import torch

    from robot_rl.policies.loading import load_policy
    from robot_rl.policies.remote.server import PolicyServer
    from robot_rl.policies.remote.words import read_token
    from robot_rl.training.build import pick_device

    if given.threads:
        torch.set_num_threads(given.threads)
    device, token = pick_device(given.device), read_token(given.token_file or None)
    path = Path(given.policy)
    source = path / "base" if (path / "config.yaml").exists() else path
    base = load_policy(source, device, json_option("--options", given.options))
    stop = threading.Event()
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()  # what was loaded stays: no collection has to look at it again
    granted, awake = _priority(given.priority)
    with PolicyServer(
        base, device=device, host=given.host, port=given.port, token=token, max_rows=given.max_rows, cache_rows=given.cache_rows
    ) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        host, port = server.address
        emit(
            {"serving": f"remote:{host}:{port}", "base": base.spec.base_hash, "device": device, "priority": granted}, given.json
        )
        while not stop.wait(0.5):
            pass
    awake.set(False)
    emit({"stopped": f"remote:{host}:{port}", **vars(server.batcher.counts)}, given.json)
    return OK


def _priority(wanted: str) -> tuple[str, KeepAwake]:
    """What was granted, in words, and what keeps processors awake. Asked for before the server starts its threads, which inherit it."""
    awake = KeepAwake()
    if wanted == "normal":
        return wanted, awake
    granted = f"SCHED_FIFO {FIFO}" if set_fifo(FIFO) else f"normal (SCHED_FIFO was refused: {REMEDY})"
    return granted + (", processors awake" if awake.set(True) else f", processors may sleep ({LATENCY} was refused)"), awake
