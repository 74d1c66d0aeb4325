"""``robot-rl serve``: a policy for robots whose own computer is too small for it."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from robot_rl.cli.data import json_option
from robot_rl.cli.output import OK, UsageError, emit


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
    with PolicyServer(
        base, device=device, host=given.host, port=given.port, token=token, max_rows=given.max_rows, cache_rows=given.cache_rows
    ) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        host, port = server.address
        emit({"serving": f"remote:{host}:{port}", "base": base.spec.base_hash, "device": device}, given.json)
        while not stop.wait(0.5):
            pass
    emit({"stopped": f"remote:{host}:{port}", **vars(server.batcher.counts)}, given.json)
    return OK
