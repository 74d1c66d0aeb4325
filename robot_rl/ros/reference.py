"""``docs/ros.md``, written from the tables the nodes declare from: ``python -m robot_rl.ros.reference > docs/ros.md``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable

from robot_rl import wire
from robot_rl.ros.graph import GRAPHS
from robot_rl.ros.graph_names import ALL_NODES
from robot_rl.ros.names import NodeTable
from robot_rl.ros.parameters import WHEN, Parameter

INTRODUCTION = """# ROS 2

<!-- Generated: python -m robot_rl.ros.reference > docs/ros.md -->

The same control loop, store and learner as in a headless run, as nodes of a ROS 2 Jazzy graph. Only standard messages, only
relative names, lifecycle nodes where something is configured, plain nodes where something must never wait for a transition.

None of this is a safety-rated function: the hardware e-stop, the robot's own reflexes and the cell's safeguards stay in force.

## Starting

| where | how |
| --- | --- |
| a robot with ROS from apt or RoboStack | `ros2 launch robot_rl session.launch.py robot:=ur policy:=base run_dir:=runs/today recipe:=quickstart` |
| anywhere, also without the `launch` packages | `robot-rl up session robot:=ur policy:=base run_dir:=runs/today recipe:=quickstart` |
| without a robot | `robot-rl up sim_session policy:=runs/quickstart run_dir:=runs/sim recipe:=quickstart` |
| one node | `ros2 run robot_rl policy_node`, or `python -m robot_rl.ros.policy_node --ros-args -p robot:=ur ...` |

Both ways start the same processes from one description (`robot_rl/ros/graph.py`); `--show-args` lists the arguments,
`robot-rl up <graph> ... --print` the processes. `pip install 'robot_rl[ros]'` brings ROS as wheels on x86-64; never mix them with a
sourced `/opt/ros`.

`monitor_node` brings lifecycle nodes up in order and again after a crash, at most `max_restarts` times a minute; with
`autostart:=false` every step is yours (`ros2 lifecycle set`). A node that somebody deactivates by hand stays inactive until somebody
activates it or calls `monitor_node/bringup`. No transition of any node arms the guard:
`ros2 service call /guard_node/arm std_srvs/srv/SetBool "{data: true}"`. In simulation `rearm:=auto` does it.

## Two machines

A robot without a folder in common with its learner gets `learner_url:=http://learner:8765`. It then ships committed episodes and
reward events to the learner (a process of its own, at low priority) and fetches weights from it; nothing of that size travels on DDS.
An episode counts as delivered when the learner has said that it is durable there. Whatever breaks in between costs time and nothing
else: uploads and downloads resume where they were cut, in either direction, and the robot goes on. Unacknowledged episodes are never
deleted. At the learner: `http_bind:=0.0.0.0 token_file:=token`, and the same token file (mode 0600) at the robot; beyond loopback the
endpoint refuses to start without one. It does not encrypt: use a tunnel or a reverse proxy where the network is not trusted.

| request | meaning |
| --- | --- |
| `GET /v1/weights`, `GET /v1/weights/<version>/<file>` with `Range` | versions; manifest and weights, resumable |
| `GET /v1/inbox` | which inbox this is |
| `HEAD /v1/episodes/<robot>/<id>` | 200 committed, 206 begun (`Upload-Offset`), 404 |
| `PATCH /v1/episodes/<robot>/<id>` with `Upload-Offset`, `X-Sha256` | append at most 4 MiB; 409 tells the offset |
| `POST /v1/episodes/<robot>/<id>/commit` | verify, unpack, sync, rename: 201; again: 200; another episode: 409, kept aside |
| `POST /v1/rewards/<robot>/<source>` | numbered JSON lines; answers the highest contiguous number |

## A person

`operator:=joy` (or spacemouse, leader, keyboard, console, replay; several with commas). A device drives only while it is fresh: input
older than 0.10 s (0.15 s below 30 Hz) is no input, the robot holds, and the policy does not go on by itself. Set a gamepad's
autorepeat to 50 Hz: `joy_node --ros-args -p autorepeat_rate:=50.0`. Absolute devices take over only within `align_max_gap` of the
robot. After a release the running chunk is dropped and control blends back to a fresh one over `handback_blend_s`. Every step of the
episode says who was in control: `policy`, `human`, `latched`, `blend`, `hold`, `safety`.

## Slow policies

The next chunk is asked for while rows of the present one still run, early enough for 95 % of the decisions so far, and its rows belong to
the control steps after the observation it was computed from: what comes late loses the rows whose step has passed. `blend` says how it goes
on from the rows that ran meanwhile. `rtc` (real-time chunking, Black et al. 2025): these rows are told to the sampler, which in-paints the
rest; compact diffusion and flow policies, LeRobot's DiffusionPolicy and SmolVLA can, by themselves and under latent-noise, residual,
edit, best-of-N and fine-tuned heads. `linear`: both chunks are averaged over `blend_steps` rows (grippers take the newest value). `auto`
is `rtc` where base and head can, else `linear`. A decision that takes longer than the rows that are left is joined linearly, with a warning.

## Rates and priorities

`policy_node` sends commands from a thread with absolute deadlines; a control step is worked out shortly before its first command is due.
Above 10 commands a second, inference, weights and camera decoding live in a child process (`inference: process`; the node
`policy_node_perception` is the child's), so that neither a slow model nor Python's lock delays a command. The child may die: the robot holds,
commands go on, another child is started. `guard_node`, the control process and `intervention_node` ask for real-time priority (SCHED_FIFO `rt_priority` 20, 10 and 5;
0 does without); diagnostics say what was granted under `priority`. Outside of a container that takes `rtprio` in
`/etc/security/limits.conf`, inside of one `--cap-add=SYS_NICE --ulimit rtprio=49`. Learner and reward nodes lower themselves by `nice`.
`python benchmarks/ros_rate.py` measures all of this on your machine.

## Images

A 640x480 picture does not fit Fast DDS' default shared-memory segment, and every second one is lost. Launch files and `robot-rl up`
set `FASTDDS_DEFAULT_PROFILES_FILE` to `configs/ros/fastdds_shm.xml` unless you have set one; drivers that are started elsewhere need
the same line: `export FASTDDS_DEFAULT_PROFILES_FILE=$(ros2 pkg prefix robot_rl)/share/robot_rl/configs/ros/fastdds_shm.xml`.

## Bags

`robot-rl export STORE out.mcap --format mcap` writes episodes as MCAP with ROS 2 schemas (Foxglove and `ros2 bag` open it);
`robot-rl import bag.mcap STORE --option robot=ur` makes episodes of a recording through its robot description: its states, and its
pictures as the policy would have been shown them, to the bit. A camera's `crop: [top, left, height, width]` and `resize: [height, width]` say how
that is; without a crop 640x480 is squeezed into a square. Both need `pip install mcap rosbags`. `reward/value` is a `Float64` without header: it can only be aligned by reception time.
"""

QOS = """## Quality of service

| profile | reliability | durability | keep last | for |
| --- | --- | --- | --- | --- |
| `sensor` | best effort | volatile | 5 | sensors |
| `latest` | best effort | volatile | 1 | where only the newest counts |
| `command` | reliable | volatile | 1 | every command hop |
| `event` | reliable | volatile | 100 | rewards, guard events |
| `state` | reliable | transient local | 1 | what a late joiner must know |
| `diag` | reliable | volatile | 10 | diagnostics |
"""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows), ""]


def _default(p: Parameter) -> str:
    if isinstance(p.default, tuple):
        return f"`[{', '.join(repr(v) for v in p.default)}]`"
    if isinstance(p.default, bool):
        return f"`{str(p.default).lower()}`"
    return (
        f"`{p.default!r}`"
        if isinstance(p.default, str)
        else f"`{p.default:g}`"
        if isinstance(p.default, float)
        else f"`{p.default}`"
    )


def _parameters(parameters: Iterable[Parameter]) -> list[str]:
    rows = [
        (f"`{p.name}`", p.type_name, _default(p), p.accepted, p.when, p.description + (" (required)" if p.required else ""))
        for p in parameters
    ]
    return _table(("parameter", "type", "default", "accepted", "when", "meaning"), rows)


def _node(node: NodeTable) -> list[str]:
    lines = [f"### {node.name}", "", node.summary + (" Lifecycle node." if node.lifecycle else " No lifecycle."), ""]
    rows = [
        (way, f"`{t.name}`", f"`{t.type}`", t.qos, t.stamp)
        for way, topics in (("publishes", node.publishes), ("subscribes", node.subscribes))
        for t in topics
    ]
    lines += _table(("", "topic", "type", "QoS", "stamp"), rows)
    if node.services:
        lines += _table(("service", "type", "meaning"), [(f"`{s.name}`", f"`{s.type}`", s.meaning) for s in node.services])
    return lines + _parameters(node.parameters)


def _records() -> list[str]:
    lines = [
        "## Records", "",
        "`diagnostic_msgs/msg/DiagnosticArray` carries our records as statuses: `name` says which, `values` are its keys, `schema` is 1.",
        "Integers are decimal, floats exact, stamps nanoseconds; an absent key means unknown.", "",
    ]  # fmt: skip
    rows = []
    for name in wire.__all__:
        record = getattr(wire, name)
        if not (inspect.isclass(record) and dataclasses.is_dataclass(record) and hasattr(record, "NAME")):
            continue
        keys: list[str] = []
        optional: list[str] = []
        for f in dataclasses.fields(record):
            place = f.metadata.get("place", "key")
            word = f.name if place == "key" else f"{f.name} ({'end of the name' if place == 'name' else 'message'})"
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            (keys if required else optional).append(word)
        rows.append((f"`{name}`", f"`{record.NAME}`", ", ".join(keys), ", ".join(optional)))
    return lines + _table(("record", "status name", "always", "when known"), rows)


def text() -> str:
    """The whole page."""
    lines = [*INTRODUCTION.rstrip().split("\n"), "", "## Graphs", ""]
    for graph in GRAPHS.values():
        lines += [f"### {graph.name}", "", f"{graph.summary[0].upper()}{graph.summary[1:]}.", ""]
        rows = [(f"`{a.name}`", f"`{a.default}`" if a.default else "", a.accepted, a.description) for a in graph.args]
        lines += _table(("argument", "default", "accepted", "meaning"), rows)
    lines += ["## Nodes", "", "When a parameter takes effect: " + "; ".join(f"**{k}** {v}" for k, v in WHEN.items()) + ".", ""]
    common = ALL_NODES["monitor_node"].all_parameters
    own = {p.name for p in ALL_NODES["monitor_node"].parameters}
    lines += ["Every node has these:", "", *_parameters(p for p in common if p.name not in own)]
    for node in ALL_NODES.values():
        lines += _node(node)
    return "\n".join([*lines, *_records(), *QOS.rstrip().split("\n")]) + "\n"


if __name__ == "__main__":
    print(text(), end="")
