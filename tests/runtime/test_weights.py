"""Published weights: whole or absent under kill -9, verified against every kind of damage, fetched over broken links."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from robot_rl.runtime import transfer
from robot_rl.runtime import weights as weights_module
from robot_rl.runtime.transfer import RemoteWeights, TransferError, WeightServer, fetch, read_token
from robot_rl.runtime.weights import MANIFEST, WEIGHTS, VerificationError, WeightChannel, WeightSubscriber

TOKEN = "a-token-of-enough-length"


def head(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "net.0.weight": torch.randn(16, 8, generator=g),
        "net.0.bias": torch.randn(16, generator=g),
        "steps": torch.tensor(seed),
    }


@pytest.fixture
def channel(tmp_path) -> WeightChannel:
    return WeightChannel(tmp_path / "weights")


def test_publish_and_load_are_bitwise(channel):
    assert (channel.latest(), channel.versions()) == (None, [])
    tensors = {**head(3), "half": torch.randn(4).to(torch.bfloat16), "array": np.arange(6.0).reshape(2, 3).T}
    manifest = channel.publish(tensors, parent=0, config_hash="c", metrics={"q": 1.5, "bad": float("nan")}, base_hash="b")
    assert (manifest.version, channel.latest(), manifest.metrics["bad"]) == (1, 1, None)
    assert channel.manifest(1) == manifest
    loaded = channel.load(1, {name: tuple(t.shape) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], torch.from_numpy(tensor.copy()) if name == "array" else tensor)
    assert loaded["half"].dtype == torch.bfloat16
    assert channel.publish(head(), parent=1).version == 2


def test_views_and_shared_tensors_can_be_published(channel):
    base = torch.arange(12.0).reshape(3, 4)
    channel.publish({"a": base, "b": base, "c": base.t(), "d": base[:, 1]}, parent=0)
    assert torch.equal(channel.load(1)["c"], base.t())


def test_what_is_not_finite_is_neither_published_nor_loaded(channel):
    with pytest.raises(VerificationError, match=r"'net\.0\.bias' holds values that are not finite"):
        channel.publish({**head(), "net.0.bias": torch.tensor([1.0, float("nan")])}, parent=0)
    assert channel.versions() == []


def _rewrite(channel: WeightChannel, version: int, **tensors: torch.Tensor) -> None:
    """Replace the weights by others with a manifest that is right about them: damage that only content checks find."""
    import hashlib

    from safetensors.torch import save

    blob = save(tensors)
    path = channel.path(version)
    raw = json.loads((path / MANIFEST).read_text())
    raw.update(sha256=hashlib.sha256(blob).hexdigest(), size=len(blob))
    raw["tensors"] = {n: {"shape": s.shape, "dtype": s.dtype} for n, s in weights_module.read_header(blob, "x").items()}
    (path / WEIGHTS).write_bytes(blob)
    (path / MANIFEST).write_text(json.dumps(raw))


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_every_kind_of_damage_is_named(channel):
    shapes = {name: tuple(t.shape) for name, t in head().items()}
    damage = {
        "truncated": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-7]), r"bytes, the manifest says"),
        "bit flip": (lambda p: _flip(p / WEIGHTS, -3), r"sha256 \w+\.\.\., the manifest says"),
        "header flip": (lambda p: _flip(p / WEIGHTS, 3), r"sha256"),
        "no weights": (lambda p: (p / WEIGHTS).unlink(), r"weights\.safetensors is missing"),
        "no manifest": (lambda p: (p / MANIFEST).unlink(), r"no manifest; published are"),
        "torn manifest": (lambda p: (p / MANIFEST).write_bytes((p / MANIFEST).read_bytes()[:40]), r"manifest cannot be read"),
        "empty manifest": (lambda p: (p / MANIFEST).write_bytes(b""), r"manifest cannot be read"),
        "manifest of zeros": (lambda p: (p / MANIFEST).write_bytes(bytes(300)), r"manifest cannot be read"),
        "list": (lambda p: (p / MANIFEST).write_text("[]"), r"it is not an object"),
        "schema": (lambda p: (p / MANIFEST).write_text('{"schema": 9}'), r"schema 9, accepted is 1"),
    }
    for number, (name, (hurt, message)) in enumerate(damage.items(), start=1):
        channel.publish(head(number), parent=0)
        hurt(channel.path(number))
        with pytest.raises(VerificationError, match=message):
            channel.load(number, shapes)
        assert name
    for tensors, message in [
        ({**head(), "net.0.bias": torch.full((16,), float("inf"))}, r"'net\.0\.bias' holds values that are not finite"),
        ({**head(), "net.0.bias": torch.zeros(17)}, r"'net\.0\.bias' has shape \(17,\), expected \(16,\)"),
        ({**head(), "extra": torch.zeros(1)}, r"not expected \['extra'\]"),
        ({"steps": torch.tensor(1)}, r"missing \['net\.0\.bias', 'net\.0\.weight'\]"),
    ]:
        version = channel.publish(head(), parent=0).version
        _rewrite(channel, version, **tensors)
        with pytest.raises(VerificationError, match=message):
            channel.load(version, shapes)


def test_latest_passes_over_damage_and_says_so(channel, caplog):
    channel.publish(head(1), parent=0)
    channel.publish(head(2), parent=1)
    (channel.path(2) / WEIGHTS).write_bytes(b"short")
    assert channel.latest() == 1
    assert "version 2 is passed over: 5 bytes" in caplog.text


def test_killed_at_every_boundary_of_a_publication(channel):
    """A writer that dies before or after any system call leaves the old version or the new one, and can go on."""
    channel.publish(head(1), parent=0)
    script = textwrap.dedent(
        """
        import json, os, signal, sys, torch
        from robot_rl.runtime import weights
        channel = weights.WeightChannel(sys.argv[1])

        def publish(boundary):
            count = 0
            def tick():
                nonlocal count
                count += 1
                if count == boundary:
                    os.kill(os.getpid(), signal.SIGKILL)
            for module, name in [(os, "fsync"), (os, "rename"), (os, "chmod"), (weights.tempfile, "mkdtemp")]:
                def wrap(real):
                    def call(*args, **kwargs):
                        tick(); result = real(*args, **kwargs); tick()
                        return result
                    return call
                setattr(module, name, wrap(getattr(module, name)))
            channel.publish({"net.0.weight": torch.ones(16, 8)}, parent=1)
            os._exit(0)

        report, boundary = [], 0
        while True:
            boundary += 1
            before = channel.latest()
            pid = os.fork()
            if pid == 0:
                publish(boundary)
            status = os.waitpid(pid, 0)[1]
            for version in channel.versions():
                channel.load(version)
            report.append([before, channel.latest(), os.WIFSIGNALED(status)])
            if not os.WIFSIGNALED(status):
                break
        print(json.dumps(report))
        """
    )
    command = [sys.executable, "-c", script, str(channel.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    *killed, last = json.loads(done.stdout)
    assert len(killed) >= 12, (
        "mkdtemp, chmod, three syncs before the rename, the rename, a sync after it; before and after each"
    )
    appeared = [after - before for before, after, _ in killed]
    assert set(appeared) == {0, 1}
    assert appeared == sorted(appeared), "absent up to the rename, whole from then on"
    assert last[2] is False
    assert last[1] == last[0] + 1
    assert not list(channel.folder.glob(".tmp-*")), "what killed writers left is removed by the next publication"


def test_readers_in_other_threads_never_see_half_a_version(channel):
    stop, problems, reads = threading.Event(), [], [0]

    def read() -> None:
        while not stop.is_set():
            version = channel.latest()
            if version is None:
                continue
            try:
                tensors = channel.load(version)
                reads[0] += 1
                if not bool((tensors["w"] == float(version)).all()):
                    problems.append(f"version {version} holds {tensors['w'][0]}")
            except VerificationError as error:
                if version in channel.versions():  # pruned meanwhile is fine
                    problems.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for version in range(1, 31):
        channel.publish({"w": torch.full((2000,), float(version))}, parent=version - 1)
        channel.prune(keep=3)
    deadline = time.monotonic() + 5
    while reads[0] < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert reads[0] >= 3


def test_prune_and_rewind(channel):
    for version in range(6):
        channel.publish(head(version), parent=version)
    assert channel.prune(keep=2, protect=(1,)) == [2, 3, 4]
    assert channel.versions() == [1, 5, 6]
    assert channel.publish(head(), parent=6).version == 7
    assert channel.rewind(5) == [6, 7]
    assert channel.publish(head(), parent=5).version == 6
    with pytest.raises(ValueError, match="keep=0"):
        channel.prune(0)


def test_subscriber_offers_only_what_passed_everything(channel):
    shapes = {name: tuple(t.shape) for name, t in head().items()}
    calls = []

    def dry_forward(tensors):
        calls.append(int(tensors["steps"]))
        if int(tensors["steps"]) == 4:
            raise FloatingPointError("NaN in the chunk")
        return int(tensors["steps"]) != 5

    subscriber = WeightSubscriber(channel, expected_shapes=shapes, dry_forward=dry_forward, base_hash="base-a")
    assert subscriber.poll() is None
    channel.publish(head(1), parent=0, base_hash="base-a")
    assert subscriber.poll().version == 1
    assert subscriber.poll() is None, "nothing new"
    for step, message in [(4, "dry forward raised FloatingPointError"), (5, "dry forward refused it")]:
        channel.publish(head(step), parent=1, base_hash="base-a")
        assert subscriber.poll() is None
        assert subscriber.poll() is None
        assert message in subscriber.last_error
    channel.publish(head(6), parent=1, base_hash="base-b")
    assert subscriber.poll() is None
    assert "base_hash 'base-b', the acting side has 'base-a'" in subscriber.last_error
    assert (subscriber.refused, subscriber.accepted.version, int(subscriber.tensors["steps"])) == (3, 1, 1)
    assert subscriber.poll(version=77) is None
    assert "no manifest" in subscriber.last_error
    channel.publish(head(7), parent=1, base_hash="base-a")
    assert subscriber.poll().version == 5
    assert subscriber.last_error == ""
    assert calls == [1, 4, 5, 7]


# -- between machines -----------------------------------------------------------------------------------------------------


def test_a_dry_forward_that_could_not_be_asked_is_asked_again(channel):
    """The base policy's server is away: that says nothing about the weights."""
    away = [ConnectionError("policy server gpu-box:8765: refused"), None]

    def dry_forward(tensors):
        if (error := away.pop(0)) is not None:
            raise error

    channel.publish(head(1), parent=0)
    subscriber = WeightSubscriber(channel, dry_forward=dry_forward)
    assert subscriber.poll() is None
    assert "gpu-box" in subscriber.last_error
    assert subscriber.poll().version == 1


def test_bytes_that_were_cut_on_the_way_are_read_again(channel, monkeypatch):
    monkeypatch.setattr(weights_module, "DAMAGED_RETRY_S", (0.0, 0.0))
    subscriber = WeightSubscriber(channel)
    channel.publish(head(1), parent=0)
    file = channel.path(1) / WEIGHTS
    whole = file.read_bytes()
    for damaged in (whole[:-7], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        assert subscriber.poll(1) is None
        assert subscriber.poll(1) is None
        assert subscriber.refused == 1, "one version, however often it is looked at"
    file.write_bytes(whole)
    manifest = subscriber.poll(1)
    assert manifest is not None
    assert manifest.version == 1
    assert subscriber.last_error == ""


def test_fetch_over_http(channel, tmp_path):
    big = {"w": torch.randn(300_000)}
    channel.publish(big, parent=0)
    channel.publish(head(2), parent=1)
    with WeightServer(channel, token=TOKEN) as server:
        local = WeightChannel(tmp_path / "robot")
        manifest = fetch(server.url, 1, local, token=TOKEN)
        assert manifest == channel.manifest(1)
        assert torch.equal(local.load(1)["w"], big["w"])
        assert fetch(server.url, 1, local, token=TOKEN) == manifest, "already here: nothing to do"
        remote = RemoteWeights(server.url, tmp_path / "mirror", token=TOKEN)
        subscriber = WeightSubscriber(remote)
        assert subscriber.poll().version == 2
        channel.publish(head(3), parent=2)
        assert subscriber.poll().version == 3
        with pytest.raises(VerificationError, match="does not have it"):
            fetch(server.url, 9, local, token=TOKEN)
        with pytest.raises(TransferError, match="401"):
            fetch(server.url, 2, local, token="another-token-entirely")
    assert subscriber.poll() is None
    assert subscriber.accepted.version == 3
    assert not list((tmp_path / "robot").glob(".part-*"))


class CuttingProxy:
    """Forwards one connection at a time and cuts each answer after ``limit`` bytes."""

    def __init__(self, target: str, limit: int) -> None:
        host, port = target.removeprefix("http://").split(":")
        self.target, self.limit, self.connections = (host, int(port)), limit, 0
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
            with contextlib.suppress(OSError), client, socket.create_connection(self.target) as upstream:
                upstream.sendall(client.recv(65536))
                sent = 0
                while sent < self.limit:
                    data = upstream.recv(min(16384, self.limit - sent))
                    if not data:
                        break
                    client.sendall(data)
                    sent += len(data)


def test_a_broken_download_resumes_and_is_verified(channel, tmp_path):
    big = {"w": torch.randn(100_000)}
    channel.publish(big, parent=0)
    with WeightServer(channel, token=TOKEN) as server:
        proxy = CuttingProxy(server.url, limit=90_000)
        local = WeightChannel(tmp_path / "robot")
        fetch(proxy.url, 1, local, token=TOKEN)
        assert torch.equal(local.load(1)["w"], big["w"])
        assert 5 <= proxy.connections <= 8, "one manifest and about 400 kB in parts of 90 kB: nothing was sent twice"
        broken = WeightChannel(tmp_path / "other")
        proxy.limit = 300  # ends inside the manifest
        with pytest.raises(TransferError, match="then the connection ended"):
            fetch(proxy.url, 1, broken, token=TOKEN, retries=1)
        assert broken.versions() == []
        proxy.socket.close()


def test_damaged_bytes_from_the_wire_never_appear(channel, tmp_path):
    channel.publish(head(), parent=0)
    _flip(channel.path(1) / WEIGHTS, -1)
    local = WeightChannel(tmp_path / "robot")
    with WeightServer(channel, token=TOKEN) as server:
        with pytest.raises(VerificationError, match="sha256"):
            fetch(server.url, 1, local, token=TOKEN)
        assert local.versions() == []
        assert not list(local.folder.glob(".part-*")), "a damaged download is not resumed"


def _raw(server: WeightServer, path: str, method: str = "GET", token: str | None = TOKEN) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    with socket.create_connection((host, int(port)), timeout=5) as s:
        s.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{authorization}Connection: close\r\n\r\n".encode())
        answer = b""
        while data := s.recv(65536):
            answer += data
        return answer


@pytest.mark.parametrize(
    "path",
    [
        "/v1/weights/1/../../secret", "/v1/weights/../secret/x", "/v1/weights/1/..%2f..%2fsecret", "/v1/weights/1/secret",
        "/v1/weights//etc/passwd", "/v1/weights/1/.lock", "/v1/weights/00000001/manifest.json", "/v1/weights/-1/manifest.json",
        "/v1/weights/1e3/manifest.json", "/", "/etc/passwd", "/v1/weights/1/manifest.json/", "/v1/weights/%31/manifest.json",
    ],
)  # fmt: skip
def test_no_other_file_is_ever_served(channel, path):
    channel.publish(head(), parent=0)
    for place in (channel.folder.parent / "secret", channel.folder / "secret", channel.path(1) / "secret"):
        place.write_text("keep out")
    with WeightServer(channel, token=TOKEN) as server:
        answer = _raw(server, path)
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"keep out" not in answer


def test_tokens(channel, tmp_path, monkeypatch):
    channel.publish(head(), parent=0)
    monkeypatch.delenv(transfer.TOKEN_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"host='0\.0\.0\.0' is reachable from other machines"):
        WeightServer(channel, host="0.0.0.0")
    with WeightServer(channel) as open_server:
        assert open_server.url.startswith("http://127.0.0.1:")
        assert _raw(open_server, "/v1/weights", token=None).startswith(b"HTTP/1.1 200")
    with WeightServer(channel, token=TOKEN) as server:
        for token in (None, "", TOKEN[:-1], TOKEN + "x", "\u00e4"):
            assert _raw(server, "/v1/weights", token=token).startswith(b"HTTP/1.1 401")
        head_answer = _raw(server, f"/v1/weights/1/{WEIGHTS}", method="HEAD")
        assert channel.manifest(1).sha256.encode() in head_answer
        assert head_answer.endswith(b"\r\n\r\n")
        assert _raw(server, "/v1/weights", method="DELETE").startswith(b"HTTP/1.1 501")
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o644)
    with pytest.raises(PermissionError, match="chmod 600"):
        read_token(token_file=path)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert read_token(token_file=path) == TOKEN
    monkeypatch.setenv(transfer.TOKEN_VARIABLE, "short")
    with pytest.raises(ValueError, match="at least 16"):
        WeightServer(channel)
