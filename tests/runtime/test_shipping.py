"""Episodes and rewards between machines: whatever breaks in between, each arrives once and nothing is lost."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from store_kit import new_store, same, write

from robot_rl.replay import EpisodeStore
from robot_rl.replay.units import EpisodeUnit, UnitError, adopt_unit
from robot_rl.runtime.inbox import EpisodeInbox
from robot_rl.runtime.shipping import Backoff, Shipper
from robot_rl.runtime.transfer import TransferError, WeightServer
from robot_rl.runtime.weights import WeightChannel
from robot_rl.types import EpisodeMeta, RewardEvent

TOKEN = "a-token-of-some-length"


def add(store: EpisodeStore, episode_id: str, length: int, seed: int = 0) -> None:
    write(store, np.random.default_rng(seed), length, EpisodeMeta(episode_id))


@pytest.fixture
def robot(tmp_path) -> Path:
    with new_store(tmp_path / "robot") as store:
        for i in range(4):
            add(store, f"e{i}", 12 + i, i)
        store.append_reward(*(RewardEvent(f"e{i}", 3, "vlm", float(i)) for i in range(4)))
    return tmp_path / "robot"


@pytest.fixture
def learner(tmp_path):
    inbox = EpisodeInbox(tmp_path / "inbox")
    with WeightServer(WeightChannel(tmp_path / "weights"), token=TOKEN, inbox=inbox) as server:
        server.inbox = inbox
        yield server


def check_arrived(inbox: Path, robot: Path, ids=("e0", "e1", "e2", "e3")) -> None:
    with EpisodeStore.open(inbox) as there, EpisodeStore.open(robot) as here:
        assert there.episode_ids() == list(ids)
        for i in ids:
            same(here.read(i), there.read(i))
            assert there.rewards(i) == here.rewards(i)


def test_episodes_and_rewards_arrive_in_order(robot, learner, tmp_path):
    shipper = Shipper(robot, learner.url, "arm_1", token=TOKEN)
    assert shipper.step()
    check_arrived(tmp_path / "inbox/arm_1", robot)
    assert (shipper.status.shipped, shipper.status.rewards, shipper.status.pending) == (4, 4, 0)
    assert not shipper.step(), "nothing is sent twice"
    with EpisodeStore.open(robot, mode="a") as store:
        store.append_reward(RewardEvent("e0", 5, "vlm", 0.5), RewardEvent("e0", 5, "button", 1.0))
        add(store, "e4", 5, 7)
    again = Shipper(robot, learner.url, "arm_1", token=TOKEN)
    again.step()
    assert (again.status.shipped, again.status.rewards) == (1, 2), "a new process goes on where the ledger ends"
    check_arrived(tmp_path / "inbox/arm_1", robot, ("e0", "e1", "e2", "e3", "e4"))


def test_two_robots_have_a_store_each_and_the_tokens_count(robot, learner, tmp_path):
    Shipper(robot, learner.url, "left", token=TOKEN).step()
    Shipper(robot, learner.url, "right", token=TOKEN).step()
    check_arrived(tmp_path / "inbox/left", robot)
    check_arrived(tmp_path / "inbox/right", robot)
    with pytest.raises(TransferError, match="401"):
        Shipper(robot, learner.url, "arm_1", token="another-token-entirely").step()


class Proxy:
    """Forwards connections and cuts each of them after a random number of bytes, in either direction."""

    def __init__(self, target: str, seed: int, most: int) -> None:
        host, port = target.removeprefix("http://").split(":")
        self.target, self.random, self.most, self.connections = (host, int(port)), random.Random(seed), most, 0
        self.cut = True
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.forward, args=(client,), daemon=True).start()

    def forward(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self.target) as upstream:
            left = [self.random.randrange(1, self.most)] if self.cut and self.random.random() < 0.7 else [1 << 60]

            def pump(source, sink):
                with contextlib.suppress(OSError):
                    while data := source.recv(4096):
                        part = data[: left[0]]
                        sink.sendall(part)
                        left[0] -= len(part)
                        if left[0] <= 0:
                            break
                for s in (client, upstream):
                    with contextlib.suppress(OSError):
                        s.shutdown(socket.SHUT_RDWR)

            thread = threading.Thread(target=pump, args=(client, upstream), daemon=True)
            thread.start()
            pump(upstream, client)
            thread.join(5)


@pytest.mark.parametrize("seed", range(2))
def test_a_link_that_keeps_breaking_loses_nothing_and_sends_nothing_twice(robot, learner, tmp_path, seed, monkeypatch):
    monkeypatch.setattr("robot_rl.runtime.shipping.PART_BYTES", 8000)
    proxy = Proxy(learner.url, seed, most=9000)
    shipper = Shipper(robot, proxy.url, "arm_1", token=TOKEN, timeout_s=5.0)
    failures = 0
    for _ in range(2000):
        try:
            if not shipper.step():
                break
        except TransferError:
            failures += 1
    assert failures > 3
    check_arrived(tmp_path / "inbox/arm_1", robot)
    assert learner.inbox.counts.episodes == 4
    assert not list((tmp_path / "inbox/.parts").rglob("*.tar"))
    proxy.socket.close()


def test_an_upload_resumes_where_it_was_cut_also_by_another_process(robot, learner, monkeypatch):
    monkeypatch.setattr("robot_rl.runtime.shipping.PART_BYTES", 1000)
    sent = []
    first = Shipper(robot, learner.url, "arm_1", token=TOKEN, stop=lambda: len(sent) >= 5)
    send = first._send
    first._send = lambda *a: (sent.append(1), send(*a))[1]
    first.step()
    size = EpisodeUnit(robot, "e0").size
    assert first.status.bytes == 5000 < size
    second = Shipper(robot, learner.url, "arm_1", token=TOKEN)
    second.step()
    total = sum(EpisodeUnit(robot, f"e{i}").size for i in range(4))
    assert first.status.bytes + second.status.bytes == total, "no byte was sent twice"


def test_a_shipper_killed_at_any_moment_goes_on(robot, learner, tmp_path):
    environment = {**os.environ, "ROBOT_RL_WEIGHTS_TOKEN": TOKEN}
    command = [sys.executable, "-m", "robot_rl.runtime.shipping", str(robot), "--url", learner.url, "--robot", "arm_1"]
    for wait in (0.0, 0.1):
        before = learner.inbox.counts.episodes
        process = subprocess.Popen([*command, "--ship-mb-s", "0.05"], env=environment)
        until = time.monotonic() + 30
        while learner.inbox.counts.episodes == before and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 2 <= learner.inbox.counts.episodes <= 4
    Shipper(robot, learner.url, "arm_1", token=TOKEN).step()
    check_arrived(tmp_path / "inbox/arm_1", robot)


def test_a_learner_that_restarts_or_moves(robot, tmp_path):
    channel = WeightChannel(tmp_path / "weights")
    with WeightServer(channel, inbox=EpisodeInbox(tmp_path / "inbox")) as server:
        port = int(server.url.rsplit(":", 1)[1])
        shipper = Shipper(robot, server.url, "arm_1", timeout_s=2.0)
        shipper.step()
    with EpisodeStore.open(robot, mode="a") as store:
        add(store, "e4", 6, 7)
    with pytest.raises(TransferError):
        shipper.step()
    with WeightServer(channel, port=port, inbox=EpisodeInbox(tmp_path / "inbox")):
        shipper.step()
        check_arrived(tmp_path / "inbox/arm_1", robot, ("e0", "e1", "e2", "e3", "e4"))
    # Another learner has nothing yet, whatever the first one acknowledged.
    with WeightServer(channel, port=port, inbox=EpisodeInbox(tmp_path / "other")):
        shipper.step()
    check_arrived(tmp_path / "other/arm_1", robot, ("e0", "e1", "e2", "e3", "e4"))


def test_the_running_shipper_waits_for_the_learner(robot, tmp_path):
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    done = threading.Event()
    shipper = Shipper(robot, f"http://127.0.0.1:{port}", "arm_1", stop=done.is_set)
    thread = threading.Thread(target=shipper.run)
    thread.start()
    until = time.monotonic() + 20
    while not shipper.status.last_error and time.monotonic() < until:
        time.sleep(0.01)
    assert shipper.status.last_error
    with WeightServer(WeightChannel(tmp_path / "weights"), port=port, inbox=EpisodeInbox(tmp_path / "inbox")):
        while shipper.status.shipped < 4 and time.monotonic() < until:
            time.sleep(0.05)
        done.set()
        thread.join(20)
    assert shipper.status.shipped == 4
    backoff = Backoff()
    waits = [backoff.wait_s() for _ in range(12)]
    assert 0.25 <= waits[0] <= 0.5
    assert 15.0 <= waits[-1] <= 30.0


def test_a_full_learner_is_asked_again(robot, tmp_path, monkeypatch):
    inbox = EpisodeInbox(tmp_path / "inbox", min_free_bytes=1 << 62)
    with WeightServer(WeightChannel(tmp_path / "weights"), inbox=inbox) as server:
        shipper = Shipper(robot, server.url, "arm_1")
        with pytest.raises(TransferError, match="507"):
            shipper.step()
        inbox.min_free_bytes = 0
        shipper.step()
    check_arrived(tmp_path / "inbox/arm_1", robot)


def test_a_robot_short_of_disk_deletes_only_what_was_acknowledged(robot, learner, tmp_path, monkeypatch):
    usage = shutil.disk_usage(robot)
    free = [1000, 1000, 5000]
    fake = lambda _: usage._replace(free=free.pop(0) if len(free) > 1 else free[0])  # noqa: E731
    shipper = Shipper(robot, learner.url, "arm_1", token=TOKEN, min_free_bytes=2000)
    monkeypatch.setattr("robot_rl.runtime.shipping.shutil.disk_usage", fake)
    shipper._make_room = lambda: None
    shipper.step()
    del shipper._make_room
    with EpisodeStore.open(robot, mode="a") as store:
        add(store, "e4", 6, 7)
    shipper._make_room()
    with EpisodeStore.open(robot) as store:
        assert store.episode_ids() == ["e2", "e3", "e4"]
    assert not (robot / "discarded/e0").exists()
    free[:] = [0]
    shipper._make_room()
    with EpisodeStore.open(robot) as store:
        assert store.episode_ids() == ["e4"], "unacknowledged, so it stays"
    shipper.step()
    with EpisodeStore.open(tmp_path / "inbox/arm_1") as store:
        assert len(store) == 5


# ---- what must not come in


def put(learner, path: str, data: bytes, robot="arm_1") -> tuple[int, dict]:
    shipper = Shipper(".", learner.url, robot, token=TOKEN)
    digest = hashlib.sha256(data).hexdigest()
    shipper.client.ask("PATCH", f"/v1/episodes/{robot}/{path}", data, {"Upload-Offset": "0", "X-Sha256": digest})
    body = json.dumps({"bytes": len(data), "sha256": digest}).encode()
    status, told, _ = shipper.client.ask("POST", f"/v1/episodes/{robot}/{path}/commit", body)
    return status, told


def retarred(unit: EpisodeUnit, change) -> bytes:
    """The unit with every member passed through ``change(member, data) -> (member, data) or None``."""
    out = io.BytesIO()
    source = tarfile.open(fileobj=io.BytesIO(unit.read(0, unit.size)))  # noqa: SIM115
    with tarfile.open(fileobj=out, mode="w") as target:
        for member in source:
            changed = change(member, source.extractfile(member).read())
            if changed is not None:
                changed[0].size = len(changed[1])
                target.addfile(changed[0], io.BytesIO(changed[1]))
    return out.getvalue()


def renamed(to: str, kind=None):
    def change(member, data):
        if member.name.endswith("action/zarr.json"):
            member.name = to
            if kind is not None:
                member.type, member.linkname = kind, "/etc/passwd"
        return member, data

    return change


def flipped(member, data):
    if member.name == "episode/stamp_ns/zarr.json" or not member.name.startswith("episode/action/c."):
        return member, data
    return member, data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def other_features(member, data):
    if member.name == "store.json":
        spec = json.loads(data)
        spec["stats_hash"] = "other"
        return member, json.dumps(spec).encode()
    return member, data


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (renamed("../../evil"), "not a file of an episode"),
        (renamed("/evil"), "not a file of an episode"),
        (renamed("episode/../../x"), "not a file of an episode"),
        (renamed("episode/a/b/c"), "not a file of an episode"),
        (renamed("episode/link", tarfile.SYMTYPE), "not a regular file"),
        (flipped, "hash|cannot"),
        (other_features, "stats_hash='other'|stats_hash=other"),
        (lambda m, d: None if m.name == "store.json" else (m, d), "accepted is store.json"),
        (lambda m, d: None if m.name.endswith("episode/zarr.json") else (m, d), "zarr.json"),
        (lambda m, d: (m, d.replace(b'"schema_version": 1', b'"schema_version": 2')), "schema"),
    ],
)
def test_what_is_not_a_whole_episode_never_enters(robot, learner, tmp_path, change, why):
    Shipper(robot, learner.url, "arm_1", token=TOKEN).step()
    with EpisodeStore.open(robot, mode="a") as store:
        add(store, "e9", 9, 7)
    status, told = put(learner, "e9", retarred(EpisodeUnit(robot, "e9"), change))
    assert status == 422, told
    assert re.search(why, told["error"]), told
    with EpisodeStore.open(tmp_path / "inbox/arm_1") as store:
        assert "e9" not in store
    assert len(list((tmp_path / "inbox/.refused/arm_1").iterdir())) == 1
    assert not list((tmp_path / "inbox/arm_1/tmp").iterdir())
    assert not (tmp_path / "evil").exists()
    # A sender that is told so does not try for ever, and goes on with the others.
    assert put(learner, "e9", EpisodeUnit(robot, "e9").read(0, 1 << 30))[0] == 201


def test_another_episode_of_the_same_name_is_kept_aside(robot, learner, tmp_path):
    Shipper(robot, learner.url, "arm_1", token=TOKEN).step()
    with new_store(tmp_path / "second") as store:
        add(store, "e0", 30, 9)
    shipper = Shipper(tmp_path / "second", learner.url, "arm_1", token=TOKEN)
    shipper.step()
    assert shipper.status.refused == 1
    assert not shipper.step(), "refused for good"
    check_arrived(tmp_path / "inbox/arm_1", robot)


def test_a_unit_is_checked_without_a_server_too(robot, tmp_path):
    unit = EpisodeUnit(robot, "e1")
    data = io.BytesIO(unit.read(0, unit.size))
    with pytest.raises(UnitError, match="holds episode 'e1', it was sent as 'e2'"):
        adopt_unit(tmp_path / "there", data, "e2", unit.sha256())
    adopt_unit(tmp_path / "there", data, "e1", unit.sha256())
    assert b"".join(unit.chunks(777)) == data.getvalue()
    with pytest.raises(KeyError, match="no episode 'e7'"):
        EpisodeUnit(robot, "e7")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("PATCH", "/v1/episodes/../x", {"Content-Length": "0"}, b"404"),
        ("PATCH", "/v1/episodes/arm/..", {"Content-Length": "0"}, b"404"),
        ("PATCH", "/v1/episodes/.parts/e0", {"Content-Length": "0"}, b"404"),
        ("PATCH", "/v1/episodes/arm/e0", {"Content-Length": str(1 << 40)}, b"413"),
        ("PATCH", "/v1/episodes/arm/e0", {}, b"411"),
        ("PATCH", "/v1/episodes/arm/e0", {"Content-Length": "-5"}, b"411"),
        ("PATCH", "/v1/episodes/arm/e0", {"Content-Length": "0"}, b"400"),
        ("POST", "/v1/episodes/arm/e0/commit", {"Content-Length": "0"}, b"400"),
        ("POST", "/v1/rewards/arm/UPPER", {"Content-Length": "0"}, b"404"),
        ("POST", "/v1/weights/1/manifest.json", {"Content-Length": "0"}, b"404"),
        ("DELETE", "/v1/episodes/arm/e0", {}, b"501"),
    ],
)
def test_garbage_requests(learner, method, path, headers, status):
    host, port = learner.url.removeprefix("http://").split(":")
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {TOKEN}", "Connection: close"]
    with socket.create_connection((host, int(port)), timeout=5) as s:
        s.sendall("\r\n".join([*lines, *(f"{k}: {v}" for k, v in headers.items())]).encode() + b"\r\n\r\n")
        s.settimeout(5)
        answer = s.recv(65536)
    assert answer.startswith(b"HTTP/1.1 " + status), answer


def test_rewards_are_numbered_and_gaps_wait(robot, learner, tmp_path):
    client = Shipper(robot, learner.url, "arm_1", token=TOKEN).client
    event = lambda n: {  # noqa: E731
        "n": n, "event": {
            "episode_id": "e0", "step": n, "source": "vlm", "value": 1.0, "kind": "dense", "valid": True, "reason": "",
            "stamp_ns": 0, "model_id": "", "prompt_hash": "", "latency_ms": 0.0, "event_id": f"id{n}", "revokes": "",
        },
    }  # fmt: skip
    send = lambda *ns: client.ask(  # noqa: E731
        "POST", "/v1/rewards/arm_1/vlm", "\n".join(json.dumps(event(n)) for n in ns).encode(), {"X-Store-Id": "s"}
    )
    assert send(1)[0] == 409, "no store of this robot yet"
    shipper = Shipper(robot, learner.url, "arm_1", token=TOKEN)
    shipper._ship_rewards = lambda: False
    shipper.step()
    assert send(1, 2, 4)[1] == {"n": 2}
    assert send(2, 3, 4)[1] == {"n": 4}
    assert send(1, 2, 3)[1] == {"n": 4}
    assert client.ask("POST", "/v1/rewards/arm_1/vlm", b"garbage", {"X-Store-Id": "s"})[0] == 422
    assert client.ask("POST", "/v1/rewards/arm_1/button", json.dumps(event(1)).encode(), {"X-Store-Id": "s"})[0] == 422
    with EpisodeStore.open(tmp_path / "inbox/arm_1") as store:
        assert [e.step for e in store.rewards("e0")] == [1, 2, 3, 4]
