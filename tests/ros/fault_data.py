"""Faults 7 to 12: weights, transfers, disks, networks, peers, clocks and garbage. A robot goes on, or holds, and nothing is lost."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fault_net as net
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from fault_garbage import flood
from fault_kit import RECOVER_S, TOKEN, Bench, Run
from fault_motion import HOLD_MS
from rosgraph_msgs.msg import Clock

from robot_rl.replay import EpisodeStore
from robot_rl.ros import names, qos
from robot_rl.ros.conversion import to_stamp
from robot_rl.runtime.weights import WEIGHTS, Manifest, WeightChannel, read_header
from robot_rl.training.learner_status import read_status

# ---- 7, 8: weights


def _acting(b: Bench) -> tuple[int, int]:
    """(version that acts, versions refused) of the policy, by its diagnostics."""
    numbers = [b.watch.figure("policy_node: weights", k) for k in ("version", "refused")]
    return int(numbers[0] or 0), int(numbers[1] or 0)


def head(policy: Path, recipe: Path, seed: int) -> tuple[dict[str, Any], Any]:
    """(tensors of a head that is a little another one for each seed, the base policy)."""
    import torch

    from robot_rl.config import load
    from robot_rl.policies.checkpoint import load_policy
    from robot_rl.training.build import build_head
    from robot_rl.training.config import PostTrainConfig

    base = load_policy(policy)
    config = load(PostTrainConfig, recipe)
    made = build_head(base, config.head, seed, config.learner)
    generator = torch.Generator().manual_seed(seed)

    def near(v: Any) -> Any:
        return v + 0.02 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v

    return {k: near(v) for k, v in made.state_dict().items()}, base


def _head(b: Bench, seed: int) -> tuple[dict[str, Any], Any]:
    return head(b.policy, b.folder / "recipe.yaml", seed)


def publish_raw(channel: WeightChannel, tensors: dict[str, Any], base: Any) -> int:
    """A version with a right manifest and a right hash, whatever the values are (the channel itself refuses some)."""
    from safetensors.torch import save

    blob = save({k: v.contiguous() for k, v in tensors.items()})
    with channel._writing():
        version = max(channel.versions(), default=0) + 1
        manifest = Manifest(
            version=version, parent=0, sha256=hashlib.sha256(blob).hexdigest(), size=len(blob), tensors=read_header(blob, "a fault"),
            config_hash="", base_hash=base.spec.base_hash, stats_hash=base.spec.stats_hash, kind="head", metrics={},
            created_ns=time.time_ns(),
        )  # fmt: skip
        channel._commit(manifest, lambda path: path.write_bytes(blob))
    return version


def bad_weights(b: Bench, i: int) -> Run:
    kind = ("NaN", "exploding", "wrong shape")[i % 3]
    run = Run(f"{kind} weights")
    b.set_bool("learner_node/pause", True)
    b.await_motion()
    tensors, base = _head(b, 100 + i)
    name = b.rng.choice(sorted(k for k, v in tensors.items() if v.is_floating_point() and v.ndim >= 2))
    if kind == "NaN":
        tensors[name].view(-1)[b.rng.randrange(tensors[name].numel())] = float("nan")
    elif kind == "exploding":
        tensors = {k: v * 1e30 + 1e30 if v.is_floating_point() else v for k, v in tensors.items()}
    else:
        tensors[name] = tensors[name][..., :-1].clone()
    time.sleep(1.1)
    acting, refused = _acting(b)
    t0 = time.time_ns()
    version = publish_raw(WeightChannel(b.run / "weights"), tensors, base)
    run.check(b.watch.until(lambda: _acting(b)[1] > refused, 20.0), "it was not refused")
    b.went_on(run, t0)
    time.sleep(1.1)
    run.check(
        _acting(b)[0] in (acting, version - 1) and _acting(b)[0] != version, f"version {_acting(b)[0]} acts, {acting} did"
    )
    b.recovered(run, t0, new_episode=False)
    b.set_bool("learner_node/pause", False)
    return run


def broken_transfer(b: Bench, i: int) -> Run:
    kind = (
        "weights cut in the body",
        "weights with a flipped bit",
        "weights file truncated at the learner",
        "episode cut in the body",
    )[i % 4]
    run = Run(kind)
    assert b.proxy is not None
    channel = WeightChannel(b.learner_run / "weights")
    b.await_motion()
    if kind.startswith("episode"):
        before = set(b.watch.committed)
        b.proxy.set("cut", 3)
        t0 = time.time_ns()
        new = b.watch.until(lambda: set(b.watch.committed) - before, 60.0)
        run.check(new, "no episode was committed")
        run.check(b.watch.until(lambda: not new or set(new) <= set(_arrived(b)), RECOVER_S, 0.5), "the episode did not arrive")
        run.check(b.proxy.done > 0, "no upload passed the proxy")
    else:
        tensors, base = _head(b, 200 + i)
        if kind.endswith("body"):
            b.proxy.set("cut", 3)
        elif kind.endswith("bit"):
            b.proxy.set("flip", 1)
        refused = _acting(b)[1]
        t0 = time.time_ns()
        manifest = channel.publish(tensors, parent=0, base_hash=base.spec.base_hash, stats_hash=base.spec.stats_hash)
        file = channel.path(manifest.version) / WEIGHTS
        whole = file.read_bytes()
        if kind.endswith("learner"):
            file.write_bytes(whole[: b.rng.randrange(1, len(whole))])
            time.sleep(3.0)
            run.check(_acting(b)[0] != manifest.version, "a truncated file acts")
            file.write_bytes(whole)
        run.check(b.watch.until(lambda: _acting(b)[0] >= manifest.version, 90.0), "the whole version does not act")
        run.check(kind.endswith("learner") or b.proxy.done > 0, "nothing passed the proxy")
        run.figures["refused"] = float(_acting(b)[1] - refused)
    b.proxy.set("pass")
    b.went_on(run, t0)
    b.recovered(run, t0, new_episode=False)
    return run


def _arrived(b: Bench) -> list[str]:
    path = b.learner_run / "inbox" / "robot"
    if not (path / "store.json").exists():
        return []
    with EpisodeStore.open(path) as store:
        return list(store.episode_ids())


# ---- 9: disks


def full_disk(b: Bench, i: int) -> Run:
    side = ("robot", "learner")[i % 2]
    run = Run(f"full disk, {side} side")
    disk = b.disks[side]
    b.await_motion()
    t0 = time.time_ns()
    disk.fill()
    try:
        b.went_on(run, t0, 2.0)
        if side == "robot":
            ended = b.watch.until(lambda: next((s for s in list(b.watch.episodes) if s.sent_ns > t0 and s.value.state in ("ended", "aborted")), None), 30.0)  # fmt: skip
            run.check(ended is not None, "the episode did not end")
            time.sleep(2.5)
            running = [
                s
                for s in list(b.watch.episodes)
                if ended is not None and s.sent_ns > ended.sent_ns and s.value.state == "running"
            ]
            run.check(not running, "an episode began on a full disk")
        else:
            time.sleep(b.rng.uniform(2.0, 8.0))
    finally:
        disk.free()
    since = time.time_ns()
    b.recovered(run, since if side == "robot" else t0, new_episode=side == "robot")
    if side == "learner":
        alive = lambda: (s := read_status(b.run / "learner")) is not None and s.heartbeat_ns > since and s.state != "failed"  # noqa: E731
        run.check(b.watch.until(alive, RECOVER_S + 60.0, 0.5), "the learner did not come back")
    return run


# ---- 10: partitions


def partition(b: Bench, i: int) -> Run:
    direction = ("out", "in", "both")[i % 3]
    seconds = b.rng.uniform(1.0, 30.0)
    run = Run(f"partition, {direction}")
    b.await_motion()
    t0 = time.time_ns()
    if b.network is not None:
        b.network.cut(direction)
    else:
        run.weaker = "no network namespaces: the learner's processes are stopped instead"
        assert b.proxy is not None
        b.proxy.set("dead")
        for name in ("learner_node", "learner_monitor_node"):
            os.kill(b.pid(name), signal.SIGSTOP)
    try:
        b.went_on(run, t0, seconds)
    finally:
        if b.network is not None:
            b.network.heal()
        else:
            for name in ("learner_node", "learner_monitor_node"):
                os.kill(b.pid(name), signal.SIGCONT)
            assert b.proxy is not None
            b.proxy.set("pass")
    owed = set(b.watch.committed)
    began = time.monotonic()
    run.check(b.watch.until(lambda: owed <= set(_arrived(b)), RECOVER_S, 0.5), "the backlog did not arrive")
    run.figures |= {"cut_s": round(seconds, 1), "backlog_s": round(time.monotonic() - began, 1)}
    arrived = _arrived(b)
    run.check(len(arrived) == len(set(arrived)), "an episode arrived twice")
    b.recovered(run, t0, new_episode=False)
    return run


# ---- 11: a peer of another time


def _reward_of_schema(b: Bench, schema: int) -> None:
    """A source of another time that understands nothing says nothing; one that does speak says it so."""
    publisher = b.watch.node.create_publisher(DiagnosticArray, f"{b.watch.prefix}/{names.REWARD_EVENTS}", qos.EVENT)
    b.watch.until(publisher.get_subscription_count, 5.0)
    values = [
        KeyValue(key="schema", value=str(schema)),
        KeyValue(key="event_id", value="0" * 26),
        KeyValue(key="value", value="1.0"),
    ]
    publisher.publish(DiagnosticArray(status=[DiagnosticStatus(name="reward/old", message="nobody", values=values)]))
    time.sleep(0.5)
    b.watch.node.destroy_publisher(publisher)


def other_schema(b: Bench, i: int) -> Run:
    what, schema = ("reward_node", "learner_node")[i // 2 % 2], (0, 2)[i % 2]
    run = Run(f"{what} speaks schema {schema}")
    b.await_motion()
    b.supervisor.schema[f"/{what}"] = schema
    t0 = net.send(b.pid(what), signal.SIGKILL)
    try:
        text = f"schema {schema}"
        if what == "reward_node":
            _reward_of_schema(b, schema)
        run.check(
            b.watch.until(lambda: b.watch.says("policy_node", text, t0), 90.0, 0.1),
            "the policy's diagnostics do not name the schema",
        )
        run.check(
            b.watch.until(lambda: b.watch.says(what, "schema 1", t0), 30.0, 0.1), f"{what}'s diagnostics do not name the schema"
        )
        run.check(b.supervisor.processes["/policy_node"].restarts == b.stopped, "the policy died of it")
    finally:
        b.supervisor.schema.pop(f"/{what}")
        net.send(b.pid(what), signal.SIGKILL)
    b.recovered(run, time.time_ns(), new_episode=True)
    return run


# ---- 12: clocks and garbage


def clocks(b: Bench, i: int) -> Run:
    """``/clock`` jumps (a session in simulated time), or the wall clock of every process does."""
    seconds = (10.0, -10.0)[i % 2]
    run = Run(f"{'/clock' if b.kind == 'simtime' else 'wall clock'} jumps by {seconds:+.0f} s")
    b.await_motion()
    t0 = time.time_ns()
    if b.clock is not None:
        b.clock.jump(seconds)
    else:
        where = b.watch.node.create_publisher(Clock, "/clock", qos.COMMAND)
        b.watch.until(lambda: where.get_subscription_count() >= b.watch.node.count_subscribers("/clock"), 5.0)
        now = b.watch.heartbeats[-1].stamp_ns
        t0 = time.time_ns()
        where.publish(Clock(clock=to_stamp(max(0, now + int(seconds * 1e9)))))
        time.sleep(0.3)
        b.watch.node.destroy_publisher(where)
    b.held(run, t0, HOLD_MS)
    ended = b.watch.until(
        lambda: any(s.received_ns > t0 and s.value.end_reason == "clock_jump" for s in list(b.watch.episodes)), 10.0
    )
    run.check(ended, "the episode did not end as clock_jump")
    b.recovered(run, t0)
    return run


def garbage(b: Bench, i: int) -> Run:
    """Wrong sizes, types, names, lengths of 4 GB, on every subscribed topic and every HTTP route."""
    run = Run("garbage messages")
    names = [n for n in b.supervisor.processes]
    b.await_motion()
    before = {n: net.resident_mb(b.supervisor.processes[n].pid) for n in names}
    restarts = {n: b.supervisor.processes[n].restarts for n in names}
    t0 = time.time_ns()
    run.figures["messages"] = float(flood(b.watch, b.rng))
    status = b.watch.diagnostics.get(f"{b.watch.prefix}/learner_node: endpoint")
    endpoint = status.value.message if status is not None else ""
    if endpoint.startswith("http"):
        run.figures["requests"] = float(http_garbage(endpoint, b.rng))
    time.sleep(1.0)
    died = [n for n in names if b.supervisor.processes[n].restarts != restarts[n] or not b.supervisor.processes[n].alive]
    run.check(not died, f"died of garbage: {died}")
    growth = {n: net.resident_mb(b.supervisor.processes[n].pid) - before[n] for n in names}
    run.figures["largest_growth_mb"] = round(max(growth.values()), 1)
    run.check(max(growth.values()) < 150.0, f"memory grew: { {n: round(g) for n, g in growth.items() if g > 20} }")
    b.recovered(run, t0, new_episode=True)
    return run


def http_garbage(url: str, rng: random.Random) -> int:
    """Wrong requests to every route; raises nothing, whatever the server says, as long as it answers a right one afterwards."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    routes = ["/v1", "/v1/", "/v1/inbox", "/v1/weights", "/v1/weights/1/manifest.json", "/v1/weights/9999999999999999999/x",
              "/v1/episodes/robot/x", "/v1/episodes/../x", "/v1/episodes/robot/x/commit", "/v1/rewards/robot/env", "/" + "a" * 3000]  # fmt: skip
    bodies = [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"bytes": Infinity, "sha256": 1}',
        b'{"n": 1e999, "event": {}}\n',
        rng.randbytes(5000),
        b"null",
    ]
    sent = 0
    for method in ("GET", "HEAD", "PATCH", "POST", "PUT", "BREW"):
        for route in routes:
            body = rng.choice(bodies)
            headers = bearer | rng.choice([{}, {"Upload-Offset": "-1"}, {"Upload-Offset": "9" * 30, "X-Sha256": "f" * 64},
                                           {"Content-Length": str(4 << 30)}, {"Content-Length": "minus one"}, {"Range": "bytes=9-1,x"}])  # fmt: skip
            connection = http.client.HTTPConnection(host, port, timeout=2.0)
            with suppress(OSError, http.client.HTTPException, ValueError):
                connection.request(method, route, None if "Content-Length" in headers else body, headers)
                connection.getresponse().read(1 << 16)
            connection.close()
            sent += 1
    for _ in range(5):  # no HTTP at all
        with suppress(OSError), socket.create_connection((host, port), timeout=2.0) as raw:
            raw.sendall(rng.randbytes(2000))
            sent += 1
    connection = http.client.HTTPConnection(host, port, timeout=10.0)
    connection.request("GET", "/v1/weights", headers=bearer)
    if connection.getresponse().status != 200:
        raise RuntimeError("the endpoint does not answer any more")
    connection.close()
    return sent
