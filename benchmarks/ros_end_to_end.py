"""Success over time of a simulated session: the whole ROS graph as processes, from the base policy's success to 90 %.

``python benchmarks/ros_end_to_end.py RUN_DIR [--minutes 60] [--realtime-factor 1] [--recipe quickstart]``: RUN_DIR holds ``base/`` (a run
of ``robot-rl train`` has one). Prints one JSON object: success of every 50 episodes, versions that acted, restarts of processes.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path

from robot_rl.replay import EpisodeStore
from robot_rl.ros.graph import graph
from robot_rl.ros.starting import Supervisor

BLOCK = 50


def outcomes(store: Path) -> list[tuple[bool, int]]:
    """(success, version) of every episode with a verdict, in commit order."""
    if not (store / "store.json").exists():
        return []
    with EpisodeStore.open(store) as opened:
        metas = [opened.meta(i) for i in opened.episode_ids()]
    return [(bool(m.success), m.weights_version) for m in metas if m.success is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--policy", default="", help="base policy; default: base in run_dir")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--realtime-factor", default="1.0")
    parser.add_argument("--episode-s", type=float, default=5.0, help="an episode fails after so long; the task's own limit")
    parser.add_argument("--goal", type=float, default=0.9)
    given = parser.parse_args()
    run = given.run_dir.resolve()
    arguments = {
        "policy": given.policy or str(run / "base"), "run_dir": str(run), "recipe": given.recipe, "operator": "joy",
        "gate": "false", "http_port": "0", "realtime_factor": given.realtime_factor, "max_episode_s": f"{given.episode_s:g}",
    }  # fmt: skip
    began, reached = time.monotonic(), None
    with Supervisor(
        graph("sim_session").build(arguments), say=lambda line: print(line, file=sys.stderr, flush=True)
    ) as supervisor:
        stop = threading.Event()
        while time.monotonic() - began < 60.0 * given.minutes:
            supervisor.run(stop, seconds=5.0)
            found = outcomes(run / "store")
            last = [s for s, _ in found[-BLOCK:]]
            if len(last) == BLOCK and sum(last) >= given.goal * BLOCK and found[-1][1] > 0:
                reached = time.monotonic() - began
                break
        restarts = {name: p.restarts for name, p in supervisor.processes.items()}
    found = outcomes(run / "store")
    blocks = [sum(s for s, _ in found[i : i + BLOCK]) / BLOCK for i in range(0, len(found) - BLOCK + 1, BLOCK)]
    base = [s for s, v in found if v == 0]
    print(json.dumps({
        "episodes": len(found), "success_by_50": blocks, "base_success": sum(base) / len(base) if base else None,
        "base_episodes": len(base), "last_version": found[-1][1] if found else 0, "goal": given.goal, "reached_after_s": reached,
        "restarts": restarts,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
