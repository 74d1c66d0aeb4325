"""Success of a finished policy on the robot's side: an exported run in the whole ROS graph as processes, without a learner.

``python benchmarks/ros_policy.py EXPORT --out FOLDER [--episodes 20] [--cameras front=32x32]``: EXPORT is what ``robot-rl export RUN EXPORT``
wrote. It is copied to FOLDER, which also gets the recorded episodes; a second call goes on counting there. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from pathlib import Path

from robot_rl.evaluation.statistics import wilson
from robot_rl.replay import EpisodeStore
from robot_rl.ros.graph import graph
from robot_rl.ros.starting import Supervisor
from robot_rl.training.artifact import verify_artifact


def outcomes(store: Path) -> list[tuple[bool, int]]:
    """(success, version of the head) of every episode with a verdict."""
    if not (store / "store.json").exists():
        return []
    with EpisodeStore.open(store, mode="r") as opened:
        metas = [opened.meta(i) for i in opened.episode_ids()]
    return [(bool(m.success), m.weights_version) for m in metas if m.success is not None]


def robot(folder: Path, cameras: list[str]) -> str:
    """The simulated arm, with cameras whose pictures are shrunk to what the policy reads."""
    if not cameras:
        return "sim_arm"
    lines = ["extends: robots/sim_arm.yaml", "name: sim_arm_small_cameras", "observations:"]
    for camera in cameras:
        name, _, size = camera.partition("=")
        height, width = (int(n) for n in size.split("x"))
        finer = max(
            1, 480 // height
        )  # of the same shape: another one would show more to the sides, squeezed into the policy's picture
        lines += [
            f"  observation.images.{name}:",
            f"    {{topic: {name}/image_raw, type: sensor_msgs/msg/Image, size: [{finer * height}, {finer * width}],",
            f"     resize: [{height}, {width}],",
            f"     camera_info: {name}/camera_info, hz: 30, max_age_s: 0.5}}",
        ]
    lines.append("sync: {anchor: state, tolerance_s: 0.0167, state: newest, frozen_check: false}")
    file = folder / "robot.yaml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cameras", nargs="*", default=[], help="what the policy sees, e.g. front=32x32")
    parser.add_argument("--env", default="tabletop/Lift")
    parser.add_argument("--task", default="", help="instruction")
    parser.add_argument("--realtime-factor", default="1.0")
    parser.add_argument("--episode-s", type=float, default=5.0, help="an episode fails after so long; the task's own limit")
    given = parser.parse_args()
    if wrong := verify_artifact(given.export):
        raise SystemExit(f"{given.export}: {wrong} are not what was exported")
    run = given.out.resolve()
    if not run.exists():
        shutil.copytree(given.export, run)
    parameters = run / "parameters.yaml"
    parameters.write_text("/**/policy_node:\n  ros__parameters:\n    explore: false\n", encoding="utf-8")
    arguments = {
        "policy": str(run), "head": str(run), "run_dir": str(run), "robot": robot(run, given.cameras), "env": given.env,
        "operator": "none", "rewards": "environment", "images": "raw" if given.cameras else "off", "task": given.task,
        "realtime_factor": given.realtime_factor, "max_episode_s": f"{given.episode_s:g}", "params_file": str(parameters),
    }  # fmt: skip
    began = time.monotonic()
    with Supervisor(
        graph("sim_session").build(arguments), say=lambda line: print(line, file=sys.stderr, flush=True)
    ) as supervisor:
        while time.monotonic() - began < 60.0 * given.minutes and len(outcomes(run / "store")) < given.episodes:
            supervisor.run(threading.Event(), seconds=3.0)
        restarts = {name: p.restarts for name, p in supervisor.processes.items() if p.restarts}
    found = outcomes(run / "store")
    successes = sum(s for s, _ in found)
    interval = wilson(successes, len(found)) if found else None
    print(json.dumps({
        "episodes": len(found), "successes": successes, "interval": [interval.low, interval.high] if interval else None,
        "versions": sorted({v for _, v in found}), "restarts": restarts, "seconds": round(time.monotonic() - began, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
